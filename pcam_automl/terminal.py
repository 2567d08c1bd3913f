"""What people see while something runs: notes, bars with the time left, tables. Decides nothing."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from pcam_automl.search.storage_url import safe_url

if TYPE_CHECKING:
    from rich.progress import TaskID

# stdout carries results (and --json), stderr everything else, so that `pcam-automl ... --json | jq` works.
# Without emoji: rich would load their 3,600 names (30 ms), and turn a `:lock:` in a message into a picture.
out = Console(highlight=False, soft_wrap=True, emoji=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


FILE_COLUMNS = 160
"""Width of tables that go into a file or a pipe, where nothing is gained by squeezing columns."""


def mute() -> None:
    """Nothing of this process is shown: another one of the same job speaks for all."""
    out.quiet = err.quiet = True
    PLAIN.on = True


class PLAIN:
    """``--plain``: no bars, a time before each line; for logs.

    On from the start where PCAM_AUTOML_PLAIN is set (not to 0), and, unless it is set to 0, in a notebook's cell, which looks like a terminal but keeps every line of a table
    that is drawn anew.
    """

    on = os.environ.get("PCAM_AUTOML_PLAIN", os.environ.get("JPY_PARENT_PID", "")) not in ("", "0")


def say(text: str) -> None:
    """One line to stderr, as it is (no markup is read from it)."""
    err.print((time.strftime("%Y-%m-%d %H:%M:%S ") if PLAIN.on else "") + escape(text))


def result(text: str) -> None:
    """One line to stdout."""
    out.print(escape(text))


def print_json(value: Any) -> None:
    """The value as one JSON document on stdout; NaN becomes null."""
    sys.stdout.write(json.dumps(_finite(value), indent=2) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and value - value != 0:
        return None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout; columns after the first are right-aligned."""
    from rich.table import Table

    grid = Table(title=escape(title), title_justify="left", header_style="bold")
    for number, name in enumerate(header):
        grid.add_column(escape(name), justify="left" if number == 0 else "right")
    for row in rows:
        grid.add_row(*map(escape, row))
    Console(highlight=False, emoji=False, width=None if out.is_terminal else FILE_COLUMNS).print(grid)


def this_command() -> str:
    """What the user typed, to be shown under "how to reproduce" and kept; a storage's password is left out."""
    return shlex.join(["pcam-automl", *map(safe_url, sys.argv[1:])])


def duration(seconds: float) -> str:
    """``42 s``, ``3 min 05 s``, ``1 h 20 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Bars:
    """Progress bars on stderr; nothing at all where stderr is not a terminal."""

    def __init__(self) -> None:
        # Imported here: 50 ms that `status` and other commands without bars need not wait for.
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.shown = err.is_terminal and not PLAIN.on
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=err,
            transient=True,
            disable=not self.shown,
        )

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def add(self, text: str, total: float | None) -> TaskID:
        return self._progress.add_task(escape(text), total=total)

    def set(
        self, task: TaskID, *, text: str | None = None, total: float | None = None, done: float | None = None
    ) -> None:
        changes: dict[str, Any] = {"total": total, "completed": done}
        if text is not None:
            changes["description"] = escape(text)
        self._progress.update(task, **{k: v for k, v in changes.items() if v is not None})

    def restart(self, task: TaskID, text: str, total: float) -> None:
        """Begin the bar anew, its clock too."""
        self._progress.reset(task, total=total, completed=0, description=escape(text))

    def step(self, task: TaskID, n: float = 1) -> None:
        self._progress.advance(task, n)


@contextmanager
def counting(text: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for work that reports (done, total)."""
    with Bars() as bars:
        task = bars.add(text, None)
        yield lambda done, total: bars.set(task, total=total, done=done)
