"""`compare-backbones`: what a stored result counts for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from easy_set import TINY
from typer.testing import CliRunner

from pcam_automl.cli import app
from pcam_automl.training.compute import Compute
from pcam_automl.training.speed import SpeedBook


def test_a_result_of_another_fold_is_not_taken_over(
    easy_pack: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SpeedBook, "compute_for", lambda self, recipe, device, views=None: Compute(str(device)))
    keys = []
    for fold in ("0", "1"):
        torch.set_num_threads(1)
        result = CliRunner().invoke(
            app,
            ["compare-backbones", TINY, "--recipe", "default", "--data", str(easy_pack), "--out", "c", "--fold", fold,
             "--weights", "none", "--device", "cpu", "--json", "--set", "crop_size=32", "--set", "batch_size=8",
             "--set", "views=16", "--set", "schedule=constant"],
            catch_exceptions=False,
        )  # fmt: skip
        torch.set_num_threads(1)
        assert result.exit_code == 0, result.output
        keys.append(json.loads((Path("c") / f"{TINY}.json").read_text())["key"])
    assert keys[0] != keys[1]
