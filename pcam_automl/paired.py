"""What a change was worth: two scorings of the same patches, compared by bootstrap draws over slides. Trains nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pcam_automl.intervals import auc_difference_bounds, difference_bounds, share_above_zero
from pcam_automl.metrics import auc, auc_draws, group_codes, n_independent, patch_losses

N_DRAWS = 1000

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Gain:
    """How much better the second scoring is than the first: above 0 is better, whatever the figure.

    Attributes:
        value: on the patches as they are.
        interval: 95 %, by Student's t over slides; None where there is one slide, or one holds all patches of a label, which says nothing of others.
        sure: how sure it is that the second is better, by the same t, in [0, 1]; None without an interval.
    """

    value: float
    interval: tuple[float, float] | None
    sure: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def auc_gain(label: ArrayLike, before: ArrayLike, after: ArrayLike, group: ArrayLike, *, seed: int = 0) -> Gain:
    """AUC of ``after`` less that of ``before``, both on the same draws.

    Args:
        label: (N,) 0 or 1, both at least once.
        before: (N,) finite scores.
        after: (N,) finite scores.
        group: (N,) integer code of the slide, negative where unknown: such patches are drawn one by one.
        seed: of the draws.

    Raises:
        DataError: as :func:`pcam_automl.metrics.auc_interval`.
    """
    value = auc(label, after) - auc(label, before)
    scores = np.stack([np.asarray(before, np.float64), np.asarray(after, np.float64)])
    n_slides = n_independent(label, group_codes(group, scores.shape[1]))
    if n_slides < 2:
        return Gain(value, None, None)
    draws = auc_draws(label, scores, group, n=N_DRAWS, seed=seed)
    return _gain(value, draws[:, 1] - draws[:, 0], n_slides, auc_difference_bounds)


def loss_gain(label: ArrayLike, before: ArrayLike, after: ArrayLike, group: ArrayLike, *, seed: int = 0) -> Gain:
    """Log-loss of ``before`` less that of ``after`` in nats, both on the same draws; arguments as :func:`auc_gain`.

    Raises:
        DataError: as :func:`pcam_automl.metrics.log_loss`.
    """
    saved = patch_losses(label, before) - patch_losses(label, after)
    value, code = float(saved.mean()), group_codes(group, len(saved))
    n_groups = int(code.max()) + 1
    if n_groups < 2:
        return Gain(value, None, None)
    drawn = np.random.default_rng(seed).multinomial(n_groups, np.full(n_groups, 1 / n_groups), N_DRAWS)
    total, n = np.bincount(code, saved, n_groups), np.bincount(code, minlength=n_groups)
    return _gain(value, (drawn @ total) / (drawn @ n), n_groups, difference_bounds)


def _gain(value: float, draws: Floats, n_slides: int, bounds: Callable[..., tuple[float, float]]) -> Gain:
    valid = draws[~np.isnan(draws)]
    if not len(valid):
        return Gain(value, None, None)
    interval = bounds(value, valid, n_slides=n_slides)
    return Gain(value, interval, share_above_zero(value, valid, n_slides=n_slides))
