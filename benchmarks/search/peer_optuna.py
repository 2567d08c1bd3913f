"""Plain Optuna: TPE and MedianPruner over a DataLoader objective, random 80/20; the best settings trained again on all.

Half of the time searches. Trials have as many epochs as let eight of them fit by the speed of the first network, so that a
search within minutes is still a search.
"""

from __future__ import annotations

import time
from typing import Any

import optuna
import torch

from benchmarks.search.peer import N_CORES, load_images, read_task, write_answer
from benchmarks.search.peer_training import (
    MOST_EPOCHS,
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


def main() -> None:
    """Search, retrain, predict."""
    task = read_task()
    torch.set_num_threads(N_CORES)
    images = load_images(task.data)
    rows, valid = random_split(images.label, task.seed)
    held = (images.train[valid], images.label[valid])
    first = {"backbone": task.backbones[0], "crop": 96, "batch_size": 64}
    rate = images_per_s(first)
    search_until = time.time() + SEARCH_SHARE * task.left_s
    n_epochs = min(MOST_EPOCHS, (search_until - time.time()) * rate / len(rows) / N_TRIALS_PLANNED)
    rates: dict[int, float] = {}

    def objective(trial: optuna.Trial) -> float:
        settings, best = suggest(trial, task.backbones), [0.0]

        def report(auc: float, number: int) -> None:
            best[0] = auc
            trial.report(auc, number)
            if trial.should_prune():
                raise optuna.TrialPruned

        _, rates[trial.number] = train(
            settings,
            images.train[rows],
            images.label[rows],
            weights=task.weights,
            n_epochs=n_epochs,
            until=search_until,
            seed=task.seed,
            n_workers=N_WORKERS,
            valid=held,
            report=report,
        )
        if best[0] == 0.0:
            raise optuna.TrialPruned  # cut off before its first validation
        return best[0]

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=task.seed, n_startup_trials=5),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=1),
    )
    study.optimize(objective, timeout=max(0.0, search_until - time.time()))
    complete = [t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    params: dict[str, Any] = study.best_params if complete else default_settings(task.backbones)
    rate = rates.get(study.best_trial.number, rate) if complete else rate
    n_final, n_views, seconds = final_plan(task.left_s, rate, len(images.label), len(images.test))
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
        "trials": len(study.trials),
        "complete": len(complete),
        "trial_epochs": round(n_epochs, 2),
        "final_epochs": round(n_final, 2),
        "views": n_views,
        "params": params,
    }
    printed = float(study.best_value) if complete else None
    write_answer(task, images.test_ids, probs, printed_auc=printed, details=details, package="optuna")


if __name__ == "__main__":
    main()
