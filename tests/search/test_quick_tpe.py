"""Our TPE proposes what Optuna's proposes, from the same numbers."""

from __future__ import annotations

import math

import numpy as np
import optuna
import pytest
from optuna.samplers import TPESampler
from optuna.search_space.group_decomposed import _GroupDecomposedSearchSpace

from pcam_automl.search.quick_tpe import QuickTPE, Remembered
from pcam_automl.search.sampler import build_sampler
from pcam_automl.search.storage import quiet_experimental


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


@pytest.mark.parametrize("objective", [one_group, conditional])
def test_a_sampler_that_goes_on_to_another_study_forgets_the_first(objective: object) -> None:
    """Trials of two studies in memory have the same ids."""
    found = []
    kept = build_sampler("tpe", 3)
    for sampler in (kept, kept, build_sampler("tpe", 3)):
        study = optuna.create_study(sampler=sampler)
        for number in range(20):
            study.optimize(objective if len(found) else one_group, n_trials=1)  # type: ignore[arg-type]
            assert study.trials[-1].number == number
        found.append([trial.params for trial in study.trials])
    assert found[1] == found[2]
