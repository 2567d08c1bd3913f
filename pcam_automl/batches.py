"""Store rows to device batches, and which patch each training view shows. Augments nothing (see augment.py)."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pcam_automl.counter import key_of, permutation
from pcam_automl.data.store import PatchStore
from pcam_automl.errors import DataError

RESIDENT_SHARE = 0.6
"""Share of the free device memory, on a CPU of the host's, that the resident pack may take; the rest is for the network."""
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


class Patches(Protocol):
    """Row numbers of a store to uint8 batches (B, 3, S, S) on a device."""

    @property
    def device(self) -> torch.device: ...

    def gather(self, rows: np.ndarray) -> Tensor:
        """rows: (B,) int64 row numbers of the store -> (B, 3, S, S) uint8, channels last in memory."""
        ...

    def expect(self, rows: np.ndarray) -> None:
        """Announce the rows of the next :meth:`gather`, so that it need not wait. Nothing changes but the time it takes."""
        ...


@dataclass(frozen=True)
class ResidentPatches:
    """All patches on the device: (N, S, S, 3) uint8. On a CPU that is the memory map itself, no copy of it."""

    tensor: Tensor
    device: torch.device

    def gather(self, rows: np.ndarray) -> Tensor:
        index = torch.from_numpy(rows).to(self.device, non_blocking=True)
        return self.tensor.index_select(0, index).permute(0, 3, 1, 2)

    def expect(self, rows: np.ndarray) -> None:
        """Nothing to do: they are here."""


class StreamedPatches:
    """Patches stay in the memory map. A thread gathers what is expected next into one of two staging buffers, pinned where
    the device is a GPU, and copies it on a stream of its own while the device works on the batch before.

    Args:
        tensor: (N, S, S, C) uint8 on the host.
        device: where batches go.
    """

    def __init__(self, tensor: Tensor, device: torch.device) -> None:
        self.tensor, self.device = tensor, device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="patches")
        self._expected: tuple[np.ndarray, Future[tuple[Tensor, torch.cuda.Event | None]]] | None = None
        self._staging: list[tuple[Tensor | None, torch.cuda.Event | None]] = [(None, None), (None, None)]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def expect(self, rows: np.ndarray) -> None:
        """Begin to fetch these rows."""
        self._expected = (rows, self._thread.submit(self._fetch, rows))

    def gather(self, rows: np.ndarray) -> Tensor:
        """The batch, fetched already if it was expected."""
        expected, self._expected = self._expected, None
        if expected is None or not np.array_equal(expected[0], rows):
            expected = (rows, self._thread.submit(self._fetch, rows))
        batch, copied = expected[1].result()
        if copied is not None:
            here = torch.cuda.current_stream(self.device)
            here.wait_event(copied)
            batch.record_stream(here)  # else its memory could be reused by the copying stream while it is read here
        return batch.permute(0, 3, 1, 2)

    def _fetch(self, rows: np.ndarray) -> tuple[Tensor, torch.cuda.Event | None]:
        """In the thread: gather on the host, copy to the device."""
        staging, in_use = self._staging.pop(0)
        try:
            if in_use is not None:
                in_use.synchronize()  # the copy of two batches ago
            if staging is None or len(staging) < len(rows):
                staging = self._new_staging(len(rows))
            held = staging[: len(rows)]
            if self._stream is None:  # torch would start threads of its own beside those that train
                np.take(self.tensor.numpy(), rows, axis=0, out=held.numpy())
            else:
                torch.index_select(self.tensor, 0, torch.from_numpy(rows), out=held)
            batch, in_use = self._copied(held)
        finally:  # also where memory is short: a buffer that is not put back is one for ever
            self._staging.append((staging, in_use))
        return batch, in_use

    def _copied(self, held: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        """The batch on the device, and what says when its copy is made."""
        if self._stream is None:
            return held.clone(), None
        # The device first: leaving the stream, this thread would go back to the first GPU and open a context there.
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            batch = held.to(self.device, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(self._stream)
        return batch, copied

    def _new_staging(self, n: int) -> Tensor:
        shape = (n, *self.tensor.shape[1:])
        if self._stream is None:
            return torch.empty(shape, dtype=torch.uint8)
        with torch.cuda.device(self.device):  # pinning by this thread would open a context on the first device
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)


def open_patches(store: PatchStore, device: torch.device, shared: Tensor | None = None) -> Patches:
    """The store's patches, resident on ``device`` where they fit, else streamed from the memory map.

    Args:
        store: of the patches.
        device: where batches are wanted.
        shared: what :func:`load_shared` gave another process for the same store and device.

    Raises:
        DataError: ``shared`` is of other patches.
    """
    if shared is None:
        return _open(store, "patches.npy", device)
    if shared.shape != store.patches.shape or shared.device != device:
        raise DataError(
            f"the shared patches {tuple(shared.shape)} on {shared.device} are not those of {store.root}, {tuple(store.patches.shape)} on {device}"
        )
    return ResidentPatches(shared, device)


def load_shared(store: PatchStore, device: torch.device) -> Tensor | None:
    """The store's patches on a GPU, for several processes to work on: (N, S, S, 3) uint8, to be handed to them as an argument.

    A process that gets it through torch's pickling (CUDA IPC) has no copy of its own; this one must keep it, and live, as long.

    Returns:
        None where there is nothing to share: on a CPU all map the same file; and where the patches are streamed, or the platform or
        torch's allocator cannot share (CUDA IPC is Linux's).
    """
    if device.type != "cuda" or not can_share(device):
        return None
    opened = open_patches(store, device)
    return opened.tensor if isinstance(opened, ResidentPatches) else None


def can_share(device: torch.device) -> bool:
    """Whether torch hands tensors of a GPU to other processes: on Linux alone, and not if its allocator was told to take CUDA's own pool.
    Tried with a byte, since what is sent and never received is never freed. Expandable segments are sent without complaint, but whoever
    receives them must be allowed to open another process's files (pidfd_getfd), which containers forbid (pytorch issue 165685).
    """
    words = ",".join(os.environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")).lower()
    if sys.platform != "linux" or "expandable_segments:true" in words.replace(" ", ""):
        return False
    try:
        ForkingPickler.dumps(torch.empty(1, dtype=torch.uint8, device=device))
    except RuntimeError:  # each process then holds its own
        return False
    return True


def open_masks(store: PatchStore, device: torch.device) -> Patches:
    """The store's masks as :func:`open_patches` gives its patches: uint8 batches (B, 1, H, W) of 0 and 1.

    Raises:
        DataError: the store has none.
    """
    if store.masks is None:
        raise DataError(f"{store.root} holds no masks; pack folders of images and masks, or a set with masks beside it")
    return _open(store, "masks.npy", device)


def _open(store: PatchStore, name: str, device: torch.device) -> Patches:
    # Copy-on-write, since torch warns about read-only arrays; nothing writes to it.
    mapped = torch.from_numpy(np.load(store.root / name, mmap_mode="c", allow_pickle=False))
    mapped = mapped if mapped.ndim == 4 else mapped[..., None]
    if device.type == "cpu":
        small = mapped.nbytes <= RESIDENT_SHARE * memory_bytes()  # else pages come from the disk again and again
        return ResidentPatches(mapped, device) if small else StreamedPatches(mapped, device)
    gc.collect()  # a trial that failed holds its search's pack through its traceback
    torch.cuda.empty_cache()  # what was held before is free now, but not given back
    free_bytes, _ = torch.cuda.mem_get_info(device)
    if mapped.nbytes <= RESIDENT_SHARE * free_bytes:  # uint8: 6.1 GB for Kaggle's train set
        with contextlib.suppress(torch.OutOfMemoryError):  # another process took it in the meantime
            return ResidentPatches(mapped.to(device), device)
        torch.cuda.empty_cache()
    return StreamedPatches(mapped, device)


def memory_bytes() -> float:
    """Of the host's memory what this process may have: all of it, or a container's limit (cgroup v2); infinite where neither can be told."""
    least = math.inf
    with contextlib.suppress(AttributeError, ValueError, OSError):  # Windows
        least = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError):
        limit = CGROUP_LIMIT.read_text().strip()
        least = min(least, float(limit)) if limit.isdigit() else least
    return least


@dataclass(frozen=True)
class ViewStream:
    """Which store row each training view shows: one fresh permutation of the subset an epoch.

    Attributes:
        key: the lineage's 64-bit key; equal keys give equal streams on every machine.
        rows: (n,) int64 store rows of the subset.
        first_view: the view index at which this stream starts.
    """

    key: int
    rows: np.ndarray
    first_view: int

    def rows_of(self, first: int, last: int) -> np.ndarray:
        """Store rows of the views [first, last): (last - first,) int64. Any cut of the stream gives the same rows."""
        n = len(self.rows)
        begin, end = first - self.first_view, last - self.first_view
        pieces = []
        for epoch in range(begin // n, (end - 1) // n + 1):
            order = self._epoch(epoch)
            pieces.append(order[max(begin - epoch * n, 0) : end - epoch * n])
        return np.concatenate(pieces)

    def _epoch(self, epoch: int) -> np.ndarray:
        cached: dict[int, np.ndarray] = self.__dict__.setdefault("_epochs", {})
        if epoch not in cached:
            cached.clear()  # the hot loop walks forward: one epoch in memory is enough
            cached[epoch] = self.rows[permutation(key_of(self.key, "epoch", self.first_view, epoch), n=len(self.rows))]
        return cached[epoch]


def in_batches(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """``rows`` in order, ``size`` at a time."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
