"""What a report is made from, as frozen values, and what it is called. Draws nothing and reads no file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pcam_automl.bundle import ModelBundle
from pcam_automl.config import StudySettings
from pcam_automl.data.splits import Split
from pcam_automl.data.store import PatchStore
from pcam_automl.metrics import accuracy, dice
from pcam_automl.operating import Operating
from pcam_automl.recipe import Recipe
from pcam_automl.scores import Scores, clusters_of_rows
from pcam_automl.training.engine import RungResult

if TYPE_CHECKING:  # it reads Optuna's trials, which reports of a training do without
    from pcam_automl.search.ranking import Ranking


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
class Noun:
    """What is counted, for sentences and axes."""

    one: str
    many: str


PATCH, IMAGE, PIXEL = Noun("patch", "patches"), Noun("image", "images"), Noun("pixel", "pixels")
SLIDE = Noun("slide", "slides")


@dataclass(frozen=True)
class MapFigures:
    """How good a dense network's maps are, over every pixel of some images, calls made at 0.5.

    Attributes:
        on: of what, for people.
        dice: Dice coefficient in [0, 1].
        accuracy: share of pixels called rightly.
        always_negative: the share that a network which never sees tumour calls rightly.
        auc: over pixels; None where only the scores know it.
    """

    on: str
    dice: float
    accuracy: float
    always_negative: float
    auc: float | None = None

    def facts(self, threshold: float) -> list[tuple[str, str]]:
        """(value, what it is): the accuracy stands beside that of never calling tumour, high wherever tumour is rare."""
        return [
            (f"{self.dice:.4f}", f"Dice at {threshold:g}: overlap of calls and masks, at most 1"),
            (f"{100 * self.accuracy:.1f} %", f"of pixels called rightly at {threshold:g} (pixel accuracy)"),
            (f"{100 * self.always_negative:.1f} %", "of pixels would be right if tumour were never called"),
        ]


@dataclass(frozen=True)
class FinalFigures:
    """What finalize measured beside the scores, as ``submission.json`` holds it; empty where it did not.

    Attributes:
        operating: thresholds and reject curves, out of fold, then on the holdout.
        confirmed: the confirmed trials, the best first: trial, search, values, mean, drop.
        mean_drop: of them.
        notes: sentences on the blend and the temperature.
        steps: ingredients on the holdout: name, auc, log_loss, auc_gain, loss_gain.
    """

    operating: tuple[Operating, ...] = ()
    confirmed: tuple[Mapping[str, Any], ...] = ()
    mean_drop: float | None = None
    notes: tuple[str, ...] = ()
    steps: tuple[Mapping[str, Any], ...] = ()


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
        ranking: its best trials with their intervals.
        reproduce: shell commands, in order.
        strips: (caption, PNG file or (H, W, 3) uint8) of a dense training: original, truth, epochs.
        lr_curve: the schedule; else the rates at the ends of the epochs are drawn.
        stages: (name, scores) behind each stage.
        maps: a dense network's figures over every pixel of the images behind the scores; else the scores' own are shown.
        test_maps: the same of the test images that came with masks.
        final: what finalize measured beside the scores.
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
    ranking: Ranking | None = None
    reproduce: tuple[str, ...] = ()
    strips: tuple[tuple[str, Path | NDArray[np.uint8]], ...] = ()
    lr_curve: RateCurve | None = None
    stages: tuple[tuple[str, Scores], ...] = ()
    maps: MapFigures | None = None
    test_maps: MapFigures | None = None
    final: FinalFigures = FinalFigures()

    @property
    def trained(self) -> Recipe | None:
        """The recipe given, else the bundle's."""
        return self.recipe or (self.bundle.recipe if self.bundle else None)

    @property
    def dense(self) -> bool:
        """Whether the network judges pixels."""
        return self.trained is not None and self.trained.task == "dense"

    @property
    def by_clock(self) -> bool:
        """Whether the training ended by the clock: its results are parts of a budget's seconds, and no epochs."""
        return self.bundle is not None and bool(self.bundle.provenance.get("by_clock"))

    @property
    def of_store(self) -> Noun:
        """What a row of the store is to this training."""
        return IMAGE if self.dense else PATCH

    @property
    def of_scores(self) -> Noun:
        """What a score is of."""
        return PIXEL if self.dense else PATCH

    @property
    def on_maps(self) -> MapFigures | None:
        """Dice and pixel accuracy beside the always-negative baseline; over the scored pixels where ``maps`` is not given or
        the threshold is not its 0.5. None for patches, and without scores.
        """
        scores = self.scores
        if not self.dense or scores is None or not len(scores.rows):
            return None
        if self.maps is not None and self.threshold == 0.5:
            return self.maps
        own = dice(scores.label, scores.prob, self.threshold), accuracy(scores.label, scores.prob, self.threshold)
        return MapFigures(scores.on, *own, float((scores.label == 0).mean()))


def both_labels(scores: Scores) -> bool:
    """Whether curves and AUC are defined."""
    return 0 < int((scores.label == 1).sum()) < len(scores.label)


def clusters_of(store: PatchStore | None, scores: Scores) -> NDArray[np.int64]:
    """(n,) what an interval's draws are made over: the slide, where it is unknown the image, whose pixels are not independent."""
    rows = np.asarray(scores.rows, np.int64)
    return rows if store is None else clusters_of_rows(store, rows)


def losses(scores: Scores) -> NDArray[np.float64]:
    """(n,) negative log-likelihood of each score in nats, clipped as in :func:`pcam_automl.metrics.log_loss`."""
    prob = np.asarray(scores.prob, np.float64).clip(1e-7, 1 - 1e-7)
    return np.asarray(-np.log(np.where(np.asarray(scores.label) == 1, prob, 1 - prob)))
