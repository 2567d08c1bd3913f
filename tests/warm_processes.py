"""Fresh processes that need not import torch, timm and optuna anew: a server that did it once forks them."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

PRELOADED = ["pytest", "hypothesis", "psycopg", "pymysql", "pcam_automl.finalize", "pcam_automl.search.processes"]
"""One list for every test: the server of a test process is started once, and keeps what it was started with."""


def warm_context() -> ForkServerContext:
    """A context whose processes start in a tenth of a second; a spawned one spends seconds of a core on imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def run_warm(folder: Path, target: Callable[..., None], *arguments: Any) -> tuple[int, str]:
    """Run a module's function in a process of its own, in ``folder``; its exit code (negative: a signal) and stderr."""
    errors = folder / ".stderr"
    process = warm_context().Process(target=_inside, args=(folder, errors, dict(os.environ), target, arguments))
    process.start()
    process.join(240)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"{target.__name__} did not end: {errors.read_text()}")
    text = errors.read_text()
    errors.unlink()
    return process.exitcode, text


def _inside(
    folder: Path, errors: Path, environment: dict[str, str], target: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    os.environ.clear()  # the server has the environment of the test that started it
    os.environ.update(environment)
    os.chdir(folder)
    with errors.open("wb") as file, Path(os.devnull).open("wb") as nowhere:
        os.dup2(file.fileno(), 2)
        os.dup2(nowhere.fileno(), 1)
    target(*arguments)
