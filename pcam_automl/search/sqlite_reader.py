"""A study in an SQLite file, read without SQLAlchemy. Knows Optuna's tables of one version; writes nothing.

`status` on 1,000 trials spent 2 of its 3.7 s on importing SQLAlchemy and Alembic and 1 s in Optuna's ORM.
"""

from __future__ import annotations

import functools
import itertools
import json
import sqlite3
from collections.abc import Collection, Iterator
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from pcam_automl.search.trial_rows import (
    INTERMEDIATE,
    KNOWN_SCHEMA,
    PARAM,
    USER_ATTR,
    VALUE,
    assemble,
    study_to_read,
)

_BUSY_TIMEOUT_S = 60


def read_study(
    file: Path, name: str, attrs: Collection[str], *, of_complete: Collection[str] | None = None
) -> optuna.Study | None:
    """The study as it stands in the file, to be read only.

    Args:
        file: an SQLite file.
        name: of the study.
        attrs: the user attributes of trials that are wanted; decoding all of them takes longer than all the rest.
        of_complete: more user attributes, of complete trials only; parameters, too, are then read of those only, which is
            half of the time and of the memory of a large study.

    Returns:
        A study whose trials equal those that Optuna's own storage gives, but for what was not asked for, and without
        system attributes.
        None where Optuna has to say what is wrong, or knows better: a missing or foreign file, tables of another
        version, no such study, several objectives.
    """
    try:
        address = f"file:{quote(str(file))}?mode=rw"  # a reader with mode=ro leaves -wal and -shm behind
        with closing(sqlite3.connect(address, uri=True, timeout=_BUSY_TIMEOUT_S)) as database:
            database.execute("PRAGMA query_only = ON")
            database.execute("BEGIN")  # one moment for all tables, while workers write
            return _study(database, name, attrs, of_complete)
    except sqlite3.Error:
        return None


def _study(
    database: sqlite3.Connection, name: str, attrs: Collection[str], of_complete: Collection[str] | None
) -> optuna.Study | None:
    if [row[0] for row in database.execute("SELECT version_num FROM alembic_version")] not in [
        [known] for known in KNOWN_SCHEMA
    ]:
        return None
    ids = database.execute("SELECT study_id FROM studies WHERE study_name = ?", (name,)).fetchall()
    if not ids:
        return None
    ((study_id,),) = ids
    directions = [row[0] for row in database.execute(
        "SELECT direction FROM study_directions WHERE study_id = ? ORDER BY objective", (study_id,)
    )]  # fmt: skip
    if len(directions) != 1:
        return None
    query = "SELECT key, value_json FROM study_user_attributes WHERE study_id = ?"
    user_attrs = {key: json.loads(text) for key, text in database.execute(query, (study_id,))}
    return study_to_read(
        name, StudyDirection[directions[0]], _trials(database, study_id, attrs, of_complete), user_attrs
    )


def _trials(
    database: sqlite3.Connection, study_id: int, attrs: Collection[str], of_complete: Collection[str] | None
) -> list[FrozenTrial]:
    """All trials by number."""
    rows = functools.partial(_rows, database, study_id)
    heads = (
        (trial_id, number, TrialState[state], _time(started), _time(completed))
        for trial_id, number, state, started, completed in rows(
            "trials", "number, state, datetime_start, datetime_complete", order="number"
        )
    )
    params = rows("trial_params", "param_name, param_value, distribution_json", "param_id", state=_state(of_complete))
    some = (
        rows("trial_user_attributes", "key, NULL, value_json", keys=of_complete, state="COMPLETE")
        if of_complete
        else ()
    )
    details = itertools.chain(
        ((PARAM, *row) for row in params),
        ((USER_ATTR, *row) for row in some),
        ((VALUE, *row) for row in rows("trial_values", "objective, value, value_type")),
        (
            (INTERMEDIATE, *row)
            for row in rows("trial_intermediate_values", "step, intermediate_value, intermediate_value_type")
        ),
        ((USER_ATTR, *row) for row in rows("trial_user_attributes", "key, NULL, value_json", keys=attrs)),
    )
    return assemble(heads, details)


def _state(of_complete: Collection[str] | None) -> str | None:
    return None if of_complete is None else "COMPLETE"


def _rows(
    database: sqlite3.Connection,
    study_id: int,
    table: str,
    columns: str,
    order: str = "trial_id",
    keys: Collection[str] = (),
    state: str | None = None,
) -> Iterator[tuple[Any, ...]]:
    """Trial id and the columns, for every row of the study's trials (in that state) in that table."""
    only = f"AND key IN ({', '.join('?' * len(keys))})" if keys else ""
    only += "" if state is None else f" AND state = '{state}'"
    query = f"SELECT trial_id, {columns} FROM {table} JOIN trials USING (trial_id) WHERE study_id = ? {only} ORDER BY {order}"
    if table == "trials":
        query = f"SELECT trial_id, {columns} FROM trials WHERE study_id = ? ORDER BY {order}"
    return database.execute(query, (study_id, *keys))


def _time(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)
