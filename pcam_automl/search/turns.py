"""What a worker may do, and which trial it runs next: a new one, an interrupted or a paused one, or none. Runs nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import optuna
from optuna.trial import FrozenTrial, TrialState

from pcam_automl.defaults import MAX_RETRIES
from pcam_automl.search.budget import BRACKET, N_BRACKETS, BudgetClock, typical_trial_s
from pcam_automl.search.lineages import FINISHED, Lineage, has_diverged, lineages_of, sign_of
from pcam_automl.search.paused_folders import DEFAULT_QUOTA_BYTES, is_held
from pcam_automl.search.promotion import (
    Paused,
    by_promise,
    interrupted_of,
    paused_of,
    promotable,
    rung_ratio,
    seconds_to_next_rung,
)
from pcam_automl.search.reading import n_finished_in
from pcam_automl.search.slots import Slot, Slots, owner_alive
from pcam_automl.search.study import OpenStudy
from pcam_automl.training.fit import branch_share

NEVER_ENDS = 1_000_000
"""Total of a search that only its budget limits."""

LEAST_OF_SHORT = 0.4
"""Of a whole trial's seconds, with which a short search begins its next one: ``SLOWEST_SHARE`` of its views at 96 px take 0.45 of all at 64."""

Waits = Literal["none", "far", "all"]


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
        waits: before it ends, for trials that others hold: ``far`` those of other hosts, which may vanish; ``all``; ``none``.
        yields: asked before each trial; True ends the worker, which has something better to do.
    """

    n_trials: int
    timeout_s: float | None = None
    clock: BudgetClock | None = None
    quota_bytes: int = DEFAULT_QUOTA_BYTES
    thaws: bool = True
    max_retries: int = MAX_RETRIES
    waits: Waits = "far"
    yields: Callable[[], bool] | None = None


@dataclass(frozen=True)
class Turn:
    """A claimed slot; ``thawed_from`` is the number of the paused row that goes on in it, None for any other."""

    slot: Slot
    thawed_from: int | None = None


def next_turn(opened: OpenStudy, slots: Slots, trials: list[FrozenTrial], limits: Limits, owner: str) -> Turn | str:
    """What the worker does next, or why it ends.

    Without a budget: the next slot of the total. With one: a paused lineage that is by now among the best third of its rung;
    else, while a whole trial would still fit (of a short search 0.4 of one), an interrupted or a new one; else the most promising
    interrupted lineage whose next rung fits; else the most promising paused one.
    """
    clock = limits.clock
    if clock is None:
        slot = slots.claim(limits.n_trials, owner)
        return Turn(slot) if slot is not None else _end(opened.study, limits)
    lineages, sign = lineages_of(trials), sign_of(opened.study)
    steps = [views for views, _ in opened.settings.rungs]
    elsewhere = frozenset() if opened.mirror is None else opened.mirror.lineages()
    decay, left_s = branch_share(opened.start), clock.left_s()

    def fits_in_time(one: Paused) -> bool:
        name = one.lineage.name
        held = name in elsewhere or is_held(opened.checkpoints, name)
        return held and seconds_to_next_rung(one, steps, decay) <= left_s

    fitting = [one for one in paused_of(lineages, steps) if limits.thaws and fits_in_time(one)]
    for one in promotable(fitting, lineages, steps, sign=sign):
        if (turn := _thawed(slots, one.lineage, owner)) is not None:
            return turn
    wanted = not clock.is_over_for_first and not any(map(may_win, trials))  # a search needs a winner
    if left_s <= 0 and any(row.state == TrialState.RUNNING for row in trials):  # past its end one trial is enough
        wanted = False
    needed_s, n_trials = whole_trial_s(opened, lineages), limits.n_trials
    if clock.short is not None:
        needed_s *= LEAST_OF_SHORT  # each of its trials is wanted, with as many views as there is time for
        if not any(row.state == TrialState.COMPLETE for row in trials):
            n_trials = max(n_trials, n_finished_in(trials) + 1)  # those that diverged are no winners
    fits = wanted or left_s >= needed_s
    if fits:
        slot = slots.claim(n_trials, owner)
        if slot is not None:
            return Turn(slot)
    else:
        for one in by_promise(interrupted_of(lineages, slots.interrupted(n_trials), steps), sign=sign):
            if fits_in_time(one) and (slot := slots.go_on(one.lineage.name, owner)) is not None:
                return Turn(slot)
    for one in by_promise(fitting, sign=sign):
        if (turn := _thawed(slots, one.lineage, owner)) is not None:
            return turn
    # Where time is left it is the total that ended it: all are finished, or the rest is claimed by others, who may be lost.
    end = _end(opened.study, limits) if fits else "budget"
    whole_short = end == "done" and clock.short is not None and limits.n_trials >= clock.short.n_trials
    return "budget" if whole_short else end  # more of the budget is not for searching


def may_win(row: FrozenTrial) -> bool:
    """Whether `finalize` could take the row: it ended with a value, and not by diverging."""
    return row.state in FINISHED and not has_diverged(row)


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
    return typical_trial_s(first, ratios, float(planned.get("whole_s", planned["trial_s"])) if planned else math.inf)


def held_elsewhere(slots: Slots, limits: Limits, owner: str) -> int:
    """Claims of others that a worker waits for before it ends."""
    if limits.waits == "none":
        return 0
    others = [slot.owner for slot in slots.claimed() if slot.owner not in (None, owner)]
    return sum(limits.waits == "all" or owner_alive(str(other)) is None for other in others)


def _thawed(slots: Slots, lineage: Lineage, owner: str) -> Turn | None:
    slot = slots.thaw(lineage.name, owner)
    paused = lineage.finished or lineage.last  # after a thaw that an error ended, the row before it
    return None if slot is None else Turn(slot, paused.number)


def _end(study: optuna.Study, limits: Limits) -> str:
    return "done" if n_finished_in(study.get_trials(deepcopy=False)) >= limits.n_trials else "claimed elsewhere"


def prescribed(opened: OpenStudy, slot: Slot) -> dict[str, object]:
    """Parameters of the slot's lineage, which its next row must take; empty where it has none yet.

    Of all its rows, the first one that has a name: a row that was killed while it asked has some of them only.
    """
    found: dict[str, object] = {}
    if slot.lineage is not None:
        for row in opened.study.get_trials(deepcopy=False):
            if row.user_attrs.get("lineage") == slot.lineage:
                found = {**row.params, **found}
    return found
