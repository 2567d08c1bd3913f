"""Confirmations: fresh seeds on other folds, stored once, resumed after a kill, ranked in pairs."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import optuna
import pytest
import torch

from pcam_automl.data.splits import Split, make_split
from pcam_automl.data.store import PatchStore, open_store
from pcam_automl.errors import DataError, StudyError, TrainingDiverged
from pcam_automl.goals import goal_of
from pcam_automl.metrics import auc
from pcam_automl.recipe import Recipe
from pcam_automl.search import confirm as confirm_module
from pcam_automl.search.budget import set_budget
from pcam_automl.search.confirm import (
    ConfirmWatch,
    confirm,
    confirm_folds,
    expected_seconds,
    fresh_recipe,
    images_per_s,
    n_scored,
)
from pcam_automl.search.confirmations import (
    CARD,
    Candidate,
    Confirmation,
    folder_of,
    mean_drop,
    ranked,
    read_confirmation,
    top_candidates,
)
from pcam_automl.search.create import create_or_open_study
from pcam_automl.search.objective import Objective
from pcam_automl.search.plan import OVERHEAD
from pcam_automl.search.study import Asked, OpenStudy
from pcam_automl.search.turns import Limits
from pcam_automl.search.worker import run_worker
from pcam_automl.training.engine import Rung, RungResult, Training
from pcam_automl.training.fit import fit
from pcam_automl.training.start import Rows, start_training

CPU = torch.device("cpu")
SPACE = "base: {batch_size: 16, crop_size: 32}\nparameters:\n  lr: {float: [1.0e-3, 1.0e-2], log: true}\n"


@pytest.fixture(scope="module")
def opened(easy_pack: Path, tmp_path_factory: pytest.TempPathFactory) -> OpenStudy:
    """A study with two complete trials of a tiny network, which tests only confirm, each on a fold of its own."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("confirm")
    (root / "tiny.yaml").write_text(SPACE)
    pins, space = {"backbone": "test_resnet"}, str(root / "tiny.yaml")
    asked = Asked(data=easy_pack, space=space, weights="none", views=96, pins=pins, pruner="none", device="cpu")
    study = create_or_open_study("pcam", f"sqlite:///{root / 'pcam.db'}", asked, say=lambda text: None)
    run_worker(Objective(study, CPU), Limits(2))
    return study


@pytest.fixture(scope="module")
def split(easy_pack: Path) -> Split:
    return make_split(open_store(easy_pack))


def test_every_candidate_is_scored_on_the_same_rows_of_a_fold_that_it_did_not_train_on(opened: OpenStudy) -> None:
    candidates = top_candidates(opened.study, 3)
    found = confirm(opened, candidates, folds=(1,), device=CPU)
    assert [one.lineage for one in found] == [candidate.lineage for candidate in candidates]
    assert len(found) == 2
    for one in found:
        assert one.scores is not None
        assert one.one_view is not None
        assert set(opened.split.fold[one.scores.rows].tolist()) == {one.fold} == {1}
        assert np.array_equal(one.scores.rows, found[0].scores.rows)  # type: ignore[union-attr]
        assert one.auc == auc(one.one_view.label, one.one_view.prob)
        assert one.auc_views == auc(one.scores.label, one.scores.prob)
        assert one.n_train == (opened.split.fold >= 0).sum() - (opened.split.fold == 1).sum()
        assert one.views == 96


def test_what_is_stored_is_not_trained_again_and_reads_back_as_it_was(opened: OpenStudy) -> None:
    candidates, folds = top_candidates(opened.study, 1), (2,)
    (first,) = confirm(opened, candidates, folds=folds, device=CPU)
    folder = folder_of(opened.folder, first.lineage, 2)
    written = (folder / CARD).stat().st_mtime_ns
    (again,) = confirm(opened, candidates, folds=folds, device=CPU)
    others = [*top_candidates(opened.study, 2)[1:], *candidates]
    assert [one.lineage for one in confirm(opened, others, folds=folds, device=CPU, stored_only=True)] == [
        again.lineage
    ]
    assert (folder / CARD).stat().st_mtime_ns == written
    assert again.to_json() == first.to_json()
    assert again.scores is not None
    assert first.scores is not None
    assert np.allclose(again.scores.prob, first.scores.prob, atol=1e-8)
    assert read_confirmation(folder, opened.store, "another key") is None
    assert not [f for f in folder.parent.iterdir() if f.name.endswith(".checkpoints")]
    (folder / CARD).write_text("{")
    with pytest.raises(DataError, match=r"confirmation\.json cannot be read.*remove .*fold2"):
        read_confirmation(folder, opened.store)


KILLED = """
import os, signal, torch
from pcam_automl.search import confirm as c
from pcam_automl.search.confirmations import top_candidates
from pcam_automl.search.study import open_study
write = c.write_confirmation
def dying(*args):
    write(*args)
    os.kill(os.getpid(), signal.SIGKILL)
c.write_confirmation = dying
opened = open_study("pcam", "{storage}")
c.confirm(opened, top_candidates(opened.study, 2), folds=(3,), device=torch.device("cpu"))
"""


@pytest.mark.slow
def test_killed_between_two_confirmations_goes_on_with_the_second(opened: OpenStudy) -> None:
    code = KILLED.format(storage=opened.url)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == -signal.SIGKILL, run.stderr
    candidates = top_candidates(opened.study, 2)
    folders = [folder_of(opened.folder, candidate.lineage, 3) for candidate in candidates]
    assert [folder.is_dir() for folder in folders] == [True, False]
    written = (folders[0] / CARD).stat().st_mtime_ns
    assert len(confirm(opened, candidates, folds=(3,), device=CPU)) == 2
    assert (folders[0] / CARD).stat().st_mtime_ns == written


def test_only_what_fits_the_seconds_is_confirmed_and_it_is_said(opened: OpenStudy) -> None:
    notes: list[str] = []
    found = confirm(
        opened,
        top_candidates(opened.study, 2),
        folds=(4,),
        device=CPU,
        seconds=0.0,
        watch=ConfirmWatch(note=notes.append),
    )
    assert found == []
    assert notes[0].startswith("0 of 2 confirmations fit the time")


def test_seeds_are_fresh_for_each_lineage_and_fold() -> None:
    recipe = Recipe(views=900)
    seeds = {fresh_recipe(recipe, 0, lineage, fold).seed for lineage in "01" for fold in (1, 2)}
    assert len(seeds) == 4
    assert recipe.seed not in seeds
    assert fresh_recipe(recipe, 0, "0", 1) == fresh_recipe(recipe, 0, "0", 1)


def study_over(split: Split, goal: str = "auc", start: Recipe | None = None, **columns: np.ndarray) -> OpenStudy:
    """As much of a study as a choice of folds reads."""
    store, settings = SimpleNamespace(source={}, **columns), SimpleNamespace(goal=goal_of(goal))
    words = {"split": split, "store": store, "settings": settings}
    return cast(OpenStudy, SimpleNamespace(**words, rungs=(Rung(90, 90),), start=start or Recipe()))


def test_folds_never_hold_the_one_that_validated_the_search_nor_one_of_a_single_label(
    split: Split, easy_pack: Path
) -> None:
    label, domain = np.asarray(open_store(easy_pack).label).copy(), np.zeros(len(split.fold), np.int16)
    whole = study_over(split, label=label, domain=domain)
    assert confirm_folds(whole, 4) == (1, 2, 3, 4)
    with pytest.raises(StudyError, match=r"--confirm-folds must be at most 4, got 5"):
        confirm_folds(whole, 5)
    label[split.fold == 1] = 0
    assert confirm_folds(whole, 2) == (2, 3)


def test_maps_are_confirmed_on_folds_that_hold_tumour(split: Split, easy_pack: Path) -> None:
    """A fold of empty masks would end `finalize` with advice for other commands."""
    label = np.asarray(open_store(easy_pack).label).copy()
    dense = Recipe(task="dense", tile_size=32, backbone="test_resnet", decoder="unet")
    label[split.fold == 1] = 0
    label[split.fold == 2] = 1
    assert confirm_folds(study_over(split, start=dense, label=label), 3) == (2, 3, 4)
    with pytest.raises(StudyError, match=r"at most 3, got 4: .*not all others hold tumour"):
        confirm_folds(study_over(split, start=dense, label=label), 4)


def test_a_worst_domain_is_confirmed_only_where_two_domains_can_be_scored(split: Split, easy_pack: Path) -> None:
    """Else every confirmation would have no value, and its time would be lost."""
    label = np.asarray(open_store(easy_pack).label)
    domain = np.zeros(len(label), np.int16)
    for fold in range(2, 5):
        for value in (0, 1):
            domain[np.flatnonzero((split.fold == fold) & (label == value))[::2]] = 1
    study = study_over(split, "worst_domain_auc", label=label, domain=domain)
    assert confirm_folds(study, 2) == (2, 3)
    with pytest.raises(StudyError, match=r"at most 3, got 4: .*not all others hold two domains that can be scored"):
        confirm_folds(study, 4)
    assert confirm_folds(study_over(split, label=label, domain=domain), 4) == (1, 2, 3, 4)
    lone = study_over(split, "worst_domain_auc", label=label, domain=np.zeros(len(label), np.int16))
    assert confirm_folds(lone, 1) == ()


def in_a_folder(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Confirmations of a test that other tests' do not meet."""
    monkeypatch.setattr(
        confirm_module, "folder_of", lambda folder, lineage, fold: folder / name / lineage / f"fold{fold}"
    )


def test_spared_rows_are_not_scored(opened: OpenStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two domains the fold that confirms is the one whose slides are kept back to judge the final network."""
    in_a_folder("spared", monkeypatch)
    spared = opened.split.score_rows(3)[::2]
    (one,) = confirm(opened, top_candidates(opened.study, 1), folds=(3,), device=CPU, spared=spared)
    assert one.scores is not None
    assert set(one.scores.rows.tolist()) == set(opened.split.score_rows(3).tolist()) - set(spared.tolist())


def test_a_confirmation_trains_on_no_fold_slide_or_pixels_that_it_is_scored_on(
    opened: OpenStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_a_folder("apart", monkeypatch)
    begun: list[Rows] = []
    fitted: list[np.ndarray] = []

    def starting(recipe: Recipe, store: PatchStore, rows: Rows, **options: Any) -> Training:
        begun.append(rows)
        return start_training(recipe, store, rows, **options)

    def fitting(training: Training, rows: np.ndarray, *args: Any, **options: Any) -> Iterator[RungResult]:
        fitted.append(rows)
        return fit(training, rows, *args, **options)

    monkeypatch.setattr(confirm_module, "start_training", starting)
    monkeypatch.setattr(confirm_module, "fit", fitting)
    found = confirm(opened, top_candidates(opened.study, 1), folds=(1, 2), device=CPU)
    assert [one.fold for one in found] == [1, 2]
    store, split = opened.store, opened.split
    for one, rows, trained in zip(found, begun, fitted, strict=True):
        assert np.array_equal(trained, rows.train)
        assert set(split.fold[rows.score].tolist()) == {one.fold}
        assert set(split.fold[rows.train].tolist()) == {0, 1, 2, 3, 4} - {one.fold}, "the search's own fold trains, too"
        digest = [digest.tobytes() for digest in store.digest]
        for key in (store.group.tolist(), digest):
            assert not {key[row] for row in rows.train} & {key[row] for row in rows.score}
        for scores in (one.one_view, one.scores):
            assert scores is not None
            assert np.array_equal(np.sort(scores.rows), np.sort(rows.score))


def test_rows_are_not_spared_where_the_rest_of_a_fold_cannot_be_scored(
    opened: OpenStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the confirmation would end in an error after its training."""
    in_a_folder("not spared", monkeypatch)
    rows, notes = opened.split.score_rows(2), list[str]()
    tumour = rows[np.asarray(opened.store.label)[rows] == 1]
    watch = ConfirmWatch(note=notes.append)
    (one,) = confirm(opened, top_candidates(opened.study, 1), folds=(2,), device=CPU, spared=tumour, watch=watch)
    assert one.scores is not None
    assert set(one.scores.rows.tolist()) == set(rows.tolist())
    assert sum("cannot be scored without the slides kept back" in note for note in notes) == 1


def test_a_confirmation_that_was_cut_short_says_nothing_of_the_next_ones_seconds(
    opened: OpenStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that diverges at once would have made the next seem to take no time."""
    paces: list[float] = []
    whole = confirm_module._Runner._scores

    def scores(self: Any, training: Any, job: Any) -> dict[str, Any]:
        paces.append(self.pace)
        if len(paces) == 1:
            raise TrainingDiverged("the loss became NaN")
        return whole(self, training, job)

    monkeypatch.setattr(confirm_module._Runner, "_scores", scores)
    in_a_folder("cut short", monkeypatch)
    first, second = confirm(opened, top_candidates(opened.study, 2), folds=(4,), device=CPU)
    assert (first.auc, second.diverged) == (None, None)
    assert paces == [1.0, 1.0]


@pytest.mark.parametrize(("times", "n_done"), [(5.0, 1), (25.0, 2)])
def test_the_next_confirmation_is_expected_at_the_pace_of_the_last_one(
    times: float, n_done: int, opened: OpenStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the first takes ten times as long as expected; by the clock, which nobody waits for, it took none."""
    expected_s, notes = 60.0, list[str]()

    def slow(self: object, job: Any) -> tuple[Confirmation, bool]:
        made = confirmation(job.candidate.lineage, job.fold, 0.8)
        return replace(made, key=job.key, seconds=10 * expected_s), True

    in_a_folder(f"pace {times:g}", monkeypatch)
    monkeypatch.setattr(confirm_module._Runner, "_expected", lambda self, candidate, job: expected_s)
    monkeypatch.setattr(confirm_module._Runner, "_train", slow)
    candidates, watch = top_candidates(opened.study, 2), ConfirmWatch(note=notes.append)
    found = confirm(opened, candidates, folds=(1,), device=CPU, seconds=times * expected_s, watch=watch)
    assert [one.lineage for one in found] == [candidate.lineage for candidate in candidates][:n_done]
    assert ["the next would take about 600 s" in note for note in notes] == [True] * (2 - n_done)


def test_a_speed_is_taken_over_from_a_machine_of_the_same_kind_only(opened: OpenStudy) -> None:
    (candidate,) = top_candidates(opened.study, 1)
    own = candidate.trial.user_attrs
    for changes, takes in (({}, True), ({"cpu": "another"}, False), ({"device": "NVIDIA H200"}, False)):
        trial = optuna.create_trial(value=0.9, user_attrs={**own, "images_per_s": 12345.5, **changes})
        found = images_per_s(opened, Candidate("0", trial), candidate.recipe, CPU)
        assert (found == 12345.5) is takes


def test_of_trials_that_did_not_complete_those_that_diverged_are_none() -> None:
    study = optuna.create_study(direction="maximize")
    set_budget(study, 60.0)
    for value, reason in ((0.9, "diverged: NaN"), (0.7, "paused at rung 1 of 3")):
        attrs = {"recipe": "{}", "reason": reason}
        pruned = optuna.trial.TrialState.PRUNED
        study.add_trial(
            optuna.create_trial(state=pruned, value=value, user_attrs=attrs, intermediate_values={9: value})
        )
    assert [one.trial.number for one in top_candidates(study, 3)] == [1]


def test_a_confirmation_takes_longer_with_more_to_score_and_a_slower_network() -> None:
    rungs = (Rung(100, 100), Rung(900, 500))
    assert expected_seconds(rungs, 1000, 50.0) == pytest.approx(2 * expected_seconds(rungs, 1000, 100.0))
    assert expected_seconds(rungs, 1000, 50.0) > expected_seconds(rungs, 500, 50.0)
    assert expected_seconds(rungs, 0, 50.0) == pytest.approx(OVERHEAD * 900 / 50.0), "its rungs are not scored"
    assert n_scored(90) == 500
    assert n_scored(90_000) == 25_000


def study_of(values: list[float | None], direction: str = "maximize") -> optuna.Study:
    """Complete trials with these values; None is a failed one."""
    study = optuna.create_study(direction=direction)
    for value in values:
        state = optuna.trial.TrialState.FAIL if value is None else optuna.trial.TrialState.COMPLETE
        study.add_trial(optuna.create_trial(state=state, value=value, user_attrs={"recipe": "{}"}))
    return study


def test_the_best_by_the_studys_direction_come_first_and_equals_by_age() -> None:
    values = [0.7, 0.9, None, 0.9, 0.8]
    assert [one.trial.number for one in top_candidates(study_of(values), 3)] == [1, 3, 4]
    assert [one.trial.number for one in top_candidates(study_of(values, "minimize"), 2)] == [0, 4]
    assert top_candidates(study_of([]), 3) == []


def test_two_rows_of_a_lineage_are_one_candidate() -> None:
    study = study_of([0.7])
    for number, value in enumerate((0.8, 0.9)):
        attrs = {"recipe": "{}", "lineage": "a", **({"thawed_from": 1} if number else {})}
        study.add_trial(optuna.create_trial(value=value, user_attrs=attrs))
    assert [(one.lineage, one.trial.number) for one in top_candidates(study, 3)] == [("a", 2), ("trial 0", 0)]


def confirmation(lineage: str, fold: int, value: float | None, search: float | None = 0.9) -> Confirmation:
    return Confirmation(lineage, int(lineage), fold, "", search, value, value, 10, 10, 10, 1.0, 1.0)


def test_the_mean_of_the_folds_decides_and_the_drop_is_what_the_search_promised_too_much() -> None:
    found = [
        confirmation("0", 1, 0.80, 0.95), confirmation("1", 1, 0.84, 0.93),
        confirmation("0", 2, 0.90, 0.95), confirmation("1", 2, 0.88, 0.93),
    ]  # fmt: skip
    best, other = ranked(found)
    assert (best.lineage, best.values, best.mean) == ("1", (0.84, 0.88), pytest.approx(0.86))
    assert best.drop == pytest.approx(0.07)
    assert other.drop == pytest.approx(0.10)
    assert mean_drop([best, other]) == pytest.approx(0.085)
    assert ranked(found, maximise=False)[0].lineage == "0"
    assert ranked(found, maximise=False)[0].drop == pytest.approx(-0.10)


def test_a_fold_that_not_all_were_confirmed_on_does_not_count() -> None:
    found = [confirmation("0", 1, 0.8), confirmation("1", 1, 0.9), confirmation("0", 2, 1.0)]
    assert [(one.lineage, one.values) for one in ranked(found)] == [("1", (0.9,)), ("0", (0.8,))]


def test_equals_go_to_the_better_search_score_then_to_the_earlier() -> None:
    found = [confirmation("2", 1, 0.8, 0.9), confirmation("1", 1, 0.8, 0.9), confirmation("0", 1, 0.8, 0.8)]
    assert [one.lineage for one in ranked(found)] == ["1", "2", "0"]


def test_one_that_diverges_with_a_fresh_seed_comes_last() -> None:
    diverged = replace(confirmation("0", 1, None), diverged="NaN")
    best, last = ranked([diverged, confirmation("1", 1, 0.6)])
    assert (best.lineage, last.lineage) == ("1", "0")
    assert math.isnan(last.mean)
    assert last.drop is None
    assert json.dumps(last.to_json(), allow_nan=False)


def test_a_row_that_did_not_complete_has_no_search_score() -> None:
    trial = optuna.create_trial(state=optuna.trial.TrialState.PRUNED, value=0.9, user_attrs={"recipe": "{}"})
    assert Candidate("0", trial).search is None
