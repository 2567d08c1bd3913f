"""Ctrl-C and SIGTERM as an orderly end. Stores nothing itself."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pcam_automl.errors import Interrupted


@contextmanager
def signals_held() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait for the end of the block, which must not be left half done; where this is the main thread, which they reach."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    held = (signal.SIGINT, signal.SIGTERM)
    earlier = {signum: signal.signal(signum, lambda number, _: came.append(number)) for signum in held}
    try:
        yield
    finally:
        for signum, handler in earlier.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        for number in came[:1]:
            signal.raise_signal(number)


ONE_SIGNAL_S = 1.0
"""SIGTERM that comes again so soon is the first one by another way, and no second request."""


class StopSignal:
    """Turns the first signal into :class:`Interrupted` at the next safe point, the second into one at once.

    A *safe point* is a call of :meth:`check` inside ``with stop.deferred():``; outside such a block a signal raises at once.
    """

    def __init__(self, how_to_go_on: str) -> None:
        self.how_to_go_on = how_to_go_on
        self._signum: int | None = None
        self._came_at = 0.0
        self._deferring = False

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self._signum is not None:
            raise Interrupted(f"interrupted by {signal.Signals(self._signum).name}; {self.how_to_go_on}", self._signum)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, the first signal waits for :meth:`check`."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if signum == self._signum == signal.SIGTERM and now - self._came_at < ONE_SIGNAL_S:
            return  # the same once more: systemd signals a whole group, and the parent its children
        first, self._signum, self._came_at = self._signum is None, signum, now
        if not (first and self._deferring):
            self.check()


@contextmanager
def stop_signal(how_to_go_on: str) -> Iterator[StopSignal]:
    """Handle SIGINT and SIGTERM for the block; the earlier handlers come back after it.

    Args:
        how_to_go_on: what the message says after "interrupted", e.g. the command that continues.
    """
    stop = StopSignal(how_to_go_on)
    earlier = {signum: signal.signal(signum, stop._handle) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for signum, handler in earlier.items():
            signal.signal(signum, handler)
