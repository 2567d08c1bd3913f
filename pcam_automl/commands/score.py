"""`score` and `check-submission`: a submission against the truth, or against the ids that are wanted. Imports no torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from pcam_automl import terminal
from pcam_automl.data.tables import read_ids, read_labels, read_names
from pcam_automl.errors import DataError, first_few
from pcam_automl.metrics import accuracy, auc, auc_interval
from pcam_automl.submission import check_submission


def run_score(submission: Path, labels: Path, *, groups: Path | None, threshold: float, as_json: bool) -> float:
    """AUC of a submission against true labels."""
    ids, label = read_labels(labels)
    truth = pd.Series(label, index=ids)
    check_submission_ids = check_submission(submission, read_ids(submission).tolist(), more_columns=True)
    table = pd.read_csv(submission, dtype=str, keep_default_na=False).set_index("id")  # text: float() loses no digit
    if missing := [i for i in truth.index if i not in table.index]:
        raise DataError(f"{submission} lacks {len(missing)} of the {len(truth)} labelled ids ({first_few(missing)})")
    probs = np.array([float(value) for value in table.loc[truth.index, "label"]])
    group = None
    if groups is not None:
        names = dict(zip(*read_names(groups, "group"), strict=True))
        slides = np.array([str(names.get(i) or f"?{i}") for i in truth.index])
        group = np.unique(slides, return_inverse=True)[1]
    score = auc(truth.to_numpy(), probs)
    low, high = auc_interval(truth.to_numpy(), probs, group)
    value = {
        "auc": score,
        "auc_95": [low, high],
        "accuracy": accuracy(truth.to_numpy(), probs, threshold),
        "n": len(truth),
        "rows": check_submission_ids,
    }
    if as_json:
        terminal.print_json(value)
    else:
        terminal.result(
            f"AUC {score:.4f} (95 % {low:.4f} to {high:.4f}), accuracy {value['accuracy']:.4f} at {threshold:g}, {len(truth):,} labelled patches"
        )
    return score


def run_check_submission(file: Path, sample: Path) -> None:
    """Check a submission against the sample's ids and order."""
    n = check_submission(file, read_ids(sample).tolist())
    terminal.result(f"{file}: {n:,} rows, valid")
