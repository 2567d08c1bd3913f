"""`serve`: dashboard, workers and queue of a storage under one supervisor."""

from __future__ import annotations

import collections
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import joblib
import optuna

from pcam_automl import terminal
from pcam_automl.commands.status import warn_of_open_address
from pcam_automl.commands.workers import devices_for
from pcam_automl.config import STORAGE_VARIABLE, storage_url
from pcam_automl.interrupt import stop_signal
from pcam_automl.search.overview import overview
from pcam_automl.search.storage import engine_of, open_storage, storage_faults
from pcam_automl.search.storage_url import safe_url
from pcam_automl.search.study import Asked
from pcam_automl.service import Child, Supervisor, own_command, serving


def run_serve(
    url: str | None,
    *,
    data: Path | None,
    device: str,
    n_workers: int | None,
    per_device: str | None,
    host: str,
    port: int,
    dashboard_port: int,
) -> None:
    """Until a signal: keep the workers and the dashboard alive, answer /healthz and /metrics.

    Raises:
        StudyError: the storage cannot be used.
    """
    url = storage_url(url)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if dashboard_port:
        warn_of_open_address(host, dashboard_port)
    devices = devices_for(Asked(data=data, device=device), n_workers, per_device, url, shares=False)
    with storage_faults(url):
        engine = engine_of(open_storage(url))
    children = children_of(url, data, devices, host, dashboard_port)
    supervisor = Supervisor(children, terminal.say)
    how_to_go_on = "the studies go on in other workers, or here at the next start"
    with (
        stop_signal(how_to_go_on) as stop,
        serving((host, port), lambda: overview(engine, patient=False), children) as (at, on),
    ):
        terminal.result(f"serving the studies of {safe_url(url)}: http://{at}:{on}/healthz, http://{at}:{on}/metrics")
        if dashboard_port:
            terminal.result(f"dashboard: http://{host}:{dashboard_port}/")
        signal.signal(signal.SIGHUP, signal.getsignal(signal.SIGTERM))  # the terminal is closed: end in order
        with stop.deferred():
            try:
                supervisor.watch(stop.check)
            finally:
                supervisor.end()


def children_of(url: str, data: Path | None, devices: Sequence[str], host: str, dashboard_port: int) -> list[Child]:
    """A worker on each device and the dashboard; the storage's URL is told by the environment, which ``ps`` does not show."""
    secret = {STORAGE_VARIABLE: url}
    more = [] if data is None else ["--data", str(data)]
    threads = {}
    if len(devices) > 1 and "OMP_NUM_THREADS" not in os.environ:
        threads = {"OMP_NUM_THREADS": str(max(1, int(joblib.cpu_count()) // len(devices)))}
    seen: collections.Counter[str] = collections.Counter()
    children = []
    for device in devices:
        name = f"worker on {device}" + (f" ({seen[device] + 1})" if devices.count(device) > 1 else "")
        seen[device] += 1
        children.append(Child(name, own_command("worker", "--plain", "--device", device, *more), {**secret, **threads}))
    if dashboard_port:
        words = ("dashboard", "--host", host, "--port", str(dashboard_port))
        children.append(Child("dashboard", own_command(*words), secret))
    return children
