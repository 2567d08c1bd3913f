"""Optuna's RDB storage that outlives a server's restart and writes in few transactions. Opens no database."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Container, Mapping, Sequence
from datetime import datetime
from typing import Any, Protocol, TypeVar

import sqlalchemy as sa
from optuna.distributions import BaseDistribution, check_distribution_compatibility
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from pcam_automl.search.connections import reading
from pcam_automl.search.patience import retry_transient
from pcam_automl.search.trial_reader import read_trial, read_trials
from pcam_automl.search.trial_writes import (
    TPE_SHARED,
    Rows,
    attr_row,
    end_trial,
    heartbeat_of,
    new_trial,
    param_row,
    rows_of,
    state_of_trial,
    upserts,
)

T = TypeVar("T")
logger = logging.getLogger(__name__)

OWNER = "owner"
"""User attribute of a trial: the process that asked for it, see slots.py."""


class Claim(Protocol):
    """What a worker's claim notes in the transactions that begin and end its trial's row; each may be tried several times."""

    def begins(self, connection: sa.Connection, trial_id: int, number: int) -> None:
        """The row was made."""

    def ends(self, connection: sa.Connection, trial_id: int, state: TrialState) -> None:
        """A row, this worker's or another's, has ended."""


class RetryingStorage(RDBStorage):
    """Optuna's RDB storage that outlives a server's restart. Optuna itself retries the creation of trials only.

    A trial's parameters, and what TPE says of them to others, are written together with whatever of the trial is written or
    read next: 13 transactions of one row each were a fifth of a trial's cost on PostgreSQL. A process that is killed between
    loses a trial without a result.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unwritten: dict[int, Rows] = {}  # by trial
        self._last_notes: dict[int, dict[str, Any]] = {}  # user attributes by trial, written when it ends
        self.owner: str | None = None  # of the worker; each row that it asks for names it from its first moment
        self.begins_with: Callable[[int], Mapping[str, Any]] | None = None
        """User attributes of a row that the worker asks for, by the row's number; written with it."""
        self.claim: Claim | None = None

    def _set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
        previous_distribution: BaseDistribution | None,
    ) -> None:
        """What Optuna's cache calls; a name that this process has not met is compared with the study's at once."""
        if previous_distribution is None:
            self._write_held(trial_id)
            known = super()._set_trial_param
            retry_transient(lambda: known(trial_id, param_name, param_value_internal, distribution, None))
            return
        check_distribution_compatibility(previous_distribution, distribution)
        row = param_row(trial_id, param_name, param_value_internal, distribution)
        self._unwritten.setdefault(trial_id, {}).setdefault("params", []).append(row)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        if key.startswith(TPE_SHARED):  # at the first parameter; the others follow at once
            row = attr_row(trial_id, key, value)
            self._unwritten.setdefault(trial_id, {}).setdefault("system_attrs", []).append(row)
            return
        self._write_held(trial_id)
        write = super().set_trial_system_attr
        retry_transient(lambda: write(trial_id, key, value))

    def _create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> FrozenTrial:
        """A worker's with its owner and its first notes in the same transaction: whenever it is killed, the row is known as lost."""
        if template_trial is not None or self.owner is None:
            create = super()._create_new_trial
            return retry_transient(lambda: create(study_id, template_trial))
        begins = datetime.now()

        def call() -> FrozenTrial:
            with self.engine.begin() as connection:
                trial_id, number = new_trial(connection, study_id, begins)
                attrs = {OWNER: self.owner, **(self.begins_with(number) if self.begins_with else {})}
                for statement, rows in upserts(rows_of(trial_id, attrs), self.engine.dialect.name):
                    connection.execute(statement, rows)
                if self.claim is not None:
                    self.claim.begins(connection, trial_id, number)
            return FrozenTrial(
                number=number,
                trial_id=trial_id,
                state=TrialState.RUNNING,
                value=None,
                datetime_start=begins,
                datetime_complete=None,
                params={},
                distributions={},
                user_attrs=attrs,
                system_attrs={},
                intermediate_values={},
            )

        # Of a row that was made twice the slot names the later one; the other is ended as lost.
        return retry_transient(call)

    def _write_held(self, trial_id: int) -> None:
        if trial_id in self._unwritten:
            self.write(trial_id)

    def _write_all_held(self) -> None:
        for trial_id in list(self._unwritten):
            self._write_held(trial_id)

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        self._write_held(trial_id)
        write = super().set_trial_intermediate_value
        retry_transient(lambda: write(trial_id, step, intermediate_value))

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._write_held(trial_id)
        write = super().set_trial_user_attr
        retry_transient(lambda: write(trial_id, key, value))

    def get_trial(self, trial_id: int) -> FrozenTrial:
        self._write_held(trial_id)

        def read() -> FrozenTrial:
            with reading(self.engine) as connection:
                return read_trial(connection, trial_id)

        return retry_transient(read)

    def _get_trials(
        self,
        study_id: int,
        states: Container[TrialState] | None,
        included_trial_ids: set[int],
        trial_id_greater_than: int,
    ) -> list[FrozenTrial]:
        self._write_all_held()
        wanted = None if states is None else [state for state in TrialState if state in states]

        def read() -> list[FrozenTrial]:
            # A whole study is streamed, which takes a transaction.
            with self.engine.connect() if trial_id_greater_than < 0 else reading(self.engine) as connection:
                return read_trials(
                    connection, study_id, after=trial_id_greater_than, beside=included_trial_ids, states=wanted
                )

        return retry_transient(read)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """An ending in one transaction with what is not written yet, the trial's last notes, and the worker's slot."""
        if not state.is_finished():
            self._write_held(trial_id)
            begin = super().set_trial_state_values
            return retry_transient(lambda: begin(trial_id, state, values))
        held, notes, ends = self._unwritten.pop(trial_id, {}), self._last_notes.pop(trial_id, {}), datetime.now()
        new, dialect = rows_of(trial_id, notes, objectives=values or ()), self.engine.dialect.name
        statements = upserts(held, dialect) + upserts(new, dialect)
        tries = 0

        def call() -> None:
            nonlocal tries
            tries += 1
            with self.engine.begin() as connection:
                if end_trial(connection, trial_id, state, ends):
                    for statement, rows in statements:
                        connection.execute(statement, rows)
                    if self.claim is not None:
                        self.claim.ends(connection, trial_id, state)
                # Of a later try the same state means that an earlier one was committed although its answer was lost.
                elif (found := state_of_trial(connection, trial_id)) != state or tries == 1:
                    self.check_trial_is_updatable(trial_id, found)

        try:
            retry_transient(call)
        except (sa.exc.SQLAlchemyError, StorageInternalError):
            for kept, of_trial in ((self._unwritten, held), (self._last_notes, notes)):
                if of_trial:
                    kept[trial_id] = of_trial  # for another attempt
            raise
        return True

    def write(
        self, trial_id: int, *, user_attrs: Mapping[str, Any] | None = None, values: Mapping[int, float] | None = None
    ) -> None:
        """In one transaction, with what of the trial is not written yet; what is there under the same keys is replaced.

        Args:
            trial_id: of a running trial.
            user_attrs: its user attributes, JSON values by key.
            values: its intermediate values by step.

        Raises:
            UpdateFinishedTrialError: the trial has ended.
        """
        new = rows_of(trial_id, user_attrs or {}, values)
        held = self._unwritten.pop(trial_id, {})  # first: the check below reads the trial, which writes what is left
        statements = upserts({**held, **new}, self.engine.dialect.name)

        def call() -> None:
            with self.engine.begin() as connection:
                self.check_trial_is_updatable(trial_id, state_of_trial(connection, trial_id))
                for statement, rows in statements:
                    connection.execute(statement, rows)

        try:
            retry_transient(call)
        except (sa.exc.SQLAlchemyError, StorageInternalError):
            if held:
                self._unwritten[trial_id] = held  # the database may be back at the next write
            raise  # a trial that another worker ended is refused once, and the study stays readable

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        """None: lost workers' trials are ended by silence.py and settling.py, which know slots, lineages and checkpoints and
        go by no clock of the database's.
        """
        return []

    def record_heartbeat(self, trial_id: int) -> None:
        """A lost heartbeat is not worth a trial: Optuna's thread has no handler and would end silently."""
        try:
            every_s = float(self.heartbeat_interval or math.inf)  # others judge by it once the database is back
            retry_transient(lambda: self._beat(trial_id), longest_s=every_s)
        except (sa.exc.SQLAlchemyError, StorageInternalError) as fault:
            logger.warning("heartbeat of a trial not recorded (%s); trying again at the next", type(fault).__name__)

    def _beat(self, trial_id: int) -> None:
        with self.engine.begin() as connection:
            connection.execute(heartbeat_of(self.engine.dialect.name), {"trial_id": trial_id})

    def end_with(self, trial_id: int, user_attrs: Mapping[str, Any]) -> None:
        """User attributes that a trial gets when it ends, in the same transaction."""
        self._last_notes.setdefault(trial_id, {}).update(user_attrs)

    def drop_notes(self, trial_id: int) -> None:
        """What :meth:`end_with` keeps of a trial that another process has ended."""
        self._last_notes.pop(trial_id, None)


def set_user_attrs(trial: Trial, **attrs: Any) -> None:
    """Several user attributes of a running trial at once: 21 a trial, one by one, took 25 ms on SQLite.

    Raises:
        UpdateFinishedTrialError: the trial has ended.
    """
    storage = getattr(trial.storage, "_backend", trial.storage)
    if not isinstance(storage, RetryingStorage):
        for key, value in attrs.items():
            trial.set_user_attr(key, value)
        return
    storage.write(trial._trial_id, user_attrs=attrs)
    trial._cached_frozen_trial.user_attrs.update(attrs)  # as Trial.set_user_attr does; the pruner reads it there


def end_with(trial: Trial, **attrs: Any) -> None:
    """User attributes of a running trial whose objective is about to return, to be written with its end."""
    storage = getattr(trial.storage, "_backend", trial.storage)
    if isinstance(storage, RetryingStorage):
        storage.end_with(trial._trial_id, attrs)
    else:
        set_user_attrs(trial, **attrs)


def write_now(trial: Trial) -> None:
    """Put the trial's parameters into the database without waiting for its next write, for others to see."""
    set_user_attrs(trial)


def report(trial: Trial, value: float, *, step: int, **attrs: Any) -> None:
    """``trial.report`` and user attributes in one transaction: no rung is reported without what is known of it.

    Raises:
        UpdateFinishedTrialError: the trial has ended.
    """
    storage = getattr(trial.storage, "_backend", trial.storage)
    if not isinstance(storage, RetryingStorage):
        trial.report(value, step=step)
        set_user_attrs(trial, **attrs)
        return
    storage.write(trial._trial_id, user_attrs=attrs, values={step: value})
    trial._cached_frozen_trial.intermediate_values[step] = value  # as Trial.report does
    trial._cached_frozen_trial.user_attrs.update(attrs)


def _retried(method: Callable[..., T]) -> Callable[..., T]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> T:
        return retry_transient(lambda: method(*args, **kwargs))

    return call


# Writes that set a value and reads may be repeated. Those that Optuna's cache calls under other names are above.
_RETRIED = """
set_trial_param
set_study_user_attr set_study_system_attr get_study_id_from_name get_study_name_from_id get_study_directions
get_study_user_attrs get_study_system_attrs get_all_studies get_all_trials
_get_best_trial_id get_trial_id_from_study_id_trial_number
"""
for _name in _RETRIED.split():
    if hasattr(RDBStorage, _name):
        setattr(RetryingStorage, _name, _retried(getattr(RDBStorage, _name)))
