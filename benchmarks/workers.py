"""Workers: finished trials a minute of `search --workers N` on one machine, N = 1 and 2.

    python -m benchmarks workers             # 12 trials of 3,000 views, space quick, no pruning, 5 rounds
    PCAM_BENCH_MOST_WORKERS=4 PCAM_BENCH_TRIALS=48 PCAM_BENCH_DEVICE=cuda:0 python -m benchmarks workers

Each search is a fresh process and a fresh study on a synthetic pack that is made once; the numbers of workers take turns
within a round. Every worker count runs trials of the same random recipes. Shown are the wall seconds of the whole command,
and trials a minute from the first trial's begin to the last one's end, which leaves out imports and the workers' start.
Writes results/workers.json. No target is set: on a CPU the workers share its cores.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.overhead import arguments_for


def run_search(pack: Path, *, n_workers: int, trials: int, views: int, device: str) -> dict[str, float]:
    """One search in a fresh process: ``wall_s`` of the command, ``trials_s`` from the first begin to the last end."""
    import optuna

    with tempfile.TemporaryDirectory() as folder:
        line = arguments_for(pack, Path(folder), trials=trials, views=views, device=device)
        line += ["--sampler", "random", "--pruner", "none", "--workers", str(n_workers)]
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "pcam_automl", "search", *line], check=True, stdout=subprocess.DEVNULL)
        wall_s = time.perf_counter() - began
        url = f"sqlite:///{Path(folder) / 'study.db'}"
        (name,) = optuna.get_all_study_names(url)
        rows = optuna.load_study(study_name=name, storage=url).get_trials(deepcopy=False)
    ends = [row.datetime_complete for row in rows if row.datetime_complete is not None]
    begins = [row.datetime_start for row in rows if row.datetime_start is not None]
    return {"wall_s": wall_s, "trials_s": (max(ends) - min(begins)).total_seconds()}


def report(rounds: list[dict[int, dict[str, float]]], trials: int) -> None:
    """Print the table."""
    from benchmarks.common import ratios, spread

    print(f"  {'workers':>7}  {'wall, s':>24}  {'trials a minute':>24}  against one worker")
    alone = [found[1]["trials_s"] for found in rounds]
    for n in rounds[0]:
        seconds = [found[n]["trials_s"] for found in rounds]
        rate = spread([60.0 * trials / s for s in seconds], 1)
        print(f"  {n:>7}  {spread([found[n]['wall_s'] for found in rounds], 1):>24}  {rate:>24}  ", end="")
        print(f"{statistics.median(ratios(alone, seconds)):.2f}x")


def main() -> None:
    """Measure, print, write ``benchmarks/results/workers.json``."""
    from benchmarks.common import device_here, machine, synthetic_store
    from benchmarks.settings import RESULTS, setting, write_result

    device = device_here()
    trials, views, n_rounds = setting("TRIALS", 12), setting("VIEWS", 3000), setting("ROUNDS", 5)
    counts = range(1, setting("MOST_WORKERS", 2) + 1)
    print(f"workers: {trials} trials of {views:,} views, {n_rounds} rounds; {machine(device)}", flush=True)
    rounds: list[dict[int, dict[str, float]]] = []
    with synthetic_store(setting("PATCHES", 4000)) as store:
        for _ in range(n_rounds):
            options: dict[str, Any] = {"trials": trials, "views": views, "device": str(device)}
            rounds.append({n: run_search(store.root, n_workers=n, **options) for n in counts})
    report(rounds, trials)
    write_result(
        RESULTS / ("workers.json" if device.type == "cpu" else f"workers_{device.type}.json"),
        {"trials": trials, "views": views, "machine": machine(device), "rounds": rounds},
    )


if __name__ == "__main__":
    main()
