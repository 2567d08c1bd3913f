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


def read_trial(connection: sa.Connection, trial_id: int) -> FrozenTrial:
    """One trial.

    Raises:
        KeyError: there is none of that id.
    """
    found = _read(connection, _TRIALS.trial_id == trial_id)
    if not found:
        raise KeyError(f"there is no trial with id {trial_id}")
    return found[0]


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
        connection: to the database.
        study_id: of the study.
        after: only trials of larger ids,
        beside: and these.
        states: only trials in these states; None for all.

    Raises:
        KeyError: there is no such study.
    """
    wanted = [_TRIALS.study_id == study_id]
    if after > -1:
        by_name = len(beside) <= _FEW
        some = _TRIALS.trial_id.in_(sorted(beside)) if by_name else _TRIALS.trial_id >= min(beside)
        wanted.append(sa.or_(_TRIALS.trial_id > after, some) if beside else _TRIALS.trial_id > after)
    found = _read(connection, sa.and_(*wanted), states)
    if not found:
        study = sa.select(models.StudyModel.study_id).where(models.StudyModel.study_id == study_id)
        if connection.execute(study).first() is None:
            raise KeyError(f"there is no study with id {study_id}")
    if after > -1 and len(beside) > _FEW:
        found = [trial for trial in found if trial._trial_id > after or trial._trial_id in beside]
    return found


def _heads(
    connection: sa.Connection, wanted: sa.ColumnElement[bool], states: Collection[TrialState] | None = None
) -> list[Head]:
    columns = (_TRIALS.trial_id, _TRIALS.number, _TRIALS.state, _TRIALS.datetime_start, _TRIALS.datetime_complete)
    query = sa.select(*columns).where(wanted).order_by(_TRIALS.trial_id)
    if states is not None:  # of this moment only: what such a trial holds is read although it has gone on meanwhile
        query = query.where(_TRIALS.state.in_(list(states)))
    return [tuple(row) for row in connection.execute(query)]


def _read(
    connection: sa.Connection, wanted: sa.ColumnElement[bool], states: Collection[TrialState] | None = None
) -> list[FrozenTrial]:
    heads = _heads(connection, wanted, states)  # first: who is finished here is whole below
    if not heads:
        return []
    if len(heads) <= _FEW:
        return assemble(heads, _details_of(connection, [head[0] for head in heads]))
    matching = sa.select(_TRIALS.trial_id).where(wanted)
    known = {head[0] for head in heads}  # a trial that was made meanwhile is of the next look
    selects = _selects(lambda trial_id: trial_id.in_(matching))
    return assemble(heads, (detail for detail in _streamed(connection, selects) if detail[1] in known))


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


def _streamed(connection: sa.Connection, selects: list[sa.Select[Any]]) -> Iterator[Detail]:
    """In the order of each table's rows where that matters: attributes are long, and have none."""
    for place, select in enumerate(selects):
        ordered = select if place >= USER_ATTR else select.order_by("place")
        for rows in connection.execution_options(yield_per=_AT_ONCE).execute(ordered).partitions():
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
