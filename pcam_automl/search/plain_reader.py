"""A study read by plain SQL on its database's driver, without SQLAlchemy. Knows Optuna's tables of one version; writes nothing.

`status` on 1,000 trials spent 2 of its 3.7 s on importing SQLAlchemy and Alembic and 1 s in Optuna's ORM.
"""

from __future__ import annotations

import importlib
import json
import re
import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import quote, unquote

import optuna
from optuna.study import StudyDirection
from optuna.trial import TrialState

from pcam_automl.search.storage_url import BUSY_TIMEOUT_S, CONNECT_TIMEOUT_S, driver_module, plain_sqlite_path
from pcam_automl.search.trial_rows import (
    INTERMEDIATE,
    KNOWN_SCHEMA,
    PARAM,
    USER_ATTR,
    VALUE,
    Detail,
    Head,
    assemble,
    study_to_read,
)

_AT_ONCE = 5_000
"""Rows that psycopg turns into Python values at a time."""
_PLAIN_URL = re.compile(
    r"(?P<scheme>[a-z]+(\+[a-z0-9]+)?)://((?P<user>[^\s:/?#@\[\]]+)(:(?P<password>[^\s:/?#@\[\]]*))?@)?"
    r"(?P<host>[A-Za-z0-9._-]+)(:(?P<port>\d{1,5}))?/(?P<database>[A-Za-z0-9._-]+)"
)
"""A URL that every reader understands alike: no options, no address in brackets, nothing that ought to be percent-encoded."""
_ONE_MOMENT = {
    "psycopg": ("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY",),
    "pymysql": (
        "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ",
        "START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY",
    ),
}
"""By driver, what makes all statements of a connection see the same moment, whatever the server's default."""

Query = Callable[[str, Sequence[Any]], Iterable[Sequence[Any]]]
"""Rows of a statement whose parameters are marked by ``?``."""


def read_study(
    url: str, name: str, attrs: Collection[str] | None, *, of_complete: Collection[str] | None = None
) -> optuna.Study | None:
    """The study as it stands at one moment, to be read only.

    Args:
        url: of an SQLite file, PostgreSQL or MySQL.
        name: of the study.
        attrs: the user attributes of trials that are wanted; decoding all of them takes longer than all the rest. None reads
            no trials.
        of_complete: more user attributes, of complete trials only; parameters, too, are then read of those only, which is
            half of the time and of the memory of a large study.

    Returns:
        A study whose trials equal those that Optuna's own storage gives, but for what was not asked for, and without
        system attributes and times.
        None where SQLAlchemy or Optuna has to say what is wrong, or knows better: a missing or foreign database, tables of
        another version, no such study, several objectives, a URL that is not plain.

    Raises:
        StudyError: a server that is not there or refuses.
    """
    try:
        with _connected(url) as query:
            return None if query is None else _study(query, name, attrs, of_complete)
    except (sqlite3.Error, _DriverError):
        return None  # said by who opens the storage in Optuna's way, which comes next


class _DriverError(Exception):
    """What a server's driver raised of a statement, whichever driver it is."""


@contextmanager
def _connected(url: str) -> Iterator[Query | None]:
    """What asks the database, all of it of one moment; None where this URL is SQLAlchemy's to understand."""
    file = plain_sqlite_path(url)
    if file is not None:
        with closing(_open_sqlite(file)) as connection:
            yield connection.execute
        return
    driver, parts = _driver_of(url)
    if driver is None or parts is None:
        yield None
        return
    with closing(_open_server(driver, parts, url)) as server:

        def query(statement: str, values: Sequence[Any]) -> Iterable[Sequence[Any]]:
            with _driver_faults(driver):
                cursor = server.cursor()
                cursor.execute(statement.replace("?", "%s"), values)  # all rows come with it
            return _rows(cursor)

        for statement in _ONE_MOMENT[driver.__name__]:
            query(statement, ())
        yield query


def _rows(cursor: Any) -> Iterator[Sequence[Any]]:
    while rows := cursor.fetchmany(_AT_ONCE):
        yield from rows


@contextmanager
def _driver_faults(driver: ModuleType) -> Iterator[None]:
    try:
        yield
    except driver.Error as fault:
        raise _DriverError(str(fault)) from fault


def _open_sqlite(file: Path) -> sqlite3.Connection:
    # Not mode=ro: such a reader leaves -wal and -shm behind.
    connection = sqlite3.connect(f"file:{quote(str(file))}?mode=rw", uri=True, timeout=BUSY_TIMEOUT_S)
    try:
        connection.execute("PRAGMA query_only = ON")
        connection.execute("BEGIN")
    except BaseException:
        connection.close()
        raise
    return connection


def _driver_of(url: str) -> tuple[ModuleType | None, re.Match[str] | None]:
    """Psycopg or PyMySQL, whichever reads the URL, and the URL's parts; None for one that is not plain, of other drivers, or of
    none that is installed.
    """
    parts = _PLAIN_URL.fullmatch(url)
    module = None if parts is None else driver_module(parts["scheme"])
    return (importlib.import_module(module), parts) if module in _ONE_MOMENT else (None, None)


def _open_server(driver: Any, parts: re.Match[str], url: str) -> Any:
    """A connection.

    Raises:
        StudyError: the server is not there or refuses; asking it again in another way would take as long again.
    """
    known: dict[str, Any] = {key: unquote(parts[key]) for key in ("user", "password") if parts[key] is not None}
    known |= {"host": parts["host"], "connect_timeout": CONNECT_TIMEOUT_S}
    if parts["port"] is not None:
        known["port"] = int(parts["port"])
    known["dbname" if driver.__name__ == "psycopg" else "database"] = parts["database"]
    if driver.__name__ == "pymysql":
        known["read_timeout"] = CONNECT_TIMEOUT_S  # a server of another kind waits for what it is not told
    try:
        return driver.connect(**known)
    except (driver.Error, RuntimeError) as fault:  # PyMySQL's word where a package for its encryption is missing
        from pcam_automl.search.storage import storage_fault

        raise storage_fault(url, fault) from None


def _study(
    query: Query, name: str, attrs: Collection[str] | None, of_complete: Collection[str] | None
) -> optuna.Study | None:
    if [row[0] for row in query("SELECT version_num FROM alembic_version", ())] not in [[one] for one in KNOWN_SCHEMA]:
        return None
    ids = list(query("SELECT study_id FROM studies WHERE study_name = ?", (name,)))
    if not ids:
        return None
    ((study_id,),) = ids
    statement = "SELECT direction FROM study_directions WHERE study_id = ? ORDER BY objective"
    directions = [row[0] for row in query(statement, (study_id,))]
    if len(directions) != 1:
        return None
    kept = query("SELECT t.key, t.value_json FROM study_user_attributes t WHERE t.study_id = ?", (study_id,))
    user_attrs = {key: json.loads(text) for key, text in kept}
    trials = []
    if attrs is not None:
        rows = query("SELECT trial_id, number, state FROM trials WHERE study_id = ? ORDER BY number", (study_id,))
        heads: list[Head] = [(trial_id, number, TrialState[state], None, None) for trial_id, number, state in rows]
        trials = assemble(heads, _details(query, study_id, attrs, of_complete))
    return study_to_read(name, StudyDirection[directions[0]], trials, user_attrs)


def _details(
    query: Query, study_id: int, attrs: Collection[str], of_complete: Collection[str] | None
) -> Iterator[Detail]:
    """The rows of the study's trials, table by table; parameters in the order in which they were suggested."""

    def select(kind: int, table: str, columns: str, *, only: str = "", values: Collection[str] = ()) -> Iterable[Any]:
        statement = (
            f"SELECT {kind}, t.trial_id, {columns} FROM {table} t JOIN trials ON trials.trial_id = t.trial_id "
            f"WHERE trials.study_id = ? {only}"
        )
        return query(statement, (study_id, *values))

    complete = "AND trials.state = 'COMPLETE'"
    params = "t.param_name, t.param_value, t.distribution_json"
    yield from select(
        PARAM, "trial_params", params, only=("" if of_complete is None else complete) + " ORDER BY t.param_id"
    )
    yield from select(VALUE, "trial_values", "t.objective, t.value, t.value_type")
    steps = "t.step, t.intermediate_value, t.intermediate_value_type"
    yield from select(INTERMEDIATE, "trial_intermediate_values", steps)
    for wanted, states in ((attrs, ""), (of_complete or (), complete)):
        if wanted:
            only = f"{states} AND t.key IN ({', '.join('?' * len(wanted))})"
            yield from select(USER_ATTR, "trial_user_attributes", "t.key, NULL, t.value_json", only=only, values=wanted)
