"""The simulation against slow references on planted tables."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.pruners import BasePruner
from optuna.trial import TrialState

from benchmarks.search import simulate as simulate_module
from benchmarks.search.record import append, recorded
from benchmarks.search.rung_table import RungTable, nearest, planted, read_table
from benchmarks.search.simulation import CAN_THAW, Job, Rows, Run, Sampled, simulate
from benchmarks.search.simulation_figures import draw_regret, draw_speed_up
from pcam_automl.errors import DataError, InputError
from pcam_automl.search.pruner import build_pruner
from pcam_automl.search.sampler import build_sampler
from pcam_automl.search.space import load_space, parse_space

STEPS = (100, 300, 900)
QUALITIES = np.random.default_rng(5).uniform(0.5, 0.95, 40)
TABLE = planted(QUALITIES, STEPS, noise=(0.05, 0.02, 0.005), seed=1)


class Noted(Rows):
    """Rows that note which rungs were run."""

    def report(self, job: Job, value: float) -> bool:
        self.run = [*getattr(self, "run", []), (job.recipe, job.rung)]
        return super().report(job, value)


def run(pruner: str, n_workers: int, n_trials: int, *, seed: int = 0, thaws: bool = False) -> tuple[Run, Noted]:
    rows = Noted(TABLE, build_pruner(pruner, rungs=STEPS), np.random.default_rng(seed), thaws)
    return simulate(TABLE, rows, n_workers=n_workers, n_trials=n_trials), rows


@pytest.mark.parametrize("pruner", ["asha", "none"])
def test_one_worker_decides_as_a_plain_optuna_study_does(pruner: str) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rng = np.random.default_rng(0)
    study = optuna.create_study(direction="maximize", pruner=build_pruner(pruner, rungs=STEPS))
    seconds: list[float] = []

    def objective(trial: optuna.Trial) -> float:
        recipe = int(rng.integers(len(TABLE)))
        trial.set_user_attr("lineage", f"{trial.number}")
        for rung, step in enumerate(STEPS):
            seconds.append(float(TABLE.seconds[recipe, rung]))
            trial.report(float(TABLE.values[recipe, rung]), step)
            if rung < 2 and trial.should_prune():
                raise optuna.TrialPruned
        return float(TABLE.values[recipe, -1])

    study.optimize(objective, n_trials=30)
    found, rows = run(pruner, 1, 30)
    assert [row.state for row in rows.rows] == [trial.state for trial in study.trials]
    assert [row.intermediate_values for row in rows.rows] == [trial.intermediate_values for trial in study.trials]
    assert found.wall_s == pytest.approx(sum(seconds))
    assert TABLE.values[found.best[-1][1], -1] == study.best_value


@pytest.mark.parametrize("n_workers", [1, 3, 16, 64])
@pytest.mark.parametrize("pruner", ["asha", "none"])
def test_busy_time_is_that_of_the_rungs_that_were_run_and_fits_into_the_workers(pruner: str, n_workers: int) -> None:
    found, rows = run(pruner, n_workers, 50)
    assert found.busy_s == pytest.approx(sum(TABLE.seconds[recipe, rung] for recipe, rung in rows.run))
    assert found.busy_s <= n_workers * found.wall_s + 1e-9
    assert found.wall_s >= max(TABLE.seconds[row.user_attrs["recipe"], 0] for row in rows.rows)
    assert found.wall_s >= found.longest_s
    assert found.n_trials == len(rows.rows) == 50
    assert found.n_complete == sum(row.state == TrialState.COMPLETE for row in rows.rows)


@pytest.mark.parametrize("seed", range(5))
def test_more_workers_never_finish_a_fixed_set_later(seed: int) -> None:
    """Without pruning the work is the same; with it, workers that decide on fewer values may do more of it."""
    walls = [run("none", n_workers, 60, seed=seed)[0].wall_s for n_workers in (1, 2, 3, 5, 8, 13, 60, 61)]
    assert walls == sorted(walls, reverse=True)
    assert walls[-1] == walls[-2] == run("none", 60, 60, seed=seed)[0].longest_s


def test_pruning_saves_most_of_the_work_and_finds_a_good_recipe() -> None:
    pruned, whole = run("asha", 4, 200)[0], run("none", 4, 200)[0]
    assert pruned.busy_s < 0.5 * whole.busy_s
    assert TABLE.best - TABLE.values[pruned.best[-1][1], -1] < 0.05
    assert pruned.seconds_to(TABLE.best - 0.05, TABLE) < whole.seconds_to(TABLE.best - 0.05, TABLE)


def test_best_recipe_by_then_and_first_time_agree_with_each_other() -> None:
    found = run("none", 4, 100)[0]
    when, recipe = found.best[-1]
    assert found.recipe_at(when) == recipe
    assert found.recipe_at(0.0) is None
    assert found.seconds_to(TABLE.values[recipe, -1], TABLE) == when
    assert found.seconds_to(2.0, TABLE) == math.inf


@pytest.mark.skipif(not CAN_THAW, reason="pcam_automl.search.promotion is not there")
def test_thawed_lineage_goes_on_from_its_rung_and_none_is_run_twice() -> None:
    found, rows = run("asha", 1, 60, thaws=True)
    assert found.n_thawed == len(rows.rows) - 60 > 0
    thawed = [row for row in rows.rows if "thawed_from" in row.user_attrs]
    assert len(thawed) == found.n_thawed
    assert all(row.user_attrs["thawed_from"] < row.number for row in thawed)
    done = [(row.user_attrs["lineage"], step) for row in rows.rows for step in row.intermediate_values]
    assert len(rows.run) == len(set(done))  # a thawed row repeats the earlier values and runs only what is new


def test_sampler_proposes_and_learns_the_nearest_recipes() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space = parse_space("parameters: {lr: {float: [1.0e-4, 1.0e-2], log: true}}", "test")
    rates = np.logspace(-4, -2, 40)
    values = 0.9 - 0.1 * np.abs(np.log10(rates) + 3)[:, None] * np.ones(3)
    table = RungTable(tuple({"lr": rate} for rate in rates), STEPS, values, values, TABLE.seconds)
    pruner: BasePruner = build_pruner("asha", rungs=STEPS)
    study = optuna.create_study(direction="maximize", sampler=build_sampler("tpe", 1), pruner=pruner)
    simulate(table, Sampled(table, space, study, {}), n_workers=3, n_trials=30)
    late = [abs(math.log10(trial.params["lr"]) + 3) for trial in study.trials[-10:]]
    assert np.median(late) < 0.3  # of a uniform draw 0.5
    assert all(trial.state.is_finished() for trial in study.trials)


def test_nearest_measures_ranges_and_choices() -> None:
    text = "parameters: {lr: {float: [1.0e-4, 1.0e-2], log: true}, optimizer: {choice: [adamw, sgd]}}"
    space = parse_space(text, "test")
    params = ({"lr": 1e-4, "optimizer": "sgd"}, {"lr": 1e-3, "optimizer": "adamw"}, {"lr": 9e-3, "optimizer": "sgd"})
    table = RungTable(params, STEPS, TABLE.values[:3], TABLE.values[:3], TABLE.seconds[:3])
    for index, one in enumerate(params):
        assert nearest(table, space, one) == index
    assert nearest(table, space, {"lr": 2.5e-3, "optimizer": "sgd"}) == 2
    assert nearest(table, space, {"lr": 2.5e-3, "optimizer": "adamw"}) == 1


@pytest.mark.parametrize("policy", ["none", "median", "tpe-qmc+asha", "random+hyperband"])
def test_policies_run_and_equal_seeds_draw_equal_recipes(policy: str) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space = parse_space("parameters: {lr: {float: [1.0e-4, 1.0e-2], log: true}}", "test")
    table = replace(TABLE, params=tuple({"lr": rate} for rate in np.logspace(-4, -2, 40)))
    runs = [simulate(table, simulate_module.books(policy, table, space, 3), n_workers=1, n_trials=12) for _ in range(2)]
    assert runs[0] == runs[1]
    assert runs[0].n_trials == 12
    if policy != "random+hyperband":  # its brackets may keep all of so few
        assert (runs[0].n_complete == 12) == (policy == "none")


def test_unknown_policies_are_refused() -> None:
    with pytest.raises(InputError, match=r"policy must be none, asha, .* or SAMPLER\+PRUNER, got 'ashes'"):
        simulate_module.books("ashes", TABLE, parse_space("parameters: {lr: {float: [0.1, 1.0]}}", "test"), 0)


def test_summary_says_where_the_speed_up_bends_and_what_it_is_made_of(tmp_path: Path) -> None:
    space = parse_space("parameters: {lr: {float: [0.1, 1.0]}}", "test")
    cells = []
    for policy in ("asha", "none"):
        for n_workers in (1, 4, 64):
            for seed in range(3):
                book = simulate_module.books(policy, TABLE, space, seed)
                found = simulate(TABLE, book, n_workers=n_workers, n_trials=50)
                cells.append(simulate_module.cell_of(policy, 50, seed, found, TABLE, at_s=100.0))
    lines = simulate_module.summarise(cells)
    for line in lines:
        if line["n_workers"] == 1:
            assert (line["speed_up"], line["busy_share"], line["work"]) == (1.0, pytest.approx(1.0), 1.0)
    (of_all,) = [line for line in lines if (line["policy"], line["n_workers"]) == ("none", 64)]
    assert of_all["work"] == pytest.approx(1.0)
    assert of_all["speed_up"] == pytest.approx(of_all["limit"])  # more workers than trials: the longest decides
    assert of_all["speed_up"] == pytest.approx(64 * of_all["busy_share"])
    said = simulate_module.bends(lines)
    assert len(said) == 2
    assert said[0].startswith("asha, 50 trials: bends at ")
    for draw, given in ((draw_speed_up, (lines,)), (draw_regret, (lines, cells))):
        draw(*given, tmp_path / "figure.png")
        assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_recorded_table_is_read_back_and_grows_by_whole_recipes(tmp_path: Path) -> None:
    columns = ["recipe", "seed", "lr", "optimizer", "beta1"]
    columns += ["rung", "views", "subset", "auc", "loss", "test_auc", "seconds"]
    space = parse_space(
        "parameters: {lr: {float: [1.0e-4, 1.0e-2]}, optimizer: {choice: [adamw, sgd]},"
        " beta1: {float: [0.8, 0.98], when: {optimizer: [sgd]}}}",
        "test",
    )
    file = tmp_path / "rungs.csv"
    assert recorded(file, columns) == set()
    for recipe in (1, 0):
        own = {"recipe": recipe, "seed": 3, "lr": 1e-3, "optimizer": ("adamw", "sgd")[recipe]}
        own |= {"beta1": 0.9} if recipe else {}
        figures = [{"auc": 0.7, "loss": 0.5, "test_auc": 0.6}, {}]  # the second rung diverged
        lines = [
            own | figures[rung] | {"rung": rung, "views": 10**rung, "subset": 1, "seconds": 2.5} for rung in (0, 1)
        ]
        append(file, columns, lines)
    assert recorded(file, columns) == {0, 1}
    table = read_table(file, space)
    assert table.params == ({"lr": 1e-3, "optimizer": "adamw"}, {"lr": 1e-3, "optimizer": "sgd", "beta1": 0.9})
    assert (table.steps, table.values[0, 0], table.seconds[1, 1]) == ((1, 10), 0.7, 2.5)
    assert np.isnan(table.values[:, 1]).all()
    with pytest.raises(InputError, match="has the columns"):
        recorded(file, columns[1:])
    file.write_text(file.read_text().rsplit("\n", 2)[0])  # cut off
    with pytest.raises(DataError, match="is no table of rung results"):
        read_table(file, space)


def test_committed_table_belongs_to_its_space() -> None:
    here = Path(__file__).parents[1] / "benchmarks" / "search"
    table = read_table(here / "rungs.csv", load_space(str(here / "cheap.yaml")))
    assert len(table) >= 12
    assert np.nanmin(table.values) >= 0.0
    assert np.nanmax(table.values) <= 1.0
    assert (table.seconds >= 0).all()
