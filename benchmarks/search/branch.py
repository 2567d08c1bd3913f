r"""Is a rung better scored at the end of a decay branch, or by the average of the weights as they stand? Trains nothing.

    OMP_NUM_THREADS=1 python -m benchmarks.search.record --data colon96 --n 100 --out benchmarks/search/rungs_branch.csv
    OMP_NUM_THREADS=1 python -m benchmarks.search.record --data colon96 --n 100 --space benchmarks/search/cheap_average.yaml \
        --out benchmarks/search/rungs_average.csv
    python -m benchmarks.search.branch

Recipe i is the same one in both tables, with the same seed and the same views; the average is that of the recipe (0.99 a step),
which both have. What is asked of a rung: whether its order is that of finished trainings (Kendall's tau with the branch's last rung,
on held-out slides, so that neither is judged by its own validation patches), and what it costs. Intervals are of recipes drawn anew.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau

from benchmarks.search.rung_table import RungTable, read_table
from benchmarks.settings import RESULTS
from pcam_automl.files import write_json
from pcam_automl.search.space import load_space

HERE = Path(__file__).parent
N_DRAWS = 2000


def compare(branch: RungTable, average: RungTable, seed: int = 0) -> list[dict[str, Any]]:
    """A line a rung: AUCs on held-out slides, tau with finished trainings, CPU seconds of both."""
    n = min(len(branch), len(average))
    finished = branch.tested[:n, -1]
    lines = []
    for rung, views in enumerate(branch.steps):
        sides = [table.values[:n, rung] for table in (branch, average)]
        known = np.isfinite(finished) & np.isfinite(sides[0]) & np.isfinite(sides[1])
        line: dict[str, Any] = {"views": views, "recipes": int(known.sum())}
        for name, table, values in zip(("branch", "average"), (branch, average), sides, strict=True):
            line[name] = {
                "median_auc": float(np.median(table.tested[:n, rung][known])),
                "tau": float(kendalltau(values[known], finished[known]).statistic),
                "seconds": float(np.median(table.seconds[:n, : rung + 1].sum(axis=1)[known])),
            }
        line["branch_better"] = float(np.mean(branch.tested[:n, rung][known] > average.tested[:n, rung][known]))
        line["tau_gained"] = line["branch"]["tau"] - line["average"]["tau"]
        line["tau_gained_95"] = _interval(sides[0][known], sides[1][known], finished[known], seed)
        lines.append(line)
    return lines


def _interval(
    one: NDArray[np.float64], other: NDArray[np.float64], truth: NDArray[np.float64], seed: int
) -> list[float]:
    """95 % of the differences of tau over recipes drawn anew."""
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(N_DRAWS):
        rows = rng.integers(0, len(truth), len(truth))
        drawn.append(kendalltau(one[rows], truth[rows]).statistic - kendalltau(other[rows], truth[rows]).statistic)
    return [float(bound) for bound in np.nanquantile(drawn, (0.025, 0.975))]


def main() -> None:
    """Read both tables, print, write ``benchmarks/results/search_branch.json``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.search.branch", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--branch", type=Path, default=HERE / "rungs_branch.csv")
    parser.add_argument("--average", type=Path, default=HERE / "rungs_average.csv")
    parser.add_argument("--out", type=Path, default=RESULTS / "search_branch.json")
    asked = parser.parse_args()
    space = load_space(str(HERE / "cheap.yaml"))
    lines = compare(read_table(asked.branch, space), read_table(asked.average, space))
    print(
        "| views | recipes | AUC, branch | AUC, average | branch better | tau, branch | tau, average | gained (95 %) | CPU s, branch | average |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for line in lines:
        branch, average, (low, high) = line["branch"], line["average"], line["tau_gained_95"]
        print(
            f"| {line['views']:,} | {line['recipes']} | {branch['median_auc']:.4f} | {average['median_auc']:.4f} | {line['branch_better']:.0%} | "
            f"{branch['tau']:.2f} | {average['tau']:.2f} | {line['tau_gained']:+.2f} ({low:+.2f} to {high:+.2f}) | "
            f"{branch['seconds']:.1f} | {average['seconds']:.1f} |"
        )
    write_json(asked.out, {"lines": lines})


if __name__ == "__main__":
    main()
