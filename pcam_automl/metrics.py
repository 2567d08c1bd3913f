"""Scores of probabilities against labels, NumPy in and floats out. Draws no curves and loads no patches."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pcam_automl.errors import DataError
from pcam_automl.intervals import auc_bounds

_BLOCK_ROWS = 4_000_000  # weights held at a time by the bootstrap: 32 MB
_MOST_PAIRED_GROUPS = 500
"""Up to so many slides the pairs won are counted once for every two slides; beyond, each draw goes through the patches."""

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
    """95 % interval of :func:`auc` from a bootstrap over slides; over patches where no slide is known.

    Patches of one slide are not independent: an interval over patches would be far too narrow. How draws become bounds is in
    :func:`~pcam_automl.intervals.auc_bounds`. Draws that hold one label only are left out. One slide says nothing of others:
    its interval is (0, 1), and so is that of patches of which one label lies in a single slide.

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
    code = group_codes(group, len(positive))
    _check_draws(n)
    n_slides, n_positive = n_independent(positive, code), int(positive.sum())
    draws = _drawn_aucs(positive, scores[None], code, n, seed)[:, 0] if n_slides > 1 else np.zeros(0)
    value = auc(label, prob)
    return auc_bounds(draws, value, n_slides=n_slides, n_positive=n_positive, n_negative=len(positive) - n_positive)


def auc_draws(
    label: ArrayLike, probs: ArrayLike, group: ArrayLike | None = None, n: int = 1000, seed: int = 0
) -> Floats:
    """AUCs of several scorers on the same bootstrap draws of slides, those that :func:`auc_interval` takes.

    The difference of two columns is a *paired* bootstrap: a draw of hard slides lowers both scorers, which says nothing
    about which of them is better.

    Args:
        label: (N,) 0 or 1.
        probs: (M, N) finite scores of M scorers of the same patches.
        group: (N,) integer code of the slide, negative where unknown; None is unknown throughout.
        n: draws, at least 1.
        seed: of the draws.

    Returns:
        (n, M) AUCs in [0, 1]; a row is NaN where its draw holds one label only.

    Raises:
        DataError: as :func:`auc_interval`, or probabilities that are not (M, N).
    """
    scores = np.asarray(probs, np.float64)
    if scores.ndim != 2 or not len(scores):
        raise DataError(f"probabilities of several scorers must be (M, N), got {scores.shape}")
    positive = [_checked(label, row)[0] for row in scores].pop()
    _check_both(positive)
    _check_draws(n)
    return _drawn_aucs(positive, scores, group_codes(group, len(positive)), n, seed)


def percentile_interval(
    draws: ArrayLike, otherwise: tuple[float, float] = (float("nan"), float("nan"))
) -> tuple[float, float]:
    """The 2.5 and 97.5 % quantiles of bootstrap draws that are not NaN; ``otherwise`` where all are."""
    values = np.asarray(draws, np.float64)
    values = values[~np.isnan(values)]
    if not len(values):
        return otherwise
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def log_loss(label: ArrayLike, prob: ArrayLike) -> float:
    """Mean negative log-likelihood in nats; probabilities are kept 1e-7 off 0 and 1, so that one error stays finite.

    Raises:
        DataError: no patches, labels other than 0 and 1, unequal lengths, or a probability outside [0, 1].
    """
    return float(patch_losses(label, prob).mean())


def patch_losses(label: ArrayLike, prob: ArrayLike) -> Floats:
    """What :func:`log_loss` is the mean of: (N,) nats."""
    positive, probs = _checked(label, prob, probability=True)
    probs = probs.clip(1e-7, 1 - 1e-7)
    return np.asarray(-np.log(np.where(positive, probs, 1 - probs)))


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


def group_codes(group: ArrayLike | None, n: int) -> NDArray[np.int64]:
    """Codes (n,) from 0 in the order of ``group``; a patch of unknown slide (negative, or all where None) is a slide of its own.

    Raises:
        DataError: not an integer code a patch.
    """
    groups: NDArray[Any] = np.full(n, -1) if group is None else np.asarray(group)
    if groups.shape != (n,) or not np.issubdtype(groups.dtype, np.integer):
        raise DataError(f"groups must be ({n},) integer codes, got {groups.shape} of {groups.dtype}")
    codes = groups.astype(np.int64)
    unknown = codes < 0
    codes[unknown] = codes.max(initial=-1) + 1 + np.arange(unknown.sum())
    return np.unique(codes, return_inverse=True)[1].astype(np.int64)


def n_independent(label: ArrayLike, code: NDArray[np.int64]) -> int:
    """Slides that an AUC's spread can be judged by: those that hold the label which fewer slides hold.

    Of 22 slides, two of which hold all of a label, the spread of that label's scores is known from two, whatever the other twenty say.

    Args:
        label: (N,) 0 or 1, both at least once.
        code: (N,) of the slides, from :func:`group_codes`.
    """
    positive = np.asarray(label) == 1
    return min(len(np.unique(code[positive])), len(np.unique(code[~positive])))


def _check_draws(n: int) -> None:
    if n < 1:
        raise DataError(f"draws must be at least 1, got {n}")


def _drawn_aucs(positive: Bools, scores: Floats, code: NDArray[np.int64], n: int, seed: int) -> Floats:
    """(n, M) AUC of each of the scorers (M, N) on each draw of groups.

    50 scorers of 4,000 patches on 40 slides, 1,000 draws: 0.3 s by pairs of slides; going through the patches 5 s.
    """
    rng, n_groups = np.random.default_rng(seed), int(code.max()) + 1
    if n_groups <= _MOST_PAIRED_GROUPS:
        of_pairs = [_PairedGroups(positive, row, code, n_groups).aucs for row in scores]
        width = n_groups
    else:
        of_pairs = [_SortedPatches(positive, row, code).aucs for row in scores]
        width = len(positive)
    block = max(1, _BLOCK_ROWS // width)
    parts = []
    for begin in range(0, n, block):
        drawn = _draws(rng, min(block, n - begin), n_groups)
        parts.append(np.stack([aucs(drawn) for aucs in of_pairs], axis=1))
    return np.concatenate(parts)


class _PairedGroups:
    """AUCs of draws of groups as a quadratic form: pairs won between every two groups, times how often each is drawn."""

    def __init__(self, positive: Bools, scores: Floats, code: NDArray[np.int64], n_groups: int) -> None:
        of, own = code[positive], scores[positive]
        self._n_positive = np.bincount(of, minlength=n_groups).astype(np.float64)
        self._n_negative = np.bincount(code[~positive], minlength=n_groups).astype(np.float64)
        self._won = np.zeros((n_groups, n_groups))  # [g, h]: positives of g over negatives of h, ties half
        order = np.lexsort((scores[~positive], code[~positive]))
        negatives = np.split(scores[~positive][order], np.cumsum(self._n_negative.astype(np.int64))[:-1])
        for other, lesser in enumerate(negatives):
            if len(lesser):
                won = (np.searchsorted(lesser, own, side="left") + np.searchsorted(lesser, own, side="right")) / 2
                self._won[:, other] = np.bincount(of, won, n_groups)

    def aucs(self, drawn: Floats) -> Floats:
        """(draws,) for counts (draws, groups)."""
        won = ((drawn @ self._won) * drawn).sum(axis=1)
        pairs = (drawn @ self._n_positive) * (drawn @ self._n_negative)
        return np.asarray(np.divide(won, pairs, out=np.full(len(drawn), np.nan), where=pairs > 0))


class _SortedPatches:
    """AUCs of draws of groups by going through all patches in the order of their scores, for many small groups."""

    def __init__(self, positive: Bools, scores: Floats, code: NDArray[np.int64]) -> None:
        order = np.argsort(scores, kind="stable")
        self._positive, ordered, self._code = positive[order], scores[order], code[order]
        self._below = np.searchsorted(ordered, ordered[self._positive], side="left")
        self._up_to = np.searchsorted(ordered, ordered[self._positive], side="right")

    def aucs(self, drawn: Floats) -> Floats:
        """(draws,) for counts (draws, groups)."""
        return _weighted_auc(drawn[:, self._code], self._positive, self._below, self._up_to)


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
