"""The systems that are compared: which command runs each, by which interpreter, and what it left. Measures nothing."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.search.cells import Cell

REPO = Path(__file__).resolve().parents[2]
STUDY = "proof"


@dataclass(frozen=True)
class System:
    """One side of the comparison.

    Attributes:
        title: for tables.
        package: what its interpreter must be able to import.
        module: of a peer; None is our command line.
        options: of our ``search``, beside what every cell says.
        absent: why it can run nowhere yet.
    """

    title: str
    package: str
    module: str | None = None
    options: tuple[str, ...] = ()
    absent: str | None = None


SYSTEMS = {
    "ours": System("pcam-automl", "pcam_automl"),
    "random": System("random search, our engine", "pcam_automl", options=("--sampler", "random", "--pruner", "none")),
    "tpe-without-rungs": System("TPE without rungs", "pcam_automl", options=("--sampler", "tpe", "--pruner", "none")),
    "asha-without-thaw": System("ASHA without thaw", "pcam_automl", options=("--no-thaw",)),
    "average": System("rungs scored by the average, no decay branch", "pcam_automl", options=("--set", "decay=0")),
    "cost-aware": System("improvement per second", "pcam_automl", options=("--cost-aware",)),
    "optuna": System("plain Optuna", "optuna", "peer_optuna"),
    "fastai": System("fastai", "fastai", "peer_fastai"),
    "raytune": System("Ray Tune", "ray", "peer_raytune"),
    "autogluon": System(
        "AutoGluon",
        "autogluon.multimodal",
        absent="no peer is written: autogluon.multimodal 1.6.3 wants timm 1.0.3, pandas 2 and torch 2.13, gigabytes of its own",
    ),
}


def python_of(name: str) -> str:
    """``PCAM_PEERS_PYTHON_<SYSTEM>``, else this interpreter."""
    return os.environ.get(f"PCAM_PEERS_PYTHON_{name.upper().replace('-', '_')}", sys.executable)


def environment() -> dict[str, str]:
    """Of the processes: this repository is found, the hub is not asked, threads are the library's own choice."""
    own = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "PYTHONWARNINGS")}
    return {**own, "PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def why_absent(name: str) -> str | None:
    """Why a system cannot run here; None where it can."""
    if SYSTEMS[name].absent is not None:
        return SYSTEMS[name].absent
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({SYSTEMS[name].package!r}) is None)"
    try:
        run = subprocess.run([python_of(name), "-c", code], env=environment(), capture_output=True, check=False)
    except OSError as fault:
        return f"{python_of(name)}: {fault.strerror}"
    if run.returncode:
        return f"{SYSTEMS[name].package} is not installed"
    flags = [option for option in SYSTEMS[name].options if option.startswith("--")]
    missing = [flag for flag in flags if flag not in _search_help()] if flags else []
    return f"search has no option {', '.join(missing)}" if missing else None


@functools.cache
def _search_help() -> str:
    """What ``search --help`` says, wide enough that no option is cut."""
    line = [sys.executable, "-m", "pcam_automl", "search", "--help"]
    return subprocess.run(
        line, env={**environment(), "COLUMNS": "200"}, capture_output=True, text=True, check=True
    ).stdout


def command_of(cell: Cell, data: Path, weights: Path | None, out: Path, until: float) -> list[str]:
    """The command line of a cell.

    Args:
        cell: what to run.
        data: folder in the Kaggle layout without the test part's labels.
        weights: folder of safetensors named after the timm model; None is from scratch.
        out: an empty folder for whatever the system writes.
        until: end of the wall clock, in seconds since 1970, for the peers; ours takes the budget itself.
    """
    system, source = SYSTEMS[cell.system], str(weights) if weights else "none"
    if system.module is not None:
        line = [python_of(cell.system), "-m", f"benchmarks.search.{system.module}", "--until", f"{until:.3f}"]
        return [*line, "--data", str(data), "--weights", source, "--seed", str(cell.seed), "--out", str(out)]
    line = [python_of(cell.system), "-m", "pcam_automl", "search", "--finalize"]
    line += ["--budget", f"{60 * cell.minutes:g}s", "--data", str(data), "--weights", source, "--seed", str(cell.seed)]
    return [*line, "--study", STUDY, "--storage", f"sqlite:///{out}/studies.db", "--device", "cpu", *system.options]


def predictions_of(cell: Cell, out: Path) -> Path:
    """Where the system puts its probabilities of the test patches (id,label)."""
    return out / ("predictions.csv" if SYSTEMS[cell.system].module else f"{STUDY}/final/submission.csv")


def said_by(cell: Cell, out: Path) -> dict[str, Any]:
    """What the system says of itself: ``printed_auc``, ``printed_95`` (or None), ``details``, ``versions``.

    Of ours it is what finalize printed, else the study's own estimate.
    """
    if SYSTEMS[cell.system].module is not None:
        return dict(json.loads((out / "said.json").read_text(encoding="utf-8")))
    final = json.loads((out / STUDY / "final" / "submission.json").read_text(encoding="utf-8"))
    bundle = json.loads((out / STUDY / "final" / "model" / "bundle.json").read_text(encoding="utf-8"))
    printed = {"printed_auc": final.get("auc"), "printed_95": final.get("auc_95"), "printed_on": final.get("auc_on")}
    recipe = {name: bundle["recipe"][name] for name in ("backbone", "crop_size", "input_size", "lr", "epochs", "views")}
    details = {"recipe": recipe, "trial": final.get("trial"), "study": _status(out)}
    if printed["printed_95"] is None and details["study"]["interval"] is not None:
        printed["printed_95"] = details["study"]["interval"]  # of the search's best, as `status` prints it
    return {**printed, "details": details, "versions": bundle["provenance"].get("versions", {})}


def _status(out: Path) -> dict[str, Any]:
    """``status --json`` of the study, what was best and how many trials there were."""
    line = [sys.executable, "-m", "pcam_automl", "status", "--json", "--study", STUDY]
    line += ["--storage", f"sqlite:///{out}/studies.db"]
    run = subprocess.run(line, env=environment(), capture_output=True, text=True, check=True, cwd=out)
    status = json.loads(run.stdout)
    ranked = status.get("ranking", {}).get("trials") or [{}]
    best = {key: (status.get("best") or {}).get(key) for key in ("number", "auc", "seconds")}
    return {"states": status.get("states"), "best": best, "interval": ranked[0].get("interval")}
