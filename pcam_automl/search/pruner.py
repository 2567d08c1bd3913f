"""Pruners: who stops at a rung. Pure functions of the reported values; trains nothing and stores nothing."""

from __future__ import annotations

import binascii
import bisect
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, get_args

from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.study import Study
from optuna.trial import FrozenTrial

from pcam_automl.errors import RecipeError, did_you_mean
from pcam_automl.search.lineages import LINEAGE, lineage_of, sign_of
from pcam_automl.search.wilcoxon import WilcoxonOverSlides

PrunerName = Literal["asha", "hyperband", "median", "wilcoxon", "none"]


class SuccessiveHalving(BasePruner):
    """Asynchronous successive halving with one bracket (ASHA, Li et al. 2020, arXiv:1810.05934).

    Promotion of what stopped here earlier is in promotion.py; it takes the time of a budget.

    At the step it reported last, a trial goes on if its value is among the best ``max(1, floor(n / eta))`` of the
    ``n`` values reported there, one a lineage. Trials that run, were pruned, failed or finished all count; NaN is
    worst and never goes on. Nothing is pruned at the last rung, nor while fewer than ``eta`` values are there.
    Optuna's own SuccessiveHalvingPruner also prunes at the last rung and keeps notes in system attributes, which
    retried trials copy.

    Args:
        rungs: the steps at which trials report, ascending, at least one.
        eta: one in ``eta`` goes on, at least 2.
        pauses: a pruned trial may be promoted later. Then a trial that has fewer than ``eta`` values beside it waits:
            without promotion it would be lost, so that it goes on.
        n_first: the study's first slots, whose trials go on all the same.
    """

    def __init__(self, rungs: Sequence[int], eta: int = 3, *, pauses: bool = False, n_first: int = 1) -> None:
        self.rungs = _checked_rungs(rungs)
        if eta < 2:
            raise ValueError(f"eta must be at least 2, got {eta}")
        self.eta, self.pauses, self.n_first = eta, pauses, n_first
        self.misleading: frozenset[int] = frozenset()  # steps at which nothing ends, by the audit
        self.n_looks = 0  # of the audit's
        self.spared: Callable[[str, Iterable[str]], bool] = lambda lineage, earlier: False

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether the trial ends here; see the class."""
        step = trial.last_step
        if step is None or step >= self.rungs[-1] or step in self.misleading:
            return False
        sign = sign_of(study)
        own, trials = _score(trial.intermediate_values[step], sign), study.get_trials(deepcopy=False)
        mine = lineage_of(trial)
        began = min((t.number for t in trials if lineage_of(t) == mine), default=trial.number)
        if own > -math.inf and self.spared(mine, (lineage_of(t) for t in trials if t.number < began)):
            return False
        others = values_at(step, trials, trial)
        scores = sorted([own, *(_score(value, sign) for value in others)], reverse=True)
        if len(scores) < self.eta:
            return self.pauses and trial.user_attrs.get("slot") not in range(self.n_first)
        n_kept = max(1, len(scores) // self.eta)
        return own == -math.inf or own < scores[n_kept - 1]


def values_at(step: int, trials: Sequence[FrozenTrial], own: FrozenTrial) -> list[float]:
    """The values that other lineages than ``own``'s reported at ``step``; of each lineage its latest trial's."""
    latest: dict[str, tuple[int, float]] = {}
    mine = lineage_of(own)
    for trial in trials:
        value = trial.intermediate_values.get(step)
        if value is None or (lineage := lineage_of(trial)) == mine:
            continue
        if lineage not in latest or latest[lineage] < (trial.number, value):
            latest[lineage] = trial.number, value
    return [value for _, value in latest.values()]


def _score(value: float, sign: float) -> float:
    return -math.inf if math.isnan(value) else sign * value


class _HyperbandOfLineages(HyperbandPruner):
    """Optuna's Hyperband in which a lineage counts once at a rung, stays in its first row's bracket and may be complete.

    Optuna counts rows: a paused one and its thaw both, the thaw's later value among those of the bracket's first rung, and in
    the bracket of its own number. Here values are read where they were reported, and of each lineage its latest trial's, as
    asha does; no notes are kept in system attributes. Where every lineage has one row, both decide alike.
    """

    def __init__(self, rungs: tuple[int, ...]) -> None:
        super().__init__(min_resource=rungs[0], max_resource=rungs[-1], reduction_factor=3)
        self.rungs = rungs

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether the trial ends here: it is not among the best third of its bracket's values at the step, at least one."""
        bracket, step = self._get_bracket_id(study, trial), trial.last_step
        if step is None or step >= self.rungs[-1] or not self._judges(bracket, step):
            return False
        sign = sign_of(study)
        own = _score(trial.intermediate_values[step], sign)
        beside = [t for t in study.get_trials(deepcopy=False) if self._get_bracket_id(study, t) == bracket]
        others = [_score(value, sign) for value in values_at(step, beside, trial) if not math.isnan(value)]
        scores = sorted([own, *others], reverse=True)
        return own == -math.inf or own < scores[max(1, len(scores) // self._reduction_factor) - 1]

    def _judges(self, bracket: int, step: int) -> bool:
        """Whether the bracket's trials can end at ``step``: the first report behind one of its powers of the reduction factor."""
        before = max((rung for rung in self.rungs if rung < step), default=0)
        powers = range(bracket, len(self._trial_allocation_budgets))
        return any(before < self.rungs[0] * self._reduction_factor**power <= step for power in powers)

    def _get_bracket_id(self, study: Study, trial: FrozenTrial) -> int:  # what Optuna's samplers ask, too
        if not self._trial_allocation_budgets:
            self._try_initialization(study)
        lineage = trial.user_attrs.get(LINEAGE, trial.number)  # it is named after its first row
        share = binascii.crc32(f"{study.study_name}_{lineage}".encode()) % self._total_trial_allocation_budget
        return bisect.bisect_right(list(itertools.accumulate(self._trial_allocation_budgets)), share)


class _FinishingMedian(MedianPruner):
    """Optuna's median rule that lets a fully trained trial be complete."""

    def __init__(self, rungs: tuple[int, ...]) -> None:
        super().__init__(n_startup_trials=5)
        self._last_rung = rungs[-1]

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        return (trial.last_step or 0) < self._last_rung and bool(super().prune(study, trial))


def build_pruner(name: str, *, rungs: Sequence[int], pauses: bool = False, n_first: int = 1) -> BasePruner:
    """The pruner of that name for trials that report at ``rungs`` (ascending steps, the last one the whole budget).

    ``pauses`` and ``n_first`` are for asha, see :class:`SuccessiveHalving`. ``hyperband`` spends at least 40 trials on start-up and is for studies far beyond 50.

    Raises:
        RecipeError: an unknown name.
    """
    steps = _checked_rungs(rungs)
    if name == "asha":
        return SuccessiveHalving(steps, pauses=pauses, n_first=n_first)
    if name == "hyperband":
        return _HyperbandOfLineages(steps)
    if name == "median":
        return _FinishingMedian(steps)
    if name == "wilcoxon":
        return WilcoxonOverSlides(steps)
    if name == "none":
        return NopPruner()
    known = get_args(PrunerName)
    raise RecipeError(f"--pruner must be one of {', '.join(known)}, got {name!r}{did_you_mean(name, known)}")


def _checked_rungs(rungs: Sequence[int]) -> tuple[int, ...]:
    steps = tuple(rungs)
    if not steps or steps[0] < 1 or any(a >= b for a, b in itertools.pairwise(steps)):
        raise ValueError(f"rungs must be ascending positive steps, got {steps}")
    return steps
