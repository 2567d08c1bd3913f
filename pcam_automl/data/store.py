"""PatchStore: a pack on disk, memory-mapped. Reads no images and writes no pack.

A pack is a folder: ``patches.npy`` and one array a property, ``store.json`` with sizes and the content hash,
``table.csv`` and ``findings.png`` for people. Nothing in it is ever unpickled.
"""

from __future__ import annotations

import enum
import hashlib
import json
import re
import shlex
import tokenize
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pcam_automl.errors import DataError, first_few

FORMAT = "pcam_automl.pack"
VERSION = 2
TRAIN, VALID, TEST = 0, 1, 2
"""Codes of ``part``; VALID only where a source has an official validation split."""

Progress = Callable[[int, int], None]
"""Called with (done, total) patches."""


class Flag(enum.IntFlag):
    """What is known against a patch. Only LEFT_OUT keeps it from being trained on."""

    DARK = 1
    BRIGHT = 2
    UNREADABLE = 4
    WRONG_SHAPE = 8
    BLURRED = 16
    DUPLICATE = 32
    CONTRADICTING = 64
    IN_TRAIN_AND_TEST = 128
    LEFT_OUT = 256


# name: (dtype kind and size, shape after N); ids are unicode of any width.
_ARRAYS: dict[str, tuple[str, tuple[int, ...]]] = {
    "ids": ("U", ()),
    "label": ("int8", ()),
    "group": ("int32", ()),
    "domain": ("int32", ()),
    "part": ("int8", ()),
    "flags": ("uint16", ()),
    "stats": ("float32", (6,)),
    "sharpness": ("float32", ()),
    "digest": ("uint8", (16,)),
}
_MAX_JSON_BYTES = 256 << 20
_READ_FAULTS = (OSError, ValueError, SyntaxError, TypeError, EOFError, tokenize.TokenError)


@dataclass(frozen=True)
class PatchStore:
    """A pack of N patches of (H, W) px: train by id, then valid, then test in the order of the sample submission."""

    root: Path
    patches: NDArray[np.uint8]
    """(N, H, W, 3) uint8, memory-mapped and read-only; zeros where a file was faulty."""
    ids: NDArray[np.str_]
    label: NDArray[np.int8]
    """(N,) 0 or 1; -1 where there is none."""
    group: NDArray[np.int32]
    """(N,) index into ``group_names`` (a slide); -1 unknown."""
    domain: NDArray[np.int32]
    """(N,) index into ``domain_names`` (a scanner); -1 unknown."""
    part: NDArray[np.int8]
    flags: NDArray[np.uint16]
    stats: NDArray[np.float32]
    """(N, 6) means, then deviations of red, green, blue, in [0, 1]."""
    digest: NDArray[np.uint8]
    """(N, 16) XXH3-128 of the pixels; zeros where a file was faulty."""
    masks: NDArray[np.uint8] | None
    """(N, H, W) uint8, 1 = tumour, or None; zeros where a test patch has no mask (``source["notes"]`` counts them)."""
    group_names: tuple[str, ...]
    domain_names: tuple[str, ...]
    content_hash: str
    """64 hex digits over everything that training can see; not over paths or times."""
    source: dict[str, Any]
    """``kind``, ``root``, ``fingerprint``, ``notes``, ``missing_test_ids``, ``keep_outliers`` of what was packed."""
    sharpness: NDArray[np.float32] | None = None
    """(N,) variance of the Laplacian of the green channel, in grey levels squared."""
    faults: Mapping[int, str] = field(default_factory=dict)
    """Row to reason, of the patches flagged UNREADABLE or WRONG_SHAPE."""
    channel_mean: tuple[float, ...] = ()
    """Of the development patches, in [0, 1]."""
    channel_std: tuple[float, ...] = ()

    @property
    def missing_test_ids(self) -> tuple[str, ...]:
        """Ids of the sample submission that had no test image when the pack was made."""
        return tuple(self.source.get("missing_test_ids", ()))

    def __len__(self) -> int:
        return len(self.ids)

    def development_rows(self) -> NDArray[np.int64]:
        """Labelled TRAIN and VALID rows that are not left out, ascending."""
        usable = (self.part != TEST) & (self.label >= 0) & ((self.flags & Flag.LEFT_OUT) == 0)
        return np.flatnonzero(usable).astype(np.int64)

    def test_rows(self) -> NDArray[np.int64]:
        """TEST rows in the order of the sample submission."""
        return np.flatnonzero(self.part == TEST).astype(np.int64)


def is_pack(path: Path) -> bool:
    """Whether ``path`` is a folder that claims to be a pack; :func:`open_store` says whether it is a sound one."""
    return (Path(path) / "store.json").is_file()


def is_of_this_version(path: Path) -> bool:
    """Whether a pack is of the version that this package reads; True also for what is no sound pack at all."""
    try:
        header = json.loads((Path(path) / "store.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return True  # open_store words the fault
    return not isinstance(header, dict) or header.get("version") in (VERSION, None)


def open_store(path: Path) -> PatchStore:
    """Open a pack: its arrays are memory-mapped and read-only, which takes milliseconds.

    Raises:
        DataError: no pack, half a pack, a foreign or corrupt one, or one of another version.
    """
    root = Path(path)
    header = _read_header(root)
    arrays = {name: _open_array(root, header, name, *spec) for name, spec in _ARRAYS.items()}
    _check_codes(root, header, arrays)
    side = tuple(header["shape"])
    patches = _open_array(root, header, "patches", "uint8", (*side, 3))
    masks = _open_array(root, header, "masks", "uint8", side) if "masks" in header["files"] else None
    return PatchStore(
        root=root,
        patches=patches,
        masks=masks,
        group_names=tuple(header["group_names"]),
        domain_names=tuple(header["domain_names"]),
        content_hash=header["content_hash"],
        source=header["source"],
        faults={int(row): str(reason) for row, reason in header["faults"].items()},
        channel_mean=tuple(header["channel_mean"]),
        channel_std=tuple(header["channel_std"]),
        **arrays,
    )


def channel_moments(stats: NDArray[np.floating[Any]]) -> tuple[list[float], list[float]]:
    """Channel means and deviations over all pixels of some patches, (3,) each, from the patches' own ``stats`` (n, 6)."""
    each = np.asarray(stats, np.float64)
    mean = each[:, :3].mean(axis=0)
    deviation = np.sqrt(np.maximum((each[:, 3:] ** 2 + each[:, :3] ** 2).mean(axis=0) - mean**2, 0.0))
    return mean.tolist(), deviation.tolist()


def pixels_hash(digest: NDArray[np.uint8]) -> str:
    """SHA-256 over which patches these are, whatever their order, names, groups and domains.

    Args:
        digest: (N, 16) as in :class:`PatchStore`, of its development rows: what a test part holds is nobody's to learn from.
    """
    return hashlib.sha256(np.unique(digest, axis=0).tobytes()).hexdigest()


def content_hash(
    *,
    shape: Sequence[int],
    arrays: Mapping[str, NDArray[Any]],
    group_names: Sequence[str],
    domain_names: Sequence[str],
    masks: NDArray[np.uint8] | None = None,
) -> str:
    """SHA-256 over what training can see: pixels, ids, labels, groups, domains, parts, what is left out, masks.

    Args:
        shape: (H, W) px.
        arrays: digest, ids, label, group, domain, part and flags as in :class:`PatchStore`.
        group_names: by code.
        domain_names: by code.
        masks: (N, H, W) or None.
    """
    total = hashlib.sha256()
    names = {"shape": [int(px) for px in shape], "groups": list(group_names), "domains": list(domain_names)}
    total.update(json.dumps([FORMAT, VERSION, names, len(arrays["ids"])]).encode())
    for name in ("digest", "label", "group", "domain", "part"):
        total.update(np.ascontiguousarray(arrays[name]).data)
    for first in range(0, len(arrays["ids"]), 1 << 14):
        total.update("\n".join(arrays["ids"][first : first + (1 << 14)].tolist()).encode() + b"\n")
    total.update(np.packbits((arrays["flags"] & Flag.LEFT_OUT) != 0).data)
    if masks is not None:
        n = max(1, (1 << 25) // (shape[0] * shape[1]))  # 32 MB at a time; the digest is the same for any number
        for first in range(0, len(masks), n):
            total.update(np.ascontiguousarray(masks[first : first + n]).data)
    return total.hexdigest()


def _read_header(root: Path) -> dict[str, Any]:
    path = root / "store.json"
    if not root.is_dir():
        raise DataError(
            f"pack {root} does not exist; make it with `pcam-automl prepare RAW --out {shlex.quote(str(root))}`"
        )
    if not path.is_file():
        raise DataError(f"{root} is not a pack (no store.json); make one with `pcam-automl prepare RAW --out DIR`")
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise DataError(f"{path} is larger than {_MAX_JSON_BYTES} bytes; that is no pack of this package")
        header = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as fault:
        raise DataError(f"{path} cannot be read ({' '.join(str(fault).split())[:120]}); {_REMEDY}") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise DataError(f"{path} is not of a pack of this package; {_REMEDY}")
    if header.get("version") != VERSION:
        raise DataError(f"{path} is of pack version {header.get('version')!r}, this package reads {VERSION}; {_REMEDY}")
    if faults := _header_faults(header):
        raise DataError(f"{path}: {first_few(faults)} missing or of the wrong kind; {_REMEDY}")
    return header


_REMEDY = "remove the pack's folder, then pack the raw one again with `pcam-automl prepare`"


def _header_faults(header: dict[str, Any]) -> list[str]:
    """The keys of ``store.json`` that are missing or not what they must be."""

    def is_list(key: str, kind: type | tuple[type, ...], n: int | None = None) -> bool:
        value = header.get(key)
        return isinstance(value, list) and all(isinstance(item, kind) for item in value) and n in (None, len(value))

    faults = [key for key in ("group_names", "domain_names") if not is_list(key, str)]
    faults += [key for key in ("channel_mean", "channel_std") if not is_list(key, (int, float), 3)]
    faults += [key for key in ("files", "source", "faults") if not isinstance(header.get(key), dict)]
    if not is_list("shape", int, 2):
        faults.append("shape")
    if not isinstance(header.get("n_patches"), int) or header["n_patches"] < 1:
        faults.append("n_patches")
    if not isinstance(header.get("content_hash"), str) or not re.fullmatch("[0-9a-f]{64}", header["content_hash"]):
        faults.append("content_hash")
    if isinstance(header.get("faults"), dict) and not all(str(row).isdigit() for row in header["faults"]):
        faults.append("faults")
    return faults


def _check_codes(root: Path, header: dict[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    limits = {
        "label": 1,
        "part": TEST,
        "group": len(header["group_names"]) - 1,
        "domain": len(header["domain_names"]) - 1,
    }
    for name, highest in limits.items():
        low, high = int(arrays[name].min()), int(arrays[name].max())
        if low < (0 if name == "part" else -1) or high > highest:
            raise DataError(f"{root / name}.npy holds codes {low}..{high}, at most {highest} is known; {_REMEDY}")


def _open_array(root: Path, header: dict[str, Any], name: str, kind: str, tail: tuple[int, ...]) -> NDArray[Any]:
    """Map one ``.npy`` file; its bytes, dtype and shape must be those that ``store.json`` and the format say."""
    path = root / f"{name}.npy"
    try:
        n_bytes = path.stat().st_size
        if n_bytes != header["files"].get(name):
            raise DataError(f"{path} has {n_bytes} bytes, store.json says {header['files'].get(name)}; {_REMEDY}")
        # open_memmap, not np.load: it reads .npy only, never a zip or a pickle.
        array: NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise DataError(f"{path} is missing from the pack; {_REMEDY}") from None
    except _READ_FAULTS as fault:
        raise DataError(f"{path} cannot be read ({' '.join(str(fault).split())[:120]}); {_REMEDY}") from None
    dtype_ok = array.dtype.kind == "U" if kind == "U" else array.dtype == np.dtype(kind)
    shape = (header["n_patches"], *tail)
    if not dtype_ok or array.shape != shape:
        raise DataError(f"{path} must be {kind} {shape}, got {array.dtype} {array.shape}; {_REMEDY}")
    return array if name in ("patches", "masks") else array.view(np.ndarray)
