"""One recipe from a pack to a model bundle, with or without validation, resumable. Knows no study."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pcam_automl.batches import open_patches
from pcam_automl.bundle import ModelBundle, write_bundle
from pcam_automl.counter import key_of
from pcam_automl.data.splits import Split, make_split
from pcam_automl.data.store import VALID, PatchStore
from pcam_automl.errors import DataError, RecipeError
from pcam_automl.files import locked
from pcam_automl.metrics import auc_interval
from pcam_automl.models.factory import n_parameters
from pcam_automl.models.weights import Weights
from pcam_automl.predict_dense import StripRecorder
from pcam_automl.recipe import Recipe
from pcam_automl.scores import clusters_of_rows, scores_text
from pcam_automl.training.checkpoint import newest_checkpoint
from pcam_automl.training.compute import Compute, autotuned, device_name, is_of
from pcam_automl.training.dense import DenseTask, always_negative_accuracy
from pcam_automl.training.engine import Rung, RungResult, Training, peak_memory_bytes
from pcam_automl.training.fit import best_result, fit
from pcam_automl.training.pace import Pace, fit_paced
from pcam_automl.training.ranks import from_first, ranks
from pcam_automl.training.schedule import phase_ends
from pcam_automl.training.scoring import Views, inference_precision
from pcam_automl.training.speed import SpeedBook
from pcam_automl.training.start import Rows, choose_rows, data_key, start_training
from pcam_automl.versions import versions


@dataclass
class TrainWatch:
    """What a training tells the one who shows it; ``trained`` gets it at its end, with the weights before averaging, too."""

    begins: Callable[[Recipe, Compute, int], None] = lambda recipe, compute, views: None
    views: Callable[[int], None] = lambda n: None
    epoch: Callable[[RungResult], None] = lambda result: None
    note: Callable[[str], None] = lambda text: None
    stop: Callable[[], None] = lambda: None
    trained: Callable[[Training], None] = lambda training: None


@dataclass(frozen=True)
class Trained:
    """A finished training: its bundle, the rungs (epochs) it was scored at, and its seconds."""

    bundle: ModelBundle
    results: list[RungResult]
    wall_s: float


def epoch_rungs(recipe: Recipe, n_train: int) -> tuple[Rung, ...]:
    """One rung an epoch and one at each end of a stage; the last ends at the recipe's views. ``wsd`` is scored once."""
    views = recipe.n_views(n_train)
    if recipe.schedule == "wsd":
        return (Rung(views, n_train),)
    ends = {*epoch_ends(recipe, n_train), *stage_ends(recipe, views)}
    return tuple(Rung(end, n_train) for end in sorted(ends))


def epoch_ends(recipe: Recipe, n_train: int) -> tuple[int, ...]:
    """Views at which each epoch ends, the last, perhaps a part of one, at the recipe's views."""
    views = recipe.n_views(n_train)
    n_epochs = max(1, math.ceil(views / n_train - 1e-9))
    return tuple(min(views, n_train * (epoch + 1)) for epoch in range(n_epochs))


def stage_ends(recipe: Recipe, views: int) -> tuple[int, ...]:
    """Views at which each stage ends, the last being ``views``; empty without stages."""
    return phase_ends(recipe, views) if recipe.stages else ()


def train_to_bundle(
    recipe: Recipe,
    store: PatchStore,
    *,
    train_rows: np.ndarray,
    score_rows: np.ndarray,
    weights: Weights,
    device: torch.device,
    speed: SpeedBook,
    out: Path,
    provenance: dict[str, Any],
    pace: Pace | None = None,
    watch: TrainWatch | None = None,
    judged_rows: np.ndarray | None = None,
) -> Trained:
    """Train, write the bundle into ``out``, remove the checkpoints. The same call after a kill goes on.

    Low precision is chosen for predicting by ``judged_rows``, patches that nothing trains on, else by those that are scored; where there
    are neither, predictions are in float32.

    With a ``pace`` the training ends by the clock instead of after the recipe's epochs, and nothing is scored on its way.

    Each epoch, or a part of a training by the clock every ``Pace.saved_every_s``, leaves a checkpoint beside ``out`` (``.<name>.checkpoints``); the variant (precision, layout) is the
    checkpoint's, so that a resumed training ends in the same weights as an uninterrupted one on a CPU; not compiled, where little of a
    compiled one is left.

    Raises:
        DataError: one class only, a full disk, or another process trains into ``out``.
        TrainingDiverged: NaN or infinite loss.
    """
    watch = watch or TrainWatch()
    check_ranks(recipe)
    checkpoints = checkpoints_beside(out)
    with _alone_in(out), autotuned(device):
        began = time.perf_counter()
        rows = choose_rows(store, recipe, train_rows, score_rows)
        rungs = epoch_rungs(recipe, len(rows.train))
        views = rungs[-1].views if pace is None else round(pace.n_expected())
        compute = from_first(lambda: _variant(recipe, device, speed, checkpoints, data_key(store, rows), views))
        compute = replace(compute, device=str(device))  # each rank has its own
        training = start_training(
            recipe,
            store,
            rows,
            patches=open_patches(store, device),
            weights=weights,
            compute=compute,
            key=key_of(recipe.seed, "views"),
        )
        ends = stage_ends(recipe, rungs[-1].views)[:-1]
        strip = _strip(training, rows, out)
        watch.begins(recipe, compute, views)
        calls: dict[str, Any] = {
            "checkpoints": checkpoints,
            "note": watch.note,
            "stop": watch.stop,
            "progress": watch.views,
        }
        if pace is not None:
            results = fit_paced(training, rows.train, pace, **calls)
        else:
            scored, keep_final = len(rows.score) > 0, recipe.schedule != "wsd"
            marks = epoch_ends(recipe, len(rows.train)) if recipe.schedule == "wsd" else ()
            results = fit(training, rows.train, rungs, scored=scored, keep_final=keep_final, marks=marks, **calls)
        for result in results:
            watch.epoch(result)
            if result.rung != len(training.results) - 1:  # a resumed training repeats what it has behind it
                continue
            if strip is not None:
                with training.averaged() as network:
                    strip.add(network, result.rung)
            if pace is None and result.views in ends and ranks().is_first:
                write_bundle(
                    stage_folder(out, ends.index(result.views)),
                    _bundle(training, rows, store, provenance, began, judged=judged_rows),
                )
        watch.trained(training)
        bundle = _bundle(training, rows, store, provenance, began, by_clock=pace is not None, judged=judged_rows)
        if ranks().is_first:
            write_bundle(out, bundle)
            speed.note_micro_batch(recipe, device, training.micro_batch)
            shutil.rmtree(checkpoints, ignore_errors=True)
    return Trained(bundle, training.results, time.perf_counter() - began)


def checkpoints_beside(out: Path) -> Path:
    """Where a training into ``out`` leaves its checkpoints."""
    return out.parent / f".{out.name}.checkpoints"


def can_go_on(
    recipe: Recipe,
    store: PatchStore,
    train_rows: np.ndarray,
    score_rows: np.ndarray,
    out: Path,
    *,
    weights: Weights,
    by_clock: bool,
) -> bool:
    """Whether :func:`train_to_bundle` would go on from a checkpoint there, by the clock or by epochs."""
    found = newest_checkpoint(checkpoints_beside(out))
    if found is None:
        return False
    state, rows = found[2], choose_rows(store, recipe, train_rows, score_rows)
    own = (recipe.hash, data_key(store, rows), by_clock, str(weights) if recipe.pretrained else "none")
    theirs = (state["recipe"], state.get("data"), state.get("by_clock", by_clock), state.get("weights", own[-1]))
    return theirs == own


def check_ranks(recipe: Recipe) -> None:
    """Whether each process of a distributed training has images enough for batch statistics.

    Raises:
        RecipeError: fewer than two images of a batch for each.
    """
    n = ranks().n
    if n > 1 and recipe.batch_size < 2 * n:
        raise RecipeError(
            f"recipe.batch_size must be at least two images for each of {n} processes, got {recipe.batch_size}; start fewer of them"
        )


def _alone_in(out: Path) -> AbstractContextManager[None]:
    """No other training writes there; of several ranks the first holds the lock for all."""
    if not ranks().is_first:
        return nullcontext()
    return locked(
        out.parent / f".{out.name}.lock",
        busy=f"another process is training into {out}; wait for it, or choose another --out",
    )


def strip_file(out: Path) -> Path:
    """Where the strip of decisions of a dense training lies: ``<out>-strip.png``."""
    return out.with_name(f"{out.name}-strip.png")


def _strip(training: Training, rows: Rows, out: Path) -> StripRecorder | None:
    if not isinstance(training.task, DenseTask) or not len(rows.score):
        return None
    return StripRecorder(training.task, strip_file(out))


def stage_folder(out: Path, stage: int) -> Path:
    """Where the bundle of a stage that is not the last lies: ``<out>-stage1``, ``<out>-stage2``, ..."""
    return out.with_name(f"{out.name}-stage{stage + 1}")


def _variant(
    recipe: Recipe, device: torch.device, speed: SpeedBook, checkpoints: Path, of_data: str, views: int
) -> Compute:
    found = newest_checkpoint(checkpoints)
    if found is not None:
        state = found[2]
        theirs = (state["recipe"], state.get("data"), state["compute"]["device"])
        if theirs == (recipe.hash, of_data, str(device)) and is_of(state.get("device_name"), device):
            left = views if state.get("by_clock") else max(0, views - state["views"])
            return speed.for_the_rest(recipe, device, Compute(**state["compute"]).moved_to(device), left)
    return speed.compute_for(recipe, device, views=views)


def _bundle(
    training: Training,
    rows: Rows,
    store: PatchStore,
    provenance: dict[str, Any],
    began: float,
    *,
    by_clock: bool = False,
    judged: np.ndarray | None = None,
) -> ModelBundle:
    recipe = training.recipe
    kept = best_result(training.results, recipe)
    metrics: dict[str, Any] = {
        "images_per_s": _images_per_s(training.results),
        "epochs": [asdict(result) for result in training.results],
        "kept_epoch": kept.rung,
    }
    text = None
    if len(rows.score):
        _, scores = training.score()
        text = scores_text(scores, store.ids)
        metrics |= {
            "auc": kept.auc,
            "auc_95": list(auc_interval(scores.label, scores.prob, clusters_of_rows(store, scores.rows))),
            "auc_on": scores.on,
        }
        metrics |= {"loss": kept.loss, "accuracy": kept.accuracy}
        if kept.dice is not None:
            metrics |= {"dice": kept.dice, "always_negative_accuracy": always_negative_accuracy(store, rows.score)}
    record = {
        "n_train": len(rows.train),
        "n_parameters": n_parameters(training.network),
        "pack_hash": store.content_hash,
        "data_key": training.data_key,
        "patch_px": int(min(store.patches.shape[1:3])),
        "compute": training.compute.to_json(),
        "device": device_name(torch.device(training.compute.device)),
        "micro_batch": training.micro_batch,
        "views_seen": training.views,
        "by_clock": by_clock,
        "peak_memory_bytes": peak_memory_bytes(torch.device(training.compute.device)),
        "train_s": round(time.perf_counter() - began, 3),
        "versions": versions(),
    }
    if "fold" in provenance:
        record["fold"] = validation_fold(store, recipe, provenance["fold"])
    data = training.task.data
    if not isinstance(training.task, DenseTask):
        if judged is None or len(np.unique(store.label[judged])) < 2:
            judged = (
                rows.score
            )  # without any, float32: of what it was trained on a network knows the answer in any precision
        views = Views(recipe, data.normalisation)
        with training.averaged() as network:
            precision, moved = inference_precision(network, data.patches, judged, data.label, views, training.compute)
        record["inference"] = {"precision": precision, "auc_moved": moved}
    norm = data.normalisation
    return ModelBundle(recipe, norm, training.averaged_state(), metrics, {**provenance, **record}, text)


def _images_per_s(results: list[RungResult]) -> float:
    """Images a second over all training steps: views by the sum of their seconds."""
    previous, views, seconds = 0, 0, 0.0
    for result in results:
        n, previous = result.views - previous, result.views
        if result.images_per_s > 0:
            views, seconds = views + n, seconds + n / result.images_per_s
    return round(views / seconds, 1) if seconds else 0.0


def validation_fold(store: PatchStore, recipe: Recipe, fold: int | None) -> int | None:
    """The fold that validates: ``fold``; with ``valid_share`` None, or 0 where the data have an official validation part."""
    if recipe.valid_share is None:
        return fold
    return 0 if bool((store.part[store.development_rows()] == VALID).any()) else None


def training_split(
    store: PatchStore, recipe: Recipe, *, seed: int, fold: int
) -> tuple[Split, np.ndarray, np.ndarray, int | None]:
    """(split, rows to train on, rows to validate on, fold): a fold, or whole slides of about the recipe's ``valid_share``.

    Where the data have an official validation part, a recipe with ``valid_share`` is validated on that, which is fold 0:
    a share set aside from the rest would leave it to be trained on.

    Raises:
        DataError: the store cannot be split.
    """
    chosen = validation_fold(store, recipe, fold)
    if chosen is None:
        assert recipe.valid_share is not None
        try:
            split = make_split(store, seed=seed, holdout=recipe.valid_share, holdout_name="valid_share")
        except DataError:  # too few slides of a label for folds, which nothing here uses
            split = make_split(store, seed=seed, n_folds=1, holdout=recipe.valid_share, holdout_name="valid_share")
        return split, split.order, split.holdout_rows(), None
    split = make_split(store, seed=seed)
    return split, split.train_order(chosen), split.score_rows(chosen, len(split.order)), chosen
