"""A worker: claims slots and runs trials until the study has its total, or its time is up. Suggests and trains through others."""

from __future__ import annotations

import collections
import gc
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from pcam_automl.errors import SearchFailed
from pcam_automl.search.audit import audit_trials, runs_through
from pcam_automl.search.budget import BRACKET, N_BRACKETS, BudgetClock, typical_trial_s
from pcam_automl.search.lineages import FINISHED, Lineage, has_diverged, lineage_of, lineages_of, sign_of
from pcam_automl.search.objective import Objective
from pcam_automl.search.paused_folders import DEFAULT_QUOTA_BYTES, is_held, keep_within, trim
from pcam_automl.search.promotion import by_promise, paused_of, promotable, rung_ratio, seconds_to_next_rung
from pcam_automl.search.pruner import SuccessiveHalving, build_pruner
from pcam_automl.search.reading import best_of, errors_of, n_finished_in
from pcam_automl.search.sampler import PerTrialSampler
from pcam_automl.search.slots import Slot, Slots, owner_alive, owner_of_this_process
from pcam_automl.search.start import enqueued_for
from pcam_automl.search.storage import engine_of
from pcam_automl.search.study import OpenStudy
from pcam_automl.training.fit import branch_share

LEAST_FAILURES_ALLOWED = 10
AUDIT_EVERY = 10
"""Rows between two looks at whether small rungs mislead."""
AUDITED_FROM = 100
"""Of so many trials three run through, so that pruning can be audited without selection: a twentieth of their time."""
MAX_RETRIES = 3
"""Deaths of its worker that a trial survives: more than that, and it is likely what kills them."""
LOST = "worker lost"
NEVER_ENDS = 1_000_000
"""Total of a search that only its budget limits."""

Finished = Callable[[FrozenTrial, list[FrozenTrial]], None]


@dataclass(frozen=True)
class SearchEnd:
    """How a worker's run ended: trials it finished, and why it stopped (``done``, ``timeout``, ``budget``, ``claimed elsewhere``)."""

    n_finished: int
    why: str


@dataclass(frozen=True)
class Limits:
    """When a worker stops.

    Attributes:
        n_trials: the study's total of finished lineages.
        timeout_s: no new trial starts after this many seconds; the running one finishes.
        clock: of a budget. While it lasts, paused lineages go on, too.
        quota_bytes: what the checkpoints of paused lineages may take.
        thaws: whether they go on while a budget lasts; for comparisons.
        max_retries: how often a trial whose worker was killed goes on from its last checkpoint before it is given up and
            its slot takes another recipe.
    """

    n_trials: int
    timeout_s: float | None = None
    clock: BudgetClock | None = None
    quota_bytes: int = DEFAULT_QUOTA_BYTES
    thaws: bool = True
    max_retries: int = MAX_RETRIES


def run_worker(objective: Objective, limits: Limits, *, finished: Finished = lambda trial, trials: None) -> SearchEnd:
    """Run trials until as many as the study shall have are finished (complete or pruned), by whichever worker.

    Args:
        objective: over the open study; its ``stop`` ends the run by raising.
        limits: when to stop.
        finished: called with each trial that this worker ended, and with all trials of the study.

    Raises:
        SearchFailed: max(10, n_trials) trials failed.
        Interrupted: after the running trial's slot was given back with its lineage.
        DataError: a checkpoint could not be written (a full disk).
    """
    opened = objective.opened
    study, slots = opened.study, Slots(engine_of(opened.study), opened.name)
    steps = [views for views, _ in opened.settings.rungs]
    pauses = limits.clock is not None and limits.thaws
    study.pruner = build_pruner(opened.settings.pruner, rungs=steps, pauses=pauses)
    seconds_of = opened.trial_seconds() if opened.settings.cost_aware else None
    sampler = PerTrialSampler(opened.settings.sampler, seed=opened.settings.seed, seconds_of=seconds_of)
    study.sampler = sampler
    objective.clock = limits.clock
    objective.begun = lambda slot, number, lineage: slots.started(slot, number, lineage)
    study.get_trials(deepcopy=False)  # into Optuna's cache, so that they are among what the collector leaves alone
    try:
        with long_lived_left_alone():
            return _run_trials(objective, study, slots, sampler, limits, finished)
    finally:
        objective.writer.flush()


def _run_trials(
    objective: Objective,
    study: optuna.Study,
    slots: Slots,
    sampler: PerTrialSampler,
    limits: Limits,
    finished: Finished,
) -> SearchEnd:
    opened = objective.opened
    began, n_finished, owner = time.monotonic(), 0, owner_of_this_process()
    n_expected = n_expected_of(opened, limits.n_trials)
    if isinstance(study.pruner, SuccessiveHalving) and n_expected >= AUDITED_FROM:
        study.pruner.spared = lambda lineage, earlier: runs_through(lineage, earlier, seed=opened.settings.seed)
    trials = study.get_trials(deepcopy=False)  # once a trial: at 10,000 trials each read takes 10 ms
    while True:
        objective.stop()
        if limits.timeout_s is not None and time.monotonic() - began >= limits.timeout_s:
            return SearchEnd(n_finished, "timeout")
        settle_lost(study, slots, trials, checkpoints=opened.checkpoints, max_retries=limits.max_retries)
        if limits.clock is not None:
            limits.clock.learn(best_of(trials, opened.settings.goal))
        _heed_audit(objective, study, trials)
        turn = next_turn(opened, slots, trials, limits, owner)
        if isinstance(turn, str):
            return SearchEnd(n_finished, turn)
        objective.slot, objective.thawed_from = turn.slot, turn.thawed_from
        entry = enqueued_for(opened.settings.enqueued, turn.slot, n_expected)
        objective.origin = None if entry is None else entry.origin
        spent = turn.slot.number / n_expected if limits.clock is None else limits.clock.used_share()
        sampler.budget_left = min(1.0, max(0.0, 1.0 - spent))
        sampler.prescribed = prescribed(opened, turn.slot) if entry is None else dict(entry.params)
        trial = _one_trial(study, objective)
        n_finished += _settle_slot(slots, turn.slot, trial, objective)
        trials = study.get_trials(deepcopy=False)
        keep_within(
            opened.checkpoints,
            trials,
            [views for views, _ in opened.settings.rungs],
            quota_bytes=limits.quota_bytes,
            sign=sign_of(study),
            settle=objective.writer.flush,
        )
        finished(trial, trials)
        if objective.interrupted is not None:
            raise objective.interrupted
        check_failures(trials, limits.n_trials)


def _heed_audit(objective: Objective, study: optuna.Study, trials: list[FrozenTrial]) -> None:
    """Prune from the second rung on while the audit says that the first one misleads; looked at every so many trials."""
    pruner = study.pruner
    # Of 5,000 rows every 1,000: there the look takes a second.
    every = max(AUDIT_EVERY, 10 ** (len(str(len(trials))) - 1))
    if not isinstance(pruner, SuccessiveHalving) or not trials or len(trials) % every:
        return
    settings = objective.opened.settings
    audit = audit_trials(trials, pruner.rungs, maximise=settings.goal.maximize, seed=settings.seed)
    misled = [rung.verdict == "misleads" for rung in audit.rungs]
    first = min(next((n for n, bad in enumerate(misled) if not bad), len(misled)), len(pruner.rungs) - 1)
    if first != pruner.first_judged:
        pruner.first_judged = first
        why = audit.rungs[first - 1].why if first else "the first rung's order holds after all"
        objective.watch.note(f"nothing ends before rung {first + 1} from here on: {why}")


# --- what comes next -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """A claimed slot; ``thawed_from`` is the number of the paused row that goes on in it, None for any other."""

    slot: Slot
    thawed_from: int | None = None


def next_turn(opened: OpenStudy, slots: Slots, trials: list[FrozenTrial], limits: Limits, owner: str) -> Turn | str:
    """What the worker does next, or why it ends.

    Without a budget: the next slot of the total. With one: a paused lineage that is by now among the best third of its rung;
    else, while a whole trial would still fit, an interrupted or a new one; else the most promising paused lineage whose next
    rung fits.
    """
    clock = limits.clock
    if clock is None:
        slot = slots.claim(limits.n_trials, owner)
        return Turn(slot) if slot is not None else _end(opened.study, limits)
    lineages, sign = lineages_of(trials), sign_of(opened.study)
    steps = [views for views, _ in opened.settings.rungs]
    waiting = [one for one in paused_of(lineages, steps) if is_held(opened.checkpoints, one.lineage.name)]
    decay, left_s = branch_share(opened.start), clock.left_s()
    fitting = [one for one in waiting if limits.thaws and seconds_to_next_rung(one, steps, decay) <= left_s]
    for one in promotable(fitting, lineages, steps, sign=sign):
        if (turn := _thawed(slots, one.lineage, owner)) is not None:
            return turn
    wanted = not clock.is_over_for_first and not n_finished_in(trials)  # a search needs a winner
    if wanted or left_s >= whole_trial_s(opened, lineages):
        slot = slots.claim(limits.n_trials, owner)
        if slot is not None:
            return Turn(slot)
    for one in by_promise(fitting, sign=sign):
        if (turn := _thawed(slots, one.lineage, owner)) is not None:
            return turn
    return "budget"


def n_expected_of(opened: OpenStudy, n_trials: int) -> int:
    """Lineages that the study will have: its total, or what a budget is planned for."""
    planned = opened.settings.plan.get("budget")  # None of a study that was made without one
    most = int(planned["n_started"]) if planned else N_BRACKETS * BRACKET if n_trials >= NEVER_ENDS else n_trials
    return min(n_trials, most)


def whole_trial_s(opened: OpenStudy, lineages: list[Lineage]) -> float:
    """Expected seconds of a trial through all rungs, by the first rungs that have been measured."""
    steps = [views for views, _ in opened.settings.rungs]
    decay = branch_share(opened.start)
    first = [float(rungs[0]["seconds"]) for lineage in lineages if (rungs := lineage.attr("rungs"))]
    ratios = [rung_ratio(steps, rung, decay) for rung in range(len(steps) - 1)]
    planned = opened.settings.plan.get("budget")  # None of a study that was made without one
    return typical_trial_s(first, ratios, float(planned["trial_s"]) if planned else math.inf)


def _thawed(slots: Slots, lineage: Lineage, owner: str) -> Turn | None:
    slot = slots.thaw(lineage.name, owner)
    return None if slot is None else Turn(slot, lineage.last.number)


def _end(study: optuna.Study, limits: Limits) -> str:
    return "done" if n_finished_in(study.get_trials(deepcopy=False)) >= limits.n_trials else "claimed elsewhere"


# --- one trial -------------------------------------------------------------------------------------------------------


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
    folder = objective.opened.checkpoints
    if trial.state not in FINISHED:
        slots.reopen(slot, keep_lineage=objective.goes_on)
        return 0
    slots.finish(slot)
    lineage = trial.user_attrs["lineage"]
    if trial.state == TrialState.COMPLETE or has_diverged(trial):
        objective.writer.flush()
        shutil.rmtree(folder / lineage, ignore_errors=True)  # it never goes on
    else:
        trim(folder, lineage)
    return 0 if objective.thawed_from is not None else 1


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
) -> Settled:
    """Put in order what earlier runs left: finished rows own slots, claims of dead processes are given back.

    Any number of processes may do it at once: who comes second finds the row ended. A lineage whose workers died too often is
    given up with its checkpoints: its slot takes another recipe, or, where it had been thawed and counts already, is done.
    """
    newest = {lineage_of(trial): trial for trial in trials}  # a paused row that another one goes on from owns no slot
    slots.adopt([trial.number for trial in newest.values() if trial.state in FINISHED])
    lost = [slot for slot in slots.claimed() if slot.owner is not None and owner_alive(slot.owner) is False]
    if not lost:
        return Settled()
    trials = study.get_trials(deepcopy=False)  # anew: those slots may hold rows that are younger than the list
    ended = []
    for slot in lost:  # first the row is failed, then the slot is free: nobody continues a row still RUNNING
        number = slot.trial_number
        if number is not None and trials[number].state == TrialState.RUNNING and _fail_lost(study, trials[number]):
            ended.append(number)
    spent = {slot.number for slot in lost if n_lost(study, slot.lineage) > max_retries}
    dead = {slot.owner for slot in lost}  # not who died since: their rows are not failed yet
    counted = {lineage_of(trial) for trial in trials if trial.state in FINISHED}
    for slot in lost:
        if slot.number in spent and slot.lineage is not None:
            shutil.rmtree(checkpoints / slot.lineage, ignore_errors=True)  # another process may be at the same
            if slot.lineage in counted:
                slots.finish(slot)
    slots.reap(lambda owner: False if owner in dead else None, goes_on=lambda slot: slot.number not in spent)
    given_up = [s.trial_number for s in lost if s.number in spent and s.trial_number in ended]
    return Settled(tuple(ended), tuple(n for n in given_up if n is not None))


def _fail_lost(study: optuna.Study, trial: FrozenTrial) -> bool:
    """End a dead worker's row; False if another process was quicker."""
    try:
        study._storage.set_trial_user_attr(trial._trial_id, "reason", LOST)
        return study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
    except UpdateFinishedTrialError:
        return False


def n_lost(study: optuna.Study, lineage: str | None) -> int:
    """How often a worker died inside the lineage."""
    if lineage is None:
        return 0
    failed = study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
    return sum(t.user_attrs.get("lineage") == lineage and t.user_attrs.get("reason") == LOST for t in failed)


def prescribed(opened: OpenStudy, slot: Slot) -> dict[str, object]:
    """Parameters of the slot's lineage, which its next row must take; empty where it has none yet."""
    if slot.lineage is not None:
        for row in reversed(opened.study.get_trials(deepcopy=False)):
            if row.user_attrs.get("lineage") == slot.lineage and row.params:
                return dict(row.params)
    return {}


def check_failures(trials: list[FrozenTrial], n_trials: int) -> None:
    """Raise SearchFailed once max(10, n_trials) trials ended in an error; of a search by budget, 10 and as many as finished."""
    errors = errors_of(trials)
    allowed = n_trials if n_trials < NEVER_ENDS else n_finished_in(trials)
    if len(errors) >= max(LEAST_FAILURES_ALLOWED, allowed):
        ((commonest, n),) = collections.Counter(errors).most_common(1)
        raise SearchFailed(
            f"{len(errors)} trials failed, so the search stops; {n} times: {commonest.removeprefix('error: ')}"
        )
