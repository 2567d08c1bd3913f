from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pcam_automl.configs_folder import find_config, list_configs
from pcam_automl.errors import RecipeError
from pcam_automl.recipe import Recipe
from pcam_automl.search.space import SearchSpace, load_space, parse_space
from pcam_automl.yaml_text import parse_yaml, read_config_text

SMALL = """
base: {views: 1000, flips: false}
parameters:
  backbone: {choice: [resnet18, resnet34]}
  crop_size: {int: [32, 96], step: 16}
  upscale: {choice: [1.0, 1.5]}
  optimizer: {choice: [adamw, sgd]}
  lr: {float: [1e-4, 1e-2], log: true}
  beta1: {float: [0.8, 0.98], when: {optimizer: [sgd]}}
  frozen: {choice: [0.0, 0.2], when: {pretrained: true}}
  dropout: {float: [0.0, 0.5], step: 0.1}
"""


def fixed(**params: Any) -> optuna.trial.FixedTrial:
    all_params = {
        "backbone": "resnet18",
        "crop_size": 64,
        "upscale": 1.0,
        "optimizer": "adamw",
        "lr": 1e-3,
        "dropout": 0.0,
    }
    return optuna.trial.FixedTrial({**all_params, **params})


def random_trials(space: SearchSpace, seed: int, n: int) -> list[optuna.Trial]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return [study.ask() for _ in range(n)]


# --- what a space gives ----------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), pretrained=st.booleans(), smallest=st.sampled_from([1, 75, 100]))
def test_params_of_reproduces_every_suggested_recipe(seed: int, pretrained: bool, smallest: int) -> None:
    space = load_space("default", pins={"pretrained": pretrained})
    (trial,) = random_trials(space, seed, 1)
    recipe = space.suggest(trial, {"views": 100}, smallest_input=lambda _: smallest)
    again = optuna.trial.FixedTrial(space.params_of(recipe, lambda _: smallest))
    assert space.suggest(again, {"views": 100}, smallest_input=lambda _: smallest) == recipe


@given(
    crop=st.integers(16, 48).map(lambda half: 2 * half),
    smallest=st.integers(1, 224),
    scales=st.lists(st.floats(0.33, 4.0), min_size=1, max_size=5, unique=True),
    data=st.data(),
)
def test_scale_of_a_raised_input_is_found_again(
    crop: int, smallest: int, scales: list[float], data: st.DataObject
) -> None:
    space = parse_space(f"parameters: {{upscale: {{choice: {scales}}}}}", "s").pinned({"crop_size": crop})
    trial = optuna.trial.FixedTrial({"upscale": data.draw(st.sampled_from(scales))})
    recipe = space.suggest(trial, {}, smallest_input=lambda _: smallest)
    again = optuna.trial.FixedTrial(space.params_of(recipe, lambda _: smallest))
    assert space.suggest(again, {}, smallest_input=lambda _: smallest) == recipe


@pytest.mark.parametrize("name", ["default", "quick"])
def test_shipped_space_reproduces_the_default_recipe_as_trial_zero(name: str) -> None:
    space = load_space(name)
    trial = optuna.trial.FixedTrial(space.params_of(Recipe()))
    assert space.suggest(trial, {}) == Recipe()


@pytest.mark.parametrize("name", list_configs("space"))
def test_shipped_space_round_trips_and_names_backbones_that_timm_has(name: str) -> None:
    import timm

    space = load_space(name)
    assert parse_space(space.to_yaml(), name) == space
    assert parse_space(space.to_yaml(), name).hash == space.hash
    assert [b for b in space.choices("backbone") if not timm.is_model(b)] == []


def test_default_space_has_ten_backbones_and_quick_few_dimensions() -> None:
    assert len(load_space("default").choices("backbone")) >= 10
    quick = load_space("quick")
    assert len(quick.choices("backbone")) in (3, 4)
    assert len(quick.parameters) <= 5


def test_base_overrides_defaults_and_suggestions_override_both() -> None:
    recipe = parse_space(SMALL, "s").suggest(fixed(crop_size=48), {"flips": True, "crop_size": 96, "seed": 3})
    assert (recipe.flips, recipe.crop_size, recipe.seed, recipe.views) == (False, 48, 3, 1000)


def test_inactive_parameter_keeps_the_default_and_is_not_asked() -> None:
    space = parse_space(SMALL, "s")
    trial = fixed()
    assert space.suggest(trial, {"beta1": 0.5}).beta1 == 0.5
    assert "beta1" not in trial.distributions
    assert "frozen" not in trial.distributions
    assert space.suggest(fixed(optimizer="sgd", beta1=0.9), {"beta1": 0.5}).beta1 == 0.9


def test_condition_may_name_a_fixed_field() -> None:
    space = parse_space(SMALL, "s").pinned({"pretrained": True})
    assert space.suggest(fixed(frozen=0.2), {}).frozen == 0.2


@pytest.mark.parametrize(
    ("crop", "upscale", "want"),
    [(64, 1.0, None), (64, 1.5, 96), (48, 1.5, 72), (96, 0.67, 64), (48, 0.67, 32), (32, 0.67, None)],
)
def test_upscale_sets_an_even_input_size(crop: int, upscale: float, want: int | None) -> None:
    space = parse_space(SMALL.replace("[1.0, 1.5]", "[0.67, 1.0, 1.5]"), "s")
    recipe = space.suggest(fixed(crop_size=crop, upscale=upscale), {})
    assert recipe.input_size == want
    assert recipe.network_px >= 32, "no network is made for less"
    if want is not None:
        assert space.params_of(recipe)["upscale"] == upscale


@pytest.mark.parametrize(("smallest", "want"), [(64, 64), (75, 76), (32, 64)])
def test_input_is_raised_to_the_backbones_smallest(smallest: int, want: int) -> None:
    recipe = parse_space(SMALL, "s").suggest(fixed(), {}, smallest_input=lambda _: smallest)
    assert recipe.network_px == want


def test_params_of_moves_values_into_the_space_and_leaves_unknown_names_out() -> None:
    space = parse_space(SMALL, "s")
    params = space.params_of(Recipe(backbone="vgg11", crop_size=70, lr=1.0, dropout=0.33, input_size=384))
    assert params == {
        "crop_size": 64,
        "upscale": 1.5,
        "optimizer": "adamw",
        "lr": 1e-2,
        "dropout": pytest.approx(0.3),
    }


def test_order_of_parameters_is_part_of_the_hash() -> None:
    one = parse_space("parameters: {lr: {float: [0.1, 0.2]}, crop_size: {choice: [64]}}", "s")
    two = parse_space("parameters: {crop_size: {choice: [64]}, lr: {float: [0.1, 0.2]}}", "s")
    assert one.hash != two.hash


# --- pins and missing choices ----------------------------------------------------------------------------------------


def test_pin_fixes_a_field_and_ends_its_search() -> None:
    space = parse_space(SMALL, "s").pinned({"crop_size": 80, "optimizer": "sgd"})
    assert not {"crop_size", "optimizer"} & set(space.parameters)
    recipe = space.suggest(fixed(beta1=0.95), {})
    assert (recipe.crop_size, recipe.optimizer, recipe.beta1) == (80, "sgd", 0.95)
    assert parse_space(space.to_yaml(), "s") == space


def test_pinned_input_size_ends_upscale() -> None:
    space = parse_space(SMALL, "s").pinned({"input_size": 128})
    assert "upscale" not in space.parameters
    assert space.suggest(fixed(), {}).input_size == 128


def test_pinned_epochs_replace_views() -> None:
    assert parse_space(SMALL, "s").pinned({"epochs": 2}).suggest(fixed(), {}).epochs == 2
    searched = "parameters: {views: {int: [100, 200]}}"
    assert "views" not in parse_space(searched, "s").pinned({"epochs": 2}).parameters


def test_wrong_pins_are_reported_together() -> None:
    with pytest.raises(RecipeError, match=r"crop_size must be even.*--set learning_rat is not a known field") as caught:
        parse_space(SMALL, "s").pinned({"crop_size": 33, "learning_rat": 1.0})
    assert "\n" not in str(caught.value)


def test_missing_backbones_are_dropped_with_what_depends_on_them() -> None:
    text = SMALL + "  ema: {choice: [0.9, 0.99], when: {backbone: resnet34}}\n"
    space = parse_space(text, "s").without_choices("backbone", ["resnet34"])
    assert space.choices("backbone") == ("resnet18",)
    assert "ema" not in space.parameters
    with pytest.raises(RecipeError, match="no backbone is left"):
        space.without_choices("backbone", ["resnet18"])
    with pytest.raises(RecipeError, match="backbone is fixed to 'resnet18'"):
        space.pinned({"backbone": "resnet18"}).without_choices("backbone", ["resnet18"])


def test_a_cap_leaves_the_steps_of_a_range_and_the_choices_below_it() -> None:
    space = parse_space("parameters: {crop_size: {int: [32, 96], step: 16}, batch_size: {choice: [16, 32]}}", "s")
    assert space.capped("crop_size", 80).parameters["crop_size"].spread(99) == [32, 48, 64, 80]
    assert space.capped("crop_size", 50).parameters["crop_size"].spread(99) == [32, 48]
    assert space.capped("crop_size", 40).parameters["crop_size"].spread(99) == [32]
    assert space.capped("crop_size", 96) is space
    assert space.capped("batch_size", 20).choices("batch_size") == (16,)
    assert space.capped("lr", 1) is space
    with pytest.raises(RecipeError, match="crop_size in the space begins at 32, and the patches allow 24 at most"):
        space.capped("crop_size", 24)


def test_choices_of_a_fixed_field_is_its_value() -> None:
    space = parse_space(SMALL, "s")
    assert space.choices("views") == (1000,)
    assert space.choices("lr") == ()
    assert space.choices("weight_decay") == ()


# --- faults ----------------------------------------------------------------------------------------------------------

FAULTS = [
    ("parameters: {learning_rate: {float: [0.1, 0.2]}}", "s.parameters.learning_rate is not a recipe field"),
    ("parameters: {crop_sise: {int: [32, 96]}}", "did you mean 'crop_size'"),
    ("parametres: {lr: {float: [0.1, 0.2]}}", r"s.parametres is not a known key \(did you mean 'parameters'\?\)"),
    ("base: {lr: 0.1}", "s.parameters is required"),
    ("parameters: [lr]", "s.parameters must be a mapping"),
    ("parameters: {lr: 0.1}", "s.parameters.lr must be a mapping such as"),
    ("parameters: {lr: {floot: [0.1, 0.2]}}", r"lr.floot is not a known field \(did you mean 'float'\?\)"),
    ("parameters: {lr: {float: [0.1, 0.2], choice: [0.1]}}", "exactly one of choice, int and float, got choice, float"),
    ("parameters: {lr: {log: true}}", "exactly one of choice, int and float, got none"),
    ("parameters: {lr: {float: [0.2, 0.1]}}", r"lr.float is upside down: \[0.2, 0.1\] \(did you mean \[0.1, 0.2\]"),
    ("parameters: {lr: {float: [0.1]}}", "s.parameters.lr.float"),
    ("parameters: {lr: {float: [.nan, 0.1]}}", "s.parameters.lr.float.1 must be a finite number"),
    ("parameters: {weight_decay: {float: [0, 0.1], log: true}}", "must start above 0 with log: true, got 0"),
    ("parameters: {dropout: {float: [0.0, 1.5]}}", "dropout.float must be less than or equal to 1, got 1.5"),
    ("parameters: {crop_size: {int: [32, 100], step: 2}}", "crop_size.int must be less than or equal to 96, got 100"),
    ("parameters: {crop_size: {int: [32, 96]}}", "must be even, got 33.*even start and an even step"),
    ("parameters: {crop_size: {float: [32, 96]}}", "crop_size takes no float range; use int"),
    ("parameters: {optimizer: {int: [1, 2]}}", "optimizer takes no int range; use choice"),
    ("parameters: {flips: {int: [0, 1]}}", "flips takes no int range; use choice"),
    (
        "parameters: {crop_size: {int: [32, 96], step: 20}}",
        r"step 20 does not divide \[32, 96\] \(did you mean \[32, 92\]",
    ),
    ("parameters: {batch_size: {int: [32, 96], step: 1.5}}", "step of an int range must be whole, got 1.5"),
    ("parameters: {lr: {float: [0.1, 0.2], step: 0}}", "lr.step must be greater than 0, got 0"),
    ("parameters: {lr: {float: [0.1, 0.2], step: 0.1, log: true}}", "step and log exclude each other"),
    ("parameters: {optimizer: {choice: []}}", "optimizer.choice is empty"),
    ("parameters: {optimizer: {choice: [adamw, sdg]}}", r"must be .*'sgd'.*got 'sdg' \(did you mean 'sgd'\?\)"),
    ("parameters: {batch_size: {choice: [32, 64, 32]}}", "batch_size.choice names 32 twice"),
    ("parameters: {batch_size: {choice: [32], log: true}}", "step and log belong to a range"),
    ("parameters: {exclude_ids: {choice: [[a], [b]]}}", "lists cannot be searched"),
    ("base: {lr: 0.1}\nparameters: {lr: {float: [0.1, 0.2]}}", "lr is both in base and in parameters"),
    ("base: {lr: -1}\nparameters: {}", "s.base.lr must be greater than 0, got -1"),
    ("base: {lrr: 1}\nparameters: {}", r"s.base.lrr is not a known field \(did you mean 'lr'\?\)"),
    ("base: {epochs: 1, views: 3}\nparameters: {}", "epochs and views exclude each other"),
    ("parameters: {warmup: {float: [0.0, 0.6]}, decay: {float: [0.1, 0.6]}}", r"warmup \+ decay must be at most 1"),
    ("base: {input_size: 96}\nparameters: {upscale: {choice: [1, 2]}}", "input_size and upscale exclude each other"),
    ("parameters: {upscale: {float: [0.2, 2.0]}}", r"upscale.float must be in \[0.33, 4\], got 0.2"),
    ("parameters: {lr: {float: [0.1, 0.2], when: {optimiser: sgd}}}", r"neither.*did you mean 'optimizer'"),
    ("parameters: {lr: {float: [0.1, 0.2], when: {lr: 0.1}}}", "lr cannot depend on itself"),
    ("parameters: {lr: {float: [0.1, 0.2], when: {optimizer: []}}}", "when.optimizer names no value"),
    ("parameters: {lr: {float: [0.1, 0.2], when: {optimizer: sdg}}}", "got 'sdg'"),
    (
        "parameters: {optimizer: {choice: [adamw, sgd]}, lr: {float: [0.1, 0.2], when: {optimizer: adam}}}",
        "can only be one of adamw, sgd, got 'adam'",
    ),
    (
        "parameters: {lr: {float: [0.1, 0.2]}, ema: {choice: [0.9], when: {lr: 0.1}}}",
        "lr is a float range, which never equals a value",
    ),
    (
        "parameters: {crop_size: {int: [32, 64], step: 16}, ema: {choice: [0.9], when: {crop_size: 40}}}",
        r"crop_size can only be in \[32, 64\], got 40",
    ),
    (
        "parameters: {lr: {float: [0.1, 0.2], when: {optimizer: sgd}}, "
        "optimizer: {choice: [sgd, adam], when: {lr: 0.1}}}",
        r"optimizer comes later \(or depends on lr\); move optimizer above it",
    ),
    ("parameters: {lr: {float: [1, 2]}, lr: {float: [1, 2]}}\nparameters: {}", "parameters given twice"),
]


@pytest.mark.parametrize(("text", "message"), FAULTS, ids=[text[:60] for text, _ in FAULTS])
def test_faulty_space_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        parse_space(text, "s")
    assert "\n" not in str(caught.value)


def test_all_faults_are_reported_at_once() -> None:
    text = """
    bass: {}
    base: {epoks: 3}
    parameters:
      crop_size: {int: [96, 32]}
      optimizer: {choice: []}
      lr: {flaot: [1, 2]}
      droput: {choice: [0.1]}
    """
    with pytest.raises(RecipeError) as caught:
        parse_space(text, "s")
    for part in ("bass", "epoks", "upside down", "empty", "'float'", "'dropout'"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("parameters: {dropout: {float: [-0.5, 1.5], stepp: 0.1}}", ("stepp is not", "got -0.5", "got 1.5")),
        ("parameters: {lr: {float: [1, 2], float: [0.2, -0.1]}, bta1: {choice: [1]}}",
         ("parameters.lr.float given twice", "upside down", "got -0.1", "'beta1'")),
        ("base: {lr: -1, epochs: 1, views: 3}\nparameters: {}", ("got -1", "epochs and views exclude each other")),
        ("parameters: {warmup: {choice: [0.9]}, lr: {log: maybe}}", ("warmup + decay", "lr.log")),
        ("parameters: {warmup: {choice: [0.9]}}\nbase: {epochs: 1, views: 3}", ("warmup + decay", "epochs and views")),
        ("parameters: {lr: {float: [1, 2, 3], when: {optimiser: sgd}}}", ("lr.float", "'optimizer'")),
        ("parameters: {lr: {float: [-1, 1], choice: [-2]}}", ("exactly one of", "got -1.0", "got -2")),
        ("parameters: {backbone: {choice: [nope], lgo: true}}", ("'nope' is no model", "lgo is not")),
        ("base: {backbone: nope}\nparameters: {lr: {float: [2, 1]}}", ("s.base.backbone 'nope' is no", "upside down")),
        ("parameters: {lr: {float: [2, 1], when: {backbone: nope}}}", ("lr.when.backbone 'nope' is no", "upside down")),
    ],
)  # fmt: skip
def test_no_fault_hides_another(text: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_space(text, "s", backbone_fault=lambda name: f"{name!r} is no model" if name == "nope" else None)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "n_mistakes"),
    [
        ("parametres: {lr: {float: [0.1, 0.2]}}", 1),
        ("parameters: {optimizer: {choise: [sgd]}, lr: {float: [0.1, 0.2], when: {optimizer: sgd}}}", 1),
        ("parameters: {dropout: {float: [1.5, 1.5]}}", 1),
        ("base: {warmup: 1.5}\nparameters: {}", 1),
    ],
)
def test_no_mistake_is_reported_twice(text: str, n_mistakes: int) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_space(text, "s")
    assert len(str(caught.value).split("; ")) == n_mistakes, str(caught.value)


def test_faults_name_the_file_by_the_path_that_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "space.yaml").write_text("parameters:\n  lr: {float: [0.1, 0.2}\n")
    with pytest.raises(RecipeError, match=r"^my/space\.yaml is not valid YAML: line 2, column 24: .*"):
        load_space("my/space.yaml")
    (tmp_path / "my" / "space.yaml").write_text("parameters: {backbone: {choice: [resnet18]}}")
    with pytest.raises(RecipeError, match=r"^my/space\.yaml\.parameters\.backbone\.choice must be another$"):
        load_space("my/space.yaml", backbone_fault=lambda name: "must be another")


def test_scientific_notation_without_a_point_is_a_number() -> None:
    assert parse_space("parameters: {lr: {float: [1e-4, 1e-2]}}", "s").parameters["lr"].low == 1e-4
    assert parse_space("parameters: {lr: {choice: [1e-4, 1e-2]}}", "s").choices("lr") == (1e-4, 1e-2)


# --- files -----------------------------------------------------------------------------------------------------------


def test_config_is_found_by_name_and_by_path(tmp_path: Path) -> None:
    assert find_config("space", "quick").name == "quick.yaml"
    mine = tmp_path / "mine.yaml"
    mine.write_text("parameters: {lr: {float: [0.1, 0.2]}}")
    assert load_space(str(mine)).parameters["lr"].high == 0.2


def test_bare_name_is_never_a_file_beside_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").write_text("parameters: {}")
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "../mine", str(tmp_path / "mine"), "..", "", "space/quick", "a\0b"):
        with pytest.raises(RecipeError, match="no search space named"):
            find_config("space", name)


def test_unknown_name_and_missing_file_say_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError,
        match=r"no search space named 'quik' \(did you mean 'quick'\?\); known: cnn, default, dense, lr_only, quick",
    ):
        find_config("space", "quik")
    with pytest.raises(RecipeError, match="does not exist"):
        find_config("space", str(tmp_path / "none.yaml"))
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(RecipeError, match="is a folder"):
        find_config("space", str(tmp_path / "folder.yaml"))


def test_every_line_of_the_default_space_that_searches_has_a_reason() -> None:
    lines = read_config_text(find_config("space", "default"), 1 << 16).splitlines()
    names = list(parse_yaml("\n".join(lines), "default")["parameters"])
    starts = [next(i for i, line in enumerate(lines) if line.startswith(f"  {name}:")) for name in names]
    assert [names[k] for k, i in enumerate(starts) if not lines[i - 1].strip().startswith("#")] == []
