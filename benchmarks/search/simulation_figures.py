"""Pictures of the simulation: speed-up and what it consists of, regret over time. Simulates nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import ScalarFormatter

from pcam_automl.files import written_whole
from pcam_automl.report.style import GREY, SERIES, add_row, dress, legend, new_figure

MARKS = "osD^vP"


def _series(lines: Sequence[dict[str, Any]], policy: str, n_trials: int, name: str) -> tuple[list[int], list[float]]:
    own = [one for one in lines if (one["policy"], one["n_trials"]) == (policy, n_trials) and one[name] is not None]
    return [one["n_workers"] for one in own], [one[name] for one in own]


def _workers_axis(axes: Axes, workers: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(workers))
    axes.xaxis.set_major_formatter(ScalarFormatter())


def draw_speed_up(lines: Sequence[dict[str, Any]], file: Path) -> None:
    """Speed-up over the workers by size of the study, beside the two factors that hold it back."""
    figure = new_figure(10.5, 4.2)
    left, right = add_row(figure, 2)
    workers = sorted({line["n_workers"] for line in lines})
    sizes = sorted({line["n_trials"] for line in lines if line["policy"] == "asha"})
    left.plot(workers, workers, color=GREY, linestyle=":", label="ideal")
    for place, size in enumerate(sizes):
        style: dict[str, Any] = {
            "color": SERIES[place],
            "marker": MARKS[place],
            "markersize": 4,
            "label": f"{size:,} trials",
        }
        left.plot(*_series(lines, "asha", size, "speed_up"), **style)
        _, limit = _series(lines, "asha", size, "limit")
        left.axhline(limit[-1], color=SERIES[place], linewidth=0.9, linestyle="--")
        right.plot(*_series(lines, "asha", size, "busy_share"), **style)
        x, work = _series(lines, "asha", size, "work")
        right.plot(x, work, color=SERIES[place], marker=MARKS[place], markersize=4, linestyle="--")
    dress(left, title="Time for all trials (ASHA; dashed: work / longest trial)", x="workers", y="speed-up (times)")
    dress(
        right,
        title="Share of time busy (line), work over one worker's (dashed)",
        x="workers",
        y="share (1 = as one worker)",
    )
    left.set_yscale("log", base=2)
    left.set_yticks(workers)
    left.yaxis.set_major_formatter(ScalarFormatter())
    right.set_ylim(bottom=0)
    for axes in (left, right):
        _workers_axis(axes, workers)
    legend(left)
    legend(right)
    _save(figure, file)


def draw_regret(lines: Sequence[dict[str, Any]], cells: Sequence[dict[str, Any]], file: Path) -> None:
    """Regret over simulated time by number of workers, and after equal numbers of trials by policy."""
    figure = new_figure(10.5, 4.2)
    left, right = add_row(figure, 2)
    size = max(cell["n_trials"] for cell in cells if cell["policy"] == "asha" and cell["n_trials"] <= 1000)
    at_hand = {cell["n_workers"] for cell in cells if (cell["policy"], cell["n_trials"]) == ("asha", size)}
    for place, n_workers in enumerate(sorted(at_hand & {1, 4, 16, 64, 256})):
        runs = [c for c in cells if (c["policy"], c["n_trials"], c["n_workers"]) == ("asha", size, n_workers)]
        when = np.geomspace(1.0, max(run["wall_s"] for run in runs), 120)
        regret = np.median([[_regret_at(run["curve"], at) for at in when] for run in runs], axis=0)
        left.plot(when, regret, color=SERIES[place], label=f"{n_workers} worker{'s' * (n_workers > 1)}")
    dress(left, title=f"Best fully trained recipe, {size:,} trials (ASHA)", x="simulated time (s)", y="regret (AUC)")
    left.set_xscale("log")
    few = 50
    policies = [p for p in ("none", "asha", "asha+thaw", "tpe+asha") if any(line["policy"] == p for line in lines)]
    for place, policy in enumerate(policies):
        x, mean_regret = _series(lines, policy, few, "mean_regret")
        right.plot(x, mean_regret, color=SERIES[place], marker=MARKS[place], markersize=4, label=policy)
    dress(right, title=f"After {few} trials, by policy", x="workers", y="mean regret (AUC)")
    _workers_axis(right, sorted({line["n_workers"] for line in lines}))
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        legend(axes)
    _save(figure, file)


def _regret_at(curve: Sequence[Sequence[float]], when: float) -> float:
    return next((regret for moment, regret in reversed(curve) if moment <= when), float("nan"))


def _save(figure: Any, file: Path) -> None:
    with written_whole(file) as partial:
        figure.savefig(partial, format="png", metadata={"Software": None})
