"""The section on the search: history, importance, parallel coordinates, crop sizes, backbones. Runs no trial."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import optuna
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.ticker import MaxNLocator
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from pcam_automl.goals import AUC, Goal
from pcam_automl.report.blocks import Block, Facts, Picture, Section, Table, Text, left_out
from pcam_automl.report.content import ReportContent
from pcam_automl.report.ranking_figures import fidelity_figure, ranking_blocks
from pcam_automl.report.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    MAP,
    ORANGE,
    SKY,
    VERMILION,
    add_axes,
    legend_below,
    new_figure,
    picture,
    shortened,
)
from pcam_automl.report.tradeoff_figure import tradeoff_blocks
from pcam_automl.search.audit import audit_study, rung_table
from pcam_automl.search.audit_text import AUDIT_HEADER, advice, audit_notes, audit_rows, probe_audit
from pcam_automl.search.lineages import lineage_of, lineages_of, not_superseded, seconds_of_lineages
from pcam_automl.search.reading import recipe_field

_MOST_LINES, _MOST_AXES, _MOST_BARS = 200, 8, 12
_SHOWN_TRIALS = 10
_GOOD = 0.95
"""From this best AUC on the history counts errors."""
_LEAST_ERROR = 1e-5
_AUC_TICKS = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999)


def search_section(content: ReportContent) -> Section:
    """Everything about a study; a sentence where there is none."""
    title = "The search"
    if content.study is None:
        return Section("search", title, (left_out("this report is of a training without a search."),))
    trials = content.study.get_trials(deepcopy=False)
    complete = [t for t in trials if t.state == TrialState.COMPLETE and t.value is not None]
    if not complete:
        return Section("search", title, (left_out(f"study {content.study.study_name} has no complete trial yet."),))
    importance, why_not = _importance(content)
    goal = AUC if content.study_settings is None else content.study_settings.goal
    blocks: list[Block] = [_facts(trials, complete, goal), history_figure(trials, goal)]
    blocks += ranking_blocks(content.ranking, {t.number: str(recipe_field(t, "backbone") or "") for t in complete})
    blocks += _fidelity(content, trials)
    blocks.append(importance_figure(importance) if importance else left_out(f"parameter importance: {why_not}."))
    cut = "tile_size" if content.dense else "crop_size"
    blocks += _varied(complete, importance, cut, goal)
    blocks.append(_best_table(complete, cut, goal, seconds_of_lineages(trials)))
    blocks += tradeoff_blocks(trials, goal)
    return Section("search", title, tuple(blocks))


def _importance(content: ReportContent) -> tuple[dict[str, float], str]:
    from pcam_automl.search.summary import summarise  # the search's own numbers, so that `status` says the same

    if content.study_settings is None:
        return {}, "the study's settings were not given to this report"
    found = summarise(cast(optuna.Study, content.study), content.study_settings)
    return found.importances, found.importances_note or "no parameter has any"


def _fidelity(content: ReportContent, trials: list[FrozenTrial]) -> Iterator[Block]:
    """How far small rungs can be trusted, a warning where they cannot."""
    if content.study_settings is None:
        yield left_out("rungs against rungs: the study's settings were not given to this report.")
        return
    audit = audit_study(cast(optuna.Study, content.study), content.study_settings)
    steps = [views for views, _ in content.study_settings.rungs]
    drawn = fidelity_figure(audit, rung_table(lineages_of(trials), steps))
    yield drawn if drawn is not None else left_out("rungs against rungs: no recipe was scored at two rungs.")
    for rung in audit.misleading:
        yield Text(f"Warning: after {rung.step:,} views the scores mislead; {rung.why}.")
    if any(rung.n_pairs for rung in audit.rungs):
        said = advice(audit, content.study_settings)
        yield Text(f"{said[:1].upper()}{said[1:]}.")
        yield Table(
            AUDIT_HEADER,
            tuple(audit_rows(audit)),
            "Does the order at a rung hold at the next? Kendall's tau-b, with 95 % intervals",
            n_left=2,
            folded=True,
        )
        yield Text(" ".join(f"{note[:1].upper()}{note[1:]}." for note in audit_notes(audit)))
    if (probe := probe_audit(cast(optuna.Study, content.study), content.study_settings)) is not None:
        yield Text(f"{str(probe)[:1].upper()}{str(probe)[1:]}.")


def _facts(trials: list[FrozenTrial], complete: list[FrozenTrial], goal: Goal) -> Facts:
    best = max(complete, key=lambda t: goal.sign * _value(t))
    n_pruned = sum(t.state == TrialState.PRUNED for t in not_superseded(trials))
    hours = sum(float(t.user_attrs.get("seconds", 0.0)) for t in trials) / 3600
    return Facts(
        (
            (f"{_value(best):.4f}", f"best {goal.label} (trial {best.number})"),
            (f"{len(complete)}", "complete trials"),
            (f"{n_pruned}", "stopped early"),
            (f"{hours:.2f} h" if hours >= 0.1 else f"{hours * 60:.1f} min", "training time in all"),
        )
    )


def _value(trial: FrozenTrial) -> float:
    assert trial.value is not None
    return trial.value


def history_figure(trials: list[FrozenTrial], goal: Goal = AUC) -> Picture:
    """The objective by trial number, how far each recipe came, and the best so far."""
    figure = new_figure(6.8, 3.9)
    axes = add_axes(figure, x="trial number", y=goal.label)
    complete = [t for t in trials if t.state == TrialState.COMPLETE and t.value is not None]
    shown = _stopped_by_rung(trials)
    best = goal.sign * np.maximum.accumulate([goal.sign * _value(t) for t in complete])
    values = [value for dots in shown.values() for _, value in dots] + [_value(t) for t in complete]
    by_error = bool(goal.maximize and best[-1] >= _GOOD and min(values) < 1.0)
    most = _scale_by_error(axes, values) if by_error else math.inf  # what has no error has a place, too
    looks = itertools.cycle(zip("x^sD", (GREY, ORANGE, GREEN, SKY), strict=True))
    for (rung, dots), (marker, color) in zip(shown.items(), looks, strict=False):
        numbers, scores = [number for number, _ in dots], [min(value, most) for _, value in dots]
        label = f"stopped at rung {rung}, its score there"
        axes.scatter(numbers, scores, color=color, marker=marker, s=24, linewidths=1.2, label=label)
    numbers = [t.number for t in complete]
    axes.scatter(numbers, [min(_value(t), most) for t in complete], color=BLUE, s=30, label="complete")
    heights = np.minimum([*best, best[-1]], most)  # the best holds until the last trial
    last = max(t.number for t in trials)
    axes.step([*numbers, last], heights, where="post", color=VERMILION, linewidth=1.8, label="best so far")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_below(axes, ncols=3)
    return picture(
        figure,
        "search_history.png",
        alt=f"{goal.label} of {len(complete)} complete trials and {sum(map(len, shown.values()))} stopped early; the best reaches {best[-1]:.4f}",
        caption=f"Each mark is one recipe tried; a score at an earlier rung is that of a shorter training. While the line still "
        f"{'climbs' if goal.maximize else 'falls'}, more trials are worth their time; once it has been flat for long, they are not."
        + " The scale counts errors (1 - AUC): each tenfold fewer take the same height."
        * by_error,
    )


def _stopped_by_rung(trials: list[FrozenTrial]) -> dict[int, list[tuple[int, float]]]:
    """Rung, from 1, to (trial number, last score) of the recipes that ended there."""
    steps = sorted({step for trial in trials for step in trial.intermediate_values})
    found: dict[int, list[tuple[int, float]]] = {}
    for trial in not_superseded(trials):
        if trial.state == TrialState.PRUNED and trial.intermediate_values:
            last = max(trial.intermediate_values)
            if math.isfinite(value := trial.intermediate_values[last]):
                found.setdefault(steps.index(last) + 1, []).append((trial.number, value))
    return dict(sorted(found.items()))


def _scale_by_error(axes: Axes, values: Sequence[float]) -> float:
    """The y axis in steps of the error: of AUCs near 1 a linear one shows a single line. Returns where an AUC of 1 is drawn.

    At least one of the values is below 1.
    """
    errors = 1.0 - np.asarray(values)
    worst, flawless = float(errors.max()), bool(errors.min() <= 0)
    smallest = max(_LEAST_ERROR, float(errors[errors > 0].min()))
    least = smallest / 3.0 if flawless else smallest

    def height(auc: np.ndarray) -> np.ndarray:
        return -np.log10(np.maximum(1.0 - np.asarray(auc), least / 4))

    axes.set_yscale("function", functions=(height, lambda h: 1.0 - 10.0 ** -np.asarray(h)))
    ticks = [tick for tick in _AUC_TICKS if (1.5 if flawless else 0.7) * least <= 1.0 - tick <= 1.1 * worst]
    if len(ticks) < 2:
        ticks = sorted({1.0 - worst, 1.0 - smallest})
    labels = [f"{tick:.5g}" for tick in ticks]
    if flawless:
        ticks, labels = [*ticks, 1.0 - least], [*labels, "1"]
    axes.set_yticks(ticks, labels)
    axes.minorticks_off()
    axes.set_ylim(1.0 - 1.2 * worst, 1.0 - least / 1.6)
    return 1.0 - least


def importance_figure(importance: dict[str, float]) -> Picture:
    """Bars of the parameters' shares."""
    shown = sorted(importance.items(), key=lambda item: item[1])[-_MOST_BARS:]
    figure = new_figure(6.4, 0.8 + 0.3 * len(shown))
    axes = add_axes(figure, x="share of the differences in score (%)", grid="x")
    bars = axes.barh([name for name, _ in shown], [100 * share for _, share in shown], color=BLUE, height=0.6)
    axes.bar_label(bars, fmt="%.0f", padding=3, fontsize=8.5, color=INK)
    return picture(
        figure,
        "search_importance.png",
        alt="Importance: " + ", ".join(f"{name} {100 * share:.0f} %" for name, share in reversed(shown)),
        caption="How much each choice mattered for reaching the better trials (PED-ANOVA). With few trials this is a rough hint.",
    )


def _varied(complete: list[FrozenTrial], importance: dict[str, float], cut: str, goal: Goal) -> Iterator[Block]:
    """Figures of the parameters that vary; a sentence for each that does not."""
    names = _common_parameters(complete, importance)
    if len(names) >= 2 and len(complete) >= 2:
        yield parallel_figure(complete, names, goal)
    else:
        yield left_out("parallel coordinates, since fewer than two parameters vary among the complete trials.")
    for field, draw in ((cut, crop_figure if cut == "crop_size" else tile_figure), ("backbone", backbone_figure)):
        pairs = [(value, _value(t)) for t in complete if (value := recipe_field(t, field)) is not None]
        if len({value for value, _ in pairs}) >= 2:
            yield draw(pairs, goal)
        else:
            yield left_out(f"{field} against {goal.short}, since all complete trials have the same one.")


def _common_parameters(complete: list[FrozenTrial], importance: dict[str, float]) -> list[str]:
    """Parameters that every complete trial has and that vary, the most important first."""
    common = set.intersection(*(set(t.params) for t in complete))
    varying = [
        name for name in complete[0].params if name in common and len({str(t.params[name]) for t in complete}) > 1
    ]
    return sorted(varying, key=lambda name: -importance.get(name, 0.0))[:_MOST_AXES]


def parallel_figure(complete: list[FrozenTrial], names: Sequence[str], goal: Goal = AUC) -> Picture:
    """One line a trial over the parameters' axes, coloured by the objective; the best trials on top."""
    shown = sorted(complete, key=lambda t: goal.sign * _value(t))[-_MOST_LINES:]
    values = np.array([_value(t) for t in shown])
    columns = [_positions(shown, name) for name in names]
    span = max(float(np.ptp(values)), 1e-9)
    figure = new_figure(max(7.6, 1.25 * (len(names) + 1)), 4.2)
    axes = figure.add_subplot()
    heights = np.stack([*[place for place, _ in columns], (values - values.min()) / span], axis=1)
    lines = [np.column_stack([np.arange(heights.shape[1]), row]) for row in heights]
    colours = colormaps[f"{MAP}_r" if goal.maximize else MAP]((values - values.min()) / span)
    axes.add_collection(LineCollection(lines, colors=colours, linewidths=np.linspace(1.0, 2.4, len(shown)), alpha=0.9))
    ticks = [*[ticks for _, ticks in columns], [(0.0, f"{values.min():.4f}"), (1.0, f"{values.max():.4f}")]]
    for place, marks in enumerate(ticks):
        axes.axvline(place, color="#B8B8C0", linewidth=1, zorder=0)
        for height, text in marks:
            axes.text(
                place + 0.04,
                height,
                shortened(text, 16),
                fontsize=7.5,
                va="center",
                color=INK,
                bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6},
            )
    _bare(axes, [*names, goal.short])
    drawn = picture(
        figure,
        "search_parallel.png",
        alt=f"Parallel coordinates of {len(shown)} trials over {', '.join(names)} and {goal.short}",
        caption=f"Each line is one recipe, from its choices to its {goal.short} on the right; dark lines are the best, yellow ones the "
        "worst. Where the dark lines run together, that choice matters.",
    )
    return replace(drawn, wide=True)


def _bare(axes: Axes, names: Sequence[str]) -> None:
    axes.set_xlim(-0.15, len(names) - 0.55)
    axes.set_ylim(-0.06, 1.06)
    axes.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names], fontsize=8.5)
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)


def _positions(trials: Sequence[FrozenTrial], name: str) -> tuple[np.ndarray, list[tuple[float, str]]]:
    """(n,) heights in [0, 1] of the trials on a parameter's axis, and its ticks."""
    distribution = trials[0].distributions[name]
    raw = [t.params[name] for t in trials]
    if isinstance(distribution, CategoricalDistribution):
        held = {str(value) for value in raw}
        known = [text for choice in distribution.choices if (text := str(choice)) in held]  # in the space's order
        step = 1.0 / max(len(known) - 1, 1)
        return np.array([known.index(str(value)) * step for value in raw]), [
            (i * step, text) for i, text in enumerate(known)
        ]
    values = np.array(raw, np.float64)
    scaled = np.log(values) if distribution.log else values  # type: ignore[attr-defined]
    low, span = float(scaled.min()), max(float(np.ptp(scaled)), 1e-12)
    return (scaled - low) / span, [(0.0, f"{values.min():.3g}"), (1.0, f"{values.max():.3g}")]


def crop_figure(pairs: list[tuple[Any, float]], goal: Goal = AUC) -> Picture:
    """The objective by crop size, and the best of each."""
    best = int(max(pairs, key=lambda pair: goal.sign * pair[1])[0])
    note = "How much of the surroundings the network was shown. In PatchCamelyon the centre 32 px decide the label; more context can help or distract."
    return _size_figure(pairs, "crop size (px of the 96 px patch)", f"{note} The best trial cut {best} px.", goal)


def tile_figure(pairs: list[tuple[Any, float]], goal: Goal = AUC) -> Picture:
    """The objective by tile size of a dense task, and the best of each."""
    best = int(max(pairs, key=lambda pair: goal.sign * pair[1])[0])
    note = "How large a piece of an image the network was shown at a time."
    return _size_figure(pairs, "tile size (px)", f"{note} The best trial cut {best} px.", goal)


def _size_figure(pairs: list[tuple[Any, float]], name: str, caption: str, goal: Goal) -> Picture:
    figure = new_figure()
    axes = add_axes(figure, x=name, y=goal.label)
    crops, values = np.array([int(crop) for crop, _ in pairs]), np.array([value for _, value in pairs])
    axes.scatter(crops, values, color=BLUE, s=28, alpha=0.8, label="trial")
    known = np.unique(crops)
    axes.plot(
        known,
        [goal.best(values[crops == crop].tolist()) for crop in known],
        color=VERMILION,
        marker="o",
        label="best of its size",
    )
    axes.set_xticks(known)
    legend_below(axes)
    best = int(crops[(goal.sign * values).argmax()])
    return picture(
        figure,
        "search_crop.png",
        alt=f"{goal.label} by {name}; the best trial has {best} px",
        caption=caption,
    )


def backbone_figure(pairs: list[tuple[Any, float]], goal: Goal = AUC) -> Picture:
    """The objective of every trial by backbone, sorted by the best."""
    by_name: dict[str, list[float]] = {}
    for name, value in pairs:
        by_name.setdefault(str(name), []).append(value)
    best = {name: goal.best(values) for name, values in by_name.items()}
    order = sorted(by_name, key=lambda name: goal.sign * best[name])[-_MOST_BARS:]
    figure = new_figure(7.0, 1.1 + 0.32 * len(order))
    axes = add_axes(figure, x=goal.label, grid="x")
    for place, name in enumerate(order):
        axes.scatter(by_name[name], [place] * len(by_name[name]), color=GREEN, s=26, alpha=0.7)
        axes.scatter([best[name]], [place], color=ORANGE, edgecolor=INK, s=70, marker="D", zorder=3)
    axes.set_ylim(-0.6, len(order) - 0.4)
    axes.set_yticks(range(len(order)), [f"{shortened(name)} ({len(by_name[name])})" for name in order])
    return picture(
        figure,
        "search_backbones.png",
        alt=f"Best {goal.short} by backbone: " + ", ".join(f"{name} {best[name]:.4f}" for name in reversed(order)),
        caption="Which networks won: one dot a trial, a diamond for each network's best, the number of trials in brackets.",
    )


def _best_table(complete: list[FrozenTrial], cut: str, goal: Goal, seconds: Mapping[str, float]) -> Table:
    best = sorted(complete, key=lambda t: -goal.sign * _value(t))[:_SHOWN_TRIALS]
    rows = tuple(
        (
            str(t.number),
            str(recipe_field(t, "backbone") or "–"),
            f"{_value(t):.4f}",
            str(recipe_field(t, cut) or "–"),
            f"{seconds[lineage_of(t)]:.0f}" if "seconds" in t.user_attrs else "–",
        )
        for t in best
    )
    return Table(
        ("trial", "backbone", goal.short, f"{cut.removesuffix('_size')} (px)", "seconds"),
        rows,
        "The best trials.",
        n_left=2,
    )
