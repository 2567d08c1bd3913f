"""Several worker processes on one study: exact totals, a killed one, signals, faults."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import pytest
import sqlalchemy as sa
import torch
from optuna.trial import Trial, TrialState
from warm_processes import warm_context

from pcam_automl.commands.workers import _WorkersShow, settled_text
from pcam_automl.errors import DataError, Interrupted, SearchFailed, StudyError
from pcam_automl.interrupt import stop_signal
from pcam_automl.search import processes
from pcam_automl.search.create import create_or_open_study
from pcam_automl.search.objective import Objective
from pcam_automl.search.processes import Heard, WorkerTask, run_workers
from pcam_automl.search.reading import n_finished_of
from pcam_automl.search.settling import settle_lost
from pcam_automl.search.slots import TABLE, Slots
from pcam_automl.search.storage import engine_of
from pcam_automl.search.study import Asked, OpenStudy
from pcam_automl.search.turns import Limits
from pcam_automl.workers_board import Board

_WORK = processes._work
pytestmark = pytest.mark.filterwarnings("ignore")


def created(pack: Path, folder: Path, views: int) -> OpenStudy:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    pins = {"backbone": "test_resnet", "crop_size": 32, "batch_size": 16}
    asked = Asked(data=pack, weights="none", views=views, pins=pins, device="cpu", n_workers=2)
    url = f"sqlite:///{folder / 'studies' / 's.db'}"
    return create_or_open_study("many", url, asked, say=lambda text: None)


@pytest.fixture
def opened(easy_pack: Path, tmp_path: Path) -> OpenStudy:
    return created(easy_pack, tmp_path, 96)


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


class Killer:
    """Hears the workers, and kills the one that claims a slot when the ``n``-th event of a kind is heard."""

    def __init__(self, opened: OpenStudy, kind: str, at: tuple[int, ...]) -> None:
        self.slots, self.kind, self.at = Slots(engine_of(opened.study), opened.name), kind, at
        self.said: list[Heard] = []
        self.killed: list[int] = []
        self.states: list[list[TrialState]] = []
        self.opened = opened

    def __call__(self, event: Heard) -> None:
        self.said.append(event)
        if event.kind == "note":  # said once the dead worker's row is settled
            self.states.append([trial.state for trial in self.opened.study.get_trials()])
        if event.kind == self.kind and [e.kind for e in self.said].count(self.kind) in self.at:
            owners = [slot.owner for slot in self.slots.claimed() if slot.owner]
            if not owners:  # both are between two trials: at the next such event
                self.at = (*self.at, [e.kind for e in self.said].count(self.kind) + 1)
                return
            self.killed.append(int(owners[0].split(":")[-2]))
            os.kill(self.killed[-1], signal.SIGKILL)

    def settle(self) -> str:
        limits = Limits(1)
        study = self.opened.study
        trials = study.get_trials(deepcopy=False)
        found = settle_lost(study, self.slots, trials, checkpoints=self.opened.checkpoints)
        return settled_text(found, limits)

    @property
    def notes(self) -> list[str]:
        return [event.values[0] for event in self.said if event.kind == "note"]


def test_a_killed_worker_is_named_replaced_and_its_trial_goes_on(opened: OpenStudy, warm: None) -> None:
    killer = Killer(opened, "rung", at=(2, 5))
    with stop_signal("") as stop, stop.deferred():
        end = run_workers(task_of(opened, 6), ["cpu", "cpu"], stop=stop, heard=killer, settle=killer.settle)
    assert len(killer.killed) == 2
    assert len([note for note in killer.notes if "ended by SIGKILL" in note and "takes its place" in note]) == 2
    assert end.why == "done"
    assert n_finished_of(opened.study) == 6
    trials = opened.study.get_trials()
    lost = [t for t in trials if t.state == TrialState.FAIL]
    assert len(lost) <= 2, "a kill may fall between two trials"
    assert all(t.user_attrs["reason"] == "worker lost" for t in lost)
    assert TrialState.RUNNING not in {t.state for t in trials}
    assert len({t.user_attrs["lineage"] for t in trials}) == 6, "a lost trial's recipe goes on, in its slot"
    assert Slots(engine_of(opened.study), opened.name).counts() == {"claimed": 0, "done": 6, "open": 0}


def test_the_only_worker_is_replaced_and_its_row_ended_at_once(opened: OpenStudy, warm: None) -> None:
    killer = Killer(opened, "begins", at=(2,))
    with stop_signal("") as stop, stop.deferred():
        end = run_workers(task_of(opened, 3), ["cpu"], stop=stop, heard=killer, settle=killer.settle)
    assert end.why == "done"
    assert killer.states[0][1] == TrialState.FAIL, "before any other worker began"
    assert [t.state for t in opened.study.get_trials()].count(TrialState.FAIL) == 1
    assert n_finished_of(opened.study) == 3


def test_a_worker_that_only_dies_is_not_replaced_for_ever(opened: OpenStudy, warm: None) -> None:
    killer = Killer(opened, "begins", at=tuple(range(1, 100)))
    with stop_signal("") as stop, stop.deferred(), pytest.raises(SearchFailed, match="every worker was killed"):
        run_workers(task_of(opened, 3), ["cpu"], stop=stop, heard=killer, settle=killer.settle)
    assert len(killer.killed) == 5, "the trial is given up first"
    assert "trial 2 goes on from its checkpoint" in killer.notes[2]
    assert "trial 3 is given up after 3 retries" in killer.notes[3]
    assert "it ended so 5 times without finishing a trial and is not replaced" in killer.notes[-1]
    assert [t.user_attrs["lineage"] for t in opened.study.get_trials()] == ["0", "0", "0", "0", "4"]
    assert TrialState.RUNNING not in {t.state for t in opened.study.get_trials()}


def _gone(*_: object) -> None:
    os._exit(3)


def test_a_worker_that_ends_without_a_word_counts_as_dead(
    opened: OpenStudy, warm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_work", _gone)
    said: list[Heard] = []
    with stop_signal("") as stop, stop.deferred(), pytest.raises(SearchFailed, match="every worker was killed"):
        run_workers(task_of(opened, 3), ["cpu"], stop=stop, heard=said.append)
    assert [event.values[0].startswith("worker 0 ended by exit code 3") for event in said] == [True] * 5


def _gpu_fails_in_trial_0(task: WorkerTask, number: int, device: str, pipe: Connection, pack: list[object]) -> None:
    train = Objective._train

    def fails(self: Objective, trial: Trial, lineage: str) -> float:
        if trial.number == 0:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nfor debugging ...")
        return train(self, trial, lineage)

    Objective._train = fails  # type: ignore[method-assign]
    _WORK(task, number, device, pipe, pack)  # type: ignore[arg-type]


def test_a_worker_whose_gpu_failed_is_replaced_by_a_process_that_can_use_it(
    opened: OpenStudy, warm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_work", _gpu_fails_in_trial_0)
    said: list[Heard] = []
    with stop_signal("") as stop, stop.deferred():
        end = run_workers(task_of(opened, 2), ["cpu"], stop=stop, heard=said.append)
    assert end.why == "done"
    first, *others = opened.study.get_trials()
    assert first.state == TrialState.FAIL
    assert first.user_attrs["reason"].startswith("error: AcceleratorError: CUDA error: an illegal memory access")
    assert [trial.state for trial in others] == [TrialState.COMPLETE] * 2
    failed, replaced = (event.values[0] for event in said if event.kind == "note")
    assert failed.startswith(
        "cpu failed in trial 0 (CUDA error: an illegal memory access was encountered), and this process"
    )
    assert replaced.startswith("worker 0 ended by exit code 1")
    assert replaced.endswith("another worker takes its place")


def test_a_replaced_worker_has_what_is_left_of_the_search_s_time(
    opened: OpenStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[float | None] = []

    class Process:
        def __init__(self, args: tuple[WorkerTask, int, str, object], **_: object) -> None:
            given.append(args[0].limits.timeout_s)

        def start(self) -> None:
            return None

    class Pipe:
        def close(self) -> None:
            return None

    pipe = Pipe()
    context = SimpleNamespace(Pipe=lambda duplex: (pipe, pipe), Process=Process)
    monkeypatch.setattr(processes, "multiprocessing", SimpleNamespace(get_context=lambda method: context))
    clock = iter((100.0, 100.0, 159.0, 900.0))
    monkeypatch.setattr(processes, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    task = WorkerTask(opened.name, opened.url, Asked(), Limits(3, timeout_s=60.0), 1)
    crew = processes._Crew(task, ["cpu"], lambda event: None, lambda: "", {})
    for _ in range(3):
        crew.start(0)
    assert given == [60.0, 1.0, 0.0]


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


def check_gone_on_with(opened: OpenStudy) -> None:
    """No row runs or has an error; every open slot names its lineage, which goes on from its last rung."""
    trials = opened.study.get_trials()
    assert TrialState.RUNNING not in {trial.state for trial in trials}
    failed = [trial for trial in trials if trial.state == TrialState.FAIL]
    assert failed
    assert {trial.user_attrs["reason"] for trial in failed} == {"interrupted"}
    lineages = {trial.user_attrs["lineage"] for trial in failed}
    with engine_of(opened.study).connect() as connection:
        rows = connection.execute(sa.select(TABLE).where(TABLE.c.state == "open")).mappings()
        assert {row["lineage"] for row in rows} == lineages


def test_a_worker_that_nobody_hears_any_more_gives_its_trial_back(easy_pack: Path, tmp_path: Path) -> None:
    opened = created(easy_pack, tmp_path, 60_000)  # minutes: it does not end by itself
    context = warm_context()
    here, there = context.Pipe(duplex=False)
    worker = context.Process(target=processes._work, args=(task_of(opened, 1), 0, "cpu", there, [None]))
    worker.start()
    there.close()
    while here.recv().kind != "views":  # it trains
        pass
    here.close()
    worker.join(60.0)
    assert worker.exitcode == 128 + signal.SIGTERM
    check_gone_on_with(opened)


@pytest.mark.slow  # a command and two spawned workers
def test_workers_whose_first_process_is_killed_give_their_trials_back(easy_pack: Path, tmp_path: Path) -> None:
    opened = created(easy_pack, tmp_path, 60_000)
    command = [sys.executable, "-m", "pcam_automl", "search", "--study", opened.name, "--storage", opened.url]
    first = subprocess.Popen([*command, "--workers", "2", "--trials", "4"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    slots = Slots(engine_of(opened.study), opened.name)
    until = time.monotonic() + 240

    def wait_for(what: Callable[[], bool]) -> None:
        while not what():
            assert time.monotonic() < until
            time.sleep(0.2)

    def n_running() -> int:
        return [trial.state for trial in opened.study.get_trials(deepcopy=False)].count(TrialState.RUNNING)

    wait_for(lambda: n_running() == 2 and slots.counts()["claimed"] == 2)
    time.sleep(3.0)  # into the training
    first.kill()
    first.wait()
    wait_for(lambda: n_running() == 0 and slots.counts()["claimed"] == 0)
    check_gone_on_with(opened)


def test_a_fault_of_what_is_shown_is_no_workers_death(opened: OpenStudy, warm: None) -> None:
    def full(event: Heard) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with stop_signal("") as stop, stop.deferred(), pytest.raises(OSError, match="No space left"):
        run_workers(task_of(opened, 2), ["cpu"], stop=stop, heard=full, settle=lambda: pytest.fail("none has died"))


def test_what_a_budget_has_spent_is_noted_before_the_first_trial_ends(opened: OpenStudy) -> None:
    noted: list[str] = []
    with Board(["cpu"], 3, "AUC") as board:
        show = _WorkersShow(board, opened, Limits(3), lambda: noted.append(said.kind))
        for said in (
            Heard(0, "begins", (0, "test_resnet", 96)),
            Heard(0, "views", (48,)),
            Heard(0, "rung", (0, 0.7, 1, 99.0)),
        ):
            show.heard(said)
    assert noted == ["begins", "rung"]


def test_a_workers_own_fault_is_raised_here(opened: OpenStudy, warm: None) -> None:
    with stop_signal("") as stop, stop.deferred(), pytest.raises(StudyError, match="there is no study 'other'"):
        run_workers(task_of(opened, 5, "other"), ["cpu"], stop=stop, heard=lambda event: None)


def test_one_workers_fault_is_told_at_once_and_does_not_undo_what_the_others_did(
    opened: OpenStudy, warm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_work", _broken_first)
    said: list[Heard] = []
    with stop_signal("") as stop, stop.deferred():
        end = run_workers(task_of(opened, 2), ["cpu", "cpu"], stop=stop, heard=said.append)
    assert end.why == "done"
    assert n_finished_of(opened.study) == 2
    assert [event.values[0] for event in said if event.kind == "note"] == ["worker 0 has ended: no such GPU"]


def _broken_first(task: WorkerTask, number: int, device: str, pipe: Connection, pack: list[object]) -> None:
    if number == 0:
        pipe.send(Heard(0, "fault", ("InputError", "no such GPU")))
        os._exit(2)
    _WORK(task, number, device, pipe, pack)  # type: ignore[arg-type]


def test_workers_train_on_the_patches_that_the_first_process_holds(
    easy_pack: Path, tmp_path: Path, opened: OpenStudy, warm: None
) -> None:
    """On a GPU by CUDA IPC; here the same way through shared memory. What the mapped file gives, the shared patches give."""
    pins = {"backbone": "test_resnet", "crop_size": 32, "batch_size": 16}
    asked = Asked(data=easy_pack, weights="none", views=96, pins=pins, device="cpu", deterministic=True)
    held = torch.from_numpy(np.array(opened.store.patches))
    inverted = 255 - held
    values = []
    for number, pack in enumerate((None, held, inverted)):
        url = f"sqlite:///{tmp_path}/{number}/s.db"
        study = create_or_open_study("many", url, asked, say=lambda text: None)
        with stop_signal("") as stop, stop.deferred():
            packs = {} if pack is None else {"cpu": pack}
            run_workers(task_of(study, 1), ["cpu"], stop=stop, heard=lambda event: None, packs=packs)
        values.append([rung["loss"] for rung in study.study.trials[0].user_attrs["rungs"]])
    assert values[0] == values[1]
    assert values[0] != values[2], "other pixels, other losses"
    assert held.is_shared()


def test_patches_of_another_store_are_refused(opened: OpenStudy, warm: None) -> None:
    other = torch.zeros((3, 96, 96, 3), dtype=torch.uint8)
    with (
        stop_signal("") as stop,
        stop.deferred(),
        pytest.raises(DataError, match=r"shared patches \(3, 96, 96, 3\) on cpu"),
    ):
        run_workers(task_of(opened, 2), ["cpu"], stop=stop, heard=lambda event: None, packs={"cpu": other})
