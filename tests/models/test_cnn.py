"""The notebooks' small networks: parameters, shapes, options, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

from pcam_automl.errors import RecipeError
from pcam_automl.models.cnn import NETWORKS, ElementPReLU
from pcam_automl.models.factory import (
    build_network,
    check_runs,
    classifier_parameters,
    n_keras_parameters,
    n_parameters,
    normalisation,
    smallest_input,
)
from pcam_automl.models.weights import Weights
from pcam_automl.recipe import Recipe

SCRATCH = Weights("none")


def built(name: str, **fields: Any) -> nn.Module:
    with torch.device("meta"):
        return build_network(Recipe(backbone=name, **{"crop_size": 96, **fields}), SCRATCH, seed=0)


def published_parts(network: nn.Module) -> tuple[int, ...]:
    """Parameters of each block and of the top, as the notebooks' summaries add them up."""
    blocks = [n_keras_parameters(block) for block in network.features]  # type: ignore[union-attr, attr-defined]
    return (*blocks, n_keras_parameters(network) - sum(blocks))


def test_keras_networks_have_the_published_parameters() -> None:
    one, two = built("keras_cnn_1", input_size=64), built("keras_cnn_2", input_size=64)
    # published 14,144 for the second block counts 256 of two batch norms that the notebook's code never calls
    assert published_parts(one) == (2_768, 14_144 - 256, 1_384_961)
    assert published_parts(two) == (10_400, 18_752, 2_769_921)


@pytest.mark.parametrize(
    ("name", "published"), [("cnn_basic", 36_350_881), ("cnn_deep", 1_846_817), ("cnn_prelu", 3_510_913)]
)
def test_three_networks_have_the_parameters_of_their_notebooks_code(name: str, published: int) -> None:
    assert n_keras_parameters(built(name)) == published


def test_prelu_networks_text_counts_the_blocks_alone() -> None:
    *blocks, _ = published_parts(built("cnn_prelu"))
    assert sum(blocks) == 2_771_904  # "2.8 M"


def test_running_statistics_count_and_step_counters_do_not() -> None:
    assert n_keras_parameters(nn.BatchNorm2d(8)) == 32
    assert n_parameters(nn.BatchNorm2d(8)) == 16


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_timms_and_run_from_their_smallest_input_on(name: str) -> None:
    assert timm.is_model(name)
    least = smallest_input(name)
    assert least <= NETWORKS[name][1]
    for px in (least, 96):
        assert built(name, input_size=px)(torch.empty(2, 3, px, px, device="meta")).shape == (2, 1)
    if least > 32:
        with pytest.raises(RecipeError, match=f"input_size must be at least {least} for {name}, got {least - 2}"):
            built(name, input_size=least - 2)
    assert normalisation(name).std == (1.0, 1.0, 1.0)


def test_features_and_head_make_up_the_network_as_timms_users_expect() -> None:
    network = build_network(Recipe(backbone="keras_cnn_2", input_size=64), SCRATCH, seed=0).eval()
    images = torch.rand(2, 3, 64, 64)
    features = network.forward_features(images)  # type: ignore[operator]
    assert features.shape == (2, network.num_features, 13, 13)
    assert torch.equal(network.forward_head(features), network(images))  # type: ignore[operator]
    assert network.forward_head(features, pre_logits=True).shape == (2, 512)  # type: ignore[operator]
    assert sum(p.numel() for p in classifier_parameters(network)) == 513
    assert network.default_cfg["classifier"] == "fc"  # type: ignore[index]
    network.reset_classifier(0)  # type: ignore[operator]
    assert network(images).shape == (2, 512)


def test_initial_values_and_batch_norm_are_those_of_keras() -> None:
    network = build_network(Recipe(backbone="keras_cnn_2", input_size=64), SCRATCH, seed=0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.eps, module.momentum) == (1e-3, pytest.approx(0.01))
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert not module.bias.any()
            fans = nn.init._calculate_fan_in_and_fan_out(module.weight)
            limit = (6 / sum(fans)) ** 0.5
            assert 0.9 * limit < module.weight.abs().max() <= limit or module.weight.numel() < 600


def test_flattened_in_the_order_height_width_channels() -> None:
    network = build_network(Recipe(backbone="keras_cnn_1", input_size=64), SCRATCH, seed=0).eval()
    features = torch.rand(1, 32, 13, 13)
    with torch.no_grad():
        expected = network.top[0](features[0].permute(1, 2, 0).reshape(1, -1))  # type: ignore[index, operator]
        got = network.top[0](features.permute(0, 2, 3, 1).flatten(1))  # type: ignore[index, operator]
        assert torch.equal(network.top[1](expected), network.forward_head(features, pre_logits=True))  # type: ignore[index, operator]
    assert torch.equal(expected, got)


def test_prelu_has_a_slope_for_every_element_and_starts_at_a_quarter() -> None:
    layer = ElementPReLU(2, 3, 4)
    x = torch.randn(5, 2, 3, 4)
    assert torch.allclose(layer(x), nn.functional.leaky_relu(x, 0.25))
    layer(-torch.ones(1, 2, 3, 4)).sum().backward()
    assert torch.equal(layer.slope.grad, -torch.ones(2, 3, 4))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("option", "check"),
    [
        ({"cnn_filters": [8, 8, 8]}, lambda net: len(net.features) == 3),
        ({"cnn_convs": 3}, lambda net: sum(isinstance(m, nn.Conv2d) for m in net.modules()) == 6),
        ({"cnn_kernel": 5}, lambda net: net.features[0][0].kernel_size == (5, 5)),
        ({"cnn_activation": "gelu"}, lambda net: not any(isinstance(m, nn.ReLU) for m in net.modules())),
        ({"cnn_pool": "avg"}, lambda net: not any(isinstance(m, nn.MaxPool2d) for m in net.modules())),
        ({"cnn_norm": "block"}, lambda net: sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == 2),
        ({"cnn_norm": "each"}, lambda net: sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == 4),
        (
            {"cnn_dropout": 0.3},
            lambda net: [m.p for m in net.features.modules() if isinstance(m, nn.Dropout)] == [0.3] * 2,
        ),
        ({"cnn_dense": [32, 16]}, lambda net: net.fc.in_features == 16),
        ({"cnn_dense": []}, lambda net: net.fc.in_features == 13 * 13 * 32),
        ({"dropout": 0.4}, lambda net: net.drop.p == 0.4),
    ],
)
def test_a_recipes_options_replace_the_networks_own(option: dict[str, Any], check: Any) -> None:
    network = built("keras_cnn_1", input_size=64, **option)
    assert check(network)
    assert network(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 1)


def test_options_move_the_smallest_input() -> None:
    with pytest.raises(RecipeError, match="input_size must be at least 40 for keras_cnn_1, got 32"):
        check_runs(Recipe(backbone="keras_cnn_1", crop_size=32, cnn_kernel=7))


def test_options_on_any_other_backbone_name_field_and_backbone_all_at_once() -> None:
    with pytest.raises(RecipeError, match=r"cnn_filters is no option of backbone test_resnet.*cnn_pool is no option"):
        check_runs(Recipe(backbone="test_resnet", cnn_filters=[8], cnn_pool="avg"))


@pytest.mark.parametrize("head", ["mlp", "fastai"])
def test_only_the_linear_head_goes_with_them(head: str) -> None:
    with pytest.raises(
        RecipeError, match=f"head must be linear for cnn_deep, whose dense layers are cnn_dense, got {head}"
    ):
        check_runs(Recipe(backbone="cnn_deep", crop_size=96, head=head, hidden=[8]))


def test_they_have_no_pretrained_weights() -> None:
    with pytest.raises(RecipeError, match="timm has no weights for keras_cnn_1; set pretrained: false"):
        build_network(Recipe(backbone="keras_cnn_1", pretrained=True), Weights("hub"), seed=0)
