"""The command line and what it spawns look for cycles rarely; whoever imports the package as a library keeps Python's own thresholds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from pcam_automl.collector import THRESHOLDS

SCRIPT = """\
import gc, json, multiprocessing
from pcam_automl.cli import run  # as the console script does

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(json.dumps([gc.get_threshold(), pool.apply(gc.get_threshold)]))
"""


def test_the_command_line_and_its_workers_look_for_cycles_rarely(tmp_path: Path) -> None:
    (tmp_path / "pcam-automl").write_text(SCRIPT)
    done = subprocess.run([sys.executable, str(tmp_path / "pcam-automl")], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [list(THRESHOLDS)] * 2


def test_the_library_leaves_the_collector_alone() -> None:
    code = "import gc; before = gc.get_threshold(); import pcam_automl.search.space, pcam_automl.metrics; print(before == gc.get_threshold())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "True\n"


def test_cycles_are_still_found() -> None:
    code = """
import gc, weakref, pcam_automl.cli
class Node: pass
first = Node(); first.itself = first; gone = weakref.ref(first); del first
kept = [[] for _ in range(3 * gc.get_threshold()[0])]
print(gone() is None)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "True\n"
