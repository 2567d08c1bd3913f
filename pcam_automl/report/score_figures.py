"""The section on the scores: ROC, precision-recall, confusion, calibration. Slides and domains are in group_figures.py."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

import numpy as np
from matplotlib.ticker import StrMethodFormatter
from numpy.typing import NDArray

from pcam_automl.calibration import reliability
from pcam_automl.metrics import Confusion, accuracy, auc, auc_interval, confusion, log_loss, n_independent
from pcam_automl.report.blocks import Block, Facts, Picture, Section, Text, left_out
from pcam_automl.report.content import PATCH, MapFigures, Noun, ReportContent, both_labels, clusters_of
from pcam_automl.report.decision_figures import decision_blocks
from pcam_automl.report.group_figures import group_blocks
from pcam_automl.report.style import (
    BLUE,
    GREY,
    INK,
    MAP,
    NORMAL,
    TUMOUR,
    add_axes,
    dress,
    legend,
    legend_below,
    new_figure,
    picture,
)
from pcam_automl.scores import Scores

FEW_CLUSTERS = 10
"""Fewer slides (or patches, images) than this: draws of so few leave out most ways in which others may differ."""
_MOST_POINTS = 2000


def score_section(content: ReportContent) -> Section:
    """Everything about the final network's probabilities; a sentence where there are none."""
    title, scores = "How good it is", content.scores
    if scores is None or not len(scores.rows):
        why = "no labelled patches were scored, so there is nothing to compare."
        return Section("scores", title, (left_out(why), *stage_blocks(content)))
    blocks: list[Block] = [
        Text(_measured_on(content, scores)),
        score_facts(content, scores),
    ]
    if content.test_maps is not None:
        blocks += [Text(f"Measured on {content.test_maps.on}."), facts_on_test(content.test_maps)]
    noun = content.of_scores
    if both_labels(scores):
        blocks += [roc_figure(scores, noun), precision_figure(scores, content.threshold, noun)]
    else:
        blocks.append(left_out(f"ROC and precision-recall, since all scored {noun.many} have the same label."))
    counts = confusion(scores.label, scores.prob, content.threshold)
    blocks.append(confusion_figure(counts, content.threshold, "confusion.png", scores.on, noun))
    blocks += [calibration_figure(scores, noun), *stage_blocks(content), *decision_blocks(content)]
    blocks += group_blocks(content.store, scores, content.of_store)
    return Section("scores", title, tuple(blocks))


def _measured_on(content: ReportContent, scores: Scores) -> str:
    if not content.dense:
        n = f"{len(scores.rows):,} patches"
        return f"Measured on {scores.on}." if n in scores.on else f"Measured on {n}: {scores.on}."
    every = " Dice and pixel accuracy are over every pixel of these images." if content.on_maps is content.maps else ""
    return f"Measured on {scores.on}.{every}"


def score_facts(content: ReportContent, scores: Scores) -> Facts:
    """AUC and its interval, accuracy, sensitivity, specificity, loss; of a dense task Dice and the baseline, too."""
    facts = []
    if both_labels(scores):
        pixel = "pixel " if content.dense else ""
        facts.append((f"{auc(scores.label, scores.prob):.4f}", f"{pixel}AUC ({interval_text(content, scores)})"))
    counts = confusion(scores.label, scores.prob, content.threshold)
    if (maps := content.on_maps) is not None:
        facts += maps.facts(content.threshold)
    else:
        right = 100 * accuracy(scores.label, scores.prob, content.threshold)
        facts.append((f"{right:.1f} %", "called rightly (accuracy)"))
    if positives := counts.true_positive + counts.false_negative:
        facts.append((f"{100 * counts.true_positive / positives:.1f} %", "of tumour found (sensitivity)"))
    if negatives := counts.true_negative + counts.false_positive:
        facts.append((f"{100 * counts.true_negative / negatives:.1f} %", "of normal left alone (specificity)"))
    facts.append((f"{log_loss(scores.label, scores.prob):.4f}", "log-loss (nats)"))
    return Facts(tuple(facts))


def interval_text(content: ReportContent, scores: Scores) -> str:
    """The AUC's 95 % interval and what it is drawn over; why there is none, where all is of one slide."""
    cluster, store = clusters_of(content.store, scores), content.store
    unknown = None if store is None else np.asarray(store.group)[scores.rows] < 0
    slides = unknown is not None and not unknown.all()
    over, n = "slides" if slides else content.of_store.many, len(np.unique(cluster))
    alone = 0 if unknown is None or not slides else int(unknown.sum())  # each for itself
    if n < 2:
        return f"no interval: all of one {over.removesuffix('s') if slides else content.of_store.one}"
    if (n_of_label := n_independent(scores.label, cluster)) < 2:
        return f"no interval: all of a label are of one {over.removesuffix('s') if slides else content.of_store.one}"
    low, high = auc_interval(scores.label, scores.prob, cluster)
    rare = f", {n_of_label:,} of which hold the rarer label" if n_of_label < n else ""
    others = f" and {_counted(alone, content.of_store.many)} of no known slide" if alone else ""
    few = ", so a rough guess" if n_of_label < FEW_CLUSTERS else ""
    return f"95 %: {low:.4f} to {high:.4f}, drawn over {_counted(n - alone, over)}{others}{rare}{few}"


def _counted(n: int, many: str) -> str:
    return f"{n:,} {many.removesuffix('s') if n == 1 and many == 'slides' else many}"


def facts_on_test(maps: MapFigures) -> Facts:
    """The figures of the test images' maps."""
    pixel_auc = [] if maps.auc is None else [(f"{maps.auc:.4f}", "pixel AUC")]
    return Facts((*pixel_auc, *maps.facts(0.5)))


def _thinned(*curves: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """At most 2,000 points of each: a line on paper shows no more."""
    keep = np.unique(np.linspace(0, len(curves[0]) - 1, min(len(curves[0]), _MOST_POINTS)).round().astype(int))
    return [curve[keep] for curve in curves]


def roc_figure(scores: Scores, noun: Noun = PATCH) -> Picture:
    """The ROC curve with its area."""
    from sklearn.metrics import roc_curve

    false, true, _ = roc_curve(scores.label, scores.prob)
    false, true = _thinned(false, true)
    area = auc(scores.label, scores.prob)
    figure = new_figure(5.0, 4.4)
    axes = add_axes(figure, x=f"normal {noun.many} called tumour (%)", y=f"tumour {noun.many} found (%)")
    axes.plot([0, 100], [0, 100], color=GREY, linestyle=":", linewidth=1.2, label="chance, AUC 0.5")
    axes.plot(100 * false, 100 * true, color=BLUE, linewidth=2, label=f"network, AUC {area:.4f}")
    axes.set_aspect("equal")
    legend(axes, loc="lower right")
    return picture(
        figure,
        "roc.png",
        alt=f"ROC curve with an area of {area:.4f}",
        caption="Every possible threshold at once. The closer the line comes to the upper left corner, the better tumour and "
        f"normal are told apart; the area (AUC) is the chance that a tumour {noun.one} is ranked above a normal one.",
    )


def precision_figure(scores: Scores, threshold: float, noun: Noun = PATCH) -> Picture:
    """Precision against recall, the threshold marked."""
    from sklearn.metrics import average_precision_score, precision_recall_curve

    precision, recall, _ = precision_recall_curve(scores.label, scores.prob)
    precision, recall = _thinned(precision, recall)
    average = float(average_precision_score(scores.label, scores.prob))
    counts = confusion(scores.label, scores.prob, threshold)
    share = 100 * float((scores.label == 1).mean())
    figure = new_figure(5.0, 4.7)
    axes = add_axes(
        figure, x=f"tumour {noun.many} found (%, recall)", y="calls of tumour that are right (%, precision)"
    )
    axes.axhline(share, color=GREY, linestyle=":", linewidth=1.2, label=f"chance, {share:.0f} %")
    axes.plot(100 * recall, 100 * precision, color=BLUE, linewidth=2, label=f"network, average {average:.4f}")
    if called := counts.true_positive + counts.false_positive:
        place = (
            100 * counts.true_positive / (counts.true_positive + counts.false_negative),
            100 * counts.true_positive / called,
        )
        axes.plot(*place, marker="o", markersize=8, linestyle="", color=TUMOUR, label=f"threshold {threshold:g}")
    axes.set_ylim(0, 103)
    legend_below(axes)
    dot = "The dot is the chosen threshold." if called else f"At the threshold {threshold:g} nothing is called tumour."
    return picture(
        figure,
        "precision_recall.png",
        alt=f"Precision against recall, average precision {average:.4f}",
        caption=f"How many false alarms it costs to find more tumour. {dot}",
    )


def confusion_figure(counts: Confusion, threshold: float, name: str, on: str, noun: Noun = PATCH) -> Picture:
    """The four counts as a coloured table."""
    cells = np.array([[counts.true_negative, counts.false_positive], [counts.false_negative, counts.true_positive]])
    share = cells / np.maximum(cells.sum(axis=1, keepdims=True), 1)
    figure = new_figure(4.6, 3.4)
    axes = dress(
        figure.add_subplot(),
        title=textwrap.fill(on, 40),
        x=f"called, at threshold {threshold:g}",
        y="truth",
        grid="none",
    )
    axes.imshow(share, cmap=MAP, vmin=0, vmax=1, aspect="auto")
    for (line, column), n in np.ndenumerate(cells):
        colour = "black" if share[line, column] > 0.55 else "white"
        axes.text(
            column,
            line,
            f"{n:,}\n{100 * share[line, column]:.1f} %",
            ha="center",
            va="center",
            color=colour,
            fontsize=12,
        )
    axes.set_xticks([0, 1], ["no tumour", "tumour"])
    axes.set_yticks([0, 1], ["no tumour", "tumour"])
    return picture(
        figure,
        name,
        alt=f"Confusion matrix: {counts.true_negative} true negative, {counts.false_positive} false positive, "
        f"{counts.false_negative} false negative, {counts.true_positive} true positive",
        caption=f"Right calls lie on the diagonal. Lower left: {counts.false_negative:,} tumour {noun.many} missed; upper right: "
        f"{counts.false_positive:,} false alarms. Percentages are of each line.",
    )


def stage_blocks(content: ReportContent) -> Iterator[Block]:
    """A confusion matrix behind each stage of the training."""
    if content.stages:
        yield Text("After each stage", style="heading")
    for number, (name, scores) in enumerate(content.stages, 1):
        counts = confusion(scores.label, scores.prob, content.threshold)
        file, on = f"confusion_stage_{number}.png", f"{name}: {scores.on}"
        yield confusion_figure(counts, content.threshold, file, on, content.of_scores)


def calibration_figure(scores: Scores, noun: Noun = PATCH) -> Picture:
    """Share of tumour by probability, and how many patches each point stands for."""
    bins = reliability(scores.label, scores.prob)
    full = bins.n > 0
    figure = new_figure(5.4, 5.2)
    grid = figure.add_gridspec(2, 1, height_ratios=(3, 1.2))
    upper, lower = figure.add_subplot(grid[0]), figure.add_subplot(grid[1])
    dress(upper, y=f"{noun.many} that are tumour (%)")
    upper.plot([0, 1], [0, 100], color=GREY, linestyle=":", linewidth=1.2, label="honest probabilities")
    low, high = 100 * bins.share_bounds()[:, full]
    share, at = 100 * bins.share[full], bins.mean_prob[full]
    upper.errorbar(
        at,
        share,
        yerr=np.clip((share - low, high - share), 0.0, None),
        color=BLUE,
        ecolor=GREY,
        elinewidth=1.6,
        marker="o",
        linewidth=0.8,
        label=f"network, mean error {100 * bins.error:.1f} %",
    )
    legend(upper, loc="upper left")
    dress(lower, x="probability of tumour", y=noun.many, grid="y")
    left, width = bins.edges[:-1], 1.0 / len(bins.n)
    lower.bar(left, bins.n_normal, width, align="edge", color=NORMAL, edgecolor="white", label="no tumour")
    lower.bar(
        left, bins.n_tumour, width, bottom=bins.n_normal, align="edge", color=TUMOUR, edgecolor="white", label="tumour"
    )
    for x, n in zip(left, bins.n, strict=True):
        lower.text(x + width / 2, n, f"{n:,}", ha="center", va="bottom", fontsize=7, color=INK)
    lower.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    lower.set_ylim(0, 1.5 * bins.n.max())  # room for the legend above the highest bar
    legend(lower, loc="upper center", ncols=2)
    for axes in (upper, lower):
        axes.set_xlim(0, 1)
    return picture(
        figure,
        "calibration.png",
        alt=f"Calibration curve in {len(bins.n)} bins, expected calibration error {bins.error:.4f}",
        caption=f"Can the probabilities be believed? On the dotted line, of all {noun.many} given 0.8, 80 % are tumour. Below it the "
        f"network is too sure of tumour, above it too timid. Grey lines are what chance allows (Wilson's 95 %, {noun.many} taken as independent): points that stand for few "
        f"{noun.many} wander, and only those whose line misses the dotted one say something.",
    )
