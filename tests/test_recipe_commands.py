"""`train` of every recipe, `recipes`, `lr-find`, `compare-backbones`, `report`, `predict --explain`, for a few steps each."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from pcam_automl import terminal
from pcam_automl.bundle import load_bundle
from pcam_automl.cli import app
from pcam_automl.configs_folder import find_config, list_configs
from pcam_automl.data.store import open_store
from pcam_automl.data.synthetic import write_synthetic
from pcam_automl.lr_find import LrCurve, rate_of_step, valley
from pcam_automl.recipe_files import load_recipe
from pcam_automl.training.compute import Compute
from pcam_automl.training.speed import SpeedBook

TINY = ["--set", "backbone=test_resnet", "--set", "crop_size=32", "--set", "batch_size=8"]


@pytest.fixture(scope="session")
def synthetic_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small synthetic set in the Kaggle layout, masks included."""
    folder = tmp_path_factory.mktemp("synthetic") / "set"
    write_synthetic(folder, n_patches=240, n_slides=12, seed=3)
    return folder


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """No timing of variants, which takes longer than the few steps do: plain float32."""
    monkeypatch.setattr(SpeedBook, "compute_for", lambda self, recipe, device, views=None: Compute(str(device)))


def run(*arguments: str) -> str:
    torch.set_num_threads(1)
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    torch.set_num_threads(1)
    assert result.exit_code == 0, result.output
    return result.stdout


def few_steps(name: str) -> list[str]:
    """Overrides that make any recipe a matter of seconds without changing what it is."""
    recipe = load_recipe(find_config("recipes", name))
    sets = ["batch_size=4", "views=16"]
    if recipe.task == "dense":
        sets += ["tile_size=32", "batch_size=2", "views=4"]
        sets = [text for text in sets if text not in ("batch_size=4", "views=16")]
    sets += NARROWER.get(name, [])
    return [part for text in sets for part in ("--set", text)]


NARROWER = {"unet_dense": ["cnn_filters=[8, 16, 32]"], "cnn_basic": ["cnn_dense=[16, 8]"]}
"""Half a gigabyte of optimizer state takes longer to store than the steps take; tests/models has the full networks."""


@pytest.mark.parametrize("name", list_configs("recipes"))
def test_every_recipe_trains(name: str, synthetic_set: Path, in_tmp: Path, unmeasured: None) -> None:
    options = ["--weights", "none", "--device", "cpu", "--json", "--no-report"]
    text = run("train", name, "--data", str(synthetic_set), "--out", "b", *options, *few_steps(name))
    result = json.loads(text)
    assert 0.0 <= result["auc"] <= 1.0
    assert result["images_per_s"] > 0
    bundle = load_bundle(Path("b"))
    assert all(math.isfinite(float(tensor.float().abs().sum())) for tensor in bundle.state.values())
    assert all(math.isfinite(epoch["train_loss"]) for epoch in bundle.metrics["epochs"])
    stages = bundle.recipe.stages
    assert [Path(f"b-stage{n}").is_dir() for n in range(1, len(stages))] == [True] * (len(stages) - 1 if stages else 0)
    assert (Path("b") / "scores.csv").is_file()


def test_recipes_are_listed_with_a_line_each() -> None:
    lines = run("recipes").splitlines()
    assert [line.split()[0] for line in lines] == list_configs("recipes")
    assert all(len(line.split()) > 4 for line in lines)


def test_lr_find_writes_a_plot_and_its_numbers_and_starts_from_a_stage(synthetic_set: Path, in_tmp: Path) -> None:
    data = ["--data", str(synthetic_set), "--weights", "none", "--device", "cpu"]
    stages = "stages=[{share: 0.5, lr: 0.01, trainable: 0.0}, {share: 0.5, lr: 0.001, lr_low: 0.0001}]"
    recipe = [*TINY, "--set", stages]
    run("train", "default", "--out", "s", "--no-report", "--set", "views=32", *data, *recipe)
    text = run(
        "lr-find", "default", "--out", "lr", "--steps", "25", "--weight-decay", "0.01", "--weight-decay", "0",
        "--stage", "2", "--from", "s-stage1", "--json", *data, *recipe,
    )  # fmt: skip
    curves = json.loads(text)["curves"]
    assert [curve["weight_decay"] for curve in curves] == [0.01, 0.0]
    assert curves[0]["loss"][0] == pytest.approx(curves[1]["loss"][0])  # the same weights, the same views
    assert curves[0]["lr"] == sorted(curves[0]["lr"])
    assert (Path("lr") / "lr_find.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((Path("lr") / "lr_find.json").read_text()) == curves


def test_valley_lies_in_the_fall_and_a_rising_curve_has_none() -> None:
    lr = [rate_of_step(step, 100) for step in range(100)]
    loss = [1.0] * 30 + [1.0 - 0.02 * step for step in range(40)] + [0.3 + 0.05 * step for step in range(30)]
    found = valley(lr, loss)
    assert found is not None
    assert lr[30] < found < lr[70]
    assert valley(lr, list(range(100))) is None
    assert valley([], []) is None


def test_noise_about_a_level_suggests_no_rate_and_a_small_fall_out_of_it_does() -> None:
    lr = np.geomspace(1e-7, 10, 200).tolist()
    noise = 0.69 + np.random.default_rng(0).normal(0, 0.003, 200)
    assert valley(lr, noise.tolist()) is None
    steps = np.arange(200)
    fallen = noise - 0.05 * np.clip((steps - 100) / 50, 0, 1) + 0.01 * np.clip(steps - 150, 0, None)  # and diverges
    found = valley(lr, fallen.tolist())
    assert found is not None
    assert lr[90] < found < lr[150]
    assert LrCurve(0.0, (), (), None).suggestion is None


def test_compare_backbones_ranks_and_keeps_what_is_done(synthetic_set: Path, in_tmp: Path) -> None:
    command = [
        "compare-backbones", "test_resnet", "test_vit", "--recipe", "default", "--data", str(synthetic_set), "--out", "c",
        "--weights", "none", "--device", "cpu", "--json", "--set", "crop_size=32", "--set", "batch_size=8", "--set", "views=32",
        "--set", "schedule=constant",
    ]  # fmt: skip
    results = json.loads(run(*command))
    assert {one["backbone"] for one in results} == {"test_resnet", "test_vit"}
    assert results[0]["trained"]["loss"] <= results[1]["trained"]["loss"]
    assert all(set(one["initial"]) >= {"auc", "loss", "accuracy"} for one in results)
    before = {file: file.stat().st_mtime_ns for file in Path("c").glob("test_*.json")}
    assert json.loads(run(*command)) == results
    assert {file: file.stat().st_mtime_ns for file in Path("c").glob("test_*.json")} == before


def test_a_report_and_explanations_of_a_bundle(synthetic_set: Path, in_tmp: Path) -> None:
    data = ["--data", str(synthetic_set), "--device", "cpu"]
    run("train", "default", "--out", "b", "--weights", "none", "--set", "views=64", *data, *TINY)
    page = Path("b/report.html").read_text()
    assert "ROC" in page
    Path("b/report.html").unlink()
    run("report", "--model", "b", *data)
    assert "Grad-CAM" in Path("b/report.html").read_text()
    images = sorted((synthetic_set / "test").glob("*.tif"))[:2]
    run("predict", "--model", "b", "--input", str(images[0]), "--out", "p.csv", "--explain", "e", str(images[1]))
    assert sorted(file.name for file in Path("e").iterdir()) == sorted(
        [*(f"{i.stem}.png" for i in images), "explanations.csv"]
    )
    assert "tumour" in Path("e/explanations.csv").read_text()


@pytest.mark.parametrize(
    ("sets", "fault"),
    [
        (["cnn_deep", "crop_size=32"], "crop_size"),
        (["unet_timm", "tile_size=40"], "tile_size must be a multiple of 16"),
        (["unet_timm", "tile_size=512"], "tile_size must be at most the images' side of 96"),
        (["keras_cnn_1", "head=mlp"], "head"),
        (["default", "stages=[{share: 0.5, lr: 0.1}]"], "shares must sum to 1"),
    ],
)
def test_a_recipe_that_cannot_run_says_so_before_training(
    sets: list[str], fault: str, synthetic_set: Path, in_tmp: Path
) -> None:
    name, *changes = sets
    options = [part for text in changes for part in ("--set", text)]
    result = CliRunner().invoke(
        app, ["train", name, "--data", str(synthetic_set), "--out", "b", "--weights", "none", *options]
    )
    assert result.exit_code != 0
    assert fault in str(result.exception)
    assert not Path("b").exists()


def test_a_dense_task_without_masks_is_refused(easy_pack: Path, in_tmp: Path) -> None:
    assert open_store(easy_pack).masks is None
    result = CliRunner().invoke(
        app, ["train", "unet_timm", "--data", str(easy_pack), "--out", "b", "--weights", "none"]
    )
    assert "recipe.task is dense, but the data have no masks" in str(result.exception)


def test_tables_in_a_pipe_keep_whole_words(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.table(
        "t", ("backbone", *(f"a column of many words {n}" for n in range(5))), [("mobilenetv2_100", *"12345")]
    )
    text = capsys.readouterr().out
    assert "mobilenetv2_100" in text
    assert "a column of many words 4" in text
