"""The recorder of rung results and the bench of short trainings, on a tiny set."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.search import short
from benchmarks.search.branch import compare
from benchmarks.search.record import check_same, draw_recipe, figures_of, record, set_up
from benchmarks.search.rung_table import RungTable
from pcam_automl.errors import InputError
from pcam_automl.metrics import auc
from pcam_automl.scores import Scores

SPACE = """\
base: {crop_size: 32}
parameters:
  backbone: {choice: [test_resnet, keras_cnn_1]}
  lr: {float: [1.0e-4, 1.0e-2], log: true}
"""


def test_table_holds_every_rung_of_every_recipe_and_goes_on_where_it_ended(easy_pack: Path, tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(SPACE)
    setup = set_up(easy_pack, str(tmp_path / "space.yaml"), [32, 96], 20, 0, tmp_path)
    table, cpu = tmp_path / "rungs.csv", torch.device("cpu")
    assert record(setup, table, n=1, minutes=5, device=cpu) == 1
    first = table.read_text()
    assert record(setup, table, n=2, minutes=0, device=cpu) == 1  # no time is left
    assert table.read_text() == first
    assert record(setup, table, n=2, minutes=5, device=cpu) == 2
    assert table.read_text().startswith(first)
    lines = list(csv.DictReader(table.read_text().splitlines()))
    assert [(line["recipe"], line["rung"], line["views"]) for line in lines] == [
        (recipe, rung, views) for recipe in "01" for rung, views in (("0", "32"), ("1", "96"))
    ]
    assert all(0.0 <= float(line["auc"]) <= 1.0 and float(line["seconds"]) > 0.0 for line in lines)
    for index in (0, 1):
        recipe, params = draw_recipe(setup, index)
        assert float(lines[2 * index]["lr"]) == params["lr"] == recipe.lr
        assert int(lines[2 * index]["seed"]) == recipe.seed


def test_figures_are_of_the_validation_rows_and_of_the_others() -> None:
    rng = np.random.default_rng(0)
    label, prob = np.arange(40) % 2, rng.uniform(size=40)
    scores = Scores(np.arange(40), label.astype(np.int64), prob, on="both")
    found = figures_of(scores, valid=np.arange(25))
    assert found["auc"] == pytest.approx(auc(label[:25], prob[:25]), abs=1e-5)
    assert found["test_auc"] == pytest.approx(auc(label[25:], prob[25:]), abs=1e-5)


def test_table_made_with_other_settings_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rungs.json"
    check_same(file, {"seed": 1, "rungs": [[1, 1]]})
    check_same(file, json.loads(file.read_text()))
    with pytest.raises(InputError, match=r"made otherwise \(seed: 1 there, 2 now\)"):
        check_same(file, {"seed": 2, "rungs": [[1, 1]]})


def test_a_short_training_is_a_line_and_the_table_puts_folds_side_by_side(
    easy_raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(short, "data_folder", lambda name: easy_raw)
    monkeypatch.setenv("PCAM_BENCH_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "short.jsonl"
    assert short.main(["--table", "--results", str(file)]) == 2
    options = ["--views", "320", "--results", str(file)]
    options += ["--set", "backbone=test_resnet", "--set", "crop_size=32", "--set", "batch_size=16"]
    for fold in ("0", "3"):
        assert short.main(["--data", "easy", "--fold", fold, *options]) == 0
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["fold"] for line in lines] == [0, 3]
    assert all(line["auc"] > 0.7 for line in lines), "twenty steps of an easy set"
    assert lines[0]["auc"] != lines[1]["auc"] or lines[0]["log_loss"] != lines[1]["log_loss"]
    capsys.readouterr()
    assert short.main(["--table", "--results", str(file)]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["data", "weights", "views", "set"]
    assert "backbone=test_resnet, batch_size=16, crop_size=32" in row
    assert f"3: {1 - lines[1]['auc']:.4f}" in row
    again = lines[0] | {"set": dict(reversed(lines[0]["set"].items()))}
    assert len(short.table([*lines, again])) == 2, "the same settings in another order"
    assert len(short.table([*lines, again | {"date": "2020-01-01"}])) == 3, "other code's"
    assert short.main(["--set", "crop_size=7", "--results", str(file)]) == 2
    monkeypatch.setenv("PCAM_WEIGHTS_DIR", str(tmp_path))
    assert short.main(["--weights", "given", "--results", str(file)]) == 2  # no weights there


def test_of_two_ways_to_score_a_rung_the_one_that_orders_like_finished_trainings_is_told() -> None:
    rng = np.random.default_rng(0)
    quality = rng.uniform(0.5, 1.0, 60)

    def table(noise: float, seconds: float) -> RungTable:
        values = np.stack([quality + rng.normal(0.0, noise, 60), quality], axis=1)
        return RungTable(
            ({},) * 60, (100, 300), values, np.stack([values[:, 0], quality], axis=1), np.full((60, 2), seconds)
        )

    first, last = compare(table(0.02, 2.0), table(0.2, 1.0))
    assert first["branch"]["tau"] > 0.8 > first["average"]["tau"]
    low, high = first["tau_gained_95"]
    assert 0.0 < low < first["tau_gained"] < high
    assert (first["branch"]["seconds"], first["average"]["seconds"]) == (2.0, 1.0)
    assert (last["branch"]["tau"], last["tau_gained"], last["branch_better"]) == (1.0, 0.0, 0.0)
