"""What our statements write is what Optuna's own storage reads, on every database."""

from __future__ import annotations

import math
import threading
import time
import uuid
from datetime import datetime
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from databases import server_url
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from pcam_automl.search import connections, overview, retrying_storage
from pcam_automl.search.retrying_storage import end_with
from pcam_automl.search.storage import open_storage, quiet_experimental
from pcam_automl.search.storage_url import normalised_url

pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat of storage")  # asked by hand here


def test_a_workers_rows_begin_and_end_whole(url: str) -> None:
    storage, name = open_storage(url), f"test-{uuid.uuid4().hex}"
    study = optuna.create_study(study_name=name, storage=storage, direction="maximize")
    storage.owner, storage.begins_with = "me", lambda number: {"slot": 7, "lineage": f"{number}"}
    ends = [(TrialState.COMPLETE, 0.5), (TrialState.COMPLETE, math.inf), (TrialState.PRUNED, None)]
    for number, (state, value) in enumerate(ends):
        trial = study.ask()
        assert (trial.number, trial.user_attrs) == (number, {"owner": "me", "slot": 7, "lineage": f"{number}"})
        storage.record_heartbeat(trial._trial_id)
        storage.record_heartbeat(trial._trial_id)
        end_with(trial, reason="so")
        study.tell(trial, value, state=state)
    with quiet_experimental():
        optunas = RDBStorage(normalised_url(url))
    found = optunas.get_all_trials(optunas.get_study_id_from_name(name))
    for number, (row, (state, value)) in enumerate(zip(found, ends, strict=True)):
        assert (row.number, row.state, row.value) == (number, state, value)
        assert row.user_attrs == {"owner": "me", "slot": 7, "lineage": f"{number}", "reason": "so"}
        assert row.duration is not None
        assert 0 <= row.duration.total_seconds() < 60
    beats = sa.text("SELECT count(*) FROM trial_heartbeats WHERE trial_id IN (:a, :b, :c)")
    with storage.engine.connect() as connection:
        ids = dict(zip("abc", (row._trial_id for row in found), strict=True))
        assert connection.execute(beats, ids).scalar_one() == 3
    for one in (storage, optunas):
        one.engine.dispose()


def test_rows_that_many_ask_for_at_once_have_every_number_once(url: str) -> None:
    """Also beside one that Optuna's own storage adds to."""
    name, n_each = f"test-{uuid.uuid4().hex}", 15
    first = open_storage(url)
    optuna.create_study(study_name=name, storage=first)
    with quiet_experimental():
        storages: list[RDBStorage] = [open_storage(url), open_storage(url), RDBStorage(normalised_url(url))]
    numbers: list[int] = []

    def ask(storage: RDBStorage) -> None:
        study = optuna.load_study(study_name=name, storage=storage)
        numbers.extend(study.ask().number for _ in range(n_each))

    for storage in storages[:2]:
        storage.owner = "me"  # type: ignore[attr-defined]
    threads = [threading.Thread(target=ask, args=(storage,)) for storage in storages]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(3 * n_each))
    for storage in [first, *storages]:
        storage.engine.dispose()


@pytest.mark.postgres
def test_a_connection_that_died_while_it_rested_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    postgres_url = server_url("postgresql")
    engine = open_storage(postgres_url).engine
    with engine.connect() as connection:
        pid = connection.execute(sa.text("SELECT pg_backend_pid()")).scalar_one()
    other = sa.create_engine(normalised_url(postgres_url), poolclass=sa.NullPool)
    with other.connect() as connection:
        connection.execute(sa.text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
        there = sa.text("SELECT count(*) FROM pg_stat_activity WHERE pid = :pid")
        while connection.execute(there, {"pid": pid}).scalar_one():  # it ends when it gets round to it
            time.sleep(0.02)
    time.sleep(0.1)
    monkeypatch.setattr(connections, "RESTED_S", 0.05)
    with connections.reading(engine) as connection:
        assert connection.execute(sa.text("SELECT pg_backend_pid()")).scalar_one() != pid
    engine.dispose()


@pytest.mark.postgres
def test_what_reads_leaves_no_transaction_open_and_no_connection_without_them() -> None:
    engine = open_storage(server_url("postgresql")).engine
    with connections.reading(engine) as connection:
        connection.execute(sa.text("SELECT 1")).scalar_one()
        raw: Any = connection.connection.dbapi_connection
        assert (raw.autocommit, raw.info.transaction_status.name) == (True, "IDLE")
    assert raw.autocommit is False  # back in the pool, for those who write
    engine.dispose()


@pytest.mark.parametrize("zone", ["America/New_York", "Asia/Tokyo"])
def test_times_are_stored_as_optuna_stores_them_wherever_the_worker_is(
    url: str, zone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        storage, name = open_storage(url), f"test-{uuid.uuid4().hex}"
        study = optuna.create_study(study_name=name, storage=storage)
        storage.owner = "me"
        study.tell(study.ask(), 0.5)
        storage.owner = None
        study.tell(study.ask(), 0.5)  # begun by Optuna's own storage
        with quiet_experimental():
            optunas = RDBStorage(normalised_url(url))
        now = datetime.now()
        for row in optunas.get_all_trials(optunas.get_study_id_from_name(name)):
            for moment in (row.datetime_start, row.datetime_complete):
                assert moment is not None
                assert abs((now - moment).total_seconds()) < 60
        with storage.engine.connect() as connection:
            began = overview._began(connection)[optunas.get_study_id_from_name(name)]
        assert abs(began - time.time()) < 60
    finally:
        monkeypatch.undo()
        time.tzset()
    for one in (storage, optunas):
        one.engine.dispose()


def test_servers_are_pinged_by_the_pool_only_after_a_rest(url: str) -> None:
    engine = open_storage(url).engine
    assert engine.pool._pre_ping is False
    engine.dispose()


def test_an_ending_that_failed_for_good_can_be_repeated_whole(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(url)
    study = optuna.create_study(study_name=f"test-{uuid.uuid4().hex}", storage=storage)
    trial = study.ask()
    end_with(trial, reason="complete")

    def gone(*_: object) -> bool:
        raise sa.exc.OperationalError("UPDATE", {}, Exception("no such thing"))

    with monkeypatch.context() as patch:
        patch.setattr(retrying_storage, "end_trial", gone)
        with pytest.raises(sa.exc.OperationalError):
            study.tell(trial, 0.5)
    study.tell(trial, 0.5)
    assert study.trials[0].user_attrs == {"reason": "complete"}
    assert not storage._last_notes
    storage.engine.dispose()
