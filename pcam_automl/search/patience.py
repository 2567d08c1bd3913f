"""Database calls that outlive a lock, a deadlock and a server that is away for a while. Opens no database."""

from __future__ import annotations

import logging
import math
import random
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import sqlalchemy as sa
from optuna.exceptions import StorageInternalError

T = TypeVar("T")
logger = logging.getLogger(__name__)

# A database server that restarts is away for some seconds; 7 tries over half a minute, more where a worker waits longer.
PAUSES_S: Sequence[float] = (0.2, 0.5, 1.0, 2.0, 8.0, 20.0)
WORKERS_PATIENCE_S = 300.0
"""A worker trains on and waits so long for a database that is away, then ends; its checkpoints stay."""
_AWAY = (
    "connection refused",
    "starting up",
    "shutting down",
    "recovery mode",
    "not yet accepting connections",
    "closed the connection unexpectedly",
    "timeout expired",
    "connection timed out",
    "no route to host",
    "is unreachable",
    "failed to resolve host",
    "could not translate host name",
    "connection reset",
    "too many clients",
    "connection slots",
)
# Serialization failure, deadlock, server shutting down or starting; MySQL's lock timeout, deadlock, lost server.
_TRANSIENT_SQLSTATES = (
    "40001",
    "40P01",
    "53300",
    "57P01",
    "57P02",
    "57P03",
    "08000",
    "08001",
    "08003",
    "08004",
    "08006",
    "25006",
)
_TRANSIENT_MYSQL = (1040, 1047, 1053, 1158, 1159, 1160, 1161, 1205, 1213, 2002, 2003, 2006, 2013, 2014)


def database_fault(fault: BaseException) -> sa.exc.DBAPIError | None:
    """The driver's own error inside one of Optuna's or SQLAlchemy's; None for any other fault."""
    inner = fault.__cause__ if isinstance(fault, StorageInternalError) else fault
    return inner if isinstance(inner, sa.exc.DBAPIError) else None


def is_lock(fault: Exception) -> bool:
    """Another connection holds the SQLite file."""
    found = database_fault(fault)
    return found is not None and isinstance(found.orig, sqlite3.OperationalError) and "locked" in str(found.orig)


def is_creation_race(fault: Exception) -> bool:
    """Two processes that make the same tables at once: the second try finds them made."""
    found = database_fault(fault)
    return found is not None and (
        isinstance(found, sa.exc.IntegrityError) or "already exists" in str(found.orig).lower() or is_transient(fault)
    )


def is_transient(fault: Exception) -> bool:
    """Whether the same statement may well succeed a little later: locks, deadlocks, a server that restarts."""
    inner = fault.__cause__ if isinstance(fault, StorageInternalError) else fault
    if isinstance(
        inner, sa.exc.PendingRollbackError
    ):  # the connection died inside a transaction, which is closed by now
        return True
    found = database_fault(fault)
    if found is None:
        return False
    if found.connection_invalidated or is_lock(fault):
        return True
    if getattr(found.orig, "sqlstate", None) in _TRANSIENT_SQLSTATES:
        return True
    codes = getattr(found.orig, "args", ())
    if codes and codes[0] in _TRANSIENT_MYSQL:
        return True
    text = str(found.orig).lower()
    return isinstance(found, sa.exc.OperationalError) and any(words in text for words in _AWAY)


@dataclass
class Patience:
    """How long this process waits for its database beyond the pauses of ``PAUSES_S``.

    Attributes:
        seconds: of a call, from its first try; 0 leaves it at the pauses.
        exhausted: whether a call has given up; others then fail at their first try, until one succeeds.
    """

    seconds: float = 0.0
    exhausted: bool = False


PATIENCE = Patience()


@contextmanager
def patient(seconds: float = WORKERS_PATIENCE_S) -> Iterator[None]:
    """Inside the block every database call of this process, heartbeats too, waits so long for a server that is away."""
    before = PATIENCE.seconds
    PATIENCE.seconds, PATIENCE.exhausted = max(before, seconds), False
    try:
        yield
    finally:
        PATIENCE.seconds = before


def retry_transient(
    call: Callable[[], T], *, only: Callable[[Exception], bool] = is_transient, longest_s: float = math.inf
) -> T:
    """``call()``, again after each pause of ``PAUSES_S``, and then after the last of them for as long as there is
    :class:`Patience`, while it fails with a fault that ``only`` accepts. No pause is longer than ``longest_s``.

    Raises:
        Exception: the last fault, unchanged.
    """
    began, tries = time.monotonic(), 0
    while True:
        try:
            result = call()
        except (sa.exc.SQLAlchemyError, StorageInternalError) as fault:
            if not only(fault) or PATIENCE.exhausted:
                raise
            pause_s = min(longest_s, PAUSES_S[min(tries, len(PAUSES_S) - 1)])
            if tries >= len(PAUSES_S) and time.monotonic() - began + pause_s > PATIENCE.seconds:
                PATIENCE.exhausted = PATIENCE.seconds > 0
                raise
            if tries == len(PAUSES_S):
                logger.warning("the database has been away for %.0f s; waiting on", time.monotonic() - began)
            tries += 1
        else:
            PATIENCE.exhausted = False
            return result
        time.sleep(pause_s * random.uniform(0.5, 1.0))  # so that six workers do not come back at once
