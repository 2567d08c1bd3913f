"""One recipe from a pack to a model bundle, with or without validation, resumable. Knows no study."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pcam_automl.batches import open_patches
from pcam_automl.bundle import ModelBundle, write_bundle
from pcam_automl.counter import key_of
from pcam_automl.data.splits import Split
from pcam_automl.data.store import PatchStore
from pcam_automl.errors import DataError
from pcam_automl.files import locked
from pcam_automl.metrics import auc_interval
from pcam_automl.models.factory import build_network, n_parameters, normalisation
from pcam_automl.models.weights import Weights
from pcam_automl.recipe import Recipe
from pcam_automl.training.checkpoint import newest_checkpoint
from pcam_automl.training.compute import Compute, device_name
from pcam_automl.training.engine import Rung, RungResult, Training, TrainingData, fit, peak_memory_bytes
from pcam_automl.training.scoring import probs_of_logits
from pcam_automl.training.speed import SpeedBook
from pcam_automl.versions import versions


@dataclass
class TrainWatch:
    """What a training tells the one who shows it."""

    begins: Callable[[Recipe, Compute, int], None] = lambda recipe, compute, views: None
    views: Callable[[int], None] = lambda n: None
    epoch: Callable[[RungResult], None] = lambda result: None
    note: Callable[[str], None] = lambda text: None
    stop: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Trained:
    """A finished training: its bundle, the rungs (epochs) it was scored at, and its seconds."""

    bundle: ModelBundle
    results: list[RungResult]
    wall_s: float


def epoch_rungs(recipe: Recipe, n_train: int) -> tuple[Rung, ...]:
    """One rung an epoch; the last ends exactly at the recipe's views. ``wsd`` is scored at its end only."""
    views = recipe.n_views(n_train)
    if recipe.schedule == "wsd":
        return (Rung(views, n_train),)
    n_epochs = max(1, math.ceil(views / n_train - 1e-9))
    return tuple(Rung(min(views, n_train * (epoch + 1)), n_train) for epoch in range(n_epochs))


def usable_rows(store: PatchStore, recipe: Recipe, rows: np.ndarray) -> np.ndarray:
    """``rows`` without the recipe's ``exclude_ids``.

    Raises:
        DataError: fewer than one batch, or one class only, is left.
    """
    if recipe.exclude_ids:
        rows = rows[~np.isin(store.ids[rows], list(recipe.exclude_ids))]
    positives = int((store.label[rows] == 1).sum())
    if positives in (0, len(rows)):
        raise DataError(f"training needs both classes, got {positives} patches of label 1 among {len(rows)}")
    return rows


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
    watch: TrainWatch | None = None,
) -> Trained:
    """Train, write the bundle into ``out``, remove the checkpoints. The same call after a kill goes on.

    Each epoch leaves a checkpoint beside ``out`` (``.<name>.checkpoints``); the variant (precision, layout) is the
    checkpoint's, so that a resumed training ends in the same weights as an uninterrupted one on a CPU.

    Raises:
        DataError: one class only, a full disk, or another process trains into ``out``.
        TrainingDiverged: NaN or infinite loss.
    """
    watch = watch or TrainWatch()
    checkpoints = out.parent / f".{out.name}.checkpoints"
    with locked(
        out.parent / f".{out.name}.lock",
        busy=f"another process is training into {out}; wait for it, or choose another --out",
    ):
        began = time.perf_counter()
        train_rows, score_rows = usable_rows(store, recipe, train_rows), _without(store, recipe, score_rows)
        compute = _variant(recipe, device, speed, checkpoints)
        data = TrainingData(
            open_patches(store, device), np.asarray(store.label), train_rows, score_rows, normalisation(recipe.backbone)
        )
        training = Training(
            recipe, build_network(recipe, weights, seed=recipe.seed), data, compute, key=key_of(recipe.seed, "views")
        )
        rungs = epoch_rungs(recipe, len(train_rows))
        watch.begins(recipe, compute, rungs[-1].views)
        for result in fit(
            training,
            rungs,
            checkpoints=checkpoints,
            keep_final=recipe.schedule != "wsd",
            note=watch.note,
            stop=watch.stop,
            progress=watch.views,
        ):
            watch.epoch(result)
        bundle = _bundle(training, store, provenance, began)
        write_bundle(out, bundle)
        shutil.rmtree(checkpoints, ignore_errors=True)
    return Trained(bundle, training.results, time.perf_counter() - began)


def _without(store: PatchStore, recipe: Recipe, rows: np.ndarray) -> np.ndarray:
    return rows[~np.isin(store.ids[rows], list(recipe.exclude_ids))] if recipe.exclude_ids and len(rows) else rows


def _variant(recipe: Recipe, device: torch.device, speed: SpeedBook, checkpoints: Path) -> Compute:
    found = newest_checkpoint(checkpoints)
    if found is not None and found[2]["recipe"] == recipe.hash and found[2]["compute"]["device"] == str(device):
        return Compute(**found[2]["compute"])
    return speed.compute_for(recipe, device)


def _bundle(training: Training, store: PatchStore, provenance: dict[str, Any], began: float) -> ModelBundle:
    rows = training.data.score_rows
    metrics: dict[str, Any] = {
        "images_per_s": _images_per_s(training.results),
        "epochs": [asdict(result) for result in training.results],
    }
    if len(rows):
        probs = probs_of_logits(training.logits(rows))
        low, high = auc_interval(store.label[rows], probs, np.asarray(store.group)[rows])
        metrics |= {"auc": training.results[-1].auc, "auc_95": [low, high], "auc_on": f"{len(rows)} validation patches"}
    record = {
        "n_train": len(training.data.train_rows),
        "n_parameters": n_parameters(training.network),
        "pack_hash": store.content_hash,
        "compute": training.compute.to_json(),
        "device": device_name(torch.device(training.compute.device)),
        "micro_batch": training.micro_batch,
        "peak_memory_bytes": peak_memory_bytes(torch.device(training.compute.device)),
        "train_s": round(time.perf_counter() - began, 3),
        "versions": versions(),
    }
    return ModelBundle(
        training.recipe, training.data.normalisation, training.averaged_state(), metrics, {**provenance, **record}
    )


def _images_per_s(results: list[RungResult]) -> float:
    """Images a second over all training steps: views by the sum of their seconds."""
    previous, views, seconds = 0, 0, 0.0
    for result in results:
        n, previous = result.views - previous, result.views
        if result.images_per_s > 0:
            views, seconds = views + n, seconds + n / result.images_per_s
    return round(views / seconds, 1) if seconds else 0.0


def training_split(split: Split, fold: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows to train on, rows to validate on) of a fold; neither has a row of the holdout."""
    return split.train_order(fold), split.score_rows(fold, len(split.order))
