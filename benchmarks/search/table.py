"""Results as tables: medians and ranges, ratios of errors, unmeasured cells as such. Runs nothing."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

from benchmarks.search.cells import MATRICES, OUTSIDE, Cell, Record, cell_of
from benchmarks.search.systems import SYSTEMS

ABSENT = "not measured"
Row = list[str]
Key = tuple[str, str, float]
"""Data, weights, minutes."""


def latest(records: Iterable[Record]) -> dict[Cell, Record]:
    """A record a cell: the last good one, else the last."""
    kept: dict[Cell, Record] = {}
    for record in records:
        cell = cell_of(record)
        if cell not in kept or record["status"] == "ok" or kept[cell]["status"] != "ok":
            kept[cell] = record
    return kept


def figures(records: dict[Cell, Record], key: Key, system: str, name: str = "test_auc") -> list[float]:
    """What the runs of a system at (data, weights, minutes) gave, in the order of their seeds."""
    own = [cell for cell in records if cell.system == system and (cell.data, cell.weights, cell.minutes) == key]
    values = [records[cell].get(name) for cell in sorted(own, key=lambda cell: cell.seed)]
    return [float(value) for value in values if value is not None]


def cell_text(records: dict[Cell, Record], key: Key, system: str, n_wanted: int) -> str:
    """``0.9932 (0.9901 to 0.9950)``; how many of the wanted runs there are; what failed or was late."""
    own = [r for c, r in records.items() if c.system == system and (c.data, c.weights, c.minutes) == key]
    values = figures(records, key, system)
    failed = sum(record["status"] != "ok" for record in own)
    late = sum(bool(record.get("late")) for record in own if record["status"] == "ok")
    if not values:
        return f"failed ({failed} runs)" if failed else ABSENT
    text = f"{statistics.median(values):.4f}"
    if len(values) > 1:
        text += f" ({min(values):.4f} to {max(values):.4f})"
    notes = [f"{len(values)} of {n_wanted} runs"] if len(values) < n_wanted else []
    notes += [f"{failed} failed"] if failed else []
    notes += [f"{late} late"] if late else []
    return text + (f" [{', '.join(notes)}]" if notes else "")


def error_ratio(records: dict[Cell, Record], key: Key, system: str = "ours") -> str:
    """Median error (1 - AUC) of ``system`` over that of the best outside peer: ``0.41 of fastai``."""
    peers = {name: statistics.median(v) for name in OUTSIDE if (v := figures(records, key, name))}
    own = figures(records, key, system)
    if not peers or not own:
        return ABSENT
    best = max(peers, key=peers.__getitem__)
    if peers[best] >= 1.0:
        return f"- ({best} makes no error)"
    return f"{(1 - statistics.median(own)) / (1 - peers[best]):.2f} of {SYSTEMS[best].title}"


def accuracy_rows(records: dict[Cell, Record], cells: Sequence[Cell]) -> tuple[Row, list[Row]]:
    """Head and rows of a matrix: (data, weights, minutes) down, systems across, the ratio of errors last."""
    systems = list(dict.fromkeys(cell.system for cell in cells))
    keys = list(dict.fromkeys((cell.data, cell.weights, cell.minutes) for cell in cells))
    rows = []
    for key in sorted(keys):
        row = [key[0], key[1], f"{key[2]:g}"]
        for system in systems:
            wanted = sum(c.system == system and (c.data, c.weights, c.minutes) == key for c in cells)
            row.append(cell_text(records, key, system, wanted))
        rows.append([*row, error_ratio(records, key)])
    head = ["data", "weights", "minutes", *(SYSTEMS[name].title for name in systems), "error, ours over the best peer"]
    return head, rows


def sooner_rows(records: dict[Cell, Record], data: str = "colon96", last: float = 15.0) -> tuple[Row, list[Row]]:
    """By weights: the best peer's median after ``last`` minutes, and the least of our budgets that reaches it.

    Only budgets that were run can answer, so the ratio is a lower bound: what 3 minutes reach is 5x sooner than 15. Ours are runs on the
    peer's kind of machine: minutes on another are worth another number of images.
    """
    rows = []
    for weights in ("none", "given"):
        peers = {n: statistics.median(v) for n in OUTSIDE if (v := figures(records, (data, weights, last), n))}
        best = max(peers, key=peers.__getitem__, default="")
        there = {
            _machine(r)
            for c, r in records.items()
            if (c.system, c.data, c.weights, c.minutes) == (best, data, weights, last)
        }
        alike = {cell: record for cell, record in records.items() if _machine(record) in there}
        ours = {
            minutes: statistics.median(values)
            for minutes in sorted({cell.minutes for cell in records})
            if (values := figures(alike, (data, weights, minutes), "ours"))
        }
        if not peers or not ours:
            rows.append([weights, ABSENT, ABSENT, ABSENT])
            continue
        reached = [minutes for minutes, value in ours.items() if value >= peers[best]]
        sooner = [f"{reached[0]:g}", f"at least {last / reached[0]:.1f}x"] if reached else ["not reached", "-"]
        rows.append([weights, f"{peers[best]:.4f} ({SYSTEMS[best].title})", *sooner])
    return ["weights", f"best peer after {last:g} minutes", "ours, minutes", "sooner"], rows


def _machine(record: Record) -> tuple[object, ...]:
    """Cores, CPU and its instructions, as far as they were noted."""
    of = record.get("machine", {})
    return of.get("cores"), of.get("cpu"), of.get("instructions")


def calibration_rows(records: dict[Cell, Record], cells: Sequence[Cell]) -> tuple[Row, list[Row]]:
    """By system: printed minus test AUC, and how often the test AUC lies in the printed 95 % interval."""
    rows = []
    for system in dict.fromkeys(cell.system for cell in cells):
        wanted = [cell for cell in cells if cell.system == system]
        own = [records[cell] for cell in wanted if cell in records and records[cell]["status"] == "ok"]
        gaps = [r["printed_auc"] - r["test_auc"] for r in own if r.get("printed_auc") is not None]
        with_interval = [r for r in own if r.get("printed_95")]
        inside = sum(r["printed_95"][0] <= r["test_auc"] <= r["printed_95"][1] for r in with_interval)
        optimism = f"{statistics.median(gaps):+.4f} ({min(gaps):+.4f} to {max(gaps):+.4f})" if gaps else ABSENT
        share = f"{inside} of {len(with_interval)}" if with_interval else "prints none" if own else ABSENT
        rows.append([SYSTEMS[system].title, f"{len(own)} of {len(wanted)}", optimism, share])
    return ["system", "runs", "printed - test AUC", "test AUC inside the printed 95 % interval"], rows


def markdown(head: Row, rows: Sequence[Row]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(records: Sequence[Record], names: Sequence[str] = tuple(MATRICES)) -> str:
    """All tables, each under its matrix's name."""
    kept = latest(records)
    build: dict[str, Callable[[Sequence[Cell]], tuple[Row, list[Row]]]] = {
        "calibration": lambda cells: calibration_rows(kept, cells),
    }
    parts = []
    for name in names:
        cells = MATRICES[name]
        done = sum(cell in kept and kept[cell]["status"] == "ok" for cell in cells)
        table = build.get(name, lambda cells: accuracy_rows(kept, cells))(cells)
        parts.append(f"### {name}: {done} of {len(cells)} cells measured\n\n{markdown(*table)}")
        if name == "accuracy":
            parts.append(f"### Time to the best peer's figure\n\n{markdown(*sooner_rows(kept))}")
    return "\n\n".join(parts)
