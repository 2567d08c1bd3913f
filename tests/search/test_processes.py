"""Several worker processes on one study: exact totals, a killed one, signals, faults."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
from optuna.trial import TrialState
from warm_processes import warm_context

from pcam_automl.errors import Interrupted, StudyError
from pcam_automl.interrupt import stop_signal
from pcam_automl.search import processes
from pcam_automl.search.create import create_or_open_study
from pcam_automl.search.processes import Heard, WorkerTask, run_workers
from pcam_automl.search.reading import n_finished_of
from pcam_automl.search.slots import Slots
from pcam_automl.search.storage import engine_of
from pcam_automl.search.study import Asked, OpenStudy
from pcam_automl.search.worker import Limits

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def opened(easy_pack: Path, tmp_path: Path) -> OpenStudy:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    pins = {"backbone": "test_resnet", "crop_size": 32, "batch_size": 16}
    asked = Asked(data=easy_pack, weights="none", views=96, pins=pins, device="cpu", n_workers=2)
    url = f"sqlite:///{tmp_path / 'studies' / 's.db'}"
    return create_or_open_study("many", url, asked, say=lambda text: None)


@pytest.fixture
def warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that need not import torch first; the other tests here have spawned ones, as a search has."""
    monkeypatch.setattr(processes, "multiprocessing", SimpleNamespace(get_context=lambda method: warm_context()))


def task_of(opened: OpenStudy, n: int, name: str | None = None) -> WorkerTask:
    return WorkerTask(name or opened.name, opened.url, Asked(data=opened.store.root), Limits(n), 2)


@pytest.mark.slow  # each worker imports torch and timm, 15 s of a core; the default tests have the killed worker's study
def test_two_workers_make_exactly_the_total_and_are_heard(opened: OpenStudy) -> None:
    said: list[Heard] = []
    with stop_signal("") as stop, stop.deferred():
        end = run_workers(task_of(opened, 5), ["cpu", "cpu"], stop=stop, heard=said.append)
    assert (end.n_finished, end.why) == (5, "done")
    assert n_finished_of(opened.study) == 5
    kinds = [event.kind for event in said]
    assert (kinds.count("begins"), kinds.count("finished")) == (5, 5)
    counts = [event.values[1] for event in said if event.kind == "finished"]
    assert max(counts) == 5
    for trial in opened.study.trials:
        assert trial.user_attrs["device"].endswith("1 threads")  # of this machine's cores each has its share


def test_a_killed_worker_is_named_and_its_trial_goes_on_in_another(opened: OpenStudy, warm: None) -> None:
    said: list[Heard] = []
    killed: list[int] = []
    slots = Slots(engine_of(opened.study), opened.name)

    def heard(event: Heard) -> None:
        said.append(event)
        if event.kind == "views" and not killed:
            owners = [slot.owner for slot in slots.claimed() if slot.owner]
            killed.append(int(owners[0].split(":")[-2]))
            os.kill(killed[0], signal.SIGKILL)

    with stop_signal("") as stop, stop.deferred():
        end = run_workers(task_of(opened, 6), ["cpu", "cpu"], stop=stop, heard=heard)
    assert killed
    assert [e.values[0] for e in said if e.kind == "note" and "ended by SIGKILL" in e.values[0]]
    assert end.why == "done"
    assert n_finished_of(opened.study) == 6
    assert [t.state for t in opened.study.trials].count(TrialState.FAIL) == 1
    assert [event.kind for event in said].count("finished") in (
        6,
        7,
    )  # the killed one's row may have been told as failed


def test_a_signal_ends_every_worker_after_its_step(opened: OpenStudy, warm: None) -> None:
    begun = threading.Event()

    def heard(event: Heard) -> None:
        if event.kind == "views" and not begun.is_set():
            begun.set()
            os.kill(os.getpid(), signal.SIGTERM)

    began = time.monotonic()
    with stop_signal("it goes on") as stop, stop.deferred(), pytest.raises(Interrupted, match="SIGTERM; it goes on"):
        run_workers(task_of(opened, 500), ["cpu", "cpu"], stop=stop, heard=heard)
    assert begun.is_set()
    assert time.monotonic() - began < 240
    assert TrialState.RUNNING not in {trial.state for trial in opened.study.trials}
    reasons = {t.user_attrs.get("reason") for t in opened.study.trials if t.state == TrialState.FAIL}
    assert reasons <= {"interrupted"}


def test_a_workers_own_fault_is_raised_here(opened: OpenStudy) -> None:
    with stop_signal("") as stop, stop.deferred(), pytest.raises(StudyError, match="there is no study 'other'"):
        run_workers(task_of(opened, 5, "other"), ["cpu"], stop=stop, heard=lambda event: None)
