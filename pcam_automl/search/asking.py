"""What a user asks of a new study: options, recipe and space judged together, before and after the data are known. Creates nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import optuna

from pcam_automl.config import LEAST_GRACE_S
from pcam_automl.configs_folder import find_config
from pcam_automl.data.splits import Split
from pcam_automl.data.store import PatchStore
from pcam_automl.errors import DataError, InputError, RecipeError, first_few
from pcam_automl.goals import AUC, goal_of
from pcam_automl.models.factory import network_faults
from pcam_automl.models.weights import Weights, decide_weights
from pcam_automl.recipe import Recipe
from pcam_automl.recipe_files import load_recipe
from pcam_automl.search.dimension import UPSCALE, Parameter, scaled_side
from pcam_automl.search.domains import ESTIMATE, split_of
from pcam_automl.search.mirror import parse_s3
from pcam_automl.search.priors import NONE, load_prior
from pcam_automl.search.probe_study import MODES
from pcam_automl.search.pruner import build_pruner
from pcam_automl.search.sampler import build_sampler, check_cost_aware
from pcam_automl.search.space import SearchSpace
from pcam_automl.search.study import (
    DEFAULT_SPACE,
    VALIDATION_FOLD,
    Asked,
    Say,
    check_pins,
)
from pcam_automl.training.compute import choose_device

LARGEST_HOLDOUT = 0.5
DEFAULT_RECIPE = "default"
_DRAWS = 4


def default_space(asked: Asked) -> str:
    """``dense`` where the recipe to start from is a dense one, else ``default``."""
    recipe = load_recipe(find_config("recipes", asked.recipe or DEFAULT_RECIPE))
    return "dense" if recipe.task == "dense" else DEFAULT_SPACE


def recipe_fields(space: SearchSpace) -> dict[str, Any]:
    """The fields that a space fixes and a recipe has."""
    return {name: value for name, value in space.base.items() if name in Recipe.model_fields}


def may_be_pretrained(asked: Asked) -> bool:
    """Whether pretrained weights are looked for where ``--weights`` is not given: always for the default recipe, else as the recipe says."""
    return asked.recipe in (None, DEFAULT_RECIPE) or load_recipe(find_config("recipes", asked.recipe)).pretrained


def with_weights(space: SearchSpace, asked: Asked, say: Say) -> tuple[SearchSpace, Weights]:
    """The space with ``pretrained`` fixed, without backbones that the weights do not have; and where they come from.

    ``--set`` and the space's own ``base`` decide whether networks are pretrained, else an explicit ``--weights``, else the recipe.

    Raises:
        RecipeError: the space searches ``pretrained``, or fixes it to true and there are no weights; or no backbone has any.
    """
    if "pretrained" in space.parameters:
        raise RecipeError(
            "space.parameters.pretrained cannot be searched: one study has one kind of start; fix it in base, or leave it to --weights"
        )
    own = space.base.get("pretrained")
    wanted = may_be_pretrained(asked) if own is None else own
    weights, text = decide_weights(asked.weights or ("auto" if wanted else "none"))  # asks the network, up to 10 s
    if own and not weights.pretrained:
        raise RecipeError(
            f"pretrained is set to true, and there are none to start from ({text}); give --weights DIR or hub, or leave pretrained out"
        )
    pretrained = weights.pretrained if own is None else own
    say(text if pretrained or not weights.pretrained else "weights: from scratch, since pretrained is set to false")
    return drop_backbones_without_weights(space.pinned({"pretrained": pretrained}), weights, say), weights


def around_recipe(space: SearchSpace, asked: Asked) -> SearchSpace:
    """A search around ``--recipe`` starts from just that recipe, unless a ``--space`` is named.

    Its network is kept (backbone, decoder, tile), and so is every value that the space cannot take: an optimizer that is
    no choice, a crop between two steps. Only then is trial 0 the recipe.
    """
    if asked.recipe is None or asked.space is not None:
        return space
    recipe, pins = load_recipe(find_config("recipes", asked.recipe)), asked.pins or {}
    fields = {**recipe.model_dump(), UPSCALE: recipe.network_px / recipe.crop_size}
    own = {name for name, p in space.parameters.items() if p.active(fields) and not p.contains(fields[name])}
    if UPSCALE in own and not _shows(space.parameters[UPSCALE], recipe):
        own |= {"input_size"}
    own -= {UPSCALE}
    own |= {"backbone"} | ({"decoder", "tile_size"} if recipe.task == "dense" else set())
    return space.pinned({name: fields[name] for name in sorted(own) if name not in pins})


def _shows(scale: Parameter, recipe: Recipe) -> bool:
    """Whether a value of the scale gives the recipe's input: two thirds of 96 px are 64, so are 0.67."""
    nearest = scale.nearest(recipe.network_px / recipe.crop_size)
    return nearest is not None and scaled_side(recipe.crop_size, nearest) == recipe.network_px


def without_shrinking(space: SearchSpace, start: Recipe) -> SearchSpace:
    """The space of a fine-tuning without scales below 1, unless the start itself is shrunk: pretrained networks know larger objects
    than a patch's, and gain from enlarging them.
    """
    scale = space.parameters.get(UPSCALE)
    if not start.pretrained or start.task != "patch" or start.network_px < start.crop_size:
        return space
    shrinks = [] if scale is None else [value for value in scale.choices if value < 1.0]
    return space.without_choices(UPSCALE, shrinks) if shrinks else space


def check_networks(space: SearchSpace, start: Recipe) -> None:
    """Whether the fields that the space gives each of its backbones are options of that backbone, by a few draws of each.

    Raises:
        RecipeError: names every field and backbone that do not go together.
    """
    faults: dict[str, None] = {}
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for backbone in space.choices("backbone") or (start.backbone,):
        of_one = space.pinned({"backbone": backbone})
        for _ in range(_DRAWS):
            recipe = of_one.suggest(study.ask(), {**start.model_dump(), "epochs": None})
            faults |= dict.fromkeys(network_faults(recipe))
    if faults:
        raise RecipeError("; ".join(faults) + "; a parameter of some backbones alone needs `when: {backbone: [...]}`")


def check_masks(recipe: Recipe, store: PatchStore, split: Split) -> None:
    """Of a dense task, whether the images set aside hold both tumour and none: no map could be scored on them.

    Raises:
        DataError: they do not.
    """
    if recipe.task != "dense" or store.masks is None:
        return
    parts = (("validation fold", split.score_rows(VALIDATION_FOLD)), ("holdout", split.holdout_rows()))
    for what, rows in parts:
        share = float(np.mean([store.masks[row].mean() for row in rows.tolist()])) if len(rows) else 0.5
        if share in (0.0, 1.0):
            held = "no tumour" if share == 0.0 else "nothing but tumour"
            remedy = "choose another --seed" + (" or a larger --holdout" if what == "holdout" else "")
            raise DataError(f"the masks of the {what}'s {len(rows)} images hold {held}; {remedy}, or add images")


def without_stage_fields(space: SearchSpace, common: Recipe, asked: Asked, say: Say) -> SearchSpace:
    """A recipe with stages has its rates in them: what the space varies of them would have no effect.

    Raises:
        RecipeError: ``--set`` names such a field, or nothing is left to search.
    """
    if common.stages:
        fixed = ["lr", "lr_low", "trainable", "frozen"]
        fixed += ["weight_decay"] if all(stage.weight_decay is not None for stage in common.stages) else []
        if pinned := [name for name in fixed if name in (asked.pins or {})]:
            raise RecipeError(
                f"--set {', '.join(pinned)}: the recipe's stages fix it; set the stages themselves, or --set stages=[]"
            )
        if idle := [name for name in fixed if name in space.parameters]:
            say(f"not searched, since the recipe's stages fix them: {', '.join(idle)}")
            space = replace(space, parameters={name: p for name, p in space.parameters.items() if name not in idle})
    if not space.parameters:
        raise RecipeError(
            "nothing is left to search: every field of the space is fixed; use `pcam-automl train`, or another --space"
        )
    return space


def check_options(asked: Asked) -> None:
    """Options that can be judged without data.

    Raises:
        RecipeError, DataError, InputError: an unknown device, sampler or pruner, a value of ``--set`` that no recipe
            can have, a holdout out of range, or two budgets.
    """
    choose_device(asked.device)
    build_sampler(asked.sampler or "tpe", 0)
    if asked.cost_aware:
        check_cost_aware(asked.sampler or "tpe")
    build_pruner(asked.pruner or "asha", rungs=[1, 2])
    goal, split_by = goal_of(asked.objective or AUC.name), split_of(asked.split_by)
    if goal.name == "worst_domain_auc" and split_by == "domains":
        raise InputError(
            "--objective worst_domain_auc compares domains, but with --split domains the validation fold is a single one; "
            "take --objective auc, which is then the AUC of a domain that training has not seen"
        )
    if asked.estimate_domains and asked.domains is not None:
        raise InputError(f"--domains {asked.domains} and --domains {ESTIMATE} exclude each other; keep one")
    if asked.holdout is not None and not 0.0 <= asked.holdout <= LARGEST_HOLDOUT:
        raise DataError(f"--holdout must be in [0, {LARGEST_HOLDOUT}], got {asked.holdout}")
    if asked.views is not None and (named := {"views", "epochs"} & set(asked.pins or {})):
        raise RecipeError(f"--views {asked.views} and --set {', '.join(sorted(named))} both name the budget; keep one")
    check_pins(asked.pins or {})
    if asked.artifacts is not None:
        parse_s3(asked.artifacts)
    if asked.grace_s is not None and asked.grace_s < LEAST_GRACE_S:
        raise InputError(f"--grace must be at least {LEAST_GRACE_S:.0f}s, got {asked.grace_s:g}s")
    if asked.prior not in (None, NONE):
        load_prior(asked.prior)
    if asked.probe not in (None, *MODES):
        raise RecipeError(f"--probe must be one of {', '.join(MODES)}, got {asked.probe!r}")
    if asked.deterministic and asked.views is None and not {"views", "epochs"} & set(asked.pins or {}):
        raise RecipeError(
            "--deterministic needs --views (or --set epochs): by default the measured speed decides how much a trial trains"
        )


def drop_backbones_without_weights(space: SearchSpace, weights: Weights, say: Say) -> SearchSpace:
    """Leave out, by name, the backbones that the weights folder or hub does not have.

    Raises:
        RecipeError: none is left.
    """
    names = space.choices("backbone")
    if not space.base["pretrained"]:
        return space
    missing = [name for name in names if not weights.has(name)]
    if missing and len(missing) == len(names):
        raise RecipeError(
            f"no backbone of the space has weights in {weights} (it wants {first_few(names)}); "
            "name one with --set backbone=NAME, or give --weights none"
        )
    if missing:
        say(f"left out, no weights in {weights}: {', '.join(missing)}")
        return space.without_choices("backbone", missing)
    return space
