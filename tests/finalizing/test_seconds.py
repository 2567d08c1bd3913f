"""Limited seconds at the end: what the confirmations may take, how long each final training lasts, in how many views is predicted."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from pcam_automl.finalizing import seconds as module
from pcam_automl.finalizing.kept_back import FinalRows
from pcam_automl.finalizing.seconds import (
    CONFIRM_PART,
    MOST_PACED_EPOCHS,
    averaging_within,
    confirm_seconds,
    members_that_fit,
    pace_of,
)
from pcam_automl.recipe import Recipe
from pcam_automl.search.plan import OVERHEAD

CPU = torch.device("cpu")
N_TRAIN, RATE = 1000, 100.0


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A study whose network trains 100 images a second and judges 80 patches in two seconds, one view each, all overheads included."""
    recipe = Recipe(epochs=2.0, tta="dihedral")
    monkeypatch.setattr(module, "recipe_of_study", lambda opened, trial, epochs, rows: (recipe, N_TRAIN))
    monkeypatch.setattr(module, "images_per_s", lambda opened, member, recipe, device: RATE)
    monkeypatch.setattr(module, "budget_of", lambda study: study.total_s)
    book = SimpleNamespace(judged_per_s=lambda recipe, device: 40.0 * OVERHEAD)
    return SimpleNamespace(study=SimpleNamespace(total_s=1000.0), speed_book=book)


@pytest.fixture
def rows() -> FinalRows:
    return FinalRows(np.arange(N_TRAIN), np.arange(20), True, np.arange(60))


def candidate() -> Any:
    return SimpleNamespace(trial=None, recipe=Recipe(epochs=2.0, tta="dihedral"))


PREDICT_S = 16.0
"""Of one network, in eight views."""


@pytest.mark.parametrize("n", [1, 2, 3])
def test_of_several_networks_all_are_predicted_behind_the_last_training(
    opened: Any, rows: FinalRows, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, until, members = [50.0], 350.0, [candidate()] * n
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0], monotonic=lambda: 1e6 + now[0]))
    monkeypatch.setattr("pcam_automl.training.pace.time", SimpleNamespace(monotonic=lambda: 1e6 + now[0]))
    lasted = []
    for number in range(n):
        pace = pace_of(opened, members, number, rows, until, CPU)
        assert pace.images_per_s == RATE
        lasted.append(pace.left_s())
        now[0] += pace.left_s()
    assert lasted == pytest.approx([(300.0 - n * PREDICT_S) / n] * n), "all are of one length"
    assert until - now[0] == pytest.approx(n * PREDICT_S)


@pytest.mark.parametrize(("n", "compare_s"), [(1, 2 * 0.5), (2, (2 + 8) * 0.5)])
def test_a_comparison_on_the_held_patches_has_its_seconds(
    opened: Any, rows: FinalRows, n: int, compare_s: float
) -> None:
    """One network is predicted twice more in one view, beside another one in all its views, too."""
    compared, members = replace(rows, compares=True), [candidate()] * n
    until = time.perf_counter() + 300.0
    plain_s, left_s = (pace_of(opened, members, 0, one, until, CPU).left_s() for one in (rows, compared))
    assert plain_s - left_s == pytest.approx(compare_s / n, abs=0.1)
    each_s = OVERHEAD * 2 * N_TRAIN / RATE + PREDICT_S
    for more_s, fit in ((0.9 * compare_s, n - 1), (1.1 * compare_s, n)):
        assert members_that_fit(cast(Any, opened), members, None, compared, CPU, n * each_s + more_s) == fit
    assert confirm_seconds(opened, members[0], compared, 101.0 + PREDICT_S, CPU) == pytest.approx(CONFIRM_PART * 100.0)


def test_a_final_training_has_no_endless_epochs_and_no_seconds_that_are_gone(opened: Any, rows: FinalRows) -> None:
    now = time.perf_counter()
    long = pace_of(opened, [candidate()], 0, rows, now + 1e6, CPU)
    assert long.most_views == long.n_expected() == MOST_PACED_EPOCHS * N_TRAIN
    assert pace_of(opened, [candidate()], 0, rows, now - 5.0, CPU).left_s() == pytest.approx(0.0, abs=1.0)


def test_confirmations_have_their_part_or_what_sixty_epochs_leave_up_to_half(opened: Any, rows: FinalRows) -> None:
    needed_s = 1.2 * 60 * N_TRAIN / RATE  # of 60 epochs
    for rest_s, expected in (
        (100.0, CONFIRM_PART * 100.0),
        (needed_s / 0.7, 0.3 * needed_s / 0.7),
        (10 * needed_s, 5 * needed_s),
    ):
        found = confirm_seconds(opened, candidate(), rows, rest_s + PREDICT_S, CPU)
        assert found == pytest.approx(expected)
    assert confirm_seconds(opened, candidate(), rows, 1.0, CPU) == 0.0
    assert confirm_seconds(opened, candidate(), rows, None, CPU) is None


def test_as_many_networks_are_trained_as_fit_with_their_predictions(opened: Any, rows: FinalRows) -> None:
    each_s = OVERHEAD * 2 * N_TRAIN / RATE + PREDICT_S
    for seconds, n in ((0.9 * each_s, 0), (1.1 * each_s, 1), (3.5 * each_s, 3), (-1.0, 0)):
        assert members_that_fit(cast(Any, opened), [candidate()] * 2, None, rows, CPU, seconds) == n


def test_views_are_given_up_where_those_of_all_networks_take_too_much(opened: Any, rows: FinalRows) -> None:
    said: list[str] = []

    def averaging(n: int) -> Any:
        decision = cast(Any, SimpleNamespace(members=[candidate()] * n))
        return averaging_within(opened, decision, rows, CPU, said.append)

    opened.study.total_s = 3 * PREDICT_S  # one network's take a third, of two two thirds
    assert averaging(1) is None
    assert said == []
    assert averaging(2) == "none"
    assert said[0].startswith("80 patches are predicted in one view each")
    paces = [pace_of(opened, [candidate()] * n, 0, rows, time.perf_counter() + 30.0, CPU).left_s() for n in (1, 2)]
    assert paces == pytest.approx([30.0 - PREDICT_S, (30.0 - 2 * PREDICT_S / 8) / 2], abs=1.0)
