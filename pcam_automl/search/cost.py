"""What a proposal costs: expected seconds of a trial by its network, and TPE that counts them. Times nothing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial

from pcam_automl.search.dimension import UPSCALE, scaled_side
from pcam_automl.search.quick_tpe import QuickTPE
from pcam_automl.search.space import SearchSpace

SecondsOf = Callable[[Mapping[str, Any]], float]
"""Expected seconds (> 0) of a trial with these parameters; those that are not named are the study's own values."""
_FAR_BELOW = 1e12
"""Any score of a candidate, a log of densities, is above minus this."""
GOOD_SHARE = 0.1
"""TPE's gamma: the share of trials that it calls good, a tenth up to 250 trials (Optuna's default)."""


@dataclass(frozen=True)
class TrialSeconds:
    """A trial's expected seconds by its backbone and input side, as the plan has them.

    Attributes:
        images_per_s: backbone to training images a second at ``planned_px``.
        planned_px: network side that the speeds hold at.
        images: training images that a whole trial is worth, scoring and decay branches included.
        fields: the recipe fields that are not searched.
        cap_s: no trial takes more (slow networks see fewer views); None is no limit.
        side_power: by which power of the side an image's cost grows; 2 is with its pixels.
    """

    images_per_s: Mapping[str, float]
    planned_px: int
    images: float
    fields: Mapping[str, Any]
    cap_s: float | None = None
    side_power: float = 2.0

    def __call__(self, params: Mapping[str, Any]) -> float:
        """Seconds of a trial with these parameters."""
        fields = {**self.fields, **params}
        px = fields.get("tile_size") or fields.get("input_size") or fields["crop_size"]
        if UPSCALE in fields:
            px = scaled_side(fields["crop_size"], fields[UPSCALE])
        seconds = self.images / self.images_per_s[fields["backbone"]] * (px / self.planned_px) ** self.side_power
        return float(seconds if self.cap_s is None else min(seconds, self.cap_s))


@dataclass(frozen=True)
class ViewsShare:
    """The share of the planned views that a trial's network sees within a trial's seconds, by the plan's speeds.

    Attributes:
        seconds: of a trial with all planned views, without a limit.
        cap_s: that no trial exceeds.
        least: share below which a network is not worth a trial: it could not be told from a bad one, and where a step of it is
            longer than its first rung it takes many times its seconds.
        quickest: of the dimensions that decide a network's speed the value that is quickest, for those that are not drawn yet.
    """

    seconds: TrialSeconds
    cap_s: float
    least: float
    quickest: Mapping[str, Any]

    def __call__(self, params: Mapping[str, Any]) -> float:
        """Of a trial with these parameters; of those that are not named it may yet have the quickest."""
        return min(1.0, self.cap_s / self.seconds({**self.quickest, **params}))

    def depends_on(self, name: str) -> bool:
        """Whether the parameter decides a network's speed."""
        return name in self.quickest


def share_of_views(seconds: TrialSeconds, cap_s: float, least: float, space: SearchSpace) -> ViewsShare:
    """The model for a space: which of its dimensions decide a network's speed, and the quickest value of each.

    Args:
        seconds: without a limit.
        cap_s: see :class:`ViewsShare`; inf is no limit.
        least: as there.
        space: whose trials they are.
    """
    rates, quickest = seconds.images_per_s, dict[str, Any]()
    if backbones := [name for name in space.choices("backbone") if name in rates]:
        quickest["backbone"] = max(backbones, key=rates.__getitem__)
    for name in ("crop_size", "input_size", "tile_size", UPSCALE):
        if (dimension := space.parameters.get(name)) is not None:
            quickest[name] = (
                1.0 if name == UPSCALE and dimension.when else dimension.smallest()
            )  # else it may not apply
    return ViewsShare(seconds, cap_s, least, quickest)


def mean_trial_s(share: ViewsShare, space: SearchSpace) -> float:
    """Expected seconds of a trial that is drawn evenly from the space: the mean over its networks and sides, each held under the limit,
    without those too slow to be drawn; the limit where all are.
    """
    rates = share.seconds.images_per_s
    values = [
        [one for one in space.choices(name) if one in rates] if name == "backbone" else space.parameters[name].spread(5)
        for name in share.quickest
    ]
    drawn = (dict(zip(share.quickest, one, strict=True)) for one in itertools.product(*values))
    taken = [min(share.seconds(params), share.cap_s) for params in drawn if share(params) >= share.least]
    return sum(taken) / len(taken) if taken else share.cap_s


def log_improvement_per_cost(
    log_ratio: NDArray[np.float64], seconds: NDArray[np.float64], alpha: float
) -> NDArray[np.float64]:
    """Log of expected improvement per seconds**alpha, up to a constant.

    TPE's expected improvement is proportional to ``1 / (gamma + (1 - gamma) g / l)`` (Bergstra et al. 2011, NeurIPS, eq. 4).

    Args:
        log_ratio: (n,) log l - log g, TPE's densities of good and of other trials.
        seconds: (n,) > 0.
        alpha: 1 is improvement per second (Snoek et al. 2012, arXiv:1206.2944), 0 improvement alone.
    """
    log_improvement = -np.logaddexp(math.log(GOOD_SHARE), math.log(1 - GOOD_SHARE) - log_ratio)
    return np.asarray(log_improvement - alpha * np.log(seconds))


class CostAwareTPE(QuickTPE):
    """TPE for one trial (PerTrialSampler builds it anew) that knows what its candidates cost: one whose network is too
    slow gives way to any that is not, and where seconds count the others are judged by expected improvement per second.

    Args:
        seconds_of: the model of costs; None counts no seconds.
        alpha: exponent of the seconds in [0, 1]. Let it fall with what is left of the budget: then what is good and slow
            gets its turn in the end (cost cooling, Lee et al. 2020, arXiv:2003.10870).
        share_of: says which networks are too slow; None takes all.
        options: QuickTPE's.

    Attributes:
        given: parameters of the trial that are not drawn.
    """

    def __init__(
        self, seconds_of: SecondsOf | None, alpha: float, *, share_of: ViewsShare | None = None, **options: Any
    ) -> None:
        super().__init__(**options)
        self._seconds_of, self._alpha, self._share_of = seconds_of, alpha, share_of
        self._asked: dict[str, BaseDistribution] = {}
        self._known: dict[str, Any] = {}
        self._drawn: dict[str, Any] = {}  # of the one trial that a sampler of this class proposes
        self.given: Mapping[str, Any] = {}

    def _sample(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        self._asked, self._known = search_space, {**self.given, **trial.params, **self._drawn}
        drawn = super()._sample(study, trial, search_space)
        self._drawn |= drawn  # of one group of parameters; the next one's are judged together with them
        return drawn

    def _compute_acquisition_func(
        self, samples: dict[str, NDArray[Any]], mpe_below: Any, mpe_above: Any
    ) -> NDArray[np.float64]:
        score = super()._compute_acquisition_func(samples, mpe_below, mpe_above)
        candidates = [
            {name: dist.to_external_repr(samples[name][i].item()) for name, dist in self._asked.items()}
            for i in range(len(score))
        ]
        if self._seconds_of is not None:
            seconds = np.array([self._seconds_of({**self._known, **candidate}) for candidate in candidates])
            score = log_improvement_per_cost(score, seconds, self._alpha)
        if self._share_of is not None and any(map(self._share_of.depends_on, self._asked)):
            shares = np.array([self._share_of({**self._known, **candidate}) for candidate in candidates])
            score = np.where(shares < self._share_of.least, (shares - 1.0) * _FAR_BELOW, score)
        return score
