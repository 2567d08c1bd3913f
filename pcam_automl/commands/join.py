"""`worker`: joins a study that another command made, from any machine that reaches its storage."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import optuna

from pcam_automl import terminal
from pcam_automl.commands.advised import command_options
from pcam_automl.commands.queue import run_service_worker
from pcam_automl.commands.search import GO_ON, Work, work_on
from pcam_automl.commands.workers import devices_for
from pcam_automl.config import storage_url
from pcam_automl.errors import StudyError
from pcam_automl.interrupt import StopSignal, stop_signal
from pcam_automl.search.reading import CLOCK_KEY, TRIALS_KEY, n_finished_of
from pcam_automl.search.storage import storage_faults
from pcam_automl.search.study import Asked, OpenStudy, open_study
from pcam_automl.search.worker import SearchEnd
from pcam_automl.versions import versions


def run_worker_command(
    name: str | None,
    url: str | None,
    *,
    data: Path | None,
    device: str,
    n_workers: int | None,
    per_device: str | None,
    timeout_s: float | None,
    quota_bytes: int,
    max_retries: int,
    until_idle: bool,
) -> None:
    """Work on the study that is named, or on whatever studies of the storage have work left."""
    devices = devices_for(Asked(data=data, device=device), n_workers, per_device, url)
    asked = Asked(data=data, device=device, n_workers=len(devices))
    work = Work(None, None, timeout_s, quota_bytes, True, max_retries)
    if name is None:
        run_service_worker(url, asked, devices, work, until_idle=until_idle)
    else:
        run_join(name, url, asked, devices, work)


def run_join(name: str, url: str | None, asked: Asked, devices: Sequence[str], work: Work) -> None:
    """Work on the study until it has the total, or has used the budget, that it was made with."""
    began, url = time.monotonic(), storage_url(url)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with stop_signal(GO_ON) as stop, storage_faults(url):
        opened, end = join(name, url, asked, devices, replace(work, waits="all"), stop=stop)
    done, total = n_finished_of(opened.study), opened.study.user_attrs.get(TRIALS_KEY)
    of = "" if total is None else f" of {total}"
    terminal.result(
        f"study {name}: {end.n_finished} trials finished here, {done}{of} in all; {WHY.get(end.why, end.why)} ({terminal.duration(time.monotonic() - began)})"
    )


WHY = {
    "done": "the study is complete",
    "timeout": "time is up",
    "budget": "the search's part of the budget is over",
    "yielded": "a study of higher priority waits",
    "claimed elsewhere": "other workers hold the rest",
}


def join(
    name: str, url: str, asked: Asked, devices: Sequence[str], work: Work, *, stop: StopSignal
) -> tuple[OpenStudy, SearchEnd]:
    """Open the study with what it remembers and work on it; ``work`` names no total and no budget, the study does.

    Raises:
        StudyError: no such study, or one without a total and without a budget.
        DataError: the data are not the study's.
    """
    with terminal.counting("packing") as call:
        opened = open_study(name, url, asked, say=terminal.say, pack_call=call)
    attrs = opened.study.user_attrs
    total, budget_s = attrs.get(TRIALS_KEY), attrs.get(CLOCK_KEY)
    if total is None and budget_s is None:
        raise StudyError(
            f"study {name!r} has neither a total of trials nor a budget to work towards; "
            f"give it one with `pcam-automl search{command_options(name, url)} --trials N` (or --budget TIME)"
        )
    for line in version_differences(opened.settings.versions, versions()):
        terminal.say(f"warning: {line}")
    work = replace(work, n_trials=total, budget_s=budget_s, command="worker")
    return opened, work_on(opened, asked, devices, work, stop=stop)


def version_differences(of_study: dict[str, str], here: dict[str, str]) -> list[str]:
    """A line for each package whose version is another one here than where the study was made; each trial records its own."""
    return [
        f"{name} is {here[name]} here, the study was made with {known}; its trials may not repeat to the last digit"
        for name, known in of_study.items()
        if name in here and here[name] != known
    ]
