"""The supervisor keeps processes alive and ends them in order; /healthz and /metrics say what is."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pcam_automl import service
from pcam_automl.commands.serve import children_of
from pcam_automl.search.overview import StudyLine
from pcam_automl.service import Child, Supervisor, health_of, own_command, serving

LINES = [
    StudyLine("a", 1, 0.0, 10, 600.0, 60.0, False, {"complete": 3, "running": 1}, {"done": 3}, 0.97, "auc", 812.5),
    StudyLine('quoted "name"', 0, 0.0, 2, None, 0.0, False, {}, {"done": 2}, None, "log_loss"),
]
SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


class Enough(Exception):
    """The watching is over."""


def until(done: Callable[[], bool], seconds: float = 20.0) -> Callable[[], None]:
    """A check that raises Enough once ``done`` holds, and fails after so many seconds."""
    end = time.monotonic() + seconds

    def check() -> None:
        if done():
            raise Enough
        assert time.monotonic() < end, "it did not come to that"

    return check


def test_what_dies_is_started_again_with_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "BACKOFF_S", (0.05, 0.1))
    said: list[str] = []
    child = Child("sleeper", SLEEP)
    supervisor = Supervisor([child], said.append)

    def killed_twice() -> bool:
        if child.is_up and child.n_starts < 3:
            assert child.process is not None
            child.process.kill()
            child.process.wait()
        return child.n_starts == 3 and child.is_up

    with pytest.raises(Enough):
        supervisor.watch(until(killed_twice), pause_s=0.01)
    assert [line.partition(";")[0] for line in said] == ["sleeper ended by SIGKILL"] * 2
    supervisor.end(5.0)
    assert not child.is_up


def test_who_does_not_listen_is_killed_in_the_end(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    deaf = f"import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); open({str(ready)!r}, 'w'); time.sleep(600)"
    child, said = Child("deaf", [sys.executable, "-c", deaf]), []
    supervisor = Supervisor([child], said.append)
    with pytest.raises(Enough):
        supervisor.watch(until(ready.exists), pause_s=0.01)
    supervisor.end(0.3)
    assert not child.is_up
    assert said == ["deaf did not end within 0 s and is killed"]


def fetch(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as fault:
        with fault:
            return fault.code, fault.read().decode()


def test_metrics_are_prometheus_own_format() -> None:
    child = Child("worker on cpu", SLEEP)
    with serving(("127.0.0.1", 0), lambda: LINES, [child]) as (host, port):
        status, text = fetch(f"http://{host}:{port}/metrics")
        assert fetch(f"http://{host}:{port}/other")[0] == 404
    assert status == 200
    samples = {
        (
            one.name,
            tuple(one.labels[name] for name in ("study", "state", "objective", "process") if name in one.labels),
        ): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
    }
    assert samples["pcam_automl_trials", ("a", "complete")] == 3
    assert samples["pcam_automl_trials", ("a", "fail")] == 0
    assert samples["pcam_automl_images_per_second", ("a",)] == 812.5
    assert samples["pcam_automl_budget_spent_seconds", ("a",)] == 60
    assert samples["pcam_automl_best_value", ("a", "auc")] == 0.97
    assert samples["pcam_automl_lineages_finished", ('quoted "name"',)] == 2
    assert ("pcam_automl_best_value", ('quoted "name"', "log_loss")) not in samples
    assert samples["pcam_automl_queue", ()] == 1
    assert samples["pcam_automl_process_up", ("worker on cpu",)] == 0


def test_health_names_what_is_wrong() -> None:
    child = Child("worker on cpu", SLEEP)
    assert health_of(lambda: LINES, []) == (200, {"status": "ok", "studies": 2})
    assert health_of(lambda: LINES, [child]) == (503, {"status": "worker on cpu is not running", "studies": 2})

    def away() -> list[StudyLine]:
        raise OSError("gone")

    status, body = health_of(away, [])
    assert (status, body) == (503, {"status": "the storage does not answer (OSError)", "studies": None})
    with serving(("127.0.0.1", 0), away, []) as (host, port):
        assert fetch(f"http://{host}:{port}/healthz")[0] == 503
        assert fetch(f"http://{host}:{port}/metrics") == (503, "the storage does not answer (OSError)\n")


def test_no_process_shows_the_password(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "postgresql://me:s3cret@db/pcam"
    monkeypatch.setattr("joblib.cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    children = children_of(url, Path("data"), ["cpu", "cpu"], "127.0.0.1", 8080)
    assert [child.name for child in children] == ["worker on cpu (1)", "worker on cpu (2)", "dashboard"]
    assert all("s3cret" not in " ".join(child.command) for child in children)
    assert all(child.environ["PCAM_AUTOML_STORAGE"] == url for child in children)
    assert children[0].environ["OMP_NUM_THREADS"] == "4"
    assert children[0].command == own_command("worker", "--plain", "--device", "cpu", "--data", "data")
    (worker,) = children_of(url, None, ["cuda:0"], "127.0.0.1", 0)
    assert worker.name == "worker on cuda:0"
    assert "OMP_NUM_THREADS" not in worker.environ


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_serve_answers_and_ends_on_sigterm(tmp_path: Path) -> None:
    port = free_port()
    words = ["serve", "--storage", f"sqlite:///{tmp_path}/s.db", "--port", str(port), "--dashboard-port", "0"]
    process = subprocess.Popen(
        own_command(*words, "--device", "cpu"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert "/healthz" in process.stdout.readline()
        deadline = time.monotonic() + 60
        while (answer := fetch(f"http://127.0.0.1:{port}/healthz"))[0] != 200:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert json.loads(answer[1]) == {"status": "ok", "studies": 0}
        assert 'pcam_automl_process_up{process="worker on cpu"} 1.0' in fetch(f"http://127.0.0.1:{port}/metrics")[1]
    finally:
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=90)
    assert process.returncode == 143
    assert "Traceback" not in out
