"""Backbones, their smallest inputs, weights folders."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from pcam_automl.errors import RecipeError
from pcam_automl.models import factory
from pcam_automl.models import weights as weights_module
from pcam_automl.models.factory import (
    Normalisation,
    build_network,
    check_backbone,
    classifier_parameters,
    normalisation,
    normalisation_of,
    smallest_input,
)
from pcam_automl.models.weights import Weights, decide_weights, parse_weights
from pcam_automl.recipe import Recipe

TINY = "test_resnet"
SCRATCH = Weights("none")


def tiny_weights(folder: Path, name: str = f"{TINY}.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    torch.manual_seed(5)
    state = timm.create_model(TINY, num_classes=1000).state_dict()
    save_file(
        {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in state.items()}, folder / name
    )
    return folder


def test_unknown_backbones_are_named_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"got 'resnet118' \(did you mean 'resnet18'\?\)"):
        check_backbone("resnet118")
    with pytest.raises(RecipeError, match="no weights tag 'nope'"):
        check_backbone("resnet18.nope")


@pytest.mark.parametrize("name", [TINY, "test_vit", "test_efficientnet", "test_convnext"])
@pytest.mark.parametrize("px", [32, 50, 96])
def test_networks_give_one_logit_at_any_crop(name: str, px: int) -> None:
    network = build_network(Recipe(backbone=name, crop_size=px), SCRATCH, seed=0).eval()
    assert network(torch.zeros(2, 3, px, px)).shape == (2, 1)


def test_smallest_input_is_the_smallest_that_runs() -> None:
    assert smallest_input("inception_resnet_v2") == 76  # 75 in the literature, made even
    with pytest.raises(RecipeError, match="input_size must be at least 76 for inception_resnet_v2, got 64"):
        build_network(Recipe(backbone="inception_resnet_v2", crop_size=64), SCRATCH, seed=0)


def test_same_seed_same_weights() -> None:
    recipe = Recipe(backbone=TINY)
    one, two, other = (build_network(recipe, SCRATCH, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", ["test_efficientnet", "mobilenetv3_small_100", "dla34"])
def test_a_single_logit_begins_as_small_as_torch_draws_it(name: str) -> None:
    """Timm's own draw for one output has logits of ±20 here, and a fine-tuning of seconds ends with four times the error."""

    def spread(network: torch.nn.Module) -> float:
        (last,) = [layer for layer in network.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))][-1:]
        weight = last.weight.detach()
        return float(weight.square().mean().sqrt()) * weight[0].numel() ** 0.5

    torch.manual_seed(0)
    theirs, recipe = timm.create_model(name, num_classes=1), Recipe(backbone=name)
    ours = build_network(recipe, SCRATCH, seed=0)
    assert spread(theirs) > 4.0
    assert spread(ours) == pytest.approx(3**-0.5, rel=0.1)
    for key, tensor in build_network(recipe, SCRATCH, seed=0).state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[key]), "the same seed draws the same"


@pytest.mark.parametrize("name", [TINY, "test_vit", "test_convnext", "keras_cnn_1"])
def test_a_classifier_that_is_drawn_in_proportion_stays_as_it_was_drawn(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(backbone=name, crop_size=96)
    ours = build_network(recipe, SCRATCH, seed=0).state_dict()
    monkeypatch.setattr(factory, "LARGEST_CLASSIFIER", math.inf)
    drawn = build_network(recipe, SCRATCH, seed=0).state_dict()
    assert all(torch.equal(ours[key], tensor) for key, tensor in drawn.items())


def test_every_backbone_has_its_own_normalisation() -> None:
    assert normalisation("resnet18").mean == (0.485, 0.456, 0.406)
    assert normalisation("tf_efficientnet_lite0").std == (0.5, 0.5, 0.5)


def test_folder_weights_are_loaded_but_for_the_classifier(tmp_path: Path) -> None:
    folder = tiny_weights(tmp_path / "w")
    source, text = decide_weights(str(folder))
    assert "pretrained" in text
    network = build_network(Recipe(backbone=TINY, pretrained=True), source, seed=0)
    fresh = build_network(Recipe(backbone=TINY), SCRATCH, seed=0)
    torch.manual_seed(5)
    expected = timm.create_model(TINY, num_classes=1000).state_dict()
    state = network.state_dict()
    head = {id(p) for p in classifier_parameters(network)}
    names = [key for key, p in network.named_parameters() if id(p) not in head]
    assert all(torch.equal(state[key], expected[key].half().float()) for key in names)
    assert state[names[0]].dtype == torch.float32
    assert all(
        torch.equal(a, b) for a, b in zip(classifier_parameters(network), classifier_parameters(fresh), strict=True)
    )


def test_a_tagged_file_comes_before_an_untagged_one(tmp_path: Path) -> None:
    folder = tiny_weights(tmp_path / "w", f"{TINY}.r160_in1k.safetensors")
    tiny_weights(folder)
    source = Weights("folder", folder)
    assert source.file_of(f"{TINY}.r160_in1k") == folder / f"{TINY}.r160_in1k.safetensors"
    assert source.file_of(TINY) == folder / f"{TINY}.safetensors"
    assert not source.has("resnet18")


def test_bad_weights_are_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "w"
    with pytest.raises(RecipeError, match="an existing folder"):
        decide_weights(str(folder))
    folder.mkdir()
    with pytest.raises(RecipeError, match=r"no \*.safetensors file"):
        decide_weights(str(folder))
    (folder / f"{TINY}.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(RecipeError, match="not a readable safetensors file"):
        build_network(Recipe(backbone=TINY, pretrained=True), Weights("folder", folder), seed=0)
    save_file({"x": torch.zeros(1)}, folder / f"{TINY}.safetensors")
    with pytest.raises(RecipeError, match="does not fit timm's test_resnet"):
        build_network(Recipe(backbone=TINY, pretrained=True), Weights("folder", folder), seed=0)


def test_auto_falls_back_visibly_and_hub_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source, text = decide_weights("auto")
    assert source == SCRATCH
    assert "FROM SCRATCH" in text
    assert "HF_HUB_OFFLINE" in text
    with pytest.raises(RecipeError, match=r"--weights hub: timm's hub did not answer .*--weights none"):
        decide_weights("hub")
    monkeypatch.setattr(weights_module, "hub_fault", lambda timeout_s: None)
    assert decide_weights("auto")[0] == Weights("hub")


def test_sources_survive_being_written_down(tmp_path: Path) -> None:
    for source in (SCRATCH, Weights("hub"), Weights("folder", tmp_path)):
        assert parse_weights(str(source)) == source


def test_normalisation_follows_the_recipe() -> None:
    assert normalisation_of(Recipe(backbone="resnet18")) == normalisation("resnet18")
    assert normalisation_of(Recipe(normalise="unit")) == Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    recipe = Recipe(normalise="dataset")
    assert normalisation_of(recipe, [0.7, 0.5, 0.7], [0.2, 0.3, 0.2]).std == (0.2, 0.3, 0.2)
    with pytest.raises(RecipeError, match="needs the training set's channel statistics"):
        normalisation_of(recipe)
    with pytest.raises(RecipeError, match=r"must be above 0, got 0\.2, 0, 0\.2"):
        normalisation_of(recipe, [0.7, 0.5, 0.7], [0.2, 0.0, 0.2])


def test_compared_backbones_run_at_96_px() -> None:
    for name in ("mobilenetv2_100", "resnetv2_152", "densenet201", "efficientnet_b2"):
        assert smallest_input(name) <= 96
