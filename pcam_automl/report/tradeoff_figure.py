"""Quality against latency and size: every complete trial, the front that no other beats, its knee. Picks nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.axes import Axes

from pcam_automl.goals import Goal
from pcam_automl.report.blocks import Block, Picture, Table, Text, left_out
from pcam_automl.report.style import BLUE, GREY, INK, ORANGE, VERMILION, add_row, dress, new_figure, picture, shortened
from pcam_automl.search.pareto import LATENCY, PARAMETERS, Tradeoff, tradeoff_of
from pcam_automl.search.reading import recipe_field

_LEAST = 2
_COSTS = ((LATENCY, "latency of one patch (ms)", 1.0), (PARAMETERS, "parameters (millions)", 1e-6))


def tradeoff_blocks(trials: Sequence[Any], goal: Goal) -> Iterator[Block]:
    """The picture and a table of the front; a sentence where fewer than two trials were timed."""
    yield Text("Quality against cost", style="heading")
    found = [(tradeoff_of(trials, goal, cost), name, unit) for cost, name, unit in _COSTS]
    timed = found[0][0]
    if len(timed.trials) < _LEAST:
        yield left_out("quality against latency, since fewer than two complete trials of one device were timed.")
        return
    yield tradeoff_figure([one for one in found if len(one[0].trials) >= _LEAST], goal)
    yield front_table(timed, goal)


def tradeoff_figure(found: Sequence[tuple[Tradeoff, str, float]], goal: Goal) -> Picture:
    """A panel for each cost.

    Args:
        found: (trade-off, the cost's name with its unit, factor to that unit), at least one.
        goal: the study's.
    """
    figure = new_figure(3.9 * len(found) + 0.6, 3.9)
    for place, (axes, (tradeoff, name, unit)) in enumerate(zip(add_row(figure, len(found)), found, strict=True)):
        dress(axes, x=name, y=goal.label if place == 0 else "")
        _draw(axes, tradeoff, unit)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
    timed = found[0][0]
    assert timed.knee is not None
    knee = timed.trials[timed.knee]
    on = (
        f" Times were taken on {timed.device}: median forward passes of one patch, all of this study beside each other."
    )
    n_left = timed.n_left_out
    left = f" {n_left} {'trial was' if n_left == 1 else 'trials were'} not timed there." if n_left else ""
    return picture(
        figure,
        "search_tradeoff.png",
        alt=f"{goal.label} against latency and parameters of {len(timed.trials)} trials; {len(timed.front)} are on the front, "
        f"its knee is trial {knee.number} with {timed.costs[timed.knee]:.2f} ms",
        caption="Each dot is a finished training. No other one is both better and quicker than those on the line. The diamond "
        "is the line's knee: beyond it, more time buys little (`finalize --pick knee` takes that of the left panel; the "
        f"triangle is the best, from which finalize starts by default).{on}{left}",
    )


def _draw(axes: Axes, tradeoff: Tradeoff, unit: float) -> None:
    costs, values, front = tradeoff.costs * unit, tradeoff.values, tradeoff.front
    axes.scatter(costs, values, color=GREY, s=22, label="trial")
    axes.plot(
        costs[front],
        values[front],
        color=BLUE,
        marker="o",
        markersize=5,
        drawstyle="steps-post",
        label="beaten by no other",
    )
    knee, best = tradeoff.knee, int(front[-1])
    assert knee is not None
    axes.scatter([costs[best]], [values[best]], color=ORANGE, edgecolor=INK, marker="^", s=110, zorder=4, label="best")
    axes.scatter(
        [costs[knee]], [values[knee]], color=VERMILION, edgecolor=INK, marker="D", s=55, zorder=5, label="knee"
    )
    if float(costs.min()) > 0 and float(costs.max()) > 10 * float(costs.min()):
        axes.set_xscale("log")


def front_table(tradeoff: Tradeoff, goal: Goal) -> Table:
    """The front, the cheapest first; what each step to the next costs and brings."""
    rows = []
    for place in tradeoff.front.tolist():
        trial = tradeoff.trials[place]
        size = trial.user_attrs.get(PARAMETERS)
        words = [word for word, at in (("knee", tradeoff.knee), ("best", int(tradeoff.front[-1]))) if at == place]
        rows.append(
            (
                str(trial.number),
                shortened(str(recipe_field(trial, "backbone") or "–")),
                f"{tradeoff.values[place]:.4f}",
                f"{tradeoff.costs[place]:.2f}",
                "–" if size is None else f"{size / 1e6:.2f}",
                ", ".join(words),
            )
        )
    header = ("trial", "backbone", goal.short, "latency (ms)", "parameters (millions)", "")
    return Table(header, tuple(rows), "Trials that no other beats in both, the quickest first.", n_left=2)
