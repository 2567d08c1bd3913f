"""What a report is made from, as frozen values. Draws nothing and reads no file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pcam_automl.bundle import ModelBundle
from pcam_automl.config import StudySettings
from pcam_automl.data.splits import Split
from pcam_automl.data.store import PatchStore
from pcam_automl.recipe import Recipe
from pcam_automl.scores import Scores
from pcam_automl.training.engine import RungResult


class StudyTrials(Protocol):
    """As much of an ``optuna.Study`` as a report reads; optuna itself stays out of this module."""

    @property
    def study_name(self) -> str: ...

    def get_trials(self, deepcopy: bool = True) -> list[Any]: ...


@dataclass(frozen=True)
class RateCurve:
    """The learning rate over a training, e.g. of the classifier: (n,) views seen and (n,) rates."""

    views: NDArray[Any]
    lr: NDArray[Any]


@dataclass(frozen=True)
class ReportContent:
    """Everything a report may show; what is None or empty is left out with a sentence that says why.

    Attributes:
        title: of the page.
        store: the pack.
        split: its folds.
        recipe: of the training; the bundle's where None.
        bundle: the trained network.
        epochs: one result an epoch (or rung).
        scores: of the final network, or of a trial before it.
        scores_before: whether the network given was trained on these patches after they were scored.
        threshold: a probability of at least this is called tumour, in [0, 1].
        study: of a search.
        study_settings: what it remembers.
        reproduce: shell commands, in order.
        strips: (caption, PNG file or (H, W, 3) uint8) of a dense training: original, truth, epochs.
        lr_curve: the schedule; else the rates at the ends of the epochs are drawn.
        stages: (name, scores) behind each stage.
    """

    title: str
    store: PatchStore | None = None
    split: Split | None = None
    recipe: Recipe | None = None
    bundle: ModelBundle | None = None
    epochs: tuple[RungResult, ...] = ()
    scores: Scores | None = None
    scores_before: bool = False
    threshold: float = 0.5
    study: StudyTrials | None = None
    study_settings: StudySettings | None = None
    reproduce: tuple[str, ...] = ()
    strips: tuple[tuple[str, Path | NDArray[np.uint8]], ...] = ()
    lr_curve: RateCurve | None = None
    stages: tuple[tuple[str, Scores], ...] = ()

    @property
    def trained(self) -> Recipe | None:
        """The recipe given, else the bundle's."""
        return self.recipe or (self.bundle.recipe if self.bundle else None)


def both_labels(scores: Scores) -> bool:
    """Whether curves and AUC are defined."""
    return 0 < int((scores.label == 1).sum()) < len(scores.label)


def losses(scores: Scores) -> NDArray[np.float64]:
    """(n,) negative log-likelihood of each patch in nats, clipped as in :func:`pcam_automl.metrics.log_loss`."""
    prob = np.asarray(scores.prob, np.float64).clip(1e-7, 1 - 1e-7)
    return np.asarray(-np.log(np.where(np.asarray(scores.label) == 1, prob, 1 - prob)))
