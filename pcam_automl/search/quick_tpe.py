"""Optuna's TPE with what it finds out anew for every trial remembered between them.

From the same trials and seed it proposes what Optuna's does, but for the order in which groups of parameters are drawn.
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.samplers import TPESampler
from optuna.samplers._tpe.sampler import default_gamma
from optuna.search_space.group_decomposed import _SearchSpaceGroup
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from pcam_automl.search.lineages import FINISHED, sign_of

Row = tuple[float, ...] | None
"""A trial's parameters as numbers; None of one that has not all of them."""


Rank = tuple[float, float]


class Remembered:
    """What is known of the finished trials of one study, which no longer change; outlives the samplers of its trials."""

    def __init__(self) -> None:
        self._grouped: set[int] = set()
        self._distinct: dict[tuple[str, ...], dict[str, BaseDistribution]] = {}
        self._groups = _SearchSpaceGroup()
        self._rows: dict[tuple[str, ...], dict[int, Row]] = {}
        self.ranks: dict[int, Rank] = {}
        """By trial id; smaller is better."""

    def calculate(self, study: Study, use_cache: bool = False) -> _SearchSpaceGroup:
        """The groups of parameters that were suggested together, in place of Optuna's own object for that.

        Optuna's goes through every trial each time it is built, 8 ms at 1,000 trials, and one that is kept would order the
        groups, and with them the random draws, by what this process saw first. This one has one order.
        """
        trials = study._get_trials(deepcopy=False, states=FINISHED, use_cache=use_cache)
        known = len(self._distinct)
        for trial in trials:
            if trial._trial_id not in self._grouped:
                self._grouped.add(trial._trial_id)
                self._distinct.setdefault(tuple(sorted(trial.distributions)), trial.distributions)
        if len(self._distinct) != known:
            self._groups = _SearchSpaceGroup()
            for names in sorted(self._distinct):
                self._groups.add_distributions(self._distinct[names])
        return self._groups

    def rows(self, names: tuple[str, ...]) -> dict[int, Row]:
        """By trial id, for parameters of these names."""
        return self._rows.setdefault(names, {})


Split = tuple[list[FrozenTrial], list[FrozenTrial]]


def _rank(trial: FrozenTrial, sign: float) -> Rank:
    """Where Optuna's TPE puts a finished trial of a study whose larger (``sign`` 1) or smaller (-1) values are better."""
    if trial.state == TrialState.COMPLETE:
        return -math.inf, -sign * cast(float, trial.value)
    if not trial.intermediate_values:
        return 1.0, 0.0
    step, value = max(trial.intermediate_values.items())
    return -step, math.inf if math.isnan(value) else -sign * value


class QuickTPE(TPESampler):
    """TPE over a study that grows.

    Args:
        remembered: of earlier trials of the same study.
        options: TPESampler's, ``group`` among them.
    """

    def __init__(self, *, remembered: Remembered | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._remembered = Remembered() if remembered is None else remembered
        self._group_decomposed_search_space = cast(Any, self._remembered)
        self._split: tuple[list[FrozenTrial], Split] | None = None

    def _sample(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        """As Optuna's for one objective without constraints; the trials are divided once for all groups of parameters."""
        states = (*FINISHED, TrialState.RUNNING) if self._constant_liar else FINISHED
        trials = study._get_trials(deepcopy=False, states=states, use_cache=not self._constant_liar)
        trials = [one for one in trials if one.number != trial.number]
        if self._split is None or self._split[0] != trials:
            self._split = trials, self._divided(trials, study)
        below, above = self._split[1]
        good = self._build_parzen_estimator(study, search_space, below, handle_below=True)
        other = self._build_parzen_estimator(study, search_space, above, handle_below=False)
        samples = good.sample(self._rng.rng, self._n_ei_candidates)
        chosen = self._compare(samples, self._compute_acquisition_func(samples, good, other))
        return {name: dist.to_external_repr(chosen[name]) for name, dist in search_space.items()}

    def _divided(self, trials: list[FrozenTrial], study: Study) -> Split:
        """The good ones and the others, each by number: complete ones by value, then pruned ones by how far they came."""
        finished = [trial for trial in trials if trial.state in FINISHED]
        gamma = default_gamma if self._gamma is None else self._gamma
        ranks, sign = self._remembered.ranks, sign_of(study)
        for trial in finished:
            if trial._trial_id not in ranks:
                ranks[trial._trial_id] = _rank(trial, sign)
        best = sorted(finished, key=lambda one: ranks[one._trial_id])[: gamma(len(finished))]
        good = {trial._trial_id for trial in best}
        return (
            [trial for trial in trials if trial._trial_id in good],
            [trial for trial in trials if trial._trial_id not in good],
        )

    def _get_internal_repr(
        self, trials: list[FrozenTrial], search_space: dict[str, BaseDistribution], study: Study
    ) -> dict[str, NDArray[Any]]:
        """(n,) numbers of each parameter over the trials that have them all, as Optuna's own."""
        known = self._remembered.rows(tuple(search_space))
        found: list[tuple[float, ...]] = []
        for trial in trials:
            if trial._trial_id in known:
                row = known[trial._trial_id]
            else:
                params = self._get_params(trial, study)
                whole = search_space.keys() <= params.keys()
                row = (
                    tuple(dist.to_internal_repr(params[name]) for name, dist in search_space.items()) if whole else None
                )
                if trial.state in FINISHED:
                    known[trial._trial_id] = row
            if row is not None:
                found.append(row)
        columns = zip(*found, strict=True) if found else [()] * len(search_space)
        return {name: np.asarray(column) for name, column in zip(search_space, columns, strict=True)}
