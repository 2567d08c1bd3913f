"""Warm starts and priors: what is taken of another study, what is refused, and that the first trials take it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.trial import FrozenTrial, TrialState, create_trial

from pcam_automl.config import StudySettings
from pcam_automl.configs_folder import list_configs
from pcam_automl.data.splits import Split, make_split, write_split
from pcam_automl.data.store import open_store, pixels_hash
from pcam_automl.errors import DataError, Interrupted, RecipeError, StudyError
from pcam_automl.recipe import Recipe, build_recipe
from pcam_automl.search import warm_start
from pcam_automl.search.create import create_or_open_study
from pcam_automl.search.objective import Objective
from pcam_automl.search.priors import (
    Prior,
    PriorEntry,
    check_prior_holdout,
    load_prior,
    parse_prior,
    prior_entries,
    prior_of,
)
from pcam_automl.search.reading import n_finished_of
from pcam_automl.search.space import SearchSpace, parse_space
from pcam_automl.search.storage import open_storage
from pcam_automl.search.study import Asked, OpenStudy, open_study
from pcam_automl.search.turns import Limits
from pcam_automl.search.warm_start import (
    Source,
    Tried,
    check_holdout,
    diverse_best,
    open_source_study,
    tried_in,
    warm_entries,
    weights_warning,
)
from pcam_automl.search.worker import run_worker

CPU = torch.device("cpu")
TEXT = """\
base: {batch_size: 16, crop_size: 32, pretrained: false}
parameters:
  backbone: {choice: [test_resnet, test_vit]}
  lr: {float: [1.0e-4, 1.0e-2], log: true}
"""
SPACE = parse_space(TEXT, "test")


def recipe(**fields: Any) -> Recipe:
    return build_recipe({"backbone": "test_resnet", "crop_size": 32, "batch_size": 16, **fields})


def row(state: TrialState, aucs: list[float], **fields: Any) -> FrozenTrial:
    """A row with so many rungs, at steps 10, 30, 90."""
    return create_trial(
        state=state,
        value=aucs[-1] if state == TrialState.COMPLETE else None,
        intermediate_values=dict(zip((10, 30, 90), aucs, strict=False)),
        user_attrs={
            "recipe": recipe(**fields).model_dump_json(),
            "rungs": [
                {"rung": i, "views": 10 * 3**i, "subset": 10, "auc": auc, "loss": 0.5, "train_loss": 0.5}
                | {"seconds": 1.0, "images_per_s": 1.0, "lr": 1e-3}
                for i, auc in enumerate(aucs)
            ],
        },
    )


def study_of(*rows: FrozenTrial, direction: str = "maximize") -> optuna.Study:
    study = optuna.create_study(direction=direction)
    for one in rows:
        study.add_trial(one)
    return study


def test_complete_trials_come_first_then_pruned_ones_by_how_far_they_came() -> None:
    study = study_of(
        row(TrialState.PRUNED, [0.99]),
        row(TrialState.COMPLETE, [0.5, 0.6, 0.7]),
        row(TrialState.PRUNED, [0.5, 0.8]),
        row(TrialState.COMPLETE, [0.5, 0.6, 0.9]),
        row(TrialState.FAIL, [0.9]),
    )
    assert [(one.number, one.complete) for one in tried_in(study)] == [(3, True), (1, True), (2, False), (0, False)]
    assert tried_in(study)[0].auc == 0.9
    lower_is_better = study_of(*study.get_trials(), direction="minimize")
    assert [one.number for one in tried_in(lower_is_better)] == [1, 3, 2, 0]


def test_a_lineage_counts_once_and_diverged_trials_not_at_all() -> None:
    paused, thawed = row(TrialState.PRUNED, [0.8]), row(TrialState.COMPLETE, [0.8, 0.85, 0.9])
    diverged = row(TrialState.PRUNED, [0.95])
    diverged.user_attrs["reason"] = "diverged: the training loss became nan"
    for one in (paused, thawed):
        one.user_attrs["lineage"] = "0"
    assert [one.number for one in tried_in(study_of(paused, thawed, diverged))] == [1]


def tried(*lrs: float, backbone: str = "test_resnet") -> list[Tried]:
    return [Tried(i, 0.9 - i / 100, True, recipe(lr=lr, backbone=backbone)) for i, lr in enumerate(lrs)]


def test_diversity_is_looked_for_among_the_best_quarter_only() -> None:
    lrs = [1e-3, 1.1e-3, 9e-3, 1.2e-3, *[1e-4] * 12]
    assert [one.number for one in diverse_best(tried(*lrs), SPACE, 2)] == [0, 2]
    assert [one.number for one in diverse_best(tried(*lrs), SPACE, 5)] == [0, 2, 3, 1]
    assert [one.number for one in diverse_best(tried(1e-3, 9e-3), SPACE, 5)] == [0], "a quarter of two is the best one"


def source(settings: StudySettings, folder: Path, *found: Tried) -> Source:
    return Source("other", settings, folder, found)


def test_backbones_that_the_space_lacks_are_passed_over_and_none_left_is_refused(study: OpenStudy) -> None:
    mixed = [*tried(1e-3, backbone="resnet18"), *tried(2e-3)]
    (entry,) = warm_entries(source(study.settings, study.folder, *mixed), SPACE)
    assert (entry.origin, entry.params) == (
        "warm start other, trial 0",
        {"backbone": "test_resnet", "lr": pytest.approx(2e-3)},
    )
    with pytest.raises(
        StudyError,
        match=r"none of its 1 trials fits this search space \(its backbones: resnet18; here: test_resnet, test_vit\)",
    ):
        warm_entries(source(study.settings, study.folder, *tried(1e-3, backbone="resnet18")), SPACE)
    fixed = SPACE.pinned({"backbone": "test_vit"})
    assert warm_entries(source(study.settings, study.folder, *mixed), fixed)[0].params == {"lr": pytest.approx(1e-3)}


@pytest.fixture(scope="module")
def asked_once(easy_pack: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Asked, str]:
    folder = tmp_path_factory.mktemp("warm")
    (folder / "tiny.yaml").write_text(TEXT)
    asked = Asked(data=easy_pack, space=str(folder / "tiny.yaml"), weights="none", views=48, device="cpu")
    return asked, f"sqlite:///{folder / 'studies' / 's.db'}"


@pytest.fixture(scope="module")
def study(asked_once: tuple[Asked, str]) -> OpenStudy:
    """A study to start from: four complete trials of known rates, none of them trained."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    asked, url = asked_once
    opened = create_or_open_study("first", url, replace(asked, command="pcam-automl search"), say=lambda text: None)
    for auc, lr in ((0.7, 1e-4), (0.9, 5e-3), (0.6, 1e-4), (0.8, 1e-3)):
        opened.study.add_trial(row(TrialState.COMPLETE, [0.5, 0.6, auc], lr=lr))
    return opened


def created(asked_once: tuple[Asked, str], name: str, **changes: Any) -> tuple[OpenStudy, list[str]]:
    asked, url = asked_once
    said: list[str] = []
    opened = create_or_open_study(name, url, replace(asked, **changes), say=said.append)
    torch.set_num_threads(1)
    return opened, said


def test_the_first_trials_take_the_default_and_then_the_warm_start(
    asked_once: tuple[Asked, str], study: OpenStudy
) -> None:
    opened, said = created(asked_once, "second", warm_start="first", views=16)
    assert [entry.origin for entry in opened.settings.enqueued] == [
        "recipe default (on test_resnet)",
        "warm start first, trial 1",
    ]
    assert any("was searched on the same data" in line and "the same fold" in line for line in said)
    objective = Objective(opened, CPU)

    def stop() -> None:
        if n_finished_of(opened.study) == 3:
            raise Interrupted("enough", 15)

    objective.stop = stop
    with pytest.raises(Interrupted):
        run_worker(objective, Limits(8))
    trials = opened.study.get_trials()
    assert [t.user_attrs.get("origin") for t in trials[:3]] == [
        "recipe default (on test_resnet)",
        "warm start first, trial 1",
        None,
    ]
    assert trials[0].params["lr"] == pytest.approx(2e-3)
    assert (trials[1].params["backbone"], trials[1].params["lr"]) == ("test_resnet", pytest.approx(5e-3))
    again = open_study("second", asked_once[1], Asked(warm_start="first"))
    assert again.settings.enqueued == opened.settings.enqueued
    with pytest.raises(StudyError, match="--warm-start is 'third', the study has 'first'"):
        open_study("second", asked_once[1], Asked(warm_start="third"))


def test_a_study_that_does_not_exist_or_has_no_trial_is_refused(
    asked_once: tuple[Asked, str], study: OpenStudy, tmp_path: Path
) -> None:
    _, url = asked_once
    created(asked_once, "empty")
    for text, message in (
        ("frist", r"--warm-start frist: there is no study 'frist' in .*first.*did you mean 'first'"),
        ("empty", "--warm-start empty: study 'empty' has no finished trial"),
        (f"{url}#empty", "has no finished trial"),
        (url, r"holds \d+ studies \(empty, first.*\); name one: .*#NAME"),
        (f"sqlite:///{tmp_path}/none.db", "--warm-start sqlite.*none.db"),
        ("oracle://host/db#x", "storage scheme must be one of sqlite"),
    ):
        with pytest.raises(StudyError, match=message):
            open_source_study(text, url)
    assert open_source_study(f"{url}#first", None).shown == f"{url}#first"


def test_a_holdout_that_the_other_study_searched_on_is_refused(study: OpenStudy, tmp_path: Path) -> None:
    """Another split of the same data has nearly all of the holdout among its folds; the same split has none of it."""
    store = study.store
    other = source(study.settings, study.folder, *tried(1e-3))
    split = make_split(store, seed=1, holdout=0.2)
    n = len(split.holdout_rows())
    with pytest.raises(
        DataError, match=rf"was searched on {n} of the {n} patches that are set aside here.*--seed 0 --holdout 0\)"
    ):
        check_holdout(store, split, other)
    write_split(split, tmp_path / "split.npz")
    same = source(study.settings.model_copy(update={"split_hash": split.hash, "holdout": 0.2}), tmp_path, *tried(1e-3))
    assert "the same fold" in str(check_holdout(store, split, same))
    without = make_split(store, seed=1)
    assert "folds that share patches" in str(check_holdout(store, without, other))
    for folder in (tmp_path / "gone", tmp_path):  # there lies the split of another study of that name
        with pytest.raises(DataError, match=r"its split file is not .*split\.npz"):
            check_holdout(store, split, source(study.settings, folder, *tried(1e-3)))


def test_other_data_are_compared_by_their_pixels(study: OpenStudy, easy_pack: Path, tmp_path: Path) -> None:
    split = make_split(study.store, seed=1, holdout=0.2)
    far = study.settings.model_copy(update={"pack_hash": "0" * 64, "pack": str(tmp_path / "gone")})
    said = check_holdout(study.store, split, source(far, study.folder, *tried(1e-3)))
    assert said is not None
    assert "nobody can say" in said
    # a pack of another hash with the same pixels, as other groups make it
    elsewhere = replace(open_store(easy_pack), content_hash="1" * 64)
    assert warm_start._n_shared(elsewhere, split.holdout_rows(), source(study.settings, study.folder)) == len(
        split.holdout_rows()
    )


def test_recipes_for_other_weights_are_warned_of() -> None:
    assert weights_warning("x", pretrained=True, here=True) is None
    said = weights_warning("x", pretrained=True, here=False)
    assert said == (
        "warning: x was searched with pretrained weights, this study trains from scratch: its learning rates may not carry over"
    )


def prior(study: OpenStudy, space: SearchSpace = SPACE, k: int = 5) -> Prior:
    found = open_source_study("first", study.url)
    return prior_of(found, space, data="easy", command="pcam-automl search", export="pcam-automl export-prior", k=k)


def test_a_prior_is_read_back_as_it_was_written(study: OpenStudy) -> None:
    made = prior(study)
    assert parse_prior(made.to_yaml(), "file") == made
    (entry,) = made.recipes
    assert (entry.trial, entry.auc, entry.recipe.lr) == (1, 0.9, 5e-3)
    assert set(entry.fields) == {"backbone", "crop_size", "batch_size", "lr"}, "what differs from the defaults"
    assert (made.pack_hash, made.split_hash, made.n_trials) == (study.settings.pack_hash, study.settings.split_hash, 4)


def test_faults_of_a_prior_name_the_key(study: OpenStudy) -> None:
    text = prior(study).to_yaml()
    for wrong, message in (
        (text.replace("seed: 0", "seed: -1"), r"mine\.seed must be greater than or equal to 0, got -1"),
        (text.replace("lr: 0.005", "lr: -1"), r"mine\.recipes\.1\.fields\.lr must be greater than 0"),
        (text.replace("holdout:", "holdut:"), r"mine\.holdut is not a known field \(did you mean 'holdout'\?\)"),
    ):
        assert wrong != text
        with pytest.raises(RecipeError, match=message):
            parse_prior(wrong, "mine")


def test_a_prior_gives_entries_of_the_space_and_is_refused_on_its_own_holdout(study: OpenStudy) -> None:
    made = prior(study)
    (entry,) = prior_entries(made, "easy", SPACE)
    assert entry.origin == "prior easy, trial 1"
    assert entry.params == {"backbone": "test_resnet", "lr": pytest.approx(5e-3)}
    with pytest.raises(RecipeError, match="--prior easy: none of its recipes fits this search space"):
        prior_entries(made, "easy", parse_space("parameters: {backbone: {choice: [resnet18, resnet34]}}", "t"))
    split = make_split(study.store, seed=1, holdout=0.2)
    with pytest.raises(DataError, match=r"--prior easy was searched on these data in another split"):
        check_prior_holdout(made, "easy", study.store, split)
    assert "the same data" in str(check_prior_holdout(made, "easy", study.store, make_split(study.store)))
    elsewhere = made.model_copy(update={"pack_hash": "0" * 64})
    with pytest.raises(DataError, match="in another split"):  # the same patches with other groups or domains, say
        check_prior_holdout(elsewhere, "easy", study.store, split)
    assert "the same data" in str(check_prior_holdout(elsewhere, "easy", study.store, make_split(study.store)))
    for unknown in (None, "0" * 64):  # of before there was such a hash, or of other patches
        foreign = elsewhere.model_copy(update={"pixels_hash": unknown})
        assert "--seed" in str(check_holdout_fault(made, study, split))
        assert "--seed" not in str(check_holdout_fault(elsewhere, study, split)), "no seed makes that split here"
        assert "nobody can say" in str(check_prior_holdout(foreign, "easy", study.store, split))
        assert check_prior_holdout(foreign, "easy", study.store, make_split(study.store)) is None


def check_holdout_fault(made: Prior, study: OpenStudy, split: Split) -> DataError:
    with pytest.raises(DataError) as fault:
        check_prior_holdout(made, "easy", study.store, split)
    return fault.value


def test_a_prior_is_known_by_its_labelled_patches_however_they_were_packed(study: OpenStudy) -> None:
    store, made = study.store, prior(study)
    labelled = store.development_rows()
    assert len(labelled) < len(store), "there is a test part"
    without_test = np.asarray(store.digest)[labelled][::-1]
    assert made.pixels_hash == pixels_hash(without_test)
    assert made.pixels_hash != pixels_hash(without_test[1:])


def test_a_recipe_in_stages_brings_the_rates_that_it_trained_with(study: OpenStudy) -> None:
    staged = build_recipe(
        {
            "backbone": "test_resnet",
            "views": 64,
            "stages": [{"share": 0.4, "lr": 2e-2, "trainable": 0.0}, {"share": 0.6, "lr": 4e-4, "weight_decay": 0.01}],
        }
    )
    space = parse_space(
        "parameters:\n  lr: {float: [1.0e-4, 1.0e-1], log: true}\n  frozen: {choice: [0.0, 0.4]}\n"
        "  weight_decay: {float: [1.0e-3, 1.0e-1], log: true}\nbase: {backbone: test_resnet, pretrained: true}\n",
        "here",
    )
    wanted = {"lr": pytest.approx(4e-4), "frozen": 0.4, "weight_decay": pytest.approx(0.01)}
    (entry,) = warm_entries(source(study.settings, study.folder, Tried(3, 0.9, True, staged)), space)
    assert entry.params == wanted
    made = prior(study)
    fields = staged.model_dump(mode="json", include={"backbone", "stages"})
    held = made.model_copy(update={"recipes": (PriorEntry(trial=3, auc=0.9, fields=fields),)})
    assert prior_entries(held, "easy", space)[0].params == wanted


def test_a_study_takes_a_priors_recipes_and_remembers_it(
    asked_once: tuple[Asked, str], study: OpenStudy, tmp_path: Path
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(prior(study).to_yaml())
    opened, said = created(asked_once, "from-prior", prior=str(file))
    assert opened.settings.prior == str(file)
    assert [entry.origin for entry in opened.settings.enqueued][1:] == [f"prior {file}, trial 1"]
    assert any("validation scores of its recipes flatter" in line for line in said)
    with pytest.raises(RecipeError, match="no prior named 'colon69'"):
        created(asked_once, "never", prior="colon69")


@pytest.mark.parametrize("name", list_configs("priors"))
def test_every_shipped_prior_loads_and_fits_the_default_space(name: str) -> None:
    from pcam_automl.search.space import load_space

    made = load_prior(name)
    assert prior_entries(made, name, load_space("default"))
    assert made.command.startswith("pcam-automl search ")
    assert made.export.startswith("pcam-automl export-prior ")
    assert "/" not in made.data


def test_the_home_folder_in_a_url_is_where_the_study_s_files_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    home = f"sqlite:///{tmp_path.as_posix()}/old/pcam.db"
    assert warm_start._place("sqlite:///~/old/pcam.db#pcam", None, "--warm-start") == (home, "pcam")
    (tmp_path / "old").mkdir()
    optuna.create_study(storage=open_storage(home), study_name="only")
    assert warm_start._place("sqlite:///~/old/pcam.db", None, "--warm-start") == (home, "only")
