from __future__ import annotations

from typing import Any

import optuna
import pytest

from pcam_automl.errors import RecipeError
from pcam_automl.search.cost import TrialSeconds, ViewsShare
from pcam_automl.search.sampler import N_STARTUP, PerTrialSampler, build_sampler

MODEL_SAMPLERS = ["tpe", "tpe-qmc", "gp", "qmc", "random"]


def conditional(trial: optuna.Trial) -> float:
    """A space with a condition, pruned and complete trials."""
    lr = trial.suggest_float("lr", 1e-4, 1e-2, log=True)
    optimizer = trial.suggest_categorical("optimizer", ["adamw", "sgd"])
    momentum = trial.suggest_float("momentum", 0.8, 0.98) if optimizer == "sgd" else 0.9
    value = -abs(lr - 1e-3) * 100 + momentum
    trial.report(value, 1)
    if trial.number % 3 == 2:
        raise optuna.TrialPruned
    return value


def run(study: optuna.Study, name: str, seed: int, n_trials: int) -> list[dict[str, Any]]:
    """Trials by a sampler built anew, as after a restart."""
    study.sampler = build_sampler(name, seed)
    study.optimize(conditional, n_trials=n_trials)
    return [trial.params for trial in study.trials]


@pytest.mark.parametrize("name", MODEL_SAMPLERS)
def test_same_seed_and_history_give_the_same_trials_however_often_restarted(name: str) -> None:
    whole, parts = optuna.create_study(direction="maximize"), optuna.create_study(direction="maximize")
    n_trials = 9 if name == "gp" else N_STARTUP + 4  # gp starts after 5 complete trials
    for _ in range(n_trials):
        run(parts, name, 7, 1)
    assert run(whole, name, 7, n_trials) == [trial.params for trial in parts.trials]


@pytest.mark.parametrize("name", MODEL_SAMPLERS)
def test_restarted_sampler_does_not_repeat_its_first_trials(name: str) -> None:
    study = optuna.create_study(direction="maximize")
    run(study, name, 7, 3)
    params = run(study, name, 7, 3)
    assert len({p["lr"] for p in params}) == 6


def test_seeds_differ_between_studies_and_trials() -> None:
    seeds = {build_sampler("random", seed).seed_of(number) for seed in range(10) for number in range(100)}
    assert len(seeds) == 1000


@pytest.mark.parametrize("name", MODEL_SAMPLERS)
@pytest.mark.parametrize("n_before", [0, N_STARTUP + 3])
def test_next_trial_takes_the_prescribed_values_and_only_that_trial(name: str, n_before: int) -> None:
    study = optuna.create_study(direction="maximize")
    run(study, name, 1, n_before)
    study.sampler = sampler = build_sampler(name, 1)
    wanted = {"lr": 2e-3, "optimizer": "sgd", "momentum": 0.9}
    sampler.prescribed = dict(wanted)
    study.optimize(conditional, n_trials=2)
    assert study.trials[n_before].params == wanted
    assert study.trials[n_before + 1].params["lr"] != 2e-3
    assert sampler.prescribed == {}


@pytest.mark.parametrize("n_before", [0, N_STARTUP + 3])
def test_prescribed_values_outside_the_space_are_left_to_the_sampler(n_before: int) -> None:
    study = optuna.create_study(direction="maximize")
    run(study, "tpe", 1, n_before)
    study.sampler = sampler = build_sampler("tpe", 1)
    sampler.prescribed = {"lr": 5.0, "optimizer": "lion", "momentum": "fast", "unasked": 3}
    study.optimize(conditional, n_trials=1)
    params = study.trials[-1].params
    assert 1e-4 <= params["lr"] <= 1e-2
    assert params["optimizer"] in ("adamw", "sgd")
    assert "unasked" not in params


def test_prescription_set_inside_the_objective_holds() -> None:
    study = optuna.create_study(direction="maximize", sampler=build_sampler("tpe", 1))
    run(study, "tpe", 1, N_STARTUP + 1)
    sampler = study.sampler

    def objective(trial: optuna.Trial) -> float:
        sampler.prescribed = {"lr": 3e-3}
        return conditional(trial)

    study.optimize(objective, n_trials=1)
    assert study.trials[-1].params["lr"] == 3e-3


def numbers_only(trial: optuna.Trial) -> float:
    return trial.suggest_float("a", 0.0, 1.0) + trial.suggest_float("b", 0.0, 1.0)


def test_sobol_start_covers_the_space_evenly_and_is_followed_by_tpe() -> None:
    study = optuna.create_study(direction="maximize", sampler=build_sampler("tpe-qmc", 3))
    study.optimize(numbers_only, n_trials=N_STARTUP)
    a = [trial.params["a"] for trial in study.trials[1:9]]  # the first knows no dimensions yet
    for quarter in range(4):  # eight scrambled Sobol points in a row: two in each quarter
        assert 1 <= sum(quarter / 4 <= value < (quarter + 1) / 4 for value in a) <= 3
    tpe = optuna.create_study(direction="maximize", sampler=build_sampler("tpe", 3))
    tpe.add_trials(study.trials)
    for one in (study, tpe):
        one.optimize(numbers_only, n_trials=1)
    assert study.trials[-1].params == tpe.trials[-1].params


@pytest.mark.parametrize("name", ["qmc", "tpe-qmc"])
def test_workers_that_ask_at_the_same_moment_get_different_points(name: str) -> None:
    study = optuna.create_study(direction="maximize", sampler=build_sampler(name, 3))
    study.optimize(numbers_only, n_trials=1)
    points = set()
    for _ in range(4):  # each worker has a sampler of its own, and none of the trials is finished
        study.sampler = build_sampler(name, 3)
        points.add(numbers_only(study.ask()))
    assert len(points) == 4
    assert not any("qmc" in key for key in study._storage.get_study_system_attrs(study._study_id))


def test_cmaes_takes_the_numbers_and_tpe_the_rest() -> None:
    pytest.importorskip("cmaes", reason="cmaes is optional: pip install cmaes")
    study = optuna.create_study(direction="maximize")
    run(study, "cmaes", 3, 40)
    late = study.trials[-10:]
    assert any(key.startswith("cma:") for trial in late for key in trial.system_attrs)
    assert sum(trial.params["optimizer"] == "sgd" for trial in late) >= 7  # its momentum adds up to 0.98


def test_failed_trial_ends_its_prescription() -> None:
    study = optuna.create_study(sampler=(sampler := build_sampler("random", 1)))
    sampler.prescribed = {"lr": 3e-3}

    def objective(trial: optuna.Trial) -> float:
        trial.suggest_float("lr", 1e-4, 1e-2)
        raise ArithmeticError

    study.optimize(objective, n_trials=2, catch=(ArithmeticError,))
    assert [trial.params["lr"] == 3e-3 for trial in study.trials] == [True, False]


def test_tpe_learns() -> None:
    study = optuna.create_study(direction="maximize")
    run(study, "tpe", 3, 40)
    late = [abs(trial.params["lr"] - 1e-3) for trial in study.trials[-15:]]
    early = [abs(trial.params["lr"] - 1e-3) for trial in study.trials[:N_STARTUP]]
    assert sorted(late)[7] < sorted(early)[5]


def test_unknown_sampler_bad_seed_and_missing_package_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match=r"sampler must be one of tpe, .*, got 'tpee' \(did you mean 'tpe'\?\)"):
        build_sampler("tpee", 0)
    with pytest.raises(RecipeError, match="seed must be at least 0, got -1"):
        build_sampler("tpe", -1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="sampler cmaes needs cmaes; run: pip install cmaes; or use tpe"):
        build_sampler("cmaes", 0)


CROPS, UPSCALES = (32, 96), [1.0, 1.5, 2.0]
QUICKEST = {"backbone": "small", "crop_size": 32, "upscale": 1.0}


def of_a_size(trial: optuna.Trial) -> float:
    """Larger is better, so that a sampler that may propose what is too slow does."""
    large = trial.suggest_categorical("backbone", ["small", "large"]) == "large"
    px = trial.suggest_int("crop_size", *CROPS, step=16) * trial.suggest_categorical("upscale", UPSCALES)
    return px + large


def share_of(cap_s: float) -> ViewsShare:
    """Of 6,000 images: 6 s of the small network at 64 px, 24 s of the large one."""
    rates = {"small": 1000.0, "large": 250.0}
    return ViewsShare(TrialSeconds(rates, 64, 6000.0, {"crop_size": 64}), cap_s, 0.2, QUICKEST)


def test_the_share_of_a_network_s_views_follows_its_seconds() -> None:
    share = share_of(12.0)
    assert share({}) == 1.0
    assert share({"backbone": "large", "crop_size": 64}) == 0.5
    assert share({"backbone": "large", "crop_size": 64, "upscale": 2.0}) == 0.125
    assert share({"crop_size": 96, "upscale": 2.0}) == pytest.approx(2 / 9)
    assert share.depends_on("upscale")
    assert not share.depends_on("lr")


@pytest.mark.parametrize("name", ["tpe", "random"])
def test_networks_that_would_see_too_few_views_are_drawn_again(name: str) -> None:
    def trials(share: ViewsShare | None) -> list[dict[str, Any]]:
        study = optuna.create_study(direction="maximize", sampler=PerTrialSampler(name, 3, share_of=share))
        study.optimize(of_a_size, n_trials=N_STARTUP + 30)
        return [trial.params for trial in study.trials]

    share = share_of(8.0)
    slow = [params for params in trials(None) if share(params) < 0.2]
    assert len(slow) > 8
    chosen = trials(share)
    assert sum(share(params) < 0.2 for params in chosen) <= 1  # nine draws in a row may fail
    assert {params["backbone"] for params in chosen} == {"small", "large"}
    assert any(params["upscale"] == 2.0 for params in chosen)


def test_where_every_network_is_too_slow_the_quickest_draw_is_taken_and_prescribed_ones_always() -> None:
    study = optuna.create_study(direction="maximize")
    study.sampler = sampler = PerTrialSampler("random", 3, share_of=share_of(1e-3))
    study.optimize(of_a_size, n_trials=20)
    px = [trial.params["crop_size"] * trial.params["upscale"] for trial in study.trials]
    assert max(px) <= 96  # of 192
    sampler.prescribed = {"backbone": "large", "crop_size": 96, "upscale": 2.0}
    study.optimize(of_a_size, n_trials=1)
    assert study.trials[-1].params == {"backbone": "large", "crop_size": 96, "upscale": 2.0}
