"""Builds a pack from a source, and compares the two again. Judges no patch itself and opens no pack for training."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pcam_automl.data.dense_sources import check_sizes
from pcam_automl.data.h5 import open_dataset, plain_h5
from pcam_automl.data.images import PatchFault, read_patch, read_patches
from pcam_automl.data.masks import KAGGLE, MaskRule, find_background
from pcam_automl.data.pack_files import write_pack_files
from pcam_automl.data.pool import (
    CHUNK_PATCHES,
    Job,
    Task,
    chunk_for,
    n_workers_for,
    read_task_masks,
    run_tasks,
    synced_meanwhile,
)
from pcam_automl.data.quality import complete_flags, pixel_digests
from pcam_automl.data.sources import PatchSource
from pcam_automl.data.stamp import Stamp
from pcam_automl.data.store import TEST, Flag, PatchStore, Progress, open_store
from pcam_automl.data.template import Template
from pcam_automl.errors import DataError, first_few
from pcam_automl.files import check_replaceable, folder_written_whole, write_faults
from pcam_automl.recipe import PATCH_PX

_N_PROBED = 64
_PACK_NONE = ", or move the folder masks away to pack none"


def pack(
    source: PatchSource,
    out: Path,
    *,
    keep_outliers: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> PatchStore:
    """Read every patch of ``source`` once and write the pack folder ``out``, whole or not at all.

    Training patches that cannot be read, or are of another shape than the rest, are left out (row kept, zeros);
    so are all-dark and all-bright ones. Test patches are never left out. Masks, where the source has them, must all be
    sound: a wrong one would be trained on unseen.

    Args:
        source: what to read.
        out: the pack's folder; an older pack there is replaced when the new one is complete.
        keep_outliers: train on all-dark and all-bright patches, too.
        workers: processes; None takes one a core (at most 8) and none for small sets.
        progress: called with (patches done, patches in all) in this process.

    Raises:
        DataError: no training patch is usable, a mask or an HDF5 file is corrupt, or ``out`` cannot be written.
    """
    out = Path(out)
    _check_target(source, out)
    if source.kind == "dense":
        check_sizes(source.root, source.ids.tolist(), source.files.tolist(), _mask_files(source))
    stamp = Stamp(source)
    with folder_written_whole(out) as folder, ExitStack() as stack:
        h5 = _h5_files(source, folder, stack)
        shape, templates = _probe(source, h5)
        job = _prepare_files(folder, source, shape, templates)
        arrays, faults = _measure_all(source, h5, job, workers, progress, stamp)
        stack.close()
        if source.kind == "dense":
            source = replace(source, label=_labels_of_masks(source, job))
        arrays["flags"] = complete_flags(
            arrays["flags"], arrays["digest"], source.label, source.part, keep_outliers=keep_outliers
        )
        if not np.any((source.part != TEST) & ((arrays["flags"] & (Flag.UNREADABLE | Flag.WRONG_SHAPE)) == 0)):
            row, reason = next(iter(faults.items()))
            raise DataError(
                f"none of the training patches in {source.root} can be used; the first: {source.ids[row]}: {reason}"
            )
        write_pack_files(folder, source, job, arrays, faults, stamp=stamp.hexdigest(), keep_outliers=keep_outliers)
    return open_store(out)


def verify(
    store: PatchStore, source: PatchSource, *, workers: int | None = None, progress: Progress | None = None
) -> int:
    """Read the source again and compare it, and the pack's own pixels, with the digests in the pack.

    Returns:
        The number of patches compared.

    Raises:
        DataError: something differs (all of it is named), or a file of the source is corrupt as a whole.
    """
    labels = store.label if source.kind == "dense" else source.label  # those of masks: compared below
    pairs = [("ids", store.ids, source.ids), ("labels", store.label, labels), ("parts", store.part, source.part)]
    pairs += _named_pairs(store, source)
    lines = [f"other {name} in the source" for name, ours, theirs in pairs if not np.array_equal(ours, theirs)]
    damaged: list[str] = []
    chunk = chunk_for((store.patches.shape[1], store.patches.shape[2]))  # large images a few at a time: they are copied
    for first in range(0, len(store), chunk):
        rows = slice(first, first + chunk)
        digest = pixel_digests(np.ascontiguousarray(store.patches[rows]))
        sound = (store.flags[rows] & (Flag.UNREADABLE | Flag.WRONG_SHAPE)) == 0
        damaged += store.ids[rows][sound & (digest != store.digest[rows]).any(axis=1)].tolist()
    if damaged:
        lines.append(f"{len(damaged)} patches in the pack are damaged: {first_few(damaged)}")
    if not np.array_equal(store.ids, source.ids):
        absent = sorted(set(store.ids.tolist()) ^ set(source.ids.tolist()))
        lines[0] += f" ({first_few(absent)})" if absent else " (their order)"
    else:
        with write_faults(store.root.parent), ExitStack() as stack:
            beside = store.root.parent
            if any(name.endswith(".gz") for part in source.h5.values() for name in (part.x, part.mask) if name):
                beside = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".verify-", dir=beside)))
            h5 = _h5_files(source, beside, stack)
            job = Job((store.patches.shape[1], store.patches.shape[2]), (), None, 0, None, 0, _mask_rule(source))
            arrays, _ = _measure_all(source, h5, job, workers, progress)
            lines += _changed_masks(store, source, h5)
        if changed := store.ids[(arrays["digest"] != store.digest).any(axis=1)].tolist():
            lines.append(f"{len(changed)} patches of the source are not what was packed: {first_few(changed)}")
    if lines:
        raise DataError(f"{store.root} does not match {source.root}: {'; '.join(lines)}; pack it again")
    return len(store)


def same_names(store: PatchStore, source: PatchSource) -> bool:
    """Whether the pack has the source's slides and scanners."""
    return all(np.array_equal(ours, theirs) for _, ours, theirs in _named_pairs(store, source))


def _named_pairs(store: PatchStore, source: PatchSource) -> list[tuple[str, NDArray[Any], NDArray[Any]]]:
    return [
        ("slides", names_by_row(store.group, store.group_names), source.group),
        ("domains", names_by_row(store.domain, store.domain_names), source.domain),
    ]


def names_by_row(code: NDArray[np.int32], names: Sequence[str]) -> NDArray[np.str_]:
    """(N,) names, empty where there is none."""
    return np.array([*names, ""], dtype=np.str_)[np.asarray(code)]  # -1 is the last


def _changed_masks(store: PatchStore, source: PatchSource, h5: dict[int, tuple[Path, Path | None]]) -> list[str]:
    """One line if the pack's masks are not those of the source."""
    if store.masks is None:
        return ["the source has masks, the pack has none"] if source.has_masks else []
    if not source.has_masks:
        return ["the pack has masks, the source has none"]
    changed: list[str] = []
    shape = (store.masks.shape[1], store.masks.shape[2])
    rule = _mask_rule(source)
    for task in _tasks(source, h5, shape):
        rows = slice(task.first, task.first + task.n)
        masks = read_task_masks(task, shape, rule)
        wrong = (
            list(masks) if isinstance(masks, dict) else np.flatnonzero((masks != store.masks[rows]).any(axis=(1, 2)))
        )
        changed += store.ids[rows][wrong].tolist()
    return [f"{len(changed)} masks of the source are not what was packed: {first_few(changed)}"] if changed else []


def _check_target(source: PatchSource, out: Path) -> None:
    resolved, root = out.resolve(), source.root.resolve()
    if resolved == root or resolved in root.parents:
        raise DataError(f"the pack cannot be written to {out}: the raw data lie there; choose another --out")
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; choose a folder for --out")
    check_replaceable(out)
    if out.is_dir() and any(out.iterdir()) and not (out / "store.json").is_file():
        raise DataError(f"{out} holds other things than a pack; choose an empty or new folder for --out")


def _h5_files(source: PatchSource, beside: Path, stack: ExitStack) -> dict[int, tuple[Path, Path | None]]:
    """Part code to plain HDF5 files of pixels and masks; inflated copies live until ``stack`` closes."""
    files: dict[int, tuple[Path, Path | None]] = {}
    with_masks = all(part.mask for part in source.h5.values())
    for code, part in source.h5.items():
        x = stack.enter_context(plain_h5(source.root / part.x, beside))
        mask = stack.enter_context(plain_h5(source.root / part.mask, beside)) if part.mask and with_masks else None
        for path, name in ((x, "x"), (mask, "mask")):
            if path is None:
                continue
            with open_dataset(path, name) as data:
                if len(data) != part.n_patches:
                    raise DataError(f"{source.root / part.x}: {len(data)} rows of {name}, but {part.n_patches} labels")
        files[code] = (x, mask)
    return files


def _probe(
    source: PatchSource, h5: dict[int, tuple[Path, Path | None]]
) -> tuple[tuple[int, int], tuple[Template, ...]]:
    """The (H, W) of most training patches (96 where it is even), and the headers to expect."""
    if h5:
        shapes = {}
        for x, _ in h5.values():
            with open_dataset(x, "x") as data:
                shapes[x.name] = (int(data.shape[1]), int(data.shape[2]))
        if len(set(shapes.values())) > 1:
            raise DataError(f"{source.root}: patches differ in size between files: {shapes}")
        return next(iter(shapes.values())), ()
    train = np.flatnonzero(source.part != TEST)
    probed = train[np.unique(np.linspace(0, len(train) - 1, min(len(train), _N_PROBED)).astype(int))]
    counts: Counter[tuple[int, int]] = Counter()
    for row in probed:
        image = read_patch(source.root / str(source.files[row]))
        if (
            not isinstance(image, PatchFault)
            and min(image.shape[:2]) >= 3
            and (source.kind == "dense" or image.shape[0] == image.shape[1])
        ):
            counts[image.shape[:2]] += 1
    shape = max(counts, key=lambda found: (counts[found], found == (PATCH_PX, PATCH_PX)), default=(PATCH_PX, PATCH_PX))
    templates: list[Template] = []
    names = [str(source.files[row]) for row in probed[:8]]
    read_patches(source.root, names, np.empty((len(names), *shape, 3), np.uint8), templates)
    return shape, tuple(templates)


def _prepare_files(folder: Path, source: PatchSource, shape: tuple[int, int], templates: tuple[Template, ...]) -> Job:
    """Write the ``.npy`` headers of the large arrays and give them their final size."""
    n = len(source)
    with_masks = source.has_masks
    _check_room(folder, n * shape[0] * shape[1] * (3 + with_masks))
    patches_at = _write_npy_header(folder / "patches.npy", (n, *shape, 3))
    masks_at = _write_npy_header(folder / "masks.npy", (n, *shape)) if with_masks else 0
    masks = folder / "masks.npy" if with_masks else None
    return Job(shape, templates, folder / "patches.npy", patches_at, masks, masks_at, _mask_rule(source))


def _check_room(folder: Path, n_bytes: int) -> None:
    """Hours of reading shall not end in a full disk.

    Raises:
        DataError: what is to be written does not fit.
    """
    usage = shutil.disk_usage(folder)
    if usage.total and n_bytes > usage.free:  # a file system that tells nothing has no size
        raise DataError(
            f"the pack takes {n_bytes / 1e9:.1f} GB, and {folder.parent} has {usage.free / 1e9:.1f} GB free; free some, or pack to another disk "
            "with `pcam-automl prepare RAW --out PACK` and give --data PACK"
        )


def _write_npy_header(path: Path, shape: tuple[int, ...]) -> int:
    """Write the header, give the file its final size; returns the byte where the data begin."""
    with path.open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        start = file.tell()
        file.truncate(start + int(np.prod(shape, dtype=np.int64)))
    return start


def _mask_files(source: PatchSource) -> list[str]:
    return [""] * len(source) if source.masks is None else source.masks.tolist()


def _mask_rule(source: PatchSource) -> MaskRule:
    if source.kind != "dense":
        return KAGGLE
    return MaskRule(find_background(source.root, _mask_files(source)), any_kind=True)


def _labels_of_masks(source: PatchSource, job: Job) -> NDArray[np.int8]:
    """(N,) 1 where a mask holds any tumour, 0 where none, -1 for an image without a mask."""
    assert job.masks is not None
    masks = np.lib.format.open_memmap(job.masks, mode="r")
    found = [int(mask.any()) if name else -1 for mask, name in zip(masks, _mask_files(source), strict=True)]
    return np.array(found, np.int8)


def _tasks(source: PatchSource, h5: dict[int, tuple[Path, Path | None]], shape: tuple[int, int]) -> Iterator[Task]:
    chunk = chunk_for(shape)
    bounds = [0, *(np.flatnonzero(np.diff(source.part)) + 1).tolist(), len(source)]
    for begin, end in pairwise(bounds):
        for first in range(begin, end, chunk):
            n = min(chunk, end - first)
            if h5:
                x, mask = h5[int(source.part[first])]
                yield Task(first, n, source.root, (), x, mask, int(source.files[first]))
            else:
                masks = () if source.masks is None else tuple(source.masks[first : first + n].tolist())
                yield Task(first, n, source.root, tuple(source.files[first : first + n].tolist()), mask_names=masks)


def _stamped(tasks: Iterator[Task], stamp: Stamp) -> Iterator[Task]:
    """Every task's files are seen before it is handed on; meanwhile the workers read."""
    for task in tasks:
        stamp.add(task.names)
        yield task


def _measure_all(
    source: PatchSource,
    h5: dict[int, tuple[Path, Path | None]],
    job: Job,
    workers: int | None,
    progress: Progress | None,
    stamp: Stamp | None = None,
) -> tuple[dict[str, NDArray[Any]], dict[int, str]]:
    """Run every task; the small arrays over all rows, and row -> reason of the faulty ones."""
    n = len(source)
    arrays: dict[str, NDArray[Any]] = {
        "flags": np.zeros(n, np.uint16),
        "stats": np.zeros((n, 6), np.float32),
        "sharpness": np.zeros(n, np.float32),
        "digest": np.zeros((n, 16), np.uint8),
    }
    faults: dict[int, str] = {}
    mask_faults: dict[int, str] = {}
    n_done = 0
    n_workers = n_workers_for(n * CHUNK_PATCHES // chunk_for(job.shape), workers)
    tasks = _tasks(source, h5, job.shape)
    with ExitStack() as stack:
        results = run_tasks(tasks if stamp is None else _stamped(tasks, stamp), job, n_workers)
        for done in stack.enter_context(closing(results)):
            if not n_done and job.patches is not None:
                stack.enter_context(synced_meanwhile(job.patches))  # now: no thread may be there before the workers
            for name, values in arrays.items():
                values[done.first : done.first + len(done.flags)] = getattr(done, name)
            faults.update(done.faults)
            mask_faults.update(done.mask_faults)
            n_done += len(done.flags)
            if progress is not None:
                progress(n_done, n)
    if mask_faults:
        named = [f"{source.ids[row]}: {reason}" for row, reason in sorted(mask_faults.items())]
        if source.h5:
            raise DataError(
                f"{source.root}: {len(named)} masks of its HDF5 files cannot be used ({first_few(named)}); they need 0 and one other value, "
                "or move the files ..._mask.h5 away to pack none"
            )
        at, or_else = (source.root, "") if source.kind == "dense" else (source.root / "masks", _PACK_NONE)
        raise DataError(
            f"{at}: {len(named)} masks cannot be used ({first_few(named)}); save them as grey PNGs of two values{or_else}"
        )
    return arrays, dict(sorted(faults.items()))
