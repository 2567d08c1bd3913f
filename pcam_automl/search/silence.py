"""Which claims and running rows nobody works on any more, judged by signs of life alone. Ends nothing itself.

A sign of life is whatever changes: a row's heartbeat, or its claim in the table of slots. Each observer takes one for silent
that it has seen unchanged for the grace period by its own monotonic clock, so that clocks that differ, or jump, decide nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import sqlalchemy as sa
from optuna.storages._rdb import models
from optuna.trial import TrialState

from pcam_automl.search.patience import retry_transient
from pcam_automl.search.slots import Slot, Slots, owner_alive

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
logger = logging.getLogger(__name__)
LOOKS_A_GRACE = 5
"""Looks in a grace period: what falls silent is noticed within 1.2 of it."""
BUSY_S = 5.0
"""A busy machine delays a look by so much; more, and it was the database or the observer that was away."""
LEAST_HEARTBEAT_S, MOST_HEARTBEAT_S = 1, 60
"""Heartbeats are writes, and their times are kept in whole seconds."""


def heartbeat_seconds(grace_s: float) -> int:
    """Seconds between the heartbeats of a running trial: five in a grace period, at most one a second, at least one a minute."""
    return round(min(MOST_HEARTBEAT_S, max(LEAST_HEARTBEAT_S, grace_s / LOOKS_A_GRACE)))


@dataclass(frozen=True)
class Silent:
    """What gave no sign of life for the grace period.

    Attributes:
        slots: claims as they were read.
        rows: numbers of RUNNING trials that no slot holds: thaws that were killed between Optuna's ask and our note, or rows made by others.
    """

    slots: tuple[Slot, ...] = ()
    rows: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.slots or self.rows)


class Watchman:
    """Watches a study's claims and running rows; owners on this host that run are never silent.

    Args:
        slots: of the study; its engine is read.
        grace_s: seconds without a sign of life.
        now: a clock that is never set, in seconds.
        every_s: between two looks, where that is longer than the grace asks for.
    """

    def __init__(
        self, slots: Slots, grace_s: float, now: Callable[[], float] = time.monotonic, *, every_s: float = 0.0
    ) -> None:
        self.slots, self.grace_s, self.now = slots, grace_s, now
        self.every_s = max(every_s, grace_s / LOOKS_A_GRACE)
        self._seen: dict[tuple[str, int], tuple[Any, float]] = {}
        self._looked: float | None = None

    def look(self, *, dead: bool = False) -> Silent:
        """Read the claims and the heartbeats once and compare with earlier looks.

        Args:
            dead: name claims of this host's dead processes at once, too; a working worker settles those itself.
        """
        before, last, self._looked = self.now(), self._looked, None  # None: a look that failed counts as none
        rows, claims = running_rows(self.slots.engine, self.slots.study_name), self.slots.claimed()
        held = {slot.trial_number for slot in claims}
        signs: dict[tuple[str, int], Any] = {
            ("slot", slot.number): (slot, rows.get(-1 if slot.trial_number is None else slot.trial_number))
            for slot in claims
            if slot.owner is None or owner_alive(slot.owner) is not True
        } | {("row", number): heartbeat for number, heartbeat in rows.items() if number not in held}
        self._looked = now = self.now()
        # A database that was away, or this process asleep: nobody's signs could be seen, and all count from now.
        if last is None or now - before > max(self.every_s, BUSY_S) or before - last > 2 * self.every_s + BUSY_S:
            self._seen = {}
        self._seen = {
            key: known if (known := self._seen.get(key)) is not None and known[0] == sign else (sign, now)
            for key, sign in signs.items()
        }
        of = {slot.number: slot for slot in claims}
        silent = [
            (kind, number)
            for (kind, number), (_, since) in self._seen.items()
            if now - since >= self.grace_s or (dead and kind == "slot" and _is_dead(of[number]))
        ]
        return Silent(
            tuple(of[number] for kind, number in silent if kind == "slot"),
            tuple(number for kind, number in silent if kind == "row"),
        )


def _is_dead(slot: Slot) -> bool:
    return slot.owner is not None and owner_alive(slot.owner) is False


def running_rows(engine: sa.Engine, study_name: str) -> dict[int, Any]:
    """Trial number to the time of its last heartbeat, None before the first, of every RUNNING row."""
    trial, study, beat = models.TrialModel, models.StudyModel, models.TrialHeartbeatModel
    query = (
        sa.select(trial.number, beat.heartbeat)
        .join(study, study.study_id == trial.study_id)
        .outerjoin(beat, beat.trial_id == trial.trial_id)
        .where(study.study_name == study_name, trial.state == TrialState.RUNNING)
    )

    def read() -> dict[int, Any]:
        with engine.connect() as connection:
            return {int(number): heartbeat for number, heartbeat in connection.execute(query)}

    return retry_transient(read)


class Looks(Protocol[T_co]):
    """What a patrol asks: a :class:`Watchman`, or one over many studies."""

    @property
    def grace_s(self) -> float: ...

    def look(self) -> T_co: ...


class Patrol(Generic[T]):
    """A thread that looks again and again and hands over what is silent, also while this process is inside a long trial.

    Args:
        watchman: looks; a true value is what is silent.
        found: called in the thread with it; ends it.
    """

    def __init__(self, watchman: Looks[T], found: Callable[[T], None]) -> None:
        self.watchman, self.found = watchman, found
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._walk, name="patrol", daemon=True)

    def __enter__(self) -> Patrol[T]:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(timeout=10.0)

    def _walk(self) -> None:
        while not self._over.wait(self.watchman.grace_s / LOOKS_A_GRACE):
            try:
                if silent := self.watchman.look():
                    self.found(silent)
            except Exception as fault:  # noqa: BLE001 - a database that is away must not end the watch; the next look is soon
                logger.warning("looking for lost workers failed (%s); trying again", type(fault).__name__)
