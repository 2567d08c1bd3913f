"""Samplers: who proposes the next trial's parameters, reproducibly. Knows no recipes and no search spaces' files."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, QMCSampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from pcam_automl.errors import RecipeError, did_you_mean
from pcam_automl.search.storage import quiet_experimental

SamplerName = Literal["tpe", "gp", "random", "cmaes", "qmc"]

N_STARTUP = 10
"""Random trials before the model starts. For gp and cmaes 5: they learn from complete trials only, and of 50 trials
under successive halving some 8 are complete."""

_NEEDS: dict[str, tuple[str, ...]] = {"gp": ("scipy", "torch"), "cmaes": ("cmaes",), "qmc": ("scipy",)}


class PerTrialSampler(BaseSampler):
    """A sampler that is rebuilt before every trial with a seed from (study seed, trial number).

    The same seed, history and trial number give the same proposal, whichever process asks; a sampler built anew after
    a restart does not repeat its first trials (a reloaded ``TPESampler(seed=7)`` does).

    Args:
        name: ``tpe`` (Optuna 5's multivariate TPE with constant liar, grouped by conditions), ``gp``, ``random``,
            ``cmaes`` or ``qmc`` (scrambled Sobol).
        seed: the study's seed, >= 0.

    Raises:
        RecipeError: an unknown name, or a package that the sampler needs is missing (the message says which).

    Attributes:
        prescribed: parameter values that the next trial takes wherever its distributions allow them; set it before the
            trial starts or before it suggests its first parameter. It is emptied when that trial ends.
    """

    def __init__(self, name: str, seed: int) -> None:
        _check(name, seed)
        self.name = name
        self.seed = seed
        self.prescribed: dict[str, Any] = {}
        self._inner = _build_inner(name, self.seed_of(0), seed)

    def seed_of(self, trial_number: int) -> int:
        """The inner sampler's seed for that trial, in [0, 2**32)."""
        return int(np.random.SeedSequence([self.seed, trial_number]).generate_state(1)[0])

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._inner = _build_inner(self.name, self.seed_of(trial.number), self.seed)
        self._inner.before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        space = self._inner.infer_relative_search_space(study, trial)
        # Optuna asks for what is missing here one by one, by sample_independent, with its actual distribution.
        return {name: dist for name, dist in space.items() if not self._is_prescribed(name, dist)}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._inner.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        if self._is_prescribed(param_name, param_distribution):
            return self.prescribed[param_name]
        return self._inner.sample_independent(study, trial, param_name, param_distribution)

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


def build_sampler(name: str, seed: int) -> PerTrialSampler:
    """The sampler of that name; see :class:`PerTrialSampler`."""
    return PerTrialSampler(name, seed)


def _check(name: str, seed: int) -> None:
    known = get_args(SamplerName)
    if name not in known:
        raise RecipeError(f"sampler must be one of {', '.join(known)}, got {name!r}{did_you_mean(name, known)}")
    if seed < 0:
        raise RecipeError(f"seed must be at least 0, got {seed}")
    missing = [package for package in _NEEDS.get(name, ()) if importlib.util.find_spec(package) is None]
    if missing:
        raise RecipeError(
            f"sampler {name} needs {' and '.join(missing)}; run: pip install {' '.join(missing)}; or use tpe"
        )


@quiet_experimental()
def _build_inner(name: str, trial_seed: int, study_seed: int) -> BaseSampler:
    if name == "tpe":
        return TPESampler(seed=trial_seed, n_startup_trials=N_STARTUP, group=True)
    if name == "gp":
        return GPSampler(seed=trial_seed, n_startup_trials=N_STARTUP // 2, warn_independent_sampling=False)
    if name == "cmaes":
        return CmaEsSampler(seed=trial_seed, n_startup_trials=N_STARTUP // 2, warn_independent_sampling=False)
    if name == "qmc":  # one sequence for the whole study: its scrambling keeps the study's seed
        independent = RandomSampler(seed=trial_seed)
        return QMCSampler(
            seed=study_seed, scramble=True, independent_sampler=independent, warn_independent_sampling=False
        )
    return RandomSampler(seed=trial_seed)
