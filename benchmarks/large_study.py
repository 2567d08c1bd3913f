"""A study of 10,000 trials: seconds and memory of `status`, of `dashboard` until a page can be drawn, and of `search` until
its next trial trains. Beside them the same search on a study of one trial, and Optuna loading the large study by its own storage.

    python -m benchmarks large-study                                         # SQLite, and PostgreSQL where there is one
    PCAM_BENCH_TRIALS=1000 PCAM_BENCH_ROUNDS=3 python -m benchmarks large-study

Memory is the largest resident size of the process, imports included. Every run is a fresh process on a warm page cache, the
commands in turn. PostgreSQL is that of PCAM_TEST_POSTGRES_URL, else the local one; a database of its own is made and dropped.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from benchmarks.settings import RESULTS, setting, write_result
from benchmarks.startup import FIRST_STEP
from benchmarks.study_size import postgres_database

N_ROUNDS = setting("ROUNDS", 3)
N_TRIALS = setting("TRIALS", 10_000)
WANTED = {"status": (1.0, 150), "dashboard": (20.0, 1600), "search": (20.0, 1600)}
"""Seconds and MB."""
LONGEST_S = 300.0

OPTUNA = """
import sys, optuna
optuna.logging.set_verbosity(optuna.logging.ERROR)
print(len(optuna.load_study(study_name="pcam", storage=sys.argv[1]).get_trials(deepcopy=False)))
"""


def make_study(folder: Path, url: str) -> None:
    """A study with one real trial and the rest made up, of its own space, and one with a single trial."""
    import optuna

    from benchmarks.filled import add_trials, make_trials
    from pcam_automl.data.synthetic import write_synthetic
    from pcam_automl.search.reading import load_study
    from pcam_automl.search.space import parse_space
    from pcam_automl.search.storage import open_storage

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    write_synthetic(folder / "raw", n_patches=400, n_slides=8, seed=0)
    first = ["--data", f"{folder}/raw", "--weights", "none", "--views", "256", "--trials", "1", "--storage", url]
    for name in ("pcam", "small"):
        ran = subprocess.run(
            [sys.executable, "-m", "pcam_automl", "search", "--study", name, *first],
            capture_output=True,
            text=True,
            check=False,
            cwd=folder,
        )
        if ran.returncode != 0:
            raise RuntimeError(ran.stderr[-1000:])
    study, settings = load_study("pcam", url)
    storage = open_storage(url)
    add_trials(study, storage, make_trials(N_TRIALS, space=parse_space(settings.space, "pcam"))[1:])
    storage.engine.dispose()


def measured(words: list[str], folder: Path, port: int | None = None) -> tuple[float, float]:
    """Seconds until the process ends (or its port answers with the study's page) and its largest resident size in MB."""
    began = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=errors, cwd=folder)
        if port is None:
            _, status, used = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - began
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode != 0:
                errors.seek(0)
                raise RuntimeError(f"{words} failed: {errors.read()[-800:].decode()}")
        else:
            while not _answers(port):
                if process.poll() is not None or time.perf_counter() - began > LONGEST_S:
                    raise RuntimeError(f"{words}: nothing answered on port {port}")
                time.sleep(0.05)
            seconds = time.perf_counter() - began
            process.terminate()
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
    return seconds, used.ru_maxrss / 1024


def _answers(port: int) -> bool:
    """Whether the study's data come, as a page asks for them."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/studies/1?after=0", timeout=LONGEST_S) as answer:
            return bool(answer.read())
    except (urllib.error.URLError, ConnectionError):
        return False


def free_port() -> int:
    """One that nobody uses at the moment."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def main() -> None:
    """Measure, print, write ``benchmarks/results/large_study.json``."""
    rows = []
    print(f"large-study: {N_TRIALS:,} trials, {os.cpu_count()} cores, {N_ROUNDS} rounds")
    with tempfile.TemporaryDirectory() as name, postgres_database() as postgres:
        for kind, url in {"SQLite": "", **({"PostgreSQL": postgres} if postgres else {})}.items():
            folder = Path(name) / kind
            folder.mkdir()
            url = url or f"sqlite:///{folder}/pcam.db"
            # A process of its own: a child's largest size counts from its parent's, at the moment of its start.
            subprocess.run([sys.executable, "-m", "benchmarks.large_study", str(folder), url], check=True)
            search, small = (
                ["search", "--study", name, "--trials", str(n + 1), "--storage", url]
                for name, n in (("pcam", N_TRIALS), ("small", 1))
            )
            runs = {
                "status": ["-m", "pcam_automl", "status", "--study", "pcam", "--storage", url],
                "dashboard": ["-m", "pcam_automl", "dashboard", "--storage", url, "--port"],
                "search": ["-c", FIRST_STEP, *search],
                "search of 1 trial": ["-c", FIRST_STEP, *small],
                "Optuna's load alone": ["-c", OPTUNA, url],
            }
            found: dict[str, list[tuple[float, float]]] = {side: [] for side in runs}
            for _ in range(N_ROUNDS):
                for side, words in runs.items():
                    port = free_port() if side == "dashboard" else None
                    found[side].append(measured([*words, *([str(port)] if port else [])], folder, port))
            for side, values in found.items():
                seconds, megabytes = ([value[place] for value in values] for place in (0, 1))
                wanted = "  wanted {:.0f} s, {:,} MB".format(*WANTED[side]) if side in WANTED else ""
                print(
                    f"  {kind:<11}{side:<20} median {statistics.median(seconds):6.2f} s ({min(seconds):.2f} to "
                    f"{max(seconds):.2f}), {max(megabytes):6,.0f} MB{wanted}"
                )
                rows.append({"storage": kind, "side": side, "seconds": seconds, "resident_mb": megabytes})
    write_result(RESULTS / "large_study.json", {"trials": N_TRIALS, "rounds": N_ROUNDS, "rows": rows})


if __name__ == "__main__":
    make_study(Path(sys.argv[1]), sys.argv[2])
