"""How long a report will take here, told before it is drawn. Draws a figure of nothing, and keeps none."""

from __future__ import annotations

import time

from pcam_automl.report.style import add_axes, legend, new_figure, picture

FIGURES = 130.0
"""A report takes as long as so many plain figures: 98 to 109 of studies of 2 and 40 trials, with one core and with two (by hand, 2026-11-30),
and a fifth more for larger networks' tables and maps."""


def expected_seconds() -> float:
    """Seconds that a report's page is expected to take on this machine as busy as it is now. matplotlib is imported for good and its fonts are
    read, so that the report need not.
    """
    _seconds_of_a_figure()
    return FIGURES * min(_seconds_of_a_figure(), _seconds_of_a_figure())


def _seconds_of_a_figure() -> float:
    began = time.perf_counter()
    figure = new_figure()
    axes = add_axes(figure, title="title", x="x", y="y")
    axes.plot(range(100), range(100), label="label")
    legend(axes)
    picture(figure, "rehearsal.png", alt="", caption="")
    return time.perf_counter() - began
