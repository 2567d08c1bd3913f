"""Reads, measures and writes runs of patches, here or in processes. Knows no labels and no other file of a pack."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for_exit
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pcam_automl.data.h5 import read_rows
from pcam_automl.data.images import PatchFault, read_patches
from pcam_automl.data.masks import KAGGLE, MaskRule, read_masks
from pcam_automl.data.quality import Measures, measure
from pcam_automl.data.store import Flag
from pcam_automl.data.template import Template
from pcam_automl.errors import DataError
from pcam_automl.recipe import PATCH_PX

CHUNK_PATCHES = 512
"""Of 96 px; larger images come in smaller runs, so that memory stays the same."""
_BLOCK_PATCHES = 64  # 1.8 MB of 96 px patches: read, measured and written while they are in the cache
_IN_PROCESS_BELOW = 6_000  # two workers take 0.4 s to start: 0.05 ms a patch here, 0.2 ms where files are compressed
_SYNC_EVERY_S = 0.1
_HOLDS_LOCKS = frozenset({"torch", "h5py"})
_MAX_WORKERS = 8  # beyond, reading is bound by the disk; each costs about 45 MB


@dataclass(frozen=True)
class Task:
    """Rows ``first``.. of the pack and where their pixels are."""

    first: int
    n: int
    folder: Path
    names: tuple[str, ...]
    """Image files; empty for HDF5."""
    h5: Path | None = None
    h5_mask: Path | None = None
    h5_first: int = 0
    mask_names: tuple[str, ...] = ()
    """Mask files, empty names for patches without; empty for HDF5."""


@dataclass(frozen=True)
class Done:
    """What a worker hands back for a task."""

    first: int
    flags: NDArray[np.uint16]
    stats: NDArray[np.float32]
    sharpness: NDArray[np.float32]
    digest: NDArray[np.uint8]
    faults: dict[int, str]
    mask_faults: dict[int, str]

    @classmethod
    def empty(cls, task: Task) -> Done:
        """Room for the rows of ``task``."""
        flags, stats = np.zeros(task.n, np.uint16), np.zeros((task.n, 6), np.float32)
        return cls(task.first, flags, stats, np.zeros(task.n, np.float32), np.zeros((task.n, 16), np.uint8), {}, {})

    def take(self, block: slice, measures: Measures, faults: dict[int, PatchFault]) -> None:
        """Enter a block's measures; those of faulty patches are zero."""
        for name in ("flags", "stats", "sharpness", "digest"):
            values = getattr(self, name)[block]
            values[:] = getattr(measures, name)
            values[list(faults)] = 0
        for row, fault in faults.items():
            self.flags[block.start + row] = Flag.WRONG_SHAPE if fault.wrong_shape else Flag.UNREADABLE
            self.faults[self.first + block.start + row] = fault.reason


@dataclass(frozen=True)
class Job:
    """What every task of one packing shares. ``patches`` and ``masks`` are where to write, None to measure only."""

    shape: tuple[int, int]
    templates: tuple[Template, ...]
    patches: Path | None
    patches_at: int
    masks: Path | None
    masks_at: int
    mask_rule: MaskRule = KAGGLE


def chunk_for(shape: tuple[int, int]) -> int:
    """Patches of (H, W) px in a run."""
    return max(1, min(CHUNK_PATCHES, CHUNK_PATCHES * PATCH_PX**2 // (shape[0] * shape[1])))


def n_workers_for(n_patches: int, workers: int | None) -> int:
    """Processes to start: as asked, else one a core (at most 8); 0 means this process does it alone."""
    if workers is not None:
        return max(0, workers)
    if n_patches < _IN_PROCESS_BELOW:
        return 0
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, _MAX_WORKERS)


def run_tasks(tasks: Iterator[Task], job: Job, n_workers: int) -> Generator[Done, None, None]:
    """Results as they come, from this process (``n_workers`` 0) or from others; at most four tasks a worker wait."""
    if n_workers == 0:
        templates = list(job.templates)
        for task in tasks:
            yield _do(task, job, templates)
        return
    context = multiprocessing.get_context(_start_method())
    with _one_thread_each(), ProcessPoolExecutor(n_workers, context, _start_worker, (job,)) as pool:
        pending: set[Future[Done]] = set()
        try:
            for task in tasks:
                with _interrupts_blocked():
                    pending.add(pool.submit(_do_in_worker, task))
                if len(pending) >= 4 * n_workers:
                    finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in finished)
            while pending:
                finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in finished)
        except BrokenProcessPool:
            raise DataError(
                "a packing process was killed, perhaps for want of memory; free some and give the command again (behind `taskset -c 0` it packs in one process)"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_method() -> Literal["fork", "spawn"]:
    """Fork only where this process is known to hold no lock that a copy would wait for: it has one Python thread and
    neither torch nor HDF5. (numpy's OpenBLAS ends its own threads before a fork.) Spawning imports for half a second.
    """
    alone = threading.active_count() == 1 and _HOLDS_LOCKS.isdisjoint(sys.modules)
    return "fork" if sys.platform == "linux" and alone else "spawn"


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """A process started inside never sees Ctrl-C, not even while it imports; ours waits for a moment."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Workers inherit these: a BLAS thread pool in each would only cost memory."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


_worker_job: Job
_worker_templates: list[Template]


def _start_worker(job: Job) -> None:
    """Ctrl-C is the parent's to handle; a worker whose parent was killed ends at once."""
    global _worker_job, _worker_templates
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _worker_job, _worker_templates = job, list(job.templates)
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def follow_parent() -> None:
        wait_for_exit([sentinel])
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def _do_in_worker(task: Task) -> Done:
    return _do(task, _worker_job, _worker_templates)


def _do(task: Task, job: Job, templates: list[Template]) -> Done:
    done = Done.empty(task)
    n_block = task.n if task.h5 else _BLOCK_PATCHES
    buffer = np.empty((min(n_block, task.n), *job.shape, 3), np.uint8)
    for begin in range(0, task.n, n_block):
        block = slice(begin, min(begin + n_block, task.n))
        patches = buffer[: block.stop - begin]
        faults: dict[int, PatchFault] = {}
        if task.h5 is None:
            faults = read_patches(task.folder, task.names[block], patches, templates)
        else:
            read_rows(task.h5, "x", task.h5_first, patches)
        done.take(block, measure(patches), faults)
        if job.patches is not None:
            _write_rows(job.patches, job.patches_at, task.first + begin, patches)
    if job.masks is not None:
        masks = read_task_masks(task, job.shape, job.mask_rule)
        if isinstance(masks, dict):
            done.mask_faults.update({task.first + row: reason for row, reason in masks.items()})
        else:
            _write_rows(job.masks, job.masks_at, task.first, masks)
    return done


@contextmanager
def synced_meanwhile(path: Path) -> Iterator[None]:
    """A thread brings what is written to ``path`` to the disk during the block: waiting for the disk costs no core.

    Raises:
        OSError: the disk refused something, at the end of the block: the system tells it to one fsync only.
    """
    stop = threading.Event()

    def sync() -> None:
        fd = os.open(path, os.O_RDONLY)
        try:
            while not stop.wait(_SYNC_EVERY_S):
                os.fsync(fd)
        finally:
            os.close(fd)

    with ThreadPoolExecutor(1) as thread:
        synced = thread.submit(sync)
        try:
            yield
        finally:
            stop.set()
        synced.result()


def read_task_masks(task: Task, shape: tuple[int, int], rule: MaskRule) -> NDArray[np.uint8] | dict[int, str]:
    """The (n, H, W) masks of a task, or the reasons of the faulty ones by row of the task."""
    if task.h5_mask is None:
        return read_masks(task.folder, task.mask_names, shape, rule)
    masks = np.empty((task.n, *shape, 1), np.uint8)
    read_rows(task.h5_mask, "mask", task.h5_first, masks)
    grey = [row for row, mask in enumerate(masks) if ((mask != 0) & (mask != mask.max())).any()]
    return dict.fromkeys(grey, "its mask has more than two values") or (masks[..., 0] != 0).astype(np.uint8)


def _write_rows(path: Path, start: int, first: int, rows: NDArray[np.uint8]) -> None:
    # pwrite: 7 us a patch where a memory map took 74, and a full disk is an error, not a SIGBUS.
    view = rows.reshape(-1).data
    at = start + first * (len(view) // len(rows))
    fd = os.open(path, os.O_WRONLY)
    try:
        while view:
            n_written = os.pwrite(fd, view, at)
            view, at = view[n_written:], at + n_written
    finally:
        os.close(fd)
