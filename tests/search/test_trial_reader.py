"""Trials read by our two statements are those of Optuna's own reader, on every database."""

from __future__ import annotations

import math
import sqlite3
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from databases import server_url
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from pcam_automl.errors import StudyError
from pcam_automl.search import plain_reader, trial_reader
from pcam_automl.search.connections import engine_options
from pcam_automl.search.plain_reader import read_study
from pcam_automl.search.retrying_storage import report
from pcam_automl.search.storage import engine_of, open_storage, rdb_of
from pcam_automl.search.storage_url import normalised_url
from pcam_automl.search.trial_reader import read_trial, read_trials

SPACE: dict[str, optuna.distributions.BaseDistribution] = {
    "z": CategoricalDistribution(["resnet10t", None, 2, 0.5, True]),
    "crop_size": IntDistribution(32, 96, step=16),
    "lr": FloatDistribution(1e-4, 1e-2, log=True),
}


def plain(trial: FrozenTrial) -> dict[str, Any]:
    """Everything of a trial, reports by step and parameters in their order; NaN as text, since it equals nothing."""
    found = dict(vars(trial))
    found["_values"] = str(found["_values"])
    found["types"] = [type(value) for value in trial.params.values()]
    found["intermediate_values"] = [(step, str(value)) for step, value in sorted(trial.intermediate_values.items())]
    found["_params"], found["_distributions"] = list(trial.params.items()), list(trial.distributions.items())
    return found


@pytest.fixture
def storage(url: str) -> Iterator[RDBStorage]:
    """Optuna's own."""
    storage = RDBStorage(normalised_url(url), engine_kwargs=engine_options(normalised_url(url)))
    yield storage
    storage.engine.dispose()


@pytest.fixture
def study(storage: RDBStorage) -> Iterator[optuna.Study]:
    """A study of every state beside another one."""
    names = [f"test-{uuid.uuid4().hex}" for _ in range(2)]
    made, other = (optuna.create_study(storage=storage, study_name=name, direction="maximize") for name in names)
    reports: dict[int, float] = {30: 0.25, 10: math.nan, 20: math.inf, 40: -math.inf}
    for number, state in enumerate(TrialState):
        ends = {"value": -math.inf if number else 0.1} if state == TrialState.COMPLETE else {}
        params = {"lr": 1e-3 + number / 1e4, "z": [None, 2, True, 0.5, "resnet10t"][number], "crop_size": 48}
        attrs = {"recipe": {"text": "µ \U0001f52c", "n": [1, 2.5, None]}, "reason": "x" * 3000}
        made.add_trial(
            create_trial(
                state=state,
                params=params if number != 2 else {},
                distributions={name: SPACE[name] for name in params} if number != 2 else {},
                user_attrs=attrs,
                system_attrs={"fixed_params": {"lr": 1e-3}},
                intermediate_values=reports if number else {},
                **ends,
            )
        )
        other.add_trial(create_trial(state=TrialState.COMPLETE, value=1.0))
    yield made
    for name in names:
        optuna.delete_study(study_name=name, storage=storage)


@pytest.mark.parametrize("few", [200, 2])
def test_trials_equal_those_of_optunas_reader(
    study: optuna.Study, storage: RDBStorage, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial_reader, "_FEW", few)  # 2: by whole tables, streamed
    whole = storage._get_trials(study._study_id, None, set(), -1)
    assert {trial.state for trial in whole} == set(TrialState)
    first, last = whole[0]._trial_id, whole[-1]._trial_id
    with storage.engine.connect() as connection:
        assert [plain(t) for t in read_trials(connection, study._study_id)] == [plain(t) for t in whole]
        for trial in whole:
            assert plain(read_trial(connection, trial._trial_id)) == plain(trial)
        for wanted in ((TrialState.RUNNING,), (TrialState.COMPLETE, TrialState.FAIL)):
            found = [t.number for t in read_trials(connection, study._study_id, states=wanted)]
            assert found == [t.number for t in whole if t.state in wanted]
        for after, beside in ((last, {first}), (first, {first}), (first, set()), (last, {t._trial_id for t in whole})):
            found = [t._trial_id for t in read_trials(connection, study._study_id, after=after, beside=beside)]
            assert found == [t._trial_id for t in storage._get_trials(study._study_id, None, beside, after)]
        assert read_trials(connection, study._study_id, after=last) == []


def test_a_study_to_be_read_holds_what_is_asked_for(study: optuna.Study, url: str) -> None:
    study.set_user_attr("settings", {"seed": 3})
    whole = study.get_trials()
    read = read_study(url, study.study_name, ("reason",), of_complete=("recipe",))
    everything = read_study(url, study.study_name, ("reason", "recipe"))
    assert read_study(url, "absent", ()) is None
    assert read is not None
    assert everything is not None
    assert (read.study_name, read.direction, read.user_attrs) == (study.study_name, study.direction, study.user_attrs)
    for ours, full, one in zip(read.get_trials(), everything.get_trials(), whole, strict=True):
        complete = one.state == TrialState.COMPLETE
        keys = ("reason", "recipe") if complete else ("reason",)
        assert ours.user_attrs == {key: one.user_attrs[key] for key in keys}
        assert ours.params == (one.params if complete else {})
        for found in (ours, full):
            assert (found.number, found.state, found._values) == (one.number, one.state, one._values)
            assert str(sorted(found.intermediate_values.items())) == str(sorted(one.intermediate_values.items()))
        assert (list(full.params.items()), full.user_attrs) == (list(one.params.items()), one.user_attrs)


def test_reading_needs_no_sqlalchemy(study: optuna.Study, url: str) -> None:
    code = (
        "import sys; from pcam_automl.search.plain_reader import read_study\n"
        f"print(len(read_study({url!r}, {study.study_name!r}, ('reason',)).trials))\n"
        "print([name for name in ('sqlalchemy', 'alembic', 'torch') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split("\n")[:2] == ["5", "[]"]


def test_its_connection_ends_whatever_happens(study: optuna.Study, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    original = plain_reader.closing

    def noted(connection: Any) -> Any:
        opened.append(connection)
        return original(connection)

    monkeypatch.setattr(plain_reader, "closing", noted)
    assert read_study(url, study.study_name, ()) is not None
    monkeypatch.setattr(plain_reader, "_study", lambda query, *_: list(query("SELECT no_such FROM trials", ())))
    assert read_study(url, study.study_name, ()) is None
    assert len(opened) == 2
    for connection in opened:
        if isinstance(connection, sqlite3.Connection):
            with pytest.raises(sqlite3.ProgrammingError, match="closed"):
                connection.execute("SELECT 1")
        else:  # psycopg, PyMySQL
            assert connection.closed if hasattr(connection, "closed") else not connection.open


def test_all_is_of_one_moment_whatever_the_servers_default(
    study: optuna.Study, url: str, storage: RDBStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial that is added between two statements is in none of them."""
    engine_of(open_storage(url)).dispose()  # its write-ahead log lets a writer go on beside a reader
    if storage.engine.dialect.name == "mysql":
        original = plain_reader._open_server

        def committed(*words: Any) -> Any:
            server = original(*words)
            server.cursor().execute("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED")
            return server

        monkeypatch.setattr(plain_reader, "_open_server", committed)
    inner = plain_reader._details

    def meanwhile(*words: Any) -> Iterator[Any]:
        study.add_trial(create_trial(state=TrialState.COMPLETE, value=1.0, user_attrs={"reason": "new"}))
        yield from inner(*words)

    monkeypatch.setattr(plain_reader, "_details", meanwhile)
    before = len(study.get_trials())
    read = read_study(url, study.study_name, ("reason",))
    assert read is not None
    assert (len(read.trials), len(study.get_trials())) == (before, before + 1)


def test_a_url_for_sqlalchemy_and_a_server_that_refuses_are_left_to_it(study: optuna.Study, url: str) -> None:
    assert read_study(url, study.study_name, ()) is not None
    assert read_study(f"{url}?application_name=pcam", study.study_name, ()) is None
    absent = f"{url}_that_is_not_there"
    if url.startswith("sqlite"):
        assert read_study(absent, study.study_name, ()) is None
    else:
        with pytest.raises(StudyError, match="cannot be used"):
            read_study(absent, study.study_name, ())


def test_several_objectives_come_in_their_order(storage: RDBStorage) -> None:
    name = f"test-{uuid.uuid4().hex}"
    made = optuna.create_study(storage=storage, study_name=name, directions=["maximize", "minimize", "minimize"])
    for values in ([0.5, 2.0, -math.inf], [math.inf, 1.0, 0.0]):
        made.add_trial(create_trial(state=TrialState.COMPLETE, values=values))
    with storage.engine.connect() as connection:
        found = read_trials(connection, made._study_id)
    assert [plain(trial) for trial in found] == [
        plain(trial) for trial in storage._get_trials(made._study_id, None, set(), -1)
    ]
    optuna.delete_study(study_name=name, storage=storage)


@pytest.mark.postgres
def test_a_mysql_database_of_another_collation_than_the_connection_is_read() -> None:
    """Texts of two collations do not mix in one UNION."""
    server = sa.make_url(normalised_url(server_url("mysql")))
    engine = sa.create_engine(server, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    name = f"pcam_{uuid.uuid4().hex[:12]}"
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name} CHARACTER SET utf8mb4 COLLATE utf8mb4_unicode_ci"))
    try:
        opened = open_storage(server.set(database=name).render_as_string(hide_password=False))
        study = optuna.create_study(storage=opened)

        def objective(trial: optuna.Trial) -> float:
            trial.report(trial.suggest_float("lr", 1e-4, 1e-2), step=3)
            return 0.5

        study.optimize(objective, n_trials=2)
        assert [trial.intermediate_values.keys() for trial in study.get_trials()] == [{3}] * 2
        opened.engine.dispose()
    finally:
        with engine.connect() as connection:
            connection.execute(sa.text(f"DROP DATABASE {name}"))


def test_what_is_not_there_is_a_key_error_as_in_optuna(study: optuna.Study, storage: RDBStorage) -> None:
    with storage.engine.connect() as connection:
        with pytest.raises(KeyError, match="no study with id 1000000"):
            read_trials(connection, 1_000_000)
        with pytest.raises(KeyError, match="no trial with id 1000000"):
            read_trial(connection, 1_000_000)


def test_a_rung_is_reported_with_its_attributes_in_one_transaction(url: str) -> None:
    name = f"test-{uuid.uuid4().hex}"
    study = optuna.create_study(storage=open_storage(url), study_name=name)
    storage = rdb_of(study)
    commits: list[int] = []

    def objective(trial: optuna.Trial) -> float:
        trial.suggest_float("lr", 1e-4, 1e-2, log=True)
        for step, value in ((10, 0.5), (20, math.nan)):
            before = len(commits)
            report(trial, value, step=step, rungs=[step], images_per_s=3.0)
            assert len(commits) == before + 1
        with storage.engine.connect() as connection:
            found = read_trial(connection, trial._trial_id)
        assert {step: str(value) for step, value in found.intermediate_values.items()} == {10: "0.5", 20: "nan"}
        assert found.user_attrs["rungs"] == [20]
        assert found.params == trial.params
        assert trial.user_attrs["rungs"] == [20]
        assert list(trial._cached_frozen_trial.intermediate_values) == [10, 20]
        return 0.5

    main = threading.get_ident()  # heartbeats commit, too, in a thread of their own
    sa.event.listen(storage.engine, "commit", lambda _: threading.get_ident() == main and commits.append(1))
    study.optimize(
        objective, n_trials=2
    )  # in the second the names of its parameters are known, and they go with the report
    assert [trial.state for trial in study.get_trials()] == [TrialState.COMPLETE] * 2
    optuna.delete_study(study_name=name, storage=storage)
    storage.engine.dispose()
