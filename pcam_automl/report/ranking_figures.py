"""Figures on how sure a search is: trials with their intervals, and rungs against rungs. Judges nothing itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from pcam_automl.errors import first_few
from pcam_automl.report.blocks import Block, Picture, Text, left_out
from pcam_automl.report.style import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    VERMILION,
    add_row,
    dress,
    new_figure,
    picture,
    shortened,
)
from pcam_automl.search.audit import Audit, RungAudit
from pcam_automl.search.ranking import Ranked, Ranking

# Told apart by shape as well as by colour: what a trial is to the best one.
_LOOKS = {
    "the highest AUC": (VERMILION, "D"),
    "as good, within the margin": (ORANGE, "s"),
    "not beaten, but further behind": (BLUE, "o"),
    "beaten": (GREY, "x"),
}
_MOST_PANELS = 4


def ranking_blocks(ranking: Ranking | None, names: Mapping[int, str]) -> Iterator[Block]:
    """The forest plot with the choice in words, or why there is none; ``names``: trial number to its backbone."""
    if ranking is None or not ranking.trials:
        why = "they were not drawn for this report" if ranking is None else first_few(ranking.notes)
        yield left_out(f"intervals of the trials: {why}.")
        return
    yield forest_figure(ranking, names)
    against = (
        f"It does not beat trial{'s' * (len(ranking.unbeaten) > 1)} {first_few([str(n) for n in ranking.unbeaten], 10)}. "
        if ranking.unbeaten
        else ""
    )
    notes = f" ({first_few(ranking.notes)})" if ranking.notes else ""
    yield Text(
        f"Trial {ranking.trials[0].number} has the highest AUC of {ranking.n_complete} complete trials. {against}"
        f"Without a confirmation finalize takes trial {ranking.picked}: {ranking.why}{notes}. The highest of many values is too high by luck, which no "
        "interval here shows; new slides do."
    )


def forest_figure(ranking: Ranking, names: Mapping[int, str]) -> Picture:
    """Each trial's AUC with its interval, and how far it is behind the best on the same draws of slides."""
    trials = ranking.trials
    figure = new_figure(8.6, 1.7 + 0.27 * len(trials))
    values, gaps = add_row(figure, 2)
    dress(values, x="validation AUC, 95 % interval", grid="x")
    dress(gaps, x="AUC behind the best, 95 % interval of the difference", grid="x")
    gaps.axvline(0.0, color=INK, linewidth=1)
    for name, (colour, marker) in _LOOKS.items():
        places = [place for place, trial in enumerate(trials) if _look(trial, place) == name]
        _points(values, places, [trials[p].auc for p in places], [trials[p].interval for p in places], colour, marker)
        of_gaps = [trials[p].behind_interval for p in places]
        _points(gaps, places, [trials[p].behind for p in places], of_gaps, colour, marker, label=name)
    labels = [f"{t.number} {shortened(names.get(t.number, ''), 22)}".strip() for t in trials]
    values.set_yticks(
        range(len(trials)), [f"{t}{'  ◂' if trials[i].number == ranking.picked else ''}" for i, t in enumerate(labels)]
    )
    gaps.set_yticks(range(len(trials)), [""] * len(trials))
    for axes in (values, gaps):
        axes.set_ylim(len(trials) - 0.4, -0.6)
    figure.legend(loc="outside lower center", ncols=len(_LOOKS), frameon=False, fontsize=8.5)
    best = trials[0]
    drawn = picture(
        figure,
        "search_intervals.png",
        alt=f"AUC of {len(trials)} trials with 95 % intervals; trial {best.number} is best with {best.auc:.4f}, "
        f"{len(ranking.unbeaten)} others are not beaten by it",
        caption=f"Intervals by Student's t over {ranking.n_clusters:,} {_drawn(ranking)} drawn anew a thousand times{_rests_on(ranking)}. On the "
        "right every trial is compared with the best on the same draws: where the line crosses 0, the best does not beat it. The "
        "triangle marks the trial that finalize takes where it confirms none.",
    )
    return replace(drawn, wide=True)


def _drawn(ranking: Ranking) -> str:
    return f"{ranking.over} (patches, where no slide is known)" if ranking.what == "patches" else ranking.over


def _rests_on(ranking: Ranking) -> str:
    n = ranking.n_independent
    known = ranking.n_clusters < ranking.n_patches
    return f", as wide as the {n:,} that hold the rarer label make them" if known and 0 < n < ranking.n_clusters else ""


def _look(trial: Ranked, place: int) -> str:
    names = list(_LOOKS)
    return names[0] if place == 0 else names[1] if trial.tied else names[3] if trial.beaten else names[2]


def _points(
    axes: Axes,
    places: list[int],
    values: list[float],
    intervals: list[tuple[float, float]],
    colour: str,
    marker: str,
    label: str | None = None,
) -> None:
    if not places:
        return
    drawn = [(place, ends) for place, ends in zip(places, intervals, strict=True) if not math.isnan(ends[0])]
    axes.hlines([p for p, _ in drawn], [low for _, (low, _) in drawn], [high for _, (_, high) in drawn], colors=colour)
    axes.scatter(values, places, color=colour, marker=marker, s=34, zorder=3, label=label)


def fidelity_figure(audit: Audit, table: NDArray[np.float64]) -> Picture | None:
    """Every rung's value against the next rung's, tau printed; None where no recipe has two values.

    Args:
        audit: of the rungs.
        table: (lineages, rungs) values as reported, NaN where there are none.
    """
    shown = [place for place, rung in enumerate(audit.rungs) if rung.n_pairs][:_MOST_PANELS]
    if not shown:
        return None
    figure = new_figure(max(5.0, 3.7 * len(shown)), 3.7)
    for axes, place in zip(add_row(figure, len(shown)), shown, strict=True):
        _rungs_panel(axes, audit.rungs[place], table[:, place], table[:, place + 1])
    taus = ", ".join(f"{_tau_text(audit.rungs[place])} ({audit.rungs[place].verdict})" for place in shown)
    return picture(
        figure,
        "search_fidelity.png",
        alt=f"Values at a rung against those at the next: {taus}",
        caption="Does a score after a short training tell the order after a longer one? Each dot is a recipe; ticks at the lower edge are "
        "recipes that were stopped at that rung. Kendall's tau: 1 is the same order, 0 is chance; in brackets corrected for the good ones "
        f"alone having gone on. Verdicts: {taus}.",
    )


def _rungs_panel(axes: Axes, rung: RungAudit, here: NDArray[np.float64], after: NDArray[np.float64]) -> None:
    dress(axes, title=_tau_text(rung), x=f"score after {rung.step:,} views", y=f"score after {rung.next_step:,} views")
    both = ~np.isnan(here) & ~np.isnan(after)
    axes.scatter(here[both], after[both], color=BLUE, s=26, alpha=0.8)
    stopped = here[~np.isnan(here) & np.isnan(after)]
    axes.plot(stopped, np.zeros(len(stopped)), "|", color=VERMILION, markersize=9, transform=axes.get_xaxis_transform())


def _tau_text(rung: RungAudit) -> str:
    if rung.tau is None:
        return f"no tau, {rung.n_pairs} recipes"
    of_all = f" ({rung.tau_of_all:.2f})" if rung.tau_of_all is not None and rung.share_of_spread < 1 else ""
    return f"tau {rung.tau:.2f}{of_all}, {rung.n_pairs} recipes"
