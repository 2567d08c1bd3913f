"""What an earlier finalize has left: networks that are there already, trainings that were cut off. Trains and writes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from pcam_automl.bundle import CARD, load_bundle
from pcam_automl.ensemble import member_folder
from pcam_automl.finalizing.kept_back import FinalRows
from pcam_automl.finalizing.recipe import recipe_of_study, strengths_of
from pcam_automl.recipe import Recipe
from pcam_automl.search.confirmations import Candidate
from pcam_automl.search.study import OpenStudy
from pcam_automl.search.whose_folder import ID_KEY
from pcam_automl.train import can_go_on, checkpoints_beside
from pcam_automl.training.checkpoint import newest_checkpoint
from pcam_automl.training.start import choose_rows, data_key

LONG_ENOUGH = 0.8
"""Of the training images that would fit the seconds now: a network that has seen so many is not trained again."""
MUCH_SHORTER = 0.2
"""Of the training images of the network that is there: by the clock none is replaced by one that would see fewer."""


def earlier_recipe(
    opened: OpenStudy,
    plain: Recipe,
    rows: FinalRows,
    folder: Path,
    *,
    planned: int,
    by_clock: bool,
    note: Callable[[str], None],
) -> tuple[Recipe, bool] | None:
    """Of the recipes that a final training may have, however it is augmented, the one of a network that is there (True), or of a training
    by the clock that was cut off (False); None of neither.

    Args:
        opened: the study.
        plain: augmented as its trial.
        rows: what is trained on.
        folder: of the network.
        planned: training images that it would see.
        by_clock: whether seconds decide how many.
        note: told why a bundle is not enough.
    """
    variants = strengths_of(plain)
    for one in variants:
        if is_done(folder, one, opened, rows.train, planned=planned, by_clock=by_clock, note=note):
            return one, True
    return next(((one, False) for one in variants if by_clock and goes_on(opened, one, rows, folder)), None)


def is_under_way(
    opened: OpenStudy, candidates: list[Candidate], epochs: float | None, rows: FinalRows, out: Path
) -> bool:
    """Whether an earlier call was cut off in the final training of one of the candidates."""
    recipes = _recipes(opened, candidates, epochs, rows)
    return any(goes_on(opened, recipe, rows, member_folder(out, 0)) for recipe in recipes)


def n_of_earlier_calls(
    opened: OpenStudy, candidates: list[Candidate], epochs: float | None, rows: FinalRows, out: Path, n: int
) -> int:
    """Of the first ``n`` places those that hold a candidate's network, or a checkpoint of its training by the clock."""
    recipes = _recipes(opened, candidates, epochs, rows)
    return sum(
        any(holds(folder, recipe, opened, rows.train) or goes_on(opened, recipe, rows, folder) for recipe in recipes)
        for folder in (member_folder(out, number) for number in range(n))
    )


def is_begun(out: Path, number: int) -> bool:
    """Whether a network, or a checkpoint of its training, lies where that one of the final networks belongs."""
    folder = member_folder(out, number)
    return (folder / CARD).is_file() or newest_checkpoint(checkpoints_beside(folder)) is not None


def much_longer(folder: Path, opened: OpenStudy, planned: int) -> int:
    """Training images that the study's own network there has seen, where ``planned`` are but a small share of them; else 0."""
    if not (folder / CARD).is_file():
        return 0
    known = load_bundle(folder).provenance
    if (study_id := known.get("study_id")) is not None:
        own = study_id == opened.study.user_attrs.get(ID_KEY)
    else:  # of before 2026-11-30
        own = (known.get("study"), known.get("split_hash")) == (opened.name, opened.split.hash)
    seen = int(known.get("views_seen", 0))
    return seen if own and planned < MUCH_SHORTER * seen else 0


def is_done(
    model: Path,
    recipe: Recipe,
    opened: OpenStudy,
    rows: np.ndarray,
    *,
    planned: int,
    by_clock: bool,
    note: Callable[[str], None],
) -> bool:
    """Whether the folder already holds this recipe, from these weights, trained on these patches of this pack, and for long enough.

    A study made anew under an old one's name may have the same recipe and another holdout; a larger budget, or none, the same
    recipe and rows, and a longer training.

    Args:
        model: the bundle's folder.
        recipe: to be trained.
        opened: the study.
        rows: to train on.
        planned: training images that it would see.
        by_clock: whether seconds decide how many.
        note: told why a bundle is not enough.
    """
    if not holds(model, recipe, opened, rows):
        return False
    known = load_bundle(model).provenance
    seen, was_by_clock = int(known.get("views_seen", 0)), known.get("by_clock", by_clock)
    if (not by_clock and not was_by_clock) or seen >= LONG_ENOUGH * planned:
        return True
    note(
        f"{model} was trained on {seen:,} images by an earlier command, {planned:,} are planned now: it is trained anew"
    )
    return False


def holds(model: Path, recipe: Recipe, opened: OpenStudy, rows: np.ndarray) -> bool:
    """Whether the bundle there is of this recipe, from these weights, trained on these patches of this pack."""
    if not (model / CARD).is_file():
        return False
    bundle = load_bundle(model)
    trained_on = data_key(opened.store, choose_rows(opened.store, recipe, rows, rows[:0]))
    held = (bundle.provenance.get("data_key"), bundle.provenance.get("weights"))
    return bundle.recipe == recipe and held == (trained_on, str(opened.weights))


def goes_on(opened: OpenStudy, recipe: Recipe, rows: FinalRows, folder: Path) -> bool:
    """Whether an earlier call left a checkpoint of just this final training by the clock."""
    none = rows.train[:0]
    return can_go_on(recipe, opened.store, rows.train, none, folder, weights=opened.weights, by_clock=True)


def _recipes(opened: OpenStudy, candidates: list[Candidate], epochs: float | None, rows: FinalRows) -> list[Recipe]:
    """What a final training of one of the candidates may be of."""
    plain = [recipe_of_study(opened, one.trial, epochs, rows.train)[0] for one in candidates]
    return [recipe for one in plain for recipe in strengths_of(one)]
