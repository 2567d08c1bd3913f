"""What a training learns: store rows to images and targets, and how a network is scored on it. Takes no step.

A task is all that the loop does not know: :class:`PatchTask` has one probability a patch, ``DenseTask`` (dense.py) one a
pixel. Legend: B images a step, S patch side (96), px network side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pcam_automl.augment import augment, augment_spec, draw
from pcam_automl.batches import Patches
from pcam_automl.calibration import probs_at
from pcam_automl.errors import TrainingDiverged
from pcam_automl.metrics import accuracy, auc, log_loss
from pcam_automl.models.factory import Normalisation
from pcam_automl.recipe import Recipe
from pcam_automl.scores import Scores
from pcam_automl.training.compute import Compute
from pcam_automl.training.scoring import Views, logits_of_rows


@dataclass(frozen=True)
class TrainingData:
    """What a training reads.

    Attributes:
        patches: uint8 batches by store row.
        label: (N,) 0/1 for every store row that is trained or scored on.
        train_rows: (n,) store rows in nested order; a rung uses a prefix.
        score_rows: (m,) store rows that a rung is scored on; empty for a training without validation.
        normalisation: channel means and deviations for the network.
        masks: uint8 batches (B, 1, S, S) of 0/1 by store row; None but for task dense.
        domain: (N,) code of every store row's domain, negative where unknown; None where none is known.
    """

    patches: Patches
    label: np.ndarray
    train_rows: np.ndarray
    score_rows: np.ndarray
    normalisation: Normalisation
    masks: Patches | None = None
    domain: np.ndarray | None = None


@dataclass(frozen=True)
class Score:
    """Figures of a network on the scoring rows; of a dense task they count pixels."""

    auc: float
    loss: float
    accuracy: float
    dice: float | None = None


class Task(Protocol):
    """What the loop asks of a task."""

    @property
    def data(self) -> TrainingData: ...

    def expect(self, rows: np.ndarray) -> None:
        """Announce the rows of the next :meth:`batch`, whose pixels may be fetched meanwhile."""
        ...

    def batch(self, rows: np.ndarray, views: np.ndarray) -> tuple[Tensor, Tensor]:
        """Augmented images (B, 3, px, px) float32 and targets in [0, 1], (B,) or (B, px, px), on the device."""
        ...

    def score(self, network: nn.Module, stop: Callable[[], None]) -> tuple[Score, Scores]:
        """Figures on the scoring rows and what they are of, the network being in evaluation mode.

        Raises:
            TrainingDiverged: an output is not finite.
        """
        ...


class PatchTask:
    """One logit a patch, binary cross-entropy, scored on centre views."""

    def __init__(self, recipe: Recipe, data: TrainingData, compute: Compute, key: int) -> None:
        self.recipe, self.data, self.compute, self.key = recipe, data, compute, key
        self._spec = augment_spec(recipe)
        self._label = torch.from_numpy(data.label.astype(np.float32)).to(compute.device)

    def expect(self, rows: np.ndarray) -> None:
        self.data.patches.expect(rows)

    def batch(self, rows: np.ndarray, views: np.ndarray) -> tuple[Tensor, Tensor]:
        norm = self.data.normalisation
        images = augment(  # (B, 3, S, S) uint8 -> (B, 3, px, px) float
            self.data.patches.gather(rows),
            draw(self._spec, self.key, views),
            self._spec,
            norm.mean,
            norm.std,
            dtype=torch.float32,
        )
        # Blocking, the host would wait here for the device in every batch.
        index = torch.from_numpy(rows).to(self._label.device, non_blocking=True)
        return images, self._label[index]

    def score(self, network: nn.Module, stop: Callable[[], None]) -> tuple[Score, Scores]:
        rows = self.data.score_rows
        views = Views(self.recipe, self.data.normalisation)
        logits = logits_of_rows(network, self.data.patches, rows, views, self.compute, stop=stop)
        if not np.isfinite(logits).all():
            raise TrainingDiverged("the network's outputs on the validation patches are not finite")
        probs, label = probs_at(logits), self.data.label[rows].astype(np.int64)
        scores = Scores(rows, label, probs, f"{len(rows):,} validation patches")
        return Score(auc(label, probs), log_loss(label, probs), accuracy(label, probs, 0.5)), scores
