"""Networks with an answer for every pixel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from pcam_automl.errors import RecipeError
from pcam_automl.models.factory import (
    build_network,
    check_runs,
    classifier_parameters,
    logit_of,
    n_parameters,
    smallest_input,
)
from pcam_automl.models.weights import Weights
from pcam_automl.recipe import Recipe

SCRATCH = Weights("none")


def dense(**fields: Any) -> Recipe:
    return Recipe(**{"task": "dense", "tile_size": 96, **fields})


def test_unet_has_the_published_parameters() -> None:
    with torch.device("meta"):
        network = build_network(dense(backbone="unet", tile_size=512), SCRATCH, seed=0)
        assert network(torch.empty(1, 3, 512, 512)).shape == (1, 2, 512, 512)
    assert n_parameters(network) == 31_031_810


def test_unet_has_no_batch_norm_and_a_last_stage_without_activation() -> None:
    with torch.device("meta"):
        network = build_network(dense(backbone="unet"), SCRATCH, seed=0)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    activations = [sum(isinstance(m, nn.ReLU) for m in stage) for stage in network.merge]  # type: ignore[union-attr]
    assert activations == [2, 2, 2, 0]


def test_unets_logits_are_finite_at_96_px() -> None:
    network = build_network(dense(backbone="unet", cnn_filters=(8, 16, 32, 64, 128)), SCRATCH, seed=0)
    output = network(torch.rand(2, 3, 96, 96))
    assert output.shape == (2, 2, 96, 96)
    assert torch.isfinite(logit_of(output)).all()
    assert sum(p.numel() for p in classifier_parameters(network)) == 2 * 8 + 2


@pytest.mark.parametrize(("kernel", "count"), [(None, 56), (1, 8), (5, 152)])
def test_the_baseline_is_one_convolution(kernel: int | None, count: int) -> None:
    network = build_network(dense(backbone="dense_linear", cnn_kernel=kernel), SCRATCH, seed=0)
    assert n_parameters(network) == count
    assert network(torch.rand(2, 3, 48, 48)).shape == (2, 2, 48, 48)


@pytest.mark.parametrize("backbone", ["test_resnet", "test_convnext", "test_efficientnet"])
@pytest.mark.parametrize("px", [32, 48, 96])
def test_a_timm_encoder_takes_tiles_of_any_multiple_of_16(backbone: str, px: int) -> None:
    network = build_network(dense(backbone=backbone, decoder="unet", tile_size=px), SCRATCH, seed=0).eval()
    output = network(torch.rand(2, 3, px, px))
    assert output.shape == (2, 1, px, px)
    assert logit_of(output).shape == (2, px, px)


def test_the_head_of_a_timm_unet_is_all_behind_its_encoder() -> None:
    network = build_network(dense(backbone="test_resnet", decoder="unet", dropout=0.3), SCRATCH, seed=0)
    encoder = n_parameters(network.unet.encoder)  # type: ignore[union-attr, arg-type]
    assert sum(p.numel() for p in classifier_parameters(network)) == n_parameters(network) - encoder
    assert [m.p for m in network.modules() if isinstance(m, nn.Dropout) and m.p] == [0.3]


@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet", "test_convnext"])
def test_an_encoder_gets_the_weights_of_timms_file(backbone: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    plain = timm.create_model(backbone, num_classes=1000).eval()
    save_file(plain.state_dict(), tmp_path / f"{backbone}.safetensors")
    recipe = dense(backbone=backbone, decoder="unet", pretrained=True)
    network = build_network(recipe, Weights("folder", tmp_path), seed=0).eval()
    features = timm.create_model(backbone, features_only=True)
    n_maps = len(features.feature_info)
    images = torch.rand(1, 3, 96, 96)
    own = network.unet.encoder(images)[-1]  # type: ignore[union-attr, operator]
    expected = plain.forward_intermediates(images, indices=n_maps, intermediates_only=True)[-1]
    assert torch.allclose(own, expected, atol=1e-5)
    with pytest.raises(RecipeError, match="weights are 'none'"):
        build_network(recipe, SCRATCH, seed=0)


def test_same_seed_same_weights_behind_an_encoder() -> None:
    recipe = dense(backbone="test_resnet", decoder="unet")
    one, two = (build_network(recipe, SCRATCH, seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_cross_entropy_over_two_classes_is_binary_cross_entropy_on_logit_of() -> None:
    output, target = torch.randn(3, 2, 4, 4), torch.randint(0, 2, (3, 4, 4))
    binary = F.binary_cross_entropy_with_logits(logit_of(output), target.float())
    assert torch.allclose(F.cross_entropy(output, target), binary)
    assert torch.equal(logit_of(output[:, :1]), output[:, 0])
    assert logit_of(torch.randn(3, 1)).shape == (3,)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (dense(backbone="test_resnet"), "test_resnet gives no answer a pixel by itself; add decoder: unet, or use one of unet"),
        (dense(backbone="cnn_basic"), "cnn_basic gives no answer a pixel"),
        (Recipe(backbone="unet"), "unet gives one answer a pixel; it needs task dense, got task patch"),
        (Recipe(backbone="dense_linear"), "it needs task dense"),
        (dense(backbone="unet", decoder="unet"), "decoder unet needs one of timm's own backbones, got unet"),
        (dense(backbone="test_vit", decoder="unet"), "test_vit cannot stand before a U-Net decoder"),
        (dense(backbone="unet", tile_size=48, cnn_filters=(4,) * 6), "tile_size must be a multiple of 32 for a unet of 6 levels, got 48"),
        (dense(backbone="inception_resnet_v2", decoder="unet", tile_size=48), "tile_size: inception_resnet_v2 with decoder unet cannot take tiles of 48 px"),
        (dense(backbone="unet", cnn_pool="avg"), "cnn_pool is no option of backbone unet; it takes cnn_filters"),
    ],
)  # fmt: skip
def test_what_cannot_give_a_map_is_refused_with_a_remedy(recipe: Recipe, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check_runs(recipe)


def test_dense_networks_start_at_sixteen_px() -> None:
    assert smallest_input("unet") == smallest_input("dense_linear") == 16
    check_runs(dense(backbone="unet", tile_size=16))
