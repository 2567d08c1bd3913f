"""How figures look: sizes, colours, axes. matplotlib by its objects alone, no global state; knows no data."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pcam_automl.report.blocks import Picture

# Okabe & Ito's palette (jfly.uni-koeln.de/color, 2008): told apart by every kind of colour vision.
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, GREY, INK = "#CC79A7", "#56B4E9", "#8A8A8A", "#222222"
NORMAL, TUMOUR = BLUE, VERMILION
SERIES = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY)
MAP = "cividis"
_DPI = 120


def new_figure(width_in: float = 6.4, height_in: float = 3.9) -> Figure:
    """An empty white figure."""
    return Figure(figsize=(width_in, height_in), dpi=_DPI, layout="constrained", facecolor="white")


def dress(axes: Axes, *, title: str = "", x: str = "", y: str = "", grid: str = "both") -> Axes:
    """Titles, a light grid, no box; ``grid`` is both, x, y or none."""
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel(x, fontsize=9.5, color=INK)
    axes.set_ylabel(y, fontsize=9.5, color=INK)
    axes.tick_params(labelsize=8.5, colors=INK, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    if grid != "none":
        axes.grid(True, axis=grid, color="#E4E4E8", linewidth=0.8)  # type: ignore[arg-type]
    return axes


def add_axes(figure: Figure, *, title: str = "", x: str = "", y: str = "", grid: str = "both") -> Axes:
    """The figure's only axes, dressed."""
    return dress(figure.add_subplot(), title=title, x=x, y=y, grid=grid)


def add_row(figure: Figure, n: int, ratios: Sequence[float] | None = None) -> list[Axes]:
    """``n`` axes side by side, still bare."""
    grid = figure.add_gridspec(1, n, width_ratios=ratios)
    return [figure.add_subplot(grid[0, place]) for place in range(n)]


def legend(axes: Axes, **options: Any) -> None:
    """A frameless legend."""
    axes.legend(frameon=False, fontsize=8.5, **options)


def legend_below(axes: Axes, ncols: int = 2) -> None:
    """A legend under the axis' name, where it can hide no line; the figure must be high enough for it."""
    legend(axes, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=ncols)


def picture(figure: Figure, name: str, *, alt: str, caption: str) -> Picture:
    """The figure as PNG; equal figures give equal bytes."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return Picture(name, buffer.getvalue(), alt, caption)


def shortened(text: str, limit: int = 26) -> str:
    """``text`` with its middle left out where it is longer than ``limit``."""
    keep = (limit - 1) // 2
    return text if len(text) <= limit else f"{text[:keep]}…{text[-keep:]}"
