"""Backbones side by side: figures before any training and after a short one. Prints nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pcam_automl.batches import Patches
from pcam_automl.counter import key_of
from pcam_automl.data.store import PatchStore
from pcam_automl.errors import RecipeError
from pcam_automl.models.factory import n_parameters, smallest_input
from pcam_automl.models.weights import Weights
from pcam_automl.recipe import Recipe, build_recipe
from pcam_automl.training.engine import Rung
from pcam_automl.training.fit import fit
from pcam_automl.training.speed import SpeedBook
from pcam_automl.training.start import choose_rows, start_training
from pcam_automl.training.task import Score

PUBLISHED = ("mobilenetv2_100", "resnetv2_152", "inception_resnet_v2", "densenet201", "efficientnet_b2")
"""The five that the transfer-learning notebook compared, by their timm names."""


@dataclass(frozen=True)
class Compared:
    """One backbone: validation figures before and after the short training.

    Attributes:
        backbone: its timm name.
        n_parameters: of the whole network.
        input_px: side of its input; raised to the backbone's smallest where the recipe's is below.
        initial: figures of the untrained head on the backbone as it came.
        trained: figures after the training.
        images_per_s: training steps only.
        seconds: of everything, building included.
    """

    backbone: str
    n_parameters: int
    input_px: int
    initial: Score
    trained: Score
    images_per_s: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def recipe_for(recipe: Recipe, backbone: str) -> Recipe:
    """The recipe with another backbone, its input raised to what the backbone needs.

    Raises:
        RecipeError: unknown backbone, or the recipe's task is dense.
    """
    if recipe.task != "patch":
        raise RecipeError(f"compare-backbones compares networks of task patch, the recipe has task {recipe.task}")
    least = smallest_input(backbone)
    px = max(recipe.network_px, least + least % 2)
    fields = {**recipe.model_dump(), "backbone": backbone, "input_size": None if px == recipe.crop_size else px}
    return build_recipe(fields, where=f"recipe for {backbone}")


def compare_backbone(
    recipe: Recipe,
    store: PatchStore,
    train_rows: Any,
    score_rows: Any,
    *,
    patches: Patches,
    weights: Weights,
    device: torch.device,
    speed: SpeedBook,
    stop: Callable[[], None] = lambda: None,
    progress: Callable[[int], None] = lambda n: None,
) -> Compared:
    """Score, train for the recipe's epochs, score again.

    Args:
        recipe: from :func:`recipe_for`.
        store: the data.
        train_rows: to train on, in nested order.
        score_rows: to score on.
        patches: the store's on the device.
        weights: where pretrained weights come from.
        device: where to train.
        speed: remembered measurements.
        stop: called each step; raises to end.
        progress: called with the number of views just seen.
    """
    began = time.perf_counter()
    rows = choose_rows(store, recipe, train_rows, score_rows)
    training = start_training(
        recipe,
        store,
        rows,
        patches=patches,
        weights=weights,
        compute=speed.compute_for(recipe, device),
        key=key_of(recipe.seed, "views"),
    )
    initial, _ = training.score(stop)
    views = recipe.n_views(len(rows.train))
    rung = Rung(views, len(rows.train))
    (result,) = fit(training, rows.train, (rung,), stop=stop, progress=progress)
    assert result.auc is not None
    assert result.loss is not None
    assert result.accuracy is not None
    return Compared(
        recipe.backbone,
        n_parameters(training.network),
        recipe.network_px,
        initial,
        Score(result.auc, result.loss, result.accuracy),
        round(result.images_per_s, 1),
        round(time.perf_counter() - began, 2),
    )


def ranked(results: Sequence[Compared]) -> list[Compared]:
    """Best first: by the loss after training."""
    return sorted(results, key=lambda one: one.trained.loss)
