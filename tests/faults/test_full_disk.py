"""Each writer on a full disk: one line, nothing half-written, and the same call succeeds once there is space."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("full_disk")  # one run of the script for all
REPO, SCRIPT = Path(__file__).parents[2], Path(__file__).parent / "full_disk.py"
WRITERS = [
    "pack",
    "split",
    "domains",
    "checkpoint",
    "bundle",
    "scores",
    "submission",
    "json",
    "png",
    "synthetic set",
    "study",
]


@pytest.fixture(scope="module")
def told(easy_raw: Path, easy_pack: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    words = [sys.executable, str(SCRIPT), str(tmp_path_factory.mktemp("disk")), str(easy_raw), str(easy_pack)]
    environ = {**os.environ, "PYTHONPATH": str(REPO), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environ, timeout=240)
    assert done.returncode == 0, f"{done.stderr[-1500:]} {done.stdout[-300:]}"
    return {line["writer"]: line for line in map(json.loads, done.stdout.splitlines())}


def test_every_writer_was_tried(told: dict[str, dict[str, object]]) -> None:
    assert list(told) == WRITERS


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    told: dict[str, dict[str, object]], writer: str
) -> None:
    found = told[writer]
    words = str(found["words"])
    assert "\n" not in words
    assert "no space left" in words or "disk is full" in words or "disk I/O error" in words, words
    assert found["left"] == {}
    assert found["written"], "the same call succeeds once there is space"
