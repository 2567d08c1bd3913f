"""95 % intervals of an AUC from bootstrap draws over slides, honest for few slides and near 1. Draws nothing itself."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95
_Z = 1.959963984540054  # of LEVEL
_NEAR = 1e-9
_EXPANDED_FROM = 30


def auc_bounds(draws: ArrayLike, auc: float, *, n_slides: int, n_positive: int, n_negative: int) -> tuple[float, float]:
    """At either end the wider of two: slides are the units, and never less than independent patches would leave open.

    Quantiles of the draws would be too narrow: of four to ten slides they held the true AUC in 65 to 83 % of
    simulated cases, and of patches that are ranked without a fault they have no width at all (`python -m benchmarks intervals`).

    Args:
        draws: AUCs of bootstrap draws over slides; those that are NaN are left out.
        auc: measured, in [0, 1].
        n_slides: that hold the label which fewer slides hold, at least 1; one says nothing of others, and the interval is (0, 1), as where
            no draw is left.
        n_positive: patches of label 1, at least 1.
        n_negative: of label 0, at least 1.
    """
    values: NDArray[np.float64] = np.asarray(draws, np.float64)
    values = values[~np.isnan(values)]
    if n_slides < 2 or not len(values):
        return 0.0, 1.0
    of_slides = _slide_interval(values, auc, n_slides, 0.5 / math.sqrt(n_positive * n_negative))
    of_patches = score_interval(auc, n_positive, n_negative)
    return min(of_slides[0], of_patches[0]), max(of_slides[1], of_patches[1])


def difference_bounds(value: float, draws: ArrayLike, *, n_slides: int) -> tuple[float, float]:
    """Of a difference of two scorings of the same patches: Student's t over slides, the variance being the paired draws'.

    Quantiles of the draws would exclude a true 0 of two to four slides in more than 15 % of simulated cases
    (`tests/test_paired.py`; 47 and 22 % of two and four in another simulation, DECISIONS.md).

    Args:
        value: measured.
        draws: differences of bootstrap draws over slides, at least one; none is NaN.
        n_slides: at least 2.
    """
    half = student_t(n_slides - 1) * standard_error(draws, n_slides)
    return value - half, value + half


def auc_difference_bounds(value: float, draws: ArrayLike, *, n_slides: int) -> tuple[float, float]:
    """:func:`difference_bounds` of AUCs, which differ by at most 1."""
    low, high = difference_bounds(value, draws, n_slides=n_slides)
    return max(-1.0, low), min(1.0, high)


def standard_error(draws: ArrayLike, n_slides: int) -> float:
    """Of a mean over so many slides, at least 2, by its bootstrap draws, whose spread is too small by sqrt((n - 1) / n)."""
    return math.sqrt(n_slides / (n_slides - 1)) * float(np.std(np.asarray(draws, np.float64)))


def share_above_zero(value: float, draws: ArrayLike, *, n_slides: int) -> float:
    """How sure it is that the difference is above 0, by the same t, in [0, 1]; 0.5 for a 0 without any spread."""
    from scipy.special import stdtr

    spread = standard_error(draws, n_slides)
    return float(stdtr(n_slides - 1, value / spread)) if spread > 0 else 0.5 + 0.5 * float(np.sign(value))


def _slide_interval(draws: NDArray[np.float64], auc: float, n_slides: int, least: float) -> tuple[float, float]:
    """Student's t over slides, in logits, where an AUC's distribution is near to even; AUCs are kept ``least`` off 0 and 1.

    As Obuchowski (Biometrics 1997) does for clustered AUCs, the variance being the bootstrap's.
    """
    kept, value = draws.clip(least, 1 - least), min(max(auc, least), 1 - least)
    half = student_t(n_slides - 1) * standard_error(np.log(kept / (1 - kept)), n_slides)
    middle = math.log(value / (1 - value))
    return _sigmoid(middle - half), _sigmoid(middle + half)


def _sigmoid(x: float) -> float:
    """Of one number, without scipy: see :func:`student_t`."""
    return 0.5 * (1.0 + math.tanh(0.5 * x))


def student_t(freedom: int) -> float:
    """The 97.5 % quantile of Student's t; from 30 degrees on by its expansion (Abramowitz and Stegun 26.7.5), right to 1e-5.

    `status` draws intervals, and scipy would take it half a second to import.
    """
    if freedom < _EXPANDED_FROM:
        from scipy.special import stdtrit

        return float(stdtrit(freedom, (1 + LEVEL) / 2))
    terms: tuple[float, ...] = (
        (_Z**3 + _Z) / 4,
        (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / 96,
        (3 * _Z**7 + 19 * _Z**5 + 17 * _Z**3 - 15 * _Z) / 384,
    )
    return _Z + math.fsum(term / float(freedom) ** (power + 1) for power, term in enumerate(terms))


def score_interval(auc: float, n_positive: int, n_negative: int) -> tuple[float, float]:
    """95 % interval of an AUC of independent patches that has a width even at 0 and 1 (Newcombe, Statistics in Medicine 2006, method 5).

    The bounds are the AUCs from which the measured one lies 1.96 standard errors off, by Hanley's and McNeil's error at the bound.

    Args:
        auc: measured, in [0, 1].
        n_positive: patches of label 1, at least 1.
        n_negative: of label 0, at least 1.
    """
    more = (n_positive + n_negative) / 2 - 1

    def gap(area: float) -> float:
        spread = area * (1 - area) * (1 + more * ((1 - area) / (2 - area) + area / (1 + area)))
        return abs(auc - area) - _Z * math.sqrt(spread / (n_positive * n_negative))

    inner = min(max(auc, _NEAR), 1 - _NEAR)  # at 0 and 1 the gap of such an AUC is 0, too
    low = 0.0 if auc <= _NEAR else _crossing(gap, outer=0.0, inner=inner)
    high = 1.0 if auc >= 1 - _NEAR else _crossing(gap, outer=1.0, inner=inner)
    return low, high


def _crossing(gap: Callable[[float], float], *, outer: float, inner: float) -> float:
    """Where ``gap`` changes its sign, positive at ``outer`` and negative at ``inner``, by halving: scipy.optimize takes a second to import."""
    while abs(outer - inner) > _NEAR / 10:
        middle = (outer + inner) / 2
        outer, inner = (middle, inner) if gap(middle) > 0 else (outer, middle)
    return (outer + inner) / 2
