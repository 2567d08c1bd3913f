"""The learning-rate range test: loss against a rising rate, for several weight decays. Draws nothing, keeps no network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from pcam_automl.batches import ViewStream, open_patches
from pcam_automl.bundle import ModelBundle
from pcam_automl.counter import key_of
from pcam_automl.data.store import PatchStore
from pcam_automl.errors import RecipeError
from pcam_automl.files import write_json
from pcam_automl.models.weights import Weights
from pcam_automl.recipe import Recipe
from pcam_automl.training.compute import Compute
from pcam_automl.training.engine import Training
from pcam_automl.training.schedule import Rates
from pcam_automl.training.start import Rows, start_training

LOWEST_LR, HIGHEST_LR = 1e-7, 10.0
SMOOTHING = 0.98
DIVERGED = 4.0
"""fastai's lr_find: rates from 1e-7 to 10, losses smoothed by 0.98, an end when the loss is four times its best."""
LEAST_FALL = 0.02
"""A run of losses that falls by a smaller share is noise, and no rate is suggested."""


@dataclass(frozen=True)
class LrCurve:
    """One range test.

    Attributes:
        weight_decay: of this curve.
        lr: (n,) rates, rising geometrically.
        loss: (n,) smoothed training losses.
        suggestion: rate in the longest valley of the curve; None where the loss never falls.
    """

    weight_decay: float
    lr: tuple[float, ...]
    loss: tuple[float, ...]
    suggestion: float | None


def find_lr(
    recipe: Recipe,
    store: PatchStore,
    rows: Rows,
    *,
    weights: Weights,
    compute: Compute,
    weight_decays: Sequence[float],
    n_steps: int,
    start: ModelBundle | None = None,
    stage: int = 0,
    stop: Callable[[], None] = lambda: None,
    progress: Callable[[int], None] = lambda n: None,
) -> list[LrCurve]:
    """A curve for each weight decay, each from the same initial weights and over the same views.

    Args:
        recipe: everything but the learning rate and the weight decay.
        store: the data.
        rows: to train on.
        weights: where pretrained weights come from.
        compute: device, precision and layout.
        weight_decays: one curve each.
        n_steps: steps of a curve at most.
        start: weights to begin with (a stage's bundle) instead of the recipe's.
        stage: which stage's trainable layers and ratio of rates hold, from 0.
        stop: called each step; raises to end.
        progress: called with the number of steps just done.

    Raises:
        RecipeError: no such stage, or ``start`` is of another network, head, decoder or size.
    """
    if not 0 <= stage < len(recipe.phases):
        raise RecipeError(f"--stage must be in [1, {len(recipe.phases)}] for this recipe, got {stage + 1}")
    if start is not None and start.recipe.backbone != recipe.backbone:
        raise RecipeError(
            f"--from holds a {start.recipe.backbone}, the recipe wants a {recipe.backbone}; give its own bundle"
        )
    curves, patches = [], open_patches(store, torch.device(compute.device))
    for weight_decay in weight_decays:
        training = start_training(
            recipe,
            store,
            rows,
            patches=patches,
            weights=weights,
            compute=compute,
            key=key_of(recipe.seed, "lr find"),
        )
        if start is not None:
            _check_same_network(training, start)
            training.keep(start.state)
        training.phase = stage
        curves.append(_curve(training, rows, stage, weight_decay, n_steps, stop, progress))
    return curves


_SHAPING = ("task", "backbone", "head", "hidden", "decoder", "crop_size", "tile_size", "input_size")
_SHAPING_CNN = (
    "cnn_filters",
    "cnn_convs",
    "cnn_kernel",
    "cnn_activation",
    "cnn_pool",
    "cnn_norm",
    "cnn_dropout",
    "cnn_dense",
)
"""Recipe fields that decide which weights a network has."""


def _check_same_network(training: Training, start: ModelBundle) -> None:
    """Whether the bundle's weights are, by name and shape, those of the recipe's network.

    Raises:
        RecipeError: they are not; names the recipe fields that differ, or a weight where none does.
    """
    ours = {name: tuple(tensor.shape) for name, tensor in training.network.state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in start.state.items()}
    if ours == theirs:
        return
    differing = [
        f"{name} (--from {getattr(start.recipe, name)}, recipe {getattr(training.recipe, name)})"
        for name in (*_SHAPING, *_SHAPING_CNN)
        if getattr(start.recipe, name) != getattr(training.recipe, name)
    ]
    if not differing:
        weight = next(name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name))
        differing = [f"weight {weight} (--from {theirs.get(weight, 'none')}, recipe {ours.get(weight, 'none')})"]
    raise RecipeError(
        f"--from holds another network than the recipe's: {', '.join(differing)}; give its own bundle, or --set them alike"
    )


def _curve(
    training: Training,
    rows: Rows,
    stage: int,
    weight_decay: float,
    n_steps: int,
    stop: Callable[[], None],
    progress: Callable[[int], None],
) -> LrCurve:
    recipe, batch_size = training.recipe, training.recipe.batch_size
    phase, stream = recipe.phases[stage], ViewStream(training.key, rows.train, 0)
    ratio = 1.0 if phase.lr_low is None else phase.lr_low / phase.lr
    lrs: list[float] = []
    losses: list[float] = []
    average = 0.0
    for step in range(n_steps):
        stop()
        lr = rate_of_step(step, n_steps)
        training.use(Rates(stage, lr, lr * ratio, weight_decay, phase.trainable))
        first = step * batch_size
        views = np.arange(first, first + batch_size)
        loss = float(training.step(stream.rows_of(first, first + batch_size), views)[0])
        progress(1)
        average = SMOOTHING * average + (1.0 - SMOOTHING) * loss
        smooth = average / (1.0 - SMOOTHING ** (step + 1))
        if not math.isfinite(smooth) or (losses and smooth > DIVERGED * min(losses)):
            break
        lrs.append(lr)
        losses.append(smooth)
    return LrCurve(weight_decay, tuple(lrs), tuple(losses), valley(lrs, losses))


def rate_of_step(step: int, n_steps: int) -> float:
    """Geometric from 1e-7 to 10."""
    return float(LOWEST_LR * (HIGHEST_LR / LOWEST_LR) ** (step / max(n_steps - 1, 1)))


def valley(lr: Sequence[float], loss: Sequence[float]) -> float | None:
    """Rate halfway down the longest falling run of the losses (fastai's ``valley``); None where they fall by less than 2 %."""
    n = len(loss)
    length = np.ones(n, np.int64)  # of the longest falling subsequence that ends here
    for i in range(1, n):
        earlier = length[:i][np.asarray(loss[:i]) > loss[i]]
        length[i] = 1 + (int(earlier.max()) if len(earlier) else 0)
    end = int(length.argmax()) if n else 0
    if n == 0 or length[end] < 3:
        return None
    level = float(np.median(loss[: max(1, n // 10)]))  # where the rates are too small to matter
    if level - loss[end] < LEAST_FALL * level:
        return None
    first, third = end - int(length[end]) + 1, int(length[end]) / 3
    return float(lr[min(max(first, 0) + int(third) + int(third / 2), n - 1)])


def write_curves(curves: Sequence[LrCurve], path: Path) -> None:
    """The curves as JSON."""
    write_json(path, [asdict(curve) for curve in curves])
