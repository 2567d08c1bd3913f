"""One cell in a fresh process under a hard wall clock, scored and appended. Knows no system's inside."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.search.cells import RESULTS, Cell, Record, append_record, fields_of
from benchmarks.search.data import data_folder, test_auc, without_truth
from benchmarks.search.systems import REPO, command_of, environment, predictions_of, said_by
from benchmarks.settings import host
from pcam_automl.errors import DataError

LATE = 1.03
"""A run that took longer than this share of its wall clock is flagged."""
KILLED_AT = 1.5
"""At this share of the wall clock the process is ended; what it has not written counts as not there."""
_INSTALLED = re.compile(r"/\S*?/(?=site-packages/)")  # where packages lie is this machine's
_LAST = 1_500  # characters of a failed run's output that are kept
_GRACE_S = 10.0


def weights_folder() -> Path:
    """``PCAM_WEIGHTS_DIR``: the folder of the given weights.

    Raises:
        DataError: not set, or without a safetensors file.
    """
    folder = Path(os.environ.get("PCAM_WEIGHTS_DIR", "weights"))
    if not list(folder.glob("*.safetensors")):
        raise DataError(f"PCAM_WEIGHTS_DIR must name a folder of safetensors named after the timm model, got {folder}")
    return folder.resolve()


def run_cell(cell: Cell, *, results: Path = RESULTS) -> Record:
    """Run, score, append and return the cell's record.

    Raises:
        DataError: the data or the weights are not here; nothing is recorded.
    """
    folder = data_folder(cell.data)
    weights = weights_folder() if cell.weights == "given" else None
    with tempfile.TemporaryDirectory(prefix="pcam-proof-") as work:
        out = Path(work) / "out"
        out.mkdir()
        seen = without_truth(folder, Path(work) / "data")
        began = time.time()
        line = command_of(cell, seen, weights, out, began + 60 * cell.minutes)
        code, output = run_until(line, limit_s=KILLED_AT * 60 * cell.minutes, log=Path(work) / "log")
        wall_s = time.time() - began
        record = {**fields_of(cell), **_judged(cell, out, folder, code), **_circumstances(cell, wall_s)}
        if record["status"] != "ok":
            hidden = {str(out): "OUT", work: "WORK", str(REPO): ".", str(Path.home()): "~"}
            for path, shown in hidden.items():
                output = output.replace(path, shown)
            record["output"] = _INSTALLED.sub("", output)[-_LAST:]
    append_record(record, results)
    return record


def _circumstances(cell: Cell, wall_s: float) -> Record:
    return {
        "wall_s": round(wall_s, 2),
        "late": wall_s > LATE * 60 * cell.minutes,
        "machine": host(),
        "load_before_1min": round(os.getloadavg()[0], 2),
        "command": cell.command,
        "date": time.strftime("%Y-%m-%d"),
    }


def _judged(cell: Cell, out: Path, folder: Path, code: int | None) -> dict[str, Any]:
    """Status and figures of what the system left."""
    file = predictions_of(cell, out)
    if not file.is_file():
        ended = "it was killed" if code is None else f"exit code {code}"
        return {"status": "failed", "error": f"no predictions ({ended})", "test_auc": None, "printed_auc": None}
    try:
        found: dict[str, Any] = {"status": "ok", "test_auc": test_auc(file, folder), **said_by(cell, out)}
    except (DataError, OSError, ValueError, KeyError, subprocess.CalledProcessError) as fault:
        return {"status": "failed", "error": f"{type(fault).__name__}: {fault}", "test_auc": None, "printed_auc": None}
    return found | ({"exit_code": code} if code else {})


def run_until(line: list[str], *, limit_s: float, log: Path) -> tuple[int | None, str]:
    """Exit code and output of a command; None where it was ended after ``limit_s``, with everything it had started."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            line, cwd=REPO, env=environment(), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end_group(process)
    return code, log.read_text(encoding="utf-8", errors="replace")


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Ask the process and its children to end, then make them."""
    for number, wait_s in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, _GRACE_S)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        if process.poll() is not None:  # its children are signalled and need no waiting for
            continue
        try:
            process.wait(wait_s)
        except subprocess.TimeoutExpired:
            continue
