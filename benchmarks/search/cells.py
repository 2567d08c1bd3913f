"""Cells and matrices of the proofs, and the file that their results are appended to. Runs nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results.jsonl"
WEIGHTS = ("none", "given")
BUDGETS_MIN = (3.0, 6.0, 15.0)
SEEDS = (0, 1, 2)
OUTSIDE = ("optuna", "fastai", "raytune", "autogluon")
"""Systems of others."""
DECISIONS = ("ours", "random", "tpe-without-rungs", "asha-without-thaw", "average", "cost-aware")
"""One engine, several ways to decide."""
N_CALIBRATION = 20

Record = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One run: a system on data within a wall clock.

    Attributes:
        system: a name of benchmarks/search/systems.py.
        data: ``colon96``, ``colon96-dev:K`` (within its training part), ``synthetic:SEED`` (another mix of scanners in the test part) or ``slides:SEED`` (the same mix).
        weights: ``none`` or ``given`` (the folder of PCAM_WEIGHTS_DIR).
        minutes: wall clock from the start of the process to its end.
        seed: of the system.
    """

    system: str
    data: str
    weights: str
    minutes: float
    seed: int

    def __str__(self) -> str:
        return f"{self.system} on {self.data}, weights {self.weights}, {self.minutes:g} min, seed {self.seed}"

    @property
    def command(self) -> str:
        """What runs just this cell."""
        return (
            f"python -m benchmarks.search run --system {self.system} --data {self.data} --weights {self.weights} "
            f"--minutes {self.minutes:g} --seed {self.seed}"
        )


def cell_of(record: Record) -> Cell:
    """The cell that a record is of."""
    return Cell(
        str(record["system"]),
        str(record["data"]),
        str(record["weights"]),
        float(record["minutes"]),
        int(record["seed"]),
    )


def _matrix(
    systems: Sequence[str], data: str, weights: Sequence[str], minutes: Sequence[float], seeds: Sequence[int]
) -> list[Cell]:
    """Seeds change last, so that every question has a first answer early."""
    return [
        Cell(system, data, one_weights, m, seed)
        for seed, m, one_weights, system in product(seeds, minutes, weights, systems)
    ]


def _calibration() -> list[Cell]:
    """Other slides in each run. In less time than three minutes two cores do not get beyond chance on these sets.

    Ours then on as many more, of which nothing was known when the first had been looked at; 20 and 21 went to decisions. The last
    twenty are of the intervals as they are since 2026-11-30.
    """
    first, more = range(N_CALIBRATION), range(22, 22 + 2 * N_CALIBRATION)
    both = [(system, number) for number in first for system in ("ours", "optuna")]
    return [
        Cell(system, f"slides:{number}", "none", 3.0, number) for system, number in both + [("ours", n) for n in more]
    ]


MATRICES: dict[str, list[Cell]] = {
    "minimum": _matrix(("ours", "optuna", "fastai", "raytune"), "colon96", WEIGHTS, (6.0,), SEEDS),
    "accuracy": _matrix(("ours", *OUTSIDE, "random"), "colon96", WEIGHTS, BUDGETS_MIN, SEEDS),
    "domain": _matrix(("ours", "optuna", "fastai", "raytune"), "synthetic:0", ("none",), (6.0,), SEEDS),
    "decisions": _matrix(DECISIONS, "colon96", WEIGHTS, (6.0,), SEEDS),
    "calibration": _calibration(),
}
"""Name to cells, in the order in which ``next`` takes them."""


def read_records(file: Path = RESULTS) -> list[Record]:
    """Every whole line; a line that a kill cut off is left out. Empty where there is no file."""
    if not file.is_file():
        return []
    records = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def append_record(record: Record, file: Path = RESULTS) -> None:
    """One line in one write, on disk when this returns; a line cut off before stays a line of its own."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(handle).st_size
        whole = size == 0 or os.pread(handle, 1, size - 1) == b"\n"
        os.write(handle, (("" if whole else "\n") + json.dumps(record, sort_keys=True) + "\n").encode())
        os.fsync(handle)
    finally:
        os.close(handle)


def unmeasured(cells: Iterable[Cell], records: Iterable[Record], *, retry: bool = False) -> list[Cell]:
    """Cells without a record, in their order; with ``retry`` also those whose every run failed."""
    done = {cell_of(record) for record in records if record["status"] == "ok" or not retry}
    return [cell for cell in cells if cell not in done]


def fields_of(cell: Cell) -> Record:
    """The cell's part of its record."""
    return asdict(cell)
