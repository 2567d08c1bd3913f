"""The studies of a storage in one line each: counts, order, what wants workers."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from databases import server_url
from optuna.trial import TrialState
from planted_study import settings_of

from pcam_automl.search.ledger import RUN_KEY
from pcam_automl.search.overview import (
    SEARCHED_KEY,
    SEARCHED_TRIALS_KEY,
    StudyLine,
    next_study,
    note_asked,
    overview,
    submit,
)
from pcam_automl.search.reading import SETTINGS_KEY, TRIALS_KEY
from pcam_automl.search.slots import Slots
from pcam_automl.search.storage import engine_of, open_storage

pytestmark = pytest.mark.filterwarnings("ignore")
LINE = StudyLine("s", 0, 0.0, 10, None, 0.0, False, {}, {}, None, "auc")


@pytest.fixture(
    params=[
        "sqlite",
        pytest.param("postgresql", marks=pytest.mark.postgres),
        pytest.param("mysql", marks=pytest.mark.postgres),
    ]
)
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[optuna.storages.RDBStorage]:
    opened = open_storage(f"sqlite:///{tmp_path}/s.db" if request.param == "sqlite" else server_url(request.param))
    yield opened
    opened.engine.dispose()


def named(lines: list[StudyLine], name: str) -> StudyLine:
    return next(line for line in lines if line.name == name)


def test_a_line_counts_what_is_there(storage: optuna.storages.RDBStorage) -> None:
    name = f"overview-{uuid.uuid4().hex}"
    study = optuna.create_study(study_name=name, storage=storage, direction="maximize")
    try:
        slots = Slots(engine_of(study), name)
        assert name not in [line.name for line in overview(engine_of(study))], "it has no settings yet"
        study.set_user_attr(SETTINGS_KEY, settings_of().model_dump_json())
        for value in (0.7, 0.9, None):
            slot, trial = slots.claim(5, "me"), study.ask()
            assert slot is not None
            slots.started(slot, trial.number, str(trial.number))
            trial.set_user_attr("images_per_s", 100.0 * (trial.number + 1))
            if value is not None:
                study.tell(trial, value)
                slots.finish(slot)
        study.set_user_attr(TRIALS_KEY, 5)
        line = named(overview(engine_of(study)), name)
        assert line.states == {"complete": 2, "running": 1}
        assert line.slots == {"done": 2, "claimed": 1}
        assert (line.total, line.best, line.objective, line.images_per_s) == (5, 0.9, "auc", 200.0)
        assert line.wants_workers
        assert json.dumps(line.to_json())
        for reason in ("error: OSError: gone", "interrupted", "worker lost"):
            trial = study.ask()
            trial.set_user_attr("reason", reason)
            study.tell(trial, state=TrialState.FAIL)
        line = named(overview(engine_of(study)), name)
        assert (line.states["fail"], line.n_errors) == (3, 1)
        study.set_user_attr(TRIALS_KEY, 3)
        line = named(overview(engine_of(study)), name)
        assert not line.wants_workers, "two are done and one is in work"
        assert not line.is_over
        note_asked(study, 3, 600.0)
        study.set_user_attr(f"{RUN_KEY}x", json.dumps({"command": "search", "began": 1.0, "seconds": 50.0}))
        study.set_user_attr(f"{RUN_KEY}y", json.dumps({"command": "worker", "began": 31.0, "seconds": 50.0}))
        assert named(overview(engine_of(study)), name).spent_s == pytest.approx(80.0)
    finally:
        Slots(engine_of(study), name).clear()
        optuna.delete_study(study_name=name, storage=storage)


def test_the_lowest_value_is_best_where_the_study_minimises(tmp_path: Path) -> None:
    storage = open_storage(f"sqlite:///{tmp_path}/s.db")
    study = optuna.create_study(study_name="loss", storage=storage, direction="minimize")
    study.set_user_attr(SETTINGS_KEY, settings_of().model_copy(update={"objective": "log_loss"}).model_dump_json())
    for value in (0.3, 0.2, 0.4):
        study.tell(study.ask(), value)
    study.tell(study.ask(), state=TrialState.FAIL)
    (line,) = overview(storage.engine)
    assert (line.best, line.objective) == (0.2, "log_loss")
    assert line.slots == {}, "no worker has been there: no table of slots"


@pytest.mark.parametrize(
    ("changes", "wants", "over"),
    [
        ({}, True, False),
        ({"slots": {"done": 10}}, False, True),
        ({"slots": {"done": 9, "claimed": 1}}, False, False),
        ({"slots": {"done": 8, "claimed": 1}}, True, False),
        ({"slots": {"done": 8, "claimed": 1, "open": 1}}, True, False),
        ({"total": None}, False, True),
        ({"total": None, "budget_s": 60.0}, True, False),
        ({"total": None, "budget_s": 60.0, "searched": True}, False, True),
        ({"budget_s": 60.0, "spent_s": 60.0}, False, True),
        ({"budget_s": 60.0, "slots": {"done": 10}}, False, True),
        ({"budget_s": 60.0, "slots": {"done": 10}, "states": {"pruned": 3}}, True, False),
        ({"budget_s": 60.0, "slots": {"done": 9, "claimed": 1}, "states": {"pruned": 3}}, False, False),
        ({"budget_s": 60.0, "slots": {"done": 10}, "states": {"pruned": 3}, "searched": True}, False, True),
        ({"slots": {"done": 10}, "states": {"pruned": 3}}, False, True),
    ],
)
def test_who_wants_workers(changes: dict[str, object], wants: bool, over: bool) -> None:
    line = replace(LINE, **changes)  # type: ignore[arg-type]
    assert (line.wants_workers, line.is_over) == (wants, over)


def test_the_queue_goes_by_priority_then_age(tmp_path: Path) -> None:
    storage = open_storage(f"sqlite:///{tmp_path}/s.db")
    for name, priority in (("old", 0), ("urgent", 5), ("young", 0)):
        study = optuna.create_study(study_name=name, storage=storage)
        study.set_user_attr(SETTINGS_KEY, settings_of().model_dump_json())
        submit(study, total=4, priority=priority)
    lines = overview(storage.engine)
    assert [line.name for line in lines] == ["urgent", "old", "young"]
    assert next_study(lines).name == "urgent"  # type: ignore[union-attr]
    assert next_study(lines, without=frozenset({"urgent"})).name == "old"  # type: ignore[union-attr]
    assert next_study([replace(line, slots={"done": 4}) for line in lines]) is None
    young = optuna.load_study(study_name="young", storage=storage)
    before = young.user_attrs["pcam_automl:submitted"]
    submit(young, total=4, priority=9)
    assert young.user_attrs["pcam_automl:submitted"] == before, "its age counts from its first entry"
    assert [line.name for line in overview(storage.engine)] == ["young", "urgent", "old"]
    assert overview(storage.engine)[0].total == 4


def test_a_larger_budget_wants_workers_again(tmp_path: Path) -> None:
    storage = open_storage(f"sqlite:///{tmp_path}/s.db")
    study = optuna.create_study(study_name="s", storage=storage)
    study.set_user_attr(SETTINGS_KEY, settings_of().model_dump_json())
    note_asked(study, None, 60.0)
    assert overview(storage.engine)[0].wants_workers
    study.set_user_attr(SEARCHED_KEY, 60.0)
    assert not overview(storage.engine)[0].wants_workers
    note_asked(study, None, 120.0)
    assert overview(storage.engine)[0].wants_workers


def test_a_search_that_was_over_before_its_time_goes_on_with_a_larger_total(tmp_path: Path) -> None:
    storage = open_storage(f"sqlite:///{tmp_path}/s.db")
    study = optuna.create_study(study_name="s", storage=storage)
    study.set_user_attr(SETTINGS_KEY, settings_of().model_dump_json())
    note_asked(study, 4, 60.0)
    study.set_user_attr(SEARCHED_TRIALS_KEY, 4)
    study.set_user_attr(SEARCHED_KEY, 60.0)
    assert overview(storage.engine)[0].searched
    note_asked(study, 8, 60.0)
    assert overview(storage.engine)[0].wants_workers
    study.set_user_attr(SEARCHED_TRIALS_KEY, None)  # the time ended it
    assert not overview(storage.engine)[0].wants_workers
