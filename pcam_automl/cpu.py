"""Which CPU this is. Imports nothing heavy."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


@functools.cache
def cpu_model() -> str:
    """``AMD EPYC 9R45``: the model's name on Linux, elsewhere what Python knows."""
    return _first("model name") or platform.processor() or platform.machine()


def cpu_instructions() -> str:
    """Those that decide a training's speed, e.g. ``AVX2`` or ``AVX512, bf16``, without torch; empty where Linux does not tell."""
    flags = set(_first("flags").split())
    wide = "AVX512" if "avx512f" in flags else "AVX2" if "avx2" in flags else ""
    low = "AMX bf16" if "amx_bf16" in flags else "bf16" if "avx512_bf16" in flags else ""
    return ", ".join(filter(None, (wide, low)))


def _first(field: str) -> str:
    """The field's value for the first core; empty where there is none."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def usable_cores() -> int:
    """Cores that this process may run on, by its affinity mask; a quota of a container is not counted."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_of(device: str | None, cpu: str | None) -> tuple[str | None, str | None]:
    """What a measured speed is of: the device's name, and of a CPU, whose device's name tells no model, its own, too.

    Args:
        device: as `training.compute.device_name` says it: ``NVIDIA H100``, ``x86_64 CPU, 2 threads``; None where it is not known.
        cpu: as `training.compute.cpu_name` says it.
    """
    return device, cpu if device is not None and " CPU, " in device else None
