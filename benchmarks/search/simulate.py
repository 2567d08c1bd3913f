"""Speed-up and regret of larger searches than fit here: 1 to 256 workers and 50 to 5,000 trials, simulated on the recorded table.

    python -m benchmarks.search.simulate                 # rungs.csv; writes results/search_simulation.json and two PNGs
    python -m benchmarks.search.simulate --quick         # up to 1,000 trials, three seeds

Cells are (policy, trials, workers, seed). `none` trains every recipe through all rungs, `asha` prunes as a search does,
`asha+thaw` also takes up paused lineages that have come to belong to the best third; these draw from the table with replacement,
for equal seeds the same recipes. `tpe+asha` (with --more any SAMPLER+PRUNER) asks the package's sampler, each proposal standing
for the nearest recorded recipe. Regret is the best validation AUC of the table at the last rung less that of the best fully
trained recipe. A table of R recipes holds nothing better than its best: beyond some R trials regret ends at 0, and only times
say something. A sampler that proposes one recipe again and again draws with itself at every rung, and equals go on: with a few
dozen recipes its speed-up says little. That of `asha` bends where the longest trial alone takes as long as all the others
together, and sooner since quick networks report first and are measured against one another: more of them go on.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import optuna

from benchmarks.search.rung_table import RungTable, read_table
from benchmarks.search.simulation import CAN_THAW, Book, Rows, Run, Sampled, simulate
from benchmarks.search.simulation_figures import draw_regret, draw_speed_up
from pcam_automl.errors import InputError
from pcam_automl.files import write_json
from pcam_automl.search.pruner import build_pruner
from pcam_automl.search.sampler import SamplerName, build_sampler
from pcam_automl.search.space import SearchSpace, load_space

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"
WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
REGRETS = (0.02, 0.01, 0.005)
DRAWN = ("none", "asha", "asha+thaw", "median")
HALF = 0.5
"""The curve is said to bend where the speed-up falls below this share of the workers."""

Cell = dict[str, Any]


def books(policy: str, table: RungTable, space: SearchSpace, seed: int) -> Book:
    """Where the rows of one run are kept.

    Raises:
        InputError: an unknown policy.
    """
    sampler, _, pruner = policy.partition("+")
    if sampler in get_args(SamplerName):
        study = optuna.create_study(
            study_name=f"{policy} {seed}",  # Hyperband draws its brackets from the name
            direction="maximize",
            sampler=build_sampler(sampler, seed),
            pruner=build_pruner(pruner, rungs=table.steps),
        )
        return Sampled(table, space, study, dict(space.base))
    if policy not in DRAWN:
        raise InputError(f"policy must be {', '.join(DRAWN)} or SAMPLER+PRUNER, got {policy!r}")
    return Rows(
        table, build_pruner(sampler, rungs=table.steps), np.random.default_rng([seed, 1]), thaws=pruner == "thaw"
    )


def plan(quick: bool, more: Sequence[str] = ()) -> Iterable[tuple[str, int, int, int]]:
    """The cells: policy, trials, workers, seed. Fewer seeds where a run is long; a thaw rule looks at every lineage.

    ``more`` policies run with 50 trials on 1 and 16 workers.
    """
    few = WORKERS[::2]
    matrix: list[tuple[str, int, tuple[int, ...], int]] = [
        ("none", 50, WORKERS, 20),
        ("asha", 50, WORKERS, 20),
        ("asha", 200, WORKERS, 20),
        ("asha+thaw", 50, WORKERS, 10),
        ("asha+thaw", 200, few, 3),
        ("none", 200, WORKERS, 10),
        ("tpe+asha", 50, few, 10),
        ("tpe+asha", 200, few, 3),
        ("asha", 1000, WORKERS, 5),
        ("asha", 5000, few, 1),
        *((policy, 50, (1, 16), 10) for policy in more),
    ]
    for policy, n_trials, workers, n_seeds in matrix:
        if (quick and n_trials > 1000) or (policy.endswith("+thaw") and not CAN_THAW):
            continue
        for n_workers in workers:
            for seed in range(min(3, n_seeds) if quick else n_seeds):
                yield policy, n_trials, n_workers, seed


def cell_of(policy: str, n_trials: int, seed: int, run: Run, table: RungTable, at_s: float) -> Cell:
    """A run's figures; infinite times are None."""
    final = run.best[-1][1] if run.best else None
    at_equal = run.recipe_at(at_s)
    times = {f"{regret:g}": run.seconds_to(table.best - regret, table) for regret in REGRETS}
    return {
        "policy": policy,
        "n_trials": n_trials,
        "n_workers": run.n_workers,
        "seed": seed,
        "wall_s": run.wall_s,
        "busy_s": run.busy_s,
        "longest_s": run.longest_s,
        "n_complete": run.n_complete,
        "n_thawed": run.n_thawed,
        "regret": None if final is None else table.best - table.values[final, -1],
        "tested": None if final is None else table.tested[final, -1],
        "regret_at_equal_wall": None if at_equal is None else table.best - table.values[at_equal, -1],
        "seconds_to": {name: when if math.isfinite(when) else None for name, when in times.items()},
        "curve": [[when, table.best - table.values[recipe, -1]] for when, recipe in run.best],
    }


def median(values: Iterable[float | None]) -> float | None:
    """Over the seeds; a run without the figure counts as worst, and if most have none there is no median."""
    found = [math.inf if value is None else float(value) for value in values]
    middle = statistics.median(found) if found else math.inf
    return middle if math.isfinite(middle) else None


def mean(cells: list[Cell], name: str) -> float | None:
    """Over the seeds that have the figure."""
    found = [cell[name] for cell in cells if cell[name] is not None]
    return statistics.fmean(found) if found else None


def summarise(cells: list[Cell]) -> list[Cell]:
    """One line a (policy, trials, workers): medians over seeds, and what the speed-up consists of.

    Speed-up = workers x (share of the time that they work) x (work of one worker / work of all); its limit is the work of
    one worker over the longest single trial.
    """
    lines: list[Cell] = []
    for policy, n_trials in dict.fromkeys((cell["policy"], cell["n_trials"]) for cell in cells):
        of_all = [cell for cell in cells if (cell["policy"], cell["n_trials"]) == (policy, n_trials)]
        alone = {cell["seed"]: cell for cell in of_all if cell["n_workers"] == 1}
        for n_workers in dict.fromkeys(cell["n_workers"] for cell in of_all):
            own = [cell for cell in of_all if cell["n_workers"] == n_workers]
            line: Cell = {"policy": policy, "n_trials": n_trials, "n_workers": n_workers}
            pairs = [(cell, alone[cell["seed"]]) for cell in own]
            line["speed_up"] = median(one["wall_s"] / cell["wall_s"] for cell, one in pairs)
            line["busy_share"] = median(cell["busy_s"] / (n_workers * cell["wall_s"]) for cell in own)
            line["work"] = median(cell["busy_s"] / one["busy_s"] for cell, one in pairs)
            line["limit"] = median(one["busy_s"] / cell["longest_s"] for cell, one in pairs)
            for name in ("wall_s", "n_complete", "regret", "regret_at_equal_wall", "tested"):
                line[name] = median(cell[name] for cell in own)
            line["mean_regret"], line["mean_tested"] = mean(own, "regret"), mean(own, "tested")
            for regret in (f"{one:g}" for one in REGRETS):
                line[f"seconds_to_{regret}"] = median(cell["seconds_to"][regret] for cell in own)
            lines.append(line)
    return lines


def bends(lines: list[Cell]) -> list[str]:
    """For each policy and size where the speed-up falls below half of the workers, and which factor has fallen further."""
    found = []
    for policy, n_trials in dict.fromkeys((line["policy"], line["n_trials"]) for line in lines):
        own = [line for line in lines if (line["policy"], line["n_trials"]) == (policy, n_trials)]
        bent = next((line for line in own if line["speed_up"] < HALF * line["n_workers"]), None)
        if bent is None:
            found.append(f"{policy}, {n_trials:,} trials: no bend up to {own[-1]['n_workers']} workers")
            continue
        why = "the last trials run alone" if bent["busy_share"] < 1 / bent["work"] else "the pruner lets more go on"
        found.append(
            f"{policy}, {n_trials:,} trials: bends at {bent['n_workers']} workers, speed-up {bent['speed_up']:.1f} of at most "
            f"{bent['limit']:.1f} (all the work over the longest trial); workers busy {100 * bent['busy_share']:.0f} % of the "
            f"time with {bent['work']:.2f} times the work of one worker: {why}"
        )
    return found


def run_all(table: RungTable, space: SearchSpace, *, quick: bool, more: Sequence[str] = ()) -> list[Cell]:
    """Every cell. The equal wall clock is what one worker takes for 50 pruned trials, in the median."""
    fifty = [simulate(table, books("asha", table, space, seed), n_workers=1, n_trials=50).wall_s for seed in range(5)]
    at_s = statistics.median(fifty)
    cells = []
    for policy, n_trials, n_workers, seed in plan(quick, more):
        run = simulate(table, books(policy, table, space, seed), n_workers=n_workers, n_trials=n_trials)
        cells.append(cell_of(policy, n_trials, seed, run, table, at_s) | {"equal_wall_s": at_s})
    return cells


def show(lines: list[Cell]) -> None:
    """The table; unmeasured figures as a dash."""
    names = ("speed_up", "limit", "busy_share", "work", "n_complete", "mean_regret", "mean_tested", "seconds_to_0.01")
    print(f"{'policy':<10}{'trials':>7}{'workers':>8}" + "".join(f"{name:>16}" for name in names))
    for line in lines:
        values = "".join(f"{'-' if line[name] is None else f'{line[name]:,.3f}':>16}" for name in names)
        print(f"{line['policy']:<10}{line['n_trials']:>7,}{line['n_workers']:>8}{values}")


def main() -> None:
    """Simulate, print, write JSON and pictures."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.search.simulate", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--table", type=Path, default=HERE / "rungs.csv")
    parser.add_argument("--space", default=str(HERE / "cheap.yaml"))
    parser.add_argument("--out", type=Path, default=RESULTS / "search_simulation.json")
    parser.add_argument("--quick", action="store_true", help="up to 1,000 trials, three seeds")
    parser.add_argument("--more", nargs="*", default=[], help="more policies, such as median, gp+asha, tpe+hyperband")
    asked = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = load_space(asked.space)
    table = read_table(asked.table, space)
    cells = run_all(table, space, quick=asked.quick, more=asked.more)
    lines = summarise(cells)
    show(lines)
    said = bends(lines)
    print("\n".join(said))
    kept = [{name: value for name, value in cell.items() if name != "curve"} for cell in cells]
    about = {"n_recipes": len(table), "steps": list(table.steps), "best": table.best, "thaw": CAN_THAW}
    write_json(asked.out, {"table": about, "summary": lines, "bends": said, "cells": kept})
    draw_speed_up(lines, asked.out.with_name(asked.out.stem + "_speed_up.png"))
    draw_regret(lines, cells, asked.out.with_name(asked.out.stem + "_regret.png"))


if __name__ == "__main__":
    try:
        main()
    except InputError as fault:
        sys.exit(str(fault))
