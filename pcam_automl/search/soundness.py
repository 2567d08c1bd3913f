"""Whether a study agrees with itself: rows, slots, lineages, rungs and checkpoints. Mends nothing."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from optuna.trial import FrozenTrial, TrialState

from pcam_automl.errors import BundleError
from pcam_automl.search.lineages import FINISHED, Lineage, lineages_of
from pcam_automl.search.slots import Slot, owner_alive
from pcam_automl.training.checkpoint import read_checkpoint


@dataclass(frozen=True)
class Soundness:
    """What a check found.

    Attributes:
        faults: contradictions, a line each; none in a sound study.
        n_lineages: lineages with a finished row.
        n_recomputed: rungs that a later row of their lineage trained again although an earlier one had reported them: their
            checkpoint was not on the disk yet when the worker was killed, or lies on another machine.
        n_checkpoints: checkpoints that were read and verified.
    """

    faults: tuple[str, ...]
    n_lineages: int
    n_recomputed: int
    n_checkpoints: int


def check_study(
    trials: Sequence[FrozenTrial], slots: Sequence[Slot], checkpoints: Path, *, total: int | None = None
) -> Soundness:
    """Compare what the database and the disk hold, while no worker changes them.

    Args:
        trials: every row.
        slots: every slot.
        checkpoints: the study's folder of checkpoints; only what lies on this machine is seen.
        total: trials that were asked for.
    """
    lineages = lineages_of(trials)
    faults = [*_slots_and_rows(trials, slots, lineages, total), *_rungs(lineages)]
    folders = sorted(entry for entry in checkpoints.iterdir() if entry.is_dir()) if checkpoints.is_dir() else []
    known, n_read = {lineage.name for lineage in lineages}, 0
    for folder in folders:
        if folder.name.startswith("."):
            continue
        if folder.name not in known:
            faults.append(f"checkpoints of lineage {folder.name}, of which there is no trial")
        for one in sorted(folder.glob("[0-9]*")):
            try:
                read_checkpoint(one)
                n_read += 1
            except BundleError as fault:
                faults.append(str(fault))
    finished = sum(lineage.finished is not None for lineage in lineages)
    return Soundness(tuple(faults), finished, sum(map(_n_recomputed, lineages)), n_read)


def _slots_and_rows(
    trials: Sequence[FrozenTrial], slots: Sequence[Slot], lineages: Sequence[Lineage], total: int | None
) -> list[str]:
    faults = []
    by_number = {trial.number: trial for trial in trials}
    done = [slot for slot in slots if slot.state == "done"]
    finished = {lineage.name for lineage in lineages if lineage.finished is not None}
    held = collections.Counter(_lineage_name(slot, by_number) for slot in slots if slot.state != "open")
    faults += [f"{n} slots hold lineage {name}" for name, n in held.items() if name is not None and n > 1]
    done_names = {_lineage_name(slot, by_number) for slot in done}
    # A paused one that goes on, or shall: a thaw that was interrupted leaves its slot open.
    paused = {one.name for one in lineages if one.finished is not None and one.finished.state == TrialState.PRUNED}
    going = {slot.lineage for slot in slots if slot.state in ("claimed", "thawing")}
    going |= {slot.lineage for slot in slots if slot.state == "open"} & paused
    faults += [
        f"lineage {name} is finished and no slot is done for it" for name in sorted(finished - done_names - going)
    ]
    for slot in done:
        row = None if slot.trial_number is None else by_number.get(slot.trial_number)
        if row is None:
            faults.append(f"slot {slot.number} is done without a trial")
        elif row.state not in FINISHED and _lineage_name(slot, by_number) not in finished:  # else a thaw that failed
            faults.append(f"slot {slot.number} is done, its trial {row.number} is {row.state.name.lower()}")
    for slot in slots:
        if slot.state in ("claimed", "thawing") and slot.owner is not None and owner_alive(slot.owner) is False:
            faults.append(f"slot {slot.number} is claimed by a process that is dead")
    working = {slot.trial_number for slot in slots if slot.state == "claimed"}
    faults += [
        f"trial {trial.number} is running and no slot is claimed for it"
        for trial in trials
        if trial.state == TrialState.RUNNING and trial.number not in working
    ]
    if total is not None and len(finished) > total:
        faults.append(f"{len(finished)} trials are finished, {total} were asked for")
    return faults


def _lineage_name(slot: Slot, by_number: dict[int, FrozenTrial]) -> str | None:
    """The slot's lineage; of one that was adopted without, its trial's."""
    if slot.lineage is not None:
        return slot.lineage
    row = None if slot.trial_number is None else by_number.get(slot.trial_number)
    return None if row is None else lineages_of([row])[0].name


def _rungs(lineages: Sequence[Lineage]) -> list[str]:
    """Every row reports its rungs in their order, and no rung is missing below one that is there."""
    faults = []
    for lineage in lineages:
        steps = sorted({step for row in lineage.rows for step in row.intermediate_values})
        for row in lineage.rows:
            own = sorted(row.intermediate_values)
            if own != steps[: len(own)]:
                faults.append(f"trial {row.number} reports steps {own}, its lineage {lineage.name} has {steps}")
        params: dict[str, object] = {}
        for row in lineage.rows:  # one that was killed while it asked has some of them only
            if any(params.setdefault(name, value) != value for name, value in row.params.items()):
                faults.append(f"trial {row.number} has other parameters than its lineage {lineage.name} began with")
    return faults


def _n_recomputed(lineage: Lineage) -> int:
    """Rungs whose measured seconds differ between rows: those that come from a checkpoint have the first row's."""
    n, known = 0, dict[int, float]()
    for row in lineage.rows:
        for place, rung in enumerate(row.user_attrs.get("rungs", ())):
            n += place in known and known[place] != rung.get("seconds")
            known[place] = rung.get("seconds")
    return n
