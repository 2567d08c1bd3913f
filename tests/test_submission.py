"""Submission files and their check."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pcam_automl.commands.score import run_score
from pcam_automl.errors import DataError, InputError
from pcam_automl.submission import check_submission, check_threshold, write_probabilities, write_submission

IDS = ["a1", "007", "1e5"]


def test_what_is_written_passes_the_check_and_keeps_ids_as_text(tmp_path: Path) -> None:
    file = write_submission(tmp_path, IDS, np.array([0.0, 0.25, 1.0]), {"seed": 0}, threshold=0.25)
    assert file.read_text() == "id,label\na1,0.0\n007,0.25\n1e5,1.0\n"
    assert check_submission(file, IDS) == 3
    labels = tmp_path / "submission_labels.csv"
    assert labels.read_text() == "id,label\na1,0\n007,1\n1e5,1\n"
    write_submission(tmp_path, IDS, np.array([0.5, 0.5, 0.5]), {"seed": 0}, threshold=None)
    assert not labels.exists(), "labels of an earlier network"


def test_ids_that_spell_nothing_are_ids(tmp_path: Path) -> None:
    file = write_submission(tmp_path, ["NA", "null", "a"], np.array([0.0, 0.25, 1.0]), {"seed": 0}, threshold=None)
    assert check_submission(file, ["NA", "null", "a"]) == 3


def test_a_score_reads_every_digit_and_every_id(tmp_path: Path) -> None:
    probs = np.array([np.nextafter(1.0, 0.0), 1.0, 0.5])  # an order that a quick parser loses
    file = write_submission(tmp_path, ["NA", "null", "a"], probs, {"seed": 0}, threshold=None)
    (tmp_path / "labels.csv").write_text("id,label\nNA,0\nnull,1\na,0\n")
    assert run_score(file, tmp_path / "labels.csv", groups=None, threshold=0.5, as_json=True) == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,prob\na1,0\n", "columns must be id,label, got id,prob"),
        ("id,label\na1,0\n007,0\n", r"1 ids of the sample are missing \(1e5\)"),
        ("id,label\na1,0\n007,0\n1e5,0\nzz,0\n", r"1 ids are not in the sample \(zz\)"),
        (
            "id,label\n007,0\na1,0\n1e5,0\n",
            r"not in the sample's order \(`pcam-automl predict --sample CSV` writes them in it\)",
        ),
        ("id,label,predicted\na1,0,0\n007,0,0\n1e5,0,0\n", "columns must be id,label, got id,label,predicted"),
        ("id,label\na1,0\na1,0\n007,0\n1e5,0\n", "1 ids are repeated"),
        ("id,label\na1,\n007,0\n1e5,0\n", "1 labels are not numbers"),
        ("id,label\na1,1.5\n007,-1\n1e5,0\n", r"2 labels are outside \[0, 1\]"),
        (f"id,label\na1,{'9' * 400}\n007,0\n1e5,0\n", r"1 labels are outside \[0, 1\]"),
        (f"id,label\na1,{'9' * 400}\n007,yes\n1e5,0\n", "1 labels are not numbers; 1 labels are outside"),
        ("", "cannot be read as a submission"),
    ],
)
def test_faults_are_counted_and_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        check_submission(tmp_path / "s.csv", IDS)


def test_thresholds_are_probabilities() -> None:
    check_threshold(None)
    check_threshold(0.5)
    with pytest.raises(InputError, match=r"--threshold must be in \[0, 1\], got 1\.5"):
        check_threshold(1.5)


def test_the_order_of_probabilities_near_one_survives(tmp_path: Path) -> None:
    probs = 1.0 - np.logspace(-15, -7, 20)
    write_probabilities(tmp_path / "p.csv", [f"{number}" for number in range(20)], probs)
    found = [float(line.split(",")[1]) for line in (tmp_path / "p.csv").read_text().splitlines()[1:]]
    assert found == probs.tolist()


def test_a_table_with_labels_beside_the_probabilities_is_scored(tmp_path: Path) -> None:
    write_probabilities(tmp_path / "p.csv", ["x", "y"], np.array([0.2, 0.8]), threshold=0.5)
    (tmp_path / "labels.csv").write_text("id,label\nx,0\ny,1\n")
    assert run_score(tmp_path / "p.csv", tmp_path / "labels.csv", groups=None, threshold=0.5, as_json=True) == 1.0


def test_labels_stand_beside_probabilities(tmp_path: Path) -> None:
    write_probabilities(tmp_path / "p.csv", ["x", "y"], np.array([0.2, 0.8]), threshold=0.5)
    assert (tmp_path / "p.csv").read_text() == "id,label,predicted\nx,0.2,0\ny,0.8,1\n"
