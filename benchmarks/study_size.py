"""What a trial costs beside its training as a study grows: ask, suggest, report and tell, ours beside bare Optuna.

    python -m benchmarks study-size          # 10, 1,000 and 10,000 trials, SQLite and PostgreSQL, 9 rounds
    PCAM_BENCH_TRIALS=10,1000 PCAM_BENCH_ROUNDS=5 python -m benchmarks study-size

Ours is the search's own worker and objective with the training taken out: it claims a slot, asks, suggests the default
space, notes what it takes to repeat the trial, reports three rungs, tells, and prints its line. Bare Optuna asks,
suggests the same space with the same sampler, reports as often, prunes by its own successive halving and tells; it notes
nothing. Each side is a process of its own over its own study of the same trials, in one database; they take turns, a
trial each. PostgreSQL is that of PCAM_TEST_POSTGRES_URL, else the local one; a database of its own is made and dropped.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from benchmarks.settings import RESULTS, numbers, setting, write_result

SIZES = numbers("TRIALS", "10,1000,10000")
N_ROUNDS = setting("ROUNDS", 9)
POSTGRES = os.environ.get("PCAM_TEST_POSTGRES_URL", "postgresql://postgres@127.0.0.1:5432/test")
SIDES = ("bare Optuna", "pcam-automl")
LIMIT_MS, LIMIT_RATIO = 50.0, 1.1

Times = dict[str, dict[int, dict[str, list[float]]]]
"""Storage, trials, side: seconds of each round."""


# --- the two sides, in processes of their own ------------------------------------------------------------------------


def take_turns(trial: Callable[[], None]) -> None:
    """One trial for every line on stdin, its seconds as a line on stdout; the first one also loads the study."""
    for _ in range(N_ROUNDS + 1):
        sys.stdin.readline()
        began = time.perf_counter()
        trial()
        print(time.perf_counter() - began, flush=True)


def bare(url: str, name: str) -> None:
    """Optuna as its tutorial shows it."""
    import optuna

    from benchmarks.filled import RUNGS, the_space
    from pcam_automl.search.sampler import N_STARTUP
    from pcam_automl.search.storage import quiet_experimental

    space = the_space()
    with quiet_experimental():
        sampler = optuna.samplers.TPESampler(seed=0, n_startup_trials=N_STARTUP, group=True)
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=RUNGS[0][0], reduction_factor=3)
    study = optuna.load_study(study_name=name, storage=url, sampler=sampler, pruner=pruner)

    def trial() -> None:
        one = study.ask()
        space.suggest(one, {"epochs": None, "seed": 0, "pretrained": False})
        for views, _ in RUNGS:
            one.report(0.99, step=views)
            if views != RUNGS[-1][0] and one.should_prune():
                raise AssertionError("the best value so far was pruned")
        study.tell(one, 0.99)

    take_turns(trial)


def ours(url: str, name: str) -> None:
    """The worker of `search` with its training replaced by ready results."""
    import torch
    from optuna.trial import TrialState

    from benchmarks.filled import RUNGS
    from pcam_automl import terminal
    from pcam_automl.commands.search import _SearchShow
    from pcam_automl.data.pack import pack
    from pcam_automl.data.sources import open_source
    from pcam_automl.data.splits import make_split
    from pcam_automl.data.store import open_store
    from pcam_automl.data.synthetic import write_synthetic
    from pcam_automl.models.factory import smallest_input
    from pcam_automl.search import objective as at
    from pcam_automl.search.ledger import Ledger
    from pcam_automl.search.reading import load_study, n_finished_of
    from pcam_automl.search.space import parse_space
    from pcam_automl.search.study import OpenStudy
    from pcam_automl.search.turns import Limits
    from pcam_automl.search.worker import run_worker
    from pcam_automl.training.compute import Compute
    from pcam_automl.training.engine import RungResult, Training

    def fit(training: Any, *_: Any, **__: Any) -> Iterator[RungResult]:
        for index, (views, subset) in enumerate(RUNGS):
            training.results.append(RungResult(index, views, subset, 0.99, 0.1, 0.1, 20.0, 200.0, 1e-3))
            yield training.results[-1]

    def start(recipe: Any, *_: Any, compute: Compute, key: int, **__: Any) -> Training:
        no_task: Any = SimpleNamespace()  # nothing is trained
        return Training(recipe, torch.nn.Conv2d(3, 1, 1), no_task, compute, key=key)

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(at, "fit", fit):
        write_synthetic(Path(folder) / "raw", n_patches=400, n_slides=8, seed=0)
        pack(open_source(Path(folder) / "raw"), Path(folder) / "pack")
        store = open_store(Path(folder) / "pack")
        study, settings = load_study(name, url)
        opened = OpenStudy(
            study, settings, parse_space(settings.space, name), store, make_split(store, seed=0, holdout=0.0),
            Path(folder) / "study", url,
        )  # fmt: skip
        for backbone in opened.space.choices("backbone"):
            smallest_input(backbone)  # built once a process and remembered: no cost that grows
        objective = at.Objective(opened, torch.device("cpu"))
        speed = SimpleNamespace(
            compute_for=lambda *_: Compute("cpu", step_s=0.1),
            images_per_s=lambda *_: 300.0,
            knows=lambda *_: True,
            note_micro_batch=lambda *_: None,
        )
        with (
            terminal.Bars() as bars,
            mock.patch.object(at, "start_training", start),
            mock.patch.object(terminal, "say"),
        ):
            objective._speed = speed  # type: ignore[assignment]
            began = _Turns()
            n_before = len(study.get_trials(deepcopy=False))
            limits = Limits(n_finished_of(study) + N_ROUNDS + 1)
            show = _SearchShow(bars, opened, limits, Ledger(study, "search", kept=False))
            objective.watch = show.watch()

            def finished(trial: Any, trials: list[Any]) -> None:
                show.finished(trial, trials)
                began.over()

            objective.stop = began.wait
            run_worker(objective, limits, finished=finished)
        made = study.get_trials(deepcopy=False)[n_before:]
        assert len(made) == N_ROUNDS + 1
        assert all(trial.state == TrialState.COMPLETE for trial in made), made[-1].user_attrs["reason"]


class _Turns:
    """The turns of a worker that loops by itself: its first check for a stop waits for the line that starts a trial."""

    def __init__(self) -> None:
        self.began: float | None = None
        self.n_left = N_ROUNDS + 1

    def wait(self) -> None:
        if self.began is None and self.n_left > 0 and sys.stdin.readline():
            self.n_left -= 1
            self.began = time.perf_counter()

    def over(self) -> None:
        assert self.began is not None
        print(time.perf_counter() - self.began, flush=True)
        self.began = None


# --- the measurement -------------------------------------------------------------------------------------------------


@contextmanager
def postgres_database() -> Iterator[str | None]:
    """URL of an empty PostgreSQL database that is dropped afterwards; None where there is no server."""
    import sqlalchemy as sa

    from pcam_automl.search.storage_url import normalised_url, safe_url

    server = sa.create_engine(normalised_url(POSTGRES), isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    name = f"pcam_bench_{os.getpid()}"
    try:
        with server.connect() as connection:
            connection.execute(sa.text(f"CREATE DATABASE {name}"))
    except sa.exc.OperationalError:
        print(f"  no PostgreSQL at {safe_url(POSTGRES)}: not measured", file=sys.stderr)
        yield None
        return
    try:
        yield sa.make_url(normalised_url(POSTGRES)).set(database=name).render_as_string(hide_password=False)
    finally:
        with server.connect() as connection:
            connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))


def measure(url: str, trials: list[Any], children: dict[str, subprocess.Popen[str]]) -> dict[str, list[float]]:
    """Seconds of a trial for both sides, round by round, on studies of ``trials``; the first, which loads, is left out."""
    from benchmarks.filled import create_study
    from pcam_automl.search.storage import open_storage

    storage = open_storage(url)
    for number in range(len(SIDES)):
        create_study(storage, f"s{len(trials)}-{number}", trials)
    storage.engine.dispose()
    for number, child in enumerate(children.values()):
        assert child.stdin is not None
        child.stdin.write(json.dumps([url, f"s{len(trials)}-{number}"]) + "\n")
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(N_ROUNDS + 1):
        for side, child in children.items():
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write("go\n")
            child.stdin.flush()
            times[side].append(float(child.stdout.readline()))
    return {side: values[1:] for side, values in times.items()}


def draw(times: Times, file: Path) -> None:
    """Milliseconds a trial against the trials of the study, a panel for each storage."""
    from pcam_automl.report.style import BLUE, GREY, VERMILION, add_row, dress, legend, new_figure

    figure = new_figure(4.6 * len(times), 3.9)
    for axes, (storage, sizes) in zip(add_row(figure, len(times)), times.items(), strict=True):
        for side, colour, marker in zip(SIDES, (BLUE, VERMILION), ("o", "s"), strict=True):
            middle = [1000 * statistics.median(found[side]) for found in sizes.values()]
            ends = [[1000 * pick(found[side]) for found in sizes.values()] for pick in (min, max)]
            axes.plot(list(sizes), middle, color=colour, marker=marker, label=f"{side}: median, least to most")
            axes.fill_between(list(sizes), ends[0], ends[1], color=colour, alpha=0.15, linewidth=0)
        axes.axhline(LIMIT_MS, color=GREY, linestyle=":", label=f"{LIMIT_MS:.0f} ms")
        axes.set(xscale="log", yscale="log", ylim=(20, 2000))
        axes.set_yticks([20, 50, 100, 200, 500, 1000, 2000], minor=False)
        axes.minorticks_off()
        axes.set_xticks(list(sizes))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:,.0f}")
        dress(axes, title=storage, x="trials in the study", y="ask + report + tell, ms a trial")
    legend(axes)
    figure.savefig(file, metadata={"Software": None})


def main() -> None:
    """Measure, print, write ``benchmarks/results/study_size.json`` and ``.png``."""
    import optuna

    from benchmarks.filled import make_trials

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    times: Times = {}
    children = {
        side: subprocess.Popen(
            [sys.executable, "-m", "benchmarks.study_size", side],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for side in SIDES
    }
    with tempfile.TemporaryDirectory() as folder, postgres_database() as postgres:
        urls = {"SQLite": f"sqlite:///{folder}/bench.db"} | ({"PostgreSQL": postgres} if postgres else {})
        for size in SIZES:
            trials = make_trials(size)
            for storage, url in urls.items():
                times.setdefault(storage, {})[size] = measure(url, trials, children)
        for child in children.values():
            child.communicate()
    print(f"study-size: milliseconds a trial beside its training, {os.cpu_count()} cores, {N_ROUNDS} rounds")
    print(f"  {'storage':<12}{'trials':>8}{SIDES[0]:>24}{SIDES[1]:>24}   ratio")
    rows = []
    for storage, sizes in times.items():
        for size, found in sizes.items():
            middle = {side: 1000 * statistics.median(values) for side, values in found.items()}
            ratio = statistics.median(b / a for a, b in zip(found[SIDES[0]], found[SIDES[1]], strict=True))
            shown = [f"{middle[s]:.1f} ({1000 * min(found[s]):.1f} to {1000 * max(found[s]):.1f})" for s in SIDES]
            print(f"  {storage:<12}{size:>8,}{shown[0]:>24}{shown[1]:>24}   {ratio:.2f}")
            rows.append({"storage": storage, "trials": size, "seconds": found, "ratio": ratio})
    print(f"  wanted: at most {LIMIT_MS:.0f} ms at 1,000 trials, a ratio of at most {LIMIT_RATIO} at 10,000")
    write_result(RESULTS / "study_size.json", {"rounds": N_ROUNDS, "rows": rows})
    draw(times, RESULTS / "study_size.png")


if __name__ == "__main__":
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    while job := sys.stdin.readline():
        {SIDES[0]: bare, SIDES[1]: ours}[sys.argv[1]](*json.loads(job))
