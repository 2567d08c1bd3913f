from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest
import torch

from pcam_automl.errors import RecipeError, StudyError
from pcam_automl.recipe import Recipe
from pcam_automl.search.cost import TrialSeconds, log_improvement_per_cost, mean_trial_s, share_of_views
from pcam_automl.search.create import create_or_open_study
from pcam_automl.search.objective import Objective
from pcam_automl.search.plan import side_power
from pcam_automl.search.sampler import build_sampler
from pcam_automl.search.space import parse_space
from pcam_automl.search.study import Asked, open_study
from pcam_automl.search.turns import Limits
from pcam_automl.search.worker import run_worker
from pcam_automl.training.compute import Compute

SPEEDS = {"small": 1000.0, "large": 100.0}
FIELDS = {"backbone": "small", "crop_size": 64, "input_size": None}


def seconds_of(**changes: Any) -> TrialSeconds:
    return TrialSeconds(**{"images_per_s": SPEEDS, "planned_px": 64, "images": 6000.0, "fields": FIELDS, **changes})


def test_seconds_follow_the_backbone_and_the_pixels() -> None:
    model = seconds_of()
    assert model({}) == 6.0
    assert model({"backbone": "large"}) == 60.0
    assert model({"crop_size": 32}) == 1.5
    assert model({"crop_size": 32, "upscale": 2.0}) == 6.0
    assert model({"crop_size": 32, "input_size": 128}) == 24.0
    assert model({"crop_size": 96, "upscale": 0.67}) == 6.0
    assert model({"crop_size": 32, "upscale": 0.67}) == 1.5, "no input is below 32 px"
    launches = seconds_of(side_power=0.5)
    assert launches({"crop_size": 32, "input_size": 256}) == pytest.approx(12.0)


@pytest.mark.parametrize(
    ("device", "slower", "power"), [("cpu", 4.0, 2.0), ("cuda:0", 4.0, 2.0), ("cuda:0", 2.0, 1.0), ("cuda:0", 0.9, 0.0)]
)
def test_on_a_gpu_it_is_measured_how_seconds_grow_with_the_side(device: str, slower: float, power: float) -> None:
    recipe = Recipe(backbone="resnet10t", crop_size=96)
    rates = {96: 1000.0, 192: 1000.0 / slower}
    book: Any = SimpleNamespace(images_per_s=lambda one, _: rates[one.network_px])
    assert side_power(recipe, torch.device(device), book) == power
    fixed = recipe.model_copy(update={"input_size": 224})
    assert side_power(fixed, torch.device(device), book) == 2.0, "nothing larger is tried"


def test_no_trial_costs_more_than_the_cap() -> None:
    assert seconds_of(cap_s=10.0)({"backbone": "large"}) == 10.0
    assert seconds_of(cap_s=10.0)({"backbone": "small"}) == 6.0


SIDES = """
parameters:
  backbone: {choice: [small, large, unknown]}
  crop_size: {int: [32, 96], step: 32}
  upscale: {choice: [1.0, 2.0]}
"""


def test_the_mean_trial_is_of_what_is_drawn_under_the_limit() -> None:
    space = parse_space(SIDES, "here")
    share = share_of_views(seconds_of(), 10.0, 0.2, space)
    assert dict(share.quickest) == {"backbone": "small", "crop_size": 32, "upscale": 1.0}
    # small takes 1.5, 6 and 13.5 s at 32, 64 and 96 px, four times that upscaled, large ten times all of it; beyond 50 s none is drawn.
    assert mean_trial_s(share, space) == pytest.approx((1.5 + 6.0 + 10.0 + 6.0 + 10.0 + 10.0) / 6)
    assert mean_trial_s(share_of_views(seconds_of(), math.inf, 0.2, space), space) == pytest.approx(
        11 * (1.5 + 6.0 + 13.5) * (1 + 4) / 12
    )
    assert mean_trial_s(share_of_views(seconds_of(), 0.001, 0.2, space), space) == 0.001, "all are too slow"
    fixed = parse_space("base: {backbone: large}\nparameters:\n  lr: {float: [1.0e-3, 1.0e-2]}\n", "here")
    fields = {**FIELDS, "backbone": "large"}
    assert mean_trial_s(share_of_views(seconds_of(fields=fields), 90.0, 0.2, fixed), fixed) == 60.0


def test_a_scale_that_may_not_apply_does_not_make_a_network_look_quick() -> None:
    space = parse_space(
        "parameters:\n  backbone: {choice: [small, large]}\n  upscale: {choice: [0.5, 1.0], when: {backbone: [small]}}\n",
        "x",
    )
    share = share_of_views(seconds_of(), 30.0, 0.2, space)
    assert share({"backbone": "large"}) == 0.5
    always = parse_space("parameters:\n  upscale: {choice: [0.5, 1.0]}\n", "x")
    assert share_of_views(seconds_of(), 30.0, 0.2, always)({"backbone": "large"}) == 1.0


def test_improvement_per_cost_is_the_published_formula() -> None:
    log_ratio, seconds = np.array([-3.0, 0.0, 2.0, 50.0]), np.array([1.0, 2.0, 4.0, 8.0])
    for alpha in (0.0, 0.5, 1.0):
        slow = [1 / (0.1 + 0.9 * math.exp(-r)) / s**alpha for r, s in zip(log_ratio, seconds, strict=True)]
        np.testing.assert_allclose(np.exp(log_improvement_per_cost(log_ratio, seconds, alpha)), slow, rtol=1e-12)


def test_without_weight_on_seconds_the_order_is_tpe_s_own() -> None:
    rng = np.random.default_rng(0)
    ratio = rng.normal(0, 5, 50)
    order = np.argsort(log_improvement_per_cost(ratio, rng.uniform(1, 9, 50), alpha=0.0))
    assert order.tolist() == np.argsort(ratio).tolist()


def two_backbones(trial: optuna.Trial) -> float:
    """Both backbones are equally good; only lr matters."""
    trial.suggest_categorical("backbone", ["small", "large"])
    return -abs(math.log10(trial.suggest_float("lr", 1e-4, 1e-2, log=True)) + 3)


def n_large(seconds: TrialSeconds | None, budget_left: float, seed: int) -> int:
    """Of the 20 proposals after the start, those with the slow backbone."""
    study = optuna.create_study(direction="maximize", sampler=build_sampler("tpe", seed, seconds_of=seconds))
    study.sampler.budget_left = budget_left
    study.optimize(two_backbones, n_trials=30)
    return sum(trial.params["backbone"] == "large" for trial in study.trials[10:])


def test_equally_good_slow_backbones_are_proposed_less_and_no_less_when_the_budget_ends() -> None:
    plain = sum(n_large(None, 1.0, seed) for seed in range(2))
    aware = sum(n_large(seconds_of(), 1.0, seed) for seed in range(2))
    spent = sum(n_large(seconds_of(), 0.0, seed) for seed in range(2))
    assert aware < 0.5 * plain
    assert spent == plain  # exponent 0: plain TPE, draw by draw


def test_same_seed_and_history_give_the_same_cost_aware_trials() -> None:
    runs = []
    for _ in range(2):
        study = optuna.create_study(direction="maximize")
        for _ in range(14):
            study.sampler = build_sampler("tpe", 3, seconds_of=seconds_of())
            study.optimize(two_backbones, n_trials=1)
        runs.append([trial.params for trial in study.trials])
    assert runs[0] == runs[1]


@pytest.mark.parametrize("name", ["gp", "random", "qmc"])
def test_samplers_that_cannot_count_seconds_say_so(name: str) -> None:
    with pytest.raises(RecipeError, match=f"--cost-aware needs --sampler tpe or tpe-qmc, got {name}"):
        build_sampler(name, 0, seconds_of=seconds_of())


def test_a_study_remembers_that_it_counts_seconds_and_its_workers_do(
    tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = Compute("cpu", step_s=0.1)
    monkeypatch.setattr("pcam_automl.training.speed.measure_fitting", lambda *_, **__: measured)
    url = f"sqlite:///{tmp_path / 'studies' / 's.db'}"
    opened = create_or_open_study("tiny", url, replace(asked, views=64, cost_aware=True), say=lambda text: None)
    assert opened.settings.cost_aware
    rates = opened.settings.plan["images_per_s"]
    assert opened.trial_seconds()({"backbone": "test_resnet"}) * rates["test_resnet"] == pytest.approx(
        opened.trial_seconds()({"backbone": "test_vit"}) * rates["test_vit"]
    )
    monkeypatch.setattr("pcam_automl.search.sampler.N_STARTUP", 1)
    judged: list[float] = []
    log_improvement = log_improvement_per_cost

    def noted(log_ratio: Any, seconds: Any, alpha: float) -> Any:
        judged.append(alpha)
        return log_improvement(log_ratio, seconds, alpha)

    monkeypatch.setattr("pcam_automl.search.cost.log_improvement_per_cost", noted)
    run_worker(Objective(opened, torch.device("cpu")), Limits(3))
    assert judged == pytest.approx([2 / 3, 1 / 3])  # as the budget of three trials goes
    assert open_study("tiny", url, Asked(cost_aware=True)).settings.cost_aware
    with pytest.raises(RecipeError, match="--cost-aware needs --sampler tpe or tpe-qmc, got gp"):
        create_or_open_study("other", url, replace(asked, sampler="gp", cost_aware=True), say=lambda text: None)
    create_or_open_study("plain", url, replace(asked, views=64), say=lambda text: None)
    with pytest.raises(StudyError, match="--cost-aware is True, the study has False"):
        open_study("plain", url, Asked(cost_aware=True))
