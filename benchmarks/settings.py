"""What every benchmark reads from the environment and how it writes its result. Imports no torch: some time an import."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

from pcam_automl.cpu import cpu_instructions, cpu_model, usable_cores

RESULTS = Path(os.environ.get("PCAM_BENCH_RESULTS") or Path(__file__).parent / "results")
"""Where results go; trials of a benchmark name another folder, so that the committed figures stay."""


def setting(name: str, default: int) -> int:
    """``PCAM_BENCH_<name>`` as a whole number; ends the process with a line where it is none."""
    return numbers(name, str(default))[0]


def numbers(name: str, default: str) -> list[int]:
    """``PCAM_BENCH_<name>``: one or more whole numbers, of at least 0, with commas or spaces between."""
    text = os.environ.get(f"PCAM_BENCH_{name}") or default
    words = text.replace(",", " ").split()
    if not words or not all(word.isdecimal() for word in words):
        sys.exit(f"PCAM_BENCH_{name} must be a whole number of at least 0 (or several), got {text!r}")
    return [int(word) for word in words]


def host() -> dict[str, Any]:
    """CPU, its instructions and usable cores; `common.machine` adds what torch says."""
    known = {"cpu": cpu_model(), "instructions": cpu_instructions(), "cores": usable_cores()}
    return known | {"python": platform.python_version()}


def write_result(file: Path, found: dict[str, Any]) -> None:
    """A result as JSON, dated; with the host, unless it says its machine."""
    file.parent.mkdir(parents=True, exist_ok=True)
    dated = {"date": time.strftime("%Y-%m-%d"), "machine": host(), **found}
    file.write_text(json.dumps(dated, indent=2) + "\n", encoding="utf-8")
