"""Our TPE proposes what Optuna's proposes, from the same numbers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.samplers import TPESampler
from optuna.search_space.group_decomposed import _GroupDecomposedSearchSpace

from pcam_automl.search.quick_tpe import QuickTPE, Remembered
from pcam_automl.search.retrying_storage import write_now
from pcam_automl.search.sampler import build_sampler
from pcam_automl.search.storage import open_storage, quiet_experimental, rdb_of
from pcam_automl.search.trial_reader import read_trial
from pcam_automl.search.trial_writes import TPE_SHARED


def one_group(trial: optuna.Trial) -> float:
    trial.suggest_categorical("backbone", ["a", "b", "c"])
    crop = trial.suggest_int("crop_size", 32, 96, step=16)
    return -abs(math.log10(trial.suggest_float("lr", 1e-4, 1e-2, log=True)) + 3) - crop / 100


def conditional(trial: optuna.Trial) -> float:
    if trial.suggest_categorical("optimizer", ["adam", "sgd"]) == "sgd":
        trial.suggest_float("momentum", 0.0, 1.0)
    if trial.suggest_float("lr", 1e-4, 1e-2, log=True) > 1e-3:
        trial.suggest_int("warm", 1, 9)
        raise optuna.TrialPruned
    return trial.params["lr"]


@quiet_experimental()
def trials_of(remembered: Remembered | None, objective: object, n: int = 25) -> list[dict[str, object]]:
    """Parameters of ``n`` trials, each by a sampler of its own, as :class:`PerTrialSampler` makes them; None is Optuna's."""
    study = optuna.create_study()
    for number in range(n):
        options = {"seed": number, "n_startup_trials": 5, "group": True}
        study.sampler = TPESampler(**options) if remembered is None else QuickTPE(remembered=remembered, **options)
        study.optimize(objective, n_trials=1)  # type: ignore[arg-type]
    return [trial.params for trial in study.trials]


def test_with_one_group_every_proposal_is_optunas_draw_by_draw() -> None:
    assert trials_of(Remembered(), one_group) == trials_of(None, one_group)


def test_groups_and_numbers_of_a_conditional_space_are_optunas_own() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    remembered = Remembered()
    with quiet_experimental():
        ours, theirs = QuickTPE(remembered=remembered, group=True), TPESampler(group=True)
    for _ in range(8):
        study.optimize(conditional, n_trials=5)
        trials = study.get_trials(deepcopy=False)
        wanted = _GroupDecomposedSearchSpace(include_pruned=True).calculate(study).search_spaces
        groups = remembered.calculate(study).search_spaces
        assert {frozenset(group) for group in groups} == {frozenset(group) for group in wanted}
        for group in groups:
            held, own = ours._get_internal_repr(trials, group, study), theirs._get_internal_repr(trials, group, study)
            assert held.keys() == own.keys()
            for name in group:
                np.testing.assert_array_equal(held[name], own[name])
                assert held[name].dtype == own[name].dtype


def test_the_order_of_groups_does_not_depend_on_what_was_seen_first() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    early, late = Remembered(), Remembered()
    for _ in range(10):
        study.optimize(conditional, n_trials=1)
        early.calculate(study)
    orders = [[sorted(group) for group in one.calculate(study).search_spaces] for one in (early, late)]
    assert orders[0] == orders[1]


def mirrored(trial: optuna.Trial) -> float:
    """The names of :func:`one_group`, other values."""
    return -one_group(trial) + 0.1 * trial.params["crop_size"]


@pytest.mark.parametrize("objective", [mirrored, conditional])
def test_a_sampler_that_goes_on_to_another_study_forgets_the_first(objective: object) -> None:
    """Trials of two studies in memory have the same ids."""

    def trials_by(sampler: optuna.samplers.BaseSampler, wanted: object) -> list[dict[str, object]]:
        study = optuna.create_study(sampler=sampler)
        study.optimize(wanted, n_trials=20)  # type: ignore[arg-type]
        return [trial.params for trial in study.trials]

    kept = build_sampler("tpe", 3)
    trials_by(kept, one_group)
    kept.seed = 4
    assert trials_by(kept, objective) == trials_by(build_sampler("tpe", 4), objective)


def test_what_a_trial_is_about_to_try_is_seen_by_others_before_it_has_all_its_parameters(tmp_path: Path) -> None:
    study = optuna.create_study(storage=open_storage(f"sqlite:///{tmp_path}/s.db"), sampler=build_sampler("tpe", 0))
    seen = []

    def objective(trial: optuna.Trial) -> float:
        value = one_group(trial)
        write_now(trial)  # as the objective does before it times a network
        with rdb_of(study).engine.connect() as connection:
            seen.append(read_trial(connection, trial._trial_id))
        return value

    study.optimize(objective, n_trials=14)
    assert [list(trial.params) for trial in seen] == [["backbone", "crop_size", "lr"]] * 14
    told = [any(key.startswith(TPE_SHARED) for key in trial.system_attrs) for trial in seen]
    assert told == [False] * 10 + [True] * 4  # from the end of the random start on
    rdb_of(study).engine.dispose()
