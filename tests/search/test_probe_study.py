"""The probe of a new study: cells, seconds, what the study remembers, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from easy_set import TINY
from probe_weights import write_probe_weights

from pcam_automl.config import Enqueued
from pcam_automl.data.splits import make_split
from pcam_automl.data.store import open_store
from pcam_automl.errors import DataError, RecipeError, StudyError
from pcam_automl.models.weights import Weights
from pcam_automl.recipe import build_recipe
from pcam_automl.search import budget, create, plan
from pcam_automl.search import probe_study as module
from pcam_automl.search.budget import plan_budget
from pcam_automl.search.create import _may_be_followed, create_or_open_study
from pcam_automl.search.plan import Plan
from pcam_automl.search.probe_decisions import ProbeResult
from pcam_automl.search.probe_study import Cell, check_mode, following_cells, probe_study, values_of, views_of
from pcam_automl.search.space import load_space, parse_space
from pcam_automl.search.study import Asked
from pcam_automl.training.engine import Rung
from pcam_automl.training.start import Rows

SPACE = """\
base: {batch_size: 16}
parameters:
  backbone: {choice: [test_resnet, test_vit]}
  crop_size: {int: [32, 48], step: 16}
  lr: {float: [1.0e-4, 1.0e-2], log: true}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = write_probe_weights(tmp_path_factory.mktemp("weights"))
    return write_probe_weights(out, "test_vit", steps=0)


@pytest.fixture
def asked(easy_pack: Path, tmp_path: Path, folder: Path) -> Asked:
    (tmp_path / "probe.yaml").write_text(SPACE)
    return Asked(data=easy_pack, space=str(tmp_path / "probe.yaml"), weights=str(folder), views=192, device="cpu")


def url_of(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/s.db"


def test_a_study_with_weights_is_probed_and_remembers_it(asked: Asked, tmp_path: Path) -> None:
    said: list[str] = []
    opened = create_or_open_study("s", url_of(tmp_path), asked, say=said.append)
    record = opened.settings.plan["probe"]
    cells = {(r["backbone"], r["crop_size"]) for r in record["results"]}
    assert cells == {(name, crop) for name in ("test_resnet", "test_vit") for crop in (32, 48)}
    ranked = sorted(record["results"], key=lambda r: -r["auc"])
    first, *others = [
        (one["backbone"], one["crop_size"]) for one in [opened.settings.enqueued[0].params, *record["starts"]]
    ]
    best = (ranked[0]["backbone"], ranked[0]["crop_size"])
    assert best in (first, others[0])
    assert first not in others
    assert {"crop_size", "lr"} <= set(record["starts"][0])
    enqueued = opened.settings.enqueued
    assert enqueued[0].origin == "recipe default (on test_resnet)"
    assert enqueued[0].params["backbone"] == "test_resnet"  # the recipe's own is not in the space
    assert any(one.origin.startswith("probe") and one.params in record["starts"] for one in enqueued[1:])
    assert any(line.startswith("probe of frozen features") for line in said)
    assert opened.space.choices("backbone") == ("test_resnet", "test_vit")  # three stay at least
    again = create_or_open_study("s", url_of(tmp_path), replace(asked, probe="auto"), say=said.append)
    assert again.settings == opened.settings
    with pytest.raises(StudyError, match="--probe is 'off', the study has 'auto'"):
        create_or_open_study("s", url_of(tmp_path), replace(asked, probe="off"), say=said.append)


def test_a_fine_tuning_too_begins_in_batches_small_enough(easy_pack: Path, tmp_path: Path, folder: Path) -> None:
    """Where somebody names the recipe it begins with that one's own."""
    space = tmp_path / "fine.yaml"
    space.write_text(
        "base: {backbone: test_resnet}\nparameters:\n  crop_size: {int: [32, 96], step: 32}\n  batch_size: {choice: [32, 64]}\n"
    )
    asked = Asked(data=easy_pack, space=str(space), weights=str(folder), views=192, device="cpu", probe="off")

    def begun(name: str, asked: Asked) -> list[tuple[str, object, object]]:
        opened = create_or_open_study(name, url_of(tmp_path), asked, say=lambda text: None)
        assert (opened.start.crop_size, opened.start.batch_size) == tuple(opened.settings.enqueued[0].params.values())
        return [(one.origin, *one.params.values()) for one in opened.settings.enqueued[:2]]

    both = [("recipe default", 64, 32), ("recipe default at 96 px", 96, 32)]
    assert begun("fine", asked) == both
    assert begun("scratch", replace(asked, weights="none")) == both
    assert begun("named", replace(asked, recipe="default"))[0] == ("recipe default", 64, 64)


def test_a_fine_tuning_of_the_default_space_is_shown_nothing_smaller_a_training_from_scratch_is(
    easy_pack: Path, tmp_path: Path, folder: Path
) -> None:
    asked = Asked(
        data=easy_pack, pins={"backbone": "test_resnet"}, weights=str(folder), views=192, device="cpu", probe="off"
    )

    def scales(name: str, asked: Asked) -> tuple[tuple[float, ...], list[str]]:
        opened = create_or_open_study(name, url_of(tmp_path), asked, say=lambda text: None)
        return opened.space.choices("upscale"), [one.origin for one in opened.settings.enqueued]

    tuned, origins = scales("fine", asked)
    assert tuned == (1.0, 1.5, 2.0)
    assert not any("shown at" in origin for origin in origins)
    assert scales("scratch", replace(asked, weights="none")) == (
        (0.67, 1.0, 1.5, 2.0),
        ["recipe default", "recipe default at 96 px shown at 64", "recipe default at 96 px"],
    )
    tuned_pins = {"backbone": "test_resnet", "pretrained": True}
    assert scales("by_recipe", replace(asked, recipe="default", pins=tuned_pins))[0] == (1.0, 1.5, 2.0)
    shrunk = tmp_path / "shrunk.yaml"
    shrunk.write_text(
        "pretrained: true\ncrop_size: 96\ninput_size: 64\nbackbone: test_resnet\nbatch_size: 32\nviews: 192\n"
    )
    from_shrunk = replace(asked, recipe=str(shrunk), views=None)
    assert scales("shrunk", from_shrunk)[0] == (0.67, 1.0, 1.5, 2.0)
    opened = create_or_open_study("shrunk", url_of(tmp_path), from_shrunk, say=lambda text: None)
    assert opened.settings.enqueued[0].params["upscale"] == 0.67, "trial 0 is that recipe"
    named = tmp_path / "mine.yaml"
    named.write_text("parameters: {upscale: {choice: [0.5, 1.0]}}\n")
    assert scales("named", replace(asked, space=str(named)))[0] == (0.5, 1.0), "who names a space means it"


@pytest.mark.parametrize(("scale", "px"), [(0.5, 32), (1.5, 96)])
def test_a_pinned_scale_makes_a_study_whose_trials_show_it(
    easy_pack: Path, tmp_path: Path, scale: float, px: int
) -> None:
    pins = {"backbone": "test_resnet", "upscale": scale}
    asked = Asked(data=easy_pack, pins=pins, weights="none", device="cpu", probe="off")
    opened = create_or_open_study("s", url_of(tmp_path), asked, say=lambda text: None)
    first = opened.settings.enqueued[0].params
    shown = opened.space.suggest(optuna.trial.FixedTrial(first), {**opened.start.model_dump(), "epochs": None})
    assert (shown.crop_size, shown.network_px) == (64, px)
    assert opened.settings.plan["planned_px"] == max(64, px)


@pytest.mark.parametrize(
    ("n_started", "n_ahead", "n_backbones", "short", "followed"),
    [
        (None, 2, 1, False, True),
        (11, 2, 3, False, False),
        (11, 1, 3, False, True),  # no largest crop is listed
        (12, 2, 1, False, True),
        (12, 3, 1, False, False),  # a warm start is
        (11, 2, 4, False, True),
        (2, 2, 4, True, False),
        (2, 1, 4, True, False),
    ],
)
def test_a_budget_whose_trials_could_not_follow_a_probe_is_not_spent_on_one(
    n_started: int | None, n_ahead: int, n_backbones: int, short: bool, followed: bool
) -> None:
    names = ["test_resnet", "test_vit", "resnet18", "resnet34"][:n_backbones]
    text = f"parameters:\n  backbone: {{choice: [{', '.join(names)}]}}\n  crop_size: {{int: [32, 96], step: 16}}\n"
    space = parse_space(text, "here")
    planned = None if n_started is None else replace(plan_budget(360, used_s=20), n_started=n_started, short=short)
    assert _may_be_followed(space, planned, n_ahead) is followed


def test_a_short_fine_tuning_is_two_whole_trials_unless_somebody_wants_it_searched(
    easy_pack: Path, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "FEW", 10**6)
    monkeypatch.setattr(budget, "MOST_FINAL_EPOCHS", 1e6)
    monkeypatch.setattr(plan, "LEAST_VIEWS", 90)
    monkeypatch.setattr(plan, "MOST_EPOCHS", 1)
    pins = {"backbone": "test_resnet", "batch_size": 32}
    asked = Asked(data=easy_pack, weights=str(folder), device="cpu", budget_s=60, pins=pins)

    def made(name: str, asked: Asked) -> tuple[bool, bool, list[str]]:
        settings = create_or_open_study(name, url_of(tmp_path), asked, say=lambda text: None).settings
        of = settings.plan["budget"]
        return of["short"], settings.plan["probe"] is not None, [one.origin for one in settings.enqueued[:2]]

    crops = ["recipe default", "recipe default at 96 px"]
    assert made("short", asked) == (True, False, crops)
    assert made("probed", replace(asked, probe="on")) == (False, True, crops)
    assert made("named", replace(asked, sampler="tpe"))[::2] == (False, crops)


def test_the_network_in_place_of_the_recipe_s_own_stays_whatever_a_probe_says(
    easy_pack: Path, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what the probe begins with has trial 0's batches."""
    monkeypatch.setattr(
        module, "hopeless_backbones", lambda results, keep: {"test_vit": "bad"} if "test_vit" not in keep else {}
    )
    (tmp_path / "two.yaml").write_text(
        "parameters:\n  backbone: {choice: [test_vit, test_resnet]}\n  crop_size: {int: [48, 64], step: 16}\n"
        "  batch_size: {choice: [32, 64]}\n"
    )
    asked = Asked(data=easy_pack, space=str(tmp_path / "two.yaml"), weights=str(folder), views=192, device="cpu")
    opened = create_or_open_study("s", url_of(tmp_path), asked, say=lambda text: None)
    assert opened.space.choices("backbone") == ("test_vit", "test_resnet")
    assert opened.settings.enqueued[0].params == {"backbone": "test_vit", "crop_size": 64, "batch_size": 32}
    starts = opened.settings.plan["probe"]["starts"]
    assert starts
    assert all(start["batch_size"] == 32 for start in starts)


def test_the_network_of_a_warm_start_stays_whatever_a_probe_says(
    asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        module, "hopeless_backbones", lambda results, keep: {"test_vit": "bad"} if "test_vit" not in keep else {}
    )
    opened = create_or_open_study("without", url_of(tmp_path), asked, say=lambda text: None)
    assert opened.space.choices("backbone") == ("test_resnet",)
    warm = Enqueued(origin="warm start", params={"backbone": "test_vit", "crop_size": 32})
    monkeypatch.setattr(create, "asked_entries", lambda *_: [warm])
    opened = create_or_open_study("with", url_of(tmp_path), asked, say=lambda text: None)
    assert opened.space.choices("backbone") == ("test_resnet", "test_vit")
    assert opened.settings.enqueued[1] == warm


def test_a_study_that_measures_nothing_has_no_probe(asked: Asked, tmp_path: Path) -> None:
    opened = create_or_open_study("s", url_of(tmp_path), replace(asked, deterministic=True), say=lambda text: None)
    assert opened.settings.plan["probe"] is None


PLAN = Plan((Rung(64, 64),), 24, None, {"test_resnet": 1e4, "test_vit": 1e4}, {}, 32)


def probed(pack: Path, folder: Path, pins: dict[str, object], **words: float) -> dict[str, Any] | None:
    """The record of a probe outside any study."""
    space = parse_space(SPACE, "s").pinned({"pretrained": True, **pins})
    store = open_store(pack)
    split, start = make_split(store), build_recipe({"backbone": TINY, "pretrained": True})
    rows = Rows(split.train_order(0), split.score_rows(0))
    weights, cpu = Weights("folder", folder), torch.device("cpu")
    words = {"store": store, "rows": rows, "weights": weights, "device": cpu, "say": lambda text: None, **words}  # type: ignore[dict-item]
    return probe_study(space, start, PLAN, **words)[1]  # type: ignore[arg-type]


def test_nothing_to_rank_is_no_probe(easy_pack: Path, folder: Path) -> None:
    assert probed(easy_pack, folder, {"backbone": TINY, "crop_size": 32}) is None
    assert probed(easy_pack, folder, {"pretrained": False}) is None


def test_what_does_not_fit_is_skipped_and_named(easy_pack: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIT_S", 1e6)
    record = probed(easy_pack, folder, {})
    assert record is not None
    assert (record["results"], record["starts"], record["dropped"]) == ([], [], {})
    assert "do not fit" in record["skipped"]["test_resnet crop 48 at 48 px"]


def test_the_limit_ends_a_running_cell(easy_pack: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module._Ranking, "_expected", lambda self, recipe: -1e6)  # it thinks that everything fits
    record = probed(easy_pack, folder, {}, seconds=0.0)
    assert record is not None
    assert record["results"] == []
    assert set(record["skipped"].values()) == {"it ran into the limit"}


def test_data_that_cannot_be_probed_do_not_end_the_start_of_a_search(
    asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_label(*_: Any, **__: Any) -> Any:
        raise DataError("the first 2,000 patches are all of label 0")

    monkeypatch.setattr(module, "probe_result", one_label)
    opened = create_or_open_study("s", url_of(tmp_path), asked, say=lambda text: None)
    record = opened.settings.plan["probe"]
    assert set(record["skipped"].values()) == {"the first 2,000 patches are all of label 0"}
    assert opened.settings.enqueued


def test_modes() -> None:
    pretrained = Weights("folder", Path("here"))
    assert check_mode("auto", pretrained, deterministic=False)
    assert check_mode("on", pretrained, deterministic=False)
    assert not check_mode("auto", Weights("none"), deterministic=False)
    assert not check_mode("auto", pretrained, deterministic=True)
    with pytest.raises(RecipeError, match="--probe must be one of auto, on, off, got 'maybe'"):
        check_mode("maybe", pretrained, deterministic=False)
    with pytest.raises(RecipeError, match="--probe on needs pretrained weights, got --weights none"):
        check_mode("on", Weights("none"), deterministic=False)
    with pytest.raises(RecipeError, match="--probe on and --deterministic exclude each other"):
        check_mode("on", pretrained, deterministic=True)


def test_an_unknown_mode_is_refused_before_anything_is_packed(asked: Asked, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--probe must be one of"):
        create_or_open_study("s", url_of(tmp_path), replace(asked, probe="yes"), say=lambda text: None)
    assert not (tmp_path / "s.db").exists()


def test_views_of_the_default_space_are_every_crop_and_upscale() -> None:
    space = load_space("default")
    views = views_of(space, {"crop_size": 64})
    assert len(views) == len(set(views)) == 15, "what shrinks is left out"
    assert {crop for crop, _ in views} == {32, 48, 64, 80, 96}
    assert views_of(space.pinned({"input_size": 96}), {"crop_size": 64, "input_size": 96}) == [
        (crop, 1.0) for crop in (32, 48, 64, 80, 96)
    ]


def test_a_fine_range_is_thinned_with_its_ends() -> None:
    space = parse_space("parameters: {crop_size: {int: [32, 96], step: 2}}", "s")
    assert values_of(space.parameters["crop_size"], 64) == [32, 48, 64, 80, 96]
    assert values_of(None, 64) == [64]


def test_following_cells_are_all_other_views_of_the_best_two_the_farthest_first() -> None:
    views = [(crop, up) for crop in (32, 64, 96) for up in (1.0, 2.0)]
    found = [ProbeResult(name, 64, 1.0, 64, auc, (0, 1), 1.0) for name, auc in (("a", 0.7), ("b", 0.9), ("c", 0.8))]
    cells = following_cells(found, views)
    assert len(cells) == len(set(cells)) == 10
    assert {cell.backbone for cell in cells} == {"b", "c"}
    assert Cell("b", 64, 1.0) not in cells
    assert cells[0] == Cell("b", 96, 2.0)  # 0.6 octaves away in the crop and 1.6 in what the network sees
    assert following_cells([], views) == []
