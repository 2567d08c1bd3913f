"""Weights files of tiny networks, taught the easy set for a few steps: no hub, no download."""

from __future__ import annotations

from pathlib import Path

import torch
from easy_set import TINY, easy_patches
from safetensors.torch import save_file

from pcam_automl.models.factory import build_network, normalisation
from pcam_automl.models.weights import Weights
from pcam_automl.recipe import build_recipe


def write_probe_weights(folder: Path, backbone: str = TINY, *, steps: int = 12) -> Path:
    """``<backbone>.safetensors`` after some steps on 64 easy patches, centre 32 px; with 0 steps at random."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = build_recipe({"backbone": backbone, "crop_size": 32})
    network, norm = build_network(recipe, Weights("none"), seed=5), normalisation(backbone)
    images, label = easy_patches(64, 77)
    mean, std = (torch.tensor(values)[:, None, None] for values in (norm.mean, norm.std))
    x = (torch.from_numpy(images[:, 32:64, 32:64]).permute(0, 3, 1, 2) / 255 - mean) / std
    y = torch.from_numpy(label).float()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(network(x).flatten(), y).backward()
        optimizer.step()
    save_file({name: t.contiguous() for name, t in network.state_dict().items()}, folder / f"{backbone}.safetensors")
    return folder
