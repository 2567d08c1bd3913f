"""Rows of a trial's details and the statements that put them into Optuna's tables. Opens no database."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.samplers._tpe.sampler import _RELATIVE_PARAMS_KEY as TPE_SHARED
from optuna.storages._rdb import models
from optuna.trial import TrialState
from sqlalchemy.dialects import mysql, postgresql, sqlite

__all__ = [
    "TPE_SHARED",
    "Rows",
    "attr_row",
    "end_trial",
    "heartbeat_of",
    "new_trial",
    "param_row",
    "rows_of",
    "state_of_trial",
    "upserts",
]

_STATE = sa.select(models.TrialModel.state).where(models.TrialModel.trial_id == sa.bindparam("id", type_=sa.Integer))

Rows = dict[str, list[dict[str, Any]]]
"""Rows to be written, by the keys of ``_TABLES``."""

_TABLES: dict[str, tuple[Any, str, tuple[str, ...]]] = {
    "params": (models.TrialParamModel, "param_name", ("param_value", "distribution_json")),
    "system_attrs": (models.TrialSystemAttributeModel, "key", ("value_json",)),
    "user_attrs": (models.TrialUserAttributeModel, "key", ("value_json",)),
    "values": (models.TrialIntermediateValueModel, "step", ("intermediate_value", "intermediate_value_type")),
    "objectives": (models.TrialValueModel, "objective", ("value", "value_type")),
}


@functools.cache
def _upsert(kind: str, dialect: str) -> sa.Insert:
    """Insert of rows of a table of ``_TABLES`` by trial and key that replaces the values of a row that is there."""
    model, key, values = _TABLES[kind]
    table = model.__table__
    if dialect == "mysql":
        put = mysql.insert(table)
        return put.on_duplicate_key_update({name: put.inserted[name] for name in values})
    insert = sqlite.insert(table) if dialect == "sqlite" else postgresql.insert(table)
    return insert.on_conflict_do_update(
        index_elements=[table.c.trial_id, table.c[key]], set_={name: insert.excluded[name] for name in values}
    )


@functools.cache
def heartbeat_of(dialect: str) -> sa.Insert:
    """Notes the database's own time as the last sign of life of the trial in the parameter ``trial_id``."""
    table = models.TrialHeartbeatModel.__table__
    row = {"trial_id": sa.bindparam("trial_id"), "heartbeat": sa.func.current_timestamp()}
    now = {"heartbeat": sa.func.current_timestamp()}
    if dialect == "mysql":
        return mysql.insert(table).values(row).on_duplicate_key_update(now)
    insert = sqlite.insert(table) if dialect == "sqlite" else postgresql.insert(table)
    return insert.values(row).on_conflict_do_update(index_elements=[table.c.trial_id], set_=now)


def _stored(local: datetime) -> datetime:
    """Optuna's columns hold naive UTC, its trials naive local time."""
    return local.astimezone(UTC).replace(tzinfo=None)


def end_trial(connection: sa.Connection, trial_id: int, state: TrialState, ends: datetime) -> bool:
    """End a trial inside the connection's transaction; False, and nothing is done, if it has ended before or is not there."""
    trials = models.TrialModel.__table__
    open_states = trials.c.state.in_([other for other in TrialState if not other.is_finished()])
    end = sa.update(trials).where(trials.c.trial_id == trial_id, open_states)
    return connection.execute(end.values(state=state, datetime_complete=_stored(ends))).rowcount == 1


def state_of_trial(connection: sa.Connection, trial_id: int) -> TrialState:
    """A trial's state.

    Raises:
        KeyError: there is no such trial.
    """
    found = connection.execute(_STATE, {"id": trial_id}).first()
    if found is None:
        raise KeyError(f"there is no trial with id {trial_id}")
    return TrialState(found[0])


def new_trial(connection: sa.Connection, study_id: int, begins: datetime) -> tuple[int, int]:
    """Add a running trial inside the connection's transaction; its id, and its number: how many of the study are before it.

    As Optuna does it, in two statements instead of six; in four on MySQL, where an insert may not count its own table, and on an
    SQLite before 3.35, whose inserts return nothing.

    Raises:
        KeyError: there is no such study.
    """
    lock = sa.select(models.StudyModel.study_id).where(models.StudyModel.study_id == study_id).with_for_update()
    if connection.execute(lock).first() is None:  # locked: no two of a study are added, and counted, at once
        raise KeyError(f"there is no study with id {study_id}")
    trials = models.TrialModel.__table__
    row: dict[str, Any] = {"study_id": study_id, "state": TrialState.RUNNING, "datetime_start": _stored(begins)}
    if connection.dialect.name != "mysql" and connection.dialect.insert_returning:
        others = trials.alias()
        n_before = sa.select(sa.func.count(others.c.trial_id)).where(others.c.study_id == study_id).scalar_subquery()
        insert = sa.insert(trials).values(**row, number=n_before).returning(trials.c.trial_id, trials.c.number)
        both = connection.execute(insert).one()
        return int(both[0]), int(both[1])
    made = connection.execute(sa.insert(trials).values(**row)).inserted_primary_key
    assert made is not None  # each of these databases tells the key it gave
    trial_id = int(made[0])
    before = sa.select(sa.func.count(trials.c.trial_id)).where(
        trials.c.study_id == study_id, trials.c.trial_id < trial_id
    )
    number = int(connection.execute(before).scalar_one())
    connection.execute(sa.update(trials).where(trials.c.trial_id == trial_id).values(number=number))
    return trial_id, number


def _step_row(trial_id: int, step: int, value: float) -> dict[str, Any]:
    stored, kind = models.TrialIntermediateValueModel.intermediate_value_to_stored_repr(value)
    return {"trial_id": trial_id, "step": step, "intermediate_value": stored, "intermediate_value_type": kind}


def _objective_row(trial_id: int, place: int, value: float) -> dict[str, Any]:
    stored, kind = models.TrialValueModel.value_to_stored_repr(value)
    return {"trial_id": trial_id, "objective": place, "value": stored, "value_type": kind}


def param_row(trial_id: int, name: str, value: float, distribution: BaseDistribution) -> dict[str, Any]:
    """A parameter by its internal value."""
    text = distribution_to_json(distribution)
    return {"trial_id": trial_id, "param_name": name, "param_value": value, "distribution_json": text}


def attr_row(trial_id: int, key: str, value: Any) -> dict[str, Any]:
    """A user or system attribute; ``value`` as JSON."""
    return {"trial_id": trial_id, "key": key, "value_json": json.dumps(value)}


def rows_of(
    trial_id: int,
    user_attrs: Mapping[str, Any],
    values: Mapping[int, float] | None = None,
    objectives: Sequence[float] = (),
) -> Rows:
    """User attributes by key, intermediate values by step, and the values of the study's objectives."""
    return {
        "user_attrs": [attr_row(trial_id, key, value) for key, value in user_attrs.items()],
        "values": [_step_row(trial_id, step, float(value)) for step, value in (values or {}).items()],
        "objectives": [_objective_row(trial_id, place, float(value)) for place, value in enumerate(objectives)],
    }


def upserts(rows: Rows, dialect: str) -> list[tuple[sa.Insert, list[dict[str, Any]]]]:
    """Statements that insert the rows or replace what is there under the same keys, and what each is executed with."""
    return [(_upsert(kind, dialect), of_kind) for kind, of_kind in rows.items() if of_kind]
