"""The picture of a learning-rate range test. Tests nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from pcam_automl.files import write_faults, written_whole
from pcam_automl.lr_find import LrCurve
from pcam_automl.report.style import SERIES, add_axes, legend, new_figure

STYLES = ("-", "--", "-.", ":")


def lr_figure(curves: Sequence[LrCurve], title: str) -> Figure:
    """Every curve in one plot, each suggestion marked on its own curve."""
    figure = new_figure(8.0, 4.8)
    axes = add_axes(figure, title=title, x="learning rate", y="training loss (smoothed, nats)")
    for number, curve in enumerate(curves):
        colour, label = SERIES[number % len(SERIES)], f"weight decay {curve.weight_decay:g}"
        if curve.suggestion is not None:
            label += f": suggested {curve.suggestion:.1e}"
            height = curve.loss[curve.lr.index(curve.suggestion)]
            axes.plot([curve.suggestion], [height], "o", color=colour, markersize=9, markeredgecolor="white", zorder=3)
        axes.plot(curve.lr, curve.loss, STYLES[number % len(STYLES)], color=colour, label=label, linewidth=2)
    axes.set_xscale("log")
    legend(axes)
    return figure


def write_lr_figure(curves: Sequence[LrCurve], path: Path, *, title: str) -> None:
    """The plot as PNG, whole or not at all."""
    with write_faults(path), written_whole(path) as partial, partial.open("wb") as file:
        lr_figure(curves, title).savefig(file, format="png")
