"""What a network's training costs by its shapes, in units of its own. Runs nothing on a device and times nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pcam_automl.models.factory import build_network
from pcam_automl.models.weights import Weights
from pcam_automl.recipe import Recipe

FLOPS_AN_ACTIVATION = 140
"""One number that a layer gives costs as much time as so many of its floating-point operations.

Fitted on two cores with AVX-512 bf16 to the measured steps of resnet10t, resnet18, resnet50, regnety_004, densenet121,
convnext_atto, tf_efficientnet_lite0 at 64 px: the ratio of two of them is met within a quarter (mobilenetv3_small_100, whose
layers are shorter than what calls them, is twice as slow as estimated). A GPU's ratio of arithmetic to memory gives about 400.
"""


def weight_bytes(recipe: Recipe) -> int:
    """Of the recipe's network in float32."""
    with torch.device("meta"):
        network = build_network(recipe.model_copy(update={"pretrained": False}), Weights("none"), seed=0)
    return 4 * sum(parameter.numel() for parameter in network.parameters())


def training_cost(recipe: Recipe) -> float:
    """Seconds of a training image up to a factor that the device has and the network has not.

    Args:
        recipe: its network and input side; the shapes are followed on torch's meta device.

    Raises:
        RecipeError: the network cannot be built, or its input does not fit.
    """
    px, numbers = recipe.network_px, 0

    def count(module: nn.Module, given: Any, answer: Any) -> None:
        nonlocal numbers
        if isinstance(answer, Tensor):
            numbers += answer.numel()

    with torch.device("meta"), torch.no_grad():
        network = build_network(recipe.model_copy(update={"pretrained": False}), Weights("none"), seed=0).eval()
        for module in network.modules():
            if next(module.children(), None) is None:
                module.register_forward_hook(count)
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 3, px, px))
    return float(counter.get_total_flops() + FLOPS_AN_ACTIVATION * numbers)
