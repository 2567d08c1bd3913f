"""The domains as a picture: some patches of each beside a scatter of the stains. Estimates nothing."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from pcam_automl.data.stains import stain_table
from pcam_automl.data.store import PatchStore
from pcam_automl.report.blocks import Block, Picture, left_out
from pcam_automl.report.content import PATCH, Noun
from pcam_automl.report.patch_sheets import patch_of
from pcam_automl.report.style import GREY, INK, SERIES, dress, new_figure, picture, shortened

N_PATCHES, MOST_DOMAINS = 6, 6
"""Patches shown of a domain, and domains shown, the largest first."""
_MOST_ROWS = 4_000
_MARKERS = ("o", "^", "s", "D", "v", "P")

Ints = NDArray[np.int64]


def domain_blocks(store: PatchStore, noun: Noun = PATCH) -> Iterator[Block]:
    """The picture; a sentence where no domain is known."""
    drawn = domain_figure(store, noun)
    if drawn is None:
        yield left_out("the domains: the data name none, and none were estimated (`search --domains estimate`).")
    else:
        yield drawn


def domain_figure(store: PatchStore, noun: Noun = PATCH) -> Picture | None:
    """A line of patches for each domain and the stain of every slide; None where no patch to learn from has a domain.

    Args:
        store: under the study's domains.
        noun: of its rows.
    """
    rows = store.development_rows()
    domain = np.asarray(store.domain)[rows].astype(np.int64)
    known = domain[domain >= 0]
    if not len(known):
        return None
    sizes = np.bincount(known, minlength=len(store.domain_names))
    shown = np.argsort(-sizes, kind="stable")[: min(MOST_DOMAINS, int((sizes > 0).sum()))]
    lines = len(shown)
    figure = new_figure(9.4, max(3.6, 0.95 * lines + 0.8))
    grid = figure.add_gridspec(lines, N_PATCHES + 1, width_ratios=[1.0] * N_PATCHES + [5.2])
    for line, code in enumerate(shown.tolist()):
        own = rows[domain == code]
        chosen = own[np.linspace(0, len(own) - 1, min(N_PATCHES, len(own))).round().astype(np.int64)]
        for column, row in enumerate(chosen.tolist()):
            name = shortened(store.domain_names[code], 40) if column == 0 else ""
            _patch(figure.add_subplot(grid[line, column]), patch_of(store, row), SERIES[line], name)
    axes = dress(
        figure.add_subplot(grid[:, N_PATCHES]),
        x="red, share of the optical density (%)",
        y="blue, share of the optical density (%)",
    )
    what = _scatter(axes, store, rows, shown, sizes)
    names = ", ".join(f"{store.domain_names[code]} ({sizes[code]:,} {noun.many})" for code in shown.tolist())
    return picture(
        figure,
        "domains.png",
        alt=f"{noun.many.capitalize()} and stains of the domains: {names}",
        caption=f"On the left {noun.many} of each domain, on the right the stain of every {what}: which share of the light that "
        "its tissue absorbs is red, and which blue. Clouds that lie apart were stained or scanned otherwise; a network that "
        "was trained on one may fail on the other. Where they overlap, the domains differ in something else than colour."
        + (f" The {MOST_DOMAINS} largest are shown." if int((sizes > 0).sum()) > MOST_DOMAINS else ""),
    )


def _patch(axes: Axes, pixels: NDArray[np.uint8], colour: str, name: str) -> None:
    axes.imshow(pixels)
    axes.set_title(name, loc="left", fontsize=8.5, color=INK)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(colour)
        spine.set_linewidth(2.5)


def _scatter(axes: Axes, store: PatchStore, rows: Ints, shown: Ints, sizes: Ints) -> str:
    """Draw the stains; returns what a point is."""
    few = rows if (np.asarray(store.group)[rows] >= 0).all() else rows[:: -(-len(rows) // _MOST_ROWS)]
    table = stain_table(store, few)
    domain = np.asarray(store.domain)[few].astype(np.int64)
    counts = np.zeros((len(table.shares), len(sizes) + 1), np.int64)
    np.add.at(counts, (table.unit, domain), 1)  # unknown ones, -1, are counted in the last column
    of_unit = counts.argmax(axis=1)
    rest = ~np.isin(of_unit, shown)
    red, blue = 100 * table.shares.T
    axes.scatter(red[rest], blue[rest], color=GREY, marker="x", s=16)
    handles = []
    for line, code in enumerate(shown.tolist()):
        colour, marker = SERIES[line], _MARKERS[line]
        own = of_unit == code
        axes.scatter(red[own], blue[own], color=colour, marker=marker, s=26, alpha=0.75, edgecolor=INK, linewidth=0.4)
        name = f"{shortened(store.domain_names[code], 18)} ({sizes[code]:,})"
        handles.append(
            Line2D(
                [],
                [],
                linestyle="none",
                color=colour,
                marker=marker,
                markeredgecolor=INK,
                markeredgewidth=0.4,
                label=name,
            )
        )
    axes.legend(handles=handles, frameon=False, fontsize=8.5)
    return "slide" if table.is_slide.all() else "patch" if not table.is_slide.any() else "slide (or patch of no slide)"
