"""The training that plain Optuna and Ray Tune tune: a Dataset, a DataLoader, one cycle of AdamW, flips at test time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from benchmarks.search.peer import VALID_SHARE, build_network, statistics_of

N_REPORTS = 3
"""Validations of a trial, at equal distances."""
N_TRIALS_PLANNED = 8
"""Whole trials that the seconds of a search are planned for."""
MOST_EPOCHS = 30
TEST_VIEWS = 4
FORWARD_SPEEDUP = 3.0
LOADED_SHARE = 0.85
"""Speed with a loader beside the network, over that of the network alone."""
_BATCH = 256

Report = Callable[[float, int], None]
"""Told (validation AUC, report number from 1); raises to end the trial."""


class PatchDataset(Dataset[tuple[Tensor, Tensor]]):
    """Patches (n, 3, 96, 96) uint8 in memory, one at a time through the transform."""

    def __init__(self, images: Tensor, label: np.ndarray, transform: nn.Module) -> None:
        self.images, self.label, self.transform = images, torch.from_numpy(label.astype(np.float32)), transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.images[number]), self.label[number]


def suggest(trial: Any, backbones: tuple[str, ...]) -> dict[str, Any]:
    """The space of both: an Optuna trial, or what Ray Tune's OptunaSearch hands over in its place."""
    return {
        "backbone": trial.suggest_categorical("backbone", list(backbones)),
        "crop": trial.suggest_categorical("crop", [64, 96]),
        "lr": trial.suggest_float("lr", 3e-4, 1e-2, log=True),
        "weight_decay": trial.suggest_float("weight_decay", 1e-4, 1e-1, log=True),
        "batch_size": trial.suggest_categorical("batch_size", [32, 64]),
        "dropout": trial.suggest_float("dropout", 0.0, 0.4),
        "jitter": trial.suggest_float("jitter", 0.0, 0.3),
    }


def default_settings(backbones: tuple[str, ...]) -> dict[str, Any]:
    """Of a search in which no trial got as far as a validation: the usual ones."""
    usual = {"crop": 96, "lr": 1e-3, "weight_decay": 1e-2, "batch_size": 64, "dropout": 0.0, "jitter": 0.1}
    return {"backbone": backbones[0], **usual}


def random_split(label: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train and to validate on: random, 80/20, stratified."""
    rows = np.arange(len(label))
    train, valid = train_test_split(rows, test_size=VALID_SHARE, stratify=label, random_state=seed)
    return train, valid


def transforms(settings: Mapping[str, Any], *, training: bool) -> nn.Module:
    """Crop, and for training flips and colour jitter; normalised as the network's weights were."""
    mean, std = statistics_of(settings["backbone"])
    steps: list[nn.Module] = [v2.CenterCrop(settings["crop"])]
    if training:
        steps += [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()]
        if settings["jitter"] > 0:
            steps.append(v2.ColorJitter(settings["jitter"], settings["jitter"], settings["jitter"]))
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])


def images_per_s(settings: Mapping[str, Any], n_steps: int = 4) -> float:
    """Training images a second of the network alone, from a few steps on random images after one that does not count."""
    network = build_network(settings["backbone"], None)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    images = torch.randn(settings["batch_size"], 3, settings["crop"], settings["crop"])
    began = time.time()
    for step in range(n_steps + 1):
        if step == 1:
            began = time.time()
        optimizer.zero_grad()
        network(images).square().mean().backward()
        optimizer.step()
    return n_steps * settings["batch_size"] / (time.time() - began)


def train(
    settings: Mapping[str, Any],
    images: Tensor,
    label: np.ndarray,
    *,
    weights: Path | None,
    n_epochs: float,
    until: float,
    seed: int,
    n_workers: int,
    valid: tuple[Tensor, np.ndarray] | None = None,
    report: Report = lambda auc, number: None,
) -> tuple[nn.Module, float]:
    """The network after one cycle over ``n_epochs`` passes, and its training images a second (validations left out).

    Args:
        settings: from :func:`suggest`.
        images: (n, 3, 96, 96) uint8 to train on.
        label: (n,) 0 or 1.
        weights: folder of pretrained weights or None.
        n_epochs: may be a fraction.
        until: seconds since 1970; no step begins after it.
        seed: of the network and of torch's global generator.
        n_workers: of the loader.
        valid: images and labels that ``report`` is given the AUC of, N_REPORTS times.
        report: see :data:`Report`.
    """
    torch.manual_seed(seed)
    network = build_network(settings["backbone"], weights, drop_rate=settings["dropout"])
    dataset = PatchDataset(images, label, transforms(settings, training=True))
    loader = DataLoader(
        dataset,
        settings["batch_size"],
        shuffle=True,
        drop_last=True,
        num_workers=n_workers,
        persistent_workers=n_workers > 0,
    )
    n_steps = max(N_REPORTS, round(n_epochs * len(loader)))
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings["lr"], weight_decay=settings["weight_decay"])
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings["lr"], total_steps=n_steps)
    reported = [round(n_steps * part / N_REPORTS) for part in range(1, N_REPORTS + 1)]
    loss_of, step, began, apart_s = nn.BCEWithLogitsLoss(), 0, time.time(), 0.0
    while step < n_steps and time.time() < until:
        for batch, truth in loader:
            network.train()
            optimizer.zero_grad()
            loss_of(network(batch).flatten(), truth).backward()
            optimizer.step()
            cycle.step()
            step += 1
            if valid is not None and step in reported:
                stopped = time.time()
                probs = predict(network, valid[0], settings, n_views=1)
                apart_s += time.time() - stopped
                report(float(roc_auc_score(valid[1], probs)), reported.index(step) + 1)
            if step >= n_steps or time.time() >= until:
                break
    return network, step * settings["batch_size"] / (time.time() - began - apart_s)


@torch.no_grad()
def predict(network: nn.Module, images: Tensor, settings: Mapping[str, Any], *, n_views: int) -> np.ndarray:
    """Mean probabilities (n,) over the plain view and up to three flips."""
    network.eval()
    transform, answers = transforms(settings, training=False), []
    flips: list[list[int]] = [[], [-1], [-2], [-2, -1]]
    for begin in range(0, len(images), _BATCH):
        batch = transform(images[begin : begin + _BATCH])
        views = [network(batch.flip(dims) if dims else batch).sigmoid() for dims in flips[:n_views]]
        answers.append(torch.stack(views).mean(0).flatten())
    return np.asarray(torch.cat(answers).numpy())


def final_plan(left_s: float, rate: float, n_train: int, n_test: int) -> tuple[float, int, float]:
    """Epochs, test views and seconds of the final training that fit into what is left.

    Args:
        left_s: seconds left for everything.
        rate: training images a second, data loading included.
        n_train: images of an epoch.
        n_test: images to predict.
    """
    of_view_s = n_test / (FORWARD_SPEEDUP * rate)
    n_views = TEST_VIEWS if TEST_VIEWS * of_view_s < 0.15 * left_s else 1
    train_s = 0.95 * (left_s - 1.2 * n_views * of_view_s)
    return max(0.0, min(MOST_EPOCHS, train_s * rate / n_train)), n_views, train_s
