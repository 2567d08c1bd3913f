"""How long this process has lived, for budgets of wall clock. Imports nothing slow."""

from __future__ import annotations

import time

_IMPORTED = time.monotonic()  # the command line imports this first: Python itself starts in some 0.05 s


def process_age_s() -> float:
    """Seconds since the package's command line began to load."""
    return time.monotonic() - _IMPORTED
