"""The checkpoints of paused lineages on the disk: which there are, how large, which are given up. Trains nothing."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from optuna.trial import FrozenTrial

from pcam_automl.search.lineages import lineages_of
from pcam_automl.search.promotion import to_give_up
from pcam_automl.training.checkpoint import keep_newest

DEFAULT_QUOTA_BYTES = 5_000_000_000


def is_held(folder: Path, lineage: str) -> bool:
    """Whether the lineage has left a checkpoint (its soundness is checked when it is read)."""
    return any((folder / lineage).glob("[0-9]*/state.json"))


def trim(folder: Path, lineage: str) -> None:
    """Keep of a lineage that stops for now only its newest checkpoint."""
    if (folder / lineage).is_dir():
        keep_newest(folder / lineage, 1)


def keep_within(
    folder: Path,
    trials: Sequence[FrozenTrial],
    steps: Sequence[int],
    *,
    quota_bytes: int,
    sign: float,
    settle: Callable[[], None] = lambda: None,
    keep: Callable[[], Collection[str]] = tuple,
) -> list[str]:
    """Remove checkpoints, the least promising first, until the folder is within the quota; returns whose are gone.

    Args:
        folder: ``studies/<study>/checkpoints``.
        trials: every row of the study.
        steps: what the rungs report at.
        quota_bytes: what may stay.
        sign: 1 where larger values are better.
        settle: called before anything is removed, so that no checkpoint of this process is still being written.
        keep: gives the lineages that stay: those that a slot waits for somebody to go on with, whose last row was interrupted or lost.
    """
    if not folder.is_dir():
        return []
    names = [entry.name for entry in sorted(folder.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]
    held = [(name, _size(folder / name)) for name in names]
    if sum(size for _, size in held) <= quota_bytes:
        return []
    settle()
    gone = to_give_up(held, lineages_of(trials), steps, quota_bytes=quota_bytes, keep=keep(), sign=sign)
    for name in gone:
        shutil.rmtree(folder / name, ignore_errors=True)  # another worker may be at the same
    return gone


def _size(folder: Path) -> int:
    """Bytes of what is there now: a checkpoint may be just being written or replaced, by this process's writer or another's."""
    total = 0
    for parent, _, files in os.walk(folder):  # leaves out what vanishes before it is listed
        for name in files:
            with contextlib.suppress(FileNotFoundError):
                total += (Path(parent) / name).stat().st_size
    return total
