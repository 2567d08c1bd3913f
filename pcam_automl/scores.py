"""Scores: labels and probabilities of patches that a training did not see, as values and as a CSV. Computes no metric."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pcam_automl.data.store import TEST
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

    Args:
        scores: what to write.
        ids: (N,) the store's.
    """
    out = io.StringIO()
    out.write(f"# {scores.on}\n")
    table = csv.writer(out, lineterminator="\n")
    table.writerow(("id", "label", "prob"))
    for row, label, prob in zip(scores.rows.tolist(), scores.label.tolist(), scores.prob.tolist(), strict=True):
        table.writerow((ids[row], label, f"{prob:.8g}"))
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
    try:
        first, _, rest = path.read_text(encoding="utf-8").partition("\n")
        table = list(csv.DictReader(io.StringIO(rest)))
        names = np.array([line["id"] for line in table], dtype=str)
        label = np.array([int(line["label"]) for line in table], np.int64)
        prob = np.array([float(line["prob"]) for line in table], np.float64)
    except (OSError, UnicodeDecodeError, KeyError, ValueError, TypeError) as fault:
        raise DataError(f"{path} cannot be read as scores ({type(fault).__name__}: {str(fault)[:100]})") from None
    among = np.arange(len(ids)) if part is None else np.flatnonzero(np.asarray(part) != TEST)
    order = among[np.argsort(ids[among], kind="stable")]
    if not len(order):
        raise DataError(f"{path} holds scores, but the data have no labelled patches; give its own --data")
    rows = order[np.searchsorted(ids[order], names).clip(max=len(order) - 1)]
    if len(names) and not np.array_equal(ids[rows], names):
        raise DataError(
            f"{path} holds ids that the data do not have, e.g. {names[ids[rows] != names][0]}; give its own --data"
        )
    return Scores(rows.astype(np.int64), label, prob, first.removeprefix("#").strip())
