"""A worker: claims slots and runs trials until the study has its total, or its time is up. Suggests and trains through others."""

from __future__ import annotations

import collections
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial

import optuna
import sqlalchemy as sa
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from pcam_automl.errors import DeviceFailed, SearchFailed
from pcam_automl.search.audit import AUDIT_EVERY, audit_trials, misleading_steps, runs_through
from pcam_automl.search.budget import BudgetClock
from pcam_automl.search.connections import keep_on_disk
from pcam_automl.search.lineages import FINISHED, counts_in, has_diverged, sign_of
from pcam_automl.search.mirror import forget
from pcam_automl.search.objective import Objective
from pcam_automl.search.patience import patient
from pcam_automl.search.paused_folders import keep_within, trim
from pcam_automl.search.pruner import SuccessiveHalving, build_pruner
from pcam_automl.search.reading import ERROR, NO_DATABASE, best_of, errors_of, n_finished_in
from pcam_automl.search.retrying_storage import RetryingStorage
from pcam_automl.search.sampler import PerTrialSampler
from pcam_automl.search.settling import LOST, end_silent, settle_lost
from pcam_automl.search.silence import Patrol, Silent, Watchman, heartbeat_seconds
from pcam_automl.search.slots import Slot, Slots, owner_of_this_process
from pcam_automl.search.start import FIRST, enqueued_for
from pcam_automl.search.storage import engine_of, rdb_of
from pcam_automl.search.turns import NEVER_ENDS, Limits, Turn, held_elsewhere, n_expected_of, next_turn, prescribed

MOST_FAILED_ENTRIES = 3
"""Errors of one slot's prescribed recipe, whatever search they were in."""
LEAST_FAILURES_ALLOWED = 10
TOLD_SHARE = 0.05
"""Of a budget: when its search's end moves by more, it is said."""
AUDITED_FROM = 100
"""Of so many trials three run through, so that pruning can be audited without selection: a twentieth of their time."""
WAIT_S = 0.5

Finished = Callable[[FrozenTrial, list[FrozenTrial]], None]


@dataclass(frozen=True)
class SearchEnd:
    """How a worker's run ended: trials it finished, and why it stopped (``done``, ``timeout``, ``budget``, ``yielded``, ``claimed elsewhere``)."""

    n_finished: int
    why: str


def run_worker(objective: Objective, limits: Limits, *, finished: Finished = lambda trial, trials: None) -> SearchEnd:
    """Run trials until as many as the study shall have are finished (complete or pruned), by whichever worker.

    Args:
        objective: over the open study; its ``stop`` ends the run by raising.
        limits: when to stop.
        finished: called with each trial that this worker ended, and with all trials of the study.

    Raises:
        SearchFailed: max(10, n_trials) trials failed.
        Interrupted: after the running trial's slot was given back with its lineage.
        WriteError: a checkpoint could not be written (a full disk).
    """
    opened = objective.opened
    study, slots = opened.study, Slots(engine_of(opened.study), opened.name)
    steps = [views for views, _ in opened.settings.rungs]
    pauses = limits.clock is not None and limits.thaws
    n_first = min(FIRST, len(opened.settings.enqueued))
    study.pruner = build_pruner(opened.settings.pruner, rungs=steps, pauses=pauses, n_first=n_first)
    seconds_of = opened.trial_seconds() if opened.settings.cost_aware else None
    sampler = PerTrialSampler(
        opened.settings.sampler, seed=opened.settings.seed, seconds_of=seconds_of, share_of=opened.views_share()
    )
    study.sampler = sampler
    objective.clock = limits.clock
    claim = SlotOfTrial(slots)
    objective.begun = claim.begun
    study.get_trials(deepcopy=False)  # into Optuna's cache, so that they are among what the collector leaves alone
    storage = rdb_of(study)
    storage.heartbeat_interval = heartbeat_seconds(opened.settings.grace_s)
    if isinstance(storage, RetryingStorage):
        storage.owner, storage.begins_with, storage.claim = owner_of_this_process(), objective.notes_at_birth, claim
    try:
        with patient(), long_lived_left_alone(), _patrol(objective, slots, limits):
            end = _run_trials(objective, study, claim, sampler, limits, finished)
            objective.writer.flush()  # the last checkpoint may have been on its way when the quota was looked at
            _within_quota(objective, slots, limits, study.get_trials(deepcopy=False))
            return end
    finally:
        if isinstance(storage, RetryingStorage):
            # The study outlives the objective and its patches.
            storage.owner = storage.begins_with = storage.claim = None
        _flush(objective)


def _patrol(objective: Objective, slots: Slots, limits: Limits) -> Patrol[Silent]:
    """Beside the trials: workers of other hosts that fell silent."""
    opened = objective.opened

    def found(silent: Silent) -> None:
        ended = end_silent(
            opened.name,
            opened.url,
            silent,
            checkpoints=opened.checkpoints,
            max_retries=limits.max_retries,
            mirror=opened.mirror,
        ).ended
        if ended:
            numbers = ", ".join(map(str, ended))
            objective.watch.note(
                f"no sign of life of trial {numbers} for {opened.settings.grace_s:.0f} s: ended as lost, to be gone on with"
            )

    return Patrol(Watchman(slots, opened.settings.grace_s), found)


def _run_trials(
    objective: Objective,
    study: optuna.Study,
    claim: SlotOfTrial,
    sampler: PerTrialSampler,
    limits: Limits,
    finished: Finished,
) -> SearchEnd:
    opened, slots = objective.opened, claim.slots
    began, n_finished, owner, waited = time.monotonic(), 0, owner_of_this_process(), False
    n_expected = n_expected_of(opened, limits.n_trials)
    if isinstance(study.pruner, SuccessiveHalving) and n_expected >= AUDITED_FROM:
        study.pruner.spared = lambda lineage, earlier: runs_through(lineage, earlier, seed=opened.settings.seed)
    trials = study.get_trials(deepcopy=False)  # once a trial: at 10,000 trials each read takes 10 ms
    earlier = trials  # what failed before this process began was for a cause that may be mended
    in_a_row: list[FrozenTrial] = []
    while True:
        objective.stop()
        objective.writer.check()  # a disk that is full shall not meet another trial
        if limits.timeout_s is not None and time.monotonic() - began >= limits.timeout_s:
            return SearchEnd(n_finished, "timeout")
        if limits.yields is not None and limits.yields():
            return SearchEnd(n_finished, "yielded")
        settled = settle_lost(
            study, slots, trials, checkpoints=opened.checkpoints, max_retries=limits.max_retries, mirror=opened.mirror
        )
        if settled.ended:
            trials = study.get_trials(deepcopy=False)  # in the list at hand those rows run for ever
        if limits.clock is not None:
            limits.clock.heed(study)
            _plan_anew(objective, limits.clock, best_of(trials, opened.settings.goal))
        _heed_audit(objective, study, trials)
        turn = next_turn(opened, slots, trials, limits, owner)
        if _waits_at(turn, limits) and (held := held_elsewhere(slots, limits, owner)):
            if not waited:
                held_trials, lost = (f"{held} trials", "they are") if held > 1 else ("trial", "it is")
                objective.watch.note(f"waiting for other workers' last {held_trials}, in case {lost} lost")
            waited = True
            time.sleep(WAIT_S)
            trials = study.get_trials(deepcopy=False)
            continue
        if isinstance(turn, str):
            return SearchEnd(n_finished, turn)
        objective.slot, objective.thawed_from = turn.slot, turn.thawed_from
        claim.hold(turn.slot)
        entries = opened.settings.enqueued
        has_one = turn.slot.number < len(entries)  # else thousands of trials are not gone through
        failed = slots_that_failed(trials, trials[len(earlier) :]) if has_one else set()
        entry = enqueued_for(entries, turn.slot, n_expected, failed)
        objective.origin = None if entry is None else entry.origin
        spent = turn.slot.number / n_expected if limits.clock is None else limits.clock.used_share()
        sampler.budget_left = min(1.0, max(0.0, 1.0 - spent))
        sampler.prescribed = {**prescribed(opened, turn.slot), **({} if entry is None else entry.params)}
        trial = _one_trial(study, objective)
        n_finished += _settle_slot(claim, turn.slot, trial, trials, objective)
        keep_on_disk(slots.engine)
        trials = study.get_trials(deepcopy=False)
        _within_quota(objective, slots, limits, trials)
        finished(trial, trials)
        if objective.interrupted is not None:
            raise objective.interrupted
        in_a_row = [*in_a_row, trial] if failed_by_itself(trial) else []
        check_failures(trials, limits.n_trials, earlier, in_a_row)


def _within_quota(objective: Objective, slots: Slots, limits: Limits, trials: list[FrozenTrial]) -> None:
    """On this machine's disk: what a bucket holds can go on here or elsewhere."""
    opened = objective.opened
    keep_within(
        opened.checkpoints,
        trials,
        [views for views, _ in opened.settings.rungs],
        quota_bytes=limits.quota_bytes,
        sign=sign_of(opened.study),
        settle=objective.writer.flush,
        keep=slots.going_on,
    )


def _waits_at(turn: Turn | str, limits: Limits) -> bool:
    """Whether trials that others hold are waited for: where they are the last of the total, in case they are lost; and at a budget's end
    by who shall have them all, as long as they may go on.
    """
    if turn == "claimed elsewhere":
        return True
    return turn == "budget" and limits.waits == "all" and limits.clock is not None and not limits.clock.is_over


def _plan_anew(objective: Objective, clock: BudgetClock, best: FrozenTrial | None) -> None:
    """Keep what the best trial's network needs in the end; said where that moves the search's end much, by the worker whose trial it was."""
    before_s = clock.reserve_s
    clock.learn(best)
    moved_s = before_s - clock.reserve_s
    if best is not None and best.number == objective.number and abs(moved_s) >= TOLD_SHARE * clock.total_s:
        objective.watch.note(
            f"planned anew for the network of trial {best.number}: finalize needs {clock.reserve_s:.0f} s instead of {before_s:.0f}, so the search has "
            f"{abs(moved_s):.0f} s {'more' if moved_s > 0 else 'less'}"
        )


def _heed_audit(objective: Objective, study: optuna.Study, trials: list[FrozenTrial]) -> None:
    """Prune at no rung of which the audit says that it misleads; looked at every so many trials."""
    pruner = study.pruner
    # Of 5,000 rows every 1,000: there the look takes a second.
    every = max(AUDIT_EVERY, 10 ** (len(str(len(trials))) - 1))
    n_looks = len(trials) // every  # rows that others made since count, too
    if not isinstance(pruner, SuccessiveHalving) or n_looks in (0, pruner.n_looks):
        return
    pruner.n_looks = n_looks
    settings = objective.opened.settings
    audit = audit_trials(trials, pruner.rungs, maximise=settings.goal.maximize, seed=settings.seed)
    steps = misleading_steps(audit)
    if steps != pruner.misleading:
        pruner.misleading = steps
        bad = [f"rung {number}: {rung.why}" for number, rung in enumerate(audit.rungs, 1) if rung.step in steps]
        objective.watch.note(
            f"nothing ends any more at {'; '.join(bad)}"
            if bad
            else "trials end at every rung again: their orders hold after all"
        )


class SlotOfTrial:
    """The slot of the running trial, noted and closed in the transactions that begin and end the trial's row.

    Two transactions of a trial's nine fewer, and of a new lineage a process that is killed between the row and its slot leaves neither.
    The slot of a lineage that has other rows goes on naming its last one until the new row has the lineage's name (``begun``): no
    slot would hold the paused row in between, and it would be given one of its own.

    Attributes:
        slots: of the study.
        is_closed: whether the end of the row closed the slot.
    """

    def __init__(self, slots: Slots) -> None:
        self.slots, self.is_closed = slots, False
        self._slot: Slot | None = None
        self._noted: dict[int, bool] = {}  # by the row's number: whether the slot was the worker's still
        self._row: int | None = None

    def hold(self, slot: Slot) -> None:
        """The next row is for this slot."""
        self._slot, self._row, self.is_closed = slot, None, False
        self._noted.clear()

    def begins(self, connection: sa.Connection, trial_id: int, number: int) -> None:
        """See :class:`~pcam_automl.search.retrying_storage.Claim`."""
        self._row = trial_id
        if self._slot is not None and self._slot.lineage is None:
            self._noted[number] = self.slots.started(self._slot, number, f"{number}", inside=connection)

    def begun(self, slot: Slot, number: int, lineage: str) -> bool:
        """Whether the slot was the worker's when the row began; noted now where it was not then."""
        if number not in self._noted:
            self._noted[number] = self.slots.started(slot, number, lineage)
        return self._noted[number]

    def ends(self, connection: sa.Connection, trial_id: int, state: TrialState) -> None:
        """See :class:`~pcam_automl.search.retrying_storage.Claim`. A row that failed leaves its slot open, which is decided later."""
        if self._slot is not None and trial_id == self._row and state in FINISHED:
            self.slots.finish(self._slot, inside=connection)
            self.is_closed = True


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
    objective.expect()
    try:
        study.optimize(objective, n_trials=1, catch=(Exception,), callbacks=[lambda _, trial: ended.append(trial)])
    except (UpdateFinishedTrialError, ValueError, AssertionError):  # Optuna's words on a row that was ended by others
        row = None if objective.number is None else study.get_trials(deepcopy=False)[objective.number]
        storage = rdb_of(study)
        if row is not None and isinstance(storage, RetryingStorage):
            storage.drop_notes(row._trial_id)
        if row is None or not row.state.is_finished():
            raise
        objective.watch.note(
            f"trial {row.number} was taken for lost and ended by another worker; what it did since is dropped"
        )
        objective.goes_on = True  # in whoever has it now
        return row
    except UnboundLocalError as fault:  # Optuna 5 stumbles over itself where the database is gone when it wants to tell
        raise _storage_fault_behind(fault) or fault from None
    return ended[0]


def _storage_fault_behind(fault: BaseException) -> BaseException | None:
    """The database's fault that another one was raised over."""
    at: BaseException | None = fault
    while at is not None and not isinstance(at, StorageInternalError | sa.exc.SQLAlchemyError):
        at = at.__context__
    return at


def _flush(objective: Objective) -> None:
    """Wait for the checkpoints. A GPU that failed fails here, too, which is no other fault."""
    with suppress(RuntimeError) if isinstance(objective.interrupted, DeviceFailed) else nullcontext():
        objective.writer.flush()


def _settle_slot(
    claim: SlotOfTrial, slot: Slot, trial: FrozenTrial, earlier: list[FrozenTrial], objective: Objective
) -> int:
    """Close or give back the slot; 1 if the trial counts, as the first finished one of its lineage (``earlier`` were there before it)."""
    slots, folder = claim.slots, objective.opened.checkpoints
    if trial.state not in FINISHED:
        rows = objective.opened.study.get_trials(deepcopy=False)
        try:
            _flush(objective)  # whoever takes the slot goes on from the last rung, and finds it
        finally:
            if not objective.goes_on and counts_in(rows, slot.lineage):
                slots.finish(slot)  # it had been thawed
            else:
                slots.reopen(slot, keep_lineage=objective.goes_on)
        return 0
    if not claim.is_closed:
        slots.finish(slot)
    lineage = trial.user_attrs["lineage"]
    if trial.state == TrialState.COMPLETE or has_diverged(trial):
        try:
            objective.writer.flush()
        finally:
            forget(objective.opened.mirror, folder, lineage)  # it never goes on
    else:
        objective.writer.then(partial(trim, folder, lineage))  # behind its last one, which removes older ones itself
    return 0 if slot.lineage is not None and counts_in(earlier, slot.lineage) else 1


def failed_by_itself(trial: FrozenTrial) -> bool:
    """Whether a row ended by an error, its own or the database's, and not by a signal or the clock."""
    reason = str(trial.user_attrs.get("reason", ERROR))  # one without a reason could not even say it
    return trial.state == TrialState.FAIL and reason.startswith((ERROR, NO_DATABASE))


def slots_that_failed(trials: Sequence[FrozenTrial], since: Sequence[FrozenTrial]) -> set[int | None]:
    """Numbers of slots whose prescribed recipe is not tried again: it failed by itself since this worker began, or ``MOST_FAILED_ENTRIES``
    times in all, or its worker died. A slot whose worker died goes on with its lineage, and only once that is given up with another recipe.
    """
    failed = {row.user_attrs.get("slot") for row in since if failed_by_itself(row)}
    failed |= {row.user_attrs.get("slot") for row in trials if str(row.user_attrs.get("reason", "")).startswith(LOST)}
    with_entry = [row for row in trials if "origin" in row.user_attrs and failed_by_itself(row)]
    often = collections.Counter(row.user_attrs.get("slot") for row in with_entry)
    return failed | {slot for slot, n in often.items() if n >= MOST_FAILED_ENTRIES}


def check_failures(
    trials: list[FrozenTrial], n_trials: int, earlier: list[FrozenTrial], in_a_row: list[FrozenTrial]
) -> None:
    """Raise SearchFailed once max(10, n_trials) trials ended in an error since the search began (``earlier`` were there by then); of a
    search by budget, 10 and as many as finished since. So do 10 failures in a row of this worker, whatever the others do: its machine
    is at fault.
    """
    errors = errors_of(trials)[len(errors_of(earlier)) :]
    allowed = n_trials if n_trials < NEVER_ENDS else n_finished_in(trials) - n_finished_in(earlier)
    if len(in_a_row) >= LEAST_FAILURES_ALLOWED:
        errors = [str(trial.user_attrs.get("reason", "no reason is known")) for trial in in_a_row]
    elif len(errors) < max(LEAST_FAILURES_ALLOWED, allowed):
        return
    ((commonest, n),) = collections.Counter(errors).most_common(1)
    raise SearchFailed(f"{len(errors)} trials failed, so the search stops; {n} times: {commonest.removeprefix(ERROR)}")
