"""What the benchmarks share: sides that take turns, ratios round by round, a synthetic pack, our side of a training, the
result file. Times nothing by itself.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.settings import host, setting
from pcam_automl.batches import ViewStream, open_patches
from pcam_automl.configs_folder import find_config
from pcam_automl.data.pack import pack
from pcam_automl.data.sources import open_source
from pcam_automl.data.store import PatchStore, open_store
from pcam_automl.data.synthetic import write_synthetic
from pcam_automl.models.weights import Weights
from pcam_automl.recipe import Recipe
from pcam_automl.recipe_files import load_recipe
from pcam_automl.training.compute import Compute, cpu_name, device_name, use_device
from pcam_automl.training.engine import Training
from pcam_automl.training.schedule import Rates
from pcam_automl.training.speed import SpeedBook
from pcam_automl.training.start import choose_rows, start_training

OURS = "pcam-automl"
KEY = 1
"""Of every lineage here: all rounds draw from one stream of views."""
Side = Callable[[], float]
"""One round of one side; returns a rate, or for `lower is better` a time."""


def device_here() -> torch.device:
    """``PCAM_BENCH_DEVICE`` (cpu), with threads and memory as the package would use them."""
    return use_device(os.environ.get("PCAM_BENCH_DEVICE", "cpu"))


def workers_for(device: torch.device) -> int:
    """Loader workers of the other sides: ``PCAM_BENCH_WORKERS``, 2 beside a CPU and 8 beside a GPU."""
    return setting("WORKERS", 8 if device.type == "cuda" else 2)


def machine(device: torch.device) -> dict[str, Any]:
    """What a figure was measured on."""
    return {
        **host(),
        "device": device_name(device),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def in_turn(sides: Mapping[str, Side], n_rounds: int) -> dict[str, list[float]]:
    """What every side gave in every round, after a round that does not count. Who goes first changes from round to round."""
    names = list(sides)
    for side in sides.values():
        side()  # allocation, oneDNN's caches, loader workers, compilation
    found: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(n_rounds):
        for place in range(len(names)):
            name = names[(round_ + place) % len(names)]
            found[name].append(sides[name]())
    return found


class Apart:
    """A side in a process of its own, so that what one side sets for its process (memory, threads) serves no other.

    Args:
        build: makes the side there; a function of a module.
        words: its arguments, which are pickled.
    """

    def __init__(self, build: Callable[..., Side], *words: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, multiprocessing.get_start_method(), build, words))
        self._process.start()
        theirs.close()

    def __call__(self) -> float:
        """A round there.

        Raises:
            RuntimeError: it failed; the traceback stands above.
        """
        self._pipe.send("round")
        try:
            return float(self._pipe.recv())
        except EOFError:
            raise RuntimeError(f"the process of a side ended with {self._process.exitcode}") from None

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()


def _serve(pipe: Connection, start_method: str, build: Callable[..., Side], words: tuple[Any, ...]) -> None:
    """In the process: a round whenever one is asked for, until the other end is closed."""
    multiprocessing.set_start_method(start_method, force=True)  # a spawned process would spawn its loaders' workers
    side = build(*words)
    with contextlib.suppress(EOFError):
        while pipe.recv() == "round":
            pipe.send(side())


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Round by round: rounds are minutes apart on a shared machine, their parts are not."""
    return [a / b for a, b in zip(over, under, strict=True)]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, least and most: ``2.31 (2.10 to 2.44)``."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def synthetic_store(n_patches: int) -> Iterator[PatchStore]:
    """A pack of ``n_patches`` synthetic patches (`pcam-automl synth`) in a folder that is removed at the end."""
    with tempfile.TemporaryDirectory() as folder:
        write_synthetic(Path(folder) / "raw", n_patches=n_patches, n_slides=24, seed=0)
        pack(open_source(Path(folder) / "raw"), Path(folder) / "pack")
        yield open_store(Path(folder) / "pack")


def recipe_for(backbone: str, crop_size: int, batch_size: int) -> Recipe:
    """The default recipe, its augmentation included, with another network, crop and batch."""
    fields = {"backbone": backbone, "crop_size": crop_size, "batch_size": batch_size}
    return load_recipe(find_config("recipes", "default"), overrides=fields)


def measured_compute(recipe: Recipe, device: torch.device) -> Compute:
    """The variant that the package picks for the recipe, measured now."""
    with tempfile.TemporaryDirectory() as folder:
        return SpeedBook(Path(folder) / "speed.json").compute_for(recipe, device)


def variant_of(compute: Compute) -> str:
    """``bf16 channels_last``: the precision and whatever is switched on."""
    fields = {name: value for name, value in compute.to_json().items() if name not in ("device", "step_s")}
    return " ".join(value if isinstance(value, str) else name for name, value in fields.items() if value)


def start(recipe: Recipe, store: PatchStore, compute: Compute) -> Training:
    """Our training at its beginning, on all labelled patches, without any to be scored on."""
    rows = choose_rows(store, recipe, store.development_rows(), np.zeros(0, np.int64))
    patches = open_patches(store, torch.device(compute.device))
    # As a final training has it; without a GPU it changes nothing.
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    return start_training(recipe, store, rows, patches=patches, weights=Weights("none"), compute=compute, key=KEY)


def constant_rates(recipe: Recipe) -> Rates:
    """The recipe's peak rates with every layer trainable."""
    return Rates(0, recipe.lr, recipe.lr, recipe.weight_decay, 1.0)


def our_training(training: Training, rows: np.ndarray, n_steps: int) -> Side:
    """``n_steps`` steps of :meth:`Training.train`, augmentation, clipping and weight average included; images/s."""
    stream, rates = ViewStream(KEY, rows, 0), constant_rates(training.recipe)
    device = torch.device(training.compute.device)

    def steps() -> float:
        first = training.views
        last = first + n_steps * training.recipe.batch_size
        began = time.perf_counter()
        training.train(stream, first, last, lambda view: rates, lambda: None, lambda n: None)
        wait_for(device)
        return (last - first) / (time.perf_counter() - began)

    return steps
