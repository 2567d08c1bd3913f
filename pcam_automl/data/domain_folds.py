"""Folds that are domains: leave one scanner or laboratory out. Reads no images and keeps nothing (see splits.py)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pcam_automl.errors import DataError

MOST_FOLDS = 100
LEAST_SHARE = 0.1
"""Of the patches, that the domain that validates should have: the score of a handful says little."""

Ints = NDArray[np.int64]


def domain_folds(
    joined: Ints, domain: Ints, label: Ints, names: tuple[str, ...], *, both: bool
) -> tuple[Ints, list[str]]:
    """The fold of each patch, and what to tell the user.

    Fold 0, which validates in a search, is the smallest domain with at least a tenth of the patches (training keeps the
    more); the others follow by size. Domains of one label and patches of no known domain can validate nothing: they
    count to the largest domain.

    Args:
        joined: (n,) code of what must not be parted: a slide, or slides that share pixels; it goes where most of it lies.
        domain: (n,) code, negative where unknown.
        label: (n,) 0 or 1.
        names: of the domains.
        both: whether a fold needs both labels.

    Raises:
        DataError: fewer than two domains can validate, or more than 100.
    """
    own, n_moved = _of_group(joined, domain, len(names))
    counts = np.zeros((len(names), 2), np.int64)
    np.add.at(counts, (own[own >= 0], label[own >= 0]), 1)
    size = counts.sum(axis=1)
    usable = np.flatnonzero(counts.min(axis=1) > 0 if both else size > 0)
    if not 2 <= len(usable) <= MOST_FOLDS:
        needed = "both labels" if both else "a patch"
        held = ", ".join(f"{names[code]} {negative}/{positive}" for code, (negative, positive) in enumerate(counts[:9]))
        raise DataError(
            f"--split domains needs 2 to {MOST_FOLDS} domains with {needed}, got {len(usable)} (negative/positive: "
            f"{held or 'no domain is known'}); give --domains CSV where the raw folder is packed, or take --split slides"
        )
    large = size[usable] >= LEAST_SHARE * len(domain)
    order = usable[np.lexsort((usable, np.where(large, size[usable], -size[usable]), ~large))]
    largest = usable[np.argmax(size[usable])]
    fold_of = np.full(len(names) + 1, int(np.flatnonzero(order == largest)[0]), np.int64)  # the last is "unknown"
    fold_of[order] = np.arange(len(order))
    notes = [
        "folds are domains: "
        + ", ".join(f"{number} {names[code]} ({size[code]:,})" for number, code in enumerate(order))
    ]
    if n_moved:
        notes.append(
            f"{n_moved} slides or groups of identical patches lie in several domains: each counts where most of it lies"
        )
    if n_rest := int((~np.isin(own, usable)).sum()):
        notes.append(
            f"{n_rest} patches of domains with one label, or of none known, validate nothing by themselves: they are with {names[largest]}"
        )
    return fold_of[own], notes


def _of_group(joined: Ints, domain: Ints, n_domains: int) -> tuple[Ints, int]:
    """The domain in which most of each patch's group lies, -1 where none of it is known; and how many groups were parted."""
    _, group = np.unique(joined, return_inverse=True)
    counts = np.zeros((int(group.max(initial=-1)) + 1, n_domains), np.int64)
    known = domain >= 0
    np.add.at(counts, (group[known], domain[known]), 1)
    if not n_domains:
        return np.full(len(domain), -1, np.int64), 0
    own = np.where(counts.any(axis=1), counts.argmax(axis=1), -1)
    return own[group].astype(np.int64), int(((counts > 0).sum(axis=1) > 1).sum())
