"""Ray Tune: ASHA and OptunaSearch, a trial a core; the best settings trained again on all patches with all cores.

The training, its space and the split are those of plain Optuna (peer_training.py); half of the time searches.
"""

from __future__ import annotations

import functools
import os
import time
from typing import Any

import numpy as np
import ray
import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from benchmarks.search.peer import N_CORES, load_images, read_task, write_answer
from benchmarks.search.peer_training import (
    LOADED_SHARE,
    MOST_EPOCHS,
    N_REPORTS,
    N_TRIALS_PLANNED,
    default_settings,
    final_plan,
    images_per_s,
    predict,
    random_split,
    suggest,
    train,
)

SEARCH_SHARE = 0.5
N_WORKERS = 2
MOST_TRIALS = 1_000


def trainable(
    config: dict[str, Any],
    images: torch.Tensor,
    label: np.ndarray,
    held: tuple[torch.Tensor, np.ndarray],
    words: dict[str, Any],
) -> None:
    """One trial in one of Ray's processes, on one core, its loader inside it."""
    torch.set_num_threads(1)
    train(
        config,
        images,
        label,
        valid=held,
        n_workers=0,
        report=lambda auc, number: tune.report({"auc": auc}),
        **words,
    )


def space(trial: Any, backbones: tuple[str, ...]) -> None:
    """OptunaSearch reads what was suggested from the trial, and takes no answer but constants."""
    suggest(trial, backbones)


def main() -> None:
    """Search, retrain, predict."""
    # A trial that the end of the search's time stops before its first validation has no AUC, which ends the whole tuning
    # otherwise; Ray's own message names this switch.
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
    task = read_task()
    images = load_images(task.data)
    rows, valid = random_split(images.label, task.seed)
    ray.init(num_cpus=N_CORES, include_dashboard=False, log_to_driver=False, logging_level="error")
    torch.set_num_threads(N_CORES)
    first = {"backbone": task.backbones[0], "crop": 96, "batch_size": 64}
    rate = images_per_s(first)
    search_until = time.time() + SEARCH_SHARE * task.left_s
    n_epochs = min(MOST_EPOCHS, (search_until - time.time()) * rate / len(rows) / N_TRIALS_PLANNED)
    words = {"weights": task.weights, "n_epochs": n_epochs, "until": search_until, "seed": task.seed}
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(
                trainable,
                images=images.train[rows],
                label=images.label[rows],
                held=(images.train[valid], images.label[valid]),
                words=words,
            ),
            {"cpu": 1},
        ),
        tune_config=tune.TuneConfig(
            metric="auc",
            mode="max",
            num_samples=MOST_TRIALS,
            time_budget_s=max(1.0, search_until - time.time()),
            max_concurrent_trials=N_CORES,
            # Of a space that is a function it does not take them from the TuneConfig.
            search_alg=OptunaSearch(
                functools.partial(space, backbones=task.backbones), metric="auc", mode="max", seed=task.seed
            ),  # Ray pickles the searcher: no lambda
            scheduler=ASHAScheduler(max_t=N_REPORTS, grace_period=1, reduction_factor=3),
        ),
        run_config=tune.RunConfig(storage_path=str(task.out / "ray"), verbose=0),
    )
    results = tuner.fit()
    good = [r for r in results if r.metrics and "auc" in r.metrics]
    best = max(good, key=lambda r: float(r.metrics["auc"])) if good else None
    params: dict[str, Any] = dict(best.config) if best is not None and best.config else default_settings(task.backbones)
    ray.shutdown()
    rate = images_per_s(params)
    n_final, n_views, seconds = final_plan(task.left_s, LOADED_SHARE * rate, len(images.label), len(images.test))
    network, _ = train(
        params,
        images.train,
        images.label,
        weights=task.weights,
        n_epochs=n_final,
        until=time.time() + seconds,
        seed=task.seed,
        n_workers=N_WORKERS,
    )
    probs = predict(network, images.test, params, n_views=n_views)
    details = {
        "trials": len(results),
        "reported": len(good),
        "trial_epochs": round(n_epochs, 2),
        "final_epochs": round(n_final, 2),
        "views": n_views,
        "params": params,
    }
    printed = float(best.metrics["auc"]) if best is not None and best.metrics else None
    write_answer(task, images.test_ids, probs, printed_auc=printed, details=details, package="ray")


if __name__ == "__main__":
    main()
