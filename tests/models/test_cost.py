"""Costs by shapes: ordered as networks are, growing as pixels do."""

from __future__ import annotations

import pytest
import torch

from pcam_automl.models.cost import training_cost
from pcam_automl.recipe import build_recipe


def cost(backbone: str, px: int = 64, **fields: object) -> float:
    return training_cost(build_recipe({"backbone": backbone, "crop_size": px, **fields}))


def test_larger_networks_cost_more_and_wide_maps_count_beside_arithmetic() -> None:
    assert cost("resnet10t") < cost("resnet18") < cost("resnet50")
    # A fifth of resnet18's arithmetic, three times its maps: measured nearly as slow.
    assert cost("tf_efficientnet_lite0") == pytest.approx(cost("resnet18"), rel=0.3)


def test_a_convolutional_network_costs_what_its_pixels_do() -> None:
    assert cost("resnet18", 64) / cost("resnet18", 32) == pytest.approx(4.0, rel=0.02)


def test_every_kind_of_network_has_a_cost() -> None:
    assert cost("vit_tiny_patch16_224") > 0
    assert cost("keras_cnn_1") > 0
    assert cost("resnet18", head="mlp", hidden=(8,)) > cost("resnet18")
    dense = build_recipe({"task": "dense", "backbone": "resnet10t", "decoder": "unet", "tile_size": 64})
    assert training_cost(dense) > cost("resnet10t")


def test_it_computes_nothing() -> None:
    with torch.device("meta"):
        assert cost("test_resnet", pretrained=True) == cost("test_resnet")
