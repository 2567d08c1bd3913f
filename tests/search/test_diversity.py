"""Distances of parameter sets and the greedy choice, against a slow reference."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from pcam_automl.search.diversity import distance, pick_diverse
from pcam_automl.search.space import parse_space

PARAMETERS = parse_space(
    """
parameters:
  backbone: {choice: [resnet10t, resnet18d]}
  crop_size: {int: [32, 96], step: 16}
  lr: {float: [1.0e-4, 1.0e-2], log: true}
  optimizer: {choice: [adamw, sgd]}
  beta1: {float: [0.8, 0.9], when: {optimizer: [sgd]}}
""",
    "test",
).parameters


def test_distance_is_the_mean_over_the_dimensions_on_their_own_scales() -> None:
    one = {"backbone": "resnet10t", "crop_size": 32, "lr": 1e-4, "optimizer": "adamw"}
    assert distance(one, one, PARAMETERS) == 0.0
    other = {"backbone": "resnet18d", "crop_size": 64, "lr": 1e-3, "optimizer": "adamw"}
    assert distance(one, other, PARAMETERS) == pytest.approx((1 + 0.5 + 0.5 + 0) / 4)
    assert distance(one, {**one, "optimizer": "sgd", "beta1": 0.8}, PARAMETERS) == pytest.approx(2 / 5)
    assert distance({}, {}, PARAMETERS) == 0.0


def test_a_choice_that_can_be_none_and_a_range_of_one_value_have_a_distance() -> None:
    parameters = parse_space(
        "parameters: {input_size: {choice: [null, 96]}, crop_size: {int: [64, 64]}}", "t"
    ).parameters
    assert distance({"input_size": None}, {"input_size": 96}, parameters) == 1.0
    assert distance({"crop_size": 64}, {"crop_size": 64}, parameters) == 0.0


def random_params(rng: np.random.Generator) -> dict[str, Any]:
    params: dict[str, Any] = {
        "backbone": str(rng.choice(["resnet10t", "resnet18d"])),
        "crop_size": int(rng.choice([32, 48, 64, 80, 96])),
        "lr": float(10 ** rng.uniform(-4, -2)),
        "optimizer": str(rng.choice(["adamw", "sgd"])),
    }
    return params | ({"beta1": float(rng.uniform(0.8, 0.9))} if params["optimizer"] == "sgd" else {})


@pytest.mark.parametrize("seed", range(5))
def test_each_pick_is_the_farthest_from_what_is_chosen(seed: int) -> None:
    rng = np.random.default_rng(seed)
    params = [random_params(rng) for _ in range(12)]
    chosen = pick_diverse(params, PARAMETERS, 5)
    assert chosen[0] == 0
    assert len(set(chosen)) == 5
    for number in range(1, 5):
        before = chosen[:number]

        def gap(index: int, before: list[int] = before) -> float:
            return min(distance(params[index], params[b], PARAMETERS) for b in before)

        assert gap(chosen[number]) == max(gap(index) for index in range(12))


def test_distance_is_symmetric_and_at_most_one() -> None:
    rng = np.random.default_rng(7)
    for one, two in itertools.combinations([random_params(rng) for _ in range(8)], 2):
        assert distance(one, two, PARAMETERS) == distance(two, one, PARAMETERS)
        assert 0.0 < distance(one, two, PARAMETERS) <= 1.0


def test_equal_sets_are_chosen_once_and_nothing_of_nothing() -> None:
    one = {"backbone": "resnet10t", "crop_size": 32, "lr": math.sqrt(1e-6), "optimizer": "adamw"}
    assert pick_diverse([one, dict(one), {**one, "crop_size": 48}], PARAMETERS, 5) == [0, 2]
    assert pick_diverse([], PARAMETERS, 5) == []
    assert pick_diverse([one], PARAMETERS, 0) == []
