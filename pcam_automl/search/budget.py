"""A study's budget of wall clock: what is planned of it and what is left. Runs nothing.

The budget is for search, confirmation, final training and prediction together; what commands have spent of it they note (ledger.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from pcam_automl.errors import OutOfTime
from pcam_automl.search.ledger import Parts, spent_with
from pcam_automl.search.reading import n_finished_of

TOTAL_KEY = "pcam_automl:budget_s"
CONFIRM_SHARE, FINAL_SHARE = 0.10, 0.60
"""Of what the prediction leaves of the budget, at most; the search has the rest. In four hours on a GPU 60 epochs are a twentieth, and the search has nearly all."""
MOST_PREDICT_SHARE = 0.4
"""Where a patch's eight views would take more of the budget, each is shown once: eight took 42 % off the error (docs/proof.md), about what
seven tenths more training do."""
KEPT_BACK_SHARE = 0.1
"""Of the patches, that the final training leaves out to be judged by, where the study has a budget and no holdout."""
MOST_FINAL_EPOCHS = 60.0
"""The final training is given no more; what that leaves of its share goes to the search."""
FEW = 18
"""Lineages, two brackets. A search that would start fewer can choose hardly anything by its rungs: it is cut down to ``N_SHORT`` whole
trials, of which the better is taken unconfirmed."""
N_SHORT = 2
N_RUNGS = 3
"""Of a trial of a search that prunes, unless others are asked for."""
ETA = 3
"""One in so many goes on from a rung to the next, which takes so many times the views."""
SHORT_TRIAL_SHARE, SHORT_SHARE = 0.08, 0.35
"""Of what the prediction leaves of the budget, the training of one, and all at most: the smaller input of two wins the shorter trainings, the larger one the longer."""
CAP, SHORT_CAP = 2.0, 1.4
"""A trial's seconds at most, by those planned; the few whole trials of a short search are to be compared at nearly equal ones."""
BRACKET = 9
"""With three rungs and eta = 3, of nine lineages three reach the second rung and one the last."""
N_BRACKETS = 3
BESIDE_STEPS = 1.5
"""Times its training steps' seconds a whole trial takes, with decay branches, scores and what lies between."""
BRANCHES = 1.03
"""Times the views of a bracket's rungs: the decay branches that are trained again."""
ROW_S = 2.0
"""Of a row, beside its views: network, probe, database, checkpoint; on two cores of 2026."""
HARD_SHARE = 0.05
"""A rung that was estimated too short may run over the search's end by so much of the budget."""
FIRST_SHARE = 0.7
"""Of what the prediction leaves of the budget: until then the first trial may begin and run while none is complete, however little start-up
has left of the search's part, since without a complete trial there is nothing to finalize."""
FIRST_TRIALS = 3.0
"""The first trial takes at most so many times what was planned, ``SHORT_CAP`` and a speed that was timed in a quiet moment together."""
LEAST_TRIAL_S, MOST_TRIAL_S = 4.0, 600.0


@dataclass(frozen=True)
class BudgetPlan:
    """Seconds of each part as planned before the first trial.

    Attributes:
        total_s: the budget.
        search_s: start-up, packing and trials.
        confirm_s: the top trials again on other folds.
        final_s: final training and prediction.
        trial_s: training steps of a whole trial (all rungs) of the typical network; its views follow from them.
        n_started: lineages that the search's seconds are expected to start.
        free_s: of the search, without start-up.
        whole_s: a whole trial of the network that the search starts with, scoring, decay branches and all.
        short: too little time to search in; see ``FEW``. Nothing is pruned then.
        used_s: what start-up had taken when it was planned.
        predict_s: of ``final_s``, what the prediction is expected to take; the shares are those of the rest.
        n_workers: that search side by side, each with trials of its own.
        n_trials: that were asked for, no more of which start; None where the time alone ends the search.
        n_full: rungs of a trial of a search that prunes.
    """

    total_s: float
    search_s: float
    confirm_s: float
    final_s: float
    trial_s: float
    n_started: int
    free_s: float
    whole_s: float
    short: bool = False
    used_s: float = 0.0
    predict_s: float = 0.0
    n_workers: int = 1
    n_trials: int | None = None
    n_full: int = N_RUNGS

    @property
    def n_rungs(self) -> int:
        """Of each trial: one where none is pruned, since scores and decays on the way would decide nothing. Where a slow start-up has
        left the first trial so little that it may be cut off, it leaves values on the way.
        """
        first_s = first_until_s(self.total_s, self.predict_s)
        return 1 if self.short and self.used_s + FIRST_TRIALS * self.trial_s < first_s else self.n_full

    @property
    def cap_s(self) -> float:
        """Seconds that no trial's expected ones exceed; slower networks see fewer views."""
        return (SHORT_CAP if self.short else CAP) * self.trial_s

    def with_trial(self, whole_s: float, *, mean_s: float | None = None, n_short: int = N_SHORT) -> BudgetPlan:
        """The same for trials that take so long, which is known once their rungs are set.

        Args:
            whole_s: of the network that the search starts with.
            mean_s: of the others, many of which show larger inputs; None is ``whole_s``.
            n_short: trials of a short search, at least one; what they do not need goes to the final training.
        """
        if not self.short:
            n_started = self.n_workers * _n_lineages(self.free_s, whole_s, mean_s, self.n_full)
            return replace(self, whole_s=whole_s, n_started=min(n_started, self.n_trials or n_started))
        n_asked = min(n_short, self.n_trials or n_short)  # more may be asked for later
        rest_s = self.total_s - self.predict_s
        free_s = min(SHORT_SHARE * rest_s, whole_s + (n_asked - 1) * self.cap_s + n_asked * ROW_S)
        search_s = _latest_short_s(rest_s, self.used_s, free_s)
        final_s = self.total_s - search_s
        return replace(self, whole_s=whole_s, search_s=search_s, final_s=final_s, free_s=free_s, n_started=n_short)


def plan_budget(
    total_s: float,
    *,
    used_s: float,
    images_per_s: float | None = None,
    n_final: int = 0,
    may_be_short: bool = False,
    predict_s: float = 0.0,
    n_workers: int = 1,
    n_trials: int | None = None,
    n_rungs: int = N_RUNGS,
) -> BudgetPlan:
    """Split a budget: the prediction is taken off it, then what the final training can use, up to its share.

    A whole trial is set so long that ``N_BRACKETS`` brackets, some 27 lineages, would fit if rows cost nothing: more of them would each
    be too short to rank, fewer would be no search. Where fewer are asked for, each is longer.

    Args:
        total_s: the budget in seconds, positive.
        used_s: what start-up and packing have taken of the search's part already.
        images_per_s: training speed of the network that the search starts with; None where it is unknown.
        n_final: patches of the final training.
        may_be_short: whether a search of few lineages is cut down, ``FEW``; not where somebody named what is searched, or how.
        predict_s: what predicting the test patches, and judging those kept back, takes.
        n_workers: that search side by side.
        n_trials: that are asked for; None where the time alone ends the search.
        n_rungs: of a trial of a search that prunes.
    """
    rest_s = total_s - predict_s
    confirm_s, train_s = CONFIRM_SHARE * rest_s, final_seconds(rest_s, images_per_s, n_final)
    search_s, final_s = rest_s - confirm_s - train_s, train_s + predict_s
    free_s = max(search_s - used_s, 0.2 * search_s)
    trial_s = min(max(free_s / _whole_trials(n_rungs, None), LEAST_TRIAL_S), MOST_TRIAL_S)
    n_started = n_workers * _n_lineages(free_s, trial_s, n_rungs=n_rungs)
    has_all_it_can_use = train_s < FINAL_SHARE * rest_s
    if may_be_short and n_started < FEW and not has_all_it_can_use:
        trial_s = max(SHORT_TRIAL_SHARE * rest_s, LEAST_TRIAL_S)
        plan = BudgetPlan(
            total_s, 0.0, 0.0, total_s, trial_s, N_SHORT, 0.0, trial_s, True, used_s, predict_s, n_workers, n_trials
        )
        return plan.with_trial(trial_s)
    each = None if n_trials is None else math.ceil(n_trials / n_workers)
    trial_s = min(max(free_s / _whole_trials(n_rungs, each), LEAST_TRIAL_S), MOST_TRIAL_S)
    parts = (total_s, search_s, confirm_s, final_s, trial_s, n_started, free_s, trial_s)
    return BudgetPlan(*parts, False, used_s, predict_s, n_workers, n_trials, n_rungs).with_trial(trial_s)


def n_test_views(total_s: float, seconds_a_view: float, views: int) -> int:
    """Views of each patch that the final network is shown: ``views``, or one where those take too much of the budget.

    Args:
        total_s: the budget.
        seconds_a_view: what predicting the test patches, and judging those kept back, takes in one view each.
        views: as the recipe says.
    """
    return views if views * seconds_a_view <= MOST_PREDICT_SHARE * total_s else 1


def too_many_to_predict(total_s: float, predict_s: float, n_patches: int) -> str | None:
    """Why a budget is too small for its test set; None where it is not."""
    if predict_s <= FINAL_SHARE * total_s:
        return None
    return (
        f"--budget {total_s:g}s: predicting {n_patches:,} patches in one view each takes about {predict_s:.0f} s here, which leaves too little "
        f"to search and train in; give --budget {math.ceil(predict_s / FINAL_SHARE / 30)}m or more, or --trials N instead "
        "(--timeout ends that, too) and finalize --no-submission"
    )


@dataclass(frozen=True)
class ShortSearch:
    """What a short search may do: so many trials, in at most so many seconds, start-up included.

    The seconds are the most that the plan could have given it, not those that it expects: where the first trial is slower than its
    network was timed, the second still has its turn, and what the trials leave goes to the final training anyway.
    """

    n_trials: int
    seconds: float


def short_search(planned: Mapping[str, Any] | None, total_s: float | None) -> ShortSearch | None:
    """The short search that a budget was planned as; None of any other.

    Args:
        planned: the study's :class:`BudgetPlan` as its settings keep it; None where it was made without a budget.
        total_s: the budget, which may have been raised since; None where there is none.
    """
    if planned is None or total_s is None or not planned.get("short") or planned["total_s"] != total_s:
        return None
    search_s = float(planned["search_s"])
    if "used_s" not in planned:  # of an early study
        return ShortSearch(int(planned["n_started"]), search_s)
    rest_s = total_s - float(planned.get("predict_s", 0.0))
    latest_s = min(_latest_short_s(rest_s, float(planned["used_s"])), first_until_s(total_s, total_s - rest_s))
    return ShortSearch(int(planned["n_started"]), max(search_s, latest_s))


def was_short(study: optuna.Study, planned: Mapping[str, Any] | None) -> bool:
    """Whether the budget left the search no more than a few whole trials, and nobody has added others.

    Args:
        study: for its budget and trials.
        planned: see :func:`short_search`.
    """
    short = short_search(planned, budget_of(study))
    return short is not None and n_finished_of(study) <= short.n_trials


def first_until_s(total_s: float, predict_s: float) -> float:
    """Until when the study's first trial may begin, and run while none is complete."""
    return FIRST_SHARE * (total_s - predict_s)


def too_late(total_s: float, used_s: float, predict_s: float = 0.0) -> str | None:
    """Why no first trial may begin after so many seconds of a budget; None where it may."""
    if used_s <= first_until_s(total_s, predict_s):
        return None
    return (
        f"{used_s:.0f} s of the budget of {total_s:g} s are spent before the first trial, which leaves it no time; "
        f"give --budget {max(2, math.ceil(used_s / 15))}m or more, or repeat the command if they went into packing, which is done once"
    )


def _latest_short_s(total_s: float, used_s: float, free_s: float = math.inf) -> float:
    """Until when a short search lasts whose trials have ``free_s`` at most, behind the start-up."""
    return min(used_s, (1.0 - SHORT_SHARE) * total_s) + min(SHORT_SHARE * total_s, free_s)


def _whole_trials(n_rungs: int, n_trials: int | None) -> float:
    """Training seconds of so many whole trials are a worker's part of the search: what ``N_BRACKETS`` brackets and trial 0 take. Where
    few trials are asked for less: the first two run through, and the last begins only while a whole one would fit.
    """
    cost = bracket_cost(n_rungs)[0]
    most = max(N_BRACKETS * cost, N_BRACKETS * bracket_cost(N_RUNGS)[0]) + 1.0
    if n_trials is None:
        return most
    return min(most, BESIDE_STEPS * (min(n_trials, 3) + max(0, n_trials - 3) * cost / BRACKET))


def bracket_cost(n_rungs: int) -> tuple[float, float]:
    """What ``BRACKET`` lineages cost: views of so many whole trials, decay branches included, and so many rows, thawed ones among them;
    of three rungs 2.4, and 13 (nine first ones, three thawed, one thawed again).
    """
    reach = [BRACKET / ETA**rung for rung in range(n_rungs)]
    ends = [0.0, *(ETA ** (rung + 1 - n_rungs) for rung in range(n_rungs))]
    views = sum(n * (end - begin) for n, begin, end in zip(reach, ends, ends[1:], strict=False))
    return (BRANCHES if n_rungs > 1 else 1.0) * views, sum(reach)


def _n_lineages(free_s: float, whole_s: float, mean_s: float | None = None, n_rungs: int = N_RUNGS) -> int:
    """Lineages that start in so many seconds, trial 0 (``whole_s``) running through beside the brackets."""
    trials, rows = bracket_cost(n_rungs)
    bracket_s = trials * (mean_s or whole_s) + rows * ROW_S
    return max(1, round(BRACKET * (free_s - whole_s) / bracket_s))


def final_seconds(total_s: float, images_per_s: float | None, n_final: int) -> float:
    """Seconds that are kept for the final training: its share, or fewer where 60 epochs are over sooner.

    Args:
        total_s: the budget, without the prediction.
        images_per_s: training speed of the best trial's network; None before there is one.
        n_final: patches of the final training.
    """
    share_s = FINAL_SHARE * total_s
    return share_s if not images_per_s else min(share_s, 1.2 * MOST_FINAL_EPOCHS * n_final / images_per_s)


def budget_of(study: optuna.Study) -> float | None:
    """The study's budget in seconds; None where it has none."""
    held = study.user_attrs.get(TOTAL_KEY)
    return None if held is None else float(held)


def set_budget(study: optuna.Study, total_s: float) -> None:
    """Give the study a budget, or a larger one."""
    study.set_user_attr(TOTAL_KEY, float(total_s))


# --- the search's part -----------------------------------------------------------------------------------------------


@dataclass
class BudgetClock:
    """Until when a search may go on; every worker has a copy. The monotonic clock is one for all processes of a machine.

    Attributes:
        total_s: the budget.
        spent_s: what earlier commands spent.
        began: of this command, by ``time.monotonic``.
        n_final: patches of the final training.
        images_per_s: training speed of the network that the search starts with; None where it is unknown.
        short: of a short search, what it may do; None of any other.
        predict_s: what the prediction was planned to take.
        reserve_s: kept for confirmation and final training; see :meth:`learn`.
    """

    total_s: float
    spent_s: float
    began: float
    n_final: int
    images_per_s: float | None = None
    short: ShortSearch | None = None
    predict_s: float = 0.0
    reserve_s: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.learn(None)

    @property
    def parts(self) -> Parts:
        """What each part is to have, as far as :meth:`learn` knows; of a short search at most, and of its final training at least."""
        confirm_s = 0.0 if self.short is not None else CONFIRM_SHARE * (self.total_s - self.predict_s)
        return Parts(self.total_s - self.reserve_s, confirm_s, self.reserve_s - confirm_s)

    def left_for_rungs_s(self) -> float:
        """Until when a rung may end that begins now; a short search's few trials shall end, though an estimate was too short."""
        return self.left_s() + (0.0 if self.short is None else HARD_SHARE * self.total_s)

    def left_s(self) -> float:
        """Seconds that the search has left; negative when its part is over."""
        return self.total_s - self.spent_s - (time.monotonic() - self.began) - self.reserve_s

    def used_share(self) -> float:
        """Of the search's part, about 0 at its beginning and 1 at its end."""
        return 1.0 - self.left_s() / max(1e-9, self.total_s - self.reserve_s)

    def heed(self, study: optuna.Study) -> None:
        """What other commands have noted of the budget by now: one that trains beside this one notes its seconds at each rung."""
        age_s = time.monotonic() - self.began
        self.spent_s = max(self.spent_s, spent_with(study, age_s) - age_s)

    def learn(self, best: FrozenTrial | None) -> None:
        """Keep for the final training what the best trial's network needs, and no more than its share."""
        if self.short is not None:
            self.reserve_s = self.total_s - self.short.seconds
            return
        rate = self.images_per_s if best is None else best.user_attrs.get("images_per_s")
        rest_s = self.total_s - self.predict_s
        self.reserve_s = self.predict_s + CONFIRM_SHARE * rest_s + final_seconds(rest_s, rate, self.n_final)

    @property
    def is_over(self) -> bool:
        """Whether not even what runs may go on."""
        return self.left_s() < -HARD_SHARE * self.total_s

    @property
    def is_over_for_first(self) -> bool:
        """The same for the study's first trial, without which there would be nothing to finalize: that is later."""
        return self.total_s - self.left_s() - self.reserve_s > first_until_s(self.total_s, self.predict_s)

    def check(self, *, first: bool = False) -> None:
        """At every step of a trial; ``first``: of the study's first one.

        Raises:
            OutOfTime: a rung runs far beyond the search's end.
        """
        if self.is_over_for_first if first else self.is_over:
            raise OutOfTime("the search's part of the budget is used up")


def typical_trial_s(first_rungs: Sequence[float], ratios: Sequence[float], planned_s: float) -> float:
    """Seconds of a whole trial as far as is known: the median first rung, times what the later rungs take of it.

    Args:
        first_rungs: measured seconds of the lineages' first rungs.
        ratios: views of each later rung by those of the rung before it.
        planned_s: what was planned, where nothing is measured yet.
    """
    if not first_rungs:
        return planned_s
    middle = sorted(first_rungs)[len(first_rungs) // 2]
    whole = part = middle
    for ratio in ratios:
        part *= ratio
        whole += part
    return whole
