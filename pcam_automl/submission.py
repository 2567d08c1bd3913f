"""Submission files: writing them in the sample's order and checking them. Predicts nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pcam_automl.errors import DataError, InputError, first_few
from pcam_automl.files import write_json, written_whole

SUBMISSION_FILE, LABELS_FILE = "submission.csv", "submission_labels.csv"


def check_threshold(threshold: float | None) -> None:
    """Raise InputError for a threshold outside [0, 1]."""
    if threshold is not None and not 0.0 <= threshold <= 1.0:
        raise InputError(f"--threshold must be in [0, 1], got {threshold}")


def write_probabilities(file: Path, ids: Sequence[str], probs: np.ndarray, *, threshold: float | None = None) -> None:
    """Write ``id,label`` with probabilities, all digits; with a threshold a column ``predicted`` of 0/1 beside them.

    Rounded ones near 0 and 1 would tie, and the AUC counts their order.
    """
    table = pd.DataFrame({"id": list(ids), "label": probs.astype(np.float64)})
    if threshold is not None:
        table["predicted"] = (probs >= threshold).astype(int)
    with written_whole(file) as partial:
        table.to_csv(partial, index=False)


def check_submission(file: Path, sample_ids: Sequence[str], *, more_columns: bool = False) -> int:
    """Check a submission against the ids that are wanted, in their order; returns the number of rows.

    Args:
        file: CSV ``id,label``.
        sample_ids: in their order.
        more_columns: whether there may be others behind them, such as ``predicted``.

    Raises:
        DataError: columns, ids, order, NaN, or values outside [0, 1]; all that is wrong in one line.
    """
    try:
        table = pd.read_csv(file, dtype={"id": str}, keep_default_na=False, encoding="utf-8")  # an id may be NA
    except (OSError, ValueError, UnicodeDecodeError) as fault:  # pandas' parser errors are ValueErrors
        raise DataError(f"{file} cannot be read as a submission ({' '.join(str(fault).split())[:120]})") from None
    named = list(table.columns)[:2] if more_columns else list(table.columns)
    if named != ["id", "label"]:
        raise DataError(f"{file}: columns must be id,label, got {','.join(map(str, table.columns))}")
    faults = []
    found, wanted = table["id"].astype(str).tolist(), list(sample_ids)
    if found != wanted:
        have, want = set(found), set(wanted)
        if missing := [i for i in wanted if i not in have]:
            faults.append(f"{len(missing)} ids of the sample are missing ({first_few(missing)})")
        if strange := [i for i in found if i not in want]:
            faults.append(f"{len(strange)} ids are not in the sample ({first_few(strange)})")
        if len(have) < len(found):
            faults.append(f"{len(found) - len(have)} ids are repeated")
        if not faults:
            faults.append(
                "the ids are not in the sample's order (`pcam-automl predict --sample CSV` writes them in it)"
            )
    values = np.array([_number(value) for value in table["label"]], np.float64)
    if n := int(np.isnan(values).sum()):
        faults.append(f"{n} labels are not numbers")
    if n := int(((values < 0) | (values > 1)).sum()):
        faults.append(f"{n} labels are outside [0, 1]")
    if faults:
        raise DataError(f"{file} is not a valid submission: {'; '.join(faults)}")
    return len(table)


def _number(value: object) -> float:
    """A cell as pandas reads it, NaN if it is no number; pandas' own way stumbles over integers of 400 digits."""
    try:
        return float(str(value))
    except ValueError:
        return math.nan


def write_submission(
    folder: Path, ids: Sequence[str], probs: np.ndarray, provenance: dict[str, Any], *, threshold: float | None
) -> Path:
    """Write ``submission.csv`` (checked), ``submission.json`` (provenance) and, with a threshold, ``submission_labels.csv``."""
    file = folder / SUBMISSION_FILE
    write_probabilities(file, ids, probs)
    check_submission(file, ids)
    if threshold is None:
        (folder / LABELS_FILE).unlink(missing_ok=True)  # of an earlier network
    else:
        labels = pd.DataFrame({"id": list(ids), "label": (probs >= threshold).astype(int)})
        with written_whole(folder / LABELS_FILE) as partial:
            labels.to_csv(partial, index=False)
    write_json(folder / "submission.json", provenance)
    return file
