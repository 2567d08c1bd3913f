"""The recipe of the final training, from the trial's. Trains nothing."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial

from pcam_automl.recipe import Recipe, build_recipe
from pcam_automl.recipe_files import merge_fields
from pcam_automl.search.study import OpenStudy
from pcam_automl.training.engine import RungResult
from pcam_automl.training.fit import best_result
from pcam_automl.training.start import choose_rows

VIEWS_FACTOR = 4
LEAST_EPOCHS, MOST_EPOCHS = 3.0, 20.0
"""The final training sees four times the views of a whole trial, but at least 3 and at most 20 epochs."""


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
