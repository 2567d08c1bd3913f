"""Overhead: the wall time of a 20-trial `search` that is spent outside training steps and evaluation.

    python -m benchmarks overhead            # 20 trials of 3,000 views, space quick, 5 rounds
    PCAM_BENCH_VIEWS=0 PCAM_BENCH_ROUNDS=1 python -m benchmarks overhead   # trials as long as `search` plans them
    PCAM_BENCH_TRIALS=20 PCAM_BENCH_VIEWS=12000 PCAM_BENCH_ROUNDS=5 PCAM_BENCH_DEVICE=cuda:0 python -m benchmarks overhead

Each round is a fresh process and a fresh study on a synthetic pack that is made once. Within it ``Training.train`` and
``Training.score`` are wrapped and timed, and for the table also imports, the speed probes, the building of networks and the
checkpoints; each without what it calls of the others. Imports (torch, timm, optuna, scikit-learn, many of them late) are shown
apart and taken off the wall time. Overhead is what is left besides training and evaluation: claims and samplers, the database,
plans, probes, networks, checkpoints, the clean-up. It is a share: the same seconds weigh less in longer trials (3,000 views take
some three seconds, a trial of ``search`` is planned for up to thirty), so seconds a trial are printed, too; and probes are
remembered, so a second study in the same folder does without most of them. Writes results/overhead.json, for planned trials
results/overhead_planned.json. Target: 5 %.
"""

from __future__ import annotations

import functools
import importlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pcam_automl.waiting import choose_waiting

IMPORTS, TRAIN, SCORE = "imports", "training steps", "evaluation"
WRAPPED = {
    IMPORTS: "importlib._bootstrap:_find_and_load",  # every import of a module that is not there yet comes through it
    TRAIN: "pcam_automl.training.engine:Training.train",
    SCORE: "pcam_automl.training.engine:Training.score",
    "speed probes": "pcam_automl.training.speed:measure_fitting",
    "networks": "pcam_automl.search.objective:start_training",
    "checkpoints": "pcam_automl.training.fit:save",
}
"""Imports first, so that those of the others' modules are counted as well."""


def _timed(call: Callable[..., Any], seconds: dict[str, float], name: str, inner: list[float]) -> Callable[..., Any]:
    """``call``, its seconds added to ``name`` without those of timed calls inside it; other threads are not timed."""

    @functools.wraps(call)
    def timed(*args: Any, **options: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            return call(*args, **options)
        inner.append(0.0)
        began = time.perf_counter()
        try:
            return call(*args, **options)
        finally:
            took = time.perf_counter() - began
            seconds[name] += took - inner.pop()
            if inner:
                inner[-1] += took

    return timed


@contextmanager
def stopwatches() -> Iterator[dict[str, float]]:
    """Seconds inside each of ``WRAPPED`` while the context lasts."""
    seconds: dict[str, float] = dict.fromkeys(WRAPPED, 0.0)
    originals: list[tuple[Any, str, Any]] = []
    inner: list[float] = []
    try:
        for name, place in WRAPPED.items():
            module, _, path = place.partition(":")
            *owners, attribute = path.split(".")
            owner = functools.reduce(getattr, owners, importlib.import_module(module))
            originals.append((owner, attribute, getattr(owner, attribute)))
            setattr(owner, attribute, _timed(getattr(owner, attribute), seconds, name, inner))
        yield seconds
    finally:
        for owner, attribute, original in originals:
            setattr(owner, attribute, original)


def timed_search(arguments: list[str]) -> dict[str, Any]:
    """``pcam-automl search`` in this process: seconds of its parts, and of all but the imports."""
    began = time.perf_counter()
    with stopwatches() as parts:
        from pcam_automl.cli import app

        app(["search", *arguments], standalone_mode=False)
        all_s = time.perf_counter() - began
    return {"wall_s": all_s - parts[IMPORTS], "parts_s": parts}


def arguments_for(pack: Path, folder: Path, *, trials: int, views: int, device: str, space: str = "quick") -> list[str]:
    """The command line of a fresh study in ``folder``; 0 views leave a trial's length to the plan."""
    values = {
        "--trials": trials,
        "--data": pack,
        "--storage": f"sqlite:///{folder / 'study.db'}",
        **({"--views": views} if views else {}),
        "--space": space,
        "--weights": "none",
        "--device": device,
    }
    return [str(part) for pair in values.items() for part in pair]


def overhead_of(found: dict[str, Any]) -> float:
    """Share of the command's wall time outside training steps and evaluation."""
    return 1.0 - (found["parts_s"][TRAIN] + found["parts_s"][SCORE]) / found["wall_s"]


def run_fresh(arguments: list[str]) -> dict[str, Any]:
    """:func:`timed_search` in a fresh process, as the command line would start it."""
    code = (
        "import json, sys; from benchmarks.overhead import timed_search; "
        "found = timed_search(sys.argv[1:]); print('\\n' + json.dumps(found))"
    )
    choose_waiting()  # as `pcam-automl` does
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    return dict(json.loads(run.stdout.splitlines()[-1]))


def report(rounds: list[dict[str, Any]], trials: int) -> None:
    """Print the table."""
    from benchmarks.common import spread

    print(f"  {IMPORTS} {spread([r['parts_s'][IMPORTS] for r in rounds])} s, not counted below")
    print(f"  wall {spread([r['wall_s'] for r in rounds], 1)} s")
    names = [name for name in WRAPPED if name != IMPORTS]
    parts = {name: [r["parts_s"][name] for r in rounds] for name in names}
    parts["all else"] = [r["wall_s"] - sum(r["parts_s"][name] for name in names) for r in rounds]
    for name, values in parts.items():
        shares = [100 * value / r["wall_s"] for value, r in zip(values, rounds, strict=True)]
        print(f"    {name:<15}{spread(values):>26} s {spread(shares, 1):>22} %")
    a_trial = [1e3 * overhead_of(r) * r["wall_s"] / trials for r in rounds]
    print(
        f"  overhead {spread([100 * overhead_of(r) for r in rounds], 1)} % of the wall, {spread(a_trial, 0)} ms a trial"
    )


def main() -> None:
    """Measure, print, write ``benchmarks/results/overhead.json``."""
    from benchmarks.common import device_here, machine, synthetic_store
    from benchmarks.settings import RESULTS, setting, write_result

    device = device_here()
    trials, views, n_rounds = setting("TRIALS", 20), setting("VIEWS", 3000), setting("ROUNDS", 5)
    length = f"{views:,} views" if views else "as many views as planned"
    print(f"overhead: {trials} trials of {length}, {n_rounds} rounds; {machine(device)}", flush=True)
    rounds = []
    with synthetic_store(setting("PATCHES", 4000)) as store:
        for _ in range(n_rounds):
            with tempfile.TemporaryDirectory() as folder:
                line = arguments_for(store.root, Path(folder), trials=trials, views=views, device=str(device))
                rounds.append(run_fresh(line))
    report(rounds, trials)
    planned, at = "" if views else "_planned", "" if device.type == "cpu" else f"_{device.type}"
    write_result(
        RESULTS / f"overhead{planned}{at}.json",
        {
            "trials": trials,
            "views": views,
            "machine": machine(device),
            "overhead": [overhead_of(r) for r in rounds],
            "rounds": rounds,
        },
    )


if __name__ == "__main__":
    main()
