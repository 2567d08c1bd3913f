"""The network of a recipe: timm's backbones, the notebooks' own, heads and decoders. No weights policy, no training."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

from pcam_automl.errors import RecipeError, did_you_mean
from pcam_automl.models import cnn, unet
from pcam_automl.models.head import build_head
from pcam_automl.models.layers import classifier_parameters, head_modules
from pcam_automl.models.weights import Weights, load_folder_weights
from pcam_automl.recipe import CENTRE_PX, Recipe

LARGEST_PROBED_PX = 384
LARGEST_CLASSIFIER = 3.0
"""Root mean square of a last layer's weights times the root of its inputs; torch draws 0.6, Keras 1.4."""
_CNN_FIELDS = tuple(name for name in Recipe.model_fields if name.startswith("cnn_"))
_CANNOT_RUN = (RuntimeError, AssertionError, ValueError, IndexError, ZeroDivisionError)

__all__ = [
    "Normalisation",
    "build_network",
    "check_backbone",
    "check_runs",
    "classifier_parameters",
    "logit_of",
    "n_keras_parameters",
    "n_parameters",
    "normalisation",
    "normalisation_of",
    "smallest_input",
]

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


def normalisation_of(
    recipe: Recipe, channel_mean: Sequence[float] | None = None, channel_std: Sequence[float] | None = None
) -> Normalisation:
    """The normalisation that the recipe asks for.

    Args:
        recipe: its ``normalise`` and ``backbone`` are used.
        channel_mean: (3,) of the training patches on the scale [0, 1]; needed for ``dataset`` alone.
        channel_std: (3,) their standard deviations, above 0.

    Raises:
        RecipeError: ``dataset`` without statistics, or a channel that never varies.
    """
    if recipe.normalise == "unit":
        return Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    if recipe.normalise == "backbone":
        return normalisation(recipe.backbone)
    if channel_mean is None or channel_std is None:
        raise RecipeError(
            "recipe.normalise dataset needs the training set's channel statistics; use backbone or unit where there are none"
        )
    (r, g, b), (sr, sg, sb) = (tuple(float(v) for v in values) for values in (channel_mean, channel_std))
    if min(sr, sg, sb) <= 0.0:
        raise RecipeError(
            f"recipe.normalise dataset: the standard deviations must be above 0, got {sr:g}, {sg:g}, {sb:g}; use backbone"
        )
    return Normalisation((r, g, b), (sr, sg, sb))


def _create(name: str, px: int, *, num_classes: int = 1, **options: Any) -> nn.Module:
    """Timm's factory; networks with a fixed input size are asked for a dynamic one, or for ``px``."""
    config = timm.get_pretrained_cfg(name)
    sizes: list[dict[str, Any]] = [{}]
    if config is not None and config.fixed_input_size:
        sizes = [{"dynamic_img_size": True, "dynamic_img_pad": True}, {"img_size": px}, {}]
    for size in sizes[:-1]:
        try:
            return timm.create_model(name, num_classes=num_classes, **size, **options)
        except TypeError:  # this architecture does not take that option
            continue
    return timm.create_model(name, num_classes=num_classes, **sizes[-1], **options)


def smallest_input(name: str) -> int:
    """The smallest even input side in [32, 384] px at which the backbone runs and still sees the picture.

    Found by running the architecture on torch's meta device, which computes shapes and no values. Networks for dense
    tasks take any multiple of 16.

    Raises:
        RecipeError: it runs at none of them.
    """
    return _smallest_input(name, ())


@functools.cache
def _smallest_input(name: str, options: tuple[tuple[str, Any], ...]) -> int:
    check_backbone(name)
    if name in unet.OPTIONS:
        return 16

    def runs(px: int) -> bool:
        try:
            with torch.device("meta"):
                network = _create(name, px, **dict(options))
                return tuple(network(torch.empty(2, 3, px, px)).shape) == (2, 1)
        except _CANNOT_RUN:
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


def _cnn_options(recipe: Recipe) -> Mapping[str, Any]:
    """The ``cnn_*`` fields that are given, without their prefix."""
    given = {name.removeprefix("cnn_"): getattr(recipe, name) for name in _CNN_FIELDS}
    return {name: value for name, value in given.items() if value is not None}


def network_faults(recipe: Recipe) -> list[str]:
    """Fields that do not go together with the recipe's backbone."""
    name, faults = recipe.backbone, []
    taken = cnn.OPTIONS if name in cnn.NETWORKS else unet.OPTIONS.get(name, frozenset())
    for option in _cnn_options(recipe):
        if option not in taken:
            own = ", ".join(f"cnn_{known}" for known in sorted(taken))
            remedy = f"it takes {own}" if taken else f"leave it out, or use one of {', '.join(cnn.NETWORKS)}"
            faults.append(f"recipe.cnn_{option} is no option of backbone {name}; {remedy}")
    if recipe.task == "patch" and name in unet.OPTIONS:
        faults.append(f"recipe.backbone {name} gives one answer a pixel; it needs task dense, got task patch")
    if recipe.head != "linear" and name in cnn.NETWORKS:
        faults.append(f"recipe.head must be linear for {name}, whose dense layers are cnn_dense, got {recipe.head}")
    if recipe.task == "dense" and recipe.decoder == "none" and name not in unet.OPTIONS:
        faults.append(
            f"recipe.backbone {name} gives no answer a pixel by itself; "
            f"add decoder: unet, or use one of {', '.join(unet.OPTIONS)}"
        )
    if recipe.decoder == "unet" and (name in unet.OPTIONS or name in cnn.NETWORKS):
        faults.append(
            f"recipe.decoder unet needs one of timm's own backbones, got {name}; set decoder: none or another"
        )
    return faults


def check_runs(recipe: Recipe) -> None:
    """Say before any training starts whether the recipe's network exists and can take the recipe's input.

    Raises:
        RecipeError: unknown backbone, fields that do not fit it, or an input that it cannot take.
    """
    check_backbone(recipe.backbone)
    if faults := network_faults(recipe):
        raise RecipeError("; ".join(faults))
    if recipe.task == "dense":
        _check_tile(recipe)
        return
    least = _smallest_input(recipe.backbone, tuple(_cnn_options(recipe).items()))
    if recipe.network_px < least:
        raise RecipeError(
            f"recipe.input_size must be at least {least} for {recipe.backbone}, got {recipe.network_px} "
            f"(crop_size {recipe.crop_size}); set input_size={least}"
        )


def _check_tile(recipe: Recipe) -> None:
    px = recipe.network_px
    if recipe.decoder == "unet":
        try:
            with torch.device("meta"):
                unet.TimmUnet(recipe.backbone)(torch.empty(2, 3, px, px))
        except _CANNOT_RUN as fault:
            reason = " ".join(str(fault).split())[:120]
            raise RecipeError(
                f"recipe.tile_size: {recipe.backbone} with decoder unet cannot take tiles of {px} px ({reason}); "
                "try a larger tile_size or another backbone"
            ) from None
    elif recipe.backbone == "unet":
        multiple = 2 ** (len(recipe.cnn_filters or unet.UNET_FILTERS) - 1)
        if px % multiple:
            raise RecipeError(
                f"recipe.tile_size must be a multiple of {multiple} for a unet of {multiple.bit_length()} levels, got {px}"
            )


def build_network(recipe: Recipe, weights: Weights, *, seed: int) -> nn.Module:
    """The recipe's network on the CPU: images (B, 3, px, px) normalised -> logits (see :func:`logit_of`).

    Task patch gives (B, 1), task dense (B, 1, px, px) or (B, 2, px, px).

    Args:
        recipe: its backbone, head, decoder, sizes, dropout and ``pretrained`` are used.
        weights: where pretrained weights are found.
        seed: for the initial weights.

    Raises:
        RecipeError: unknown backbone, fields that do not fit it, input too small, or no weights for it.
    """
    check_runs(recipe)
    torch.manual_seed(seed)
    name, px = recipe.backbone, recipe.network_px
    if recipe.decoder == "unet":
        network = unet.TimmUnet(name, drop_rate=recipe.dropout)
        if recipe.pretrained:
            network.load_encoder(_backbone(recipe, weights, num_classes=0))
        return network
    if name in unet.OPTIONS:
        return _backbone(recipe, weights, num_classes=2, drop_rate=recipe.dropout, **_cnn_options(recipe))
    if recipe.head == "linear":
        return _backbone(recipe, weights, num_classes=1, drop_rate=recipe.dropout, **_cnn_options(recipe))
    backbone = _backbone(recipe, weights, num_classes=0)
    return build_head(backbone, recipe.head, name, recipe.hidden, dropout=recipe.dropout, px=px)


def _backbone(recipe: Recipe, weights: Weights, **options: Any) -> nn.Module:
    """Timm's network, its pretrained weights loaded where the recipe wants them.

    Raises:
        RecipeError: there are none.
    """
    name = recipe.backbone
    if recipe.pretrained and weights.kind == "none":
        raise RecipeError(
            f"recipe.pretrained is true for {name}, but weights are 'none'; give --weights hub or a folder"
        )
    if recipe.pretrained and weights.kind == "hub" and not weights.has(name):
        raise RecipeError(f"recipe.pretrained is true, but timm has no weights for {name}; set pretrained: false")
    network = _create(name, recipe.network_px, pretrained=recipe.pretrained and weights.kind == "hub", **options)
    network = _calm_classifier(network)
    if recipe.pretrained and weights.kind == "folder":
        load_folder_weights(network, name, weights)
    return network


@torch.no_grad()
def _calm_classifier(network: nn.Module) -> nn.Module:
    """The network, its new last layer drawn again as torch draws one where its architecture makes it far larger.

    Timm draws that of efficientnets, mobile nets and their kin from ±1/sqrt(outputs): ±0.03 for ImageNet's classes, but ±1 for a
    single logit, so that a fine-tuning begins with logits of ±20 and a loss of 3 instead of 0.7.
    """
    for layer in (module for part in head_modules(network) for module in part.modules()):
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and not layer.weight.is_meta:
            rms = float(layer.weight.square().mean().sqrt())
            if rms * math.sqrt(layer.weight[0].numel()) > LARGEST_CLASSIFIER:
                layer.reset_parameters()
    return network


def logit_of(output: Tensor) -> Tensor:
    """One logit for each answer: (B, 1) -> (B,), (B, 1, H, W) -> (B, H, W), (B, 2, H, W) -> (B, H, W).

    Of two classes it is the difference: the softmax of two is the sigmoid of their difference, and cross-entropy over
    the two is binary cross-entropy on it.
    """
    return output[:, 0] if output.shape[1] == 1 else output[:, 1] - output[:, 0]


def n_parameters(network: nn.Module) -> int:
    """Number of trainable and frozen parameters, buffers left out."""
    return sum(parameter.numel() for parameter in network.parameters())


def n_keras_parameters(network: nn.Module) -> int:
    """Number of parameters as Keras counts them: with the running means and variances of batch norms."""
    return n_parameters(network) + sum(b.numel() for b in network.buffers() if b.is_floating_point())
