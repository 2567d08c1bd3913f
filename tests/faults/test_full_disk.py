"""Each writer on a full disk: one line, nothing half-written, and the same call succeeds once there is space."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    easy_raw: Path, easy_pack: Path, tmp_path: Path
) -> None:
    words = [sys.executable, str(SCRIPT), str(tmp_path), str(easy_raw), str(easy_pack)]
    environ = {**os.environ, "PYTHONPATH": str(REPO), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environ, timeout=240)
    assert done.returncode == 0, f"{done.stderr[-1500:]} {done.stdout[-300:]}"
    told = {line["writer"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert list(told) == WRITERS
    for writer, found in told.items():
        text = str(found["words"])
        assert "\n" not in text, writer
        assert any(sign in text for sign in ("no space left", "disk is full", "disk I/O error")), f"{writer}: {text}"
        assert found["left"] == {}, writer
        assert found["written"], f"{writer}: the same call succeeds once there is space"
