"""What a threshold costs: sensitivity and specificity at chosen ones, and errors left when unsure patches are handed on.

Probabilities in, figures out; draws nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from decimal import ROUND_FLOOR, Decimal
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pcam_automl.errors import DataError
from pcam_automl.metrics import Confusion, auc, confusion

SENSITIVITIES = (0.90, 0.95, 0.99)
"""Shares of the tumour patches that are to be found."""
COVERAGES = tuple(round(0.05 * step, 2) for step in range(20, 1, -1))
"""Shares of the patches that the network decides itself, 1 down to 0.1."""
HALF, YOUDEN = "0.5", "Youden"


@dataclass(frozen=True)
class OperatingPoint:
    """Calls at one threshold: a probability of at least it is tumour.

    Attributes:
        rule: how the threshold was chosen.
        threshold: in [0, 1].
        sensitivity: share of the tumour patches that are called tumour.
        specificity: share of the others that are not.
        ppv: share of the calls of tumour that are right, at these patches' share of tumour; None without calls.
        npv: share of the other calls that are right; None without such calls.
        called: share of all patches called tumour.
    """

    rule: str
    threshold: float
    sensitivity: float
    specificity: float
    ppv: float | None
    npv: float | None
    called: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def threshold_text(threshold: float) -> str:
    """A threshold in [0, 1] as it may be typed: cut, not rounded, by at most a thousandth of its distance from 0 and 1.

    Most thresholds are a tumour patch's own probability, which a rounded-up one would miss.
    """
    exact = Decimal(repr(float(threshold)))
    allowed = min(exact, 1 - exact) / 1000
    for digits in range(3, 17):
        cut = exact.quantize(Decimal(1).scaleb(-digits), ROUND_FLOOR)
        if exact - cut <= allowed:
            return str(cut)
    return repr(float(threshold))


@dataclass(frozen=True)
class RejectPoint:
    """The patches farthest from a probability of 0.5, the others being left to a person.

    Attributes:
        coverage: share of the patches that is kept, in (0, 1].
        n: how many.
        error: share of the kept ones on the wrong side of 0.5.
        auc: of the kept ones; None where all have one label.
    """

    coverage: float
    n: int
    error: float
    auc: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Operating:
    """Both on the same patches.

    Attributes:
        on: which, for people.
        chosen_on: on which the thresholds were chosen; the same as ``on`` where it was on these.
        points: one a rule.
        rejects: by coverage.
    """

    on: str
    chosen_on: str
    points: tuple[OperatingPoint, ...]
    rejects: tuple[RejectPoint, ...]

    @property
    def thresholds(self) -> dict[str, float]:
        """Rule to threshold."""
        return {point.rule: point.threshold for point in self.points}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> Operating:
        """What :meth:`to_json` gave."""
        points = tuple(OperatingPoint(**point) for point in fields["points"])
        rejects = tuple(RejectPoint(**point) for point in fields["rejects"])
        return Operating(str(fields["on"]), str(fields["chosen_on"]), points, rejects)


def operate(label: ArrayLike, prob: ArrayLike, on: str, given: Operating | None = None) -> Operating:
    """Thresholds and reject curve; the thresholds are those of ``given``, else chosen on these patches.

    Raises:
        DataError: as :func:`choose_thresholds`.
    """
    thresholds = choose_thresholds(label, prob) if given is None else given.thresholds
    chosen_on = on if given is None else given.on
    return Operating(on, chosen_on, operating_points(label, prob, thresholds), reject_curve(label, prob))


def choose_thresholds(label: ArrayLike, prob: ArrayLike) -> dict[str, float]:
    """Rule to threshold: the highest that finds 90, 95 and 99 % of the tumour, Youden's, and 0.5.

    Youden's (Cancer 3, 1950) has the largest sensitivity + specificity - 1; of equals the highest.

    Args:
        label: (N,) 0 or 1, both at least once.
        prob: (N,) in [0, 1].

    Raises:
        DataError: one label only, or as :func:`pcam_automl.metrics.confusion`.
    """
    counts = _counts_of_both(label, prob)
    n_positive = counts.false_negative + counts.true_positive
    probs, positive = np.asarray(prob, np.float64), np.asarray(label) == 1
    found = np.sort(probs[positive])[::-1]  # the k-th is the highest threshold that finds k
    chosen = {sensitivity_rule(s): float(found[math.ceil(s * n_positive - 1e-9) - 1]) for s in SENSITIVITIES}
    return {**chosen, YOUDEN: _youden(np.sort(probs[positive]), np.sort(probs[~positive])), HALF: 0.5}


def sensitivity_rule(share: float) -> str:
    """The name of the rule that finds this share of the tumour."""
    return f"sensitivity {share:.2f}"


def _youden(positive: NDArray[np.float64], negative: NDArray[np.float64]) -> float:
    """Of ascending probabilities of both labels."""
    thresholds = np.unique(np.concatenate([positive, negative]))
    found = 1.0 - np.searchsorted(positive, thresholds, side="left") / len(positive)
    alarms = 1.0 - np.searchsorted(negative, thresholds, side="left") / len(negative)
    index = found - alarms
    return float(thresholds[np.flatnonzero(index >= index.max() - 1e-12)[-1]])


def operating_points(label: ArrayLike, prob: ArrayLike, thresholds: Mapping[str, float]) -> tuple[OperatingPoint, ...]:
    """Figures at each threshold, by rule. Thresholds that were chosen on these very patches flatter themselves a little.

    Raises:
        DataError: one label only, or as :func:`pcam_automl.metrics.confusion`.
    """
    _counts_of_both(label, prob)
    return tuple(_point(rule, threshold, label, prob) for rule, threshold in thresholds.items())


def _counts_of_both(label: ArrayLike, prob: ArrayLike) -> Confusion:
    counts = confusion(label, prob)
    if counts.false_negative + counts.true_positive in (0, sum(counts)):
        raise DataError(f"thresholds need patches of both labels, got {sum(counts)} of one")
    return counts


def _point(rule: str, threshold: float, label: ArrayLike, prob: ArrayLike) -> OperatingPoint:
    tn, fp, fn, tp = confusion(label, prob, threshold)
    return OperatingPoint(
        rule,
        threshold,
        tp / (tp + fn),
        tn / (tn + fp),
        tp / (tp + fp) if tp + fp else None,
        tn / (tn + fn) if tn + fn else None,
        (tp + fp) / (tn + fp + fn + tp),
    )


def reject_curve(label: ArrayLike, prob: ArrayLike) -> tuple[RejectPoint, ...]:
    """Errors and AUC when the network decides only its surest patches, by coverage from 1 down to 0.1.

    The reject option of Chow (IEEE Trans. Inf. Theory 16, 1970): unsure is what lies near 0.5, so the probabilities should
    be calibrated. Of equally sure patches those that come first are kept.

    Args:
        label: (N,) 0 or 1.
        prob: (N,) in [0, 1].

    Raises:
        DataError: as :func:`pcam_automl.metrics.confusion`.
    """
    confusion(label, prob)  # judges the arguments
    probs, positive = np.asarray(prob, np.float64), np.asarray(label) == 1
    order = np.argsort(-np.abs(probs - 0.5), kind="stable")
    wrong = np.cumsum(((probs >= 0.5) != positive)[order])
    points = []
    for coverage in COVERAGES:
        n = max(1, round(coverage * len(probs)))
        kept = positive[order[:n]]
        area = auc(kept, probs[order[:n]]) if 0 < kept.sum() < n else None
        points.append(RejectPoint(coverage, n, float(wrong[n - 1] / n), area))
    return tuple(points)
