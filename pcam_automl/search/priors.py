"""Priors: recipes that did well elsewhere, as YAML with where they come from. Chooses and trains nothing."""

from __future__ import annotations

import datetime
from typing import Annotated, Any

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pcam_automl.config import Enqueued
from pcam_automl.configs_folder import find_config
from pcam_automl.data.splits import Split
from pcam_automl.data.store import PatchStore, pixels_hash
from pcam_automl.errors import DataError, RecipeError, StudyError, first_few
from pcam_automl.models.factory import smallest_input
from pcam_automl.recipe import Recipe, build_recipe, validation_faults
from pcam_automl.search.space import SearchSpace, in_one_stage
from pcam_automl.search.warm_start import Source, diverse_best, fits_space, pack_of
from pcam_automl.yaml_text import parse_yaml, read_config_text

NONE = "none"
_OF_THE_STUDY = ("seed", "views", "epochs", "exclude_ids")
"""Recipe fields that belong to the study a recipe was tried in, and not to what was learnt."""


class PriorEntry(BaseModel):
    """A recipe and what it reached; ``fields`` are those that differ from a recipe's defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    trial: Annotated[int, Field(ge=0)]
    auc: Annotated[float, Field(ge=0.0, le=1.0, description="validation AUC of the whole trial")]
    fields: dict[str, Any]

    @property
    def recipe(self) -> Recipe:
        return build_recipe(self.fields, where=f"prior trial {self.trial}")


class Prior(BaseModel):
    """Recipes of one study, the best first, and everything that it takes to make the file again."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    data: Annotated[str, Field(min_length=1, description="what the study was run on, for people")]
    command: Annotated[str, Field(min_length=1, description="that made the study")]
    export: Annotated[str, Field(min_length=1, description="command that made this file of it")]
    date: datetime.date
    weights: Annotated[str, Field(min_length=1, description="where the study's pretrained weights came from")]
    pack_hash: str
    pixels_hash: Annotated[
        str | None, Field(description="which patches they were, however packed; None of earlier files")
    ] = None
    split_hash: str
    seed: Annotated[int, Field(ge=0)]
    holdout: Annotated[float, Field(ge=0.0, le=0.5)]
    n_trials: Annotated[int, Field(ge=1, description="finished trials of the study")]
    versions: dict[str, str]
    recipes: Annotated[tuple[PriorEntry, ...], Field(min_length=1)]

    def to_yaml(self) -> str:
        """YAML that :func:`parse_prior` reads back to an equal prior."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=120)


def prior_of(source: Source, space: SearchSpace, *, data: str, command: str, export: str, k: int) -> Prior:
    """The diverse best complete trials of a study.

    Args:
        source: the study.
        space: its own, in which its trials are told apart.
        data: what to call its data.
        command: that made it.
        export: that makes the prior.
        k: at most so many recipes.

    Raises:
        StudyError: no complete trial.
    """
    complete = [tried for tried in source.tried if tried.complete]
    if not complete:
        raise StudyError(
            f"study {source.shown!r} has no complete trial to export; a pruned one's AUC is no whole trial's"
        )
    settings = source.settings
    defaults = build_recipe({}).model_dump(mode="json")
    entries = []
    for tried in diverse_best(complete, space, k):
        fields = tried.recipe.model_dump(mode="json", exclude=set(_OF_THE_STUDY))
        changed = {name: value for name, value in fields.items() if value != defaults[name]}
        entries.append(PriorEntry(trial=tried.number, auc=round(tried.auc, 6), fields=changed))
    return Prior(
        data=data,
        command=command,
        export=export,
        date=datetime.datetime.now(datetime.UTC).date(),
        weights=settings.weights if settings.weights in ("hub", "none") else "folder",
        pack_hash=settings.pack_hash,
        pixels_hash=None if (store := pack_of(settings)) is None else _pixels(store),
        split_hash=settings.split_hash,
        seed=settings.seed,
        holdout=settings.holdout,
        n_trials=len(source.tried),
        versions=settings.versions,
        recipes=tuple(entries),
    )


def load_prior(name_or_path: str) -> Prior:
    """A shipped prior by name, or a YAML file.

    Raises:
        RecipeError: no such prior, or faults in it, all reported together.
    """
    path = find_config("priors", name_or_path)
    return parse_prior(read_config_text(path), name_or_path)


def parse_prior(text: str, where: str) -> Prior:
    """A prior from its YAML text; see :func:`load_prior`."""
    try:
        prior = Prior.model_validate(parse_yaml(text, where))
    except ValidationError as fault:
        raise RecipeError("; ".join(validation_faults(fault, where, Prior.model_fields))) from None
    for number, entry in enumerate(prior.recipes, start=1):
        build_recipe(entry.fields, where=f"{where}.recipes.{number}.fields")
    return prior


def prior_entries(prior: Prior, name: str, space: SearchSpace) -> list[Enqueued]:
    """The prior's recipes as entries of the space.

    Raises:
        RecipeError: none has a task and a backbone of the space.
    """
    fitting = [entry for entry in prior.recipes if fits_space(entry.recipe, space)]
    if not fitting:
        names = sorted({entry.recipe.backbone for entry in prior.recipes})
        raise RecipeError(
            f"--prior {name}: none of its recipes fits this search space (their backbones: {first_few(names)}; here: "
            f"{first_few(space.choices('backbone'))}); choose another --space, or --prior {NONE}"
        )
    return [
        Enqueued(
            origin=f"prior {name}, trial {entry.trial}",
            params=space.params_of(in_one_stage(entry.recipe), smallest_input),
        )
        for entry in fitting
    ]


def _pixels(store: PatchStore) -> str:
    """Which labelled patches they are."""
    return pixels_hash(np.asarray(store.digest)[store.development_rows()])


def check_prior_holdout(prior: Prior, name: str, store: PatchStore, split: Split) -> str | None:
    """Refuse a prior that was searched on this study's holdout; see :func:`~pcam_automl.search.warm_start.check_holdout`.

    Returns:
        What to say where the data are the same, or where they are others and there is a holdout; None else.

    Raises:
        DataError: the same data in another split, and a holdout.
    """
    same_patches = prior.pixels_hash is not None and prior.pixels_hash == _pixels(store)
    n_held = len(split.holdout_rows())
    if prior.pack_hash != store.content_hash and not same_patches:
        unknown = f"warning: --prior {name}: its data are not at hand, so nobody can say whether it has seen the holdout's patches"
        return unknown if n_held else None
    same_pack = prior.pack_hash == store.content_hash  # else no seed makes its split of other groups
    remedy = (
        f"take its split (--seed {prior.seed} --holdout {prior.holdout:g}), or --prior {NONE}"
        if same_pack
        else f"--prior {NONE} goes without"
    )
    if n_held and prior.split_hash != split.hash:
        raise DataError(
            f"--prior {name} was searched on these data in another split, that is on patches that are set aside here, so their "
            f"score would flatter; {remedy}"
        )
    return f"--prior {name} was searched on the same data: validation scores of its recipes flatter"
