"""Trials read from any of Optuna's databases in two statements. Writes nothing and retries nothing.

Optuna's own reader sends six statements through the ORM, also for the one running trial that a worker looks at several times
a rung: 2.6 ms on SQLite and 5.2 on PostgreSQL for each look, where this takes 1 and 2; a study of 10,000 takes it 7 s.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from typing import Any

import sqlalchemy as sa
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState

from pcam_automl.search.trial_rows import (
    INTERMEDIATE,
    PARAM,
    SYSTEM_ATTR,
    USER_ATTR,
    VALUE,
    Detail,
    Head,
    assemble,
)

_FEW = 200
"""Trials that are named one by one in a statement; for more the whole study's rows are read."""
_AT_ONCE = 10_000
"""Rows that are fetched together where a whole study is read."""

_TRIALS = models.TrialModel.__table__.c
_PARAMS = models.TrialParamModel.__table__.c
_VALUES = models.TrialValueModel.__table__.c
_STEPS = models.TrialIntermediateValueModel.__table__.c
_USER = models.TrialUserAttributeModel.__table__.c
_SYSTEM = models.TrialSystemAttributeModel.__table__.c

# Statements and conditions that are built once, which takes as long as to execute them; what they leave open comes with each call.
_ID: sa.BindParameter[int] = sa.bindparam("id", type_=sa.Integer)
_IDS: sa.BindParameter[Any] = sa.bindparam("ids", expanding=True, type_=sa.Integer)
_AFTER: sa.BindParameter[int] = sa.bindparam("after", type_=sa.Integer)
_HEADS = sa.select(
    _TRIALS.trial_id, _TRIALS.number, _TRIALS.state, _TRIALS.datetime_start, _TRIALS.datetime_complete
).order_by(_TRIALS.trial_id)
_ONE = _HEADS.where(_TRIALS.trial_id == _ID)
_ALL = _TRIALS.study_id == sa.bindparam("study", type_=sa.Integer)
_ALL_FROM = sa.and_(_ALL, _TRIALS.trial_id > _AFTER)
_NEWER = sa.and_(_ALL, sa.or_(_TRIALS.trial_id > _AFTER, _TRIALS.trial_id.in_(_IDS)))


def read_trial(connection: sa.Connection, trial_id: int) -> FrozenTrial:
    """One trial.

    Raises:
        KeyError: there is none of that id.
    """
    heads = _heads(connection, _ONE, {"id": trial_id})
    if not heads:
        raise KeyError(f"there is no trial with id {trial_id}")
    return assemble(heads, _details_of(connection, [trial_id]))[0]


def read_trials(
    connection: sa.Connection,
    study_id: int,
    *,
    after: int = -1,
    beside: Collection[int] = (),
    states: Collection[TrialState] | None = None,
) -> list[FrozenTrial]:
    """Trials of a study, by id. What a finished one holds no longer changes; of a running one it may be of two moments.

    Args:
        connection: to the database; in a transaction where ``after`` is -1, since many rows are streamed.
        study_id: of the study.
        after: only trials of larger ids,
        beside: and these.
        states: only trials in these states; None for all.

    Raises:
        KeyError: all trials are asked for, and there is no such study.
    """
    if after < 0:
        found = _read(connection, _ALL, {"study": study_id}, states, stream=True)
        if not found:
            study = sa.select(models.StudyModel.study_id).where(models.StudyModel.study_id == study_id)
            if connection.execute(study).first() is None:
                raise KeyError(f"there is no study with id {study_id}")
        return found
    if len(beside) <= _FEW:
        return _read(connection, _NEWER, {"study": study_id, "after": after, "ids": sorted(beside)}, states)
    found = _read(connection, _ALL_FROM, {"study": study_id, "after": min(after, min(beside) - 1)}, states)
    return [trial for trial in found if trial._trial_id > after or trial._trial_id in beside]


def _heads(connection: sa.Connection, query: sa.Select[Any], values: dict[str, Any]) -> list[Head]:
    return [tuple(row) for row in connection.execute(query, values)]


def _read(
    connection: sa.Connection,
    wanted: sa.ColumnElement[bool],
    values: dict[str, Any],
    states: Collection[TrialState] | None,
    *,
    stream: bool = False,
) -> list[FrozenTrial]:
    """The trials that ``wanted`` is true of, with ``values`` for what it leaves open."""
    query = _HEADS.where(wanted)
    if states is not None:  # of this moment only: what such a trial holds is read although it has gone on meanwhile
        query = query.where(_TRIALS.state.in_(list(states)))
    heads = _heads(connection, query, values)  # first: who is finished here is whole below
    if not heads:
        return []
    if len(heads) <= _FEW:
        return assemble(heads, _details_of(connection, [head[0] for head in heads]))
    matching = sa.select(_TRIALS.trial_id).where(wanted)
    known = {head[0] for head in heads}  # a trial that was made meanwhile is of the next look
    selects = _selects(lambda trial_id: trial_id.in_(matching))
    details = _in_parts(connection, selects, values, stream=stream)
    return assemble(heads, (detail for detail in details if detail[1] in known))


def _details_of(connection: sa.Connection, ids: list[int]) -> Iterator[Detail]:
    """Of some trials, each table's rows in their order."""
    rows: list[Any] = []
    for statement in _of_few(connection.dialect.name):
        rows += connection.execute(statement, {"ids": ids})
    rows.sort(key=lambda row: row.place)
    return (tuple(row)[:-1] for row in rows)


@functools.cache
def _of_few(dialect: str) -> list[sa.Executable]:
    """What reads all details of the trials in the parameter ``ids``; built once, which takes as long as its execution.

    One statement, but five on MySQL and MariaDB: texts of the tables' collation and of the connection's do not mix in a union.
    """
    ids: sa.BindParameter[Any] = sa.bindparam("ids", expanding=True)
    selects = _selects(lambda trial_id: trial_id.in_(ids))
    return [*selects] if dialect == "mysql" else [sa.union_all(*selects)]


def _in_parts(
    connection: sa.Connection, selects: list[sa.Select[Any]], values: dict[str, Any], *, stream: bool
) -> Iterator[Detail]:
    """In the order of each table's rows where that matters: attributes are long, and have none."""
    if stream:
        connection = connection.execution_options(yield_per=_AT_ONCE)
    for place, select in enumerate(selects):
        ordered = select if place >= USER_ATTR else select.order_by("place")
        for rows in connection.execute(ordered, values).partitions(_AT_ONCE):
            for row in rows:
                yield tuple(row)[:-1]


def _selects(of: Callable[[sa.Column[int]], sa.ColumnElement[bool]]) -> list[sa.Select[Any]]:
    """The details by table, in the order of ``trial_rows.Detail``, and each row's place in its table."""

    def select(
        kind: int,
        table: Any,
        key: str,
        name: sa.ColumnElement[Any],
        value: sa.ColumnElement[Any],
        text: sa.ColumnElement[Any],
    ) -> sa.Select[Any]:
        columns = (sa.literal(kind, literal_execute=True).label("kind"), table.trial_id, name.label("name"))
        place = table[key].label("place")
        return sa.select(*columns, value.label("value"), text.label("text"), place).where(of(table.trial_id))

    def as_text(column: Any) -> sa.ColumnElement[str]:
        return sa.cast(column, sa.String(32))

    none = sa.null()
    return [
        select(PARAM, _PARAMS, "param_id", _PARAMS.param_name, _PARAMS.param_value, _PARAMS.distribution_json),
        select(
            VALUE, _VALUES, "trial_value_id", as_text(_VALUES.objective), _VALUES.value, as_text(_VALUES.value_type)
        ),
        select(
            INTERMEDIATE,
            _STEPS,
            "trial_intermediate_value_id",
            as_text(_STEPS.step),
            _STEPS.intermediate_value,
            as_text(_STEPS.intermediate_value_type),
        ),
        select(USER_ATTR, _USER, "trial_user_attribute_id", _USER.key, none, _USER.value_json),
        select(SYSTEM_ATTR, _SYSTEM, "trial_system_attribute_id", _SYSTEM.key, none, _SYSTEM.value_json),
    ]
