"""What the C library does with memory that torch frees. Imports nothing that computes; allocates nothing."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's names in glibc's malloc.h
_MOST = 2**31 - 1
_LARGEST_ON_HEAP, _LARGEST_OF_OLD = 2**30, 2**25
"""What mallopt takes, and the most that older glibc takes (mallopt(3))."""


@cache
def _c_library() -> Any | None:
    """glibc, where this is Linux with it; other C libraries do not have both calls."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


def keep_freed_memory() -> bool:
    """Let freed memory stay with this process, to be taken again at the next step; returns whether that could be set.

    A training step on a CPU frees and takes the same hundreds of megabytes again and again. glibc gives large pieces back
    to the system each time, and the next step pays for every page: resnet18 at 96 px in float32 took 68,000 page faults a
    step, a sixth of its time; with this, 4,400 (`python -m benchmarks convolutions`). The process's peak stays what it was.
    """
    library = _c_library()
    if library is None:
        return False
    on_heap = any(library.mallopt(_MMAP_THRESHOLD, size) for size in (_LARGEST_ON_HEAP, _LARGEST_OF_OLD))
    return bool(library.mallopt(_TRIM_THRESHOLD, _MOST)) and on_heap


def return_freed_memory() -> None:
    """Give what is free back to the system now, at the end of a training."""
    if (library := _c_library()) is not None:
        library.malloc_trim(0)
