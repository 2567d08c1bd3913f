"""Trainable shares and depth groups."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pcam_automl.models.factory import build_network, classifier_parameters
from pcam_automl.models.layers import backbone_layers, depth_groups, head_modules, set_trainable, trainable_layers
from pcam_automl.models.weights import Weights
from pcam_automl.recipe import Recipe

RECIPES = {
    "resnet": Recipe(backbone="test_resnet"),
    "vit": Recipe(backbone="test_vit"),
    "mlp": Recipe(backbone="test_efficientnet", head="mlp", hidden=(8,)),
    "cnn": Recipe(backbone="keras_cnn_2"),
    "dense": Recipe(task="dense", tile_size=32, backbone="test_resnet", decoder="unet"),
    "linear": Recipe(task="dense", tile_size=32, backbone="dense_linear"),
}


def network_of(name: str) -> nn.Module:
    return build_network(RECIPES[name], Weights("none"), seed=0)


def trains(network: nn.Module) -> set[str]:
    return {name for name, p in network.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", RECIPES)
def test_share_zero_is_the_head_and_share_one_everything(name: str) -> None:
    network = network_of(name)
    head = {id(p) for p in classifier_parameters(network)}
    set_trainable(network, 0.0)
    assert trains(network) == {n for n, p in network.named_parameters() if id(p) in head}
    assert trains(network)
    set_trainable(network, 1.0)
    assert len(trains(network)) == len(list(network.parameters()))
    assert all(module.training for module in network.modules())


@pytest.mark.parametrize("name", ["resnet", "vit", "mlp", "cnn", "dense"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_last_share_of_the_layers_trains(name: str, share: float) -> None:
    network = network_of(name)
    layers = backbone_layers(network)
    set_trainable(network, share)
    states = [all(p.requires_grad for p in layer.parameters(recurse=False)) for layer in layers]
    assert states == sorted(states)  # frozen ones first
    assert 0 <= sum(states) - share * len(layers) < 1
    assert len(trainable_layers(network, share)) == sum(states)


def test_frozen_batch_norms_keep_their_statistics_and_others_do_not() -> None:
    network = network_of("resnet")
    set_trainable(network, 0.3)
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]  # type: ignore[union-attr]
    loss = network(torch.rand(4, 3, 32, 32)).sum()
    loss.backward()
    moved = [not torch.equal(norm.running_mean, old) for norm, old in zip(norms, before, strict=True)]  # type: ignore[arg-type]
    assert moved == [norm.weight.requires_grad for norm in norms]
    assert moved == sorted(moved)
    assert 0 < sum(moved) < len(moved)


def test_dropout_of_the_frozen_part_is_off_and_of_the_head_on() -> None:
    network = build_network(
        Recipe(backbone="cnn_basic", crop_size=32, cnn_filters=(8, 8), dropout=0.5), Weights("none"), seed=0
    )
    set_trainable(network, 0.0)
    inside = [m.training for m in network.features.modules() if isinstance(m, nn.Dropout)]  # type: ignore[union-attr]
    assert inside == [False, False]
    assert network.fc.training  # type: ignore[union-attr]
    assert network.training


def test_called_again_it_changes_nothing_and_after_eval_or_train_it_restores() -> None:
    network = network_of("resnet")
    set_trainable(network, 0.3)
    modes, parameters = [m.training for m in network.modules()], trains(network)
    for disturb in (lambda: None, network.eval, network.train, lambda: set_trainable(network, 1.0)):
        disturb()
        set_trainable(network, 0.3)
        assert [m.training for m in network.modules()] == modes
        assert trains(network) == parameters


def test_an_unchanged_share_is_not_walked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    network = network_of("resnet")
    set_trainable(network, 0.3)
    monkeypatch.setattr(type(network), "modules", None)
    set_trainable(network, 0.3)


@pytest.mark.parametrize("name", RECIPES)
def test_depth_groups_hold_every_parameter_once(name: str) -> None:
    network = network_of(name)
    groups = depth_groups(network)
    flat = [id(p) for group in groups for p in group]
    assert sorted(flat) == sorted(id(p) for p in network.parameters())
    assert {id(p) for p in groups[2]} == {id(p) for p in classifier_parameters(network)}
    if name != "linear":
        assert all(groups)


def test_depth_groups_are_halves_by_layers_in_order() -> None:
    network = network_of("cnn")
    names = {id(p): name for name, p in network.named_parameters()}
    first, second, head = ([names[id(p)] for p in group] for group in depth_groups(network))
    assert first[0] == "features.0.0.weight"
    assert "top.0.weight" in second
    assert head == ["fc.weight", "fc.bias"]
    assert [type(m) for m in head_modules(network)] == [nn.Linear]


def test_the_last_tenth_of_resnet152_is_what_the_notebook_trains() -> None:
    with torch.device("meta"):
        recipe = Recipe(backbone="resnetv2_152", crop_size=96, head="mlp", hidden=(64, 64), dropout=0.2)
        network = build_network(recipe, Weights("none"), seed=0)
    set_trainable(network, 0.1)
    count = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert count == 17_330_625
    assert count == pytest.approx(17.1e6, rel=0.02)  # from Keras' layer 508 of 564 on
