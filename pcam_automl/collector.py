"""How often Python's collector looks for cycles. Imports nothing that computes: it is set before torch is imported."""

from __future__ import annotations

import gc

THRESHOLDS = (100_000, 20, 20)
"""Python's own are 700, 10 and 10 (2,000 from 3.13 on). Nothing that torch, timm and Optuna leave behind when they are imported is a cycle of
garbage, and looking for one 1,100 times among 450,000 objects is a quarter of the seconds that the imports take (DECISIONS.md, 2026-11-29)."""


def collect_rarely() -> None:
    """Let the collector of this process look for cycles more rarely; what a trial leaves is collected at its end as before.

    For programs, not for a library's import: the command line does it first, and so do the processes that it spawns, which import it first.
    """
    gc.set_threshold(*THRESHOLDS)
