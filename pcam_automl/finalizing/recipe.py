"""The recipe of the final training, from the trial's. Trains nothing."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial

from pcam_automl.recipe import Recipe, build_recipe
from pcam_automl.recipe_files import merge_fields
from pcam_automl.search.budget import budget_of, final_seconds
from pcam_automl.search.study import OpenStudy
from pcam_automl.training.engine import RungResult
from pcam_automl.training.fit import best_result
from pcam_automl.training.start import choose_rows

VIEWS_FACTOR = 4
LEAST_EPOCHS, MOST_EPOCHS = 3.0, 20.0
"""The final training sees four times the views of a whole trial, but at least 3 and at most 20 epochs."""
PLAIN_EPOCHS, TWICE_EPOCHS = 35.0, 60.0
"""A final training by the clock of so many epochs is augmented as the trial was, and twice as much."""
FACTORS = (1.0, 1.25, 1.5, 1.75, 2.0)
"""Times the trial's augmentation. Few, so that a training that goes on after an interruption, with other seconds left, finds its own."""
MAGNITUDES = frozenset(
    ("augment", "rotation_deg", "shift_px", "zoom", "brightness", "contrast", "saturation", "hue", "stain", "blur")
)


def final_recipe(
    trial: FrozenTrial, n_train: int, epochs: float | None, *, planned: bool = True, own_epochs: float | None = None
) -> Recipe:
    """The trial's recipe for the whole data, subsample and early end lifted.

    Args:
        trial: its recipe is taken.
        n_train: patches of the final training.
        epochs: passes over them; None: a search's ``wsd`` becomes one cycle over four times the trial's views, 3 to 20
            epochs; a recipe with a schedule of its own keeps it; after an early end, the epochs up to the kept one.
        planned: whether the study chose the trial's views itself (no ``--views``, ``views`` or ``epochs``).
        own_epochs: of the recipe that the search started from, for a schedule of its own.
    """
    searched = build_recipe(json.loads(trial.user_attrs["recipe"]), where=f"trial {trial.number}")
    changes: dict[str, Any] = {"subsample": 1.0, "patience": None}
    if searched.schedule == "wsd":
        changes["schedule"] = "one_cycle"
    if epochs is None:
        seen = searched.n_views(n_train) / n_train
        if searched.patience is not None:
            kept = best_result([RungResult(**rung) for rung in trial.user_attrs["rungs"]], searched)
            epochs = kept.views / kept.subset
        elif searched.schedule == "wsd" or (planned and own_epochs is None):
            epochs = min(max(VIEWS_FACTOR * seen, LEAST_EPOCHS), MOST_EPOCHS)
        else:
            epochs = own_epochs if planned and own_epochs is not None else seen
    fields = merge_fields(searched.model_dump(), {**changes, "epochs": round(epochs, 4)})
    return build_recipe(fields, where="finalize")


def n_final(opened: OpenStudy, trial: FrozenTrial, rows: np.ndarray) -> int:
    """Patches of ``rows`` that the final training of a trial's recipe uses: all that it does not exclude or balance away."""
    recipe = build_recipe(json.loads(trial.user_attrs["recipe"])).model_copy(update={"subsample": 1.0})
    return len(choose_rows(opened.store, recipe, rows, rows[:0]).train)


def recipe_of_study(
    opened: OpenStudy, trial: FrozenTrial, epochs: float | None, rows: np.ndarray
) -> tuple[Recipe, int]:
    """The final recipe of one of the study's trials, and how many of ``rows`` it trains on."""
    base, n_train = opened.space.base, n_final(opened, trial, rows)
    planned = opened.settings.cap_s is not None or base.get("epochs") is not None
    own_epochs = base.get("epochs") or opened.start.epochs
    return final_recipe(trial, n_train, epochs, planned=planned, own_epochs=own_epochs), n_train


def recipe_by_clock(opened: OpenStudy, trial: FrozenTrial, recipe: Recipe, n_train: int, views: float) -> Recipe:
    """The final recipe for a training whose length the clock decides: augmented for the epochs that it will have, where nobody has named
    the augmentation or given a recipe with a schedule of its own.

    Args:
        opened: the study.
        trial: of the recipe.
        recipe: from :func:`recipe_of_study`.
        n_train: patches that it trains on.
        views: training images that the seconds left are enough for.
    """
    searched = json.loads(trial.user_attrs["recipe"])["schedule"] == "wsd"
    if not searched or recipe.task != "patch" or MAGNITUDES & opened.space.base.keys():
        return recipe
    return augmented_for(recipe, min(_planned_epochs(opened, trial, n_train), views / n_train))


def augmented_for(recipe: Recipe, epochs: float) -> Recipe:
    """The recipe with up to twice the augmentation, at most full strength, for a training that shows every patch so often.

    A search's trials are of twenty epochs at most, and choose what is best for these. Of colour, turns, zoom and blur a longer training
    takes more: twice as much has a quarter to a third less error at 70 to 80 epochs, as much at 35 and more at 11 to 30 (docs/experiments.md).
    The shift stays as it is, since the centre of a patch decides its label. Nothing is added where the trial had none.
    """
    factor = 1.0 + (epochs - PLAIN_EPOCHS) / (TWICE_EPOCHS - PLAIN_EPOCHS)
    return _augmented_by(recipe, min(FACTORS, key=lambda one: abs(one - factor)))


def strengths_of(recipe: Recipe) -> list[Recipe]:
    """The recipe as it is, and every other that :func:`augmented_for` may make of it: one of them is that of a training that was begun."""
    found = [_augmented_by(recipe, factor) for factor in FACTORS]
    return [one for place, one in enumerate(found) if one not in found[:place]]


def _augmented_by(recipe: Recipe, factor: float) -> Recipe:
    strength = max(recipe.augment, min(1.0, round(factor * recipe.augment, 4)))
    if strength == recipe.augment:
        return recipe
    shift_px = recipe.shift_px * recipe.augment / strength
    return build_recipe(
        merge_fields(recipe.model_dump(), {"augment": strength, "shift_px": shift_px}), where="finalize"
    )


def _planned_epochs(opened: OpenStudy, trial: FrozenTrial, n_train: int) -> float:
    """Epochs that the budget's plan leaves the final training, by the trial's speed; infinite where nothing was planned for this budget."""
    total_s, planned = budget_of(opened.study), opened.settings.plan.get("budget")
    rate = float(trial.user_attrs.get("images_per_s") or 0.0)
    if total_s is None or planned is None or planned["total_s"] != total_s:
        return math.inf
    predict_s = float(planned.get("predict_s", 0.0))
    short = planned.get("short")
    seconds = planned["final_s"] - predict_s if short else final_seconds(total_s - predict_s, rate, n_train)
    return float(seconds) * rate / n_train
