"""Slots: the exact total of a study, however many processes work on it. Knows no recipes and starts no trials.

A slot is a lineage's place in the study's budget of N. Optuna's own count overshoots: ``MaxTrialsCallback(20)`` with
six workers made 25 trials. Every change below is one statement guarded by the state it starts from, so it is atomic on
SQLite, PostgreSQL and MariaDB without locks of ours.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa

from pcam_automl.errors import StudyError
from pcam_automl.search.connections import reading
from pcam_automl.search.patience import retry_transient

State = Literal["claimed", "done", "open", "thawing"]
"""``thawing`` is the moment between the claim of a paused lineage's slot and the row that goes on with it."""

_METADATA = sa.MetaData()
TABLE = sa.Table(
    "pcam_automl_slots",
    _METADATA,
    sa.Column("study_name", sa.String(512), primary_key=True),  # 512 as in Optuna's own table
    sa.Column("slot", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("lineage", sa.String(255), nullable=True),
    sa.Column("trial_number", sa.Integer, nullable=True),
    sa.Column("owner", sa.String(255), nullable=True),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("updated_at", sa.BigInteger, nullable=False),  # whole seconds since 1970, UTC
    sa.UniqueConstraint("study_name", "trial_number", name="pcam_automl_slots_trial"),
)
_C = TABLE.c
_FEW = 200
"""So many trial numbers are looked up by name; for more the whole table is read."""


@dataclass(frozen=True)
class Slot:
    """One place in the budget as it was when read. ``attempts`` counts claims, the current one included."""

    number: int
    state: State
    lineage: str | None
    trial_number: int | None
    owner: str | None
    attempts: int
    updated_at: int


def owner_of_this_process() -> str:
    """``host[.machine][/pid namespace]:pid:start``: names this process and no later one with the same pid."""
    return f"{_host()}:{os.getpid()}:{_started(os.getpid()) or ''}"


def owner_alive(owner: str) -> bool | None:
    """Whether the process that ``owner`` names still runs; None on another host or in another container: unknown."""
    host, _, rest = owner.partition(":")
    pid_text, _, start = rest.partition(":")
    if host != _host() or not pid_text.isdecimal():
        return None
    pid = int(pid_text)
    try:
        os.kill(pid, 0)
    except OSError as fault:
        if fault.errno == errno.ESRCH:
            return False
        if fault.errno != errno.EPERM:  # EPERM: it runs, under another user
            raise
    except OverflowError:
        return False
    now = _started(pid)
    if now is None or not start:
        return now != "dead"
    return now == start


def _host() -> str:
    """Host name, machine and PID namespace: containers and machines that share a name do not see each other's processes."""
    name = socket.gethostname().replace(":", "_")
    with contextlib.suppress(OSError):
        name += f".{zlib.crc32(Path('/etc/machine-id').read_bytes()):08x}"
    try:
        return f"{name}/{Path('/proc/self/ns/pid').readlink().name.strip('pid:[]')}"
    except OSError:
        return name


def _started(pid: int) -> str | None:
    """Boot id and start tick of a process; ``dead`` once it is a zombie; None where there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    except OSError:
        return None
    return "dead" if fields[0] in "ZX" else f"{boot}-{fields[19]}"


class Slots:
    """The slots of one study.

    Args:
        engine: of the database that holds the study; the table is made where it is missing.
        study_name: the study's name.
    """

    def __init__(self, engine: sa.Engine, study_name: str) -> None:
        self.engine = engine
        self.study_name = study_name
        self._seen_done: set[int] = set()  # trials: a slot that is done stays so
        self._trial_of: dict[int, int] = {}  # slots that this object started
        try:
            retry_transient(lambda: _METADATA.create_all(engine))
        except sa.exc.DBAPIError:
            if not sa.inspect(engine).has_table(TABLE.name):  # else another process made it at the same moment
                raise

    def claim(self, n_total: int, owner: str) -> Slot | None:
        """A slot for the caller, or None when ``n_total`` slots are claimed or done.

        Open slots come first, lowest number first, with the lineage to be continued where they have one. A thawing slot
        counts as claimed.
        """
        while True:
            # One statement, for one moment of the table. The done slots below the total, thousands, decide nothing.
            slots = self._select(sa.or_(_C.state == "open", _C.slot >= n_total, _C.slot == self._last()))
            reopened = [slot for slot in slots if slot.state == "open" and slot.number < n_total]
            # After a lowered total, slots at or above it already fill the places of as many open ones below.
            beyond = sum(slot.state != "open" for slot in slots if slot.number >= n_total)
            if len(reopened) > beyond:
                number = reopened[0].number
                values = {"state": "claimed", "owner": owner, "attempts": _C.attempts + 1}
                if not self._update(number, values, _C.state == "open") and not self._is_held(number, owner):
                    continue  # another process was quicker
            else:
                number = slots[-1].number + 1 if slots else 0
                if number >= n_total:
                    return None
                if not self._insert(number, state="claimed", owner=owner, attempts=1) and not self._is_held(
                    number, owner
                ):
                    continue
                return Slot(number, "claimed", None, None, owner, 1, int(time.time()))
            found = self._read(number)
            if found is not None and found.owner == owner:
                return found

    def thaw(self, lineage: str, owner: str) -> Slot | None:
        """The slot of a paused lineage, for the caller to go on with; None if it is not done, or another was quicker."""
        return self._take(lineage, "done", "thawing", owner)

    def go_on(self, lineage: str, owner: str) -> Slot | None:
        """The slot of an interrupted lineage, for the caller to go on with; None if it is not open, or another was quicker."""
        return self._take(lineage, "open", "claimed", owner)

    def _take(self, lineage: str, held: State, taken: State, owner: str) -> Slot | None:
        slot = next(iter(self._select(_C.lineage == lineage, _C.state == held)), None)
        if slot is None:
            return None
        values = {"state": taken, "owner": owner, "attempts": _C.attempts + 1}
        changed = self._update(slot.number, values, _C.state == held, _C.attempts == slot.attempts)
        if not changed and not self._is_held(slot.number, owner):
            return None
        return self._read(slot.number)

    def _is_held(self, number: int, owner: str) -> bool:
        """Whether a change that seemed to fail was made: the server died after it was committed and before it said so."""
        found = self._read(number)
        return found is not None and found.owner == owner and found.state in ("claimed", "thawing")

    def leave_paused(self, slot: Slot) -> bool:
        """Give back a thawing slot whose row never began: its lineage is paused as before."""
        return self._update(slot.number, {"state": "done", "owner": None}, *_held_by(slot, "thawing"))

    def started(self, slot: Slot, trial_number: int, lineage: str, *, inside: sa.Connection | None = None) -> bool:
        """Note which trial and lineage fill the caller's slot; False if the slot is no longer the caller's.

        Args:
            slot: as it was claimed.
            trial_number: the trial's.
            lineage: its lineage.
            inside: a transaction that the note is a part of; by default it is one of its own.
        """
        self._trial_of[slot.number] = trial_number
        values = {"trial_number": trial_number, "lineage": lineage, "state": "claimed"}
        return self._update(slot.number, values, *_held_by(slot, "claimed", "thawing"), inside=inside)

    def finish(self, slot: Slot, *, inside: sa.Connection | None = None) -> bool:
        """The slot's lineage is complete or pruned. False if the slot is no longer the caller's.

        Args:
            slot: as it was claimed.
            inside: a transaction that the change is a part of; by default it is one of its own.
        """
        done = self._update(slot.number, {"state": "done", "owner": None}, *_held_by(slot), inside=inside)
        if done and slot.number in self._trial_of:
            self._seen_done.add(self._trial_of[slot.number])
        return done

    def reopen(self, slot: Slot, *, keep_lineage: bool) -> bool:
        """Give the slot back: with its lineage, to be continued, or without, for a new recipe.

        Returns:
            False if the slot is no longer the caller's.
        """
        values: dict[str, Any] = {"state": "open", "owner": None}
        if not keep_lineage:
            values |= {"lineage": None, "trial_number": None}
        return self._update(slot.number, values, *_held_by(slot))

    def adopt(self, done_trial_numbers: Iterable[int], lineages: Mapping[int, str] | None = None) -> int:
        """Reconcile with trials that finished without their slot being told: made elsewhere, or killed just after.

        Args:
            done_trial_numbers: numbers of all complete and pruned trials of the study.
            lineages: their lineages' names by number. One that has a slot gets no second one: it has been thawed since the trials were read.

        Returns:
            How many slots became done.
        """
        n_adopted = 0
        new = sorted(set(done_trial_numbers) - self._seen_done)
        if not new:
            return 0
        few = len(new) <= _FEW
        slots = self._select(sa.or_(_C.trial_number.in_(new), _C.slot == self._last())) if few else self.all()
        of_trial = {slot.trial_number: slot for slot in slots if slot.trial_number is not None}
        for trial_number in new:
            name = None if lineages is None else lineages[trial_number]
            while trial_number not in of_trial:
                if name is not None and self._select(_C.lineage == name):
                    break
                number = slots[-1].number + 1 if slots else 0
                n_adopted += self._insert(number, state="done", trial_number=trial_number, attempts=1)
                slots = self._select(_C.slot >= number)  # ours, or what other processes put there meanwhile
                if not slots:
                    slots = self.all()
                of_trial |= {slot.trial_number: slot for slot in slots if slot.trial_number is not None}
            if trial_number not in of_trial:
                continue
            slot = of_trial[trial_number]
            done = slot.state == "done"
            if not done:
                values = {"state": "done", "owner": None}
                unsettled = _C.state.in_(("claimed", "open"))  # a thawing slot still names the row that it goes on from
                done = self._update(slot.number, values, unsettled, _C.trial_number == trial_number)
                n_adopted += done
            if done:  # for good
                self._seen_done.add(trial_number)
        return n_adopted

    def clear(self) -> None:
        """Forget every slot of the study: for a study that is deleted, or made anew under an old name."""
        self._run(sa.delete(TABLE).where(_C.study_name == self.study_name))
        self._seen_done.clear()

    def counts(self) -> dict[State, int]:
        """Number of slots in each state."""
        states = [slot.state for slot in self.all()]
        n_claimed = states.count("claimed") + states.count("thawing")
        return {"claimed": n_claimed, "done": states.count("done"), "open": states.count("open")}

    def all(self) -> list[Slot]:
        """Every slot, by number."""
        return self._select()

    def going_on(self) -> set[str]:
        """Lineages that are being trained, or that an open slot waits for somebody to go on with."""
        return {slot.lineage for slot in self._select(_C.state != "done") if slot.lineage is not None}

    def interrupted(self, n_total: int) -> set[str]:
        """Lineages that an open slot of the total waits for somebody to go on with."""
        slots = self._select(_C.state == "open", _C.slot < n_total)
        return {slot.lineage for slot in slots if slot.lineage is not None}

    def claimed(self) -> list[Slot]:
        """The claimed and the thawing slots, by number."""
        return self._select(_C.state.in_(("claimed", "thawing")))

    def _last(self) -> sa.ScalarSelect[int]:
        last = TABLE.alias()
        return sa.select(sa.func.max(last.c.slot)).where(last.c.study_name == self.study_name).scalar_subquery()

    def _read(self, number: int) -> Slot | None:
        return next(iter(self._select(_C.slot == number)), None)

    def _select(self, *conditions: sa.ColumnElement[bool]) -> list[Slot]:
        columns = (_C.slot, _C.state, _C.lineage, _C.trial_number, _C.owner, _C.attempts, _C.updated_at)
        query = sa.select(*columns).where(_C.study_name == self.study_name, *conditions).order_by(_C.slot)

        def rows() -> list[Slot]:
            with reading(self.engine) as connection:
                return [Slot(*row) for row in connection.execute(query)]

        return retry_transient(rows)

    def _update(
        self,
        number: int,
        values: dict[str, Any],
        *conditions: sa.ColumnElement[bool],
        inside: sa.Connection | None = None,
    ) -> bool:
        where = (_C.study_name == self.study_name, _C.slot == number, *conditions)
        update = sa.update(TABLE).where(*where).values(updated_at=int(time.time()), **values)
        return (self._run(update) if inside is None else inside.execute(update).rowcount) == 1

    def _insert(self, number: int, **values: Any) -> bool:
        """False if that number, or that trial, has a slot already."""
        row = {"study_name": self.study_name, "slot": number, "updated_at": int(time.time()), **values}
        try:
            self._run(sa.insert(TABLE).values(**row))
        except sa.exc.IntegrityError:
            return False
        except sa.exc.DataError as fault:
            raise StudyError(f"study name {self.study_name[:40]!r}... must have at most 512 characters") from fault
        return True

    def _run(self, statement: sa.Insert | sa.Update | sa.Delete) -> int:
        def changed() -> int:
            with self.engine.begin() as connection:
                return connection.execute(statement).rowcount

        return retry_transient(changed)


def _held_by(slot: Slot, *states: State) -> tuple[sa.ColumnElement[bool], ...]:
    return (_C.state.in_(states or ("claimed",)), _C.owner == slot.owner, _C.attempts == slot.attempts)
