"""The slides that the final training leaves out, so that the printed AUC is of the very network. Trains nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from pcam_automl.data.splits import slides_aside
from pcam_automl.errors import DataError, StudyError
from pcam_automl.search.budget import KEPT_BACK_SHARE
from pcam_automl.search.confirm import confirm_folds
from pcam_automl.search.study import VALIDATION_FOLD, OpenStudy


@dataclass(frozen=True)
class FinalRows:
    """What the final networks are trained on, and what they are judged by.

    Attributes:
        train: (n,) in nested order.
        held: (m,) ascending, of no slide of ``train``: the holdout, else what was kept back; empty where neither.
        kept_back: whether ``held`` was kept back and is no holdout: the search may have trained on it, the final networks have not.
        test: (t,) that are predicted for the submission; empty where none is to be written.
        compares: whether ``held`` shall say what each ingredient was worth, which predicts it some times more.
    """

    train: np.ndarray
    held: np.ndarray
    kept_back: bool
    test: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    compares: bool = False

    @property
    def name(self) -> str:
        """Of ``held``, for people."""
        return "slides kept back" if self.kept_back else "holdout"


def final_rows(
    opened: OpenStudy,
    share: float | None,
    n_confirm_folds: int,
    *,
    limited: bool,
    confirms: bool = True,
    note: Callable[[str], None],
) -> FinalRows:
    """The holdout judges where there is one; else what is kept back: ``share``, or where it is None a tenth of a study with limited seconds.

    Raises:
        DataError: a ``share`` was asked for, and the folds hold too few slides of a label. Not asked for, ``note`` is told.
    """
    split = opened.split
    if len(held := split.holdout_rows()):
        return FinalRows(split.order, held, False)
    try:
        rows = kept_back(
            opened, (KEPT_BACK_SHARE if limited else 0.0) if share is None else share, n_confirm_folds, confirms
        )
    except DataError as fault:
        if share is not None:
            raise
        note(f"no slides are kept back, so the printed AUC is of shorter trainings: {fault}")
        rows = np.zeros(0, np.int64)
    if len(rows):
        slides = np.unique(opened.store.group[rows])
        among = "" if slides[0] < 0 else f" of {len(slides)} slides"
        note(
            f"{len(rows):,} patches{among} are kept back to judge the final network; --keep-back 0 trains on them, too"
        )
    return FinalRows(split.order[~np.isin(split.order, rows)], rows, len(rows) > 0)


def kept_back(opened: OpenStudy, share: float, n_confirm_folds: int, confirms: bool = True) -> np.ndarray:
    """Rows of about ``share`` of the training patches in whole slides, of folds that chose nothing. (n,) ascending; empty for 0.

    The fold that validated the search and those of the confirmations have chosen the recipe, so a score on them flatters. Where every
    other fold confirms, or each fold is a domain (none shall be left out whole), only the validation fold is spared, and the confirmations
    leave these rows out of what they score.

    Args:
        opened: the study; its split's order is what could be trained on.
        share: in [0, 0.5].
        n_confirm_folds: of the confirmations.
        confirms: whether there are any. Without them the same slides are kept back, if they can be told.

    Raises:
        DataError: the folds hold too few slides of a label.
    """
    split, store = opened.split, opened.store
    if share == 0:
        return np.zeros(0, np.int64)
    fold = split.fold[split.order]
    try:
        chose = (VALIDATION_FOLD, *confirm_folds(opened, n_confirm_folds))
    except StudyError:
        if confirms:
            raise
        chose = (VALIDATION_FOLD,)  # so many folds cannot confirm, and none shall
    free = ~np.isin(fold, chose)
    if not free.any() or opened.settings.split_by == "domains":
        free = fold != VALIDATION_FOLD
    pool = np.sort(split.order[free])
    wanted = min(1.0, share * len(split.order) / len(pool))
    if wanted == 1.0:
        return pool
    try:
        return pool[slides_aside(store, pool, wanted, seed=split.seed)]
    except DataError as fault:
        raise DataError(f"--keep-back {share:g}: {fault}; --keep-back 0 trains on everything") from None
