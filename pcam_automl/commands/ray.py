"""`search --launcher ray`: the workers of a study on a Ray cluster."""

from __future__ import annotations

import os
import time

from pcam_automl import terminal
from pcam_automl.commands.account import clock_of
from pcam_automl.commands.search import Work, print_plan
from pcam_automl.commands.workers import StudyBar
from pcam_automl.errors import StudyError
from pcam_automl.interrupt import StopSignal
from pcam_automl.search.ledger import spent_s
from pcam_automl.search.patience import patient
from pcam_automl.search.ray_launcher import RayTask, run_on_ray
from pcam_automl.search.reading import n_finished_of
from pcam_automl.search.storage_url import sqlite_path
from pcam_automl.search.study import Asked, OpenStudy
from pcam_automl.search.turns import NEVER_ENDS, Limits
from pcam_automl.search.worker import SearchEnd


def work_on_ray(
    opened: OpenStudy, asked: Asked, n_workers: int, address: str, work: Work, *, stop: StopSignal
) -> SearchEnd:
    """The same on a Ray cluster whose nodes have this package and see the data and the storage.

    Raises:
        StudyError: SQLite, which the nodes cannot share.
    """
    if sqlite_path(opened.url) is not None and (address or os.environ.get("RAY_ADDRESS")):
        raise StudyError(
            "--launcher ray on several machines needs a database server: take PostgreSQL (docs/distributed.md)"
        )
    clock = None
    if work.budget_s is not None:  # for people: the workers have clocks of their own
        clock = clock_of(opened, work.budget_s, spent_s(opened.study), time.monotonic())
    print_plan(opened, work.n_trials, clock)
    planned_on_gpu = str(opened.settings.plan["device"]).startswith("cuda")
    gpu = asked.device.startswith("cuda") or (asked.device == "auto" and planned_on_gpu)
    words = ["worker", "--study", opened.name, "--device", "cuda" if gpu else "cpu", "--plain"]
    words += [
        "--data",
        str((asked.data or opened.store.root).expanduser().resolve()),
        "--max-retries",
        str(work.max_retries),
    ]
    words += [] if work.quota_bytes is None else ["--checkpoint-quota", f"{work.quota_bytes}B"]
    words += [] if work.timeout_s is None else ["--timeout", f"{work.timeout_s:.15g}s"]
    before = n_finished_of(opened.study)
    with terminal.Bars() as bars, stop.deferred(), patient():
        show = StudyBar(bars, Limits(work.n_trials or NEVER_ENDS, clock=clock), before)

        def check() -> None:
            stop.check()
            if time.monotonic() - looked[0] >= 5.0:
                looked[0] = time.monotonic()
                show.set(n_finished_of(opened.study))

        looked = [time.monotonic()]
        task = RayTask(words, opened.url, n_workers, float(gpu), 1.0, address or None)
        run_on_ray(task, check, terminal.say)
    done = n_finished_of(opened.study)
    whole = work.n_trials is not None and done >= work.n_trials
    return SearchEnd(done - before, "done" if whole else "budget" if work.budget_s is not None else "timeout")
