"""``python -m benchmarks.search run | next | table | systems``: the proofs of the search, a cell a command."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.search.cells import MATRICES, RESULTS, WEIGHTS, Cell, Record, read_records, unmeasured
from benchmarks.search.run import run_cell
from benchmarks.search.systems import SYSTEMS, why_absent
from benchmarks.search.table import tables
from pcam_automl.errors import InputError


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run one cell, whether it was measured before or not")
    run.add_argument("--system", required=True, choices=list(SYSTEMS))
    run.add_argument("--data", required=True, help="colon96, colon96-dev:K, synthetic:SEED or slides:SEED")
    run.add_argument("--weights", required=True, choices=WEIGHTS)
    run.add_argument("--minutes", required=True, type=float, help="wall clock, everything included")
    run.add_argument("--seed", type=int, default=0)
    following = commands.add_parser("next", help="run the first cells of a matrix that have no result yet")
    following.add_argument("--matrix", choices=list(MATRICES), default="minimum")
    following.add_argument("--cells", type=int, default=1, help="how many cells, one after the other")
    following.add_argument("--retry", action="store_true", help="cells whose runs failed count as unmeasured")
    table = commands.add_parser("table", help="print the tables")
    table.add_argument("--matrix", choices=list(MATRICES), action="append", help="repeatable; all by default")
    commands.add_parser("systems", help="which systems can run here")
    for command in (run, following, table):
        command.add_argument("--results", type=Path, default=RESULTS, metavar="FILE")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 0 where it did what was asked, 1 where a run failed, 2 for faulty input."""
    args = build_parser().parse_args(arguments)
    try:
        if args.command == "systems":
            for name, system in SYSTEMS.items():
                print(f"{name:<18} {system.title:<28} {why_absent(name) or 'can run'}")
            return 0
        if args.command == "table":
            print(tables(read_records(args.results), args.matrix or tuple(MATRICES)))
            return 0
        if args.command == "run":
            return _run([Cell(args.system, args.data, args.weights, args.minutes, args.seed)], args.results)
        return _run(next_cells(args.matrix, args.results, args.cells, retry=args.retry), args.results)
    except InputError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2


def next_cells(matrix: str, results: Path, n: int, *, retry: bool) -> list[Cell]:
    """The first ``n`` unmeasured cells whose system is here; the others are named."""
    waiting = unmeasured(MATRICES[matrix], read_records(results), retry=retry)
    absent = {name: why for name in dict.fromkeys(c.system for c in waiting) if (why := why_absent(name))}
    for name, why in absent.items():
        print(f"{name}: {sum(c.system == name for c in waiting)} cells skipped, {why}", file=sys.stderr)
    here = [cell for cell in waiting if cell.system not in absent]
    print(f"{matrix}: {len(MATRICES[matrix]) - len(waiting)} of {len(MATRICES[matrix])} cells done", file=sys.stderr)
    return here[:n]


def _run(cells: list[Cell], results: Path) -> int:
    failed = False
    for cell in cells:
        print(f"{cell} ...", file=sys.stderr, flush=True)
        record = run_cell(cell, results=results)
        print(line_of(record), flush=True)
        failed |= record["status"] != "ok"
    return int(failed)


def line_of(record: Record) -> str:
    """A record in a line."""
    clock = f"{record['wall_s']:.1f} s of {60 * record['minutes']:g} s{', LATE' if record['late'] else ''}"
    if record["status"] != "ok":
        return f"failed: {record['error']}; {clock}\n{record['output']}"
    printed = "" if record["printed_auc"] is None else f", printed {record['printed_auc']:.4f}"
    return f"test AUC {record['test_auc']:.4f}{printed}; {clock}"


if __name__ == "__main__":
    sys.exit(main())
