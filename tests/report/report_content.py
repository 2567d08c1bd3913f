"""Tiny contents for the report's tests: an easy pack, random scores, a training of three epochs, a study of six trials."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import optuna

from pcam_automl.bundle import ModelBundle
from pcam_automl.data.splits import make_split
from pcam_automl.data.store import PatchStore, open_store
from pcam_automl.models.factory import Normalisation, build_network
from pcam_automl.models.weights import Weights
from pcam_automl.recipe import Recipe
from pcam_automl.report.content import ReportContent
from pcam_automl.scores import Scores
from pcam_automl.training.engine import RungResult

RECIPE = Recipe(backbone="test_resnet", crop_size=64)


def scores_of(store: PatchStore, *, seed: int = 0) -> Scores:
    """Every development patch with a probability that leans towards its label."""
    rows = store.development_rows()
    label = np.asarray(store.label)[rows].astype(np.int64)
    noise = np.random.default_rng(seed).uniform(-0.45, 0.45, len(rows))
    return Scores(rows, label, (0.5 + 0.2 * (2 * label - 1) + noise).clip(0.0, 1.0), "validation fold 0")


def epochs_of(n: int = 3) -> tuple[RungResult, ...]:
    return tuple(
        RungResult(i, 100 * (i + 1), 100, 0.6 + 0.1 * i, 0.7 - 0.1 * i, 0.69 - 0.12 * i, 2.5, 40.0, 1e-3 / (i + 1))
        for i in range(n)
    )


def bundle_of(recipe: Recipe = RECIPE) -> ModelBundle:
    network = build_network(recipe, Weights("none"), seed=0)
    return ModelBundle(recipe, Normalisation((0.5,) * 3, (0.5,) * 3), network.state_dict(), {}, {"device": "cpu"})


def study_of(storage: str | None = None) -> optuna.Study:
    """Six trials, one of them pruned."""
    study = optuna.create_study(study_name="tiny", storage=storage, direction="maximize")

    def objective(trial: optuna.Trial) -> float:
        crop = trial.suggest_categorical("crop_size", [32, 64])
        lr = trial.suggest_float("lr", 1e-4, 1e-2, log=True)
        name = trial.suggest_categorical("backbone", ["test_resnet", "test_vit"])
        trial.set_user_attr("recipe", json.dumps({"crop_size": crop, "backbone": name}))
        trial.report(0.5 + 10 * lr, step=1)
        if trial.number == 3:
            raise optuna.TrialPruned
        return 0.7 + 0.001 * crop + 10 * lr

    study.sampler = optuna.samplers.RandomSampler(seed=0)
    for name, crop in (("test_resnet", 32), ("test_vit", 64)):
        study.enqueue_trial({"backbone": name, "crop_size": crop})
    study.optimize(objective, n_trials=6)
    return study


def full_content(pack: Path) -> ReportContent:
    """Everything but strips and stages."""
    store = open_store(pack)
    return ReportContent(
        title="A tiny report",
        store=store,
        split=make_split(store),
        bundle=bundle_of(),
        epochs=epochs_of(),
        scores=scores_of(store),
        study=study_of(),
        reproduce=("pcam-automl train default",),
    )
