"""Samplers: who proposes the next trial's parameters, reproducibly. Knows no recipes and no search spaces' files."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, QMCSampler, RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from pcam_automl.errors import RecipeError, did_you_mean
from pcam_automl.search.cost import CostAwareTPE, SecondsOf, ViewsShare
from pcam_automl.search.current import CurrentStudy
from pcam_automl.search.lineages import FINISHED
from pcam_automl.search.quick_tpe import QuickTPE, Remembered
from pcam_automl.search.storage import quiet_experimental

SamplerName = Literal["tpe", "tpe-qmc", "gp", "random", "cmaes", "qmc"]
COST_AWARE = ("tpe", "tpe-qmc")
"""Samplers whose proposals can be judged by improvement per second."""

N_STARTUP = 10
"""Random trials before the model starts. For gp and cmaes 5: they learn from complete trials only, and of 50 trials
under successive halving some 8 are complete."""

_DRAWS = 8
"""More of a value with which a network would be too slow, before the quickest of them is taken."""

_NEEDS: dict[str, tuple[str, ...]] = {
    "gp": ("scipy", "torch"),
    "cmaes": ("cmaes",),
    "qmc": ("scipy",),
    "tpe-qmc": ("scipy",),
}


class PerTrialSampler(BaseSampler):
    """A sampler that is rebuilt before every trial with a seed from (study seed, trial number).

    The same seed, history and trial number give the same proposal, whichever process asks; a sampler built anew after
    a restart does not repeat its first trials (a reloaded ``TPESampler(seed=7)`` does). A lineage of several rows is
    seen once (:class:`~pcam_automl.search.current.CurrentStudy`).

    Args:
        name: ``tpe`` (Optuna 5's multivariate TPE with constant liar, grouped by conditions), ``tpe-qmc`` (the same, its
            start a scrambled Sobol sequence instead of random), ``gp``, ``random``, ``cmaes`` (for the numbers; choices
            and conditional dimensions by TPE) or ``qmc`` (scrambled Sobol throughout).
        seed: the study's seed, >= 0.
        seconds_of: expected seconds of a trial, to judge proposals by improvement per second; None counts no seconds.
        share_of: the share of the planned views that a proposal's network sees, by which TPE and random draws leave out what
            is too slow; None takes all.

    Raises:
        RecipeError: an unknown name, a package that the sampler needs is missing (the message says which), or a sampler
            that cannot count seconds.

    Attributes:
        prescribed: parameter values that the next trial takes wherever its distributions allow them; set it before the
            trial starts or before it suggests its first parameter. It is emptied when that trial ends.
        budget_left: share of the budget that is left, in [0, 1]: the exponent of the seconds in the next proposals.
    """

    def __init__(
        self, name: str, seed: int, *, seconds_of: SecondsOf | None = None, share_of: ViewsShare | None = None
    ) -> None:
        _check(name, seed, cost_aware=seconds_of is not None)
        self.name = name
        self.seed = seed
        self.seconds_of = seconds_of
        self.share_of = share_of
        self.prescribed: dict[str, Any] = {}
        self.budget_left = 1.0
        self._of: tuple[Any, int] | None = None
        self._remembered = Remembered()
        self._inner = self._built(0, starting=False)
        self._current: CurrentStudy | None = None

    def seed_of(self, trial_number: int) -> int:
        """The inner sampler's seed for that trial, in [0, 2**32)."""
        return int(np.random.SeedSequence([self.seed, trial_number]).generate_state(1)[0])

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        if (
            storage_and_id := (study._storage, study._study_id)
        ) != self._of:  # a bracket of Hyperband is a new object each time
            self._of, self._remembered = storage_and_id, Remembered()
        self._current = current = CurrentStudy(study)
        starting = False
        if self.name == "tpe-qmc":
            starting = len(current._get_trials(deepcopy=False, states=FINISHED, use_cache=True)) < N_STARTUP
        self._inner = self._built(trial.number, starting=starting)
        self._inner.before_trial(study, trial)

    @quiet_experimental()
    def _built(self, number: int, *, starting: bool) -> BaseSampler:
        seed = self.seed_of(number)
        if self.name == "qmc" or (self.name == "tpe-qmc" and starting):
            return _NumberedQMC(number, seed=self.seed, independent_sampler=RandomSampler(seed=seed))
        options = {"seed": seed, "n_startup_trials": N_STARTUP, "group": True}
        if self.name in COST_AWARE and (self.seconds_of is not None or self.share_of is not None):
            return CostAwareTPE(
                self.seconds_of, self.budget_left, share_of=self.share_of, remembered=self._remembered, **options
            )
        return _build_inner(self.name, seed, {**options, "remembered": self._remembered})

    def _view(self, study: Study) -> Study:
        """What the inner sampler is given for the study: of one trial always the same, so that hidden rows are found once."""
        if self._current is None or self._current.study is not study:
            self._current = CurrentStudy(study)
        return cast(Study, self._current)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        space = self._inner.infer_relative_search_space(self._view(study), trial)
        # Optuna asks for what is missing here one by one, by sample_independent, with its actual distribution.
        return {name: dist for name, dist in space.items() if not self._is_prescribed(name, dist)}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if isinstance(self._inner, CostAwareTPE):
            self._inner.given = self.prescribed
        return self._inner.sample_relative(self._view(study), trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        if self._is_prescribed(param_name, param_distribution):
            return self.prescribed[param_name]
        drawn = self._inner.sample_independent(self._view(study), trial, param_name, param_distribution)
        if self.share_of is None or not self.share_of.depends_on(param_name):
            return drawn
        known = {**self.prescribed, **trial.params}
        share = self.share_of({**known, param_name: drawn})
        for _ in range(_DRAWS):
            if share >= self.share_of.least:
                break
            other = self._inner.sample_independent(self._view(study), trial, param_name, param_distribution)
            if (of_other := self.share_of({**known, param_name: other})) > share:
                drawn, share = other, of_other
        return drawn

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self.prescribed = {}
        self._inner.after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        """Nothing to do: the seed follows the trial's number, which no two trials share."""

    def _is_prescribed(self, name: str, distribution: BaseDistribution) -> bool:
        if name not in self.prescribed:
            return False
        try:
            return bool(distribution._contains(distribution.to_internal_repr(self.prescribed[name])))
        except (ValueError, TypeError):  # not one of the choices, or not a number
            return False


class _NumberedQMC(QMCSampler):
    """The scrambled Sobol sequence of a study, a trial's place in it being its number.

    Optuna counts in the study's attributes, by a read and a write: workers that ask at the same moment get the same point.
    One that starts beside others takes the dimensions of the one that has named most, instead of a warning.
    """

    def __init__(self, number: int, *, seed: int, independent_sampler: BaseSampler) -> None:
        super().__init__(
            seed=seed, scramble=True, independent_sampler=independent_sampler, warn_independent_sampling=False
        )
        self._number = number

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        trials = study._get_trials(deepcopy=False, use_cache=True)
        others = [other for other in trials if other.number != trial.number]
        finished = [other for other in others if other.state in FINISHED]
        if finished:
            return dict(finished[0].distributions)
        pending = [dict(other.distributions) for other in others if other.state == TrialState.RUNNING]
        return max(pending, key=len, default={})

    def _find_sample_id(self, study: Study, search_space: dict[str, BaseDistribution]) -> int:
        return self._number


def build_sampler(name: str, seed: int, *, seconds_of: SecondsOf | None = None) -> PerTrialSampler:
    """The sampler of that name; see :class:`PerTrialSampler`."""
    return PerTrialSampler(name, seed, seconds_of=seconds_of)


def check_cost_aware(name: str) -> None:
    """Whether the sampler can count seconds.

    Raises:
        RecipeError: it cannot.
    """
    if name not in COST_AWARE:
        raise RecipeError(f"--cost-aware needs --sampler {' or '.join(COST_AWARE)}, got {name}")


def _check(name: str, seed: int, *, cost_aware: bool) -> None:
    known = get_args(SamplerName)
    if name not in known:
        raise RecipeError(f"--sampler must be one of {', '.join(known)}, got {name!r}{did_you_mean(name, known)}")
    if seed < 0:
        raise RecipeError(f"--seed must be at least 0, got {seed}")
    if cost_aware:
        check_cost_aware(name)
    missing = [package for package in _NEEDS.get(name, ()) if importlib.util.find_spec(package) is None]
    if missing:
        raise RecipeError(
            f"sampler {name} needs {' and '.join(missing)}; run: pip install {' '.join(missing)}; or use tpe"
        )


def _build_inner(name: str, seed: int, tpe_options: dict[str, Any]) -> BaseSampler:
    if name in COST_AWARE:
        return QuickTPE(**tpe_options)
    if name == "gp":
        return GPSampler(seed=seed, n_startup_trials=N_STARTUP // 2, warn_independent_sampling=False)
    if name == "cmaes":  # it takes numbers that every trial has; TPE takes the rest, instead of Optuna's random draws
        return CmaEsSampler(
            seed=seed,
            n_startup_trials=N_STARTUP // 2,
            independent_sampler=QuickTPE(**tpe_options),
            warn_independent_sampling=False,
        )
    return RandomSampler(seed=seed)
