"""Whole-file writes, checksums and locks. Knows nothing of patches, models or studies.

Everything the package writes goes through :func:`written_whole` or :func:`folder_written_whole`:
fill a neighbour named ``.<name>.<pid>.partial``, fsync it, rename it over the target.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pcam_automl.errors import DataError

_CHUNK_BYTES = 1 << 20


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.partial")


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _explained(fault: OSError, target: Path) -> DataError | None:
    """The one-line fault for the operating system's answers that a user can act on."""
    if fault.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DataError(f"no space left to write {target} ({fault.strerror}); free some and repeat the same command")
    if fault.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return DataError(f"{target} cannot be written ({fault.strerror}); choose another folder or change its rights")
    return None


@contextmanager
def write_faults(target: Path) -> Iterator[None]:
    """Turn "disk full" and "read-only" inside the block into a one-line :class:`DataError` naming ``target``."""
    try:
        yield
    except OSError as fault:
        explained = _explained(fault, target)
        if explained is None:
            raise
        raise explained from fault


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Yield a path to fill; on success it is fsynced and renamed to ``target``, else removed.

    Raises:
        DataError: the disk is full or the folder is read-only.
    """
    target = Path(target)
    partial = _partial(target)
    with write_faults(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            _fsync(partial)
            partial.replace(target)
            _fsync(target.parent)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def folder_written_whole(target: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; on success every file is fsynced and the folder takes ``target``'s place.

    An older ``target`` stays readable until the new one is complete.

    Raises:
        DataError: the disk is full or the folder is read-only.
    """
    target = Path(target)
    partial = _partial(target)
    with write_faults(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            yield partial
            for file in partial.rglob("*"):
                _fsync(file)
            _fsync(partial)
            if target.exists():
                old = target.with_name(f".{target.name}.{os.getpid()}.old")
                shutil.rmtree(old, ignore_errors=True)
                target.rename(old)
                partial.rename(target)
                shutil.rmtree(old)
            else:
                partial.rename(target)
            _fsync(target.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def write_text(target: Path, text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all."""
    with written_whole(target) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(target: Path, value: Any) -> None:
    """Write ``value`` as readable JSON, whole or not at all. NaN is refused (it is not JSON)."""
    write_text(target, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def sha256_of_file(path: Path) -> str:
    """The file's SHA-256 as 64 hex digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_of_json(value: Any) -> str:
    """SHA-256 of the value's canonical JSON: equal values have equal hashes."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    ).hexdigest()


@contextmanager
def locked(path: Path, *, busy: str) -> Iterator[None]:
    """Hold an exclusive lock file for the block; the operating system frees it when the process dies.

    Args:
        path: the lock file; it is left in place.
        busy: the message if another process holds it.

    Raises:
        DataError: another process holds the lock.
    """
    import fcntl

    with write_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as fault:
            raise DataError(busy) from fault
        yield
