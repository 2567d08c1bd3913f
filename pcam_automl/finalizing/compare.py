"""What each ingredient of the final network was worth, by probabilities of the same patches. Trains and predicts nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pcam_automl.metrics import auc, log_loss
from pcam_automl.paired import Gain, auc_gain, loss_gain


@dataclass(frozen=True)
class Step:
    """One more ingredient.

    Attributes:
        name: what was added.
        auc: with it.
        log_loss: with it, in nats.
        auc_gain: against the step before; None for the first.
        loss_gain: nats saved against the step before.
    """

    name: str
    auc: float
    log_loss: float
    auc_gain: Gain | None
    loss_gain: Gain | None

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "auc": self.auc,
            "log_loss": self.log_loss,
            "auc_gain": None if self.auc_gain is None else self.auc_gain.to_json(),
            "loss_gain": None if self.loss_gain is None else self.loss_gain.to_json(),
        }


def steps_of(
    label: NDArray[np.int64], group: NDArray[np.int64], scorings: Sequence[tuple[str, NDArray[np.float64]]]
) -> tuple[Step, ...]:
    """Each scoring against the one before it, with intervals over slides.

    Args:
        label: (N,) 0 or 1, both at least once.
        group: (N,) slide codes, negative where unknown.
        scorings: (name, (N,) probabilities), at least one.

    Raises:
        DataError: as :func:`pcam_automl.metrics.auc`.
    """
    steps: list[Step] = []
    before: NDArray[np.float64] | None = None
    for name, probs in scorings:
        by_auc = None if before is None else auc_gain(label, before, probs, group)
        by_loss = None if before is None else loss_gain(label, before, probs, group)
        steps.append(Step(name, auc(label, probs), log_loss(label, probs), by_auc, by_loss))
        before = probs
    return tuple(steps)
