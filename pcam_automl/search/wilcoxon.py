"""A pruner that compares trials slide by slide, and the losses that it compares. Trains nothing and stores nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from optuna.pruners import BasePruner
from optuna.study import Study
from optuna.trial import FrozenTrial

from pcam_automl.metrics import group_codes, patch_losses
from pcam_automl.search.lineages import lineage_of, sign_of

SLIDE_LOSSES = "slide_losses"
"""The trial's user attribute: rung's step (as text) to the mean log-losses of the same parts of the validation slides."""
MOST_PARTS = 64
"""More slides than this are put together into so many parts: 600 bytes a rung in the database, whatever the data."""
LEAST_PARTS = 6
"""With five pairs no order of them has a p-value below 0.03, and with three none below 0.1."""
P_THRESHOLD = 0.1


def losses_by_slide(label: NDArray[np.int64], prob: NDArray[np.float64], group: NDArray[np.integer]) -> list[float]:
    """Mean log-loss of each slide, in the slides' order; of ``MOST_PARTS`` parts of them where there are more.

    A part is whole slides, so that parts stay independent. Patches without a slide are slides of their own.

    Args:
        label: (n,) 0 or 1.
        prob: (n,) in [0, 1].
        group: (n,) code of the slide, negative where unknown.
    """
    part = group_codes(group, len(label)) % MOST_PARTS
    means = np.bincount(part, patch_losses(label, prob)) / np.bincount(part)
    return [round(float(mean), 4) for mean in means]


class WilcoxonOverSlides(BasePruner):
    """Ends a trial that is significantly worse than the best one at the same rung, over the validation slides.

    Optuna's WilcoxonPruner pairs values of folds or instances that a trial reports one after the other. Here a trial has one
    fold and reports at rungs; what repeats is the slide. At the rung it reported last, a trial's mean losses by slide are
    compared with those of the lineage whose value there is best, by the one-sided signed-rank test. It ends if p < 0.1 and its
    own value is worse, too (a network may order patches better and be less sure of it). Nothing ends at the last rung.

    Args:
        rungs: the steps at which trials report, ascending.
        p_threshold: in (0, 1); larger ends more.
    """

    def __init__(self, rungs: Sequence[int], p_threshold: float = P_THRESHOLD) -> None:
        if not 0.0 < p_threshold < 1.0:
            raise ValueError(f"p_threshold must be in (0, 1), got {p_threshold}")
        self.last_rung, self.p_threshold = rungs[-1], p_threshold

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether the trial ends here; see the class."""
        step = trial.last_step
        if step is None or step >= self.last_rung:
            return False
        own = trial.intermediate_values[step]
        if math.isnan(own):
            return True
        sign = sign_of(study)
        trials = study.get_trials(deepcopy=False)
        best, theirs = _best_other(trials, trial, step, sign)
        losses = _losses(trial.user_attrs, step)
        if losses is None:  # the rung lay in a checkpoint: an interrupted row of the lineage has noted them
            mine = lineage_of(trial)
            noted = (_losses(row.user_attrs, step) for row in reversed(trials) if lineage_of(row) == mine)
            losses = next((one for one in noted if one is not None), None)
        if theirs is None or losses is None or len(losses) < LEAST_PARTS or sign * own >= sign * best:
            return False
        return worse_p(losses, theirs) < self.p_threshold


def _best_other(
    trials: Sequence[FrozenTrial], own: FrozenTrial, step: int, sign: float
) -> tuple[float, NDArray[np.float64] | None]:
    """The best value that another lineage reported at ``step``, and its losses; None where there is none."""
    found: tuple[float, NDArray[np.float64] | None] = (math.nan, None)
    mine = lineage_of(own)
    for other in trials:
        value = other.intermediate_values.get(step)
        if value is None or math.isnan(value) or (found[1] is not None and sign * value <= sign * found[0]):
            continue
        losses = _losses(other.user_attrs, step)
        if losses is not None and lineage_of(other) != mine:
            found = value, losses
    return found


def _losses(attrs: Mapping[str, object], step: int) -> NDArray[np.float64] | None:
    held = attrs.get(SLIDE_LOSSES)
    values = held.get(str(step)) if isinstance(held, dict) else None
    return None if values is None else np.asarray(values, np.float64)


def worse_p(losses: NDArray[np.float64], of_best: NDArray[np.float64]) -> float:
    """p-value of "these losses are not larger", paired (Wilcoxon 1945); 1 where all pairs are equal.

    Args:
        losses: (n,) of the trial.
        of_best: (n,) of the best one, of the same slides.
    """
    from scipy import stats  # half a second, for the one pruner that needs it

    difference = losses - of_best
    if not difference.any():
        return 1.0
    return float(stats.wilcoxon(difference, alternative="greater", zero_method="zsplit").pvalue)
