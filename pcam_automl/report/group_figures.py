"""AUC by scanner and by slide, and the slides that are called worst. Draws no curves over thresholds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pcam_automl.data.store import PatchStore
from pcam_automl.metrics import auc, auc_interval
from pcam_automl.report.blocks import Block, Picture, Table, Text, left_out
from pcam_automl.report.content import losses
from pcam_automl.report.style import BLUE, GREY, add_axes, new_figure, picture, shortened
from pcam_automl.scores import Scores

LEAST_PATCHES = 10
"""Fewer patches of a slide say nothing about it."""
_MOST_SLIDES = 30


@dataclass(frozen=True)
class GroupAuc:
    """AUC of a slide or domain with its 95 % interval."""

    name: str
    n: int
    auc: float
    low: float
    high: float


def group_aucs(
    scores: Scores, code: NDArray[np.int64], names: tuple[str, ...], cluster: NDArray[np.int64] | None
) -> list[GroupAuc]:
    """Of every group with both labels and enough patches, the worst first; ``cluster`` is the slide the draws are made over."""
    found = []
    for value in np.unique(code[code >= 0]).tolist():
        own = code == value
        label, prob = scores.label[own], scores.prob[own]
        if own.sum() >= LEAST_PATCHES and 0 < (label == 1).sum() < len(label):
            low, high = auc_interval(label, prob, None if cluster is None else cluster[own])
            found.append(GroupAuc(names[value], int(own.sum()), auc(label, prob), low, high))
    return sorted(found, key=lambda group: group.auc)


def group_blocks(store: PatchStore | None, scores: Scores) -> Iterator[Block]:
    """AUC by domain and by slide; where slides hold one label only, the slides that are called worst."""
    yield Text("By scanner and by slide", style="heading")
    if store is None:
        yield left_out("no pack was given, so slides and scanners are not known.")
        return
    slide, domain = (
        np.asarray(store.group)[scores.rows].astype(np.int64),
        np.asarray(store.domain)[scores.rows].astype(np.int64),
    )
    if domains := group_aucs(scores, domain, store.domain_names, slide):
        yield forest_figure(
            domains, "auc_domains.png", "scanner or centre", "Bars are 95 % intervals drawn over slides."
        )
    else:
        yield left_out("AUC by scanner or centre, since the data names none with both labels among the scored patches.")
    if slides := group_aucs(scores, slide, store.group_names, None):
        note = f"{len(slides)} slides have both labels and at least {LEAST_PATCHES} patches" + (
            f"; the worst {_MOST_SLIDES} are shown." if len(slides) > _MOST_SLIDES else "."
        )
        yield forest_figure(
            slides[:_MOST_SLIDES],
            "auc_slides.png",
            "slide",
            f"{note} Bars are 95 % intervals drawn over the slide's patches.",
        )
    elif (slide >= 0).any():
        yield left_out(
            f"AUC by slide: no slide has both labels among at least {LEAST_PATCHES} scored patches. The slides with the largest loss instead:"
        )
        yield worst_slides(store, scores, slide)
    else:
        yield left_out("AUC by slide, since no slide is known.")


def forest_figure(groups: list[GroupAuc], name: str, what: str, note: str) -> Picture:
    """A point and a bar for each group."""
    figure = new_figure(6.8, 1.1 + 0.28 * len(groups))
    axes = add_axes(figure, x="AUC", grid="x")
    for place, group in enumerate(reversed(groups)):
        axes.plot([group.low, group.high], [place, place], color=GREY, linewidth=2)
        axes.plot([group.auc], [place], color=BLUE, marker="o")
    axes.set_yticks(range(len(groups)), [f"{shortened(g.name)} ({g.n:,})" for g in reversed(groups)])
    axes.set_ylim(-0.6, len(groups) - 0.4)
    words = ", ".join(f"{g.name} {g.auc:.4f} ({g.low:.4f} to {g.high:.4f})" for g in groups[:10])
    return picture(
        figure,
        name,
        alt=f"AUC by {what}: {words}",
        caption=f"AUC by {what}, number of patches in brackets. A group far to the left of the others is stained, scanned or cut "
        f"otherwise, or hard; look at its patches. {note}",
    )


def worst_slides(store: PatchStore, scores: Scores, slide: NDArray[np.int64]) -> Table:
    """Ten slides by mean loss."""
    loss = losses(scores)
    rows = []
    for value in np.unique(slide[slide >= 0]).tolist():
        own = slide == value
        rows.append(
            (
                float(loss[own].mean()),
                store.group_names[value],
                int(own.sum()),
                float((scores.label[own] == 1).mean()),
                float(scores.prob[own].mean()),
            )
        )
    rows.sort(reverse=True)
    cells = tuple(
        (shortened(name), f"{n:,}", f"{100 * share:.0f} %", f"{prob:.2f}", f"{mean:.3f}")
        for mean, name, n, share, prob in rows[:10]
    )
    return Table(
        ("slide", "patches", "tumour", "mean probability", "mean loss"), cells, "Slides that are called worst."
    )
