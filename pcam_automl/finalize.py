"""The winner retrained on all labelled patches, then the test set's submission. Searches nothing."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from optuna.trial import FrozenTrial, TrialState

from pcam_automl.batches import open_patches
from pcam_automl.bundle import load_bundle
from pcam_automl.data.store import Flag, PatchStore
from pcam_automl.errors import DataError, StudyError, first_few
from pcam_automl.files import write_json
from pcam_automl.goals import AUC, Goal
from pcam_automl.metrics import auc, auc_interval
from pcam_automl.predict import build_predictor, compute_of
from pcam_automl.predict_dense import build_map_predictor, figures_on_test, score_maps, write_row_maps
from pcam_automl.recipe import Recipe, build_recipe, merge_fields
from pcam_automl.scores import FILE as SCORES
from pcam_automl.scores import Scores, write_scores
from pcam_automl.search.pareto import Pick, pick_knee
from pcam_automl.search.reading import auc_of, best_of
from pcam_automl.search.study import OpenStudy
from pcam_automl.submission import check_threshold, write_submission
from pcam_automl.train import TrainWatch, train_to_bundle
from pcam_automl.training.dense import always_negative_accuracy
from pcam_automl.training.engine import RungResult
from pcam_automl.training.fit import best_result
from pcam_automl.training.start import choose_rows, data_key, without_excluded

VIEWS_FACTOR = 4
LEAST_EPOCHS, MOST_EPOCHS = 3.0, 20.0
"""The final training sees four times the views of a whole trial, but at least 3 and at most 20 epochs."""


@dataclass
class FinalWatch:
    """What finalize tells the one who shows it; ``train`` is for the training."""

    train: TrainWatch = field(default_factory=TrainWatch)
    plan: Callable[[FrozenTrial, Recipe, int, Path], None] = lambda trial, recipe, n_train, out: None
    predicting: Callable[[int, str], None] = lambda n, what: None
    predicted: Callable[[int], None] = lambda n: None


@dataclass(frozen=True)
class FinalResult:
    """What finalize made.

    Attributes:
        out: folder with ``model/`` (the bundle), ``submission.csv``, ``submission.json`` and the holdout's ``scores.csv``.
        submission: the checked file, None where the data has no test patches.
        trial: the trial that was retrained.
        auc: on the holdout, else the trial's validation AUC.
        auc_on: which of the two.
        auc_95: its interval; None for the trial's.
        seconds: wall clock of this run.
        notes: test patches that could not be read.
        scores: of the holdout, None where there is none.
        maps: folder of the test images' probability maps, for a dense task.
        on_test: Dice, accuracy and more on the test images that came with masks; empty where none did.
    """

    out: Path
    submission: Path | None
    trial: int
    auc: float
    auc_on: str
    auc_95: tuple[float, float] | None
    seconds: float
    notes: tuple[str, ...]
    scores: Scores | None = None
    maps: Path | None = None
    on_test: dict[str, float | int | None] = field(default_factory=dict)


def choose_trial(study: optuna.Study, which: str, goal: Goal = AUC) -> FrozenTrial:
    """``best`` or a trial's number; only complete trials can be chosen.

    Raises:
        StudyError: no finished trial, no such number, or a trial that did not complete.
    """
    trials = study.get_trials(deepcopy=False)
    complete = [t for t in trials if t.state == TrialState.COMPLETE and t.value is not None]
    if which == "best":
        best = best_of(complete, goal)
        if best is None:
            raise StudyError(
                f"study {study.study_name!r} has no complete trial yet ({len(trials)} trials); run pcam-automl search first"
            )
        return best
    if not which.isdigit():
        raise StudyError(f"--trial must be best or a trial's number, got {which!r}")
    if int(which) >= len(trials):
        raise StudyError(f"study {study.study_name!r} has no trial {which}; its trials are 0 to {len(trials) - 1}")
    trial = trials[int(which)]
    if trial.state not in (TrialState.COMPLETE, TrialState.PRUNED) or "recipe" not in trial.user_attrs:
        raise StudyError(
            f"trial {which} of study {study.study_name!r} is {trial.state.name}; choose a finished one, or best"
        )
    return trial


def final_recipe(
    trial: FrozenTrial, n_train: int, epochs: float | None, *, planned: bool = True, own_epochs: float | None = None
) -> Recipe:
    """The trial's recipe for the whole data, subsample and early end lifted.

    Args:
        trial: its recipe is taken.
        n_train: patches of the final training.
        epochs: passes over them; None: a search's ``wsd`` becomes one cycle over four times the trial's views, 3 to 20
            epochs; a recipe with a schedule of its own keeps it; after an early end, the epochs up to the kept one.
        planned: whether the study chose the trial's views itself (no ``--views``, ``views`` or ``epochs``).
        own_epochs: of the recipe that the search started from, for a schedule of its own.
    """
    searched = build_recipe(json.loads(trial.user_attrs["recipe"]), where=f"trial {trial.number}")
    changes: dict[str, Any] = {"subsample": 1.0, "patience": None}
    if searched.schedule == "wsd":
        changes["schedule"] = "one_cycle"
    if epochs is None:
        seen = searched.n_views(n_train) / n_train
        if searched.patience is not None:
            kept = best_result([RungResult(**rung) for rung in trial.user_attrs["rungs"]], searched)
            epochs = kept.views / kept.subset
        elif searched.schedule == "wsd" or (planned and own_epochs is None):
            epochs = min(max(VIEWS_FACTOR * seen, LEAST_EPOCHS), MOST_EPOCHS)
        else:
            epochs = own_epochs if planned and own_epochs is not None else seen
    fields = merge_fields(searched.model_dump(), {**changes, "epochs": round(epochs, 4)})
    return build_recipe(fields, where="finalize")


def _n_final(opened: OpenStudy, trial: FrozenTrial) -> int:
    """Patches that the final training of a trial's recipe uses: everything it does not exclude or balance away."""
    recipe = build_recipe(json.loads(trial.user_attrs["recipe"])).model_copy(update={"subsample": 1.0})
    rows = opened.split.order
    return len(choose_rows(opened.store, recipe, rows, rows[:0]).train)


def check_test_set(store: PatchStore) -> None:
    """A submission must be possible before hours of training are spent on it.

    Raises:
        DataError: ids of the sample submission have no image.
    """
    missing = list(store.source.get("missing_test_ids", ()))
    if missing:
        raise DataError(
            f"{len(missing)} ids of the sample submission have no test image ({first_few(missing)}); "
            "complete the test folder, or give prepare a --sample that lists what is there"
        )


def finalize(
    opened: OpenStudy,
    *,
    which: str = "best",
    out: Path | None = None,
    threshold: float | None = None,
    epochs: float | None = None,
    device: torch.device,
    pick: Pick = "best",
    watch: FinalWatch | None = None,
) -> FinalResult:
    """Retrain, bundle, predict, write and check. After a kill the same call goes on from the last epoch.

    Args:
        opened: the study with its data.
        which: ``best`` or a trial's number.
        out: folder to fill; ``studies/<study>/final`` by default.
        threshold: also write 0/1 labels at this probability.
        epochs: passes over the training patches; None derives them from the trial.
        device: where to train and to predict.
        pick: what the best trial is where none is named: of the best value, or the knee of value against latency.
        watch: progress.

    Raises:
        StudyError, DataError: nothing to finalize, or the test set is incomplete, before any training.
    """
    watch, began = watch or FinalWatch(), time.perf_counter()
    check_threshold(threshold)
    goal = opened.settings.goal
    if which == "best" and pick == "knee":
        picked = pick_knee(opened.study.get_trials(deepcopy=False), goal)
        watch.train.note(picked.why)
        which = str(picked.trial.number)
    trial = choose_trial(opened.study, which, goal)
    trial_auc = auc_of(trial, goal)
    store, split = opened.store, opened.split
    check_test_set(store)
    out = (out or opened.folder / "final").resolve()
    rows = split.order
    n_train = _n_final(opened, trial)
    base = opened.space.base
    planned = opened.settings.cap_s is not None or base.get("epochs") is not None
    own_epochs = base.get("epochs") or opened.start.epochs
    recipe = final_recipe(trial, n_train, epochs, planned=planned, own_epochs=own_epochs)
    watch.plan(trial, recipe, n_train, out)
    provenance = {
        "study": opened.name,
        "trial": trial.number,
        "trial_auc": None if math.isnan(trial_auc) else trial_auc,
        "objective": goal.name,
        "trial_value": trial.value,
        "pick": pick,
        "split_hash": split.hash,
        "holdout": opened.settings.holdout,
        "weights": str(opened.weights),
    }
    model = out / "model"
    if not _is_done(model, recipe, opened, rows):
        train_to_bundle(
            recipe,
            store,
            train_rows=rows,
            score_rows=np.zeros(0, np.int64),
            weights=opened.weights,
            device=device,
            speed=opened.speed_book,
            out=model,
            provenance=provenance,
            watch=watch.train,
        )
    finish = _write_maps if recipe.task == "dense" else _predict
    return finish(opened, trial, model, out, threshold, device, watch, began)


def _is_done(model: Path, recipe: Recipe, opened: OpenStudy, rows: np.ndarray) -> bool:
    """Whether the folder already holds this recipe, from these weights, trained on these patches of this pack.

    A study made anew under an old one's name may have the same recipe and another holdout.
    """
    if not (model / "bundle.json").is_file():
        return False
    bundle = load_bundle(model)
    trained_on = data_key(opened.store, choose_rows(opened.store, recipe, rows, rows[:0]))
    held = (bundle.provenance.get("data_key"), bundle.provenance.get("weights"))
    return bundle.recipe == recipe and held == (trained_on, str(opened.weights))


def _predict(
    opened: OpenStudy,
    trial: FrozenTrial,
    model: Path,
    out: Path,
    threshold: float | None,
    device: torch.device,
    watch: FinalWatch,
    began: float,
) -> FinalResult:
    bundle = load_bundle(model)
    compute = compute_of(bundle, device)  # not always where it was trained: a second call may name another device
    predictor = build_predictor(bundle, compute)
    store = opened.store
    patches = open_patches(store, torch.device(compute.device))
    score, on, interval = auc_of(trial, opened.settings.goal), f"validation fold, trial {trial.number}", None
    holdout = without_excluded(store, bundle.recipe, opened.split.holdout_rows())
    test = store.test_rows()
    scores = None
    if len(holdout):
        watch.predicting(len(holdout), "holdout")
        probs = predictor.rows(patches, holdout, stop=watch.train.stop, progress=watch.predicted)
        score, on = auc(store.label[holdout], probs), f"holdout of {len(holdout)} patches"
        scores = Scores(holdout, store.label[holdout].astype(np.int64), probs, on)
        interval = auc_interval(store.label[holdout], probs, np.asarray(store.group)[holdout])
        write_scores(out / SCORES, scores, store.ids)
    submission, notes = None, _unreadable_notes(store, test)
    provenance: dict[str, Any] = {
        **bundle.provenance,
        "auc": score,
        "auc_on": on,
        "auc_95": interval,
        "threshold": threshold,
        "notes": list(notes),
        "recipe": bundle.recipe.model_dump(mode="json"),
        "n_test": len(test),
        "test_time_views": len(predictor.views),
        "test_time_averaging": predictor.views.averaging,
    }
    if len(test):
        watch.predicting(len(test), "test")
        probs = predictor.rows(patches, test, stop=watch.train.stop, progress=watch.predicted)
        unreadable = _unreadable(store, test)
        probs[unreadable] = float(
            (store.label[opened.split.order] == 1).mean()
        )  # nothing to see: the share of positives
        submission = write_submission(out, store.ids[test].tolist(), probs, provenance, threshold=threshold)
    else:
        write_json(out / "submission.json", provenance)
    return FinalResult(out, submission, trial.number, score, on, interval, time.perf_counter() - began, notes, scores)


def _write_maps(
    opened: OpenStudy,
    trial: FrozenTrial,
    model: Path,
    out: Path,
    threshold: float | None,
    device: torch.device,
    watch: FinalWatch,
    began: float,
) -> FinalResult:
    """A dense task's ending: figures on the holdout, one probability map a test image instead of a submission."""
    bundle, store = load_bundle(model), opened.store
    predictor = build_map_predictor(bundle, compute_of(bundle, device))
    holdout = without_excluded(store, bundle.recipe, opened.split.holdout_rows())
    test = store.test_rows()
    pixel_auc, on, scores = auc_of(trial, opened.settings.goal), f"validation pixels of trial {trial.number}", None
    figures: dict[str, Any] = {}
    maps: Path | None = None
    notes: list[str] = []
    on_test: dict[str, float | int | None] = {}
    if len(test):
        maps = out / "maps"
        watch.predicting(len(test), "test")
        _, notes = write_row_maps(
            predictor, store, test, maps, threshold=threshold, stop=watch.train.stop, progress=watch.predicted
        )
        on_test, unscored = figures_on_test(predictor, store, stop=watch.train.stop)
        notes = [*notes, *unscored]
    if len(holdout):
        watch.predicting(len(holdout), "holdout")
        try:
            score, scores = score_maps(predictor, store, holdout, stop=watch.train.stop)
        except (
            DataError
        ) as fault:  # masks of one value: a new study refuses such a holdout, an older one has trained by now
            notes.append(f"the holdout is not scored: {fault}")
        else:
            pixel_auc, on = score.auc, f"pixels of {len(holdout)} holdout images"
            scores = replace(scores, on=f"{len(scores.rows):,} px of {len(holdout):,} holdout images")
            write_scores(out / SCORES, scores, store.ids)
            figures = {"dice": score.dice, "accuracy": score.accuracy, "loss": score.loss}
            figures["always_negative_accuracy"] = always_negative_accuracy(store, holdout)
    provenance = {
        **bundle.provenance,
        **figures,
        "auc": pixel_auc,
        "auc_on": on,
        "threshold": threshold,
        "n_test": len(test),
        "test": on_test or None,
    }
    write_json(out / "submission.json", {**provenance, "recipe": bundle.recipe.model_dump(mode="json"), "notes": notes})
    seconds = time.perf_counter() - began
    return FinalResult(out, None, trial.number, pixel_auc, on, None, seconds, tuple(notes), scores, maps, on_test)


def _unreadable(store: PatchStore, rows: np.ndarray) -> np.ndarray:
    return np.asarray((store.flags[rows] & int(Flag.UNREADABLE | Flag.WRONG_SHAPE)) != 0)


def _unreadable_notes(store: PatchStore, rows: np.ndarray) -> tuple[str, ...]:
    ids = store.ids[rows[_unreadable(store, rows)]].tolist() if len(rows) else []
    return (
        (
            f"{len(ids)} test patches cannot be read and get the share of positives as their probability ({first_few(ids)})",
        )
        if ids
        else ()
    )
