"""Folds by slide, a holdout and the nested subsample order. Reads no images."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pcam_automl.config import SplitBy
from pcam_automl.data.domain_folds import domain_folds
from pcam_automl.data.split_groups import (
    Ints,
    bundled,
    coded,
    domain_notes,
    joined_groups,
    nested_order,
    set_aside,
    stratified_folds,
)
from pcam_automl.data.store import VALID, PatchStore
from pcam_automl.errors import DataError
from pcam_automl.files import written_whole

UNUSED, HOLDOUT = -1, -2
"""Codes of ``fold``: a row that no fold may use, and a row set aside for the end."""
N_FOLDS = 5

_FORMAT = "pcam_automl.split.1"


@dataclass(frozen=True)
class Split:
    """Which fold every row of a store belongs to, and in which order subsamples grow. Made by :func:`make_split`."""

    fold: NDArray[np.int8]
    """(N,) over all rows of the store: 0 and up, ``UNUSED`` or ``HOLDOUT``."""
    order: Ints
    """(n,) every row with a fold; each prefix has the whole's label ratio and is spread over slides and domains."""
    seed: int
    hash: str
    grouped: bool
    """Whether slides were known at all."""
    notes: tuple[str, ...]
    """What the user should be told, one line each."""
    domains: str = ""
    """Hash of the estimated domains that it was made with; empty where it was made with the data's own, or none."""

    def train_order(self, fold: int) -> Ints:
        """Rows to train on when ``fold`` validates; the first k are the subsample of size k."""
        return np.asarray(self.order[self.fold[self.order] != fold])

    def score_rows(self, fold: int, limit: int | None = None) -> Ints:
        """The first ``limit`` validation rows of ``fold``, all where it is None: a fixed, group-safe subset."""
        return np.asarray(self.order[self.fold[self.order] == fold][:limit])

    def holdout_rows(self) -> Ints:
        """Rows set aside, ascending."""
        return np.flatnonzero(self.fold == HOLDOUT).astype(np.int64)


def make_split(
    store: PatchStore,
    *,
    seed: int = 0,
    n_folds: int = N_FOLDS,
    holdout: float = 0.0,
    holdout_name: str = "--holdout",
    by: SplitBy = "slides",
    domains: str = "",
) -> Split:
    """Stratified folds that share no slide and no identical patch; the same arguments give the same split.

    Strata are label x domain; of dense sets (folders of images and masks, and any with masks whose label is one
    throughout) tumour share above or below the median x domain, and no fold need hold both. Patches without a slide count
    one by one. Where the store has an official validation
    part, it is fold 0 and the training part fills the others; training patches that share a slide or their pixels with
    it are ``UNUSED``.

    Args:
        store: only its ``development_rows`` get a fold.
        seed: of every draw, at least 0.
        n_folds: 2 to 100; or 1, beside a ``holdout``.
        holdout: share of the (training) patches set aside first, in whole slides, 0 to 0.5 inclusive.
        holdout_name: what the user set it by, for the messages.
        by: ``domains``: every fold is a domain, whatever ``n_folds`` and the official parts say (leave one domain out);
            fold 0 is the smallest that has a tenth of the patches and both labels.
        domains: hash of the store's domains where they were estimated.

    Raises:
        DataError: one label only, fewer than two domains with both labels where folds are domains, fewer slides than folds, a fold or holdout that would lack a label, or an argument
            out of range.
    """
    _check_arguments(seed, n_folds, holdout, holdout_name)
    rows = store.development_rows()
    by_load, domain = _is_dense(store, rows), np.asarray(store.domain)[rows].astype(np.int64)
    label = _tumour_load(store, rows) if by_load else np.asarray(store.label)[rows].astype(np.int64)
    slide = np.asarray(store.group)[rows].astype(np.int64)
    if by_load:
        _check_some(rows)
    else:
        _check_labels(label, "the labelled patches")
    joined, notes = joined_groups(slide, np.ascontiguousarray(store.digest)[rows])
    fold = np.full(len(rows), UNUSED, np.int64)
    official = (np.asarray(store.part)[rows] == VALID) & (by == "slides")
    free = ~np.isin(joined, joined[official])
    if official.any():
        fold[official] = 0
        if not by_load:
            remedy = "complete it, or remove it from the raw data: folds of the training part are drawn then"
            _check_labels(label[official], "the official validation part", remedy)
        if n_lost := int((~free & ~official).sum()):
            notes.append(f"{n_lost} training patches share a slide or pixels with the official validation part: unused")
    strata = coded(label, domain)
    bundle = bundled(joined, slide, strata, np.random.default_rng([seed, 0]))
    if holdout > 0:
        aside = np.flatnonzero(free)[set_aside(bundle[free], strata[free], holdout, np.random.default_rng([seed, 1]))]
        if by_load:
            _check_some(aside, f"a {holdout_name.lstrip('-')} of {holdout:g}")
        else:
            what, remedy = f"a {holdout_name.lstrip('-')} of {holdout:g}", f"choose a larger {holdout_name} or none"
            _check_labels(label[aside], what, remedy=remedy)
        fold[aside] = HOLDOUT
    part = np.flatnonzero(free & (fold == UNUSED))
    if by_load:
        _check_some(part, "the folds")
    else:
        _check_labels(label[part], "the patches left for the folds")
    first = int(official.any())
    if by == "domains":
        fold[part], of_domains = domain_folds(
            joined[part], domain[part], label[part], store.domain_names, both=not by_load
        )
    else:
        fold[part] = first + stratified_folds(
            bundle[part], strata[part], label[part], n_folds - first, seed, both=not by_load
        )
    kept = fold >= 0
    notes += of_domains if by == "domains" else domain_notes(domain[kept], fold[kept], store.domain_names, n_folds)
    all_folds = np.full(len(store.label), UNUSED, np.int8)
    all_folds[rows] = fold
    place = nested_order(coded(fold[kept], label[kept]), domain[kept], slide[kept], np.random.default_rng([seed, 2]))
    return _sealed(all_folds, rows[kept][place], seed, bool((slide >= 0).any()), tuple(notes), domains)


def slides_aside(store: PatchStore, rows: Ints, share: float, *, seed: int) -> NDArray[np.bool_]:
    """Which of ``rows`` are set aside: whole slides (and patches of equal pixels) of about ``share`` of each label and domain.

    Args:
        store: slides, labels, domains and digests.
        rows: (n,) of the store.
        share: in (0, 1].
        seed: of the draw; the same gives the same slides.

    Raises:
        DataError: what is set aside, or what is left, would lack a label.
    """
    by_load = _is_dense(store, rows)
    label = _tumour_load(store, rows) if by_load else np.asarray(store.label)[rows].astype(np.int64)
    slide, domain = (np.asarray(values)[rows].astype(np.int64) for values in (store.group, store.domain))
    joined, _ = joined_groups(slide, np.ascontiguousarray(store.digest)[rows])
    strata, rng = coded(label, domain), np.random.default_rng([seed, 3])
    aside = set_aside(bundled(joined, slide, strata, rng), strata, share, rng)
    for part, what in ((aside, "the slides kept back"), (~aside, "what the slides kept back leave")):
        if by_load:
            _check_some(rows[part], what)
        else:
            _check_labels(label[part], what)
    return aside


def write_split(split: Split, path: Path) -> None:
    """Write the split as ``.npz``, whole or not at all; nothing in it is pickled."""
    with written_whole(path) as partial, partial.open("wb") as file:
        np.savez(
            file,
            format=np.array(_FORMAT),
            fold=split.fold,
            order=split.order,
            seed=np.array(split.seed),
            grouped=np.array(split.grouped),
            notes=np.array(json.dumps(split.notes)),
            hash=np.array(split.hash),
            domains=np.array(split.domains),
        )


def load_split(path: Path) -> Split:
    """Read a split and check its hash.

    Raises:
        DataError: missing, not a split of this version, or changed since it was written.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as stored:
            if str(stored["format"]) != _FORMAT:
                raise DataError(f"{path} must be a split of format {_FORMAT}, got {str(stored['format'])!r}")
            fold, order = stored["fold"], stored["order"]
            seed, grouped = int(stored["seed"]), bool(stored["grouped"])
            notes, expected = tuple(json.loads(str(stored["notes"]))), str(stored["hash"])
            domains = str(stored["domains"]) if "domains" in stored else ""  # splits of earlier releases have none
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; the split is written when the study is created") from None
    except (OSError, EOFError, ValueError, TypeError, KeyError, zipfile.BadZipFile, zlib.error) as fault:
        raise DataError(f"{path} cannot be read as a split ({fault}); make the study anew") from None
    split = _sealed(fold, order, seed, grouped, notes, domains)
    if split.hash != expected or fold.dtype != np.int8 or order.dtype != np.int64:
        raise DataError(f"{path} is corrupt: its contents do not give its hash; make the study anew")
    return split


def _sealed(
    fold: NDArray[np.int8], order: Ints, seed: int, grouped: bool, notes: tuple[str, ...], domains: str
) -> Split:
    """The split with its hash, its arrays read-only."""
    about = [_FORMAT, seed, grouped, notes, fold.shape, order.shape, *([domains] if domains else [])]
    digest = hashlib.sha256(json.dumps(about).encode())
    for values in (fold, order):
        digest.update(np.ascontiguousarray(values).tobytes())
        values.setflags(write=False)
    return Split(fold, order, seed, digest.hexdigest(), grouped, notes, domains)


def _check_arguments(seed: int, n_folds: int, holdout: float, holdout_name: str) -> None:
    if not 0.0 <= holdout <= 0.5:
        raise DataError(f"{holdout_name} must be in [0, 0.5], got {holdout}")
    if not 1 <= n_folds <= 100 or (n_folds == 1 and holdout == 0):  # one fold is what a holdout leaves
        raise DataError(f"n_folds must be in [2, 100], or 1 beside a {holdout_name}, got {n_folds}")
    if seed < 0:
        raise DataError(f"seed must be 0 or more, got {seed}")


def _check_labels(label: Ints, what: str, remedy: str = "both are needed") -> None:
    n_positive = int((label == 1).sum())
    if n_positive in (0, len(label)):
        held = f"only {len(label)} patches of label {int(n_positive > 0)}" if len(label) else "no patch"
        raise DataError(f"{what} must hold patches of label 0 and of label 1, got {held}; {remedy}")


def _is_dense(store: PatchStore, rows: Ints) -> bool:
    if store.masks is None:
        return False
    return store.source.get("kind") == "dense" or len(np.unique(store.label[rows])) < 2


def _tumour_load(store: PatchStore, rows: Ints) -> Ints:
    """1 for the half of the images with the larger share of tumour, ties by row: (n,) 0 or 1."""
    assert store.masks is not None
    share = np.array([np.count_nonzero(store.masks[row]) for row in rows])
    load = np.zeros(len(rows), np.int64)
    load[np.argsort(share, kind="stable")[len(rows) // 2 :]] = 1
    return load


def _check_some(rows: Ints, what: str = "the training part") -> None:
    if not len(rows):
        raise DataError(f"{what} must hold an image, got none; set less or more aside, or add images")
