"""Evaluation and inference: store rows to logits with a network. Computes no metric and trains nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from pcam_automl.augment import centre_view, eight_views
from pcam_automl.batches import Patches, in_batches
from pcam_automl.models.factory import Normalisation
from pcam_automl.training.compute import Compute

EVAL_BATCH = 256


@torch.inference_mode()
def logits_of_rows(
    network: nn.Module,
    patches: Patches,
    rows: np.ndarray,
    *,
    crop_size: int,
    out_px: int,
    normalisation: Normalisation,
    compute: Compute,
    all_views: bool = False,
    stop: Callable[[], None] = lambda: None,
    progress: Callable[[int], None] = lambda n: None,
) -> np.ndarray:
    """The network's logits for store rows: (len(rows),) float32, in the rows' order.

    Args:
        network: in evaluation mode on ``compute.device``.
        patches: the source of uint8 batches.
        rows: (n,) int64.
        crop_size: side of the centre crop in px.
        out_px: side of the network's input in px.
        normalisation: the backbone's.
        compute: precision and layout.
        all_views: average the eight views of the dihedral group (logits), at eight times the cost.
        stop: called once a batch; raises to end early.
        progress: called with the number of rows done in each batch.
    """
    answers: list[Tensor] = []
    for batch in in_batches(rows, EVAL_BATCH):
        stop()
        view = centre_view(
            patches.gather(batch), crop_size, out_px, normalisation.mean, normalisation.std, dtype=torch.float32
        )
        answers.append(logits_of_view(network, view, compute, all_views=all_views))
        progress(len(batch))
    if not answers:
        return np.zeros(0, np.float32)
    return torch.cat(answers).cpu().numpy()


def logits_of_view(network: nn.Module, view: Tensor, compute: Compute, *, all_views: bool) -> Tensor:
    """Logits (B,) float32 on the device for normalised images (B, 3, px, px), averaged over eight views if asked."""
    views = list(eight_views(view)) if all_views else [view]
    total = torch.zeros(len(view), device=view.device)
    with compute.autocast():
        for turned in views:
            total += network(compute.layout(turned)).squeeze(1).float()
    return total / len(views)


def probs_of_logits(logits: np.ndarray) -> np.ndarray:
    """Sigmoid in float64: (n,) in [0, 1], without overflow for logits of any size."""
    return np.asarray(torch.sigmoid(torch.from_numpy(logits.astype(np.float64))).numpy())
