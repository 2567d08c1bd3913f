"""Batches: ours on the device against a DataLoader (2 workers) with torchvision v2, and their share of a training step.

    python -m benchmarks batches             # 96 px patches, crop 64, batch 64, 5 rounds of 20 batches
    PCAM_BENCH_ROUNDS=9 PCAM_BENCH_STEPS=40 PCAM_BENCH_DEVICE=cuda:0 python -m benchmarks batches

Both sides augment as the default recipe asks, from the same uint8 patches in memory; ours is ``PatchTask.batch``. The same on
both: probabilities of flips and quarter turns, ranges of rotation, zoom, shift, brightness, contrast, saturation, the stain
jitter's formula, normalisation, float32 results. Only nearly the same: torchvision interpolates uint8 images and rounds, turns
the hue in HSV where ours turns YIQ's chroma, blurs with a Gaussian of 3 taps whose sigma spans what our mixed-in binomial does,
fills corners with black where ours reflects, and does not narrow its ranges for the centre 32 px. Neither side trains.

Then, by our engine, a resnet18 step at the same crop in the variant that the probe picks: batch() against the whole step.
Writes results/batches.json (batches_cuda.json on a GPU). Targets: 5 times the DataLoader on a CPU; 8 % of the step.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from benchmarks.common import (
    KEY,
    OURS,
    Side,
    constant_rates,
    device_here,
    in_turn,
    machine,
    measured_compute,
    ratios,
    recipe_for,
    spread,
    start,
    synthetic_store,
    variant_of,
    wait_for,
    workers_for,
)
from benchmarks.plain import ImageDataset, build_loader, loading
from benchmarks.settings import RESULTS, setting, write_result
from pcam_automl.augment import AugmentSpec, augment_spec
from pcam_automl.batches import ViewStream
from pcam_automl.data.store import PatchStore
from pcam_automl.models.factory import Normalisation, normalisation_of
from pcam_automl.training.compute import Compute
from pcam_automl.training.engine import Training

BACKBONE, CROP, BATCH = "resnet18", 64, 64
LOADER = "DataLoader, torchvision v2"
STAINS = torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
"""Ruifrok & Johnston 2001, as ours: optical densities of haematoxylin, eosin, DAB."""
WIDEST_SIGMA = 1.74
"""Sigma per share of a 3x3 binomial mixed in, at the default share of 0.25: side taps of 1/16 against a centre of 7/8."""


class QuarterTurns(nn.Module):
    """A random multiple of 90 degrees."""

    def forward(self, image: Tensor) -> Tensor:
        return torch.rot90(image, int(torch.randint(4, ())), (-2, -1))


class StainJitter(nn.Module):
    """Tellez et al. 2018 on one image (3, P, P) in [0, 1]: each stain times 1 +- ``stain``, plus +- ``stain`` / 10."""

    def __init__(self, stain: float) -> None:
        super().__init__()
        self.stain, self.unmix = stain, torch.linalg.inv(STAINS)

    def forward(self, image: Tensor) -> Tensor:
        scale = 1 + self.stain * (2 * torch.rand(3) - 1)
        shift = 0.1 * self.stain * (2 * torch.rand(3) - 1)
        density = -image.clamp(min=1 / 255).log().flatten(1)  # (3, P * P), columns are pixels
        mixed = ((self.unmix * scale) @ STAINS).T @ density + (shift @ STAINS)[:, None]
        return mixed.neg().exp().clamp(max=1.0).view_as(image)


def same_augmentation(spec: AugmentSpec, norm: Normalisation, side_px: int) -> nn.Module:
    """The recipe's augmentation in torchvision v2, one image (3, S, S) uint8 at a time."""
    share = spec.shift_px / side_px
    steps: list[nn.Module] = [
        v2.RandomHorizontalFlip(),
        QuarterTurns(),
        v2.RandomAffine(
            spec.rotation_deg,
            translate=(share, share),
            scale=(1 - spec.zoom, 1 + spec.zoom),
            interpolation=InterpolationMode.BILINEAR,
        ),
        v2.CenterCrop(spec.crop_size),
        v2.ToDtype(torch.float32, scale=True),
        StainJitter(spec.stain),
        v2.ColorJitter(spec.brightness, spec.contrast, spec.saturation, spec.hue),
        v2.GaussianBlur(3, sigma=(0.1, max(0.11, WIDEST_SIGMA * spec.blur))),
        v2.Normalize(list(norm.mean), list(norm.std)),
    ]
    return v2.Compose(steps)


def our_batches(training: Training, rows: np.ndarray, n_batches: int) -> Side:
    """``n_batches`` of the task's batches; images/s."""
    stream, device, done = ViewStream(KEY, rows, 0), torch.device(training.compute.device), 0
    size = training.recipe.batch_size

    def batches() -> float:
        nonlocal done
        began = time.perf_counter()
        for _ in range(n_batches):
            training.task.batch(stream.rows_of(done, done + size), np.arange(done, done + size))
            done += size
        wait_for(device)
        return n_batches * size / (time.perf_counter() - began)

    return batches


def our_steps(training: Training, rows: np.ndarray, n_steps: int) -> Side:
    """``n_steps`` optimizer steps, each with its batch; images/s."""
    stream, device, done = ViewStream(KEY, rows, 0), torch.device(training.compute.device), 0
    size = training.recipe.batch_size

    def steps() -> float:
        nonlocal done
        training.use(constant_rates(training.recipe))
        began = time.perf_counter()
        for _ in range(n_steps):
            training.step(stream.rows_of(done, done + size), np.arange(done, done + size))
            done += size
        wait_for(device)
        return n_steps * size / (time.perf_counter() - began)

    return steps


def measure_batches(
    store: PatchStore,
    compute: Compute,
    *,
    n_rounds: int,
    n_batches: int,
    n_workers: int,
    backbone: str = BACKBONE,
    crop: int = CROP,
    batch: int = BATCH,
) -> dict[str, Any]:
    """Images/s of both sides, milliseconds of our batch and of the step around it, round by round."""
    device, recipe = torch.device(compute.device), recipe_for(backbone, crop, batch)
    training, rows = start(recipe, store, compute), store.development_rows()
    norm = normalisation_of(recipe, store.channel_mean, store.channel_std)
    transform = same_augmentation(augment_spec(recipe), norm, store.patches.shape[1])
    dataset = ImageDataset(np.array(store.patches[rows]), store.label[rows], transform)
    pin = device.type == "cuda"
    loader = build_loader(dataset, batch_size=batch, n_workers=n_workers, n_batches=n_batches, pin=pin)
    rates = in_turn({OURS: our_batches(training, rows, n_batches), LOADER: loading(loader, device)}, n_rounds)
    n_steps = max(1, n_batches // 4)
    parts = in_turn(
        {"batch": our_batches(training, rows, n_steps), "step": our_steps(training, rows, n_steps)}, n_rounds
    )
    return {
        "images_per_s": rates,
        "ratios": ratios(rates[OURS], rates[LOADER]),
        "batch_ms": [1e3 * batch / rate for rate in parts["batch"]],
        "step_ms": [1e3 * batch / rate for rate in parts["step"]],
        "batch_share": ratios(parts["step"], parts["batch"]),
        "variant": variant_of(compute),
    }


def report(found: dict[str, Any]) -> None:
    """Print the table."""
    for name, rates in found["images_per_s"].items():
        print(f"  {name:<27} {spread(rates, 0):>30} images/s")
    print(f"  ratio, round by round: {spread(found['ratios'])}")
    print(f"  our batch of {found['batch']}: {spread(found['batch_ms'])} ms")
    print(f"  {found['network']} step, {found['variant']}: {spread(found['step_ms'], 1)} ms, its batch included")
    print(f"  share of the batch: {spread([100 * share for share in found['batch_share']], 1)} %")


def main() -> None:
    """Measure, print, write ``benchmarks/results/batches.json``."""
    device, n_rounds, n_batches = device_here(), setting("ROUNDS", 5), setting("STEPS", 20)
    n_workers = workers_for(device)
    print(f"batches: crop {CROP} of 96 px, batch {BATCH}, {n_rounds} rounds of {n_batches} batches, ", end="")
    print(f"{n_workers} loader workers; {machine(device)}")
    with synthetic_store(setting("PATCHES", 2048)) as store:
        compute = measured_compute(recipe_for(BACKBONE, CROP, BATCH), device)
        found = measure_batches(store, compute, n_rounds=n_rounds, n_batches=n_batches, n_workers=n_workers)
    found |= {"network": BACKBONE, "crop": CROP, "batch": BATCH, "workers": n_workers, "machine": machine(device)}
    report(found)
    write_result(RESULTS / ("batches.json" if device.type == "cpu" else f"batches_{device.type}.json"), found)


if __name__ == "__main__":
    main()
