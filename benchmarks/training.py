"""Training: ours against a plain loop and fastai, six networks at three crops; images/s by the cell, ratios, geometric mean.

    python -m benchmarks training                                  # CPU; cells that are done are kept
    PCAM_BENCH_NETWORKS=resnet18 PCAM_BENCH_CROPS=96 python -m benchmarks training
    PCAM_BENCH_DEVICE=cuda:0 python -m benchmarks training         # `make bench-gpu`; also states the roofline

Ours is ``Training.train`` as a search runs it: the default recipe's augmentation (turns, affine, stain, colour, blur),
clipping and weight average, in the variant that the probe picks, never more than it needs to be told here. The plain loop is
the script that users write: a Dataset over the same uint8 array that crops, flips and normalises an image with torchvision v2,
a DataLoader (2 workers on a CPU, 8 beside a GPU), fp32, default layout, AdamW, no clipping, no average. fastai is 2.8's
``Learner`` with the same network, fp32, its own loaders and batch transforms, where it is installed. The others' clocks start
with the first batch of a round, so their workers' start is free.

All sides run in turn, each in a process of its own (what the package sets for its process does not serve the others);
every round is PCAM_BENCH_STEPS steps (8; 200 on a GPU) of PCAM_BENCH_BATCH images (64;
512 on a GPU), after a round that does not count; PCAM_BENCH_ROUNDS (5) rounds. resnet18 at 96 px is also trained in each single
variant and as ``--deterministic`` trains. A cell is kept in results/training_<device>/<network>-<crop>.json and measured again when its settings or versions
change, so that an interrupted run goes on. Targets on a CPU: 2.3 times the plain loop in the geometric mean, no cell below 1.2.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import (
    OURS,
    Apart,
    Side,
    device_here,
    in_turn,
    machine,
    measured_compute,
    our_training,
    ratios,
    recipe_for,
    spread,
    start,
    synthetic_store,
    variant_of,
    workers_for,
)
from benchmarks.plain import (
    FASTAI,
    FASTAI_INSTALL,
    ImageDataset,
    build_loader,
    fastai_loaders,
    fastai_training,
    fastai_version,
    plain_training,
    training_transform,
)
from benchmarks.roofline import ceilings, copy_bytes_per_s, matrix_flops, step_of_image
from benchmarks.settings import RESULTS, numbers, setting, write_result
from pcam_automl.data.store import PatchStore, open_store
from pcam_automl.models.factory import Normalisation, build_network, normalisation_of
from pcam_automl.models.weights import Weights
from pcam_automl.recipe import Recipe
from pcam_automl.training.compute import Compute, fixed_variant, use_device

NETWORKS = "resnet18 resnet10t mobilenetv3_small_100 densenet121 convnext_atto tf_efficientnet_lite0"
PLAIN = "plain loop"
DETERMINISTIC = "ours, --deterministic"
VARIANTS_OF = ("resnet18", 96)


def settings_for(device: torch.device) -> dict[str, int]:
    """Batch, steps, rounds and loader workers; a cell measured with others is measured again."""
    gpu = device.type == "cuda"
    return {
        "batch": setting("BATCH", 512 if gpu else 64),
        "steps": setting("STEPS", 200 if gpu else 8),
        "lead": 2 * workers_for(device),  # batches that a DataLoader's workers have ready
        "rounds": setting("ROUNDS", 5),
        "workers": workers_for(device),
    }


def our_side(recipe: Recipe, root: Path, compute: Compute, n_steps: int, deterministic: bool = False) -> Side:
    """Ours in the variant, in a process set up as the package sets up its own."""
    use_device(compute.device, deterministic=deterministic)
    store = open_store(root)
    return our_training(start(recipe, store, compute), store.development_rows(), n_steps)


def _use(device: torch.device) -> None:
    """What names no device goes to this one: fastai's own normalisation does not."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def plain_side(recipe: Recipe, root: Path, device: torch.device, settings: dict[str, int]) -> Side:
    """The plain loop, in a process that is left as Python and torch make it."""
    _use(device)
    images, label, norm = _in_memory(recipe, root)
    dataset = ImageDataset(images, label, training_transform(recipe.crop_size, norm.mean, norm.std))
    loader = build_loader(
        dataset,
        batch_size=settings["batch"],
        n_workers=settings["workers"],
        n_batches=settings["steps"] + settings["lead"],
        pin=device.type == "cuda",
    )
    return plain_training(build_network(recipe, Weights("none"), seed=0), loader, device, lead=settings["lead"])


def fastai_side(recipe: Recipe, root: Path, device: torch.device, settings: dict[str, int]) -> Side:
    """Fastai's Learner, in a process of its own."""
    _use(device)
    images, label, norm = _in_memory(recipe, root)
    loaders = fastai_loaders(
        images,
        label,
        recipe.crop_size,
        norm.mean,
        norm.std,
        n_batches=settings["steps"],
        batch_size=settings["batch"],
        n_workers=settings["workers"],
        device=device,
    )
    return fastai_training(build_network(recipe, Weights("none"), seed=0), loaders, device)


def _in_memory(recipe: Recipe, root: Path) -> tuple[np.ndarray, np.ndarray, Normalisation]:
    store = open_store(root)
    rows = store.development_rows()
    norm = normalisation_of(recipe, store.channel_mean, store.channel_std)
    return np.array(store.patches[rows]), store.label[rows], norm


def measure_cell(
    backbone: str, crop: int, store: PatchStore, device: torch.device, settings: dict[str, int], *, variants: bool
) -> dict[str, Any]:
    """Images/s of every side, round by round, and ours over the others; every side has a process of its own."""
    recipe = recipe_for(backbone, crop, settings["batch"])
    compute = measured_compute(recipe, device)
    sides = {
        OURS: Apart(our_side, recipe, store.root, compute, settings["steps"]),
        PLAIN: Apart(plain_side, recipe, store.root, device, settings),
    }
    if fastai_version() is not None:
        sides[FASTAI] = Apart(fastai_side, recipe, store.root, device, settings)
    if variants:
        fixed = fixed_variant(device)
        sides[DETERMINISTIC] = Apart(our_side, recipe, store.root, fixed, settings["steps"], True)
        for single in [Compute(str(device), p, last) for p in ("fp32", "bf16") for last in (False, True)]:
            sides[f"ours, {variant_of(single)}"] = Apart(our_side, recipe, store.root, single, settings["steps"])
    try:
        rates = in_turn(sides, settings["rounds"])
    finally:
        for side in sides.values():
            side.close()
    cell: dict[str, Any] = {
        "images_per_s": rates,
        "ratios": {name: ratios(rates[OURS], rates[name]) for name in (PLAIN, FASTAI) if name in rates},
        "compute": compute.to_json(),
        "variant": variant_of(compute),
    }
    if device.type == "cuda":
        cell["step_of_image"] = step_of_image(build_network(recipe, Weights("none"), seed=0), crop, compute)
    return cell


def cell_of(
    backbone: str, crop: int, store: PatchStore, device: torch.device, settings: dict[str, int], folder: Path
) -> dict[str, Any]:
    """A cell, measured or as an earlier run left it."""
    key = {**settings, **machine(device), "fastai": fastai_version()}
    file = folder / f"{backbone}-{crop}.json"
    if file.is_file() and (known := json.loads(file.read_text(encoding="utf-8")))["key"] == key:
        return dict(known)
    print(f"{backbone} at {crop} px ...", file=sys.stderr)
    found = measure_cell(backbone, crop, store, device, settings, variants=(backbone, crop) == VARIANTS_OF)
    cell = {"network": backbone, "crop": crop, "key": key, **found}
    write_result(file, cell)
    return cell


def row_of(cell: dict[str, Any]) -> str:
    """One line of the table."""
    rates, ratio = cell["images_per_s"], cell["ratios"]
    theirs = f"{statistics.median(rates[FASTAI]):,.0f}" if FASTAI in rates else "not installed"
    to_fastai = f"{spread(ratio[FASTAI])}×" if FASTAI in ratio else "-"
    return (
        f"| {cell['network']} | {cell['crop']} | {statistics.median(rates[OURS]):,.0f} | "
        f"{statistics.median(rates[PLAIN]):,.0f} | {theirs} | {spread(ratio[PLAIN])}× | {to_fastai} | {cell['variant']} |"
    )


def geometric_mean(cells: list[dict[str, Any]], name: str) -> float | None:
    """Of the cells' median ratios to one side; None where no cell has it."""
    values = [statistics.median(cell["ratios"][name]) for cell in cells if name in cell["ratios"]]
    return statistics.geometric_mean(values) if values else None


def report(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Print what follows the rows; returns the summary."""
    summary: dict[str, Any] = {}
    for name in (PLAIN, FASTAI):
        if (mean := geometric_mean(cells, name)) is None:
            continue
        medians = {
            f"{c['network']}-{c['crop']}": statistics.median(c["ratios"][name]) for c in cells if name in c["ratios"]
        }
        lowest = min(medians, key=medians.__getitem__)
        summary[name] = {"geometric_mean": mean, "cells": len(medians), "lowest": {lowest: medians[lowest]}}
        print(
            f"ours over {name}: {mean:.2f} in the geometric mean of {len(medians)}; lowest {medians[lowest]:.2f} ({lowest})"
        )
    if FASTAI not in summary:
        print(f"{FASTAI} is not installed: {FASTAI_INSTALL}")
    for cell in cells:
        for name, rates in cell["images_per_s"].items():
            if name.startswith("ours, "):
                print(f"  {cell['network']} at {cell['crop']} px, {name}: {spread(rates, 0)} images/s")
    return summary


def report_roofline(cells: list[dict[str, Any]], flops_per_s: float, bytes_per_s: float) -> dict[str, Any]:
    """Print each cell's share of what the device could do; returns it."""
    print(f"bf16 matrix product: {flops_per_s / 1e12:,.0f} TFLOP/s; copy: {bytes_per_s / 1e12:,.2f} TB/s")
    shares = {}
    for cell in cells:
        if "step_of_image" not in cell:
            continue
        rate, limits = (
            statistics.median(cell["images_per_s"][OURS]),
            ceilings(cell["step_of_image"], flops_per_s, bytes_per_s),
        )
        share = {name: rate / limit for name, limit in limits.items()}
        shares[f"{cell['network']}-{cell['crop']}"] = {**limits, "shares": share}
        print(
            f"  {cell['network']} at {cell['crop']} px: {100 * share['by_arithmetic']:.1f} % of {limits['by_arithmetic']:,.0f} "
            f"images/s by arithmetic, {100 * share['by_memory']:.1f} % of {limits['by_memory']:,.0f} by memory"
        )
    return {"flops_per_s": flops_per_s, "bytes_per_s": bytes_per_s, "cells": shares}


def main() -> None:
    """Measure or read the cells, print, write ``benchmarks/results/training_<device>/`` and its summary beside it."""
    device = device_here()
    settings, folder = settings_for(device), RESULTS / f"training_{device.type}"
    networks = os.environ.get("PCAM_BENCH_NETWORKS", NETWORKS + " resnet50" * (device.type == "cuda")).split()
    crops = numbers("CROPS", "48 64 96")
    print(f"training: {settings}; {machine(device)}; fastai {fastai_version()}")
    print("| network | crop | ours, images/s | plain loop | fastai | ours / plain | ours / fastai | variant of ours |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    cells = []
    with synthetic_store(setting("PATCHES", 2048)) as store:
        for backbone in networks:
            for crop in crops:
                cells.append(cell_of(backbone, crop, store, device, settings, folder))
                print(row_of(cells[-1]), flush=True)
    summary: dict[str, Any] = {"machine": machine(device), **settings, "ratios": report(cells)}
    if device.type == "cuda":
        summary["roofline"] = report_roofline(cells, matrix_flops(device), copy_bytes_per_s(device))
    write_result(RESULTS / f"training_{device.type}.json", summary)


if __name__ == "__main__":
    main()
