"""What users would run instead: a Dataset that transforms one image at a time, a DataLoader, plain loops, fastai's Learner.

Nothing of the package runs in here but the network, which both sides share.
"""

from __future__ import annotations

import importlib.util
import itertools
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler
from torchvision.transforms import v2

from benchmarks.common import Side, wait_for

FASTAI = "fastai"
FASTAI_INSTALL = "uv pip install 'fastai>=2.8,<2.9'"
LR, WEIGHT_DECAY = 1e-3, 0.05


class ImageDataset(Dataset[tuple[Tensor, Tensor]]):
    """Images (N, S, S, 3) uint8 in memory, one at a time through ``transform``, and labels (N,) float32."""

    def __init__(self, images: np.ndarray, label: np.ndarray, transform: nn.Module) -> None:
        self.images, self.transform = images, transform
        self.label = torch.from_numpy(label.astype(np.float32))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        image = torch.from_numpy(self.images[number]).permute(2, 0, 1)
        return self.transform(image), self.label[number]


def training_transform(crop: int, mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    """Crop, flips, normalisation."""
    return v2.Compose(
        [
            v2.CenterCrop(crop),
            v2.RandomHorizontalFlip(),
            v2.RandomVerticalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(mean), list(std)),
        ]
    )


def evaluation_transform(crop: int, mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    """Crop, normalisation."""
    steps = [v2.CenterCrop(crop), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
    return v2.Compose(steps)


def build_loader(
    dataset: ImageDataset, *, batch_size: int, n_workers: int, n_batches: int | None = None, pin: bool = False
) -> DataLoader[tuple[Tensor, Tensor]]:
    """``n_batches`` shuffled batches an epoch, or without a number every image once in order. Workers live on between epochs."""
    sampler = (
        SequentialSampler(dataset) if n_batches is None else RandomSampler(dataset, num_samples=n_batches * batch_size)
    )
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=n_workers,
        persistent_workers=n_workers > 0,
        pin_memory=pin,
    )


def loading(loader: DataLoader[tuple[Tensor, Tensor]], device: torch.device) -> Side:
    """An epoch of batches onto the device; images/s."""

    def epoch() -> float:
        n, began = 0, time.perf_counter()
        for images, label in loader:
            images.to(device, non_blocking=True)
            label.to(device, non_blocking=True)
            n += len(images)
        wait_for(device)
        return n / (time.perf_counter() - began)

    return epoch


def plain_training(
    network: nn.Module, loader: DataLoader[tuple[Tensor, Tensor]], device: torch.device, *, lead: int = 0
) -> Side:
    """The plain loop: fp32, default layout, AdamW, binary cross-entropy; images/s.

    Neither clipping nor a weight average, and no loss is read. The clock starts after ``lead`` steps: the workers have
    loaded some batches before the first step, and a few timed steps would be spared all loading.
    """
    network = network.to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    loss_of = nn.BCEWithLogitsLoss()

    def epoch() -> float:
        network.train()
        batches = iter(loader)
        waiting = [next(batches)]
        n, began = 0, time.perf_counter()
        for number, (images, label) in enumerate(itertools.chain(waiting, batches)):
            if number == lead:
                wait_for(device)
                n, began = 0, time.perf_counter()
            optimizer.zero_grad()
            logits = network(images.to(device, non_blocking=True)).flatten()
            loss_of(logits, label.to(device, non_blocking=True)).backward()
            optimizer.step()
            n += len(images)
        wait_for(device)
        return n / (time.perf_counter() - began)

    return epoch


def flips_and_turns(images: Tensor) -> list[Tensor]:
    """The eight flips and quarter turns of (B, 3, P, P)."""
    turned = [torch.rot90(images, quarter, (-2, -1)) for quarter in range(4)]
    return [view for image in turned for view in (image, image.flip(-1))]


class PlainPrediction:
    """The plain inference loop: ``no_grad``, fp32, default layout; ``logits`` holds what the last epoch gave."""

    def __init__(
        self, network: nn.Module, loader: DataLoader[tuple[Tensor, Tensor]], device: torch.device, *, eight: bool
    ) -> None:
        self.network, self.loader, self.device, self.eight = network.to(device).eval(), loader, device, eight
        self.logits = np.zeros(0, np.float32)

    @torch.no_grad()
    def __call__(self) -> float:
        """An epoch; images/s."""
        answers, began = [], time.perf_counter()
        for images, _ in self.loader:
            images = images.to(self.device)
            views = flips_and_turns(images) if self.eight else [images]
            answers.append(torch.stack([self.network(view).flatten() for view in views]).mean(0).cpu())
        self.logits = torch.cat(answers).numpy()
        return len(self.logits) / (time.perf_counter() - began)


def fastai_version() -> str | None:
    """Installed version, None where there is none."""
    return version(FASTAI) if importlib.util.find_spec(FASTAI) else None


def fastai_loaders(
    images: np.ndarray,
    label: np.ndarray,
    crop: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    n_batches: int,
    batch_size: int,
    n_workers: int,
    device: torch.device,
) -> Any:
    """Fastai's DataLoaders as its users make them: PIL images, a crop for each, flips, turns, zoom and lighting by the batch."""
    from fastai.vision.all import (
        CropPad,
        DataBlock,
        ImageBlock,
        IndexSplitter,
        Normalize,
        RegressionBlock,
        aug_transforms,
    )

    n_train = n_batches * batch_size
    order = np.random.default_rng(0).permutation(np.arange(n_train + batch_size) % len(images))

    def image_of(number: int) -> np.ndarray:
        return images[number]

    def label_of(number: int) -> float:
        return float(label[number])

    block = DataBlock(
        blocks=(ImageBlock, RegressionBlock),
        get_x=image_of,
        get_y=label_of,
        splitter=IndexSplitter(range(n_train, n_train + batch_size)),
        item_tfms=CropPad(crop),
        batch_tfms=[
            *aug_transforms(flip_vert=True, max_warp=0.0),
            Normalize.from_stats(list(mean), list(std), cuda=device.type == "cuda"),
        ],
    )
    return block.dataloaders(order.tolist(), bs=batch_size, num_workers=n_workers, device=device)


def fastai_training(network: nn.Module, loaders: Any, device: torch.device) -> Side:
    """An epoch of fastai's ``Learner.fit``: fp32, its own Adam; images/s of the training part, first batch to last step."""
    from fastai.vision.all import BCEWithLogitsLossFlat, Callback, Learner

    class Clock(Callback):  # type: ignore[misc, unused-ignore]
        seconds, began, n = 0.0, 0.0, 0

        def before_train(self) -> None:
            self.n = 0

        def before_batch(self) -> None:
            if self.training:
                self.began = self.began if self.n else time.perf_counter()
                self.n += len(self.x)

        def after_train(self) -> None:
            wait_for(device)
            self.seconds = time.perf_counter() - self.began

    clock = Clock()
    learner = Learner(loaders, network.to(device), loss_func=BCEWithLogitsLossFlat(), lr=LR, cbs=[clock])

    def epoch() -> float:
        with learner.no_bar(), learner.no_logging():
            learner.fit(1)
        return clock.n / clock.seconds

    return epoch
