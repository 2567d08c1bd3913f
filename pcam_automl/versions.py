"""Versions that a result depends on. Imports none of the packages that it names."""

from __future__ import annotations

import functools
import platform
from importlib.metadata import version

from pcam_automl import __version__

ENGINE = "3"
"""Raised where equal trainings come to slightly other figures than before: 1 was that of before 2026-11-30 and wrote none."""
_PACKAGES = ("torch", "torchvision", "timm", "optuna", "numpy")


def versions() -> dict[str, str]:
    """Package name to version, this package's and Python's first."""
    return {"pcam_automl": __version__, "engine": ENGINE, "python": platform.python_version(), **_installed()}


@functools.cache
def _installed() -> dict[str, str]:
    return {name: version(name) for name in _PACKAGES}  # 4 ms, which every trial would wait for
