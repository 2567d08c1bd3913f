"""`submit`, `status --all` and the worker that serves whatever studies have work left. Trains through join.py."""

from __future__ import annotations

import collections
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

import optuna
import sqlalchemy as sa

from pcam_automl import terminal
from pcam_automl.config import storage_url, studies_folder
from pcam_automl.errors import Interrupted, PcamError, StudyError
from pcam_automl.interrupt import StopSignal, stop_signal
from pcam_automl.search.overview import StudyLine, next_study, overview, submit
from pcam_automl.search.silence import Watchman
from pcam_automl.search.slots import Slots
from pcam_automl.search.storage import engine_of, open_storage, storage_faults
from pcam_automl.search.storage_url import safe_url

if TYPE_CHECKING:  # torch and timm, which `status --all` does without
    from pcam_automl.commands.search import Work
    from pcam_automl.search.study import Asked

IDLE_S = 5.0
"""Between two looks for work."""
FAULTS_OF_A_STUDY = 3
"""A study that this worker failed at so often (its data are not here, say) is left to others."""


def run_submit(name: str, url: str | None, asked: Asked, *, n_trials: int | None, priority: int) -> None:
    """Create the study, or change its place in the queue; no trial runs here."""
    from pcam_automl.commands.search import command_options, print_plan
    from pcam_automl.search.budget import budget_of, set_budget
    from pcam_automl.search.create import create_or_open_study

    at, url = command_options(None, url), storage_url(url)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    asked = replace(asked, command=terminal.this_command())
    with stop_signal("nothing was lost") as _, storage_faults(url):
        with terminal.counting("packing") as call:
            opened = create_or_open_study(name, url, asked, say=terminal.say, pack_call=call)
        held = budget_of(opened.study)
        if asked.budget_s is not None:
            if held is not None and asked.budget_s < held:
                raise StudyError(
                    f"--budget is {terminal.duration(asked.budget_s)}, study {name!r} has {terminal.duration(held)}; give as much or more"
                )
            set_budget(opened.study, asked.budget_s)
        submit(opened.study, total=n_trials, priority=priority)
        print_plan(opened, n_trials)
    terminal.result(f"study {name} is in the queue of {safe_url(url)} with priority {priority}")
    terminal.say(f"next: pcam-automl worker{at} on every machine that shall serve it, pcam-automl status --all{at}")


def run_service_worker(url: str | None, asked: Asked, devices: Sequence[str], work: Work, *, until_idle: bool) -> None:
    """Serve whatever studies have work left, by priority, then age, until a signal (or, with ``until_idle``, until none has)."""
    url = storage_url(url)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with stop_signal("its trial goes on in another worker") as stop, storage_faults(url):
        engine = engine_of(open_storage(url, create=False))
        server = Server(url, engine, asked, devices, work, stop)
        server.serve(until_idle=until_idle)
    terminal.result(f"no study of {safe_url(url)} has work left: {server.n_finished} trials finished here")


@dataclass
class Server:
    """A worker of no study in particular.

    Attributes:
        url: the storage's, password included.
        engine: of it.
        asked: place of the data, if not the studies' own, and device.
        devices: one a worker process.
        work: limits; ``timeout_s`` is of the whole service.
        stop: of this process.
    """

    url: str
    engine: sa.Engine
    asked: Asked
    devices: Sequence[str]
    work: Work
    stop: StopSignal
    n_finished: int = 0
    _faults: collections.Counter[str] = field(default_factory=collections.Counter)
    _watch: dict[str, Watchman] = field(default_factory=dict)

    def serve(self, *, until_idle: bool) -> None:
        """Until nothing is left, the time is up or a signal comes."""
        began, idle = time.monotonic(), False
        while True:
            self.stop.check()
            left_s = None if self.work.timeout_s is None else self.work.timeout_s - (time.monotonic() - began)
            if left_s is not None and left_s <= 0:
                return
            lines = overview(self.engine)
            line = next_study(lines, without=self._given_up())
            if line is not None:
                idle = False
                self._serve_one(line, left_s)
                continue
            if until_idle and all(one.is_over or one.name in self._given_up() for one in lines):
                return
            if not idle:
                terminal.say("no study wants workers; waiting for one (Ctrl-C ends this worker)")
            idle = True
            self._end_lost(lines)
            self._rest()

    def _rest(self) -> None:
        until = time.monotonic() + IDLE_S
        while time.monotonic() < until:
            self.stop.check()
            time.sleep(0.2)

    def _given_up(self) -> frozenset[str]:
        return frozenset(name for name, n in self._faults.items() if n >= FAULTS_OF_A_STUDY)

    def _serve_one(self, line: StudyLine, left_s: float | None) -> None:
        from pcam_automl.commands.join import WHY, join

        def better_to_do() -> bool:
            other = next_study(overview(self.engine), without=self._given_up())
            return other is not None and other.priority > line.priority

        work = replace(self.work, timeout_s=left_s, yields=better_to_do if len(self.devices) == 1 else None)
        try:
            _, end = join(line.name, self.url, self.asked, self.devices, work, stop=self.stop)
        except Interrupted:
            raise
        except PcamError as fault:  # of this study: the others go on
            self._faults[line.name] += 1
            left = "left to other workers" if line.name in self._given_up() else "tried again"
            terminal.say(f"study {line.name}: {fault}; {left}")
            return
        self._faults.pop(line.name, None)
        if not end.n_finished and end.why != "yielded":  # others were quicker, say: no need to hurry
            self._rest()
        self.n_finished += end.n_finished
        terminal.say(f"study {line.name}: {end.n_finished} trials finished here; {WHY.get(end.why, end.why)}")

    def _end_lost(self, lines: Sequence[StudyLine]) -> None:
        """What a vanished host holds is ended while this worker idles, too."""
        from pcam_automl.search.reading import load_study
        from pcam_automl.search.settling import end_silent

        for line in lines:
            if not line.slots.get("claimed"):
                self._watch.pop(line.name, None)
                continue
            if line.name not in self._watch:
                _, settings = load_study(line.name, self.url)
                self._watch[line.name] = Watchman(Slots(self.engine, line.name), settings.grace_s)
            if silent := self._watch[line.name].look(dead=True):
                folder = studies_folder(self.url) / line.name / "checkpoints"
                end_silent(line.name, self.url, silent, checkpoints=folder, max_retries=self.work.max_retries)


def run_check(name: str, url: str | None, *, as_json: bool) -> bool:
    """Print whether the study agrees with itself; False if it does not."""
    from pcam_automl.search.reading import TRIALS_KEY, load_study
    from pcam_automl.search.soundness import check_study

    url = storage_url(url)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with storage_faults(url):
        study, _ = load_study(name, url)
        trials, slots = study.get_trials(deepcopy=False), Slots(engine_of(study), name).all()
    found = check_study(
        trials, slots, studies_folder(url) / name / "checkpoints", total=study.user_attrs.get(TRIALS_KEY)
    )
    if as_json:
        terminal.print_json({"study": name, "sound": not found.faults, **asdict(found)})
        return not found.faults
    terminal.result(
        f"study {name}: {len(trials)} rows, {found.n_lineages} finished trials, {len(slots)} slots, {found.n_checkpoints} checkpoints verified, "
        f"{found.n_recomputed} rungs trained twice; {'sound' if not found.faults else f'{len(found.faults)} faults'}"
    )
    for fault in found.faults:
        terminal.result(f"  {fault}")
    return not found.faults


def run_status_all(url: str | None, *, as_json: bool) -> None:
    """One line a study: its place in the queue, trials, best value, budget."""
    url = storage_url(url)
    with storage_faults(url):
        lines = overview(engine_of(open_storage(url, create=False)))
    if as_json:
        terminal.print_json([line.to_json() for line in lines])
        return
    if not lines:
        terminal.result(f"no studies in {safe_url(url)}")
        return
    terminal.table(
        f"studies of {safe_url(url)}, in the order in which they are served",
        ("study", "priority", "trials", "running", "failed", "best", "of", "budget", "images/s", "state"),
        [_row(line) for line in lines],
    )


def _row(line: StudyLine) -> tuple[str, ...]:
    done, of = line.slots.get("done", 0), "" if line.total is None else f" of {line.total}"
    budget = (
        "-" if line.budget_s is None else f"{terminal.duration(line.spent_s)} of {terminal.duration(line.budget_s)}"
    )
    return (
        line.name,
        str(line.priority),
        f"{done}{of}",
        str(line.states.get("running", 0)),
        str(line.states.get("fail", 0)),
        "-" if line.best is None else f"{line.best:.4f}",
        line.objective,
        budget,
        "-" if line.images_per_s is None else f"{line.images_per_s:,.0f}",
        "wants workers" if line.wants_workers else "searched" if line.is_over else "in work",
    )
