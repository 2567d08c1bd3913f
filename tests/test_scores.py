"""Scores as CSV: written, read back, looked up among the rows that can have been scored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pcam_automl.data.store import TEST, TRAIN
from pcam_automl.errors import DataError
from pcam_automl.scores import Scores, read_scores, write_scores

IDS = np.array(["2.png", "1.png", "3.png", "1.png", "2.png"])
PART = np.array([TRAIN, TRAIN, TRAIN, TEST, TEST], np.int8)


def test_ids_that_the_test_part_shares_stand_for_training_rows(tmp_path: Path) -> None:
    scores = Scores(np.array([1, 0, 1]), np.array([1, 0, 0]), np.array([0.9, 0.25, 0.5]), "2 validation images")
    write_scores(tmp_path / "scores.csv", scores, IDS)
    order = np.array([3, 4, 1, 0, 2])  # test rows first: only the parts tell them apart
    for ids, part, rows in ((IDS, PART, [1, 0, 1]), (IDS, None, [1, 0, 1]), (IDS[order], PART[order], [2, 3, 2])):
        read = read_scores(tmp_path / "scores.csv", ids, part)
        assert read.rows.tolist() == rows
        assert read.prob.tolist() == [0.9, 0.25, 0.5]
        assert read.on == "2 validation images"


def test_the_order_of_probabilities_near_one_survives(tmp_path: Path) -> None:
    """Which rounding to eight digits made ties of: 143 of 566 patches of a fine-tuned network on colon96."""
    prob = np.sort(np.concatenate([1.0 - np.logspace(-15, -7, 20), np.logspace(-30, -20, 20), [1.0, 0.0, 1 / 3]]))
    ids = np.array([f"{number}" for number in range(len(prob))])
    write_scores(tmp_path / "scores.csv", Scores(np.arange(len(prob)), np.arange(len(prob)) % 2, prob, "x"), ids)
    assert read_scores(tmp_path / "scores.csv", ids).prob.tolist() == prob.tolist()


def test_ids_of_test_rows_alone_are_refused(tmp_path: Path) -> None:
    ids = np.array(["a", "b"])
    write_scores(tmp_path / "scores.csv", Scores(np.array([1]), np.array([1]), np.array([0.9]), "x"), ids)
    with pytest.raises(DataError, match=r"ids that the data do not have, e.g. b"):
        read_scores(tmp_path / "scores.csv", ids, np.array([TRAIN, TEST], np.int8))
    with pytest.raises(DataError, match="no labelled patches"):
        read_scores(tmp_path / "scores.csv", ids, np.array([TEST, TEST], np.int8))
