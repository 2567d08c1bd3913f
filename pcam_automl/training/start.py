"""A recipe, a pack and some rows to a training at its beginning. Takes no step (see engine.py)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from pcam_automl.batches import Patches, open_masks
from pcam_automl.data.store import PatchStore, channel_moments
from pcam_automl.errors import DataError, RecipeError, first_few
from pcam_automl.models.factory import build_network, normalisation_of
from pcam_automl.models.weights import Weights
from pcam_automl.recipe import PATCH_PX, Recipe
from pcam_automl.training.compute import Compute
from pcam_automl.training.dense import DenseTask
from pcam_automl.training.engine import Training
from pcam_automl.training.task import PatchTask, Task, TrainingData


@dataclass(frozen=True)
class Rows:
    """Store rows that a recipe uses of those it was given: ``train`` in nested order, ``score`` to be scored on."""

    train: np.ndarray
    score: np.ndarray


def check_task(recipe: Recipe, store: PatchStore) -> None:
    """Whether the store holds what the recipe's task needs.

    Raises:
        RecipeError: a dense task without masks or with fields that mean patches, or a crop or tile larger than the patches.
    """
    if recipe.task == "dense" and recipe.tta == "random":
        raise RecipeError(
            "recipe.tta must be dihedral or none for task dense (a map is turned back exactly), got random"
        )
    if recipe.task == "dense" and recipe.balance != "none":
        raise RecipeError(f"recipe.balance belongs to task patch, got {recipe.balance}; leave it out of task dense")
    side = min(store.patches.shape[1:3])
    if recipe.task == "dense" and store.masks is None:
        raise RecipeError(
            "recipe.task is dense, but the data have no masks; give folders of images and masks, a Kaggle folder with masks/, "
            "or a synthetic set (PCam's HDF5 files come with masks of the training part only, which are not packed)"
        )
    if recipe.tile_size is not None and recipe.tile_size > side:
        raise RecipeError(
            f"recipe.tile_size must be at most the images' side of {side} px, got {recipe.tile_size}; set tile_size={side // 16 * 16}"
        )
    if recipe.task == "patch" and store.patches.shape[1] != store.patches.shape[2]:
        height, width = store.patches.shape[1:3]
        raise RecipeError(f"recipe.task patch needs square patches, got {width}x{height} px; use task dense")
    if recipe.task == "patch" and recipe.crop_size > side:
        raise RecipeError(f"recipe.crop_size must be at most the patches' side of {side} px, got {recipe.crop_size}")


def unseen_border(recipe: Recipe, store: PatchStore) -> str | None:
    """A warning where patches are larger than the largest crop, so that most of them is never seen."""
    side = min(store.patches.shape[1:3])
    if recipe.task != "patch" or side <= PATCH_PX:
        return None
    return (
        f"warning: the patches are {side} px, and a network sees at most their centre {PATCH_PX} px; where the whole patch carries the "
        f"label, resize the files to {PATCH_PX} px"
    )


def without_excluded(store: PatchStore, recipe: Recipe, rows: np.ndarray) -> np.ndarray:
    """``rows`` without the recipe's ``exclude_ids``."""
    return rows[~np.isin(store.ids[rows], list(recipe.exclude_ids))] if recipe.exclude_ids and len(rows) else rows


def absent_ids(store: PatchStore, recipe: Recipe) -> str | None:
    """What to say of ``exclude_ids`` that the data do not hold; None where all are there."""
    ids = list(recipe.exclude_ids)
    known = set(store.ids[np.isin(store.ids, ids)].tolist()) if ids else set()
    if missing := [name for name in ids if name not in known]:
        return f"{len(missing)} of {len(ids)} exclude_ids are not in the data: {first_few(missing)}"
    return None


def choose_rows(store: PatchStore, recipe: Recipe, train_rows: np.ndarray, score_rows: np.ndarray) -> Rows:
    """Leave out what the recipe excludes, then take its subsample and balance it.

    The order stays nested within each class; balanced, the classes take turns, so that a rung's prefix is balanced, too.

    Raises:
        DataError: a patch task without both classes.
    """
    train = without_excluded(store, recipe, train_rows)
    train = train[: max(1, round(recipe.subsample * len(train)))]
    if recipe.task == "patch":
        positive = np.asarray(store.label[train] == 1)
        n_positive = int(positive.sum())
        if n_positive in (0, len(train)):
            raise DataError(f"training needs both classes, got {n_positive} patches of label 1 among {len(train)}")
        if recipe.balance == "undersample":  # of each class the first ones of the nested order
            rank = np.where(positive, np.cumsum(positive), np.cumsum(~positive))
            kept = rank <= min(n_positive, len(train) - n_positive)
            train = train[kept][np.argsort(rank[kept], kind="stable")]
    return Rows(train, without_excluded(store, recipe, score_rows))


def data_key(store: PatchStore, rows: Rows) -> str:
    """64 hex digits over the data and which of them are trained and scored on, in their order."""
    total = hashlib.sha256(store.content_hash.encode())
    for part in (rows.train, rows.score):
        total.update(f"/{len(part)}/".encode())
        total.update(np.ascontiguousarray(part, np.dtype("<i8")).tobytes())
    return total.hexdigest()


def start_training(
    recipe: Recipe,
    store: PatchStore,
    rows: Rows,
    *,
    patches: Patches,
    weights: Weights,
    compute: Compute,
    key: int,
    masks: Patches | None = None,
) -> Training:
    """Network, task and optimizer of a recipe, nothing trained yet.

    Args:
        recipe: what to train.
        store: its labels and the channel statistics of the training rows are used; pixels come from ``patches``.
        rows: from :func:`choose_rows`.
        patches: the store's patches on the device.
        weights: where pretrained weights come from.
        compute: device, precision and layout.
        key: of the lineage's views.
        masks: the store's masks on the device; a dense task opens them where None.

    Raises:
        RecipeError: the network cannot be built, or its input does not fit.
        DataError: a dense task without masks, or whose masks to score on hold one value.
    """
    norm = normalisation_of(recipe, *channel_moments(np.asarray(store.stats[rows.train])))
    if recipe.task == "dense" and masks is None:
        masks = open_masks(store, patches.device)
    domain = np.asarray(store.domain)
    data = TrainingData(patches, np.asarray(store.label), rows.train, rows.score, norm, masks, domain)
    network = build_network(recipe, weights, seed=recipe.seed)
    task: Task = (DenseTask if recipe.task == "dense" else PatchTask)(recipe, data, compute, key)
    training = Training(recipe, network, task, compute, key=key, data_key=data_key(store, rows))
    training.weights = str(weights) if recipe.pretrained else "none"
    if patches.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(patches.device)  # what is recorded is this training's, not the probes'
    return training
