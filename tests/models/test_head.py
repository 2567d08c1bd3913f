"""Heads with dense layers behind timm's backbones."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from pcam_automl.errors import RecipeError
from pcam_automl.models.factory import build_network, classifier_parameters, n_parameters
from pcam_automl.models.weights import Weights
from pcam_automl.recipe import Recipe

SCRATCH = Weights("none")


def kinds(head: nn.Module) -> list[str]:
    return [type(layer).__name__ for layer in head.children()]


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext", "test_vit"])
@pytest.mark.parametrize("hidden", [(), (16, 8)])
def test_mlp_head_on_convolutions_and_tokens(name: str, hidden: tuple[int, ...]) -> None:
    recipe = Recipe(backbone=name, head="mlp", hidden=hidden, dropout=0.2, crop_size=48)
    network = build_network(recipe, SCRATCH, seed=0)
    assert network(torch.rand(4, 3, 48, 48)).shape == (4, 1)
    assert kinds(network.head) == ["Dropout", *["Linear", "ReLU", "BatchNorm1d"] * len(hidden), "Linear"]  # type: ignore[arg-type]
    assert network.head[0].p == 0.2  # type: ignore[index, union-attr]


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext", "mobilenetv3_small_050"])
def test_fastai_head_pools_twice_and_halves_its_first_dropouts(name: str) -> None:
    recipe = Recipe(backbone=name, head="fastai", hidden=(16,), dropout=0.5, crop_size=48)
    network = build_network(recipe, SCRATCH, seed=0)
    assert network(torch.rand(4, 3, 48, 48)).shape == (4, 1)
    head = network.head
    assert kinds(head) == ["BatchNorm1d", "Dropout", "Linear", "ReLU", "BatchNorm1d", "Dropout", "Linear"]  # type: ignore[arg-type]
    assert head[0].num_features == 2 * network.backbone.num_features  # type: ignore[index, union-attr]
    assert (head[1].p, head[5].p, head[2].bias) == (0.25, 0.5, None)  # type: ignore[index, union-attr]


def test_fastai_head_concatenates_average_and_maximum() -> None:
    network = build_network(Recipe(backbone="test_resnet", head="fastai"), SCRATCH, seed=0).eval()
    images = torch.rand(2, 3, 64, 64)
    features = network.backbone.forward_features(images)  # type: ignore[operator, union-attr]
    pooled = torch.cat([features.mean((2, 3)), features.flatten(2).max(2).values], dim=1)
    assert torch.allclose(network.head(pooled), network(images))  # type: ignore[operator]


def test_fastai_head_refuses_tokens() -> None:
    with pytest.raises(RecipeError, match="head fastai pools a map of features, but test_vit gives tokens"):
        build_network(Recipe(backbone="test_vit", head="fastai"), SCRATCH, seed=0)


def test_the_head_is_what_trains_alone() -> None:
    network = build_network(Recipe(backbone="test_resnet", head="mlp", hidden=(16,)), SCRATCH, seed=0)
    assert sum(p.numel() for p in classifier_parameters(network)) == n_parameters(network.head)  # type: ignore[arg-type]


def test_the_transfer_recipes_network_in_keras_and_here() -> None:
    with torch.device("meta"):
        recipe = Recipe(backbone="resnetv2_152", crop_size=96, head="mlp", hidden=(64, 64), dropout=0.2)
        network = build_network(recipe, SCRATCH, seed=0)
    # Keras' ResNet152V2 has 58,331,648 with 51,776 biases of convolutions that timm's leaves out
    from pcam_automl.models.factory import n_keras_parameters

    head = (2048 * 64 + 64) + 4 * 64 + (64 * 64 + 64) + 4 * 64 + 65
    assert n_keras_parameters(network) == 58_331_648 - 51_776 + head


def test_pretrained_weights_go_into_the_backbone_and_the_head_stays_fresh(tmp_path: Path) -> None:
    torch.manual_seed(5)
    plain = timm.create_model("test_resnet", num_classes=1000)
    save_file(plain.state_dict(), tmp_path / "test_resnet.safetensors")
    recipe = Recipe(backbone="test_resnet", head="mlp", hidden=(8,), pretrained=True)
    network = build_network(recipe, Weights("folder", tmp_path), seed=0)
    expected = plain.state_dict()
    state = network.backbone.state_dict()  # type: ignore[union-attr]
    assert state
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
