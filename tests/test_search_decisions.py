"""Searches on a planted table: budgets hold, no recipe comes twice, a thaw trains only what is new, a planted winner is found."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from benchmarks.search import decisions
from benchmarks.search.decisions import SYSTEMS, OneWorker, difference, summarise, verdict
from benchmarks.search.rung_table import RungTable, planted
from pcam_automl.search.lineages import lineages_of
from pcam_automl.search.space import parse_space

SPACE = parse_space(
    "parameters: {lr: {float: [1.0e-4, 1.0e-2], log: true}, backbone: {choice: [a, b]}, crop_size: {int: [32, 48], step: 16},"
    " optimizer: {choice: [adamw, sgd]}, beta1: {float: [0.8, 0.98], when: {optimizer: [sgd]}}}",
    "test",
)
STEPS = (100, 300, 900, 2700)


def table_of(n: int = 60, noise: tuple[float, ...] = (0.06, 0.03, 0.01, 0.003)) -> RungTable:
    """Rates near 1e-3 are good, and network b better than a."""
    rng = np.random.default_rng(2)
    rates, networks = 10 ** rng.uniform(-4, -2, n), rng.choice(["a", "b"], n)
    params = tuple(
        {"lr": float(rate), "backbone": str(network), "crop_size": int(crop), "optimizer": "adamw"}
        | ({"optimizer": "sgd", "beta1": float(beta1)} if beta1 > 0.9 else {})
        for rate, network, crop, beta1 in zip(
            rates, networks, rng.choice([32, 48], n), rng.uniform(0.8, 0.98, n), strict=True
        )
    )
    return replace(
        planted(0.9 - 0.1 * np.abs(np.log10(rates) + 3) + 0.03 * (networks == "b"), STEPS, noise, 1), params=params
    )


class Noted(OneWorker):
    """Notes each rung that is trained."""

    def _train(self, trial: optuna.Trial, recipe: int, rung: int) -> None:
        before = self.now
        super()._train(trial, recipe, rung)
        done = 0.0
        while rung < len(self.table.steps) and done < self.now - before - 1e-9:
            done += float(self.table.seconds[recipe, rung])
            self.trained = [*getattr(self, "trained", []), (recipe, rung)]
            rung += 1


@pytest.fixture(autouse=True)
def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.mark.parametrize("name", [name for name in SYSTEMS if name != "cmaes" or find_spec("cmaes")])
def test_the_budget_holds_and_no_rung_is_trained_twice(name: str) -> None:
    table = table_of()
    whole_s = float(table.seconds.sum(axis=1).mean())
    search = Noted(table, SPACE, SYSTEMS[name], 3, 6 * whole_s)
    found = search.run()
    assert found.spent_s <= 6 * whole_s
    assert found.spent_s == pytest.approx(sum(search.table.seconds[recipe, rung] for recipe, rung in search.trained))
    assert len(search.trained) == len(set(search.trained))
    rows = search.study.trials
    assert len(lineages_of(rows)) == found.n_lineages == len(search.begun)
    assert found.n_thawed == len(rows) - found.n_lineages
    if name != "median":  # which ends nothing among so few
        assert (found.n_thawed > 0) == SYSTEMS[name].thaws
    assert found.n_complete == len(set(search.finished)) == sum(row.state == TrialState.COMPLETE for row in rows)
    best = max(search.finished, key=lambda recipe: table.values[recipe, -1])
    assert (found.valid, found.tested) == (table.values[best, -1], table.tested[best, -1])
    for row in rows:  # the sampler learns of the recipe that was trained, not of its own proposal
        assert row.params == table.params[row.user_attrs["recipe"]]
        assert row.distributions.keys() == row.params.keys()


def test_rungs_begin_more_recipes_and_a_sampler_that_learns_draws_better_ones() -> None:
    table = table_of(200)
    until_s = 12 * float(table.seconds.sum(axis=1).mean())
    ran = {
        name: [OneWorker(table, SPACE, SYSTEMS[name], seed, until_s) for seed in range(4)]
        for name in ("ours", "random")
    }
    found = {name: [search.run() for search in searches] for name, searches in ran.items()}
    assert min(one.n_lineages for one in found["ours"]) > 1.5 * max(one.n_lineages for one in found["random"])
    late = {
        name: np.mean(
            [
                table.tested[row.user_attrs["recipe"], -1]
                for search in searches
                for row in search.study.trials[-12:]
                if "recipe" in row.user_attrs
            ]
        )
        for name, searches in ran.items()
    }
    assert late["ours"] > late["random"]


def test_a_training_that_diverges_is_paid_for_and_goes_no_further() -> None:
    table = table_of(12)
    values = table.values.copy()
    values[:, 1:] = np.nan
    search = OneWorker(replace(table, values=values), SPACE, SYSTEMS["ours"], 0, 1e9)
    found = search.run()
    assert (found.valid, found.tested, found.n_complete, found.n_lineages) == (None, None, 0, 12)
    assert found.spent_s == pytest.approx(table.seconds[:, :2].sum())


def test_the_interval_of_a_difference_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(200):
        gain, low, high = difference(rng.normal(0.9, 0.02, 24), rng.normal(0.89, 0.03, 24), seed=seed)
        assert low < gain < high
        held += low <= 0.01 <= high
    assert 180 <= held <= 200
    assert (verdict(0.001, 0.2), verdict(-0.2, -0.1)) == ("ours is better", "the other is better")
    assert verdict(-0.1, 0.1) == "no difference shown"


def test_the_command_writes_what_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(decisions, "BUDGETS", (3.0,))
    cells = decisions.compare(table_of(), SPACE, ["ours", "random"], 3)
    lines = summarise(cells, 60)
    decisions.show(lines)
    out = capsys.readouterr().out
    assert [line["system"] for line in lines] == ["ours", "random"]
    assert "random, no rungs" in out
    assert lines[1]["verdict"] in out
    tested = [cell["tested"] for cell in cells if cell["system"] == "random"]
    assert lines[1]["mean_tested"] == pytest.approx(np.mean([0.5 if one is None else one for one in tested]))
