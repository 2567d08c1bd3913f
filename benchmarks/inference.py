"""Inference: ours against a plain ``no_grad`` loop, centre view and eight views, and the memory of predicting a whole test set.

    python -m benchmarks inference           # 1,024 patches a round, 5 rounds; then 57,458 patches from a pack
    PCAM_BENCH_NETWORKS="resnet18 densenet121" PCAM_BENCH_PATCHES=4096 python -m benchmarks inference
    PCAM_BENCH_TEST_PATCHES=0 python -m benchmarks inference       # without the memory
    PCAM_BENCH_PRECISION=fp32 python -m benchmarks inference       # ours in float32, as `predict` is where bf16 moves the AUC
    PCAM_BENCH_NETWORKS="" PCAM_BENCH_MEMORY_NETWORK=cnn_basic python -m benchmarks inference   # the memory of another recipe or network

Ours is ``logits_of_rows`` in the variant that the probe picks for training. The plain loop has the same weights, fp32, default
layout, a Dataset over the same uint8 array (torchvision v2: crop, normalisation) and a DataLoader with 2 workers and batches of
64; its eight views are flips and turns of the loaded batch. Both sides run in turn. The largest difference of probabilities is
printed. Memory: a fresh process predicts with a tiny network from a pack of 57,458 test patches; the peak of RssAnon, imports
included (pages of the mapped pack are the kernel's to drop). Linux only. Writes results/inference.json (inference_cuda.json on a GPU).
Targets: twice the plain loop on a CPU; under 1 GB.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import tifffile
import torch

from benchmarks.common import (
    OURS,
    Side,
    device_here,
    in_turn,
    machine,
    measured_compute,
    ratios,
    recipe_for,
    spread,
    synthetic_store,
    variant_of,
    wait_for,
    workers_for,
)
from benchmarks.plain import ImageDataset, PlainPrediction, build_loader, evaluation_transform
from benchmarks.settings import RESULTS, setting, write_result
from pcam_automl.batches import open_patches
from pcam_automl.bundle import ModelBundle, write_bundle
from pcam_automl.calibration import probs_at
from pcam_automl.configs_folder import find_config, list_configs
from pcam_automl.data.pack import pack
from pcam_automl.data.sources import open_source
from pcam_automl.data.store import PatchStore
from pcam_automl.models.factory import build_network, normalisation_of
from pcam_automl.models.weights import Weights
from pcam_automl.recipe import Recipe, build_recipe
from pcam_automl.recipe_files import load_recipe
from pcam_automl.training.compute import Compute, Precision
from pcam_automl.training.scoring import Views, logits_of_rows

LOADER_BATCH = 64
TINY = "test_resnet"
N_DIFFERENT = 500
POLL_S = 0.01

PREDICT = """
import sys
from pathlib import Path
import torch
from pcam_automl.batches import open_patches
from pcam_automl.bundle import load_bundle
from pcam_automl.data.store import open_store
from pcam_automl.predict import build_predictor, compute_of, row_probs
bundle, store, device = load_bundle(Path(sys.argv[1])), open_store(Path(sys.argv[2])), torch.device("cpu")
predictor = build_predictor(bundle, compute_of(bundle, device), averaging="none")
print(len(row_probs(predictor, open_patches(store, device), store.test_rows())))
"""


class OurPrediction:
    """``logits_of_rows`` over some rows; ``logits`` holds what the last call gave."""

    def __init__(self, recipe: Recipe, store: PatchStore, rows: np.ndarray, compute: Compute, *, eight: bool) -> None:
        norm = normalisation_of(recipe, store.channel_mean, store.channel_std)
        self.views, self.rows, self.compute = Views(recipe, norm, "dihedral" if eight else "none"), rows, compute
        self.network = compute.place(build_network(recipe, Weights("none"), seed=0)).eval()
        self.patches = open_patches(store, torch.device(compute.device))
        self.logits = np.zeros(0, np.float32)

    def __call__(self) -> float:
        """All rows once; images/s."""
        began = time.perf_counter()
        self.logits = logits_of_rows(self.network, self.patches, self.rows, self.views, self.compute)
        wait_for(torch.device(self.compute.device))
        return len(self.rows) / (time.perf_counter() - began)


def measure_network(
    recipe: Recipe, store: PatchStore, compute: Compute, *, n_patches: int, n_rounds: int, n_workers: int
) -> dict[str, Any]:
    """Images/s of both sides with one and eight views, round by round."""
    device = torch.device(compute.device)
    rows = np.resize(np.arange(len(store), dtype=np.int64), n_patches)
    norm = normalisation_of(recipe, store.channel_mean, store.channel_std)
    transform = evaluation_transform(recipe.crop_size, norm.mean, norm.std)
    dataset = ImageDataset(np.array(store.patches[rows]), np.zeros(n_patches), transform)
    loader = build_loader(dataset, batch_size=LOADER_BATCH, n_workers=n_workers, pin=device.type == "cuda")
    network = build_network(recipe, Weights("none"), seed=0)
    found: dict[str, Any] = {"variant": variant_of(compute)}
    for name, eight in (("centre view", False), ("eight views", True)):
        ours = OurPrediction(recipe, store, rows, compute, eight=eight)
        plain = PlainPrediction(network, loader, device, eight=eight)
        sides: dict[str, Side] = {OURS: ours, "plain loop": plain}
        rates = in_turn(sides, n_rounds)
        difference = np.abs(probs_at(ours.logits) - probs_at(plain.logits)).max()
        found[name] = {
            "images_per_s": rates,
            "ratios": ratios(rates[OURS], rates["plain loop"]),
            "largest_difference": float(difference),
        }
    return found


def report(recipe: Recipe, found: dict[str, Any]) -> None:
    """Print one network's lines."""
    for name in ("centre view", "eight views"):
        part = found[name]
        rates = "  ".join(f"{side} {spread(values, 0)}" for side, values in part["images_per_s"].items())
        print(f"  {recipe.backbone} at {recipe.crop_size} px ({found['variant']}), {name}: {rates} images/s", end="")
        print(
            f"  ratio {spread(part['ratios'])}; probabilities differ by {part['largest_difference']:.1e} at most",
            flush=True,
        )


def write_test_pack(folder: Path, n_test: int) -> Path:
    """A pack of a Kaggle folder with ``n_test`` test patches; files of one picture share their bytes on the disk."""
    raw, rng = folder / "raw", np.random.default_rng(0)
    names = {
        "train": [hashlib.sha1(f"train {n}".encode()).hexdigest() for n in range(8)],
        "test": [hashlib.sha1(str(n).encode()).hexdigest() for n in range(n_test)],
    }
    for part, ids in names.items():
        (raw / part).mkdir(parents=True)
        for number, name in enumerate(ids):
            file, first = raw / part / f"{name}.tif", raw / part / f"{ids[number % N_DIFFERENT]}.tif"
            if number < N_DIFFERENT:
                tifffile.imwrite(file, rng.integers(20, 230, (96, 96, 3), np.uint8), photometric="rgb")
            else:
                file.hardlink_to(first)
    (raw / "train_labels.csv").write_text(
        "\n".join(["id,label", *(f"{x},{n % 2}" for n, x in enumerate(names["train"]))])
    )
    (raw / "sample_submission.csv").write_text("\n".join(["id,label", *(f"{x},0" for x in names["test"])]))
    pack(open_source(raw), folder / "pack")
    return folder / "pack"


def write_untrained_bundle(folder: Path, name: str) -> Path:
    """A bundle of an untrained network at 96 px: of a shipped recipe, or else of a timm network."""
    recipe = build_recipe({"backbone": name, "crop_size": 96})
    if name in list_configs("recipes"):
        fields = {"pretrained": False, "crop_size": 96, "normalise": "unit"}
        recipe = build_recipe(load_recipe(find_config("recipes", name)).model_dump() | fields)
    state = build_network(recipe, Weights("none"), seed=0).state_dict()
    norm = normalisation_of(recipe, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    write_bundle(folder, ModelBundle(recipe, norm, state, {}, {}))
    return folder


def peak_anonymous_bytes(command: list[str]) -> tuple[int, str]:
    """The highest RssAnon of a process while it runs (polled), and what it printed.

    Raises:
        RuntimeError: it failed.
    """
    with tempfile.TemporaryFile("w+") as out, subprocess.Popen(command, stdout=out, text=True) as process:
        peak, status = 0, Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            lines = [line for line in status.read_text().splitlines() if line.startswith("RssAnon")]
            peak = max([peak, *(1024 * int(line.split()[1]) for line in lines)])  # no such line once it has ended
            time.sleep(POLL_S)
        out.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
        return peak, out.read()


def measure_memory(n_test: int, name: str) -> dict[str, Any]:
    """Peak of a process that only imports, and of one that predicts ``n_test`` patches of a pack by a network of that name."""
    with tempfile.TemporaryDirectory() as folder:
        bundle, pack_ = write_untrained_bundle(Path(folder) / "bundle", name), write_test_pack(Path(folder), n_test)
        imports = "\n".join(line for line in PREDICT.splitlines() if "import" in line)
        idle, _ = peak_anonymous_bytes([sys.executable, "-c", imports])
        peak, said = peak_anonymous_bytes([sys.executable, "-c", PREDICT, str(bundle), str(pack_)])
        pack_bytes = (pack_ / "patches.npy").stat().st_size
    assert int(said.split()[-1]) == n_test, f"{said} patches were predicted, not {n_test}"
    return {
        "network": name,
        "patches": n_test,
        "pack_bytes": pack_bytes,
        "imports_anon_bytes": idle,
        "peak_anon_bytes": peak,
    }


def main() -> None:
    """Measure, print, write ``benchmarks/results/inference.json``."""
    device, n_rounds, n_patches = device_here(), setting("ROUNDS", 5), setting("PATCHES", 1024)
    n_workers, networks = workers_for(device), os.environ.get("PCAM_BENCH_NETWORKS", "resnet18 resnet10t").split()
    print(f"inference: {n_patches:,} patches a round, {n_rounds} rounds, {n_workers} loader workers; {machine(device)}")
    found: dict[str, Any] = {"patches": n_patches, "workers": n_workers, "machine": machine(device), "networks": {}}
    with synthetic_store(min(n_patches, 2048)) as store:
        for backbone in networks:
            recipe = recipe_for(backbone, 64, 64)
            compute = measured_compute(recipe, device)
            if (precision := os.environ.get("PCAM_BENCH_PRECISION")) is not None:
                compute = replace(compute, precision=cast(Precision, precision), routed=False)
            part = measure_network(recipe, store, compute, n_patches=n_patches, n_rounds=n_rounds, n_workers=n_workers)
            found["networks"][backbone] = part
            report(recipe, part)
    if n_test := setting("TEST_PATCHES", 57_458):
        memory = found["memory"] = measure_memory(n_test, os.environ.get("PCAM_BENCH_MEMORY_NETWORK", TINY))
        print(
            f"  {memory['network']}: predicting {n_test:,} patches of a pack of {memory['pack_bytes'] / 1e9:.2f} GB: "
            f"{memory['peak_anon_bytes'] / 1e6:,.0f} MB at the peak, {memory['imports_anon_bytes'] / 1e6:,.0f} of them after the imports"
        )
    write_result(RESULTS / ("inference.json" if device.type == "cpu" else f"inference_{device.type}.json"), found)


if __name__ == "__main__":
    main()
