from __future__ import annotations

import logging
import os
import pickle
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
import uuid
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import sqlalchemy as sa
from databases import server_url
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from pcam_automl.errors import StudyError
from pcam_automl.search import connections, retrying_storage
from pcam_automl.search import patience as module
from pcam_automl.search.connections import keep_on_disk
from pcam_automl.search.patience import is_transient, retry_transient
from pcam_automl.search.retrying_storage import end_with, set_user_attrs
from pcam_automl.search.storage import engine_of, open_storage, quiet_experimental, storage_fault
from pcam_automl.search.storage_url import driver_remedy, normalised_url, safe_url

SECRET = "s3cr:t/p@ss w%rd"
ENCODED = "s3cr%3At%2Fp%40ss%20w%25rd"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSES_S", (0.0,) * 6)


def locked() -> StorageInternalError:
    fault = StorageInternalError("An exception is raised during the commit.")
    fault.__cause__ = sa.exc.OperationalError("UPDATE", {}, sqlite3.OperationalError("database is locked"))
    return fault


# --- SQLite ----------------------------------------------------------------------------------------------------------


def test_sqlite_gets_its_folder_and_every_connection_the_pragmas(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "pcam.db"
    storage = open_storage(f"sqlite:///{path}")
    for copy in (storage, pickle.loads(pickle.dumps(storage))):
        engine = engine_of(copy)
        engine.dispose()  # so that the next connection is a new one
        with engine.connect() as connection:
            values = [connection.exec_driver_sql(f"PRAGMA {p}").scalar() for p in ("journal_mode", "synchronous")]
            assert values == ["wal", 1]
            assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 60_000
        engine.dispose()


def test_study_survives_reopening_with_heartbeats_and_without_a_warning(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/{{odd}} name%20.db"  # braces are a template to Optuna, percents to alembic
    storage = open_storage(url, heartbeat_s=30)
    assert storage.get_heartbeat_interval() == 30
    study = optuna.create_study(storage=storage, study_name="s", direction="maximize")
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    engine_of(study).dispose()
    again = optuna.load_study(storage=open_storage(url, create=False), study_name="s")
    assert len(again.trials) == 2
    assert engine_of(again).url.database == engine_of(study).url.database
    engine_of(again).dispose()


def test_what_is_kept_on_the_disk_lies_in_the_file_itself(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    storage = open_storage(url)
    optuna.create_study(study_name="one", storage=storage)
    shutil.copy(tmp_path / "s.db", tmp_path / "before.db")
    keep_on_disk(storage.engine)
    shutil.copy(tmp_path / "s.db", tmp_path / "after.db")
    with pytest.raises(StudyError, match="no studies"):
        open_storage(f"sqlite:///{tmp_path}/before.db", create=False)
    assert optuna.get_all_study_names(open_storage(f"sqlite:///{tmp_path}/after.db", create=False)) == ["one"]


def test_an_engine_that_outlives_its_storage_is_closed_at_the_end_of_the_process(tmp_path: Path) -> None:
    """As `worker` and `serve` keep one."""
    code = f"""
import atexit, os, optuna, sqlalchemy as sa
from pcam_automl.search.storage import engine_of, open_storage
url = "sqlite:///{tmp_path}/s.db"
engine = engine_of(open_storage(url))
with engine.connect() as connection:
    connection.execute(sa.text("SELECT * FROM studies")).all()
optuna.create_study(study_name="one", storage=open_storage(url))
atexit._run_exitfuncs()
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert [file.name for file in tmp_path.iterdir()] == ["s.db"]


def test_opening_to_read_makes_no_file(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"there are no studies in .*pcam.db; start one with"):
        open_storage(f"sqlite:///{tmp_path}/a/pcam.db", create=False)
    assert not (tmp_path / "a").exists()


def test_foreign_file_folder_and_blocked_path_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.db").write_text("not a database, but long enough to be read as one " * 40)
    (tmp_path / "file").write_text("")
    for name, message in [
        ("notes.db", "file is not a database; it is another kind of file"),
        ("", "is a folder; name a file in it"),
        ("file/pcam.db", "cannot be made"),
    ]:
        with pytest.raises(StudyError, match=message) as caught:
            open_storage(f"sqlite:///{tmp_path}/{name}")
        assert "\n" not in str(caught.value)


def test_read_only_file_is_refused(tmp_path: Path) -> None:
    engine_of(open_storage(f"sqlite:///{tmp_path}/pcam.db")).dispose()
    with pytest.raises(StudyError, match=r"readonly database; change its rights or name another --storage"):
        open_storage(f"sqlite:///file:{tmp_path}/pcam.db?mode=ro&uri=true")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(StudyError, match=r"unable to open database file; check the folder's rights"):
        open_storage(f"sqlite:///{tmp_path}/pcam.db")
    with pytest.raises(StudyError, match="cannot be made"):
        open_storage(f"sqlite:///{tmp_path}/a/pcam.db")


def test_schema_of_another_optuna_is_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/pcam.db"
    engine_of(open_storage(url)).dispose()
    with sqlite3.connect(tmp_path / "pcam.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v99'")
    connection.close()
    with pytest.raises(StudyError, match=r"no longer compatible with the table schema.*pip install -U optuna"):
        open_storage(url)


def test_storage_that_is_no_database_has_no_engine() -> None:
    with pytest.raises(StudyError, match="lives in an SQL database, got InMemoryStorage"):
        engine_of(optuna.create_study())


# --- URLs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("", r"there are no studies in sqlite:///.*mine\.db; start one with"),
        ("CREATE TABLE mine (a INTEGER)", "belongs to another program"),
    ],
)
def test_who_only_looks_makes_no_tables_in_a_database_of_others(tmp_path: Path, statement: str, said: str) -> None:
    file = tmp_path / "mine.db"
    with closing(sqlite3.connect(file)) as database:
        database.execute(statement)
    file.touch()
    held = file.read_bytes()
    with pytest.raises(StudyError, match=said):
        open_storage(f"sqlite:///{file}", create=False)
    assert file.read_bytes() == held
    assert [other.name for other in tmp_path.iterdir()] == ["mine.db"]
    if not statement:
        engine_of(open_storage(f"sqlite:///{file}")).dispose()
        engine_of(open_storage(f"sqlite:///{file}", create=False)).dispose()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("studies/pcam.db", r"did you mean 'sqlite:///studies/pcam.db'\?"),
        ("", "must be a database URL"),
        ("sqlite://studies/pcam.db", r"three slashes .*did you mean 'sqlite:///studies/pcam.db'"),
        ("sqlite://", "in memory cannot be resumed"),
        ("sqlite:///:memory:", "in memory cannot be resumed"),
        ("sqlight:///a.db", r"one of sqlite, postgresql, mysql, got 'sqlight' \(did you mean 'sqlite'\?\)"),
        ("redis://localhost/0", "one of sqlite, postgresql, mysql, got 'redis'"),
        ("postgresql://u@h:port/db", "is not valid; write scheme://user:password@host:port/database"),
        ("://", "is not valid"),
        ("+psycopg://h/db", "is not valid"),
        ("postgresql:user:secret@host/db?proxy=http://x", "is not valid"),
        ("postgresql://u@h", "names no database"),
        (
            "postgresql+nodriver://u@h/db",
            r"write postgresql://\.\.\. without it, and run: pip install 'psycopg\[binary\]'",
        ),
        ("mysql+mysqlconnector://u@h/db", r"write mysql://\.\.\. without it, and run: pip install 'pymysql'"),
        ("sqlite+aiosqlite:///studies/x.db", "sqlite takes no driver 'aiosqlite'; write sqlite:///FILE"),
    ],
)
def test_wrong_url_is_refused_in_one_line(url: str, message: str) -> None:
    with pytest.raises(StudyError, match=message) as caught:
        open_storage(url)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "want"),
    [
        ("postgresql://u:p@h/db", "postgresql+psycopg://u:p@h/db"),
        ("postgres://u@h/db", "postgresql+psycopg://u@h/db"),
        ("mysql://u@h:1/db?charset=utf8mb4", "mysql+pymysql://u@h:1/db?charset=utf8mb4"),
        ("mariadb+pymysql://u@h/db", "mysql+pymysql://u@h/db"),
        ("postgresql+psycopg2://u@h/db", "postgresql+psycopg2://u@h/db"),
    ],
)
def test_driver_is_the_installed_one(url: str, want: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in ("psycopg", "pymysql") else None)
    assert normalised_url(url) == want


@pytest.mark.parametrize(
    "table", ["photos (name text)", "studies (study_id integer, title text)", "trials (id integer)"]
)
@pytest.mark.parametrize("create", [True, False])
def test_a_database_of_another_program_is_refused_and_left_as_it_is(tmp_path: Path, table: str, create: bool) -> None:
    file = tmp_path / "other.db"
    with closing(sqlite3.connect(file)) as connection:
        connection.execute(f"CREATE TABLE {table}")
    before = file.read_bytes()
    with pytest.raises(StudyError, match=r"other\.db belongs to another program \(its tables: "):
        open_storage(f"sqlite:///{file}", create=create)
    assert file.read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["other.db"]


@pytest.mark.postgres
def test_a_server_s_table_that_is_only_called_as_optunas_is_refused() -> None:
    url = server_url("postgresql")
    server = sa.create_engine(normalised_url(url), isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    name = f"test_{uuid.uuid4().hex}"
    with server.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    mine = sa.make_url(normalised_url(url)).set(database=name).render_as_string(hide_password=False)
    try:
        with sa.create_engine(mine, poolclass=sa.NullPool).begin() as connection:
            connection.execute(sa.text("CREATE TABLE photos (title text)"))
        open_storage(mine).engine.dispose()  # beside another program's tables it may be
        with sa.create_engine(mine, poolclass=sa.NullPool).begin() as connection:
            connection.execute(
                sa.text("DROP SCHEMA public CASCADE; CREATE SCHEMA public; CREATE TABLE trials (id int)")
            )
        with pytest.raises(StudyError, match=r"belongs to another program \(its tables: trials\)"):
            open_storage(mine)
    finally:
        with server.connect() as connection:
            connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql+psycopg://u:secret@h:5432/db", "postgresql://u:***@h:5432/db"),
        ("mysql+pymysql://u@h/db", "mysql://u@h/db"),
        ("postgresql+psycopg2://u@h/db", "postgresql+psycopg2://u@h/db"),
        ("sqlite:///a+b.db", "sqlite:///a+b.db"),
        ("postgresql://postgres:postgres@h/postgres", "postgresql://postgres:***@h/postgres"),
        ("postgresql://user:s3cret@r:s3cret", "postgresql://user:***@r:***"),
        ("postgresql://user:s3cret@h/n?essql://user:s3cret", "postgresql://user:***@h/n?essql://user:***"),
        (
            "postgresql+psyco/user:s3cret\ufffddb/user:s3cret@db:5432/n",
            "postgresql+psyco/user:***\ufffddb/user:***@db:5432/n",
        ),
    ],
)
def test_neither_a_password_nor_a_driver_that_nobody_named_is_shown(url: str, shown: str) -> None:
    assert safe_url(url) == shown


@pytest.mark.postgres
def test_a_server_of_another_kind_behind_the_port_is_noticed_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """PostgreSQL says nothing to a client of MySQL and waits for it for a minute."""
    monkeypatch.setattr(connections, "CONNECT_TIMEOUT_S", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"mysql://root@127.0.0.1:{silent.getsockname()[1]}/test"
        began = time.monotonic()
        with pytest.raises(StudyError, match="cannot be used"):
            open_storage(url)
        assert time.monotonic() - began < 20


def test_missing_driver_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(StudyError, match=r"needs the package psycopg; run: pip install 'psycopg\[binary\]'"):
        normalised_url("postgresql://u@h/db")
    with pytest.raises(StudyError, match=r"needs the package pymysql; run: pip install 'pymysql'"):
        normalised_url("mysql://u@h/db")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("postgresql+psycopg2://u@h/db", "run: pip install 'psycopg2-binary'"),
        ("postgresql+psycopg://u@h/db", "run: pip install 'psycopg[binary]'"),
        ("mariadb+mysqldb://u@h/db", "run: pip install 'mysqlclient'"),
        ("mariadb+other://u@h/db", "write mariadb://... without it, and run: pip install 'pymysql'"),
    ],
)
def test_a_driver_that_is_named_gets_its_own_remedy(url: str, words: str) -> None:
    assert driver_remedy(url) == words


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://u:{ENCODED}@127.0.0.1:1/db",
        f"mysql://u:{ENCODED}@127.0.0.1:1/db",
        f"postgresql://u@127.0.0.1:1/db?password={ENCODED}",
        f"postgresql://u:{SECRET}@127.0.0.1:1/db",
        f"postgresql://u:{ENCODED}@127.0.0.1:port/db",
        f"postgresql+nodriver://u:{ENCODED}@h/db",
        f"postgresql://u:{ENCODED}@127.0.0.1:1",
        f"redis://u:{ENCODED}@127.0.0.1:1/db",
        f"postgres:{SECRET}@127.0.0.1/db",
        f"postgresql://u:{ENCODED}@127.0.0.1:1/db?no_such_option=1",
    ],
)
def test_password_is_never_shown(url: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), pytest.raises(StudyError) as caught:
        open_storage(url)
    shown = safe_url(url) + str(caught.value) + caplog.text
    for spelling in (SECRET, ENCODED, "s3cr", "w%25rd", "w%rd"):
        assert spelling not in shown
    assert "***" in safe_url(url)
    assert "\n" not in str(caught.value)


def test_unreachable_server_is_named_without_a_second_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSES_S", (3600.0,))
    with pytest.raises(StudyError, match=r"u:\*\*\*@127.0.0.1:1/db cannot be used.*check host, port, user, password"):
        open_storage("postgresql://u:pw@127.0.0.1:1/db")


# --- retries ---------------------------------------------------------------------------------------------------------


def test_transient_fault_is_tried_again_and_others_are_not() -> None:
    faults: list[Exception] = [locked(), locked()]
    assert retry_transient(lambda: faults.pop() and (_ for _ in ()).throw(locked()) if faults else "done") == "done"
    calls = []

    def wrong() -> None:
        calls.append(1)
        raise StorageInternalError("no cause")

    with pytest.raises(StorageInternalError):
        retry_transient(wrong)
    assert len(calls) == 1


def test_persistent_fault_is_raised_in_the_end() -> None:
    calls = []

    def always() -> None:
        calls.append(1)
        raise locked()

    with pytest.raises(StorageInternalError):
        retry_transient(always)
    assert len(calls) == 7


def test_a_worker_waits_longer_and_then_gives_up_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds, calls = [0.0], []
    monkeypatch.setattr(module, "PAUSES_S", (1.0, 20.0))
    monkeypatch.setattr(
        module,
        "time",
        SimpleNamespace(monotonic=lambda: seconds[0], sleep=lambda s: seconds.__setitem__(0, seconds[0] + s)),
    )
    monkeypatch.setattr(module.random, "uniform", lambda a, b: 1.0)

    def away() -> None:
        calls.append(seconds[0])
        raise locked()

    with module.patient(100.0):
        with pytest.raises(StorageInternalError):
            retry_transient(away)
        assert calls == [0.0, 1.0, 21.0, 41.0, 61.0, 81.0]
        with pytest.raises(StorageInternalError):
            retry_transient(away)
        assert len(calls) == 7, "one try while the server is known to be away"
        assert "was away for more than 5 minutes" in str(storage_fault("postgresql://u:p@h/d", locked()))
        assert retry_transient(lambda: "back") == "back"
        with pytest.raises(StorageInternalError):
            retry_transient(away)
        assert len(calls) == 7 + 6
    assert module.PATIENCE.seconds == 0.0
    module.PATIENCE.exhausted = False


def test_a_transaction_whose_connection_died_is_tried_again() -> None:
    fault = StorageInternalError("An exception is raised during the commit.")
    fault.__cause__ = sa.exc.PendingRollbackError("Can't reconnect until invalid transaction is rolled back.")
    assert is_transient(fault)


def test_deadlocks_and_lost_servers_are_transient() -> None:
    def fault(orig: BaseException, *, invalidated: bool = False) -> Exception:
        return sa.exc.OperationalError("UPDATE", {}, orig, connection_invalidated=invalidated)

    class DeadlockError(Exception):
        sqlstate = "40P01"

    assert is_transient(fault(DeadlockError()))
    assert is_transient(fault(Exception(1213, "Deadlock found")))
    assert is_transient(fault(Exception("gone"), invalidated=True))
    assert not is_transient(fault(Exception(1045, "Access denied")))
    assert not is_transient(fault(sqlite3.OperationalError("no such table: x")))


def failing_once(
    monkeypatch: pytest.MonkeyPatch, name: str, *, on: object = RDBStorage, after: bool = False
) -> list[int]:
    """Make one call of a method or function fail as a locked database does, before or after its work."""
    real, calls = getattr(on, name), []

    def flaky(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == 1:
            if after:
                real(*args, **kwargs)
            raise locked()
        return real(*args, **kwargs)

    monkeypatch.setattr(on, name, flaky)
    return calls


def losing_an_answer(monkeypatch: pytest.MonkeyPatch, engine: sa.Engine) -> list[int]:
    """Make the next commit happen and seem to fail."""
    return failing_once(monkeypatch, "do_commit", on=engine.dialect, after=True)


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")  # asked by hand here
def test_finished_state_whose_answer_was_lost_is_not_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = optuna.create_study(storage=open_storage(f"sqlite:///{tmp_path}/s.db"))
    trial = study.ask()
    end_with(trial, reason="complete")
    commits = losing_an_answer(monkeypatch, engine_of(study))
    study.tell(trial, 1.0)
    assert len(commits) >= 2
    (told,) = study.trials
    assert (told.state, told.value, told.user_attrs["reason"]) == (TrialState.COMPLETE, 1.0, "complete")
    engine_of(study).dispose()


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")  # asked by hand here
def test_an_ending_that_another_worker_came_before_changes_nothing(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    study = optuna.create_study(study_name="s", storage=open_storage(url))
    trial = study.ask()
    end_with(trial, reason="complete")
    other = optuna.load_study(study_name="s", storage=open_storage(url))
    other._storage.set_trial_user_attr(trial._trial_id, "reason", "worker lost")
    other.tell(trial.number, state=TrialState.FAIL)
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        study._storage.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [1.0])
    (row,) = study.get_trials(deepcopy=False)
    assert (row.state, row.value, row.user_attrs["reason"]) == (TrialState.FAIL, None, "worker lost")
    for storage in (study, other):
        engine_of(storage).dispose()


def test_session_level_fault_is_outlived_by_a_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = optuna.create_study(storage=open_storage(f"sqlite:///{tmp_path}/s.db"))
    calls = failing_once(monkeypatch, "end_trial", on=retrying_storage)
    calls_param = failing_once(monkeypatch, "_set_trial_param_without_commit")
    calls_attr = failing_once(monkeypatch, "_set_trial_attr_without_commit")

    def objective(trial: optuna.Trial) -> float:
        trial.set_user_attr("reason", "x")
        return trial.suggest_float("x", 0, 1)

    study.optimize(objective, n_trials=1)
    assert study.trials[0].state == TrialState.COMPLETE
    assert min(len(calls), len(calls_param), len(calls_attr)) == 2
    engine_of(study).dispose()


@pytest.mark.parametrize("seen_by", ["attribute", "attributes", "report", "end", "another read", "prune"])
@pytest.mark.filterwarnings("ignore:Heartbeat of storage")  # asked by hand here
def test_parameters_are_in_the_database_with_whatever_is_written_next(tmp_path: Path, seen_by: str) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    study = optuna.create_study(study_name="s", storage=open_storage(url))
    other = optuna.load_study(study_name="s", storage=open_storage(url))
    for _ in range(2):  # from the second trial on the process has met the names
        trial = study.ask()
        wanted = {"x": trial.suggest_float("x", 0, 1), "y": trial.suggest_categorical("y", ["a", "b"])}
        if seen_by == "attribute":
            trial.set_user_attr("reason", "x")
        elif seen_by == "attributes":
            set_user_attrs(trial, reason="x", seconds=1)
        elif seen_by == "report":
            trial.report(0.5, step=1)
        elif seen_by == "end":
            study.tell(trial, 0.5)
        elif seen_by == "prune":
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.get_trials(deepcopy=False)
        found = other.get_trials(deepcopy=False)[trial.number]
        assert found.params == wanted
        assert found.distributions["y"] == optuna.distributions.CategoricalDistribution(("a", "b"))
    engine_of(study).dispose()
    engine_of(other).dispose()


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")  # asked by hand here
def test_parameters_are_written_once_and_survive_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = optuna.create_study(storage=open_storage(f"sqlite:///{tmp_path}/s.db"))
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    storage = study._storage._backend  # type: ignore[attr-defined]
    real, calls = storage.check_trial_is_updatable, []

    def flaky(*words: object) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise locked()
        real(*words)

    monkeypatch.setattr(storage, "check_trial_is_updatable", flaky)
    set_user_attrs(trial, reason="x")
    assert len(calls) == 2
    study.tell(trial, 0.5)
    assert study.trials[1].params == trial.params
    engine_of(study).dispose()


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")  # asked by hand here
def test_a_trial_that_another_worker_ended_is_refused_once_and_the_study_stays_readable(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    study = optuna.create_study(study_name="s", storage=open_storage(url))
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    trial = study.ask()
    trial.suggest_float("x", 0, 1)  # not written yet
    other = optuna.load_study(study_name="s", storage=open_storage(url))
    other.tell(trial.number, state=TrialState.FAIL)
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        trial.report(0.5, step=1)
    assert [one.state for one in study.get_trials(deepcopy=False)] == [TrialState.COMPLETE, TrialState.FAIL]
    engine_of(study).dispose()
    engine_of(other).dispose()


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")  # asked by hand here
def test_parameters_whose_first_write_lost_its_answer_are_written_again(tmp_path: Path) -> None:
    study = optuna.create_study(storage=open_storage(f"sqlite:///{tmp_path}/s.db"))
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    storage = study._storage._backend  # type: ignore[attr-defined]
    held = dict(storage._unwritten)
    set_user_attrs(trial, reason="x")
    storage._unwritten.update(held)  # committed, and the worker does not know
    set_user_attrs(trial, reason="y")
    study.tell(trial, 0.5)
    assert study.trials[1].params == trial.params
    engine_of(study).dispose()


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")  # asked by hand here
def test_a_name_with_another_distribution_is_refused_as_optuna_does(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    study = optuna.create_study(study_name="s", storage=open_storage(url))
    study.ask().suggest_categorical("y", ["a", "b"])
    for _ in range(2):
        with pytest.raises(ValueError, match="CategoricalDistribution does not support dynamic value space"):
            study.ask().suggest_categorical("y", ["a", "c"])
    engine_of(study).dispose()


def test_lost_heartbeat_does_not_end_the_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    storage = open_storage(f"sqlite:///{tmp_path}/s.db")

    def gone(*_: object) -> None:
        raise locked()

    monkeypatch.setattr(storage, "_beat", gone)
    with caplog.at_level(logging.WARNING):
        storage.record_heartbeat(1)
    assert "heartbeat of a trial not recorded" in caplog.text
    engine_of(storage).dispose()


def test_only_experimental_warnings_are_hidden() -> None:
    import warnings

    with quiet_experimental():
        warnings.warn("new", optuna.exceptions.ExperimentalWarning, stacklevel=1)
        with pytest.raises(UserWarning, match="mine"):
            warnings.warn("mine", UserWarning, stacklevel=1)
