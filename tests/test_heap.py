"""Freed memory stays with the process where glibc allows it."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from pcam_automl import heap

STEPS = """
import resource, sys, torch
from pcam_automl.heap import keep_freed_memory, return_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else False
for n in range(12):
    if n == 8:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(size * 2**20, dtype=torch.uint8) for size in (40, 7, 48, 36)]  # as a step's activations
    del held
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
return_freed_memory()
"""


def faults_of(how: str) -> tuple[str, int]:
    done = subprocess.run([sys.executable, "-c", STEPS, how], capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    return kept, int(faults)


def test_pages_are_not_taken_anew_at_every_step() -> None:
    kept, faults = faults_of("keep")
    if kept != "True":
        pytest.skip("no glibc here")
    pages = 4 * 131 * 2**20 // resource.getpagesize()
    assert faults < 0.1 * pages
    _, plain = faults_of("plain")
    assert plain > 3 * faults  # what the setting spares


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_c_library", lambda: None)
    assert not heap.keep_freed_memory()
    heap.return_freed_memory()
