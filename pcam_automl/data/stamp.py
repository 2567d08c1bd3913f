"""Stamp: by which names, sizes and times a changed source is known. Opens no file of it.

It is in a module of its own because packing fills it while it reads.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pcam_automl.errors import DataError

if TYPE_CHECKING:
    from pcam_automl.data.sources import PatchSource


class Stamp:
    """The :func:`~pcam_automl.data.sources.fingerprint` of a source, its image files added run by run, each before it is read.

    Seeing a file before reading it is what makes a later change known by its time.

    Args:
        source: its tables, masks and HDF5 files are looked at here and now.

    Raises:
        DataError: a file has gone since the source was opened.
    """

    def __init__(self, source: PatchSource) -> None:
        self._root = source.root
        self._total = hashlib.sha256(source.kind.encode())
        self.add([name for part in source.h5.values() for name in (part.x, part.mask) if name])
        self._last = self._lines([] if source.masks is None else [name for name in source.masks.tolist() if name])
        self._last += self._lines([str(table.absolute()) for table in source.tables], [t.name for t in source.tables])
        self._names = b""  # one table may have been given for the other
        for column, names in (("group", source.group), ("domain", source.domain)):
            if (names != "").any():
                self._names += hashlib.sha256("\0".join([column, *names.tolist()]).encode()).digest()

    def add(self, names: Sequence[str]) -> None:
        """Image files, relative to the source's root, in the order of its rows."""
        self._total.update(self._lines(names))

    def hexdigest(self, *, names: bool = True) -> str:
        """64 hex, when every image file has been added; without ``names`` as packs of before 2026-11-30 have it, whatever their slides."""
        total = self._total.copy()
        total.update(self._last + (self._names if names else b""))
        return total.hexdigest()

    def _lines(self, names: Sequence[str], shown: Sequence[str] | None = None) -> bytes:
        lines: list[str] = []
        root = os.open(self._root, os.O_RDONLY)
        try:
            for name, label in zip(names, shown or names, strict=True):
                status = os.stat(name, dir_fd=root)
                lines.append(f"{label}\0{status.st_size}\0{status.st_mtime_ns}\n")
        except OSError as fault:
            raise DataError(
                f"{self._root / str(fault.filename)} has gone ({fault.strerror}); run the command again"
            ) from None
        finally:
            os.close(root)
        return "".join(lines).encode()
