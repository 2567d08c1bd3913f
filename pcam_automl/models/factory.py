"""Backbones from timm with one output logit. Holds no weights policy (see weights.py) and trains nothing."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

from pcam_automl.errors import RecipeError, did_you_mean
from pcam_automl.models.weights import Weights, load_folder_weights
from pcam_automl.recipe import CENTRE_PX, Recipe

LARGEST_PROBED_PX = 384

logging.getLogger("timm.models._builder").setLevel(logging.ERROR)  # its warnings on num_classes repeat what we ask for


@dataclass(frozen=True)
class Normalisation:
    """Channel means and standard deviations on the scale [0, 1], from the backbone's timm configuration."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def backbone_fault(name: str) -> str | None:
    """What is wrong with a backbone's name, to stand after the key it was given under; None for a timm model."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        return f"must be a timm model name, got {name!r}{did_you_mean(architecture, timm.list_models())}"
    if tag and not timm.models.is_model_pretrained(name):
        tags = timm.list_pretrained(f"{architecture}.*")
        return f"{name!r}: {architecture} has no weights tag {tag!r}{did_you_mean(name, tags)}; drop the tag"
    return None


def check_backbone(name: str) -> None:
    """Accept any timm model name, with or without a weights tag.

    Raises:
        RecipeError: timm has no such model; the nearest name is suggested.
    """
    if (fault := backbone_fault(name)) is not None:
        raise RecipeError(f"recipe.backbone {fault}")


def normalisation(name: str) -> Normalisation:
    """The backbone's own input normalisation (timm's default configuration), also when trained from scratch."""
    check_backbone(name)
    config = timm.get_pretrained_cfg(name)
    if config is None:
        return Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    (r, g, b), (sr, sg, sb) = config.mean, config.std
    return Normalisation((r, g, b), (sr, sg, sb))


def _create(name: str, px: int, **options: Any) -> nn.Module:
    """Timm's factory; networks with a fixed input size are asked for a dynamic one, or for ``px``."""
    config = timm.get_pretrained_cfg(name)
    sizes: list[dict[str, Any]] = [{}]
    if config is not None and config.fixed_input_size:
        sizes = [{"dynamic_img_size": True, "dynamic_img_pad": True}, {"img_size": px}, {}]
    for size in sizes[:-1]:
        try:
            return timm.create_model(name, num_classes=1, **size, **options)
        except TypeError:  # this architecture does not take that option
            continue
    return timm.create_model(name, num_classes=1, **sizes[-1], **options)


@functools.cache
def smallest_input(name: str) -> int:
    """The smallest even input side in [32, 384] px at which the backbone runs and still sees the picture.

    Found by running the architecture on torch's meta device, which computes shapes and no values.

    Raises:
        RecipeError: it runs at none of them.
    """
    check_backbone(name)

    def runs(px: int) -> bool:
        try:
            with torch.device("meta"):
                network = _create(name, px)
                return tuple(network(torch.empty(2, 3, px, px)).shape) == (2, 1)
        except (RuntimeError, AssertionError, ValueError, IndexError, ZeroDivisionError):
            return False

    if runs(CENTRE_PX):
        return CENTRE_PX
    low, high = CENTRE_PX, LARGEST_PROBED_PX
    if not runs(high):
        raise RecipeError(f"recipe.backbone {name} runs at no input between {low} and {high} px; choose another")
    while high - low > 2:
        middle = (low + high) // 4 * 2
        low, high = (low, middle) if runs(middle) else (middle, high)
    return high


def check_runs(recipe: Recipe) -> None:
    """Say before any training starts whether the recipe's network can take the recipe's input.

    Raises:
        RecipeError: unknown backbone, or an input below its smallest.
    """
    least = smallest_input(recipe.backbone)
    if recipe.network_px < least:
        raise RecipeError(
            f"recipe.input_size must be at least {least} for {recipe.backbone}, got {recipe.network_px} "
            f"(crop_size {recipe.crop_size}); set input_size={least}"
        )


def build_network(recipe: Recipe, weights: Weights, *, seed: int) -> nn.Module:
    """The recipe's network on the CPU: images (B, 3, px, px) normalised -> logits (B, 1).

    Args:
        recipe: its backbone, sizes, dropout and ``pretrained`` are used.
        weights: where pretrained weights are found.
        seed: for the initial weights.

    Raises:
        RecipeError: unknown backbone, input too small, or no weights for it.
    """
    check_runs(recipe)
    torch.manual_seed(seed)
    from_hub = recipe.pretrained and weights.kind == "hub"
    network = _create(recipe.backbone, recipe.network_px, drop_rate=recipe.dropout, pretrained=from_hub)
    if recipe.pretrained and weights.kind == "folder":
        load_folder_weights(network, recipe.backbone, weights)
    elif recipe.pretrained and weights.kind == "none":
        raise RecipeError(
            f"recipe.pretrained is true for {recipe.backbone}, but weights are 'none'; give --weights hub or a folder"
        )
    return network


def classifier_parameters(network: nn.Module) -> Iterator[Tensor]:
    """Parameters of the last layer: what trains while the backbone is frozen."""
    classifiers = network.get_classifier()  # type: ignore[operator]
    for module in classifiers if isinstance(classifiers, tuple) else (classifiers,):
        yield from module.parameters()


def n_parameters(network: nn.Module) -> int:
    """Number of trainable and frozen parameters, buffers left out."""
    return sum(parameter.numel() for parameter in network.parameters())
