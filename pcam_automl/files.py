"""Whole-file writes, checksums and locks. Knows nothing of patches, models or studies.

Everything the package writes goes through :func:`written_whole` or :func:`folder_written_whole`:
fill a neighbour named ``.<name>.<pid>-<token>-<thread>.partial``, fsync it, rename it over the target. A folder being filled holds a
locked file ``.writing``: what a killed process left is known by its free lock and removed by the next writer beside it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pcam_automl.errors import DataError, WriteError

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CHUNK_BYTES = 1 << 20
_WRITING = ".writing"
_LEFT_BEHIND = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)(?:-[0-9a-f]+)*\.(?P<kind>partial|old)", re.DOTALL)
_TOKEN = secrets.token_hex(4)
"""Of this process: containers that share a folder have processes of equal numbers."""


def _own(target: Path, kind: str, thread: str = "") -> Path:
    """A neighbour of ``target`` whose name no other process gives."""
    return target.with_name(f".{target.name}.{os.getpid()}-{_TOKEN}{thread}.{kind}")


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _explained(fault: OSError, target: Path) -> WriteError | None:
    """The one-line fault for the operating system's answers that a user can act on."""
    if fault.errno in FULL_DISK:
        return WriteError(f"no space left to write {target} ({fault.strerror}); free some and repeat the same command")
    if fault.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return WriteError(f"{target} cannot be written ({fault.strerror}); choose another folder or change its rights")
    if (
        fault.errno in (errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EINVAL)
        and fault.filename is not None
    ):
        at = Path(os.fsdecode(fault.filename))  # of what is written, not of something that is read meanwhile
        if at == target or at in target.parents:
            return WriteError(f"{target} cannot be made ({fault.strerror}: {at}); choose another place")
    return None


def check_can_write(folder: Path) -> None:
    """Make a folder, before the work whose results go there, and see that it takes files.

    Raises:
        WriteError: it cannot be made, or takes none.
    """
    folder = Path(folder)
    probe = folder / f".{os.getpid()}-{_TOKEN}-{threading.get_native_id()}.probe"
    with write_faults(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            probe.touch()
        except OSError as fault:
            explained = _explained(fault, folder)
            raise explained or WriteError(
                f"{folder} takes no files ({fault.strerror}); choose another folder"
            ) from fault
        probe.unlink()


def check_replaceable(folder: Path, option: str = "--out") -> None:
    """Refuse, before the work, a folder whose place no other can take.

    Raises:
        DataError: it is a mount point, or where the command runs: a terminal would be left in a folder that is gone.
    """
    for found, what in (
        (folder.is_mount(), "a mount point"),
        (folder.resolve() == Path.cwd(), "the folder you are in"),
    ):
        if found:
            raise DataError(f"{option} {folder} is {what}, whose place nothing can take; name a folder inside it")


def own_name(folder: Path) -> Path:
    """The folder as it was named, but for ``~``, a link, ``.`` and ``..``, in whose place nothing can be put: what these name."""
    folder = folder.expanduser() if folder.parts[:1] == ("~",) else folder
    return folder.resolve() if folder.is_symlink() or folder.name in ("", "..") else folder


@contextmanager
def write_faults(target: Path) -> Iterator[None]:
    """Turn "disk full" and "read-only" inside the block into a one-line :class:`WriteError` naming ``target``."""
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
    # A thread's own: two that answer requests may fetch the same file.
    partial = _own(target, "partial", f"-{threading.get_native_id()}")
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
    """Yield a folder to fill; on success every file is fsynced and the folder takes ``target``'s place.

    An older ``target`` stays readable until the new one is complete. What killed processes left beside ``target`` is
    removed first. The name ``.writing`` in the folder is taken.

    Raises:
        DataError: the disk is full, the folder is read-only, or another thread is writing ``target``.
    """
    target = Path(target)
    partial = _own(target, "partial")
    with write_faults(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_behind(target)
        if partial.exists():
            raise DataError(
                f"another process is writing {target} ({partial.name}); wait for it, then repeat the command"
            )
        try:
            partial.mkdir()
            with _marked_as_written(partial) as mark:
                yield partial
                mark.unlink()
                for file in partial.rglob("*"):
                    _fsync(file)
                _fsync(partial)
                _put_in_place(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _put_in_place(partial: Path, target: Path) -> None:
    """Rename a finished folder to ``target``; an older one is moved aside first, for no rename replaces a full folder."""
    if target.exists():
        old = _own(target, "old")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        partial.rename(target)
        shutil.rmtree(old)
    else:
        partial.rename(target)
    _fsync(target.parent)


@contextmanager
def _marked_as_written(folder: Path) -> Iterator[Path]:
    """Hold a lock inside ``folder`` for the block; yields the lock file, which the block may remove."""
    import fcntl

    with (folder / f"{_WRITING}.new").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        # Locked before it has its name: nobody ever finds it free while we live.
        yield Path(file.name).rename(folder / _WRITING)


def _remove_left_behind(target: Path) -> None:
    """Remove half-written folders of dead processes beside ``target``; give back an older ``target`` moved aside by one."""
    with os.scandir(target.parent) as entries:
        found = [(entry.name, match) for entry in entries if (match := _LEFT_BEHIND.fullmatch(entry.name))]
    for name, match in found:
        folder, ours = target.parent / name, match["name"] == target.name
        if match["kind"] == "partial":
            if _is_abandoned(folder, int(match["pid"]), ours=ours):
                shutil.rmtree(folder, ignore_errors=True)
        elif ours and not _is_running(int(match["pid"])):
            if target.exists():
                shutil.rmtree(folder, ignore_errors=True)
            else:
                folder.rename(target)


def _is_abandoned(folder: Path, pid: int, *, ours: bool) -> bool:
    """Whether the folder's lock is free; without a lock, whether it is for our target and ``pid`` is dead or our own."""
    import fcntl

    try:
        file = (folder / _WRITING).open("r+")
    except (
        OSError
    ):  # not a folder, not ours to read, or without a lock: being made, being renamed, or of an older version
        return ours and folder.is_dir() and (pid == os.getpid() or not _is_running(pid))
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def write_text(target: Path, text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all."""
    with written_whole(target) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(target: Path, value: Any) -> None:
    """Write ``value`` as readable JSON, whole or not at all. NaN is refused (it is not JSON)."""
    write_text(target, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def write_png(target: Path, pixels: Any) -> None:
    """Write (H, W) or (H, W, 3) uint8 as PNG, whole or not at all."""
    from PIL import Image

    with write_faults(target), written_whole(target) as partial:
        Image.fromarray(pixels).save(partial, format="PNG")


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
def locked(path: Path, *, busy: str, waits: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold an exclusive lock file for the block; the operating system frees it when the process dies.

    Args:
        path: the lock file; it is left in place.
        busy: the message if another process holds it.
        waits: told ``busy``, whereupon the lock is waited for; None raises.

    Raises:
        DataError: another process holds the lock, and nobody waits.
    """
    import fcntl

    with write_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as fault:
            if waits is None:
                raise DataError(busy) from fault
            waits(busy)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
