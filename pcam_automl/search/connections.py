"""How the databases of the studies are connected to, and kept quick to use. Opens none; knows no trials and no slots."""

from __future__ import annotations

import sqlite3
import time
from typing import Any

import sqlalchemy as sa

from pcam_automl.search.storage_url import BUSY_TIMEOUT_S, CONNECT_TIMEOUT_S

RESTED_S = 1.0
"""A pooled connection that has rested so long is asked whether it lives before it is used: a server may have restarted."""

_TAKES_CONNECT_TIMEOUT = ("psycopg", "psycopg2", "pymysql", "mysqldb")
_LIBPQ = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3, "tcp_user_timeout": 30_000}
_LISTENS = {"psycopg": _LIBPQ, "psycopg2": _LIBPQ, "pymysql": {"read_timeout": 120, "write_timeout": 120}}
"""A server that vanished without a word is noticed within a minute or two: the system's own patience is two hours."""
_RESTS_SINCE = "pcam_automl_rests_since"


class WalConnection(sqlite3.Connection):
    """An SQLite connection that syncs at checkpoints only, which write-ahead logging makes safe against crashes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.execute("PRAGMA synchronous=NORMAL")


def engine_options(url: str) -> dict[str, Any]:
    """Options of ``create_engine``; picklable, so that a storage that travels to another process keeps them.

    ``pool_pre_ping`` would ask the server before each of a trial's twenty looks and writes.
    """
    parsed = sa.make_url(url)
    if parsed.get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": BUSY_TIMEOUT_S, "factory": WalConnection}}
    # Optuna switches the ping on for MySQL where it is not named.
    events = [(_checked_out, "checkout"), (_checked_in, "checkin")]
    options: dict[str, Any] = {"pool_pre_ping": False, "pool_events": events}
    driver = parsed.get_driver_name()
    asked = {"connect_timeout": CONNECT_TIMEOUT_S} if driver in _TAKES_CONNECT_TIMEOUT else {}
    asked |= _LISTENS.get(driver, {})
    if given := {name: value for name, value in asked.items() if name not in parsed.query}:
        options["connect_args"] = given
    return options


def probe_options(url: str) -> dict[str, Any]:
    """Options for one short look without a pool: a server of another kind behind the port, which would wait a minute for what
    PyMySQL does not say, is noticed after ten seconds.
    """
    options = engine_options(url)
    for of_pools in ("pool_events", "pool_pre_ping"):
        options.pop(of_pools, None)
    if sa.make_url(url).get_driver_name() == "pymysql":
        options["connect_args"] = {**options.get("connect_args", {}), "read_timeout": CONNECT_TIMEOUT_S}
    return options


def keep_on_disk(engine: sa.Engine) -> None:
    """What has been committed survives a power cut, and lies in the database's own file, as far as no reader holds it back.

    A server sees to it itself. An SQLite file is synced at its checkpoints only, which are 1,000 pages apart otherwise: many trials.
    """
    if engine.dialect.name == "sqlite":
        with engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA wal_checkpoint(PASSIVE)")


def reading(engine: sa.Engine) -> sa.Connection:
    """A connection for a few short statements that only read, each at its own moment; a context manager.

    On PostgreSQL without a transaction around them: its begin and its end are two of four messages.
    """
    connection = engine.connect()
    if engine.dialect.name == "postgresql":
        connection = connection.execution_options(isolation_level="AUTOCOMMIT")
    return connection


def _checked_in(connection: Any, record: Any) -> None:
    record.info[_RESTS_SINCE] = time.monotonic()


def _checked_out(connection: Any, record: Any, proxy: Any) -> None:
    """A listener of the pool's, which opens anew what this refuses, and all that was opened before it."""
    rests_since = record.info.get(_RESTS_SINCE)  # None of one that has just been opened
    if rests_since is None or time.monotonic() - rests_since < RESTED_S:
        return
    try:
        cursor = connection.cursor()
        cursor.execute("SELECT 1")
        cursor.close()
        connection.rollback()
    except Exception as fault:  # each driver has its own; whatever it is, this connection answers no more
        raise sa.exc.InvalidatePoolError(f"a connection has ended while it rested ({type(fault).__name__})") from fault
