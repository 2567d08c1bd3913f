"""How many workers a machine takes, and on which device each runs. Starts none (see processes.py)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import joblib
import torch
from torch import Tensor

from pcam_automl.batches import RESIDENT_SHARE, load_shared
from pcam_automl.data.store import PatchStore
from pcam_automl.errors import InputError
from pcam_automl.training.compute import choose_device

MOST_PER_DEVICE = 8
CONTEXT_BYTES = 500_000_000
"""What CUDA itself takes of a device for each process, about."""
LEAST_OWN_SHARE = 0.2
"""Of a step, that is the device's own at least: a difference of two measurements may be nothing but their noise."""


def worker_devices(
    text: str, n_workers: int | None, per_device: str | None, *, fitting: Callable[[torch.device], int]
) -> list[str]:
    """The device of each worker.

    Args:
        text: ``--device``; ``auto`` and ``cuda`` are every CUDA device, ``cuda:1`` that one.
        n_workers: ``--workers``; they take turns over the devices. None is one a device.
        per_device: ``--workers-per-device``: a number or ``auto``.
        fitting: for ``auto``, how many a device takes.

    Raises:
        InputError: an absent device, both options, or a number that is none.
    """
    if n_workers is not None and per_device is not None:
        raise InputError(f"--workers {n_workers} and --workers-per-device {per_device} exclude each other; keep one")
    first = choose_device(text)
    every = first.type == "cuda" and text in ("auto", "cuda")
    devices = [f"cuda:{n}" for n in range(torch.cuda.device_count())] if every else [str(first)]
    if per_device is None:
        n = len(devices) if n_workers is None else n_workers
        return [devices[number % len(devices)] for number in range(n)]
    if per_device != "auto" and not (per_device.isdigit() and 1 <= int(per_device) <= MOST_PER_DEVICE):
        raise InputError(f"--workers-per-device must be auto or in [1, {MOST_PER_DEVICE}], got {per_device!r}")
    each = {device: fitting(torch.device(device)) if per_device == "auto" else int(per_device) for device in devices}
    return [device for device, n in each.items() for _ in range(n)]


def n_for_cpu(rate_of: Callable[[int], float]) -> int:
    """Workers that train most images a second together on this machine's cores, none of them shared.

    Args:
        rate_of: training images a second of one worker with so many threads, measured.
    """
    cores = int(joblib.cpu_count())
    choices = [n for n in range(1, min(cores, MOST_PER_DEVICE) + 1) if cores % n == 0]
    return max(choices, key=lambda n: (n * rate_of(cores // n), -n))


def n_for_gpu(
    *,
    free_bytes: int,
    pack_bytes: int,
    peak_bytes: int,
    step_s: float,
    double_step_s: float,
    n_cores: int,
    shares: bool = True,
) -> int:
    """Workers that fit into a GPU's memory and find it idle.

    A step of twice the batch takes ``double_step_s``; what it takes more than ``step_s`` is the device's own time for a
    batch, the rest of ``step_s`` is launching, during which another worker's batch can run.

    Args:
        free_bytes: of the device, before any worker.
        pack_bytes: of the patches, streamed where they take too much.
        peak_bytes: a training step's.
        step_s: measured seconds of a step.
        double_step_s: the same for twice the batch.
        n_cores: host cores for this GPU's workers; each worker keeps one busy.
        shares: whether the workers share the patches (:func:`shared_packs`); each holds its own else.
    """
    resident = pack_bytes if pack_bytes <= RESIDENT_SHARE * free_bytes else 0
    once, each = (resident, 0) if shares else (0, resident)
    by_memory = int((free_bytes - once) // max(1, peak_bytes + CONTEXT_BYTES + each))
    own_s = max(double_step_s - step_s, LEAST_OWN_SHARE * step_s)
    by_time = round(step_s / own_s)
    return max(1, min(by_memory, by_time, n_cores, MOST_PER_DEVICE))


def shared_packs(store: PatchStore, devices: Sequence[str]) -> dict[str, Tensor]:
    """The patches on each GPU that several workers run on, held once; empty where nothing can be shared.

    Args:
        store: of the patches.
        devices: one a worker.
    """
    several = [device for device, n in Counter(devices).items() if n > 1 and device != "cpu"]
    packs = {device: load_shared(store, torch.device(device)) for device in several}
    return {device: pack for device, pack in packs.items() if pack is not None}
