"""Where the first trials' parameters come from: other studies, priors, a probe, the shipped recipes. Orders none (see start.py)."""

from __future__ import annotations

from typing import Any

from pcam_automl.config import Enqueued
from pcam_automl.configs_folder import find_config, list_configs
from pcam_automl.data.splits import Split
from pcam_automl.data.store import PatchStore
from pcam_automl.recipe import Recipe
from pcam_automl.recipe_files import load_recipe
from pcam_automl.search.priors import NONE, check_prior_holdout, load_prior, prior_entries
from pcam_automl.search.space import SearchSpace
from pcam_automl.search.study import Asked, Say, as_searched
from pcam_automl.search.warm_start import check_holdout, open_source_study, warm_entries, weights_warning


def shipped_recipes() -> dict[str, Recipe]:
    """Every shipped recipe by name, as a search starts from it: with the weights that its file names."""
    return {name: as_searched(load_recipe(find_config("recipes", name))) for name in list_configs("recipes")}


def asked_entries(
    asked: Asked, url: str, space: SearchSpace, store: PatchStore, split: Split, say: Say
) -> list[Enqueued]:
    """What ``--warm-start`` and ``--prior`` give the first trials, the warm start first.

    Raises:
        StudyError, RecipeError: no such study or prior, or nothing in it fits the space.
        DataError: they were searched on this study's holdout.
    """
    entries: list[Enqueued] = []
    here = bool(space.base["pretrained"])
    if asked.warm_start is not None:
        source = open_source_study(asked.warm_start, url)
        notes = [
            check_holdout(store, split, source),
            weights_warning(source.shown, pretrained=source.settings.weights != "none", here=here),
        ]
        entries += warm_entries(source, space)
        for note in filter(None, notes):
            say(note)
    if asked.prior not in (None, NONE):
        prior = load_prior(asked.prior)
        notes = [
            check_prior_holdout(prior, asked.prior, store, split),
            weights_warning(asked.prior, pretrained=prior.weights != "none", here=here),
        ]
        entries += prior_entries(prior, asked.prior, space)
        for note in filter(None, notes):
            say(note)
    return entries


def probed_entries(probe: dict[str, Any] | None) -> list[Enqueued]:
    """What the probe of frozen features would begin with."""
    return [Enqueued(origin="probe of frozen features", params=params) for params in (probe or {}).get("starts", ())]
