"""Patches that stay together, and how such groups are dealt: pure functions of arrays with one entry a patch. Knows no store."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pcam_automl.errors import DataError

_MAX_BUNDLES = 500  # scikit-learn places groups one by one in Python: 220,000 patches without a slide take minutes
_ATTEMPTS = 20
NO_SLIDES = (
    "no slides are known, so patches of one slide fall on both sides of the split and validation will be"
    " optimistic; --groups CSV (id,group or id,wsi), given where the raw folder is packed, makes it honest"
)
SLIDES_UNKNOWN = ", whose slides are unknown and may have been trained on: likely too high"


Ints = NDArray[np.int64]


def slides_caveat(group: NDArray[Any]) -> str:
    """What to say behind what an AUC is of; empty where every patch's slide is known.

    Args:
        group: (n,) slide codes of its patches, -1 unknown.
    """
    n = int((np.asarray(group) < 0).sum())
    if n in (0, len(group)):
        return SLIDES_UNKNOWN if n else ""
    return f", {n:,} of which have no known slide, which may have been trained on: likely too high"


def trained_caveat(
    group: NDArray[Any], digest: NDArray[np.uint8], judged: NDArray[np.integer], trained: NDArray[np.integer]
) -> str:
    """What to say behind a figure on patches that may have been trained on; empty where no slide and no copy of theirs was.

    Args:
        group: (N,) slide codes of all patches, -1 unknown.
        digest: (N, 16) of their pixels, zeros where a file was faulty.
        judged: (n,) rows of the figure.
        trained: (m,) rows that were trained on.
    """
    group, digest = np.asarray(group), np.ascontiguousarray(digest)
    slides = np.unique(group[trained])
    of_slides = np.isin(group[judged], slides[slides >= 0])
    pixels = digest.view("V16").reshape(-1)
    copies = np.isin(pixels[judged], pixels[trained]) & digest[judged].any(axis=1)
    found = [
        f"{int(seen.sum()):,} are {what}"
        for seen, what in ((of_slides, "of slides that were trained on"), (copies, "copies of what was trained on"))
        if seen.any()
    ]
    return f", of which {' and '.join(found)}: too high" if found else ""


def joined_groups(slide: Ints, digest: NDArray[np.uint8]) -> tuple[Ints, list[str]]:
    """A code for each patch, equal where slides or pixels tie patches together, and what to tell the user.

    Args:
        slide: (n,), -1 unknown.
        digest: (n, 16), zeros where the file was faulty: such patches are no copies of each other.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n = len(slide)
    known, readable = np.flatnonzero(slide >= 0), np.flatnonzero(digest.any(axis=1))
    of_slide = np.unique(slide[known], return_inverse=True)[1]
    of_pixels = np.unique(digest[readable].view(f"V{digest.shape[1]}").reshape(-1), return_inverse=True)[1]
    n_slides = int(of_slide.max(initial=-1)) + 1
    one, other = np.concatenate([known, readable]), np.concatenate([n + of_slide, n + n_slides + of_pixels])
    size = n + n_slides + int(of_pixels.max(initial=-1)) + 1
    code = connected_components(coo_array((np.ones(len(one), np.int8), (one, other)), (size, size)), directed=False)[1]
    notes = []
    if not len(known):
        notes.append(NO_SLIDES)
    elif len(known) < n:
        notes.append(f"{n - len(known)} of {n} patches have no slide and count singly: validation will be optimistic")
    n_groups = len(np.unique(code[n : n + n_slides]))
    if n_groups < n_slides:
        notes.append(f"identical patches tie slides together: {n_slides} slides make {n_groups} groups")
    return code[:n].astype(np.int64), notes


def bundled(joined: Ints, slide: Ints, strata: Ints, rng: np.random.Generator) -> Ints:
    """``joined``, with patches of no slide dealt into at most 500 bundles, each of the whole's strata."""
    _, first, code = np.unique(joined, return_index=True, return_inverse=True)
    with_slide = np.zeros(len(first), bool)
    with_slide[code[slide >= 0]] = True
    loose = np.flatnonzero(~with_slide)
    if len(loose) <= _MAX_BUNDLES:
        return code.astype(np.int64)
    loose = rng.permutation(loose)
    loose = loose[np.argsort(strata[first[loose]], kind="stable")]
    dealt = np.arange(len(first))
    dealt[loose] = len(first) + np.arange(len(loose)) % _MAX_BUNDLES
    return coded(dealt[code])


def set_aside(group: Ints, strata: Ints, share: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Rows of whole groups whose strata come nearest to ``share`` of each: the best of some random greedy picks."""
    code = coded(group)
    counts = np.zeros((int(code.max(initial=-1)) + 1, int(strata.max(initial=-1)) + 1))
    np.add.at(counts, (code, strata), 1.0)
    parts = counts / counts.sum(axis=0).clip(1)  # each group's part of each stratum
    best, least = np.zeros(len(parts), bool), np.inf
    for _ in range(_ATTEMPTS if len(parts) < 5000 else 1):
        taken, missing = np.zeros(len(parts), bool), np.full(parts.shape[1], share)
        for candidate in rng.permutation(len(parts)):
            after = missing - parts[candidate]
            if after @ after < missing @ missing:
                taken[candidate], missing = True, after
        if missing @ missing < least:
            best, least = taken, float(missing @ missing)
    return np.asarray(best[code])


def stratified_folds(group: Ints, strata: Ints, label: Ints, n_folds: int, seed: int, *, both: bool) -> Ints:
    """Fold 0 to n_folds - 1 for each row; with ``both`` a draw in which a fold lacks a label is drawn again."""
    from sklearn.model_selection import StratifiedGroupKFold

    n_groups = len(np.unique(group))
    if n_groups < n_folds:
        raise DataError(
            f"{n_folds} folds need at least {n_folds} slides that share no patch, got {n_groups};"
            " add slides, set less aside, or pack without slides: no --groups, no train_groups.csv (validation is then optimistic)"
        )
    fold = np.zeros(len(group), np.int64)
    if n_folds == 1:
        return fold
    if np.bincount(strata).max() < n_folds:  # scikit-learn refuses it; so few patches are not worth stratifying
        strata = np.zeros(len(group), np.int64)
    for attempt in range(_ATTEMPTS):
        folds = StratifiedGroupKFold(n_folds, shuffle=True, random_state=(seed + 7919 * attempt) % 2**32)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The least populated class in y", UserWarning)  # a rare domain: no fault
            for number, (_, inside) in enumerate(folds.split(strata, strata, group)):
                fold[inside] = number
        lacking = [np.bincount(fold[label == value], minlength=n_folds).min() == 0 for value in (0, 1)]
        if not (both and any(lacking)):
            return fold
    value = lacking.index(True)
    raise DataError(
        f"each of {n_folds} folds must hold both labels, but label {value} lies in {len(np.unique(group[label == value]))}"
        f" of {n_groups} slides only; add slides with both, or pack without slides: no --groups, no train_groups.csv (validation is then optimistic)"
    )


def domain_notes(domain: Ints, fold: Ints, names: tuple[str, ...], n_folds: int) -> list[str]:
    """One line for each domain that is missing from a fold."""
    held = [(code, len(np.unique(fold[domain == code]))) for code in np.unique(domain[domain >= 0])]
    return [f"domain {names[c]} lies in {n} of {n_folds} folds only: too few slides" for c, n in held if n < n_folds]


def coded(*keys: NDArray[np.integer]) -> Ints:
    """A code from 0 for each distinct combination of the keys."""
    code = np.zeros(len(keys[0]), np.int64)
    for key in keys:
        values, inverse = np.unique(key, return_inverse=True)
        code = np.unique(code * len(values) + inverse, return_inverse=True)[1].astype(np.int64)
    return code


def _rank(code: Ints, rng: np.random.Generator) -> Ints:
    """Each row's place, from 0, in a random order of the rows of equal code."""
    shuffled = np.lexsort((rng.random(len(code)), code))
    size = np.bincount(code)
    rank = np.empty(len(code), np.int64)
    rank[shuffled] = np.arange(len(code)) - np.repeat(np.cumsum(size) - size, size)
    return rank


def nested_order(stratum: Ints, domain: Ints, slide: Ints, rng: np.random.Generator) -> Ints:
    """Positions in nested order: in each stratum the slides take turns, and the strata are dealt evenly.

    Args:
        stratum: (n,) code of fold x label: every fold, not only the whole, then has stratified prefixes.
        domain: (n,), dealt evenly within a turn.
        slide: (n,), -1 unknown: such patches take turns as if they came from slides of the usual size.
        rng: of the draws.
    """
    slide, loose = slide.copy(), slide < 0
    if loose.any():
        usual = np.bincount(slide[~loose]) if (~loose).any() else np.array([max(1, len(slide) // 100)])
        place = _rank(coded(domain[loose]), rng) // max(1, int(usual[usual > 0].mean()))
        slide[loose] = slide.max() + 1 + coded(domain[loose], place)
    turn = _rank(coded(stratum, slide), rng)
    in_turn = coded(stratum, turn, domain)
    even = (_rank(in_turn, rng) + rng.random(len(slide))) / np.bincount(in_turn)[in_turn]
    queue = np.lexsort((even, turn, stratum))
    size = np.bincount(stratum)
    place = np.empty(len(slide), np.int64)
    place[queue] = np.arange(len(slide)) - (np.cumsum(size) - size)[stratum[queue]]
    return np.lexsort((rng.random(len(slide)), (place + 0.5) / size[stratum])).astype(np.int64)
