"""`dashboard`: what its server does to signals and faults; its pages are optuna-dashboard's own."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import optuna
import optuna_dashboard
import pytest

from pcam_automl.commands.search import run_dashboard
from pcam_automl.errors import Interrupted
from pcam_automl.search.storage import engine_of, open_storage

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def url(tmp_path: Path) -> str:
    url = f"sqlite:///{tmp_path}/s.db"
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    engine_of(optuna.create_study(study_name="s", storage=open_storage(url))).dispose()
    return url


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def test_a_signal_ends_it_although_its_server_swallows_whatever_a_request_raises(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """wsgiref answers 500 to anything that is raised inside a request, and goes on."""
    inside, over = threading.Event(), threading.Event()

    def swallow(*words: Any, **options: Any) -> None:
        while not over.is_set():
            try:
                inside.set()
                time.sleep(0.01)
            except BaseException:  # noqa: BLE001 - as wsgiref does
                pass

    monkeypatch.setattr(optuna_dashboard, "run_server", swallow)
    sender = threading.Thread(target=lambda: inside.wait(60) and os.kill(os.getpid(), signal.SIGTERM))
    sender.start()
    with pytest.raises(Interrupted) as told:
        run_dashboard(url, host="127.0.0.1", port=free_port())
    sender.join()
    over.set()
    assert told.value.exit_code == 143


def test_a_fault_of_the_server_is_raised(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*words: Any, **options: Any) -> None:
        raise OSError("address gone")

    monkeypatch.setattr(optuna_dashboard, "run_server", fail)
    with pytest.raises(OSError, match="address gone"):
        run_dashboard(url, host="127.0.0.1", port=free_port())
