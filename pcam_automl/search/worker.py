"""A worker: claims slots and runs trials until the study has its total. Suggests and trains through others."""

from __future__ import annotations

import collections
import gc
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import optuna
from optuna.trial import FrozenTrial, TrialState

from pcam_automl.errors import SearchFailed
from pcam_automl.search.objective import Objective
from pcam_automl.search.pruner import build_pruner
from pcam_automl.search.reading import FINISHED, errors_of, n_finished_of
from pcam_automl.search.sampler import PerTrialSampler
from pcam_automl.search.slots import Slot, Slots, owner_alive, owner_of_this_process
from pcam_automl.search.storage import engine_of
from pcam_automl.search.study import OpenStudy

LEAST_FAILURES_ALLOWED = 10

Finished = Callable[[FrozenTrial, list[FrozenTrial]], None]


@dataclass(frozen=True)
class SearchEnd:
    """How a worker's run ended: trials it finished, and why it stopped (``done``, ``timeout``, ``claimed elsewhere``)."""

    n_finished: int
    why: str


def run_worker(
    objective: Objective,
    *,
    n_trials: int,
    timeout_s: float | None = None,
    finished: Finished = lambda trial, trials: None,
) -> SearchEnd:
    """Run trials until ``n_trials`` of the study are finished (complete or pruned), by whichever worker.

    Args:
        objective: over the open study; its ``stop`` ends the run by raising.
        n_trials: the study's total.
        timeout_s: no new trial starts after this many seconds; the running one finishes.
        finished: called with each trial that this worker ended, and with all trials of the study.

    Raises:
        SearchFailed: max(10, n_trials) trials failed.
        Interrupted: after the running trial's slot was given back with its lineage.
    """
    opened = objective.opened
    study, slots = opened.study, Slots(engine_of(opened.study), opened.name)
    study.pruner = build_pruner(opened.settings.pruner, rungs=[views for views, _ in opened.settings.rungs])
    seconds_of = opened.trial_seconds() if opened.settings.cost_aware else None
    sampler = PerTrialSampler(opened.settings.sampler, seed=opened.settings.seed, seconds_of=seconds_of)
    study.sampler = sampler
    objective.begun = lambda slot, number, lineage: slots.started(slot, number, lineage)
    study.get_trials(deepcopy=False)  # into Optuna's cache, so that they are among what the collector leaves alone
    with long_lived_left_alone():
        return _run_trials(objective, study, slots, sampler, n_trials, timeout_s, finished)


def _run_trials(
    objective: Objective,
    study: optuna.Study,
    slots: Slots,
    sampler: PerTrialSampler,
    n_trials: int,
    timeout_s: float | None,
    finished: Finished,
) -> SearchEnd:
    opened = objective.opened
    began, n_finished, owner = time.monotonic(), 0, owner_of_this_process()
    trials = study.get_trials(deepcopy=False)  # once a trial: at 10,000 trials each read takes 10 ms
    while True:
        objective.stop()
        if timeout_s is not None and time.monotonic() - began >= timeout_s:
            return SearchEnd(n_finished, "timeout")
        settle_lost(study, slots, trials)
        slot = slots.claim(n_trials, owner)
        if slot is None:
            return SearchEnd(n_finished, "done" if n_finished_of(study) >= n_trials else "claimed elsewhere")
        objective.slot = slot
        sampler.prescribed = prescribed(opened, slot)
        sampler.budget_left = 1.0 - slot.number / n_trials
        trial = _one_trial(study, objective)
        n_finished += _settle_slot(slots, slot, trial, objective)
        trials = study.get_trials(deepcopy=False)
        finished(trial, trials)
        if objective.interrupted is not None:
            raise objective.interrupted
        check_failures(trials, n_trials)


@contextmanager
def long_lived_left_alone() -> Iterator[None]:
    """Inside the block Python's collector skips what was there before it.

    The objective collects after each trial, to give the network's memory back: 0.2 s each for going through all that
    torch, timm and 10,000 cached trials consist of, none of which ever goes away.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _one_trial(study: optuna.Study, objective: Objective) -> FrozenTrial:
    """One row through ``study.optimize`` (only there does Optuna's heartbeat run); errors end the row, not the search."""
    ended: list[FrozenTrial] = []
    study.optimize(objective, n_trials=1, catch=(Exception,), callbacks=[lambda _, trial: ended.append(trial)])
    return ended[0]


def _settle_slot(slots: Slots, slot: Slot, trial: FrozenTrial, objective: Objective) -> int:
    """Close or give back the slot; 1 if the trial counts."""
    if trial.state in FINISHED:
        slots.finish(slot)
        # a finished lineage never goes on, and fifty of them would fill the disk
        shutil.rmtree(objective.opened.folder / "checkpoints" / trial.user_attrs["lineage"], ignore_errors=True)
        return 1
    slots.reopen(slot, keep_lineage=objective.interrupted is not None)
    return 0


def settle_lost(study: optuna.Study, slots: Slots, trials: list[FrozenTrial]) -> None:
    """Put in order what earlier runs left: finished rows own slots, claims of dead processes are given back."""
    slots.adopt([t.number for t in trials if t.state in FINISHED])
    lost = [slot for slot in slots.claimed() if slot.owner is not None and owner_alive(slot.owner) is False]
    if not lost:
        return
    trials = study.get_trials(deepcopy=False)  # anew: those slots may hold rows that are younger than the list
    for slot in lost:  # first the row is failed, then the slot is free: nobody continues a row still RUNNING
        if slot.trial_number is not None and trials[slot.trial_number].state == TrialState.RUNNING:
            study._storage.set_trial_user_attr(trials[slot.trial_number]._trial_id, "reason", "worker lost")
            study.tell(slot.trial_number, state=TrialState.FAIL, skip_if_finished=True)
    slots.reap(owner_alive)


def prescribed(opened: OpenStudy, slot: Slot) -> dict[str, object]:
    """Parameters that the slot's next trial must take: its lineage's own, or the known-good recipe in slot 0."""
    if slot.lineage is not None:
        for row in reversed(opened.study.get_trials(deepcopy=False)):
            if row.user_attrs.get("lineage") == slot.lineage and row.params:
                return dict(row.params)
    if slot.number == 0 and slot.attempts == 1:
        return dict(opened.space.params_of(opened.start))
    return {}


def check_failures(trials: list[FrozenTrial], n_trials: int) -> None:
    """Raise SearchFailed once max(10, n_trials) trials ended in an error."""
    errors = errors_of(trials)
    if len(errors) >= max(LEAST_FAILURES_ALLOWED, n_trials):
        ((commonest, n),) = collections.Counter(errors).most_common(1)
        raise SearchFailed(
            f"{len(errors)} trials failed, so the search stops; {n} times: {commonest.removeprefix('error: ')}"
        )
