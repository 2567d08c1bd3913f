"""`submit`, `status --all` and the worker that serves whatever studies have work left. Trains through join.py."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

import optuna
import sqlalchemy as sa

from pcam_automl import terminal
from pcam_automl.commands.advised import command_options
from pcam_automl.config import StudySettings, storage_url, studies_folder
from pcam_automl.errors import DeviceFailed, Interrupted, PcamError, SearchFailed, StudyError, first_few
from pcam_automl.interrupt import StopSignal, stop_signal
from pcam_automl.search.overview import StudyLine, next_study, others, overview, submit
from pcam_automl.search.patience import patient
from pcam_automl.search.reading import load_study
from pcam_automl.search.silence import LOOKS_A_GRACE, Patrol, Silent, Watchman
from pcam_automl.search.slots import Slots
from pcam_automl.search.storage import engine_of, open_storage, storage_faults
from pcam_automl.search.storage_url import check_there, safe_url

if TYPE_CHECKING:  # torch and timm, which `status --all` does without
    from pcam_automl.commands.search import Work
    from pcam_automl.search.study import Asked

IDLE_S = 5.0
"""Between two looks for work."""
FAULTS_OF_A_STUDY, FAULTS_COUNT_S = 3, 900.0
"""A study that this worker failed at so often in so many seconds (its data are not here, say) is left to others meanwhile."""
WATCH_S = 10.0
"""Between two looks at who is silent."""


def run_submit(name: str, url: str | None, asked: Asked, *, n_trials: int | None, priority: int) -> None:
    """Create the study, or change its place in the queue; no trial runs here."""
    from pcam_automl.commands.search import give_budget, print_plan
    from pcam_automl.search.create import create_or_open_study

    at, url = command_options(None, url), storage_url(url)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    asked = replace(asked, n_trials=n_trials, command=terminal.this_command())
    with stop_signal("nothing was lost") as _, storage_faults(url):
        with terminal.counting("packing") as call:
            opened = create_or_open_study(name, url, asked, say=terminal.say, pack_call=call)
        if asked.budget_s is not None:
            give_budget(opened, asked.budget_s)
        submit(opened.study, total=n_trials, budget_s=asked.budget_s, priority=priority)
        print_plan(opened, n_trials)
    terminal.result(f"study {name} is in the queue of {safe_url(url)} with priority {priority}")
    terminal.say(f"next: pcam-automl worker{at} on every machine that shall serve it, pcam-automl status --all{at}")


def run_service_worker(url: str | None, asked: Asked, devices: Sequence[str], work: Work, *, until_idle: bool) -> None:
    """Serve whatever studies have work left, by priority, then age, until a signal (or, with ``until_idle``, until none has)."""
    url = storage_url(url)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with stop_signal("a trial that it was in goes on in another worker") as stop, storage_faults(url):
        check_there(url)
        engine = engine_of(open_storage(url))  # on a new server it waits for the first study
        server = Server(url, engine, asked, devices, work, stop)
        watch = QueueWatch(url, engine, work.max_retries)
        with patient(), Patrol(watch, watch.end):
            in_time = server.serve(until_idle=until_idle)
    done = f"{server.n_finished} trials finished here"
    if not in_time:
        terminal.result(f"time is up: {done}")
    elif server.left:
        raise SearchFailed(
            f"{done}; this worker failed at {len(server.left)} studies that have work left ({first_few(server.left)}; why is said above)"
        )
    else:
        terminal.result(f"no study of {safe_url(url)} has work left: {done}")


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
        left: studies with work left that it failed at, once it has ended for want of others.
    """

    url: str
    engine: sa.Engine
    asked: Asked
    devices: Sequence[str]
    work: Work
    stop: StopSignal
    n_finished: int = 0
    left: tuple[str, ...] = ()
    _faults: dict[str, list[float]] = field(default_factory=dict)

    def serve(self, *, until_idle: bool) -> bool:
        """Until nothing is left, the time is up (False) or a signal comes."""
        began, idle = time.monotonic(), False
        while True:
            self.stop.check()
            left_s = None if self.work.timeout_s is None else self.work.timeout_s - (time.monotonic() - began)
            if left_s is not None and left_s <= 0:
                return False
            lines = overview(self.engine)
            line = next_study(lines, without=self._given_up())
            if line is not None:
                idle = False
                self._serve_one(line, left_s)
                continue
            left = tuple(one.name for one in lines if not one.is_over)
            if until_idle and self._given_up().issuperset(left):
                self.left = left
                return True
            if not idle:
                terminal.say("no study wants workers; waiting for one (Ctrl-C ends this worker)")
            idle = True
            self._rest()

    def _rest(self) -> None:
        until = time.monotonic() + IDLE_S
        while time.monotonic() < until:
            self.stop.check()
            time.sleep(0.2)

    def _given_up(self) -> frozenset[str]:
        """Studies that failed here so often of late."""
        recent = time.monotonic() - FAULTS_COUNT_S
        return frozenset(
            name for name, times in self._faults.items() if sum(at > recent for at in times) >= FAULTS_OF_A_STUDY
        )

    def _serve_one(self, line: StudyLine, left_s: float | None) -> None:
        from pcam_automl.commands.join import WHY, join

        def better_to_do() -> bool:
            lines = overview(self.engine)
            other = next_study(lines, without=self._given_up())
            now = next(
                (one.priority for one in lines if one.name == line.name), line.priority
            )  # it may have been lowered
            return other is not None and other.priority > now

        alone = len(self.devices) == 1
        work = replace(
            self.work, timeout_s=left_s, yields=better_to_do if alone else None, waits="none", since=time.monotonic()
        )
        try:
            _, end = join(line.name, self.url, self.asked, self.devices, work, stop=self.stop)
        except (Interrupted, DeviceFailed):  # of this process, whatever the study
            raise
        except (
            PcamError,
            KeyError,
            sa.exc.NoResultFound,
        ) as fault:  # of this study, or it is deleted: the others go on
            self._faults.setdefault(line.name, []).append(time.monotonic())
            left = "left to other workers for now" if line.name in self._given_up() else "tried again"
            terminal.say(f"study {line.name}: {fault}; {left}")
            self._rest()
            return
        self._faults.pop(line.name, None)
        if not end.n_finished and end.why != "yielded":  # others were quicker, say: no need to hurry
            self._rest()
        self.n_finished += end.n_finished
        terminal.say(f"study {line.name}: {end.n_finished} trials finished here; {WHY.get(end.why, end.why)}")


class QueueWatch:
    """Watchmen over every study of the storage with claims, for a :class:`Patrol`: a service's worker is inside one study at a time,
    and what vanished hosts hold of the others is ended meanwhile.

    Args:
        url: the storage's.
        engine: of it.
        max_retries: see Limits.
    """

    grace_s = WATCH_S * LOOKS_A_GRACE

    def __init__(self, url: str, engine: sa.Engine, max_retries: int) -> None:
        self.url, self.engine, self.max_retries = url, engine, max_retries
        self._watch: dict[str, tuple[Watchman, StudySettings]] = {}
        self._due: dict[str, float] = {}

    def look(self) -> dict[str, Silent]:
        """What is silent, by study."""
        found = {}
        for line in overview(self.engine):
            if not line.slots.get("claimed"):
                self._watch.pop(line.name, None)
                continue
            now = time.monotonic()
            if now < self._due.get(line.name, 0.0):
                continue
            if line.name not in self._watch:
                try:
                    _, settings = load_study(line.name, self.url)
                except StudyError as fault:  # of another version, say: it is not this worker's to look after
                    terminal.say(f"study {line.name} is not watched: {fault}")
                    self._due[line.name] = float("inf")
                    continue
                slots = Slots(self.engine, line.name)
                self._watch[line.name] = Watchman(slots, settings.grace_s, every_s=WATCH_S), settings
            watchman, settings = self._watch[line.name]
            self._due[line.name] = now + min(WATCH_S, settings.grace_s / LOOKS_A_GRACE) * 0.9
            if silent := watchman.look(dead=True):
                found[line.name] = silent
        return found

    def end(self, found: dict[str, Silent]) -> None:
        """End it; its trials go on in whoever serves the study next."""
        from pcam_automl.search.mirror import find_mirror
        from pcam_automl.search.settling import end_silent

        for name, silent in found.items():
            folder, settings = studies_folder(self.url) / name, self._watch[name][1]
            ended = end_silent(
                name,
                self.url,
                silent,
                checkpoints=folder / "checkpoints",
                max_retries=self.max_retries,
                mirror=find_mirror(settings.artifacts, name, folder, terminal.say),
            ).ended
            for number in ended:
                terminal.say(f"study {name}: no sign of life of trial {number}: ended as lost, to be gone on with")


def run_check(name: str, url: str | None, *, as_json: bool) -> bool:
    """Print whether the study agrees with itself; False if it does not."""
    from pcam_automl.search.soundness import check_study
    from pcam_automl.search.whose_folder import foreign

    url = storage_url(url)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with storage_faults(url):
        study, _ = load_study(name, url)
        trials, slots = study.get_trials(deepcopy=False), Slots(engine_of(study), name).all()
    folder = studies_folder(url) / name
    if (strange := foreign(study, folder)) is not None:
        found = check_study(trials, slots, folder / "of another study")
        found = replace(found, faults=(str(strange), *found.faults))
    else:
        found = check_study(trials, slots, folder / "checkpoints")
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
        engine = engine_of(open_storage(url, create=False))
        lines, foreign = overview(engine), others(engine)
    if as_json:
        terminal.print_json([line.to_json() for line in lines])
        return
    if foreign:
        terminal.say(f"not shown: {len(foreign)} that pcam-automl did not make: {first_few(foreign)}")
    if not lines:
        terminal.result(f"no studies in {safe_url(url)} yet; `pcam-automl search` or `pcam-automl submit` makes one")
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
        str(line.n_errors),
        "-" if line.best is None else f"{line.best:.4f}",
        line.objective,
        budget,
        "-" if line.images_per_s is None else f"{line.images_per_s:,.0f}",
        "wants workers" if line.wants_workers else "searched" if line.is_over else "in work",
    )
