"""What a threshold costs, what is left when unsure patches are handed on, what was confirmed and what each part was worth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from pcam_automl.operating import HALF, Operating, operate, threshold_text
from pcam_automl.report.blocks import Block, Picture, Table, Text, left_out
from pcam_automl.report.content import FinalFigures, ReportContent, both_labels
from pcam_automl.report.style import BLUE, GREY, INK, VERMILION, dress, legend, new_figure, picture


def decision_blocks(content: ReportContent) -> Iterator[Block]:
    """Thresholds and the reject curve of a patch task, and what finalize measured, where it did."""
    if content.dense:
        return
    final, scores = content.final, content.scores
    operating = final.operating
    if not operating and scores is not None and len(scores.rows) and both_labels(scores):
        operating = (operate(scores.label, scores.prob, scores.on),)
    yield Text("What a threshold costs", style="heading")
    if operating:
        yield threshold_table(operating)
        yield reject_figure(operating[-1])
    else:
        yield left_out("thresholds and the reject curve, which need scored patches of both labels.")
    if final.confirmed:
        yield Text("How lucky the search was", style="heading")
        yield confirmed_table(final)
    if final.notes:
        yield Text("Blend and temperature", style="heading")
        yield from (Text(note) for note in final.notes)
    if final.steps:
        yield Text("What each ingredient was worth", style="heading")
        yield steps_table(final)
        yield steps_figure(final)


def threshold_table(operating: tuple[Operating, ...]) -> Table:
    """A line a rule and set of patches."""
    rows = [
        (
            _rule(point.rule),
            _share_of(one),
            threshold_text(point.threshold),
            *map(_percent, (point.sensitivity, point.specificity, point.ppv, point.npv, point.called)),
        )
        for one in operating
        for point in one.points
    ]
    last = operating[-1]
    fair = (
        "They were chosen on these very patches, which flatters them a little."
        if last.chosen_on == last.on
        else f"They were chosen out of fold ({last.chosen_on}), by networks trained for a shorter time than the final one; the "
        "lines of the slides that the network has not seen, which chose nothing, are the honest ones."
    )
    header = (
        "rule",
        "on",
        "threshold",
        "tumour found",
        "normal left alone",
        "calls of tumour right",
        "other calls right",
    )
    return Table(
        (*header, "called tumour"),
        tuple(rows),
        "Sensitivity, specificity, and how often a call is right (predictive values, at these patches' share of tumour). A "
        f"probability of at least the threshold is called tumour. {fair}",
        n_left=2,
    )


def _rule(rule: str) -> str:
    if rule == HALF:
        return "0.5 as it is"
    return f"finds {100 * float(rule.split()[-1]):.0f} % of tumour" if rule.startswith("sensitivity") else rule


def _share_of(one: Operating) -> str:
    if "kept back" in one.on:
        return "kept back"
    return "holdout" if one.on.startswith("holdout") else "out of fold" if "did not see" in one.on else "scored patches"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def reject_figure(operating: Operating) -> Picture:
    """Errors and AUC against the share of patches that the network decides."""
    coverage = np.array([100 * point.coverage for point in operating.rejects])
    error = np.array([100 * point.error for point in operating.rejects])
    area = np.array([np.nan if point.auc is None else point.auc for point in operating.rejects])
    figure = new_figure(5.4, 5.2)
    grid = figure.add_gridspec(2, 1, height_ratios=(1, 1))
    upper, lower = figure.add_subplot(grid[0]), figure.add_subplot(grid[1])
    dress(upper, y="wrong calls among them (%)")
    upper.plot(coverage, error, color=VERMILION, marker="o", markersize=4, label="called wrongly at 0.5")
    upper.axhline(error[0], color=GREY, linestyle=":", linewidth=1.2, label=f"all patches decided, {error[0]:.1f} %")
    upper.set_ylim(bottom=0)
    legend(upper, loc="best")
    dress(lower, x="patches that the network decides, the surest first (%)", y="AUC among them")
    lower.plot(coverage, area, color=BLUE, marker="s", markersize=4)
    for axes in (upper, lower):
        axes.set_xlim(102, 8)
        axes.tick_params(colors=INK)
    half = min(operating.rejects, key=lambda point: abs(point.coverage - 0.8))
    return picture(
        figure,
        "reject.png",
        alt=f"Share of wrong calls by coverage: {error[0]:.1f} % of all patches, {100 * half.error:.1f} % of the surest "
        f"{100 * half.coverage:.0f} %",
        caption="Leaving the unsure patches to a person: unsure are probabilities near 0.5. Going right, fewer patches are decided "
        f"by the network; of the surest {100 * half.coverage:.0f} % it calls {100 * half.error:.1f} % wrongly, of all "
        f"{error[0]:.1f} %. Measured on {operating.on}.",
    )


def confirmed_table(final: FinalFigures) -> Table:
    """The search's value of each confirmed trial beside the confirmed one."""
    rows = []
    for one in final.confirmed:
        values = ", ".join("diverged" if value is None else f"{value:.4f}" for value in one["values"])
        rows.append(
            (f"trial {one['trial']}", _number(one["search"]), values, _number(one["mean"]), _signed(one["drop"]))
        )
    mean = "" if final.mean_drop is None else f" Their mean is {final.mean_drop:+.4f}."
    return Table(
        ("trial", "search", "confirmed, by fold", "mean", "drop"),
        tuple(rows),
        "The best trials trained again with fresh seeds and scored on slides of another fold, the best of them first. The highest "
        f"of many scores is partly luck; the drop is that luck and how much harder the other slides are.{mean}",
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4f}"


def steps_table(final: FinalFigures) -> Table:
    """AUC and log-loss after each step, and the differences with their intervals."""
    rows = tuple(
        (
            str(step["name"]),
            f"{step['auc']:.4f}",
            _gain(step["auc_gain"]),
            f"{step['log_loss']:.4f}",
            _gain(step["loss_gain"]),
        )
        for step in final.steps
    )
    return Table(
        ("with", "AUC", "gained", "log-loss (nats)", "saved"),
        rows,
        "On the slides that the network has not seen, each line with one ingredient more than the line above. In brackets 95 % intervals of the difference, "
        "by Student's t over slides, both sides on the same draws. A temperature changes no order, so no AUC.",
    )


def _gain(gain: Mapping[str, Any] | None) -> str:
    if gain is None:
        return ""
    interval = gain["interval"]
    return f"{gain['value']:+.4f}" + ("" if interval is None else f" ({interval[0]:+.4f} to {interval[1]:+.4f})")


def steps_figure(final: FinalFigures) -> Picture:
    """A point and an interval for each difference, AUC left, log-loss right."""
    steps = [step for step in final.steps if step["auc_gain"] is not None]
    figure = new_figure(7.4, 1.4 + 0.42 * len(steps))
    grid = figure.add_gridspec(1, 2)
    panels = [figure.add_subplot(grid[0, place]) for place in range(2)]
    sides = (("auc_gain", "AUC gained", BLUE), ("loss_gain", "log-loss saved (nats)", VERMILION))
    for axes, (field, name, colour) in zip(panels, sides, strict=True):
        dress(axes, x=name, grid="x")
        axes.axvline(0, color=GREY, linestyle=":", linewidth=1.2)
        for place, step in enumerate(reversed(steps)):
            if (interval := step[field]["interval"]) is not None:
                axes.plot(interval, [place, place], color=GREY, linewidth=2)
            axes.plot([step[field]["value"]], [place], color=colour, marker="o")
        axes.set_yticks(range(len(steps)), [str(step["name"]) for step in reversed(steps)])
        axes.set_ylim(-0.6, len(steps) - 0.4)
    panels[1].set_yticklabels([])
    words = ", ".join(f"{step['name']} {step['auc_gain']['value']:+.4f}" for step in steps)
    shown = picture(
        figure,
        "ingredients.png",
        alt=f"AUC gained on slides that the network has not seen: {words}",
        caption="The same differences: right of the dotted line is better. An interval across the line may be chance.",
    )
    return Picture(shown.name, shown.png, shown.alt, shown.caption, wide=True)
