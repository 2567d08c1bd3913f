"""Folds by slide, the holdout and the nested subsample order. Reads no images.

Patches of one slide look alike: a random split leaks. Here a group (slide) never spans two folds, exact duplicates always
share a group, and folds are stratified by label and domain together.
"""

from __future__ import annotations

import hashlib
import io
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pcam_automl.data.store import VALID, PatchStore
from pcam_automl.errors import DataError
from pcam_automl.files import written_whole

UNUSED, HOLDOUT = -1, -2
N_FOLDS = 5
FORMAT = "pcam-automl split 1"
_LARGEST_HOLDOUT = 0.5
_HOLDOUT_PARTS = 20  # the holdout is put together from twentieths of the slides

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """Which row of a store is used for what.

    Attributes:
        fold: (N,) int8 for every row of the store: 0 to 4, UNUSED (-1) or HOLDOUT (-2).
        order: (n,) int64 rows with a fold, in nested order: every prefix has nearly the label and domain shares of the
            whole and is spread over the groups, so a smaller subset is contained in each larger one.
        seed: of the draws.
        grouped: False if no slide was known, so that validation is optimistic.
        notes: for people, one line each.
    """

    fold: NDArray[np.int8]
    order: Rows
    seed: int
    grouped: bool
    notes: tuple[str, ...] = ()

    @property
    def hash(self) -> str:
        """SHA-256 over folds, order and seed."""
        digest = hashlib.sha256(f"{FORMAT}/{self.seed}/{self.grouped}".encode())
        digest.update(np.ascontiguousarray(self.fold, "<i1").tobytes())
        digest.update(np.ascontiguousarray(self.order, "<i8").tobytes())
        return digest.hexdigest()

    def train_order(self, fold: int) -> Rows:
        """Rows outside ``fold``, in nested order."""
        return np.asarray(self.order[self.fold[self.order] != fold])

    def score_rows(self, fold: int, limit: int) -> Rows:
        """The first ``limit`` rows of ``fold``, in nested order."""
        return np.asarray(self.order[self.fold[self.order] == fold][:limit])

    def holdout_rows(self) -> Rows:
        """Rows that nothing reads before finalize, ascending."""
        return np.flatnonzero(self.fold == HOLDOUT).astype(np.int64)


def make_split(store: PatchStore, *, seed: int = 0, n_folds: int = N_FOLDS, holdout: float = 0.0) -> Split:
    """Five stratified, grouped folds and the nested order; deterministic in the store's content and the seed.

    Args:
        store: labelled rows that are not left out are split; official validation rows become fold 0.
        seed: of the draws.
        n_folds: at least 2.
        holdout: share in [0, 0.5] set aside first, as whole groups.

    Raises:
        DataError: one class only, fewer groups than folds, or a fold or the holdout with one class only.
    """
    if not 0.0 <= holdout <= _LARGEST_HOLDOUT:
        raise DataError(f"--holdout must be in [0, {_LARGEST_HOLDOUT}], got {holdout}")
    rows = store.development_rows()
    label = np.asarray(store.label)[rows]
    if len(np.unique(label)) < 2:
        only = f"all {len(rows)} usable labels are {label[0]}" if len(rows) else "there is no usable labelled patch"
        raise DataError(f"a split needs both classes, {only}; check train_labels.csv")
    group = joined_groups(np.asarray(store.group)[rows], np.asarray(store.digest)[rows])
    stratum = _strata(label, np.asarray(store.domain)[rows])
    fold = np.full(len(rows), UNUSED, np.int8)
    official = np.asarray(store.part)[rows] == VALID
    if holdout > 0:
        fold[_holdout(stratum, group, holdout, seed, among=~official)] = HOLDOUT
    if official.any():
        fold[official] = 0
        free = np.flatnonzero(fold == UNUSED)
        fold[free] = 1 + _folds(stratum[free], group[free], n_folds - 1, seed)
    else:
        free = np.flatnonzero(fold == UNUSED)
        fold[free] = _folds(stratum[free], group[free], n_folds, seed)
    _check_classes(fold, label)
    used = np.flatnonzero(fold >= 0)
    order = rows[used[nested_order(stratum[used], group[used], seed)]]
    all_folds = np.full(len(store.ids), UNUSED, np.int8)
    all_folds[rows] = fold
    known = np.asarray(store.group)[rows] >= 0
    return Split(all_folds, order, seed, bool(known.any()), _notes(known, bool(official.any())))


def _notes(known: NDArray[np.bool_], official: bool) -> tuple[str, ...]:
    if official:
        return ("the official validation set is fold 0",)
    if not known.any():
        return (
            "WARNING: no slide ids (--groups CSV): patches of one slide fall on both sides of the split, so validation will be optimistic",
        )
    if not known.all():
        return (
            f"{int((~known).sum()):,} of {len(known):,} patches have no slide id; each counts as a slide of its own",
        )
    return ()


def joined_groups(group: NDArray[np.int32], digest: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Group codes 0..k-1 in which exact duplicates share a group, and so do the groups that they connect.

    Args:
        group: (n,) slide code, -1 unknown (a group of its own).
        digest: (n, 16) of the pixels.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n = len(group)
    slide = np.where(group >= 0, group, -1 - np.arange(n))
    slide = np.unique(slide, return_inverse=True)[1]
    pixels = np.ascontiguousarray(digest).view(np.dtype((np.void, digest.shape[1]))).ravel()
    copy = np.unique(pixels, return_inverse=True)[1]
    n_slides, n_copies = int(slide.max()) + 1, int(copy.max()) + 1
    graph = coo_array((np.ones(n, np.int8), (slide, n_slides + copy)), shape=(n_slides + n_copies,) * 2)
    component = connected_components(graph, directed=False)[1]
    return np.asarray(np.unique(component[slide], return_inverse=True)[1], np.int64)


def _strata(label: NDArray[np.int8], domain: NDArray[np.int32]) -> NDArray[np.int64]:
    """Label x domain as one code: StratifiedGroupKFold alone left a third of the folds without the rare domain."""
    return np.unique(label.astype(np.int64) + 2 * (domain.astype(np.int64) + 1), return_inverse=True)[1].astype(
        np.int64
    )  # type: ignore[no-any-return]


def _folds(stratum: Rows, group: Rows, n_folds: int, seed: int) -> NDArray[np.int8]:
    """(n,) fold 0..n_folds-1 by scikit-learn; single patches (each its own group) take the quicker StratifiedKFold."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    n_groups = len(np.unique(group))
    if n_groups < n_folds:
        raise DataError(
            f"a split into {n_folds} folds needs at least {n_folds} slides, got {n_groups}; check the groups table"
        )
    single = n_groups == len(group)
    make = StratifiedKFold if single else StratifiedGroupKFold
    fold = np.zeros(len(group), np.int8)
    with warnings.catch_warnings():  # a stratum smaller than the number of folds is no fault here
        warnings.filterwarnings("ignore", "The least populated class in y", UserWarning)
        try:
            parts = list(
                make(n_folds, shuffle=True, random_state=seed).split(
                    np.zeros(len(group)), stratum, None if single else group
                )
            )
        except ValueError as fault:
            raise DataError(
                f"the labelled patches cannot be split into {n_folds} folds ({fault}); add slides or patches"
            ) from None
    for number, (_, members) in enumerate(parts):
        fold[members] = number
    return fold


def _holdout(stratum: Rows, group: Rows, share: float, seed: int, among: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Positions set aside: whole groups, whose parts are added until the share is reached as nearly as they allow."""
    free = np.flatnonzero(among)
    n_parts = min(_HOLDOUT_PARTS, len(np.unique(group[free])))
    if n_parts < 2:
        raise DataError(f"--holdout {share:g} needs at least 2 slides, got {n_parts}")
    part = _folds(stratum[free], group[free], n_parts, seed + 1)
    wanted, taken = share * len(free), 0
    parts: list[int] = []
    for number in np.random.default_rng([seed, 7]).permutation(n_parts):
        size = int((part == number).sum())
        if parts and abs(taken + size - wanted) > abs(taken - wanted):
            continue
        parts.append(int(number))
        taken += size
    return np.asarray(free[np.isin(part, parts)], np.int64)


def _check_classes(fold: NDArray[np.int8], label: NDArray[np.int8]) -> None:
    for number in np.unique(fold[fold != UNUSED]):
        classes = np.unique(label[fold == number])
        if len(classes) < 2:
            name = "the holdout" if number == HOLDOUT else f"fold {number}"
            raise DataError(
                f"{name} would hold label {classes[0]} only: too few slides for each label; add slides, or leave --groups out"
            )


def nested_order(stratum: Rows, group: Rows, seed: int) -> Rows:
    """Positions 0..n-1 in nested order.

    Within a stratum the groups take turns (random order of groups, and of patches within each), and the strata are
    interleaved in proportion to their sizes: every prefix is stratified to within one patch a stratum.

    Args:
        stratum: (n,) label x domain.
        group: (n,) group codes.
        seed: of the draws.
    """
    rng = np.random.default_rng([seed, 11])
    n = len(stratum)
    shuffled = rng.permutation(n)
    s, g = stratum[shuffled], group[shuffled]
    rank_of_group = rng.permutation(int(group.max()) + 1)
    turn = _turns(s * (int(group.max()) + 1) + g)  # the how-many-th patch of its group in its stratum
    by_turn = np.lexsort((rank_of_group[g], turn, s))
    place = np.empty(n, np.int64)
    place[by_turn] = _turns(s[by_turn])  # the how-many-th patch of its stratum
    size = np.bincount(s)[s]
    return np.asarray(shuffled[np.lexsort((s, (place + 0.5) / size))], np.int64)


def _turns(key: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each element the number of equal elements before it: [7, 8, 7, 7] -> [0, 0, 1, 2]."""
    order = np.argsort(key, kind="stable")
    ordered = key[order]
    first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    counts = np.arange(len(key)) - np.repeat(first, np.diff(np.r_[first, len(key)]))
    turn = np.empty(len(key), np.int64)
    turn[order] = counts
    return turn


def write_split(split: Split, path: Path) -> None:
    """Write a split as ``.npz`` without pickles, whole or not at all."""
    with written_whole(path) as partial, partial.open("wb") as file:
        np.savez_compressed(
            file,
            format=np.array(FORMAT),
            fold=split.fold,
            order=split.order,
            seed=np.array(split.seed),
            grouped=np.array(split.grouped),
            notes=np.array(split.notes, dtype=np.str_),
            hash=np.array(split.hash),
        )


def load_split(path: Path) -> Split:
    """Read what :func:`write_split` wrote, its hash verified.

    Raises:
        DataError: missing, corrupt or of another version.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            if str(file["format"]) != FORMAT:
                raise DataError(f"{path} has format {str(file['format'])!r}, this version reads {FORMAT!r}")
            split = Split(
                file["fold"], file["order"], int(file["seed"]), bool(file["grouped"]), tuple(file["notes"].tolist())
            )
            expected = str(file["hash"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as fault:
        raise DataError(f"{path} is not a readable split ({type(fault).__name__}: {str(fault)[:100]})") from None
    if split.hash != expected:
        raise DataError(
            f"{path} has changed since it was written: its hash is {split.hash[:12]}, it was {expected[:12]}"
        )
    return split
