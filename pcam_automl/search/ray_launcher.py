"""Workers as tasks of a Ray cluster: the same `worker` command, placed by Ray's scheduler. Imports ray only when it is asked for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pcam_automl.children import end_with_parent
from pcam_automl.config import STORAGE_VARIABLE
from pcam_automl.errors import InputError, SearchFailed

LAST_WORDS_S = 60.0
MOST_FAILURES = 3
"""Workers that end with an exit code of their own, not by a lost node, are started again so often each."""


@dataclass(frozen=True)
class RayTask:
    """What is placed on the cluster.

    Attributes:
        words: of the worker's command, the storage left out.
        url: of the storage, which reaches the worker by its environment.
        n_workers: how many.
        n_gpus: of a worker.
        n_cpus: of a worker.
        address: of the cluster; None is RAY_ADDRESS, else a cluster of this machine.
    """

    words: Sequence[str]
    url: str
    n_workers: int
    n_gpus: float
    n_cpus: float
    address: str | None = None


def run_on_ray(task: RayTask, check: Callable[[], None], say: Callable[[str], None]) -> None:
    """Until every worker has found nothing more to do. Those of lost nodes are placed again, by Ray.

    Args:
        task: what to place.
        check: called twice a second; raises to end the workers in order.
        say: told of what is placed and what ends.

    Raises:
        InputError: Ray is not installed, or the cluster cannot be reached or has no such resources.
        SearchFailed: a worker failed again and again.
    """
    ray = _import_ray()
    try:
        ray.init(address=task.address or os.environ.get("RAY_ADDRESS"), logging_level="error", log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as fault:
        raise InputError(
            f"--launcher ray: no cluster at {task.address or 'RAY_ADDRESS'} ({str(fault)[:160]})"
        ) from None
    try:
        _check_resources(ray.cluster_resources(), task)
        remote = ray.remote(max_retries=-1, num_gpus=task.n_gpus, num_cpus=task.n_cpus, scheduling_strategy="SPREAD")(
            work
        )
        running = {remote.remote(list(task.words), task.url): number for number in range(task.n_workers)}
        failures = dict.fromkeys(range(task.n_workers), 0)
        say(f"{task.n_workers} workers on a Ray cluster of {len([n for n in ray.nodes() if n['Alive']])} nodes")
        try:
            while running:
                check()
                ended, _ = ray.wait(list(running), timeout=0.5)
                for one in ended:
                    number = running.pop(one)
                    code = ray.get(one)
                    if code == 0:
                        continue
                    failures[number] += 1
                    if failures[number] >= MOST_FAILURES:
                        last = f"worker {number} on Ray ended {MOST_FAILURES} times, at last with exit code {code}; its own words stand in Ray's logs"
                        if not running:
                            raise SearchFailed(last)
                        say(f"{last}; the others go on without it")
                        continue
                    say(f"worker {number} ended with exit code {code}; starting it again")
                    running[remote.remote(list(task.words), task.url)] = number
        finally:
            for one in running:
                ray.cancel(one)
            ray.wait(list(running), num_returns=len(running), timeout=LAST_WORDS_S) if running else None
    finally:
        ray.shutdown()


def work(words: list[str], url: str) -> int:
    """In a task: the worker command as a process, which ends with the task; its exit code."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pcam_automl", *words],
        env={**os.environ, STORAGE_VARIABLE: url},
        preexec_fn=end_with_parent,
    )
    try:
        return process.wait()
    except BaseException:  # cancelled: Ray raises KeyboardInterrupt here
        process.send_signal(signal.SIGTERM)
        until = time.monotonic() + LAST_WORDS_S
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        process.kill()
        raise


def _import_ray() -> Any:
    try:
        import ray
    except ImportError:
        raise InputError("--launcher ray needs Ray; run: pip install ray") from None
    return ray


def _check_resources(found: dict[str, float], task: RayTask) -> None:
    """A task that no node can hold would wait for ever."""
    for name, wanted in (("GPU", task.n_gpus), ("CPU", task.n_cpus)):
        if wanted > found.get(name, 0.0):
            raise InputError(
                f"--launcher ray: a worker needs {wanted:g} {name}, the cluster has {found.get(name, 0.0):g} in all; choose another --device or start nodes with them"
            )
