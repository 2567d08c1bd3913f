"""`compare-backbones`: what a stored result counts for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from easy_set import TINY
from typer.testing import CliRunner

import pcam_automl.commands.recipes as recipes_module
from pcam_automl.cli import app
from pcam_automl.compare import Compared
from pcam_automl.errors import TrainingDiverged
from pcam_automl.recipe import Recipe
from pcam_automl.training.compute import Compute
from pcam_automl.training.speed import SpeedBook


def test_a_backbone_that_diverges_does_not_hold_up_the_others(
    easy_pack: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare = recipes_module.compare_backbone

    def diverging(recipe: Recipe, *words: Any, **options: Any) -> Compared:
        if recipe.backbone == "test_vit":
            raise TrainingDiverged("the loss is nan after 3 steps")
        return compare(recipe, *words, **options)

    monkeypatch.setattr(recipes_module, "compare_backbone", diverging)
    words = ["compare-backbones", "--recipe", "default", "--data", str(easy_pack), "--out", "c", "--weights", "none",
             "--device", "cpu", "--set", "crop_size=32", "--set", "batch_size=8", "--set", "views=16",
             "--set", "schedule=constant"]  # fmt: skip
    result = CliRunner().invoke(app, [*words, "test_vit", TINY], catch_exceptions=False)
    torch.set_num_threads(1)
    assert result.exit_code == 0, result.output
    assert "not in the table: test_vit, which diverged (the loss is nan after 3 steps)" in result.output
    assert [one["backbone"] for one in json.loads(Path("c/comparison.json").read_text())] == [TINY]
    with pytest.raises(TrainingDiverged, match="every backbone diverged"):
        CliRunner().invoke(app, [*words, "test_vit"], catch_exceptions=False)


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
