"""What commands have spent of a study's budget: the intervals that they write into it, and the parts that these add up to. Plans nothing.

Every command that spends of a budget writes an interval (when it began, how long it lasts) into the study; intervals that
overlap, of two terminals say, count once. Time between commands is free.
"""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import optuna

from pcam_automl.clock import process_age_s

RUN_KEY = "pcam_automl:run:"
FINALIZE = "finalize"
"""The command of a run that is no part of the search."""


class Ledger:
    """The entry of a process among a study's intervals. It begins with the process: imports are waited for, too.

    Args:
        study: where it is written.
        command: ``search`` or ``finalize``, for people.
        kept: whether anything is written; a study without a budget needs none.
        since: when it began, by ``time.monotonic``, for a process that has worked on other studies before.
    """

    def __init__(self, study: optuna.Study, command: str, *, kept: bool = True, since: float | None = None) -> None:
        self.study, self.command, self.kept = study, command, kept
        age_s = process_age_s() if since is None else time.monotonic() - since
        self.began_at = time.time() - age_s
        self._began = time.monotonic() - age_s
        self._key = f"{RUN_KEY}{uuid.uuid4().hex}"
        self._begun = False
        self._confirming: tuple[float, float | None] | None = None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def confirming(self, since_s: float) -> None:
        """It confirms trials: from then, in :attr:`seconds`, until :meth:`confirmed` or its end."""
        if self._confirming is None:
            self._confirming = (since_s, None)

    def confirmed(self) -> None:
        """Its confirmations, if there were any, are over."""
        if self._confirming is not None:
            self._confirming = (self._confirming[0], self.seconds)

    @property
    def confirm_s(self) -> float:
        """Of its seconds so far those that confirmations took."""
        if self._confirming is None:
            return 0.0
        since_s, until_s = self._confirming
        return (self.seconds if until_s is None else until_s) - since_s

    def note(self) -> None:
        """Write how long it has lasted so far; a killed process loses what it spent since."""
        if not self.kept:
            return
        self._begun = True
        entry = {"command": self.command, "began": round(self.began_at, 3), "seconds": round(self.seconds, 3)}
        if self._confirming is not None:
            entry["confirm_s"] = round(self.confirm_s, 3)
        self.study.set_user_attr(self._key, json.dumps(entry))

    @property
    def begun(self) -> bool:
        """Whether anything was written."""
        return self._begun

    def close(self) -> None:
        """Write how long it has lasted, if anything was written before: a command that was refused, or found all done, has spent nothing."""
        if self._begun:
            self.note()


@dataclass(frozen=True)
class Interval:
    """A command's run. Seconds since 1970, its length by a clock that is never set, and what of it confirmations took."""

    command: str
    began: float
    seconds: float
    confirm_s: float = 0.0


def intervals_of(study: optuna.Study) -> list[Interval]:
    """What was noted, by beginning."""
    return sorted(map(_interval, _run_texts(study.user_attrs)), key=lambda one: one.began)


def _run_texts(attrs: Mapping[str, Any]) -> list[str]:
    return [text for key, text in attrs.items() if key.startswith(RUN_KEY)]


def _interval(text: str) -> Interval:
    entry = json.loads(text)
    confirm_s = float(entry.get("confirm_s", 0.0))  # before 2026-12 a finalize did not tell them apart
    return Interval(str(entry["command"]), float(entry["began"]), float(entry["seconds"]), confirm_s)


def union_of_attrs(attrs: Mapping[str, Any]) -> float:
    """Seconds of the budget that the runs noted among a study's attributes have spent."""
    return union_seconds(map(_interval, _run_texts(attrs)))


def union_seconds(intervals: Iterable[Interval]) -> float:
    """Length of the union: time that two commands spent side by side counts once."""
    total, end = 0.0, float("-inf")
    for one in sorted(intervals, key=lambda one: one.began):
        stop = one.began + one.seconds
        total += max(0.0, stop - max(one.began, end))
        end = max(end, stop)
    return total


def added_by(intervals: Iterable[Interval]) -> list[tuple[str, float]]:
    """(command, seconds) of each interval, by its end, without what earlier ones cover: of a search that finalized at its end
    both parts. Together they are :func:`union_seconds`.
    """
    found: list[tuple[str, float]] = []
    seen: list[Interval] = []
    for one in sorted(intervals, key=lambda one: one.began + one.seconds):
        before = union_seconds(seen)
        seen.append(one)
        found.append((one.command, union_seconds(seen) - before))
    return found


@dataclass(frozen=True)
class Parts:
    """Seconds of a budget's parts, as planned or as spent.

    Attributes:
        search_s: start-up, packing and trials.
        confirm_s: the top trials again on other folds.
        final_s: final training and prediction, with finalize's start-up and the report's page.
    """

    search_s: float
    confirm_s: float
    final_s: float


def spent_parts(intervals: Iterable[Interval]) -> Parts:
    """What noted runs have spent of each part; together :func:`union_seconds`."""
    intervals = list(intervals)
    finalize_s = math.fsum(seconds for command, seconds in added_by(intervals) if command == FINALIZE)
    confirm_s = min(finalize_s, math.fsum(one.confirm_s for one in intervals))
    return Parts(max(0.0, union_seconds(intervals) - finalize_s), confirm_s, finalize_s - confirm_s)


def spent_s(study: optuna.Study) -> float:
    """Seconds of the budget that are spent by noted runs."""
    return union_seconds(intervals_of(study))


def spent_with(study: optuna.Study, age_s: float) -> float:
    """Seconds spent by noted runs and by this process, which has lived for ``age_s`` and may be among them."""
    now = time.time()
    return union_seconds([*intervals_of(study), Interval("", now - age_s, age_s)])
