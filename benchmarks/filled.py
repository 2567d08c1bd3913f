"""Studies of many trials as a search of the default space leaves them, made without training. Measures nothing."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import numpy as np
import optuna
import sqlalchemy as sa
from optuna.distributions import distribution_to_json
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState, create_trial

from pcam_automl.config import StudySettings
from pcam_automl.search.lineages import FINISHED
from pcam_automl.search.reading import SETTINGS_KEY
from pcam_automl.search.slots import TABLE as SLOTS
from pcam_automl.search.slots import Slots
from pcam_automl.search.space import SearchSpace, load_space
from pcam_automl.training.engine import RungResult
from pcam_automl.versions import versions

N_DIFFERENT = 1_000
RUNGS = ((2_000, 2_000), (6_000, 6_000), (18_000, 6_000))


def the_space() -> SearchSpace:
    """The default space, from scratch."""
    return load_space("default", pins={"pretrained": False})


def the_speeds() -> dict[str, float]:
    """Training images a second of its backbones, 80 to 600: the slow ones are too slow at large inputs."""
    names = the_space().choices("backbone")
    return {name: 80.0 + 520.0 * place / len(names) for place, name in enumerate(names)}


def the_settings() -> StudySettings:
    """What such a study remembers."""
    return StudySettings(
        data="data", pack="pack", pack_hash="0" * 64, split_hash="1" * 64, seed=0, holdout=0.0, weights="none",
        start={}, space=the_space().to_yaml(), pins={"pretrained": False}, sampler="tpe", pruner="asha", rungs=RUNGS,
        n_score=2_000, cap_s=300.0, versions=versions(),
        plan={"device": "cpu", "images_per_s": the_speeds(), "planned_px": 64, "dropped": {}},
    )  # fmt: skip


def make_trials(n: int, seed: int = 0, space: SearchSpace | None = None) -> list[FrozenTrial]:
    """``n`` trials of the space (the default one, from scratch) with every attribute that the objective writes: of ten 6 are pruned, 3 complete, 1 failed.

    From N_DIFFERENT on they repeat themselves, with other values.
    """
    rng, space, known = np.random.default_rng(seed), space or the_space(), versions()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    defaults = {"epochs": None, "seed": 0, "pretrained": False}
    made = []
    for number in range(min(n, N_DIFFERENT)):
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
        one = create_trial(
            state=state,
            value=results[-1].auc if kind == "complete" else None,
            params=params,
            distributions=distributions,
            user_attrs=attrs,
            intermediate_values={result.views: float(result.auc or 0.0) for result in results},
        )
        one.number = number
        made.append(one)
    for number in range(len(made), n):
        again = copy.copy(made[number % N_DIFFERENT])
        again.number = number
        again.user_attrs = {**again.user_attrs, "slot": number, "lineage": str(number)}
        if again.value is not None:
            again.value += 0.01 * float(rng.random())
        made.append(again)
    return made


def create_study(storage: RDBStorage, name: str, trials: list[FrozenTrial]) -> optuna.Study:
    """A study with these trials, the settings of :func:`the_settings` and a done slot for every finished trial."""
    study = optuna.create_study(study_name=name, storage=storage, direction="maximize")
    study.set_user_attr(SETTINGS_KEY, json.dumps(the_settings().model_dump(mode="json")))
    add_trials(study, storage, trials)
    return study


def add_trials(study: optuna.Study, storage: RDBStorage, trials: list[FrozenTrial]) -> None:
    """Put trials, by the numbers that they have, into a study whose slots are those of as many finished trials.

    Rows go in by the table: ``study.add_trials`` takes 25 ms a trial, four minutes for 10,000.
    """
    name, held = study.study_name, Slots(storage.engine, study.study_name).all()
    done = [trial.number for trial in trials if trial.state in FINISHED]
    slots = [
        {"study_name": name, "slot": slot, "state": "done", "lineage": str(number), "trial_number": number,
         "owner": None, "attempts": 1, "updated_at": 1_800_000_000}
        for slot, number in enumerate(done, len(held))
    ]  # fmt: skip
    now = datetime.now(UTC).replace(tzinfo=None)
    with storage.engine.begin() as connection:

        def insert(table: sa.Table, rows: list[dict[str, Any]]) -> None:
            if rows:
                connection.execute(sa.insert(table), rows)

        own = models.TrialModel.__table__
        insert(own, [
            {"number": t.number, "study_id": study._study_id, "state": t.state, "datetime_start": now, "datetime_complete": now}
            for t in trials
        ])  # fmt: skip
        rows = connection.execute(sa.select(own.c.number, own.c.trial_id).where(own.c.study_id == study._study_id))
        ids = dict(tuple(row) for row in rows)
        insert(models.TrialParamModel.__table__, [
            {"trial_id": ids[t.number], "param_name": key, "param_value": dist.to_internal_repr(t.params[key]),
             "distribution_json": distribution_to_json(dist)}
            for t in trials for key, dist in t.distributions.items()
        ])  # fmt: skip
        insert(models.TrialUserAttributeModel.__table__, [
            {"trial_id": ids[t.number], "key": key, "value_json": json.dumps(value)}
            for t in trials for key, value in t.user_attrs.items()
        ])  # fmt: skip
        insert(models.TrialIntermediateValueModel.__table__, [
            {"trial_id": ids[t.number], "step": step, "intermediate_value": value, "intermediate_value_type": "FINITE"}
            for t in trials for step, value in t.intermediate_values.items()
        ])  # fmt: skip
        insert(models.TrialValueModel.__table__, [
            {"trial_id": ids[t.number], "objective": 0, "value": t.value, "value_type": "FINITE"}
            for t in trials if t.value is not None
        ])  # fmt: skip
        insert(SLOTS, slots)
