"""The proofs' harness: matrices, resuming, tables, the wall clock, what the systems get to see. No system is run."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.search import __main__ as command
from benchmarks.search import cells as cells_module
from benchmarks.search import data, run, systems
from benchmarks.search.cells import MATRICES, Cell, Record, append_record, fields_of, read_records, unmeasured
from benchmarks.search.table import (
    ABSENT,
    accuracy_rows,
    calibration_rows,
    cell_text,
    error_ratio,
    latest,
    sooner_rows,
    tables,
)
from pcam_automl.data.sources import open_source
from pcam_automl.errors import DataError

KEY = ("colon96", "none", 6.0)


def record_of(system: str, auc: float | None, *, seed: int = 0, minutes: float = 6.0, **more: object) -> Record:
    cell = Cell(system, "colon96", "none", minutes, seed)
    status = "ok" if auc is not None else "failed"
    return {**fields_of(cell), "status": status, "test_auc": auc, "printed_auc": None, "late": False, **more}


def test_the_minimum_is_what_was_asked_for() -> None:
    cells = MATRICES["minimum"]
    assert len(cells) == len(set(cells)) == 4 * 2 * 3
    assert {c.system for c in cells} == {"ours", "optuna", "fastai", "raytune"}
    assert {(c.data, c.minutes) for c in cells} == {("colon96", 6.0)}
    assert {c.seed for c in cells[:8]} == {0}  # each question has a first answer before any has a second
    assert len({c.data for c in MATRICES["calibration"]}) >= 20


@pytest.mark.parametrize("cells", MATRICES.values(), ids=list(MATRICES))
def test_every_cell_names_a_system_and_a_command_that_is_parsed_back(cells: list[Cell]) -> None:
    assert len(set(cells)) == len(cells)
    for cell in cells:
        assert cell.system in systems.SYSTEMS
        args = command.build_parser().parse_args(cell.command.split()[3:])
        assert Cell(args.system, args.data, args.weights, args.minutes, args.seed) == cell


def test_a_matrix_goes_on_where_it_was_left(tmp_path: Path) -> None:
    file, cells = tmp_path / "r.jsonl", MATRICES["minimum"]
    assert unmeasured(cells, read_records(file)) == cells
    append_record({**fields_of(cells[1]), "status": "ok"}, file)
    append_record({**fields_of(cells[0]), "status": "failed"}, file)
    records = read_records(file)
    assert unmeasured(cells, records) == cells[2:]
    assert unmeasured(cells, records, retry=True) == [cells[0], *cells[2:]]


def test_a_line_that_a_kill_cut_off_costs_that_line_only(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    append_record(record_of("ours", 0.9), file)
    with file.open("a") as out:
        out.write('{"system": "opt')
    append_record(record_of("fastai", 0.8), file)
    assert [r["system"] for r in read_records(file)] == ["ours", "fastai"]


def test_a_cell_shows_median_and_range_and_what_is_missing() -> None:
    records = latest([record_of("ours", auc, seed=seed) for seed, auc in enumerate((0.97, 0.99, 0.98))])
    assert cell_text(records, KEY, "ours", 3) == "0.9800 (0.9700 to 0.9900)"
    assert cell_text(records, KEY, "ours", 4) == "0.9800 (0.9700 to 0.9900) [3 of 4 runs]"
    assert cell_text(records, KEY, "fastai", 3) == ABSENT
    failed = latest([record_of("ours", None), record_of("ours", 0.9, seed=1, late=True)])
    assert cell_text(failed, KEY, "ours", 2) == "0.9000 [1 of 2 runs, 1 failed, 1 late]"
    assert cell_text(latest([record_of("ours", None)]), KEY, "ours", 1) == "failed (1 runs)"


def test_a_good_run_stays_when_a_later_one_fails() -> None:
    assert latest([record_of("ours", 0.9), record_of("ours", None)]).popitem()[1]["test_auc"] == 0.9
    assert latest([record_of("ours", None), record_of("ours", 0.9)]).popitem()[1]["test_auc"] == 0.9
    assert latest([record_of("ours", 0.8), record_of("ours", 0.9)]).popitem()[1]["test_auc"] == 0.9


def test_errors_are_compared_with_the_best_outside_peers_only() -> None:
    found = [record_of("ours", 0.99), record_of("optuna", 0.96), record_of("fastai", 0.98), record_of("random", 0.995)]
    assert error_ratio(latest(found), KEY) == "0.50 of fastai"
    assert error_ratio(latest(found[:1]), KEY) == ABSENT


def test_time_to_the_peers_figure_names_the_least_budget_that_reaches_it() -> None:
    found = [record_of("fastai", 0.97, minutes=15.0), record_of("ours", 0.96, minutes=3.0), record_of("ours", 0.98)]
    assert sooner_rows(latest(found))[1] == [
        ["none", "0.9700 (fastai)", "6", "at least 2.5x"],
        ["given", ABSENT, ABSENT, ABSENT],
    ]
    assert sooner_rows(latest(found[:2]))[1][0] == ["none", "0.9700 (fastai)", "not reached", "-"]
    quick = record_of("ours", 0.99, minutes=3.0, machine={"cores": 2, "cpu": "x", "instructions": "AVX512, bf16"})
    assert sooner_rows(latest([found[0], quick]))[1][0] == ["none", ABSENT, ABSENT, ABSENT]


def test_calibration_counts_intervals_and_optimism() -> None:
    cells = [Cell(name, "colon96", "none", 6.0, seed) for name in ("ours", "optuna") for seed in range(3)]
    found = [
        record_of("ours", 0.95, seed=0, printed_auc=0.96, printed_95=[0.94, 0.97]),
        record_of("ours", 0.90, seed=1, printed_auc=0.96, printed_95=[0.94, 0.97]),
        record_of("optuna", 0.90, seed=0, printed_auc=0.98),
    ]
    assert calibration_rows(latest(found), cells)[1] == [
        ["pcam-automl", "2 of 3", "+0.0350 (+0.0100 to +0.0600)", "1 of 2"],
        ["plain Optuna", "1 of 3", "+0.0800 (+0.0800 to +0.0800)", "prints none"],
    ]
    assert calibration_rows({}, cells)[1][0] == ["pcam-automl", "0 of 3", ABSENT, ABSENT]


def test_all_tables_print_without_any_result_and_with_some() -> None:
    text = tables([])
    assert all(f"### {name}: 0 of {len(cells)} cells measured" in text for name, cells in MATRICES.items())
    assert ABSENT in text
    head, rows = accuracy_rows(latest([record_of("ours", 0.99)]), MATRICES["minimum"])
    assert all(len(row) == len(head) for row in rows)
    assert any("0.9900 [1 of 3 runs]" in row for row in rows)


def test_next_takes_the_first_cell_whose_system_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "why_absent", lambda name: "gone" if name == "ours" else None)
    asked: list[Cell] = []
    monkeypatch.setattr(command, "run_cell", lambda cell, results: asked.append(cell) or ok_record(cell))
    assert command.main(["next", "--cells", "2", "--results", str(tmp_path / "r.jsonl")]) == 0
    assert [cell.system for cell in asked] == ["optuna", "fastai"]
    said = capsys.readouterr()
    assert "ours: 6 cells skipped, gone" in said.err
    assert "test AUC 0.9000; 350.0 s of 360 s" in said.out


def ok_record(cell: Cell) -> Record:
    return {**fields_of(cell), "status": "ok", "test_auc": 0.9, "printed_auc": None, "late": False, "wall_s": 350.0}


def test_a_missing_data_set_is_one_line_and_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PCAM_COLON96", str(tmp_path / "nowhere"))
    file = tmp_path / "r.jsonl"
    line = ["run", "--system", "optuna", "--data", "colon96", "--weights", "none", "--minutes", "6"]
    assert command.main([*line, "--results", str(file)]) == 2
    assert "PCAM_COLON96 must name the unpacked set" in capsys.readouterr().err
    assert not file.exists()
    with pytest.raises(DataError, match="--data must be colon96"):
        data.data_folder("mnist")


def test_the_systems_see_everything_but_the_truth(easy_raw: Path, tmp_path: Path) -> None:
    seen = data.without_truth(easy_raw, tmp_path / "seen")
    assert {item.name for item in seen.iterdir()} == {item.name for item in easy_raw.iterdir()} - {"test_labels.csv"}
    assert open_source(seen).kind == open_source(easy_raw).kind  # the package reads the links as it reads the folder


def slides_by_scanner(folder: Path, part: str) -> pd.Series:
    table = pd.read_csv(folder / f"{part}_groups.csv").merge(pd.read_csv(folder / f"{part}_domains.csv"), on="id")
    return table.groupby("domain")["group"].nunique()


def test_new_slides_keep_the_mix_of_scanners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PCAM_BENCH_CACHE", str(tmp_path))
    monkeypatch.setattr(data, "N_PATCHES", 160)
    monkeypatch.setattr(data, "N_SLIDES", 16)
    folder = data.data_folder("slides:3")
    tables_of = {part: pd.read_csv(folder / f"{part}_groups.csv") for part in ("train", "test")}
    assert not set(tables_of["train"]["group"]) & set(tables_of["test"]["group"])
    n = {part: slides_by_scanner(folder, part) for part in ("train", "test")}
    for scanner in ("scanner_a", "scanner_b"):
        assert n["test"][scanner] == max(1, round(0.25 * (n["train"][scanner] + n["test"][scanner])))
    for part, table in tables_of.items():
        assert {file.stem for file in (folder / part).iterdir()} == set(table["id"])
    labels = pd.read_csv(folder / "test_labels.csv")
    assert set(pd.read_csv(folder / "sample_submission.csv")["id"]) == set(labels["id"])
    assert set(labels["label"]) == {0, 1}
    assert data.data_folder("slides:3") == folder  # made once


def test_what_is_tried_out_is_within_the_training_part(
    easy_raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PCAM_BENCH_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "colon96"
    shutil.copytree(easy_raw, source)
    labels = pd.read_csv(source / "train_labels.csv")
    labels.assign(group=[f"tile {row // 5}" for row in range(len(labels))])[["id", "group"]].to_csv(
        source / "train_groups.csv", index=False
    )
    labels.head(2).to_csv(source / "test_labels.csv", index=False)
    monkeypatch.setenv("PCAM_COLON96", str(source))
    asides: list[set[str]] = []
    for quarter in range(4):
        folder = data.data_folder(f"colon96-dev:{quarter}")
        groups = {part: set(pd.read_csv(folder / f"{part}_groups.csv")["group"]) for part in ("train", "test")}
        assert not groups["train"] & groups["test"]
        truth = pd.read_csv(folder / "test_labels.csv")
        assert {file.stem for file in (folder / "test").iterdir()} == set(truth["id"])
        asides.append(set(truth["id"]))
    assert sum(map(len, asides)) == len(labels)
    assert set.union(*asides) == set(labels["id"])
    with pytest.raises(DataError, match="colon96-dev:0 to 3"):
        data.data_folder("colon96-dev:4")


def write_predictions(file: Path, ids: list[str], probs: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame({"id": ids, "label": probs}).to_csv(file, index=False)


def test_predictions_are_scored_by_id(easy_raw: Path, tmp_path: Path) -> None:
    truth = pd.read_csv(easy_raw / "test_labels.csv")
    order = np.random.default_rng(0).permutation(len(truth))
    write_predictions(tmp_path / "p.csv", truth["id"].iloc[order].tolist(), truth["label"].to_numpy()[order] * 0.5)
    assert data.test_auc(tmp_path / "p.csv", easy_raw) == 1.0
    write_predictions(tmp_path / "q.csv", truth["id"].tolist()[1:], np.zeros(len(truth) - 1))
    with pytest.raises(DataError, match="lacks 1 of 30 test ids"):
        data.test_auc(tmp_path / "q.csv", easy_raw)


PEER = """
import json, pathlib, shutil, sys, time
out = pathlib.Path(sys.argv[1])
{body}
"""
ANSWER = """
shutil.copy(sys.argv[2], out / "predictions.csv")
(out / "said.json").write_text(json.dumps({"printed_auc": 0.75, "printed_95": None, "details": {}, "versions": {}}))
"""


@pytest.fixture
def scripted(easy_raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Cells whose system is a script: ``run`` it with some budget and get the record."""
    monkeypatch.setattr(run, "data_folder", lambda name: easy_raw)
    truth = pd.read_csv(easy_raw / "test_labels.csv")
    write_predictions(tmp_path / "answer.csv", truth["id"].tolist(), truth["label"].to_numpy(float))

    def of(body: str, seconds: float) -> Record:
        code = PEER.replace("{body}", body)

        def line(cell: Cell, seen: Path, weights: Path | None, out: Path, until: float) -> list[str]:
            return [sys.executable, "-c", code, str(out), str(tmp_path / "answer.csv")]

        monkeypatch.setattr(run, "command_of", line)
        cell = Cell("optuna", "colon96", "none", seconds / 60, 0)
        record = run.run_cell(cell, results=tmp_path / "r.jsonl")
        assert read_records(tmp_path / "r.jsonl")[-1] == json.loads(json.dumps(record))
        return record

    return of


def test_a_cell_is_run_scored_and_appended(scripted, tmp_path: Path) -> None:
    record = scripted(ANSWER, 60.0)
    assert (record["status"], record["test_auc"], record["printed_auc"], record["late"]) == ("ok", 1.0, 0.75, False)
    assert 0 < record["wall_s"] < 60
    assert record["command"].startswith("python -m benchmarks.search run --system optuna")
    assert str(tmp_path) not in json.dumps(record)


def test_a_failed_run_is_a_record_that_says_why(scripted, tmp_path: Path) -> None:
    record = scripted("print(out); raise SystemExit('no memory')", 60.0)
    assert (record["status"], record["error"]) == ("failed", "no predictions (exit code 1)")
    assert record["output"] == "OUT\nno memory\n"
    assert str(tmp_path) not in record["output"]


def test_a_run_that_does_not_end_is_ended_and_what_it_wrote_counts(scripted) -> None:
    record = scripted(ANSWER + "time.sleep(60)", 3.0)
    assert (record["status"], record["late"]) == ("ok", True)
    assert 4.5 <= record["wall_s"] < 30
    assert scripted("time.sleep(60)", 0.2)["error"] == "no predictions (it was killed)"


def test_ours_is_called_with_its_budget_and_reads_only_what_it_may(tmp_path: Path) -> None:
    line = systems.command_of(Cell("random", "colon96", "given", 6.0, 2), Path("data"), Path("weights"), tmp_path, 0.0)
    text = " ".join(line)
    assert "search --finalize --budget 360s --data data --weights weights --seed 2" in text
    assert "--sampler random --pruner none" in text
    peer = systems.command_of(Cell("fastai", "colon96", "none", 6.0, 2), Path("data"), None, tmp_path, 12.5)
    assert peer[1:5] == ["-m", "benchmarks.search.peer_fastai", "--until", "12.500"]
    assert "none" in peer


def test_a_system_whose_package_is_missing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(systems.SYSTEMS, "fastai", systems.System("x", "no_such_package_at_all"))
    assert systems.why_absent("fastai") == "no_such_package_at_all is not installed"
    monkeypatch.setenv("PCAM_PEERS_PYTHON_FASTAI", "/no/python")
    assert systems.why_absent("fastai") == "/no/python: No such file or directory"


def test_a_system_that_needs_an_option_we_lack_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systems, "_search_help", lambda: "--sampler --pruner")
    assert systems.why_absent("random") is None
    assert systems.why_absent("asha-without-thaw") == "search has no option --no-thaw"


def test_results_are_kept_beside_the_code() -> None:
    assert Path(systems.REPO) / "benchmarks" / "search" / "results.jsonl" == cells_module.RESULTS
