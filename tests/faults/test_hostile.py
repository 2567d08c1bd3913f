"""320 mutated TIFFs, tables, YAMLs, HDF5s, bundles, checkpoints, packs and URLs: each is read, or refused with one line."""

from __future__ import annotations

import collections
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

REPO, SCRIPT = Path(__file__).parents[2], Path(__file__).parent / "hostile.py"
N = 320
MOST_MB = 300


def run(folder: Path, pack: Path, seed: int, n: int) -> list[dict[str, object]]:
    folder.mkdir()
    words = [sys.executable, str(SCRIPT), str(folder), str(seed), str(n), str(pack)]
    environ = {**os.environ, "PYTHONPATH": str(REPO), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environ, timeout=240)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-800:]} {done.stdout[-300:]}"
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_hostile_files_are_read_or_refused_with_a_line(easy_pack: Path, tmp_path: Path) -> None:
    *lines, end = run(tmp_path / "hostile", easy_pack, 17, N)
    assert len(lines) == N
    bad = [line for line in lines if line["outcome"] not in ("ok", "named")]
    assert not bad, "\n".join(f"{line['kind']} {line['number']}: {line['outcome']}" for line in bad[:8])
    outcomes = collections.Counter(str(line["outcome"]) for line in lines)
    assert outcomes["named"] > N / 3, f"the mutants are too tame: {outcomes}"
    assert float(str(end["rise_mb"])) <= MOST_MB


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_thousands_of_hostile_files(part: int, easy_pack: Path, tmp_path: Path) -> None:
    *lines, end = run(tmp_path / "hostile", easy_pack, random.SystemRandom().randrange(2**31), 1500)
    bad = [line for line in lines if line["outcome"] not in ("ok", "named")]
    assert not bad, "\n".join(f"{line['kind']} {line['number']}: {line['outcome']}" for line in bad[:8])
    assert float(str(end["rise_mb"])) <= MOST_MB
