"""The study database: connections, and faults in one line. Knows no slots; URLs are read elsewhere."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._rdb import models
from optuna.study import Study

from pcam_automl.errors import StudyError, first_few
from pcam_automl.search.connections import engine_options, probe_options
from pcam_automl.search.patience import PATIENCE, WORKERS_PATIENCE_S, is_creation_race, is_lock, retry_transient
from pcam_automl.search.retrying_storage import RetryingStorage
from pcam_automl.search.sqlite_place import check_local
from pcam_automl.search.storage_url import (
    check_file,
    driver_remedy,
    no_studies,
    normalised_url,
    safe_url,
    scrubbed,
    sqlite_path,
)

_OF_OPTUNA = {"studies": {"study_id", "study_name"}, "trials": {"trial_id", "study_id", "state"}}
"""By these columns its tables are known, in every version."""


@contextmanager
def quiet_experimental() -> Iterator[None]:
    """Hide Optuna's ``ExperimentalWarning`` inside the block, and no other warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


# --- connections -----------------------------------------------------------------------------------------------------


def _make_folder(url: str, *, create: bool) -> None:
    path = sqlite_path(url)
    if path is None:
        return
    check_local(path)
    if path.is_dir():
        raise StudyError(
            f"storage {safe_url(url)} is a folder; name a file in it, e.g. {safe_url(url).rstrip('/')}/pcam.db"
        )
    if not create:
        check_file(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise StudyError(f"the folder {path.parent} for the studies cannot be made ({fault.strerror})") from None


def _probe(url: str, *, write: bool) -> None:
    """Connect once and, for SQLite, switch the file to write-ahead logging (which stays) and see if it takes writes.

    Raises:
        StudyError: nothing is to be written, and there are no tables of Optuna's.
    """
    engine = sa.create_engine(url, **probe_options(url), poolclass=sa.NullPool)
    with retry_transient(engine.connect) if PATIENCE.seconds > 0 else engine.connect() as connection:
        _refuse_foreign(sa.inspect(connection), safe_url(url))
        if not write and not sa.inspect(connection).has_table(models.StudyModel.__tablename__):
            raise no_studies(safe_url(url))
        if engine.dialect.name != "sqlite":
            connection.execute(sa.text("SELECT 1"))
            return
        # The switch fails at once, without the busy timeout, while another process makes it.
        retry_transient(lambda: connection.exec_driver_sql("PRAGMA journal_mode=WAL"), only=is_lock)
        if write:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            connection.exec_driver_sql("PRAGMA user_version = 0")
            connection.rollback()


def _refuse_foreign(found: sa.Inspector, shown: str) -> None:
    """Before Optuna makes its tables between those of another program.

    Raises:
        StudyError: an SQLite file of another program, or tables on a server that are called as Optuna's are and are not.
    """
    if found.has_table(models.VersionInfoModel.__tablename__):
        return
    names = set(found.get_table_names())
    wrong = [
        table
        for table, columns in _OF_OPTUNA.items()
        if table in names and not columns <= {column["name"] for column in found.get_columns(table)}
    ]
    alien = found.bind.dialect.name == "sqlite" and names and not names & set(models.BaseModel.metadata.tables)
    if wrong or alien:
        raise StudyError(
            f"storage {shown} belongs to another program (its tables: {first_few(wrong or sorted(names))}) and is left as it is; "
            "name another --storage"
        )


def open_storage(url: str, *, heartbeat_s: int = 60, create: bool = True) -> RetryingStorage:
    """Open (and where needed make) the database of the studies.

    Args:
        url: SQLAlchemy URL; SQLite files get their folder, write-ahead logging and a 60 s busy timeout.
        heartbeat_s: seconds between the signs of life of a running trial, positive; a worker sets its study's.
        create: False refuses an SQLite file that does not exist, and a database without Optuna's tables, instead of making them.

    Raises:
        StudyError: wrong or unreachable URL, missing driver, no rights, a foreign file, a schema of another Optuna.
    """
    url = normalised_url(url)
    _make_folder(url, create=create)
    try:
        _probe(url, write=create)
        storage = retry_transient(lambda: _build(url, heartbeat_s), only=is_creation_race)
    except (sa.exc.SQLAlchemyError, StorageInternalError, ImportError) as fault:
        raise storage_fault(url, fault) from None
    except RuntimeError as fault:  # Optuna's word on a schema of another version
        raise StudyError(f"storage {safe_url(url)}: {scrubbed(fault, url)}") from None
    # At the process's end, too: the last connection to close moves what is beside an SQLite file into it, so that its copy is whole.
    weakref.finalize(
        storage.engine, storage.engine.pool.dispose
    )  # whoever keeps the engine may have dropped the storage
    return storage


def _build(url: str, heartbeat_s: int) -> RetryingStorage:
    with quiet_experimental():
        return RetryingStorage(
            url.replace("{", "{{").replace("}", "}}"),  # Optuna formats the URL as a template
            engine_kwargs=engine_options(url),
            heartbeat_interval=heartbeat_s,
        )


def engine_of(of: Study | BaseStorage) -> sa.Engine:
    """The SQLAlchemy engine of a study or a storage.

    Raises:
        StudyError: it does not live in an SQL database.
    """
    return rdb_of(of).engine


def rdb_of(of: Study | BaseStorage) -> RDBStorage:
    """The SQL storage of a study, also under the cache that Optuna puts around it.

    Raises:
        StudyError: it does not live in an SQL database.
    """
    storage = of._storage if isinstance(of, Study) else of
    inner = getattr(storage, "_backend", storage)
    if not isinstance(inner, RDBStorage):
        raise StudyError(f"a study of this package lives in an SQL database, got {type(inner).__name__}")
    return inner


def storage_fault(url: str, fault: Exception) -> StudyError:
    """One line for what the database or its driver said; no password is in it."""
    root = fault.__cause__ if isinstance(fault, StorageInternalError) and fault.__cause__ else fault
    text = scrubbed(getattr(root, "orig", None) or root, url)
    shown = safe_url(url)
    if isinstance(root, ModuleNotFoundError | ImportError | sa.exc.NoSuchModuleError):
        return StudyError(f"storage {shown} needs a driver that is not installed; {driver_remedy(url)}")
    if shown.startswith("sqlite"):
        remedy = {
            "not a database": "it is another kind of file; name another one",
            "readonly": "change its rights or name another --storage",
            "unable to open": "check the folder's rights or name another --storage",
            "disk is full": "free some space and repeat the same command",
            "locked": "another program holds it; close it and repeat the same command",
        }
        advice = next((words for sign, words in remedy.items() if sign in text), "see the message")
        return StudyError(f"storage {shown} cannot be used: {text}; {advice}")
    if PATIENCE.exhausted:
        return StudyError(
            f"storage {shown} was away for more than {WORKERS_PATIENCE_S / 60:.0f} minutes ({text}); "
            "scored rungs are kept as checkpoints, the same command goes on once it is back"
        )
    advice = (
        "ask for the rights"
        if "denied for" in text and "table" in text
        else "check host, port, user, password and database name, and that it is a server of this kind"
    )
    return StudyError(f"storage {shown} cannot be used: {text}; {advice}")


@contextmanager
def storage_faults(url: str) -> Iterator[None]:
    """Turn a database error inside the block into a one-line :class:`StudyError` without the URL's password."""
    try:
        yield
    except (StorageInternalError, sa.exc.SQLAlchemyError) as fault:
        raise storage_fault(url, fault) from fault
