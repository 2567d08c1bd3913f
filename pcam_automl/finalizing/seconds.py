"""How limited seconds are dealt at the end: to confirmations, final trainings and the prediction. Trains nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from pcam_automl.finalizing.decision import Decision
from pcam_automl.finalizing.kept_back import FinalRows
from pcam_automl.finalizing.recipe import recipe_of_study
from pcam_automl.recipe import Recipe
from pcam_automl.search.budget import (
    CONFIRM_SHARE,
    FINAL_SHARE,
    MOST_FINAL_EPOCHS,
    MOST_PREDICT_SHARE,
    budget_of,
    final_seconds,
    n_test_views,
)
from pcam_automl.search.confirm import images_per_s
from pcam_automl.search.confirmations import Candidate
from pcam_automl.search.plan import OVERHEAD, prediction_seconds
from pcam_automl.search.study import OpenStudy
from pcam_automl.training.pace import Pace
from pcam_automl.training.ranks import from_first
from pcam_automl.training.scoring import Averaging

MOST_PACED_EPOCHS = 3.0 * MOST_FINAL_EPOCHS
"""However much time is left, where few trials were asked for: 60 are planned."""
CONFIRM_PART = CONFIRM_SHARE / (CONFIRM_SHARE + FINAL_SHARE)
"""Of finalize's seconds, where they are limited: what the confirmations may take at least."""


def confirm_seconds(
    opened: OpenStudy, chosen: Candidate, rows: FinalRows, seconds: float | None, device: torch.device
) -> float | None:
    """What the confirmations may take of limited seconds, the prediction taken off: a seventh, or what 60 epochs of final training leave,
    up to half.
    """
    if seconds is None:
        return None
    rate = images_per_s(opened, chosen, chosen.recipe, device)
    needed_s = final_seconds(math.inf, rate, len(rows.train))
    predict_s = _predict_seconds(opened, chosen.recipe, rows, rate, device)
    rest_s = max(0.0, seconds - predict_s - _compare_seconds(opened, chosen.recipe, rows, device))
    return max(CONFIRM_PART * rest_s, min(0.5 * rest_s, rest_s - needed_s))


def members_that_fit(
    opened: OpenStudy,
    candidates: list[Candidate],
    epochs: float | None,
    rows: FinalRows,
    device: torch.device,
    left_s: float,
) -> int:
    """As many final trainings of the candidates, and predictions of the test patches, as fit the seconds left."""
    slowest, compare_s = 0.0, 0.0
    for candidate in candidates:
        recipe, n_train = recipe_of_study(opened, candidate.trial, epochs, rows.train)
        rate = images_per_s(opened, candidate, recipe, device)
        steps_s = OVERHEAD * recipe.n_views(n_train) / rate
        slowest = max(slowest, steps_s + _predict_seconds(opened, recipe, rows, rate, device))
        compare_s = max(compare_s, _compare_seconds(opened, recipe, rows, device, len(candidates)))
    return max(0, int((left_s - compare_s) / slowest))


def _predict_seconds(
    opened: OpenStudy, recipe: Recipe, rows: FinalRows, rate: float, device: torch.device, n_members: int = 1
) -> float:
    """Of one final network of ``n_members``. How quickly it judges is measured: of three minutes on a slow machine a guess cost a fifth; of a dense
    network it is guessed from its training's ``rate``.
    """
    if recipe.task == "dense":
        return prediction_seconds(8 * (len(rows.test) + len(rows.held)), rate)
    return _test_views(opened, recipe, rows, device, n_members) * _seconds_a_view(opened, recipe, rows, device)


def _compare_seconds(
    opened: OpenStudy, recipe: Recipe, rows: FinalRows, device: torch.device, n_members: int = 1
) -> float:
    """Of the first network on the held patches once more: in one view with its last weights and with their average, and beside others in
    all of its views, which alone are those of the prediction.
    """
    if not rows.compares or not len(rows.held):
        return 0.0
    n_views = 2 + (_test_views(opened, recipe, rows, device, n_members) if n_members > 1 else 0)
    return n_views * OVERHEAD * len(rows.held) / opened.speed_book.judged_per_s(recipe, device)


def _seconds_a_view(opened: OpenStudy, recipe: Recipe, rows: FinalRows, device: torch.device) -> float:
    return OVERHEAD * (len(rows.test) + len(rows.held)) / opened.speed_book.judged_per_s(recipe, device)


def _test_views(opened: OpenStudy, recipe: Recipe, rows: FinalRows, device: torch.device, n_members: int) -> int:
    """Views of each patch: the recipe's, or one where those of so many networks take too much of the study's budget."""
    total_s = budget_of(opened.study) or math.inf
    return n_test_views(total_s, n_members * _seconds_a_view(opened, recipe, rows, device), recipe.n_test_views)


def averaging_within(
    opened: OpenStudy, decision: Decision, rows: FinalRows, device: torch.device, note: Callable[[str], None]
) -> Averaging | None:
    """``none`` where the views of a network, as its recipe says, would take too much of a budget; None is as the recipes say."""
    recipes = [recipe_of_study(opened, one.trial, None, rows.train)[0] for one in decision.members]
    if all(_test_views(opened, recipe, rows, device, len(recipes)) == recipe.n_test_views for recipe in recipes):
        return None
    note(
        f"{len(rows.test) + len(rows.held):,} patches are predicted in one view each: the average of {recipes[0].n_test_views} would take more "
        f"than {100 * MOST_PREDICT_SHARE:.0f} % of the budget (`pcam-automl predict` with the network averages them)"
    )
    return "none"


def pace_of(
    opened: OpenStudy, members: Sequence[Candidate], number: int, rows: FinalRows, until: float, device: torch.device
) -> Pace:
    """When the final training of ``members[number]`` ends, so that those after it and the predictions of all networks, which come last, are
    over by ``until``, by ``time.perf_counter``. No network has more than ``MOST_PACED_EPOCHS``.
    """
    rates, predict_s = [], 0.0
    for place, member in enumerate(members):
        recipe, _ = recipe_of_study(opened, member.trial, None, rows.train)
        rates.append(rate := from_first(partial(images_per_s, opened, member, recipe, device)))
        predict_s += from_first(partial(_predict_seconds, opened, recipe, rows, rate, device, len(members)))
        if place == 0:
            predict_s += from_first(partial(_compare_seconds, opened, recipe, rows, device, len(members)))
    left_s = (until - time.perf_counter() - predict_s) / (len(members) - number)
    most_views = MOST_PACED_EPOCHS * len(rows.train)
    return Pace(time.monotonic() + max(0.0, left_s), rates[number], most_views=most_views)
