"""How far a replayed trial may be off: trials of a study without ``--deterministic``, replayed under the same conditions, with
another number of threads, and in another precision and layout, which is as far as another machine's kernels can be.

`PCAM_BENCH_DATA` (else a synthetic set of `PCAM_BENCH_PATCHES`, 2,000), `PCAM_BENCH_TRIALS` (3), `PCAM_BENCH_VIEWS` (1,800).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import optuna
import torch

from benchmarks.common import device_here, machine
from benchmarks.settings import RESULTS, setting, write_result
from pcam_automl.data.synthetic import write_synthetic
from pcam_automl.search.create import create_or_open_study
from pcam_automl.search.objective import Objective
from pcam_automl.search.replay import BAND, StoredTrial, read_trial, replay
from pcam_automl.search.study import Asked
from pcam_automl.search.turns import Limits
from pcam_automl.search.worker import run_worker
from pcam_automl.training.compute import use_device


def conditions(stored: StoredTrial) -> Iterator[tuple[str, StoredTrial]]:
    """Name and the trial as it is replayed: on a CPU the threads stand in its conditions."""
    yield "the same", stored
    threads = stored.conditions[0].threads or 1
    other = 1 if threads > 1 else 2
    yield (
        f"{other} threads in place of {threads}",
        replace(stored, conditions=tuple(replace(one, threads=other) for one in stored.conditions)),
    )
    plain = replace(stored.compute, precision="fp32", channels_last=False, routed=False)
    if (plain.precision, plain.channels_last, plain.routed) != (
        stored.compute.precision,
        stored.compute.channels_last,
        stored.compute.routed,
    ):
        yield "fp32, default layout", replace(stored, compute=plain)


def replays(data: Path, folder: Path, *, n_trials: int, views: int, device: torch.device) -> list[dict[str, object]]:
    """A line for each trial and condition: differences of each rung's AUC, rung by rung."""
    asked = Asked(data=data, space="quick", weights="none", views=views, pruner="none", device=str(device))
    opened = create_or_open_study("replay", f"sqlite:///{folder / 'replay.db'}", asked, say=print)
    use_device(str(device))
    run_worker(Objective(opened, device), Limits(n_trials))
    lines = []
    for trial in opened.study.get_trials(deepcopy=False):
        stored = read_trial([trial], trial.number, opened.rungs, opened.settings.split_hash)
        for name, changed in conditions(stored):
            found = replay(opened, changed, device)
            apart = [abs((a.auc or 0.0) - (b.auc or 0.0)) for a, b in zip(stored.rungs, found.rungs, strict=True)]
            line = {"trial": trial.number, "backbone": stored.recipe.backbone, "auc": stored.rungs[-1].auc}
            lines.append(line | {"conditions": name, "verdict": found.verdict, "apart": apart})
            print(
                f"  trial {trial.number} {stored.recipe.backbone:<20} AUC {stored.rungs[-1].auc:.4f}  {name:<26} {found.verdict:<16} "
                + "  ".join(f"{one:.5f}" for one in apart),
                flush=True,
            )
    return lines


def main() -> None:
    """Measure and write `results/replay.json`."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    device = device_here()
    n_trials, views = setting("TRIALS", 3), setting("VIEWS", 1_800)
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        given = os.environ.get("PCAM_BENCH_DATA")
        data = Path(given) if given else folder / "raw"
        if not given:
            write_synthetic(data, n_patches=setting("PATCHES", 2_000), n_slides=24, seed=0)
        print(f"replay: {n_trials} trials of {views:,} views on {data.name}, differences of the rungs' AUC")
        lines = replays(data, folder / "studies", n_trials=n_trials, views=views, device=device)
    write_result(
        RESULTS / "replay.json",
        {"machine": machine(device), "data": data.name, "views": views, "band": BAND, "replays": lines},
    )
