"""`finalize` by two processes of torchrun: one submission, one bundle, one voice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # four starts of torch and timm, 40 s of a core
PINS = ["backbone=test_resnet", "crop_size=32", "batch_size=16", "dropout=0.0"]


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=folder, env=environ, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_two_processes_finalize_one_study(easy_raw: Path, tmp_path: Path) -> None:
    own = [sys.executable, "-m", "pcam_automl"]
    pins = [word for pin in PINS for word in ("--set", pin)]
    run(
        tmp_path,
        *own,
        "search",
        "--data",
        str(easy_raw),
        "--trials",
        "2",
        "--views",
        "96",
        "--weights",
        "none",
        "--device",
        "cpu",
        *pins,
    )
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
        "-m",
        "pcam_automl",
    ]
    both = run(
        tmp_path, *launcher, "finalize", "--epochs", "3", "--out", "two", "--no-report", "--device", "cpu", "--json"
    )
    card = json.loads((tmp_path / "two" / "submission.json").read_text())
    assert (tmp_path / "two" / "submission.csv").read_text().startswith("id,label\n")
    assert both.stdout.count('"auc"') == run_alone(tmp_path, own).stdout.count('"auc"'), "one process speaks"
    assert "epoch   3" in both.stderr
    assert both.stderr.count("epoch   3") == 1
    assert card["trial"] in (0, 1)
    assert not list((tmp_path / "two").glob(".*.checkpoints"))


def run_alone(folder: Path, own: list[str]) -> subprocess.CompletedProcess[str]:
    return run(folder, *own, "finalize", "--epochs", "3", "--out", "one", "--no-report", "--device", "cpu", "--json")
