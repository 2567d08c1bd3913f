"""Scores of probabilities against labels, NumPy in and floats out. Draws no curves and loads no patches."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pcam_automl.errors import DataError

_BLOCK_ROWS = 4_000_000  # weights held at a time by the bootstrap: 32 MB

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


class Confusion(NamedTuple):
    """Counts of patches, of a dense task of pixels; positive means tumour."""

    true_negative: int
    false_positive: int
    false_negative: int
    true_positive: int


def auc(label: ArrayLike, prob: ArrayLike) -> float:
    """Area under the ROC curve: the share of (positive, negative) pairs in the right order, ties counting half.

    Args:
        label: (N,) 0 or 1.
        prob: (N,) any finite scores; only their order matters.

    Raises:
        DataError: no patches, one label only, labels other than 0 and 1, unequal lengths, or a score not finite.
    """
    positive, scores = _checked(label, prob)
    _check_both(positive)
    _, code, count = np.unique(scores, return_inverse=True, return_counts=True)
    rank = np.cumsum(count) - (count - 1) / 2  # 1-based mean rank of every distinct score
    n_positive = int(positive.sum())
    n_negative = len(positive) - n_positive
    return float((rank[code][positive].sum() - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative))


LEAST_OF_A_LABEL = 5
"""Patches of either label that a domain needs to be scored by itself: the AUC of fewer is mostly luck."""


def domain_aucs(label: ArrayLike, prob: ArrayLike, domain: ArrayLike) -> dict[int, float]:
    """:func:`auc` of each domain that has at least 5 patches of either label, by its code.

    Args:
        label: (N,) 0 or 1.
        prob: (N,) finite scores.
        domain: (N,) integer code, negative where unknown: those patches are not looked at.

    Raises:
        DataError: as :func:`auc`, or a domain per patch that is not an integer code.
    """
    positive, scores = _checked(label, prob)
    code = np.asarray(domain)
    return {value: auc(positive[code == value], scores[code == value]) for value in scorable_domains(positive, code)}


def scorable_domains(label: ArrayLike, domain: ArrayLike) -> list[int]:
    """Codes of the domains that :func:`domain_aucs` scores, ascending.

    Raises:
        DataError: a domain per patch that is not an integer code.
    """
    labels, code = np.asarray(label), np.asarray(domain)
    if code.shape != labels.shape or not np.issubdtype(code.dtype, np.integer):
        raise DataError(f"domains must be {labels.shape} integer codes, got {code.shape} of {code.dtype}")
    known = np.unique(code[code >= 0])
    counts = [[int(((code == value) & (labels == one)).sum()) for one in (0, 1)] for value in known]
    return [int(value) for value, n in zip(known, counts, strict=True) if min(n) >= LEAST_OF_A_LABEL]


def worst_domain_auc(label: ArrayLike, prob: ArrayLike, domain: ArrayLike) -> float | None:
    """The least of :func:`domain_aucs`; None where fewer than two domains can be scored.

    Raises:
        DataError: as :func:`domain_aucs`.
    """
    found = domain_aucs(label, prob, domain)
    return min(found.values()) if len(found) >= 2 else None


def auc_interval(
    label: ArrayLike, prob: ArrayLike, group: ArrayLike | None = None, n: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile bootstrap of :func:`auc`, drawn over slides; over patches where no slide is known.

    Patches of one slide are not independent: an interval over patches would be far too narrow. Draws that hold
    one label only are left out. One slide says nothing of others: its interval is (0, 1).

    Args:
        label: (N,) 0 or 1.
        prob: (N,) finite scores.
        group: (N,) integer code of the slide, negative where unknown; None is unknown throughout.
        n: draws, at least 1.
        seed: of the draws.

    Returns:
        The lower and the upper bound, in [0, 1].

    Raises:
        DataError: as :func:`auc`, or a group per patch that is not an integer code.
    """
    positive, scores = _checked(label, prob)
    _check_both(positive)
    code = _group_codes(group, len(positive))
    n_groups = int(code.max()) + 1
    if n < 1:
        raise DataError(f"draws must be at least 1, got {n}")
    if n_groups < 2:
        return 0.0, 1.0
    order = np.argsort(scores, kind="stable")
    positive, scores, code = positive[order], scores[order], code[order]
    below = np.searchsorted(scores, scores[positive], side="left")
    up_to = np.searchsorted(scores, scores[positive], side="right")
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK_ROWS // len(positive))
    values = np.concatenate(
        [
            _weighted_auc(_draws(rng, min(block, n - begin), n_groups)[:, code], positive, below, up_to)
            for begin in range(0, n, block)
        ]
    )
    values = values[~np.isnan(values)]
    if not len(values):
        return 0.0, 1.0
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def log_loss(label: ArrayLike, prob: ArrayLike) -> float:
    """Mean negative log-likelihood in nats; probabilities are kept 1e-7 off 0 and 1, so that one error stays finite.

    Raises:
        DataError: no patches, labels other than 0 and 1, unequal lengths, or a probability outside [0, 1].
    """
    positive, probs = _checked(label, prob, probability=True)
    probs = probs.clip(1e-7, 1 - 1e-7)
    return float(-np.log(np.where(positive, probs, 1 - probs)).mean())


def accuracy(label: ArrayLike, prob: ArrayLike, threshold: float = 0.5) -> float:
    """Share of patches on the right side of ``threshold``; a probability equal to it counts as tumour.

    Raises:
        DataError: as :func:`log_loss`, or a threshold outside [0, 1].
    """
    return accuracy_of(confusion(label, prob, threshold))


def accuracy_of(counts: Confusion) -> float:
    """Share of right calls; of pixels it is the pixel accuracy.

    Raises:
        DataError: nothing was counted.
    """
    if not sum(counts):
        raise DataError("an accuracy needs at least one patch or pixel, got none")
    return (counts.true_negative + counts.true_positive) / sum(counts)


def dice(label: ArrayLike, prob: ArrayLike, threshold: float = 0.5) -> float:
    """Dice coefficient of the calls at ``threshold``, see :func:`dice_of`.

    Raises:
        DataError: as :func:`accuracy`.
    """
    return dice_of(confusion(label, prob, threshold))


def dice_of(counts: Confusion) -> float:
    """2 TP / (2 TP + FP + FN) in [0, 1] (Dice, Ecology 26, 1945); 1 where there is no tumour and none is called."""
    missed = counts.false_positive + counts.false_negative
    both = 2 * counts.true_positive
    return both / (both + missed) if both + missed else 1.0


def confusion(label: ArrayLike, prob: ArrayLike, threshold: float = 0.5) -> Confusion:
    """Patches by label and by call, a probability of ``threshold`` or more being called tumour.

    Raises:
        DataError: as :func:`log_loss`, or a threshold outside [0, 1].
    """
    positive, probs = _checked(label, prob, probability=True)
    if not 0.0 <= threshold <= 1.0:
        raise DataError(f"threshold must be in [0, 1], got {threshold}")
    called = probs >= threshold
    return Confusion(
        true_negative=int((~positive & ~called).sum()),
        false_positive=int((~positive & called).sum()),
        false_negative=int((positive & ~called).sum()),
        true_positive=int((positive & called).sum()),
    )


def _checked(label: ArrayLike, prob: ArrayLike, *, probability: bool = False) -> tuple[Bools, Floats]:
    labels, scores = np.asarray(label), np.asarray(prob, np.float64)
    if labels.ndim != 1 or labels.shape != scores.shape:
        raise DataError(f"labels and probabilities must be (N,) of equal length, got {labels.shape} and {scores.shape}")
    if not len(labels):
        raise DataError("a score needs at least one patch, got none")
    foreign = labels[(labels != 0) & (labels != 1)]
    if len(foreign):
        raise DataError(f"labels must be 0 or 1, got {foreign[0]}")
    if n_bad := int((~np.isfinite(scores)).sum()):
        raise DataError(f"{n_bad} of {len(scores)} probabilities are not finite numbers")
    if probability and (scores.min() < 0 or scores.max() > 1):
        raise DataError(f"probabilities must be in [0, 1], got {scores.min():g} to {scores.max():g}")
    return labels == 1, scores


def _check_both(positive: Bools) -> None:
    if positive.all() or not positive.any():
        raise DataError(f"the AUC needs both labels, got {len(positive)} patches of label {int(positive[0])}")


def _group_codes(group: ArrayLike | None, n: int) -> NDArray[np.int64]:
    """Codes from 0; a patch of unknown slide is a slide of its own."""
    groups: NDArray[Any] = np.full(n, -1) if group is None else np.asarray(group)
    if groups.shape != (n,) or not np.issubdtype(groups.dtype, np.integer):
        raise DataError(f"groups must be ({n},) integer codes, got {groups.shape} of {groups.dtype}")
    codes = groups.astype(np.int64)
    unknown = codes < 0
    codes[unknown] = codes.max() + 1 + np.arange(unknown.sum())
    return np.unique(codes, return_inverse=True)[1].astype(np.int64)


def _draws(rng: np.random.Generator, n: int, n_groups: int) -> Floats:
    """How often each of n draws with replacement holds each group: (n, n_groups)."""
    drawn = rng.integers(0, n_groups, (n, n_groups)) + np.arange(n)[:, None] * n_groups
    return np.bincount(drawn.ravel(), minlength=n * n_groups).reshape(n, n_groups).astype(np.float64)


def _weighted_auc(weight: Floats, positive: Bools, below: NDArray[np.int64], up_to: NDArray[np.int64]) -> Floats:
    """AUC of each row of weights (draws, N), NaN where a label is missing.

    Args:
        weight: (draws, N), patches in ascending order of their scores.
        positive: (N,).
        below: (positives,) how many patches score less than each positive.
        up_to: (positives,) how many score at most as much.
    """
    lesser = np.zeros((len(weight), len(positive) + 1))
    np.cumsum(weight * ~positive, axis=1, out=lesser[:, 1:])
    own = weight[:, positive]
    won = (own * (lesser[:, below] + lesser[:, up_to])).sum(axis=1) / 2
    pairs = own.sum(axis=1) * lesser[:, -1]
    return np.asarray(np.divide(won, pairs, out=np.full(len(weight), np.nan), where=pairs > 0))
