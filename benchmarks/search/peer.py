"""What the peers share: their arguments and clock, images in memory, networks, output. Nothing of the package runs here.

Written as users of those libraries would: Pillow, torchvision transforms, timm.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn

N_CORES = len(os.sched_getaffinity(0))
FROM_SCRATCH = ("resnet18", "resnet10t", "resnet34", "regnety_004", "mobilenetv3_small_100", "tf_efficientnet_lite0")
"""What is searched where no weights are given; resnet10t is the network that this package itself begins with."""
VALID_SHARE = 0.2
EXIT_S = 1.5
"""Seconds that a process is given to write its answers and to end."""


@dataclass(frozen=True)
class Task:
    """A cell as its process sees it.

    Attributes:
        data: folder in the Kaggle layout.
        weights: folder of safetensors, None is from scratch.
        until: end of the wall clock, seconds since 1970.
        seed: of everything random.
        out: folder for ``predictions.csv`` and ``said.json``.
    """

    data: Path
    weights: Path | None
    until: float
    seed: int
    out: Path

    @property
    def left_s(self) -> float:
        """Seconds left for work."""
        return self.until - EXIT_S - time.time()

    @property
    def backbones(self) -> tuple[str, ...]:
        """Networks to choose from: those that have weights, or all."""
        if self.weights is None:
            return FROM_SCRATCH
        return tuple(sorted(file.stem for file in self.weights.glob("*.safetensors")))


@dataclass(frozen=True)
class Images:
    """Both parts in memory.

    Attributes:
        train: (N, 3, 96, 96) uint8.
        label: (N,) 0 or 1.
        test: (M, 3, 96, 96) uint8.
        test_ids: in the order of ``test``.
    """

    train: torch.Tensor
    label: np.ndarray
    test: torch.Tensor
    test_ids: list[str]


def read_task() -> Task:
    """From the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--until", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    return Task(args.data, None if args.weights == "none" else Path(args.weights), args.until, args.seed, args.out)


def read_table(file: Path) -> dict[str, int]:
    """Id to label."""
    with file.open(newline="", encoding="utf-8") as lines:
        return {row["id"]: int(row["label"]) for row in csv.DictReader(lines)}


def load_images(data: Path) -> Images:
    """Every patch, decoded once."""
    labels = read_table(data / "train_labels.csv")
    test_ids = list(read_table(data / "sample_submission.csv"))
    with ThreadPoolExecutor(N_CORES) as pool:
        train = torch.stack(list(pool.map(_image, [data / "train" / f"{name}.tif" for name in labels])))
        test = torch.stack(list(pool.map(_image, [data / "test" / f"{name}.tif" for name in test_ids])))
    return Images(train, np.array(list(labels.values())), test, test_ids)


def _image(file: Path) -> torch.Tensor:
    with Image.open(file) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def build_network(name: str, weights: Path | None, *, n_classes: int = 1, **options: Any) -> nn.Module:
    """A timm network, its weights read from the folder as timm's own loader reads local files."""
    if weights is None:
        return timm.create_model(name, num_classes=n_classes, **options)
    local = {"file": str(weights / f"{name}.safetensors")}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=local, num_classes=n_classes, **options)


def statistics_of(name: str) -> tuple[list[float], list[float]]:
    """Channel means and deviations that the network's weights were trained with."""
    config = timm.get_pretrained_cfg(name)
    assert config is not None
    return list(config.mean), list(config.std)


def write_answer(
    task: Task, ids: list[str], probs: np.ndarray, *, printed_auc: float | None, details: dict[str, Any], package: str
) -> None:
    """The predictions, and what the system says of them."""
    with (task.out / "predictions.csv").open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file)
        lines.writerow(["id", "label"])
        lines.writerows((name, f"{prob:.7g}") for name, prob in zip(ids, probs.tolist(), strict=True))
    versions = {name: version(name) for name in dict.fromkeys((package, "torch", "timm"))}
    said = {"printed_auc": printed_auc, "printed_95": None, "details": details, "versions": versions}
    (task.out / "said.json").write_text(json.dumps(said), encoding="utf-8")
