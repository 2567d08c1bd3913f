"""The PCam HDF5 files: which there are, their labels, rows of pixels. Writes nothing but an inflated ``.gz``."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pcam_automl.data.images import MAX_SIDE_PX
from pcam_automl.data.store import TEST, TRAIN, VALID
from pcam_automl.errors import DataError

MAX_INFLATED_BYTES = 24 << 30
"""PCam's largest file inflates to 7.3 GB."""
_MAX_LABEL_BYTES = 256 << 20
_MAX_CHUNK_BYTES = 256 << 20
H5_PREFIX = "camelyonpatch_level_2_split_"
PART_CODES = {"train": TRAIN, "valid": VALID, "test": TEST}
_COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class H5Part:
    """The files of one official PCam split; paths relative to the source's root."""

    x: str
    mask: str | None
    n_patches: int


def find_h5_parts(root: Path) -> dict[str, dict[str, Path]]:
    """``{"train": {"x": path, "y": path, "mask": path, "meta": path}}`` of what is there; plain before ``.gz``."""
    parts: dict[str, dict[str, Path]] = {}
    for name in PART_CODES:
        files = {}
        for what in ("x", "y", "mask"):
            for suffix in (".h5.gz", ".h5"):
                if (path := root / f"{H5_PREFIX}{name}_{what}{suffix}").is_file():
                    files[what] = path
        if (meta := root / f"{H5_PREFIX}{name}_meta.csv").is_file():
            files["meta"] = meta
        if "x" in files:
            parts[name] = files
    return parts


def read_h5_labels(files: dict[str, Path], name: str) -> NDArray[np.int8]:
    """(N,) int8 labels of one split's files (see :func:`find_h5_parts`); -1 for a test split without a ``y`` file.

    Raises:
        DataError: the labels are missing, corrupt or not 0 or 1.
    """
    x = files["x"]
    if "y" not in files:
        if name != "test" or x.suffix == ".gz":
            raise DataError(
                f"{x.name} has no labels beside it: {H5_PREFIX}{name}_y.h5 (or .h5.gz) is missing in {x.parent}"
            )
        with open_dataset(x, "x") as data:
            return np.full(len(data), -1, np.int8)
    y = files["y"]
    with _opened(y if y.suffix == ".h5" else BytesIO(_inflate_small(y)), y, "y") as data:
        if not data.ndim or data.size > _MAX_LABEL_BYTES or data.size != data.shape[0]:
            raise DataError(f"{y}: dataset y must be (N, 1, 1, 1), got {data.shape}")
        values = np.asarray(data[...]).reshape(-1)
    if not np.isin(values, (0, 1)).all():
        raise DataError(f"{y}: labels must be 0 or 1, got {np.unique(values)[:5].tolist()}")
    return values.astype(np.int8)


def _inflate_small(path: Path) -> bytes:
    try:
        with gzip.open(path) as file:
            raw = file.read(_MAX_LABEL_BYTES + 1)
    except (OSError, EOFError, zlib.error) as fault:
        raise DataError(f"{path} cannot be inflated ({fault}); download it again") from None
    if len(raw) > _MAX_LABEL_BYTES:
        raise DataError(f"{path} inflates to more than {_MAX_LABEL_BYTES} bytes; those are no labels")
    return raw


@contextmanager
def plain_h5(path: Path, beside: Path) -> Iterator[Path]:
    """``path`` itself, or for ``.gz`` its inflated copy in the folder ``beside``, removed afterwards.

    Raises:
        DataError: truncated or corrupt, or larger than ``MAX_INFLATED_BYTES`` once inflated.
    """
    if path.suffix != ".gz":
        yield path
        return
    target = beside / path.stem
    try:
        with target.open("wb") as out:
            for chunk in _inflated(path):
                out.write(chunk)
        yield target
    finally:
        target.unlink(missing_ok=True)


def _inflated(path: Path) -> Iterator[bytes]:
    n_bytes = 0
    try:
        opened = gzip.open(path)  # noqa: SIM115 - closed by the next line
    except OSError as fault:
        raise DataError(f"{path} cannot be read ({fault.strerror})") from None
    with opened as file:
        while True:
            try:
                chunk = file.read(_COPY_BYTES)
            except (OSError, EOFError, zlib.error) as fault:
                raise DataError(f"{path} cannot be inflated ({fault}); download it again") from None
            if not chunk:
                return
            n_bytes += len(chunk)
            if n_bytes > MAX_INFLATED_BYTES:
                raise DataError(
                    f"{path} inflates to more than the limit of {MAX_INFLATED_BYTES} bytes; it is not a PCam file"
                )
            yield chunk


@contextmanager
def open_dataset(path: Path, name: str) -> Iterator[Any]:
    """Dataset ``x`` or ``mask``, checked to be (N, H, W, C) uint8 of bearable size.

    Raises:
        DataError: not HDF5, no such dataset, another dtype or shape.
    """
    n_channels = 3 if name == "x" else 1
    with _opened(path, path, name) as data:
        shape_ok = data.ndim == 4 and data.shape[3] == n_channels and 3 <= data.shape[1] == data.shape[2] <= MAX_SIDE_PX
        if not shape_ok or data.dtype != np.uint8:
            raise DataError(
                f"{path}: dataset {name} must be (N, H, H, {n_channels}) uint8, got {data.shape} {data.dtype}"
            )
        if data.chunks and int(np.prod(data.chunks, dtype=np.int64)) > _MAX_CHUNK_BYTES:
            raise DataError(f"{path}: dataset {name} is stored in chunks of {data.chunks}, too large to read in parts")
        yield data


@contextmanager
def _opened(file: Path | BytesIO, path: Path, name: str) -> Iterator[Any]:
    import h5py

    try:
        opened = h5py.File(file, "r")
    except OSError as fault:
        raise DataError(f"{path} is not a readable HDF5 file ({' '.join(str(fault).split())[:120]})") from None
    with opened:
        data = opened.get(name)
        if not isinstance(data, h5py.Dataset):
            raise DataError(f"{path} has no dataset {name!r}, only {_names_in(opened)}")
        yield data


def _names_in(opened: Any) -> str:
    try:
        return ", ".join(list(opened)[:5]) or "nothing"
    except RuntimeError:  # the table of names itself is damaged
        return "names that cannot be read"


def read_rows(path: Path, name: str, first: int, out: NDArray[np.uint8]) -> None:
    """Fill ``out`` with the rows from ``first`` on of dataset ``x`` (B, H, W, 3) or ``mask`` (B, H, W, 1).

    Raises:
        DataError: the stored bytes are corrupt.
    """
    with open_dataset(path, name) as data:
        try:
            data.read_direct(out, np.s_[first : first + len(out)])
        except (OSError, RuntimeError) as fault:
            where = f"rows {first}..{first + len(out) - 1} of {name}"
            raise DataError(f"{path}: {where} cannot be read ({' '.join(str(fault).split())[:120]})") from None
