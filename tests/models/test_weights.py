"""Weights of a folder: what fits, what is refitted as timm does, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from pcam_automl.errors import RecipeError
from pcam_automl.models.factory import build_network
from pcam_automl.models.weights import Weights
from pcam_automl.recipe import Recipe

SWIN = "swin_tiny_patch4_window7_224"
"""Its late windows are smaller than 7 at small inputs, and so are their position tables."""


@pytest.mark.filterwarnings("ignore")  # of the interpolation in timm
def test_windows_of_another_side_are_refitted_by_the_architectures_own_rule(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        pretrained = timm.create_model(SWIN, num_classes=1000)
    for name, tensor in pretrained.named_parameters():
        if name.endswith("relative_position_bias_table"):
            torch.nn.init.normal_(tensor)
    save_file(pretrained.state_dict(), tmp_path / f"{SWIN}.safetensors")
    network = build_network(Recipe(backbone=SWIN, pretrained=True, crop_size=64), Weights("folder", tmp_path), seed=0)
    own, theirs = network.state_dict(), pretrained.state_dict()
    key = "layers.0.blocks.0.mlp.fc1.weight"
    assert torch.equal(own[key], theirs[key])
    table = "layers.3.blocks.0.attn.relative_position_bias_table"
    assert own[table].shape != theirs[table].shape
    assert own[table].std() > 0.3, "interpolated, not drawn anew (0.02)"
    assert network(torch.zeros(2, 3, 64, 64)).shape == (2, 1)


def test_a_file_of_another_network_is_refused_by_name(tmp_path: Path) -> None:
    other = timm.create_model("resnet10t", num_classes=1000)
    save_file(other.state_dict(), tmp_path / "resnet18.safetensors")
    with pytest.raises(RecipeError, match=r"does not fit timm's resnet18: \d+ tensors are missing or of another shape"):
        build_network(Recipe(backbone="resnet18", pretrained=True), Weights("folder", tmp_path), seed=0)
