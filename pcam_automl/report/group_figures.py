"""AUC by scanner and by slide, and the slides that are called worst. Draws no curves over thresholds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pcam_automl.data.store import PatchStore
from pcam_automl.metrics import LEAST_OF_A_LABEL, auc, auc_interval, n_independent, scorable_domains
from pcam_automl.report.blocks import Block, Picture, Table, Text, left_out
from pcam_automl.report.content import PATCH, SLIDE, Noun, clusters_of, losses
from pcam_automl.report.style import BLUE, GREY, add_axes, new_figure, picture, shortened
from pcam_automl.scores import Scores

LEAST_ROWS = 10
"""Fewer patches (of a dense task images) of a slide say nothing about it."""
_MOST_SLIDES = 30


@dataclass(frozen=True)
class GroupAuc:
    """AUC of a slide or domain with its 95 % interval.

    Attributes:
        name: of the slide or domain.
        n: its scored patches, of a dense task images.
        auc: over its patches, of a dense task over its pixels.
        interval: None where all is of one slide or image, which says nothing of others.
    """

    name: str
    n: int
    auc: float
    interval: tuple[float, float] | None


def group_aucs(
    scores: Scores, code: NDArray[np.int64], names: tuple[str, ...], cluster: NDArray[np.int64]
) -> list[GroupAuc]:
    """Of every group with both labels and enough patches or images, the worst first.

    Args:
        scores: n of them.
        code: (n,) the group of each, negative where unknown.
        names: of the groups.
        cluster: (n,) what the interval's draws are made over: slides, or patches and images.
    """
    found = []
    for value in np.unique(code[code >= 0]).tolist():
        own = code == value
        label, prob, n = scores.label[own], scores.prob[own], len(np.unique(scores.rows[own]))
        if n >= LEAST_ROWS and 0 < (label == 1).sum() < len(label):
            several = n_independent(label, cluster[own]) > 1
            interval = auc_interval(label, prob, cluster[own]) if several else None
            found.append(GroupAuc(names[value], n, auc(label, prob), interval))
    return sorted(found, key=lambda group: group.auc)


def group_blocks(store: PatchStore | None, scores: Scores, of_store: Noun = PATCH) -> Iterator[Block]:
    """AUC by domain and by slide; where slides hold one label only, the slides that are called worst."""
    yield Text("By scanner and by slide", style="heading")
    if store is None:
        yield left_out("no pack was given, so slides and scanners are not known.")
        return
    many, rows = of_store.many, np.asarray(scores.rows, np.int64)
    slide = np.asarray(store.group)[rows].astype(np.int64)
    domain = np.asarray(store.domain)[rows].astype(np.int64)
    is_scored = np.isin(domain, scorable_domains(scores.label, domain))  # as in every other figure by domain
    if domains := group_aucs(scores, np.where(is_scored, domain, -1), store.domain_names, clusters_of(store, scores)):
        over = SLIDE if (slide >= 0).any() else of_store
        note = f"Bars are 95 % intervals drawn over {over.many}."
        yield forest_figure(domains, "auc_domains.png", "scanner or centre", note, of_store, over)
    else:
        yield left_out(
            f"AUC by scanner or centre, since no known one has {LEAST_OF_A_LABEL} of either label and {LEAST_ROWS} scored {many}."
        )
    if slides := group_aucs(scores, slide, store.group_names, rows):
        verb = "1 slide has" if len(slides) == 1 else f"{len(slides)} slides have"
        note = f"{verb} both labels and at least {LEAST_ROWS} {many}" + (
            f"; the worst {_MOST_SLIDES} are shown." if len(slides) > _MOST_SLIDES else "."
        )
        note = f"{note} Bars are 95 % intervals drawn over the slide's {many}."
        yield forest_figure(slides[:_MOST_SLIDES], "auc_slides.png", "slide", note, of_store)
    elif (slide >= 0).any():
        yield left_out(
            f"AUC by slide: no slide has both labels among at least {LEAST_ROWS} scored {many}. The slides with the "
            "largest loss instead:"
        )
        yield worst_slides(store, scores, slide, of_store)
    else:
        yield left_out("AUC by slide, since no slide is known.")


def forest_figure(
    groups: list[GroupAuc], name: str, what: str, note: str, of_store: Noun = PATCH, over: Noun | None = None
) -> Picture:
    """A point and a bar for each group; ``over`` is what the intervals are drawn over, by default the patches."""
    figure = new_figure(6.8, 1.3 + 0.28 * len(groups))
    x = "AUC" if of_store == PATCH else "AUC over pixels"
    axes = add_axes(figure, title=f"{what} (number of {of_store.many})", x=x, grid="x")
    for place, group in enumerate(reversed(groups)):
        if group.interval is not None:
            axes.plot(group.interval, [place, place], color=GREY, linewidth=2)
        axes.plot([group.auc], [place], color=BLUE, marker="o")
    axes.set_yticks(range(len(groups)), [f"{shortened(g.name)} ({g.n:,})" for g in reversed(groups)])
    axes.set_ylim(-0.6, len(groups) - 0.4)
    words = ", ".join(f"{g.name} {g.auc:.4f} ({_words(g.interval)})" for g in groups[:10])
    alone = (
        f" One without a bar has all of a label in a single {(over or of_store).one}."
        if any(g.interval is None for g in groups)
        else ""
    )
    return picture(
        figure,
        name,
        alt=f"AUC by {what}: {words}",
        caption=f"AUC by {what}, number of {of_store.many} in brackets. A group far to the left of the others is stained, scanned "
        f"or cut otherwise, or hard; look at its {of_store.many}. {note}{alone}",
    )


def _words(interval: tuple[float, float] | None) -> str:
    return "no interval" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"


def worst_slides(store: PatchStore, scores: Scores, slide: NDArray[np.int64], of_store: Noun = PATCH) -> Table:
    """Ten slides by mean loss."""
    loss = losses(scores)
    rows = []
    for value in np.unique(slide[slide >= 0]).tolist():
        own = slide == value
        share, prob = float((scores.label[own] == 1).mean()), float(scores.prob[own].mean())
        rows.append((float(loss[own].mean()), store.group_names[value], len(np.unique(scores.rows[own])), share, prob))
    rows.sort(reverse=True)
    cells = tuple(
        (shortened(name), f"{n:,}", f"{100 * share:.0f} %", f"{prob:.2f}", f"{mean:.3f}")
        for mean, name, n, share, prob in rows[:10]
    )
    tumour = "tumour" if of_store == PATCH else "tumour pixels"
    header = ("slide", of_store.many, tumour, "mean probability", "mean loss (nats)")
    return Table(header, cells, "Slides that are called worst.")
