"""A budget as it was planned beside what happened, for people and as JSON. Imports no torch at its start."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pcam_automl import terminal

if TYPE_CHECKING:  # these import torch and timm, which a search can do without until it trains
    from pcam_automl.search.budget import BudgetClock
    from pcam_automl.search.ledger import Parts
    from pcam_automl.search.study import OpenStudy


def clock_of(opened: OpenStudy, total_s: float, spent_s: float, began: float) -> BudgetClock:
    """As it is before the first trial."""
    from pcam_automl.search.budget import BudgetClock, short_search
    from pcam_automl.search.plan import first_backbone

    plan = opened.settings.plan
    rate = plan["images_per_s"].get(first_backbone(opened.start, opened.space.choices("backbone")))
    short = short_search(plan.get("budget"), total_s)
    predict_s = (plan.get("budget") or {}).get("predict_s", 0.0)  # by releases that plan it
    return BudgetClock(total_s, spent_s, began, len(opened.split.order), rate, short, predict_s)


def say_budget(clock: BudgetClock, planned: dict[str, Any] | None, n_rungs: int, n_trials: int | None) -> None:
    """How the budget is split, and what the search's part should do; of a study that was planned by it."""
    from pcam_automl.search.plan import planned_reach

    say, total, parts = terminal.duration, clock.total_s, clock.parts
    confirmed = f"confirmation {say(parts.confirm_s)}, " if parts.confirm_s else ""
    spent_s = clock.spent_s + time.monotonic() - clock.began
    most, least = ("at most ", "at least ") if clock.short is not None else ("", "")
    terminal.say(
        f"  budget {say(total)}, {say(spent_s)} of it spent: search {most}{say(parts.search_s)} (start-up included), "
        f"{confirmed}final training and prediction {least}{say(parts.final_s)}; search has {most}{say(max(0.0, clock.left_s()))} left"
    )
    if clock.short is not None:
        n = clock.short.n_trials
        if n_trials is not None and n_trials > n:
            terminal.say(
                f"  --trials {n_trials} are more than this budget has time for; another --study with a larger one, or with --sampler tpe, searches"
            )
        n = min(n, n_trials or n)
        terminal.say(
            f"  too little time to search in: {n} whole {'trial' if n == 1 else 'trials'}, and the rest for training {'it' if n == 1 else 'the better one'} longer"
            + (
                "; scored on the way, too, since start-up has left so little that the first may be cut off"
                if n_rungs > 1
                else ""
            )
        )
    if planned is not None and planned["total_s"] == total:
        starts = planned_reach(planned, n_rungs)
        reach = f"about {arrows(starts)} trials reach rungs 1 to {n_rungs}, " if n_rungs > 1 else ""
        terminal.say(f"  planned: {reach}a whole trial takes about {say(planned.get('whole_s', planned['trial_s']))}")


@dataclass(frozen=True)
class _Account:
    """A budget and its search, as planned or as they went.

    Attributes:
        parts: seconds.
        reached: trials at each rung; empty where nothing was planned for this budget.
        whole_s: seconds of a whole trial, of several the median; None where there is none.
    """

    parts: Parts
    reached: tuple[int, ...]
    whole_s: float | None

    def to_json(self) -> dict[str, Any]:
        whole_s = None if self.whole_s is None else round(self.whole_s, 3)
        parts = {name: round(seconds, 3) for name, seconds in asdict(self.parts).items()}
        return {**parts, "reached": list(self.reached), "whole_s": whole_s}


def _planned(opened: OpenStudy, total_s: float) -> _Account:
    """What was said before the first trial; of a budget that was raised since only the seconds."""
    from pcam_automl.search.plan import planned_reach

    parts, planned = clock_of(opened, total_s, 0.0, time.monotonic()).parts, opened.settings.plan.get("budget")
    if planned is None or planned["total_s"] != total_s:
        return _Account(parts, (), None)
    reach = planned_reach(planned, len(opened.settings.rungs))
    return _Account(parts, tuple(reach), planned.get("whole_s", planned["trial_s"]))


def so_far(opened: OpenStudy) -> _Account:
    """What has happened so far."""
    from pcam_automl.search.ledger import intervals_of, spent_parts
    from pcam_automl.search.lineages import lineages_of, seconds_of_lineages

    trials, steps = opened.study.get_trials(deepcopy=False), [views for views, _ in opened.settings.rungs]
    lineages, seconds = lineages_of(trials), seconds_of_lineages(trials)
    reached = tuple(sum(step in lineage.values for lineage in lineages) for step in steps)
    whole = [seconds[lineage.name] for lineage in lineages if steps[-1] in lineage.values]
    return _Account(spent_parts(intervals_of(opened.study)), reached, statistics.median(whole) if whole else None)


def account_json(opened: OpenStudy) -> dict[str, Any] | None:
    """Both; None of a study without a budget."""
    from pcam_automl.search.budget import budget_of

    total_s = budget_of(opened.study)
    if total_s is None:
        return None
    return {"total_s": total_s, "planned": _planned(opened, total_s).to_json(), "was": so_far(opened).to_json()}


def say_account(opened: OpenStudy, *, finalized: bool) -> None:
    """What was planned of the study's budget beside what happened.

    Args:
        opened: a study with a budget.
        finalized: whether all of it is spent; else its search's part alone is told.
    """
    from pcam_automl.search.budget import budget_of

    total_s = budget_of(opened.study) or 0.0
    planned, was, say = _planned(opened, total_s), so_far(opened), terminal.duration
    # A short search, whose trials are whole, has at most its part; what it leaves is the final training's.
    most, least = ("", "") if planned.parts.confirm_s else ("at most ", "at least ")
    rows = [("search", most + say(planned.parts.search_s), say(was.parts.search_s), "")]
    if finalized:
        if planned.parts.confirm_s or was.parts.confirm_s:
            rows.append(("confirmations", say(planned.parts.confirm_s), say(was.parts.confirm_s), ""))
        rows.append(("final training, prediction", least + say(planned.parts.final_s), say(was.parts.final_s), ""))
        spent_s = was.parts.search_s + was.parts.confirm_s + was.parts.final_s
        rows.append(("in all", say(total_s), say(spent_s), f"{spent_s / total_s - 1.0:+.1%}"))
    if planned.reached:
        at = "whole trials" if len(was.reached) == 1 else f"trials at rungs 1 to {len(was.reached)}"
        rows.append((at, arrows(planned.reached), arrows(was.reached), ""))
    if planned.whole_s is not None:
        rows.append(("a whole trial", say(planned.whole_s), "-" if was.whole_s is None else say(was.whole_s), ""))
    _say_beside(rows)


def _say_beside(rows: Sequence[tuple[str, str, str, str]]) -> None:
    """(what, planned, was, remark), in columns."""
    rows = [("", "planned", "was", ""), *rows]
    name, planned, was = (max(len(row[column]) for row in rows) for column in range(3))
    for row in rows:
        terminal.say(f"  {row[0]:<{name}}  {row[1]:>{planned}}  {row[2]:>{was}}  {row[3]}".rstrip())


def arrows(reached: Sequence[int]) -> str:
    """``9 -> 3 -> 1``."""
    return " -> ".join(map(str, reached))
