"""`dashboard`: what its server does to signals and faults; its pages are optuna-dashboard's own."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIServer

import optuna
import optuna_dashboard
import pytest

from pcam_automl.commands.status import run_dashboard
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


def ask(port: int, path: str, patience_s: float = 60.0) -> bytes:
    until = time.monotonic() + patience_s
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=patience_s) as answer:
                return bytes(answer.read())
        except (urllib.error.URLError, ConnectionError):
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


def test_a_signal_ends_it_in_the_midst_of_a_request(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """wsgiref answers 500 to anything that is raised inside a request, and goes on."""
    inside, over, port = threading.Event(), threading.Event(), free_port()
    arrived: list[bool] = []

    def pages(storage: Any, artifact_store: Any) -> Callable[..., list[bytes]]:
        def page(environ: Any, start: Any) -> list[bytes]:
            inside.set()
            over.wait(60)
            start("200 OK", [])
            return [b"late"]

        return page

    def ask_and_end() -> None:
        asking = threading.Thread(target=ask, args=(port, "/"), daemon=True)
        asking.start()
        arrived.append(inside.wait(60))
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(optuna_dashboard, "wsgi", pages)
    sender = threading.Thread(target=ask_and_end)
    sender.start()
    with pytest.raises(Interrupted) as told:
        run_dashboard(url, host="127.0.0.1", port=port)
    sender.join()
    over.set()
    assert arrived == [True]
    assert told.value.exit_code == 143


def test_a_fault_of_the_server_is_raised(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any) -> None:
        raise OSError("address gone")

    monkeypatch.setattr(WSGIServer, "service_actions", fail)
    with pytest.raises(OSError, match="address gone"):
        run_dashboard(url, host="127.0.0.1", port=free_port())


def test_its_pages_come_and_no_line_for_each(url: str, capfd: pytest.CaptureFixture[str]) -> None:
    port, answers = free_port(), []

    def ask_and_end() -> None:
        answers.extend(ask(port, path) for path in ("/api/studies", "/dashboard/"))
        os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=ask_and_end)
    sender.start()
    with pytest.raises(Interrupted):
        run_dashboard(url, host="127.0.0.1", port=port)
    sender.join()
    assert json.loads(answers[0])["study_summaries"][0]["study_name"] == "s"
    assert b"<html" in answers[1]
    out, err = capfd.readouterr()
    assert out.count("\n") == 1
    assert "GET" not in err
