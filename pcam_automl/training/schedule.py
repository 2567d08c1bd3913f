"""Learning rates, weight decay and trainable layers at every view of a training. Touches no optimizer (see optim.py)."""

from __future__ import annotations

import bisect
import itertools
import math
from dataclasses import dataclass, replace

from pcam_automl.recipe import Recipe

ONE_CYCLE_START = 1 / 25
ONE_CYCLE_END = 1e-4
"""Smith & Topin 2018 as torch's OneCycleLR has it: start at lr / 25, end at lr / 25 / 1e4; here the end is lr * 1e-4."""


@dataclass(frozen=True)
class Rates:
    """What one step trains with.

    Attributes:
        phase: number of the recipe's stage; 0 where it has none.
        lr: of the head and the last layers.
        lr_low: of the first layers; equal to ``lr`` where all share one rate.
        weight_decay: of matrices and kernels.
        trainable: last share of the backbone that trains.
    """

    phase: int
    lr: float
    lr_low: float
    weight_decay: float
    trainable: float

    def times(self, share: float) -> Rates:
        """The same at a share of the learning rates."""
        return replace(self, lr=self.lr * share, lr_low=self.lr_low * share)


def rates_at(recipe: Recipe, view: int, *, end: int, horizon: int) -> Rates:
    """The rates of the step that begins at ``view``, a decay branch left out.

    Args:
        recipe: its schedule, stages, warm-up and frozen phase.
        view: training images seen before the step.
        end: views of the whole training.
        horizon: views that warm-up and frozen phase are shares of, where there are no stages.
    """
    ends = phase_ends(recipe, end)
    number = min(bisect.bisect_right(ends, view), len(ends) - 1)
    phase, first = recipe.phases[number], ends[number - 1] if number else 0
    length = max(1, ends[number] - first)
    if recipe.schedule == "one_cycle":
        share = one_cycle((view - first) / length, warmup=recipe.warmup)
    else:
        share = warm_up(view - first, warmup_views=recipe.warmup * (length if recipe.stages else horizon))
    frozen = view < recipe.frozen * horizon
    return Rates(
        number,
        phase.lr * share,
        (phase.lr if phase.lr_low is None else phase.lr_low) * share,
        recipe.weight_decay if phase.weight_decay is None else phase.weight_decay,
        0.0 if frozen else phase.trainable,
    )


def phase_ends(recipe: Recipe, end: int) -> tuple[int, ...]:
    """The views at which each stage (or the one phase of a recipe without) ends, the last being ``end``."""
    shares = itertools.accumulate(phase.share for phase in recipe.phases)
    *inner, _ = (min(end, max(1, round(share * end))) for share in shares)
    return (*inner, end)


def one_cycle(progress: float, *, warmup: float) -> float:
    """Share of the peak learning rate at ``progress`` in [0, 1]: cosine up for ``warmup``, cosine down after."""
    if progress < warmup:
        low, high, at = ONE_CYCLE_START, 1.0, progress / warmup
    else:
        low, high, at = 1.0, ONE_CYCLE_END, (progress - warmup) / max(1.0 - warmup, 1e-12)
    return high + (low - high) * (1.0 + math.cos(math.pi * min(at, 1.0))) / 2.0


def warm_up(views: float, *, warmup_views: float) -> float:
    """Share of the peak learning rate in a linear warm-up that lasts ``warmup_views``; 1 after it."""
    return min(1.0, (views + 1) / warmup_views) if warmup_views > 1 else 1.0


def decay_branch(progress: float) -> float:
    """Share of the peak at ``progress`` in [0, 1] of a decay: 1 - sqrt (Haegele et al. 2024, better than linear)."""
    return max(0.0, 1.0 - math.sqrt(min(progress, 1.0)))
