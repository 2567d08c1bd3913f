"""Many workers over one study of trials that take no time: no number lost or doubled; and how close a sleep comes to ideal.

    python -m benchmarks.soak instant                            # 8 workers x 500 trials on SQLite
    python -m benchmarks.soak instant --storage postgresql       # also 1-second trials: 8 workers against one

Every worker is the search's own, with the training taken out: it claims, asks, suggests, reports three rungs, tells. Asked:
0 lost or doubled numbers, 0 lock errors; with trials that sleep for a second at least 90 % of 8 times one worker's rate.
"""

from __future__ import annotations

import collections
import multiprocessing
import time
import traceback
from typing import Any

import optuna
from optuna.trial import Trial, TrialState

from benchmarks.settings import write_result
from benchmarks.soak.common import OUT, PRELOADED, arguments, tiny_study
from pcam_automl.search.reading import n_finished_of
from pcam_automl.search.retrying_storage import report, set_user_attrs
from pcam_automl.search.slots import Slots
from pcam_automl.search.storage import engine_of
from pcam_automl.search.study import open_study


def work(url: str, name: str, total: int, sleep_s: float, start: Any, out: Any) -> None:
    """A worker process."""
    import torch

    from pcam_automl.search.objective import Objective
    from pcam_automl.search.turns import Limits
    from pcam_automl.search.worker import run_worker

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        torch.set_num_threads(1)
        opened = open_study(name, url)

        class Ready(Objective):
            """Results without training."""

            def _train(self, trial: Trial, lineage: str) -> float:
                self.opened.space.suggest(trial, {**self.opened.start.model_dump(), "epochs": None, "seed": 0})
                set_user_attrs(trial, recipe="{}", compute={})
                time.sleep(sleep_s)
                for views, _ in self.opened.settings.rungs:
                    report(trial, 0.5 + trial.number / 1e6, step=views)
                return 0.5 + trial.number / 1e6

            def _release(self) -> None:
                """Nothing to give back."""

        objective = Ready(opened, torch.device("cpu"))
        start.wait(300)
        end = run_worker(objective, Limits(total))
        out.put((end.n_finished, None))
    except Exception:  # noqa: BLE001 - told to the parent, which fails
        start.abort()
        out.put((0, traceback.format_exc()))


def run(kind: str, n_workers: int, total: int, sleep_s: float) -> dict[str, Any]:
    """A fresh study; seconds from the common start to the last end."""
    with tiny_study(kind, views=96, n_workers=1) as opened:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        start, out = context.Barrier(n_workers + 1), context.Queue()
        workers = [
            context.Process(target=work, args=(opened.url, opened.name, total, sleep_s, start, out))
            for _ in range(n_workers)
        ]
        for worker in workers:
            worker.start()
        start.wait(300)
        began = time.monotonic()
        said = [out.get(timeout=900) for _ in workers]
        seconds = time.monotonic() - began
        for worker in workers:
            worker.join()
        trials = opened.study.get_trials(deepcopy=False)
        numbers = collections.Counter(
            trial.user_attrs.get("slot") for trial in trials if trial.state == TrialState.COMPLETE
        )
        return {
            "workers": n_workers,
            "seconds": round(seconds, 2),
            "trials_per_s": round(total / seconds, 2),
            "finished": n_finished_of(opened.study),
            "doubled_slots": sum(n > 1 for n in numbers.values()),
            "lost_slots": total - len(numbers),
            "failed_rows": sum(trial.state == TrialState.FAIL for trial in trials),
            "slots": Slots(engine_of(opened.study), opened.name).counts(),
            "errors": [text.strip().splitlines()[-1] for _, text in said if text],
        }


def main() -> None:
    """Run, print, write ``results/soak/instant_<storage>.json``."""
    asked = arguments(workers=8, trials=500, sleepers=240)
    runs = {"instant": run(asked.storage, asked.workers, asked.trials, 0.0)}
    if asked.storage == "postgresql":
        runs["1 s, one worker"] = run(asked.storage, 1, asked.sleepers // asked.workers, 1.0)
        runs["1 s, all workers"] = run(asked.storage, asked.workers, asked.sleepers, 1.0)
    for name, found in runs.items():
        print(f"  {name:<18} {found}")
    instant = runs["instant"]
    passed = instant["finished"] == asked.trials and not (
        instant["doubled_slots"] or instant["lost_slots"] or instant["failed_rows"] or instant["errors"]
    )
    share = None
    if "1 s, all workers" in runs:
        share = runs["1 s, all workers"]["trials_per_s"] / asked.workers / runs["1 s, one worker"]["trials_per_s"]
        print(
            f"  {share:.0%} of the ideal speed-up, asked 90 %; of trials of exactly a second {runs['1 s, all workers']['trials_per_s'] / asked.workers:.0%}"
        )
    passed = passed and (share is None or share >= 0.9)
    print(f"instant ({asked.storage}): {'passed' if passed else 'FAILED'}")
    write_result(
        OUT / f"instant_{asked.storage}.json",
        {"asked": vars(asked), "runs": runs, "share_of_ideal": share, "passed": passed},
    )
    if not passed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
