"""One long-running command: processes that are kept alive, and what a load balancer and Prometheus ask. Trains nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from pcam_automl.children import end_with_parent
from pcam_automl.search.overview import StudyLine

BACKOFF_S = (1.0, 2.0, 5.0, 15.0, 60.0)
"""Before a process that ended is started again; from the beginning once it has run for five minutes."""
STEADY_S = 300.0
LAST_WORDS_S = 60.0
"""A worker that is asked to end finishes its step and its checkpoint."""
STATES = ("running", "waiting", "complete", "pruned", "fail")

Say = Callable[[str], None]


@dataclass
class Child:
    """A process that shall run as long as the service does.

    Attributes:
        name: for people and metrics.
        command: its words; secrets go by the environment, which ``ps`` does not show to others.
        environ: variables beside this process's own.
    """

    name: str
    command: Sequence[str]
    environ: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    n_starts: int = 0
    _began: float = 0.0
    _failures: int = 0
    _next_at: float = 0.0

    @property
    def is_up(self) -> bool:
        process = self.process  # read once: the threads that answer /healthz ask, too
        return process is not None and process.poll() is None

    def keep(self, say: Say, now: float) -> None:
        """Start it where it does not run and its pause is over."""
        if self.is_up:
            return
        if self.process is not None:
            code = self.process.returncode
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            self._failures = 1 if now - self._began >= STEADY_S else self._failures + 1
            pause_s = BACKOFF_S[min(self._failures, len(BACKOFF_S)) - 1]
            self._next_at = now + pause_s
            say(f"{self.name} ended by {how}; starting it again in {pause_s:.0f} s")
            self.process = None
        if now >= self._next_at:
            self._began, self.n_starts = now, self.n_starts + 1
            # A group of its own: Ctrl-C reaches this process alone, which then ends them in order.
            try:
                self.process = subprocess.Popen(
                    list(self.command),
                    env={**os.environ, **self.environ},
                    start_new_session=True,
                    preexec_fn=end_with_parent,
                )
            except OSError as fault:  # no memory or no process left, for now
                self._failures += 1
                pause_s = BACKOFF_S[min(self._failures, len(BACKOFF_S)) - 1]
                self._next_at = now + pause_s
                say(f"{self.name} cannot be started ({fault.strerror}); trying again in {pause_s:.0f} s")


class Supervisor:
    """Keeps the children alive until it is told to end.

    Args:
        children: what to run.
        say: told of every end and start.
    """

    def __init__(self, children: Sequence[Child], say: Say) -> None:
        self.children, self.say = list(children), say

    def watch(self, check: Callable[[], None], *, pause_s: float = 0.5) -> None:
        """Until ``check`` raises."""
        while True:
            check()
            now = time.monotonic()
            for child in self.children:
                child.keep(self.say, now)
            time.sleep(pause_s)

    def end(self, patience_s: float = LAST_WORDS_S) -> None:
        """Ask all of them to end, wait, then kill; their trials go on in other workers either way."""
        up = [child for child in self.children if child.is_up]
        for child in up:
            assert child.process is not None
            child.process.terminate()
        until = time.monotonic() + patience_s
        try:
            for child in up:
                assert child.process is not None
                try:
                    child.process.wait(max(0.1, until - time.monotonic()))
                except subprocess.TimeoutExpired:
                    self.say(f"{child.name} did not end within {patience_s:.0f} s and is killed")
        finally:  # a second signal does not wait for their last words
            for child in up:
                if child.is_up:
                    assert child.process is not None
                    os.killpg(child.process.pid, signal.SIGKILL)
                    child.process.wait()


# --- what is asked from outside --------------------------------------------------------------------------------------


class StudiesCollector:
    """Prometheus' metrics of the studies and of this service's processes, read anew at every scrape.

    Args:
        lines: reads the studies.
        children: of the supervisor.
    """

    def __init__(self, lines: Callable[[], list[StudyLine]], children: Sequence[Child] = ()) -> None:
        self.lines, self.children = lines, children

    def collect(self) -> Iterator[Metric]:
        """Gauges; a study's name is a label."""
        lines = self.lines()

        def gauge(name: str, text: str, labels: Sequence[str] = ("study",)) -> GaugeMetricFamily:
            return GaugeMetricFamily(f"pcam_automl_{name}", text, labels=labels)

        trials = gauge("trials", "Trials (rows of Optuna) by state.", ("study", "state"))
        wanted = gauge("trials_wanted", "Total of finished trials that was asked for.")
        errors = gauge("trials_failed_by_error", "Of the failed: ended by an error, not interrupted or lost.")
        finished = gauge("lineages_finished", "Finished trials that count towards the total.")
        best = gauge("best_value", "Value of the best complete trial.", ("study", "objective"))
        speed = gauge("images_per_second", "Training images a second, mean of the last trials.")
        budget = gauge("budget_seconds", "Wall clock that the study has for search and finalize.")
        spent = gauge("budget_spent_seconds", "Of it spent.")
        for line in lines:
            for state in STATES:
                trials.add_metric((line.name, state), line.states.get(state, 0))
            errors.add_metric((line.name,), line.n_errors)
            finished.add_metric((line.name,), line.slots.get("done", 0))
            for metric, value in ((wanted, line.total), (speed, line.images_per_s), (budget, line.budget_s)):
                if value is not None:
                    metric.add_metric((line.name,), value)
            if line.budget_s is not None:
                spent.add_metric((line.name,), line.spent_s)
            if line.best is not None:
                best.add_metric((line.name, line.objective), line.best)
        yield from (trials, errors, wanted, finished, best, speed, budget, spent)
        queue = gauge("queue", "Studies that want workers.", ())
        queue.add_metric((), sum(line.wants_workers for line in lines))
        up = gauge("process_up", "Whether a process of this service runs.", ("process",))
        starts = gauge("process_starts", "How often it was started.", ("process",))
        for child in self.children:
            up.add_metric((child.name,), float(child.is_up))
            starts.add_metric((child.name,), child.n_starts)
        yield from (queue, up, starts)


def health_of(lines: Callable[[], list[StudyLine]], children: Sequence[Child]) -> tuple[int, dict[str, Any]]:
    """(HTTP status, JSON): 200 while the storage answers and every process runs, else 503 with what is wrong."""
    faults = [f"{child.name} is not running" for child in children if not child.is_up]
    try:
        n_studies = len(lines())
    except Exception as fault:  # noqa: BLE001 - whatever a database or its driver raises is the answer
        n_studies = None
        faults.append(f"the storage does not answer ({type(fault).__name__})")
    return (503 if faults else 200), {"status": "; ".join(faults) or "ok", "studies": n_studies}


@contextmanager
def serving(
    address: tuple[str, int], lines: Callable[[], list[StudyLine]], children: Sequence[Child]
) -> Iterator[tuple[str, int]]:
    """Answer ``/healthz`` and ``/metrics`` in a thread; gives the address, whose port may have been 0."""
    registry = CollectorRegistry(auto_describe=False)
    collector = StudiesCollector(lines, children)

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path == "/healthz":
                status, body = health_of(lines, children)
                self._answer(status, "application/json", json.dumps(body).encode())
            elif path == "/metrics":
                try:
                    text = generate_latest(registry)
                except Exception as fault:  # noqa: BLE001 - the storage is away: the scrape fails, the service goes on
                    self._answer(503, "text/plain", f"the storage does not answer ({type(fault).__name__})\n".encode())
                    return
                self._answer(200, CONTENT_TYPE_LATEST, text)
            else:
                self._answer(404, "text/plain", b"there are /healthz and /metrics\n")

        def _answer(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Scrapes are not worth a line each."""

    registry.register(collector)
    server = ThreadingHTTPServer(address, Answers)
    thread = threading.Thread(target=server.serve_forever, name="http", daemon=True)
    thread.start()
    try:
        host, port = server.server_address[:2]
        yield str(host), int(port)
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5.0)


def own_command(*words: str) -> list[str]:
    """``pcam-automl WORDS`` by this interpreter."""
    return [sys.executable, "-m", "pcam_automl", *words]
