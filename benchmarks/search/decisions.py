"""Which of the search's decisions earn their place: many short searches on the recorded table, each on the same simulated seconds.

    python -m benchmarks.search.decisions                # rungs.csv; writes results/search_decisions.json
    python -m benchmarks.search.decisions --seeds 4      # a first look
    python -m benchmarks.search.decisions --systems gp   # the default beside it; left out above, it takes some minutes

A cell is (system, budget, seed): one worker searches until the budget's seconds are spent, with the package's own sampler, pruner,
audit and thaw rule, and hands over the fully trained recipe with the best validation AUC; what counts is its AUC on held-out
slides. Budgets are in whole trainings: the table's mean seconds of a recipe through all rungs. Rungs are those of a search, 1/9,
1/3 and all of the views, where a system does not say another first one. A proposal stands for the nearest recipe of the table
that this search has not had, and the sampler is told that recipe's parameters; `random` draws the same way. (A recipe that came
again and again would tie with itself at every rung, and equals go on.) A line is marked where searches began more than half of
the recipes: there they choose from what is left. Everything but the decisions is equal: values and seconds are those that were
recorded. Whether a rung still fits is judged by its recorded seconds, where a search estimates them. What a search does before
and after (known-good start, probe, confirmation, final training) is not in it.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import optuna
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from benchmarks.search.rung_table import RungTable, nearest, read_table
from pcam_automl.errors import InputError
from pcam_automl.files import write_json
from pcam_automl.search.audit import AUDIT_EVERY, audit_trials, misleading_steps
from pcam_automl.search.cost import SecondsOf
from pcam_automl.search.lineages import DIVERGED, LINEAGE, THAWED_FROM, Lineage, lineages_of
from pcam_automl.search.promotion import by_promise, paused_of, promotable
from pcam_automl.search.pruner import SuccessiveHalving, build_pruner
from pcam_automl.search.sampler import build_sampler
from pcam_automl.search.space import SearchSpace, load_space
from pcam_automl.terminal import Bars

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"
BUDGETS = (5.0, 15.0, 30.0)
SEEDS = 24


@dataclass(frozen=True)
class System:
    """A search's decisions.

    Attributes:
        title: for the table.
        sampler: who proposes.
        pruner: who ends a row at a rung.
        thaws: whether paused lineages go on.
        cost_aware: whether proposals are judged by improvement per second.
        first_rung: of the table's rungs the first that is scored; the views before it are trained all the same.
        heeds_audit: whether nothing ends at rungs whose order misleads, looked at every ten rows.
    """

    title: str
    sampler: str = "tpe"
    pruner: str = "asha"
    thaws: bool = True
    cost_aware: bool = False
    first_rung: int = 1
    heeds_audit: bool = True


SYSTEMS = {
    "ours": System("TPE, rungs, thaw (default)"),
    "random": System("random, no rungs", sampler="random", pruner="none", thaws=False),
    "tpe-without-rungs": System("TPE, no rungs", pruner="none", thaws=False),
    "asha-without-thaw": System("TPE, rungs, no thaw", thaws=False),
    "random-with-rungs": System("random, rungs, thaw", sampler="random"),
    "cost-aware": System("TPE by improvement a second, rungs, thaw", cost_aware=True),
    "median": System("TPE, median rule, thaw", pruner="median"),
    "hyperband": System("TPE, Hyperband, thaw", pruner="hyperband"),
    "gp": System("GP, rungs, thaw", sampler="gp"),
    "without-audit": System("TPE, rungs, thaw, audit not heeded", heeds_audit=False),
    "four-rungs": System("TPE, rungs from 1/27, thaw", first_rung=0),
    "two-rungs": System("TPE, rungs from 1/3, thaw", first_rung=2),
    "tpe-qmc": System("Sobol start, TPE, rungs, thaw", sampler="tpe-qmc"),
    "qmc": System("Sobol throughout, rungs, thaw", sampler="qmc"),
    "cmaes": System("CMA-ES, rungs, thaw", sampler="cmaes"),
}


SLOW_OR_NEEDY = ("gp", "cmaes")
"""Left out unless named: a GP takes minutes more, CMA-ES the package cmaes."""


@dataclass(frozen=True)
class Outcome:
    """What a search handed over.

    Attributes:
        valid, tested: AUC of the recipe on the validation fold and on held-out slides; None where none was trained fully.
        n_lineages: recipes that were begun.
        n_complete: of them trained through all rungs.
        n_thawed: times that a paused one went on.
        spent_s: simulated.
    """

    valid: float | None
    tested: float | None
    n_lineages: int
    n_complete: int
    n_thawed: int
    spent_s: float


class OneWorker:
    """A search on the table; its turns are those of ``search/turns.py`` with a budget.

    Args:
        table: values and seconds.
        space: of its recipes.
        system: the decisions.
        seed: of the sampler.
        until_s: the budget.
    """

    def __init__(self, table: RungTable, space: SearchSpace, system: System, seed: int, until_s: float) -> None:
        self.table, self.space, self.system, self.until_s = from_rung(table, system.first_rung), space, system, until_s
        table = self.table
        seconds_of = seconds_by_network(table) if system.cost_aware else None
        self.sampler = build_sampler(system.sampler, seed, seconds_of=seconds_of)
        self.study = optuna.create_study(
            study_name=f"decisions {seed}",  # Hyperband draws its brackets from the name
            direction="maximize",
            sampler=self.sampler,
            pruner=build_pruner(system.pruner, rungs=table.steps, pauses=system.thaws),
        )
        any_trial = optuna.create_study().ask()
        for parameter in space.parameters.values():
            parameter.suggest(any_trial)
        self.distributions = any_trial.distributions
        self.whole_s = float(table.seconds.sum(axis=1).mean())
        self.now, self.n_thawed = 0.0, 0
        self.begun: set[int] = set()  # recipes
        self.finished: list[int] = []  # those that were fully trained

    def run(self) -> Outcome:
        """Until nothing more fits."""
        while self._turn():
            pass
        values, tested = self.table.values[:, -1], self.table.tested[:, -1]
        best = max(self.finished, key=lambda recipe: float(values[recipe]), default=None)
        return Outcome(
            None if best is None else float(values[best]),
            None if best is None else float(tested[best]),
            len(self.begun),
            len(self.finished),
            self.n_thawed,
            self.now,
        )

    def _heed_audit(self, rows: list[FrozenTrial]) -> None:
        pruner = self.study.pruner
        if self.system.heeds_audit and isinstance(pruner, SuccessiveHalving) and rows and len(rows) % AUDIT_EVERY == 0:
            pruner.misleading = misleading_steps(audit_trials(rows, pruner.rungs))

    def _turn(self) -> bool:
        steps = self.table.steps
        rows = self.study.get_trials(deepcopy=False)
        self._heed_audit(rows)
        lineages = lineages_of(rows)
        fitting = []
        if self.system.thaws:
            waiting = paused_of(lineages, steps)
            fitting = [one for one in waiting if self._fits(one.lineage.attr("recipe"), one.rung + 1)]
        if promoted := promotable(fitting, lineages, steps):
            self._go_on(promoted[0].lineage, promoted[0].rung + 1)
        elif self.now + self.whole_s <= self.until_s and len(self.begun) < len(self.table):
            self._begin()
        elif fitting:
            best = by_promise(fitting)[0]
            self._go_on(best.lineage, best.rung + 1)
        else:
            return False
        return True

    def _fits(self, recipe: int, rung: int) -> bool:
        return self.now + float(self.table.seconds[recipe, rung]) <= self.until_s

    def _ask(self, params: Mapping[str, Any]) -> Trial:
        self.sampler.prescribed = dict(params)
        self.sampler.budget_left = max(0.0, 1 - self.now / self.until_s)
        trial = self.study.ask()
        fields = dict(self.space.base)
        for parameter in self.space.parameters.values():
            if parameter.active(fields):
                fields[parameter.name] = parameter.suggest(trial)
        return trial

    def _begin(self) -> None:
        trial = self._ask({})
        recipe = nearest(self.table, self.space, trial.params, without=self.begun)
        self._stands_for(trial, self.table.params[recipe])
        number = len(self.begun)
        self.begun.add(recipe)
        for name, value in ((LINEAGE, str(number)), ("slot", number), ("recipe", recipe)):
            trial.set_user_attr(name, value)
        self._train(trial, recipe, 0)

    def _stands_for(self, trial: Trial, params: Mapping[str, Any]) -> None:
        """Make the row one of these parameters: what a sampler learns from is what was trained."""
        assert isinstance(self.study._storage, InMemoryStorage)
        row = self.study._storage._get_trial(trial._trial_id)
        row.params = dict(params)
        row.distributions = {name: self.distributions[name] for name in params}

    def _go_on(self, lineage: Lineage, rung: int) -> None:
        self.n_thawed += 1
        trial = self._ask(lineage.last.params)
        for name, value in {**lineage.last.user_attrs, THAWED_FROM: lineage.last.number}.items():
            trial.set_user_attr(name, value)
        for step, value in lineage.values.items():
            trial.report(value, step)
        self._train(trial, lineage.attr("recipe"), rung)

    def _train(self, trial: Trial, recipe: int, rung: int) -> None:
        """From that rung on, until it is done, pruned, has diverged, or the next rung would not end in time."""
        values, last = self.table.values[recipe], len(self.table.steps) - 1
        while self._fits(recipe, rung):
            self.now += float(self.table.seconds[recipe, rung])
            if np.isnan(values[rung]):
                trial.set_user_attr("reason", DIVERGED)
                break
            trial.report(float(values[rung]), self.table.steps[rung])
            if rung == last:
                self.finished.append(recipe)
                self.study.tell(trial, float(values[rung]))
                return
            if trial.should_prune():
                break
            rung += 1
        self.study.tell(trial, state=TrialState.PRUNED)


def from_rung(table: RungTable, first: int) -> RungTable:
    """The table without its first rungs' scores; their seconds, scoring included, are of the first one that is left."""
    seconds = np.column_stack([table.seconds[:, : first + 1].sum(axis=1), table.seconds[:, first + 1 :]])
    return replace(
        table,
        steps=table.steps[first:],
        values=table.values[:, first:],
        tested=table.tested[:, first:],
        seconds=seconds,
    )


def seconds_by_network(table: RungTable) -> SecondsOf:
    """Mean seconds of a whole training by network and crop, as the plan's speed table knows them before the first trial.

    Where the sampler names neither (it asks for a group of parameters that are searched together), the mean over all.
    """

    @functools.cache
    def mean(backbone: Any, crop_size: Any) -> float:
        alike = [
            seconds
            for params, seconds in zip(table.params, table.seconds.sum(axis=1), strict=True)
            if backbone in (None, params["backbone"]) and crop_size in (None, params["crop_size"])
        ]
        return statistics.fmean(alike)

    return lambda params: mean(params.get("backbone"), params.get("crop_size"))


def difference(ours: Sequence[float], others: Sequence[float], *, seed: int = 0) -> tuple[float, float, float]:
    """Mean of ours less mean of the others', and its 95 % interval by bootstrap over the seeds."""
    rng = np.random.default_rng(seed)
    a, b = np.asarray(ours), np.asarray(others)
    drawn = rng.choice(a, (4000, len(a))).mean(axis=1) - rng.choice(b, (4000, len(b))).mean(axis=1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(a.mean() - b.mean()), float(low), float(high)


def verdict(low: float, high: float) -> str:
    """What the interval of ours less the other's says."""
    return "ours is better" if low > 0 else "the other is better" if high < 0 else "no difference shown"


def compare(
    table: RungTable, space: SearchSpace, names: Sequence[str], n_seeds: int, n_jobs: int = 1
) -> list[dict[str, Any]]:
    """Every cell."""
    whole_s = float(table.seconds.sum(axis=1).mean())

    def cell(budget: float, name: str, seed: int) -> dict[str, Any]:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        found = OneWorker(table, space, SYSTEMS[name], seed, budget * whole_s).run()
        return {"system": name, "budget": budget, "seed": seed, **asdict(found)}

    asked = list(itertools.product(sorted(BUDGETS, reverse=True), names, range(n_seeds)))  # the longest first
    found = joblib.Parallel(n_jobs=n_jobs, return_as="generator")(joblib.delayed(cell)(*one) for one in asked)
    with Bars() as bars:
        bar = bars.add("searches", len(asked))
        cells = []
        for one in found:
            cells.append(one)
            bars.set(bar, done=len(cells))
    return sorted(cells, key=lambda one: (one["budget"], names.index(one["system"]), one["seed"]))


def summarise(cells: Sequence[dict[str, Any]], n_recipes: int) -> list[dict[str, Any]]:
    """A line for each system and budget; a search that handed nothing over counts with an AUC of 0.5."""
    lines = []
    for budget in dict.fromkeys(cell["budget"] for cell in cells):
        of = {name: [c for c in cells if (c["system"], c["budget"]) == (name, budget)] for name in SYSTEMS}
        tested = {name: [0.5 if c["tested"] is None else c["tested"] for c in own] for name, own in of.items() if own}
        for name, values in tested.items():
            gain, low, high = difference(tested["ours"], values)
            own = of[name]
            lines.append(
                {
                    "budget": budget,
                    "system": name,
                    "mean_tested": statistics.fmean(values),
                    "median_tested": statistics.median(values),
                    "n_lineages": statistics.median(c["n_lineages"] for c in own),
                    "n_complete": statistics.median(c["n_complete"] for c in own),
                    "n_thawed": statistics.median(c["n_thawed"] for c in own),
                    "share_of_table": statistics.median(c["n_lineages"] for c in own) / n_recipes,
                    "ours_better_by": gain,
                    "interval": [low, high],
                    "verdict": "" if name == "ours" else verdict(low, high),
                }
            )
    return lines


def show(lines: Sequence[dict[str, Any]]) -> None:
    """The table."""
    print(f"{'budget':>6} {'system':<42}{'test AUC':>9}{'begun':>7}{'whole':>7}{'thawed':>7}   ours better by (95 %)")
    for line in lines:
        low, high = line["interval"]
        gain = (
            ""
            if line["system"] == "ours"
            else f"{line['ours_better_by']:+.4f} ({low:+.4f} to {high:+.4f})  {line['verdict']}"
        )
        print(
            f"{line['budget']:>6g} {SYSTEMS[line['system']].title:<42}{line['mean_tested']:>9.4f}{line['n_lineages']:>7.0f}"
            f"{line['n_complete']:>7.0f}{line['n_thawed']:>7.0f}   {gain}{' (half of the table begun)' * (line['share_of_table'] > 0.5)}"
        )


def main() -> None:
    """Search, print, write JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.search.decisions", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--table", type=Path, default=HERE / "rungs.csv")
    parser.add_argument("--space", default=str(HERE / "cheap.yaml"))
    parser.add_argument(
        "--systems", nargs="*", default=[name for name in SYSTEMS if name not in SLOW_OR_NEEDY], choices=list(SYSTEMS)
    )
    parser.add_argument("--jobs", type=int, default=joblib.cpu_count(), help="processes")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--out", type=Path, default=RESULTS / "search_decisions.json")
    asked = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space = load_space(asked.space)
    table = read_table(asked.table, space)
    names = list(dict.fromkeys(["ours", *asked.systems]))
    cells = compare(table, space, names, asked.seeds, asked.jobs)
    lines = summarise(cells, len(table))
    show(lines)
    about = {"n_recipes": len(table), "steps": list(table.steps), "whole_s": float(table.seconds.sum(axis=1).mean())}
    about |= {"best_valid": table.best, "its_tested": float(table.tested[int(np.nanargmax(table.values[:, -1])), -1])}
    write_json(asked.out, {"table": about, "seeds": asked.seeds, "summary": lines, "cells": cells})


if __name__ == "__main__":
    try:
        main()
    except InputError as fault:
        sys.exit(str(fault))
