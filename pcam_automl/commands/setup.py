"""What commands that train one recipe share: recipe, weights, data, split, device. Trains nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pcam_automl import terminal
from pcam_automl.config import find_data, storage_url, studies_folder
from pcam_automl.configs_folder import find_config
from pcam_automl.data.packs import find_pack
from pcam_automl.data.splits import Split
from pcam_automl.data.store import PatchStore
from pcam_automl.models.factory import check_runs
from pcam_automl.models.weights import Weights, decide_weights
from pcam_automl.recipe import Recipe
from pcam_automl.recipe_files import load_recipe
from pcam_automl.train import training_split
from pcam_automl.training.compute import use_device
from pcam_automl.training.speed import SpeedBook
from pcam_automl.training.start import absent_ids, check_task, unseen_border


@dataclass(frozen=True)
class DataOptions:
    """Where the data come from and how they are split, as the user gave it."""

    data: Path | None = None
    groups: Path | None = None
    domains: Path | None = None
    fold: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Setup:
    """Everything that a training of one recipe needs, judged before it starts.

    Attributes:
        name: the recipe's, as the user gave it.
        recipe: with the overrides, ``pretrained`` as the weights allow.
        store: the pack.
        split: which rows may be used.
        train_rows: to train on, in nested order.
        score_rows: to validate on.
        fold: the one that validates; None where a share of the slides does (``valid_share``).
        weights: where pretrained weights come from.
        device: where to train.
        speed: remembered measurements.
    """

    name: str
    recipe: Recipe
    store: PatchStore
    split: Split
    train_rows: np.ndarray
    score_rows: np.ndarray
    fold: int | None
    weights: Weights
    device: torch.device
    speed: SpeedBook


def set_up(
    name: str,
    pins: dict[str, Any],
    options: DataOptions,
    *,
    weights: str | None,
    device: str,
    deterministic: bool = False,
) -> Setup:
    """Read the recipe, decide on weights, open the data, split them.

    Raises:
        RecipeError, DataError, InputError: anything at fault, before a step is taken.
    """
    recipe, place = (
        load_recipe(find_config("recipes", name), overrides=pins),
        use_device(device, deterministic=deterministic),
    )
    path = find_data(options.data)
    source, text = decide_weights(weights or ("auto" if recipe.pretrained else "none"))
    if recipe.pretrained or weights:
        terminal.say(text)
    recipe = load_recipe(find_config("recipes", name), overrides={"pretrained": source.pretrained, **pins})
    check_runs(recipe)
    if not recipe.pretrained and min(phase.trainable for phase in recipe.phases) < 1.0:
        terminal.say(
            "warning: the backbone starts from random weights and parts of it never or only later train; "
            "give --weights, or --set trainable=1 (recipes without stages)"
        )
    folder = studies_folder(storage_url(None))
    with terminal.counting("packing") as call:
        store = find_pack(
            path, folder / "packs", groups=options.groups, domains=options.domains, say=terminal.say, call=call
        )
    check_task(recipe, store)
    for warning in (absent_ids(store, recipe), unseen_border(recipe, store)):
        if warning:
            terminal.say(warning)
    split, train_rows, score_rows, fold = training_split(store, recipe, seed=options.seed, fold=options.fold)
    for note in split.notes:
        terminal.say(note)
    if recipe.valid_share is not None and fold is not None:
        terminal.say("the data have an official validation part: validated on that, valid_share is not used")
    speed = SpeedBook(folder / "speed.json", deterministic=deterministic)
    return Setup(name, recipe, store, split, train_rows, score_rows, fold, source, place, speed)
