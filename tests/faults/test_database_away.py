"""The database server goes away while a search runs: it waits, or ends with one line, and loses nothing it has reported."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import pytest
import torch
from optuna.trial import TrialState
from own_postgres import OwnServer, find_bindir, own_postgres

from pcam_automl.errors import StudyError
from pcam_automl.search import patience as patience_module
from pcam_automl.search import worker as worker_module
from pcam_automl.search.create import create_or_open_study
from pcam_automl.search.objective import Objective, Watch
from pcam_automl.search.patience import patient
from pcam_automl.search.reading import n_finished_of
from pcam_automl.search.slots import Slots
from pcam_automl.search.storage import engine_of, storage_faults
from pcam_automl.search.study import Asked, OpenStudy, open_study
from pcam_automl.search.turns import Limits
from pcam_automl.search.worker import run_worker

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.postgres]
N = 4


@pytest.fixture
def server() -> Iterator[OwnServer]:
    bindir = find_bindir()
    if bindir is None:
        pytest.skip("no PostgreSQL programs (initdb) on this machine")
    with own_postgres(bindir) as running:
        yield running


@pytest.fixture
def opened(server: OwnServer, easy_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenStudy]:
    monkeypatch.chdir(tmp_path)  # studies/ of a database server lie in the working directory
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    torch.set_num_threads(1)
    pins = {"backbone": "test_resnet", "crop_size": 32, "batch_size": 16}
    asked = Asked(data=easy_pack, weights="none", views=96, pins=pins, device="cpu")
    study = create_or_open_study("away", server.url, asked, say=lambda text: None)
    yield study
    engine_of(study.study).dispose()


def search(opened: OpenStudy, at_rung: Callable[[int, int], None]) -> list[float]:
    """Run the search; ``at_rung`` is called (trial, rung) after each report. Returns what was told, in order."""
    told: list[float] = []

    def rung(number: int, result: object) -> None:
        told.append(result.auc)  # type: ignore[attr-defined]
        at_rung(number, result.rung)  # type: ignore[attr-defined]

    objective = Objective(opened, torch.device("cpu"), watch=Watch(rung=rung))
    end = run_worker(objective, Limits(N))
    assert end.why == "done"
    return told


def check_sound(opened: OpenStudy, told: list[float]) -> None:
    trials = opened.study.get_trials()
    assert n_finished_of(opened.study) == N
    assert Slots(engine_of(opened.study), opened.name).counts() == {"claimed": 0, "done": N, "open": 0}
    assert not any(trial.state == TrialState.RUNNING for trial in trials)
    stored = [value for trial in trials for value in trial.intermediate_values.values()]
    assert sorted(stored) == sorted(told), "every rung that was told is stored, once"


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_a_server_that_comes_back_costs_nothing(server: OwnServer, opened: OpenStudy, how: str) -> None:
    threads: list[threading.Thread] = []

    def outage(number: int, rung: int) -> None:
        if (number, rung) == (1, 0):
            getattr(server, how)()
            threads.append(threading.Timer(2.0, server.start))
            threads[0].start()

    told = search(opened, outage)
    threads[0].join()
    check_sound(opened, told)
    assert [trial.state for trial in opened.study.get_trials()].count(TrialState.FAIL) == 0


def test_one_that_stays_away_ends_the_search_with_a_line_and_the_same_command_goes_on(
    server: OwnServer, opened: OpenStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience_module, "PAUSES_S", (0.1, 0.2))
    monkeypatch.setattr(worker_module, "patient", lambda: patient(1.0))
    began = [0.0]

    def outage(number: int, rung: int) -> None:
        if (number, rung) == (1, 1):
            server.stop()
            began[0] = time.monotonic()

    with (
        pytest.raises(StudyError, match=r"was away for more than 5 minutes .* the same command goes on"),
        storage_faults(server.url),
    ):
        search(opened, outage)
    assert time.monotonic() - began[0] < 20.0, "it gives up once, not at every call"
    server.start()
    again = open_study("away", server.url)
    monkeypatch.setattr(worker_module, "settle_lost", settled_as_dead(worker_module.settle_lost))
    search(again, lambda number, rung: None)
    trials = again.study.get_trials()
    assert n_finished_of(again.study) == N
    assert [trial.state for trial in trials].count(TrialState.RUNNING) == 0
    first, resumed = (next(t for t in trials if t.number == n) for n in (1, 2))
    assert first.state == TrialState.FAIL
    assert resumed.user_attrs["lineage"] == "1"
    n_before = len(first.intermediate_values)
    assert n_before == 2
    assert list(resumed.intermediate_values.values())[:n_before] == list(first.intermediate_values.values()), (
        "its rungs were read from the checkpoint"
    )
    engine_of(again.study).dispose()


def settled_as_dead(real: Callable[..., object]) -> Callable[..., object]:
    """The process that gave up is this one, which lives: to the next run it is dead, the first time."""
    from pcam_automl.search import settling

    def settle(*words: object, **options: object) -> object:
        with pytest.MonkeyPatch.context() as patch:
            if not done:
                done.append(True)
                patch.setattr(settling, "owner_alive", lambda owner: False)
                patch.setattr("pcam_automl.search.slots.owner_alive", lambda owner: False)
            return real(*words, **options)

    done: list[bool] = []
    return settle
