"""Ends what dead and silent workers left in a study, so that it goes on elsewhere. Starts nothing and trains nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from pcam_automl.defaults import MAX_RETRIES
from pcam_automl.search.lineages import FINISHED, counts_in, lineage_of
from pcam_automl.search.mirror import Mirror, forget
from pcam_automl.search.retrying_storage import OWNER
from pcam_automl.search.silence import Silent
from pcam_automl.search.slots import Slot, Slots, owner_alive
from pcam_automl.search.storage import engine_of, open_storage

LOST = "worker lost"


@dataclass(frozen=True)
class Settled:
    """Rows of dead workers that were ended, and those of them whose lineage does not go on."""

    ended: tuple[int, ...] = ()
    given_up: tuple[int, ...] = ()


def settle_lost(
    study: optuna.Study,
    slots: Slots,
    trials: list[FrozenTrial],
    *,
    checkpoints: Path,
    max_retries: int = MAX_RETRIES,
    silent: Silent | None = None,
    mirror: Mirror | None = None,
) -> Settled:
    """Put in order what earlier runs left: finished rows own slots, claims of dead processes are given back.

    Any number of processes may do it at once: who comes second finds the row ended. A lineage whose workers died too often is
    given up with its checkpoints: its slot takes another recipe, or, where it had been thawed and counts already, is done.

    Args:
        study: whose rows are ended.
        slots: its slots.
        trials: its trials.
        checkpoints: folder of the lineages' checkpoints.
        max_retries: deaths that a lineage survives.
        silent: claims and rows that gave no sign of life for the grace period, of hosts that cannot be asked.
        mirror: the bucket that holds checkpoints, too, if there is one.
    """
    silent = silent or Silent()
    newest = {lineage_of(trial): trial for trial in trials}  # a paused row that another one goes on from owns no slot
    done = {trial.number: name for name, trial in newest.items() if trial.state in FINISHED}
    slots.adopt(done, done)
    ended = _end_orphans(study, slots, trials)
    lost = [
        slot for slot in slots.claimed() if slot in silent.slots or (slot.owner and owner_alive(slot.owner) is False)
    ]
    if not lost and not silent.rows:
        return Settled(tuple(ended))
    trials = study.get_trials(deepcopy=False)  # anew: those slots may hold rows that are younger than the list
    ended += [number for number in silent.rows if _fail_lost(study, trials[number])]
    spent: set[int] = set()
    for slot in lost:  # judged one by one: who has died, or woken, since is not among them
        row = None if slot.trial_number is None else trials[slot.trial_number]
        if row is not None and row.state == TrialState.RUNNING and _fail_lost(study, row):
            ended.append(row.number)
        if _give_back(study, slots, slot, max_retries):
            spent.add(slot.number)
            if slot.lineage is not None:
                forget(mirror, checkpoints, slot.lineage)
    given_up = [s.trial_number for s in lost if s.number in spent and s.trial_number in ended]
    return Settled(tuple(ended), tuple(n for n in given_up if n is not None))


def _give_back(study: optuna.Study, slots: Slots, slot: Slot, max_retries: int) -> bool:
    """Free a lost claim as it was when it was judged (a claim that has changed since is left alone); whether it is given up."""
    if slot.state == "thawing":
        slots.leave_paused(slot)
        return False
    rows = study.get_trials(deepcopy=False)  # the row may have been finished in the last moment
    row = None if slot.trial_number is None else rows[slot.trial_number]
    if row is not None and row.state in FINISHED:
        slots.finish(slot)
        return False
    given_up = n_lost(study, slot.lineage) > max_retries
    if given_up and counts_in(rows, slot.lineage):  # it had been thawed, and stays paused where it was
        changed = slots.finish(slot)
    else:
        changed = slots.reopen(slot, keep_lineage=not given_up)
    return given_up and changed  # else its worker, or another process, was quicker: the lineage is theirs


def _end_orphans(study: optuna.Study, slots: Slots, trials: list[FrozenTrial]) -> list[int]:
    """End the running rows whose worker died before it noted them in their slot, of a thaw; nothing was trained in them."""
    orphans = [
        trial
        for trial in trials
        if trial.state == TrialState.RUNNING
        and (owner := trial.user_attrs.get(OWNER)) is not None
        and owner_alive(owner) is False
    ]
    if not orphans:
        return []
    held = {slot.trial_number for slot in slots.claimed()}
    return [trial.number for trial in orphans if trial.number not in held and _fail_lost(study, trial)]


def _fail_lost(study: optuna.Study, trial: FrozenTrial) -> bool:
    """End a dead worker's row; False if another process was quicker."""
    try:
        study._storage.set_trial_user_attr(trial._trial_id, "reason", LOST)
        return study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
    except UpdateFinishedTrialError:
        return False


def end_silent(
    name: str,
    url: str,
    silent: Silent,
    *,
    checkpoints: Path,
    max_retries: int = MAX_RETRIES,
    mirror: Mirror | None = None,
) -> Settled:
    """:func:`settle_lost` over a connection of its own, for a thread beside the one that trains.

    Args:
        name: the study's.
        url: the storage's.
        silent: what gave no sign of life.
        checkpoints: folder of the lineages' checkpoints.
        max_retries: deaths that a lineage survives.
        mirror: the bucket that holds checkpoints, too, if there is one.
    """
    storage = open_storage(url, create=False)
    try:
        study = optuna.load_study(study_name=name, storage=storage)
        trials = study.get_trials(deepcopy=False)
        slots = Slots(engine_of(study), name)
        return settle_lost(
            study, slots, trials, checkpoints=checkpoints, max_retries=max_retries, silent=silent, mirror=mirror
        )
    finally:
        storage.engine.dispose()


def n_lost(study: optuna.Study, lineage: str | None) -> int:
    """How often a worker died inside the lineage."""
    if lineage is None:
        return 0
    failed = study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
    return sum(t.user_attrs.get("lineage") == lineage and t.user_attrs.get("reason") == LOST for t in failed)
