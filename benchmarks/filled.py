"""Studies of many trials as a search of the default space leaves them, made without training. Measures nothing."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from pcam_automl.config import StudySettings
from pcam_automl.search.reading import SETTINGS_KEY
from pcam_automl.search.space import SearchSpace, load_space
from pcam_automl.search.storage import quiet_experimental
from pcam_automl.training.engine import RungResult
from pcam_automl.versions import versions

RUNGS = ((2_000, 2_000), (6_000, 6_000), (18_000, 6_000))


def the_space() -> SearchSpace:
    """The default space, from scratch."""
    return load_space("default", pins={"pretrained": False})


def the_settings() -> StudySettings:
    """What such a study remembers."""
    return StudySettings(
        data="data", pack="pack", pack_hash="0" * 64, split_hash="1" * 64, seed=0, holdout=0.0, weights="none",
        start={}, space=the_space().to_yaml(), pins={"pretrained": False}, sampler="tpe", pruner="asha", rungs=RUNGS,
        n_score=2_000, cap_s=300.0, plan={"device": "cpu", "images_per_s": {}, "dropped": {}}, versions=versions(),
    )  # fmt: skip


def make_trials(n: int, seed: int = 0) -> list[FrozenTrial]:
    """``n`` trials with every attribute that the objective writes: of ten 6 are pruned, 3 complete, 1 failed."""
    rng, space, known = np.random.default_rng(seed), the_space(), versions()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    defaults = {"epochs": None, "seed": 0, "pretrained": False}
    made = []
    for number in range(n):
        trial = study.ask()
        recipe = space.suggest(trial, defaults)
        params, distributions = dict(trial.params), dict(trial.distributions)
        study.tell(trial, 0.0)
        if number % 100 == 0:  # else the helper study's own list slows every ask
            study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed + number + 1))
        auc = float(0.9 - 0.05 * abs(np.log10(params["lr"]) + 3) + 0.03 * rng.random())
        kind = rng.choice(["pruned", "complete", "failed"], p=[0.6, 0.3, 0.1])
        n_rungs = {"pruned": 1 + int(rng.random() < 0.3), "complete": 3, "failed": 1}[kind]
        results = [
            RungResult(i, v, s, auc + 0.01 * i, 0.4, 0.5, 20.0 * (i + 1), 210.0, 1e-3)
            for i, (v, s) in enumerate(RUNGS[:n_rungs])
        ]
        state = {"pruned": TrialState.PRUNED, "complete": TrialState.COMPLETE, "failed": TrialState.FAIL}[kind]
        attrs: dict[str, Any] = {
            "slot": number, "lineage": str(number), "split_hash": "1" * 64, "device": "cpu (two cores)",
            "versions": known, "recipe": recipe.model_dump_json(),
            "compute": {"device": "cpu", "precision": "bf16", "channels_last": True, "step_s": 0.11},
            "views_share": 1.0, "n_parameters": 4_920_000, "rungs": [asdict(result) for result in results],
            "images_per_s": 210.0, "micro_batch": recipe.batch_size,
            "reason": {"pruned": f"pruned at rung {n_rungs} of 3", "complete": "complete",
                       "failed": "error: OSError: no space left"}[kind],
            "seconds": round(60.0 * n_rungs * float(rng.random()), 3), "peak_memory_bytes": 900_000_000,
        }  # fmt: skip
        made.append(
            create_trial(
                state=state,
                value=results[-1].auc if kind == "complete" else None,
                params=params,
                distributions=distributions,
                user_attrs=attrs,
                intermediate_values={result.views: float(result.auc or 0.0) for result in results},
            )
        )
    return made


@quiet_experimental()
def create_study(storage: optuna.storages.BaseStorage, name: str, trials: list[FrozenTrial]) -> optuna.Study:
    """A study of that name with these trials and the settings of :func:`the_settings`."""
    study = optuna.create_study(study_name=name, storage=storage, direction="maximize")
    study.set_user_attr(SETTINGS_KEY, json.dumps(the_settings().model_dump(mode="json")))
    study.add_trials(trials)
    return study
