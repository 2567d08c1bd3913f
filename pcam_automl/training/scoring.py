"""Evaluation and inference: store rows to logits with a network. Computes no metric and trains nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from pcam_automl.augment import augment, augment_spec, centre_view, draw, eight_views
from pcam_automl.batches import Patches
from pcam_automl.calibration import probs_at
from pcam_automl.counter import key_of
from pcam_automl.metrics import auc
from pcam_automl.models.factory import Normalisation, logit_of
from pcam_automl.recipe import Recipe
from pcam_automl.training.compute import Compute, Precision, is_out_of_memory

EVAL_BATCH = 256
"""Patches at once on a CPU, of inputs of 64 px; of larger ones fewer, so that a network's maps take the same memory: 113 of 96 px."""
EVAL_BATCH_ON_GPU = 1024  # fewer do not fill one with a small network; where they do not fit they are halved
LEAST_BATCH = 16
"""Patches at once where memory is short; a device that cannot judge so many can train nothing either."""
N_JUDGED = 1_000
SAME_AUC = 1e-4
"""Low precision predicts only where the AUC of this many patches moves by no more than this."""
Averaging = Literal["dihedral", "random", "none"]


@dataclass(frozen=True)
class Views:
    """How a patch is shown to a network that judges it.

    Attributes:
        recipe: its crop, input size and, for ``random``, augmentation and ``tta_views``.
        normalisation: channel means and deviations.
        averaging: ``dihedral``: the mean logit of the eight flips and turns of the centre view; ``random``: of
            ``tta_views`` augmented views, every patch under the same draws; ``none``: the centre view.
    """

    recipe: Recipe
    normalisation: Normalisation
    averaging: Averaging = "none"

    def __len__(self) -> int:
        return self.recipe.n_views_of(self.averaging)

    def of(self, images: Tensor) -> Iterator[Tensor]:
        """Normalised views (B, 3, px, px) of patches (B, 3, S, S) uint8, one after the other."""
        recipe, norm = self.recipe, self.normalisation
        if self.averaging == "random":
            spec, key = augment_spec(recipe), key_of(recipe.seed, "test time")
            for view in range(recipe.tta_views):
                draws = draw(spec, key, np.full(len(images), view))
                yield augment(images, draws, spec, norm.mean, norm.std, dtype=torch.float32)
            return
        view_ = centre_view(images, recipe.crop_size, recipe.network_px, norm.mean, norm.std, dtype=torch.float32)
        yield from eight_views(view_) if self.averaging == "dihedral" else (view_,)


@torch.inference_mode()
def mean_over_views(of_view: Callable[[Tensor], Tensor], images: Tensor, views: Views, compute: Compute) -> Tensor:
    """What a network gives for patches (B, 3, S, S) uint8, averaged over the views: float32 on the device, (B, ...)."""
    answers = []
    for view in views.of(images):
        with compute.autocast():
            answers.append(of_view(compute.layout(view)).float())
    return torch.stack(answers).mean(dim=0)


def logits_of_images(network: nn.Module, images: Tensor, views: Views, compute: Compute) -> Tensor:
    """Logits (B,) float32 on the device for patches (B, 3, S, S) uint8, averaged over the views."""
    return mean_over_views(lambda view: logit_of(network(view)), images, views, compute)


def logits_of_rows(
    network: nn.Module,
    patches: Patches,
    rows: np.ndarray,
    views: Views,
    compute: Compute,
    *,
    stop: Callable[[], None] = lambda: None,
    progress: Callable[[int], None] = lambda n: None,
) -> np.ndarray:
    """The network's logits for store rows: (len(rows),) float32, in the rows' order.

    Args:
        network: in evaluation mode on ``compute.device``.
        patches: the source of uint8 batches.
        rows: (n,) int64.
        views: what is shown of each patch.
        compute: precision and layout.
        stop: called once a batch; raises to end early.
        progress: called with the number of rows done in each batch.
    """
    answers = outputs_of_rows(
        lambda images: logits_of_images(network, images, views, compute),
        patches,
        rows,
        px=views.recipe.network_px,
        stop=stop,
        progress=progress,
    )
    return np.zeros(0, np.float32) if answers is None else answers


def unless_out_of_memory(
    of_images: Callable[[Tensor], Tensor], images: Tensor, n: int, least: int = LEAST_BATCH
) -> Tensor | None:
    """What the function gives for ``n`` images, None where memory is too short for so many and fewer can be tried.

    Raises:
        RuntimeError: another fault, or not even ``least`` fit.
    """
    try:
        return of_images(images)
    except (torch.OutOfMemoryError, RuntimeError) as fault:
        if not is_out_of_memory(fault) or n <= least:
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # not inside `except`, where the traceback still holds what did not fit
    return None


def eval_batch(px: int) -> int:
    """Patches that a CPU judges at once, by the side of the network's input."""
    return min(EVAL_BATCH, max(LEAST_BATCH, EVAL_BATCH * 64**2 // px**2))


def outputs_of_rows(
    of_images: Callable[[Tensor], Tensor],
    patches: Patches,
    rows: np.ndarray,
    *,
    px: int,
    stop: Callable[[], None] = lambda: None,
    progress: Callable[[int], None] = lambda n: None,
) -> np.ndarray | None:
    """What a function of images gives for store rows, batch by batch, in the rows' order: (len(rows), ...); None for no rows.

    Args:
        of_images: patches (B, 3, S, S) uint8 on the device to a tensor (B, ...).
        patches: the source of uint8 batches.
        rows: (n,) int64.
        px: side of the network's input.
        stop: called once a batch; raises to end early.
        progress: called with the number of rows done in each batch.
    """
    answers: list[Tensor] = []
    begin, size = 0, eval_batch(px) if patches.device.type == "cpu" else EVAL_BATCH_ON_GPU
    while begin < len(rows):
        stop()
        batch, following = rows[begin : begin + size], rows[begin + size : begin + 2 * size]
        images = patches.gather(batch)
        if len(following):
            patches.expect(following)
        answer = unless_out_of_memory(of_images, images, len(batch))
        if answer is None:
            size = max(LEAST_BATCH, len(batch) // 2)
            continue
        answers.append(answer)
        begin += len(batch)
        progress(len(batch))
    return torch.cat(answers).cpu().numpy() if answers else None


def inference_precision(
    network: nn.Module, patches: Patches, rows: np.ndarray, label: np.ndarray, views: Views, compute: Compute
) -> tuple[Precision, float]:
    """The training's precision where it leaves the AUC as float32 has it, to 1e-4; else float32; and the difference.

    Args:
        network: in evaluation mode on ``compute.device``.
        patches: the source of uint8 batches.
        rows: (n,) store rows; 1,000 of them, evenly spread, are judged. Of one class, or none: float32.
        label: (N,) 0/1 by store row.
        views: what is shown of each patch.
        compute: of the training.
    """
    if not len(rows):
        return "fp32", 0.0
    spread = np.linspace(0, len(rows) - 1, min(len(rows), N_JUDGED)).astype(
        np.int64
    )  # rows may be sorted by class or slide
    judged = np.array(rows[spread])  # a copy: torch warns of arrays that are read-only, as a split's are
    truth = label[judged]
    if compute.precision == "fp32" or len(np.unique(truth)) < 2:
        return "fp32", 0.0
    low, full = (
        auc(truth, probs_at(logits_of_rows(network, patches, judged, views, variant)))
        for variant in (compute, replace(compute, precision="fp32"))
    )
    return (compute.precision if abs(low - full) <= SAME_AUC else "fp32"), low - full
