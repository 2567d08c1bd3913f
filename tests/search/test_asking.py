"""Whether a study's networks are pretrained, and by which weights: options, the space and the recipe, in that order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pcam_automl.errors import RecipeError
from pcam_automl.search.asking import with_weights
from pcam_automl.search.space import SearchSpace, load_space, parse_space
from pcam_automl.search.study import Asked

PARAMETERS = "parameters: {backbone: {choice: [resnet10t, resnet18]}, lr: {float: [1.0e-3, 1.0e-2], log: true}}"
FIXED_FALSE, FIXED_TRUE = (f"base: {{pretrained: {value}}}\n{PARAMETERS}" for value in ("false", "true"))


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Weights of one of the two networks; their contents are not looked at."""
    save_file({"a": torch.zeros(1)}, tmp_path / "resnet18.safetensors")
    return str(tmp_path)


def decided(text: str = PARAMETERS, **options: Any) -> tuple[SearchSpace, str, str]:
    said: list[str] = []
    asked = Asked(**options)
    space, weights = with_weights(parse_space(text, "s").pinned(asked.pins or {}), asked, said.append)
    return space, weights.kind, said[0]


def test_given_weights_are_used_whatever_the_recipe(folder: str) -> None:
    for recipe in (None, "default", "keras_cnn_1"):
        space, kind, said = decided(weights=folder, recipe=recipe)
        assert (space.base["pretrained"], kind) == (True, "folder")
        assert said.startswith(f"weights: pretrained, from {folder}")
        assert space.choices("backbone") == ("resnet18",), "resnet10t has none there"


def test_the_default_recipe_looks_for_weights_named_or_not() -> None:
    for recipe in (None, "default"):
        space, kind, said = decided(recipe=recipe)  # the hub does not answer here
        assert (space.base["pretrained"], kind) == (False, "none")
        assert said.startswith("weights: FROM SCRATCH, since timm's hub did not answer")


def test_a_recipe_made_to_train_from_scratch_asks_no_hub_and_says_so() -> None:
    space, kind, said = decided(recipe="keras_cnn_1")
    assert (space.base["pretrained"], kind, said) == (False, "none", "weights: from scratch")


def test_a_space_or_an_option_that_fixes_pretrained_is_heard(folder: str) -> None:
    for text, pins in ((FIXED_FALSE, {}), (PARAMETERS, {"pretrained": False}), (FIXED_TRUE, {"pretrained": False})):
        space, _, said = decided(text, pins=pins, weights=folder)
        assert space.base["pretrained"] is False
        assert said == "weights: from scratch, since pretrained is set to false"
        assert len(space.choices("backbone")) == 2, "none needs weights"
    assert decided(FIXED_FALSE)[2] == "weights: from scratch", "no hub is asked"
    assert decided(FIXED_FALSE, pins={"pretrained": True}, weights=folder)[0].base["pretrained"] is True


@pytest.mark.parametrize("weights", [None, "none"])
def test_pretrained_networks_without_weights_are_refused_before_a_study_is_made(weights: str | None) -> None:
    with pytest.raises(
        RecipeError, match=r"pretrained is set to true, and there are none .* give --weights DIR or hub"
    ):
        decided(weights=weights, pins={"pretrained": True})


def test_pretrained_is_no_dimension_of_a_search(folder: str) -> None:
    text = PARAMETERS.replace("parameters: {", "parameters: {pretrained: {choice: [true, false]}, ")
    with pytest.raises(RecipeError, match=r"space\.parameters\.pretrained cannot be searched"):
        decided(text, weights=folder)
    assert decided(text, pins={"pretrained": False})[0].base["pretrained"] is False


def test_networks_that_nobody_has_weights_of_are_searched_where_the_hub_answers(folder: str) -> None:
    space, _ = with_weights(load_space("cnn"), Asked(space="cnn", weights=folder), lambda text: None)
    assert space.base["pretrained"] is False
    assert len(space.choices("backbone")) == 2
