"""What a person sees of several workers: one live table and a bar for the study. Decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pcam_automl import terminal


@dataclass
class WorkerRow:
    """A worker's line.

    Attributes:
        device: where it trains.
        text: what it does while it has no trial.
        trial: number of the running trial; None before the first.
        backbone: its network.
        rung: rungs that are scored, of ``n_rungs``.
        score: the objective at the last of them.
        images_per_s: training speed of that rung.
        views: shown so far, of ``total``.
    """

    device: str
    text: str = "starting"
    trial: int | None = None
    backbone: str = ""
    rung: int = 0
    n_rungs: int = 0
    score: float | None = None
    images_per_s: float | None = None
    views: int = 0
    total: int = 0

    def begins(self, trial: int, backbone: str, total: int) -> None:
        """A trial starts."""
        self.trial, self.backbone, self.total = trial, backbone, total
        self.rung, self.score, self.images_per_s, self.views, self.text = 0, None, None, 0, ""


class Board(terminal.Bars):
    """The bars of a command, with a table of workers above them; nothing where stderr is no terminal.

    Args:
        devices: of the workers, in the order of their numbers.
        n_rungs: of a trial.
        score: heading of the objective's column.
    """

    def __init__(self, devices: Sequence[str], n_rungs: int, score: str) -> None:
        super().__init__()
        self.rows = [WorkerRow(device, n_rungs=n_rungs) for device in devices]
        self.score = score
        self._live = Live(
            get_renderable=lambda: Group(self.table(), self._progress.get_renderable()),
            console=terminal.err,
            transient=True,
            refresh_per_second=4,
        )

    def __enter__(self) -> Board:
        if self.shown:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.shown:
            self._live.stop()

    def table(self) -> Table:
        """As it is now; narrow terminals lose the bars first, then the ends of the networks' names."""
        width = terminal.err.width
        grid = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
        for name in ("worker", "trial"):
            grid.add_column(name, justify="right", no_wrap=True)
        grid.add_column("backbone", no_wrap=True, overflow="ellipsis", max_width=28)
        grid.add_column("rung", justify="right", no_wrap=True)
        grid.add_column(self.score, justify="right", no_wrap=True)
        grid.add_column("images/s", justify="right", no_wrap=True)
        grid.add_column("device", no_wrap=True)
        if width >= 90:
            grid.add_column("views", no_wrap=True)
        for number, row in enumerate(self.rows):
            cells: list[str | Text | ProgressBar] = [
                str(number),
                "-" if row.trial is None else str(row.trial),
                escape(row.text or row.backbone),
                f"{row.rung}/{row.n_rungs}",
                "-" if row.score is None else f"{row.score:.4f}",
                "-" if row.images_per_s is None else f"{row.images_per_s:,.0f}",
                row.device,
            ]
            if width >= 90:
                cells.append(ProgressBar(total=max(1, row.total), completed=min(row.views, row.total), width=20))
            grid.add_row(*cells)
        return grid
