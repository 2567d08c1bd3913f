"""Several worker processes on one study and one machine. Starts, hears, replaces and ends them; trains nothing."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Literal

import optuna
import torch.multiprocessing  # noqa: F401 - from here on processes are handed tensors without a copy
from optuna.trial import FrozenTrial
from torch import Tensor

from pcam_automl import errors
from pcam_automl.config import storage_url
from pcam_automl.errors import DeviceFailed, Interrupted, PcamError, SearchFailed
from pcam_automl.goals import Goal
from pcam_automl.interrupt import ONE_SIGNAL_S, StopSignal, stop_signal
from pcam_automl.search.objective import Objective, Watch
from pcam_automl.search.patience import patient
from pcam_automl.search.reading import best_of, n_finished_in
from pcam_automl.search.storage import storage_faults
from pcam_automl.search.study import Asked, open_study
from pcam_automl.search.turns import Limits
from pcam_automl.search.worker import SearchEnd, run_worker
from pcam_automl.training.compute import use_device

Kind = Literal["begins", "views", "rung", "note", "finished", "ended", "fault"]
_VIEWS_EVERY_S = 0.2
_LAST_WORDS_S = 10.0
DEATHS_IN_A_ROW = 3
"""A worker that died so often without finishing a trial in between is not replaced again: a machine out of memory, say. With
more ``max_retries`` it is more, so that a trial that kills its workers is given up before they are."""


@dataclass(frozen=True)
class Heard:
    """What a worker said.

    Attributes:
        worker: its number, from 0.
        kind: ``begins`` (trial number, backbone, views), ``views`` (n), ``rung`` (trial number, objective, rung from 1, images/s), ``note`` (text),
            ``finished`` (trial, number of finished trials, best trial or None), ``ended`` (:class:`SearchEnd`), ``fault`` (name of the error, text).
        values: as above.
    """

    worker: int
    kind: Kind
    values: tuple[Any, ...]


_WHOLE_ENDS = ("done", "timeout", "budget")
"""Ends of a worker by which the search is over, whatever became of the others."""


@dataclass(frozen=True)
class WorkerTask:
    """What every worker process is told; picklable."""

    name: str
    url: str | None
    asked: Asked
    limits: Limits
    n_workers: int


def run_workers(
    task: WorkerTask,
    devices: Sequence[str],
    *,
    stop: StopSignal,
    heard: Callable[[Heard], None],
    settle: Callable[[], str] = lambda: "its trial goes on in another one",
    packs: Mapping[str, Tensor] | None = None,
) -> SearchEnd:
    """Run a worker on each of ``devices`` until the study has its trials; a killed one is replaced.

    The first signal lets every worker end its step, store and give back its slot; the second ends them at once.

    Args:
        task: the study, which exists, and its total.
        devices: one a worker; ``cpu`` several times shares the cores.
        stop: of this process.
        heard: called in this process with what the workers say.
        settle: ends the trials of dead workers and says what becomes of them; called as soon as one is dead.
        packs: by device, the patches that this process holds there for all its workers.

    Raises:
        Interrupted: a signal came.
        SearchFailed, InputError: a worker's own fault, once all have ended; or all were killed.
    """
    crew = _Crew(task, devices, heard, settle, packs or {})
    try:
        for number in range(len(devices)):
            crew.start(number)
        return crew.listen(stop)
    finally:
        _end(list(crew.workers.values()))


class _Crew:
    """The running workers by number, and the pipe that each speaks through.

    One pipe each: a queue's lock would stay with a worker that is killed while it speaks.
    """

    def __init__(
        self,
        task: WorkerTask,
        devices: Sequence[str],
        heard: Callable[[Heard], None],
        settle: Callable[[], str],
        packs: Mapping[str, Tensor],
    ) -> None:
        self.task, self.devices, self.heard, self.settle, self.packs = task, devices, heard, settle, packs
        self.workers: dict[int, BaseProcess] = {}
        self.pipes: dict[Connection, int] = {}
        self.deaths = [0] * len(devices)
        self.most_deaths = max(DEATHS_IN_A_ROW, task.limits.max_retries + 2)
        self.spoken: set[int] = set()  # workers that have said how they ended
        self._began = time.monotonic()
        self.ends: list[SearchEnd] = []
        self.faults: list[tuple[str, str]] = []
        self._context = multiprocessing.get_context("spawn")

    def start(self, number: int) -> None:
        """Start worker ``number``, or another one in its place."""
        here, there = self._context.Pipe(duplex=False)
        limits = self.task.limits
        if limits.timeout_s is not None:  # the search's, not anew with each replacement
            limits = replace(limits, timeout_s=max(0.0, limits.timeout_s - (time.monotonic() - self._began)))
        device = self.devices[number]
        words = (replace(self.task, limits=limits), number, device, there, [self.packs.get(device)])
        worker = self._context.Process(target=_work, args=words, name=f"worker {number}")
        worker.start()
        there.close()  # so that the worker's end is the last one
        self.workers[number] = worker
        self.pipes[here] = number

    def listen(self, stop: StopSignal) -> SearchEnd:
        """Until every worker has ended."""
        interrupted: Interrupted | None = None
        while self.pipes:
            for pipe in wait(list(self.pipes), timeout=0.2):
                assert isinstance(pipe, Connection)
                try:
                    said = pipe.recv()
                except (EOFError, OSError):  # it has ended, perhaps in the middle of a word
                    self._ended(pipe, replaced=interrupted is None)
                else:
                    self._take(said)  # whose own faults, of a full disk behind the terminal, are no worker's death
            if interrupted is None:
                try:
                    stop.check()
                except Interrupted as fault:
                    interrupted = fault
                    for worker in self.workers.values():
                        if worker.is_alive():
                            worker.terminate()
        if interrupted is not None:
            raise interrupted
        if self.faults and not any(end.why in _WHOLE_ENDS for end in self.ends):  # else the others have done the work
            name, text = self.faults[0]
            raise getattr(errors, name, SearchFailed)(text)
        if not self.ends:
            raise SearchFailed("every worker was killed; finished trials are stored, the same command goes on")
        whys = {end.why for end in self.ends}
        why = next(why for why in ("done", "timeout", "budget", "claimed elsewhere") if why in whys)
        return SearchEnd(sum(end.n_finished for end in self.ends), why)

    def _take(self, event: Heard) -> None:
        if event.kind in ("ended", "fault"):
            self.spoken.add(event.worker)
        if event.kind == "ended":
            self.ends.append(event.values[0])
        elif event.kind == "fault":
            self.faults.append(event.values)
            if len(self.devices) > 1:  # the others go on, perhaps for days
                self.heard(Heard(event.worker, "note", (f"worker {event.worker} has ended: {event.values[1]}",)))
        else:
            if event.kind == "finished":
                self.deaths[event.worker] = 0
            self.heard(event)

    def _ended(self, pipe: Connection, *, replaced: bool) -> None:
        """A worker's pipe is closed: it has said how it ended, or was killed."""
        number = self.pipes.pop(pipe)
        pipe.close()
        worker = self.workers[number]
        worker.join()
        code = worker.exitcode or 0
        if code == 0 or number in self.spoken:
            return
        if not replaced and code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            return  # it heard the signal, too, and has put everything in order
        self.deaths[number] += 1
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        text = "; ".join(filter(None, (f"worker {number} ended by {how}", self.settle())))
        over = any(end.why in _WHOLE_ENDS for end in self.ends)
        again = replaced and not over and self.deaths[number] < self.most_deaths
        if again:
            text += "; another worker takes its place"
        elif replaced and not over:
            text += (
                f"; it ended so {self.most_deaths} times without finishing a trial and is not replaced (out of memory?)"
            )
        self.heard(Heard(number, "note", (text,)))
        if again:
            self.start(number)


def _end(workers: Sequence[BaseProcess]) -> None:
    """No worker outlives this process's interest in it."""
    until = time.monotonic() + _LAST_WORDS_S
    for patience_s in (1.1 * ONE_SIGNAL_S, 0.0):  # a second request counts as one only if it is not the first once more
        for worker in workers:
            if worker.is_alive():
                worker.terminate()
        soon = time.monotonic() + patience_s
        for worker in workers:
            worker.join(max(0.0, soon - time.monotonic()))
    for worker in workers:
        worker.join(max(0.0, until - time.monotonic()))
        if worker.is_alive():
            worker.kill()
            worker.join()


def _work(task: WorkerTask, number: int, device: str, pipe: Connection, pack: list[Tensor | None]) -> None:
    """A worker process. ``pack`` is emptied: the process itself keeps its arguments, and a shared tensor must end before it does."""
    code = _run(task, number, device, pipe, pack)
    pipe.close()
    pack.clear()
    gc.collect()  # the last reference to the shared pack: else the first process keeps its memory for ever
    os._exit(code)  # threads of a storage must not keep it


def _run(task: WorkerTask, number: int, device: str, pipe: Connection, pack: list[Tensor | None]) -> int:
    """The worker's trials; its exit code."""
    speaking, alone = threading.Lock(), threading.Event()

    def tell(kind: Kind, *values: Any) -> None:
        with speaking:  # the thread that looks for lost workers speaks, too
            try:
                pipe.send(Heard(number, kind, values))
            except OSError:  # killed: no fault of the running trial, which ends at its next step as by a signal
                alone.set()

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    code = 0
    with stop_signal("") as stop:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the first process passes it on
        try:
            with storage_faults(storage_url(task.url)), patient():  # a server may just be starting again
                opened = open_study(task.name, task.url, task.asked)
            place = use_device(device, n_workers=task.n_workers, deterministic=opened.settings.deterministic)
            objective = Objective(
                opened,
                place,
                stop=lambda: _check(stop, alone),
                watch=_watch(tell, opened.settings.goal),
                pack=pack.pop(),
            )

            def finished(trial: FrozenTrial, trials: list[FrozenTrial]) -> None:
                tell("finished", trial, n_finished_in(trials), best_of(trials, opened.settings.goal))

            with stop.deferred(), storage_faults(opened.url):
                end = run_worker(objective, task.limits, finished=finished)
            tell("ended", end)
        except Interrupted as fault:
            code = fault.exit_code
        except DeviceFailed as fault:  # another process can use it again: this worker is replaced
            tell("note", str(fault))
            code = fault.exit_code
        except PcamError as fault:
            tell("fault", type(fault).__name__, str(fault))
            code = fault.exit_code
        except Exception as fault:  # noqa: BLE001 - a worker's boundary: named here, raised in the first process
            tell("note", "".join(traceback.format_exception(fault)))
            tell("fault", "SearchFailed", f"worker {number}: {type(fault).__name__}: {str(fault)[:300]}")
            code = 1
    return code


def _check(stop: StopSignal, alone: threading.Event) -> None:
    parent = multiprocessing.parent_process()
    if alone.is_set() or (parent is not None and not parent.is_alive()):  # nobody hears, and no signal will come
        raise Interrupted("the search's first process is gone", signal.SIGTERM)
    stop.check()


def _watch(tell: Callable[..., None], goal: Goal) -> Watch:
    waiting, told = [0], [0.0]

    def views(n: int) -> None:
        waiting[0] += n
        if time.monotonic() - told[0] >= _VIEWS_EVERY_S:
            tell("views", waiting[0])
            waiting[0], told[0] = 0, time.monotonic()

    return Watch(
        begins=lambda number, recipe, views: tell("begins", number, recipe.backbone, views),
        views=views,
        rung=lambda number, result: tell("rung", number, goal.value_of(result), result.rung + 1, result.images_per_s),
        note=lambda text: tell("note", text),
    )
