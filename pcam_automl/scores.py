"""Scores: labels and probabilities of patches that a training did not see, as values and as a CSV. Computes no metric."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pcam_automl.data.store import TEST, PatchStore
from pcam_automl.errors import DataError
from pcam_automl.files import write_text

FILE = "scores.csv"


@dataclass(frozen=True)
class Scores:
    """What ROC curves, confusion matrices and sheets of mistakes are drawn from.

    Attributes:
        rows: (n,) store rows; of a dense task a row stands for one of its pixels and may come many times.
        label: (n,) 0 or 1.
        prob: (n,) probability of 1.
        on: on what, for people: ``validation fold 0``.
    """

    rows: NDArray[np.int64]
    label: NDArray[np.int64]
    prob: NDArray[np.float64]
    on: str


def scores_text(scores: Scores, ids: NDArray[np.str_]) -> str:
    """The scores as CSV ``id,label,prob``, a first comment line naming what they are of.

    All digits are written: a fine-tuned network may put a quarter of its patches within 1e-8 of 1, whose order counts, too.

    Args:
        scores: what to write.
        ids: (N,) the store's.
    """
    out = io.StringIO()
    out.write(f"# {scores.on}\n")
    table = csv.writer(out, lineterminator="\n")
    table.writerow(("id", "label", "prob"))
    for row, label, prob in zip(scores.rows.tolist(), scores.label.tolist(), scores.prob.tolist(), strict=True):
        table.writerow((ids[row], label, repr(prob)))
    return out.getvalue()


def write_scores(path: Path, scores: Scores, ids: NDArray[np.str_]) -> None:
    """Write the scores, whole or not at all."""
    write_text(path, scores_text(scores, ids))


def read_scores(path: Path, ids: NDArray[np.str_], part: NDArray[np.int8] | None = None) -> Scores:
    """Read what :func:`write_scores` wrote.

    Args:
        path: the CSV.
        ids: (N,) the store's; every id of the file must be among them. Of equal ids the first counts: a store has its
            TEST rows last, and in dense sets they may be named like training images.
        part: (N,) the store's; given, ids of TEST rows are not looked at.

    Raises:
        DataError: missing, not such a file, or of another store.
    """
    named = read_named_scores(path)
    return Scores(rows_of(named.ids, ids, part, of=path), named.label, named.prob, named.on)


@dataclass(frozen=True)
class NamedScores:
    """Scores as their file has them, by id: (n,) ids, labels and probabilities, and what they are of."""

    ids: list[str]
    label: NDArray[np.int64]
    prob: NDArray[np.float64]
    on: str


def read_named_scores(path: Path) -> NamedScores:
    """Read what :func:`write_scores` wrote without the store that its ids are of; 20 files of 4,000 rows take 0.1 s.

    Raises:
        DataError: missing, or not such a file.
    """
    try:
        first, _, rest = path.read_text(encoding="utf-8").partition("\n")
        table = csv.reader(io.StringIO(rest))
        if (header := next(table, None)) != ["id", "label", "prob"]:
            raise ValueError(f"its columns are {header}")
        columns = list(zip(*table, strict=True)) or [(), (), ()]
        names, label, prob = list(columns[0]), np.array(columns[1], np.int64), np.array(columns[2], np.float64)
    except FileNotFoundError:
        raise DataError(
            f"{path} is not there: its trial ran on another machine (--artifacts would share it), or the file was removed"
        ) from None
    except (OSError, ValueError, IndexError, csv.Error) as fault:  # a UnicodeDecodeError is a ValueError
        raise DataError(f"{path} cannot be read as scores ({type(fault).__name__}: {str(fault)[:100]})") from None
    return NamedScores(names, label, prob, first.removeprefix("#").strip())


def rows_of(names: list[str], ids: NDArray[np.str_], part: NDArray[np.int8] | None, *, of: Path) -> NDArray[np.int64]:
    """(n,) store rows of the patches of these names; see :func:`read_scores`, ``of`` is the file that names them.

    Raises:
        DataError: an id that the store does not have.
    """
    among = np.arange(len(ids)) if part is None else np.flatnonzero(np.asarray(part) != TEST)
    order = among[np.argsort(ids[among], kind="stable")]
    if not len(order):
        raise DataError(f"{of} holds scores, but the data have no labelled patches; give its own --data")
    wanted = np.array(names, dtype=str)
    rows = order[np.searchsorted(ids[order], wanted).clip(max=len(order) - 1)]
    if len(wanted) and not np.array_equal(ids[rows], wanted):
        strange = wanted[ids[rows] != wanted][0]
        raise DataError(f"{of} holds ids that the data do not have, e.g. {strange}; give its own --data")
    return np.asarray(rows, np.int64)


def clusters_of_rows(store: PatchStore, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """(n,) what a bootstrap draws: the slide of each row; where it is unknown the row itself, whose pixels are not independent."""
    group = np.asarray(store.group)[rows].astype(np.int64)
    return np.where(group < 0, len(store.group_names) + rows, group)
