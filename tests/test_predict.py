"""Where and in which precision a bundle predicts, and how where memory is short."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from easy_set import TINY
from torch import Tensor, nn

from pcam_automl.bundle import ModelBundle
from pcam_automl.models.factory import Normalisation, build_network
from pcam_automl.models.weights import Weights
from pcam_automl.predict import Predictor, compute_of
from pcam_automl.recipe import Recipe
from pcam_automl.training.compute import Compute
from pcam_automl.training.scoring import Views

CPU = torch.device("cpu")


def bundle_with(provenance: dict[str, Any]) -> ModelBundle:
    recipe = Recipe(backbone=TINY, crop_size=48)
    state = build_network(recipe, Weights("none"), seed=0).state_dict()
    return ModelBundle(recipe, Normalisation((0.5,) * 3, (0.5,) * 3), state, {}, provenance)


@pytest.mark.parametrize(
    ("here", "judged", "expected"),
    [(True, "bf16", "bf16"), (True, "fp32", "fp32"), (False, "bf16", "fp32"), (False, "fp32", "fp32")],
)
def test_a_bundle_predicts_in_its_precision_where_the_cpu_has_it(
    here: bool, judged: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pcam_automl.predict.has_precision", lambda device, precision: here or precision == "fp32")
    compute = {"device": "cpu", "precision": "bf16", "channels_last": True}
    found = compute_of(bundle_with({"compute": compute, "inference": {"precision": judged}}), CPU)
    assert (found.precision, found.channels_last) == (expected, True)


def test_a_bundle_of_another_device_predicts_in_float32_in_the_usual_layout() -> None:
    found = compute_of(bundle_with({"compute": {"device": "cuda:0", "precision": "bf16", "channels_last": True}}), CPU)
    assert (found.precision, found.channels_last, found.routed) == ("fp32", True, False)


class MeanPixel(nn.Module):
    """Answers with the mean pixel, (B, 1), of as many images at once as there is room for."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return images.mean((1, 2, 3))[:, None]


@pytest.mark.parametrize("n", [40, 37, 17, 16])
def test_images_that_do_not_fit_are_judged_in_halves_in_their_order(n: int) -> None:
    bundle = bundle_with({})
    levels = np.random.default_rng(0).permutation(256)[:n].astype(np.uint8)  # distinct, one an image
    images = np.broadcast_to(levels[:, None, None, None], (n, 48, 48, 3)).copy()
    views = Views(bundle.recipe, bundle.normalisation)
    small, large = (Predictor(bundle, MeanPixel(room), Compute("cpu"), views) for room in (16, n))
    found = small.image_logits(images)
    np.testing.assert_array_equal(found, large.image_logits(images))
    np.testing.assert_allclose(found, (levels / 255 - 0.5) / 0.5, rtol=1e-4, atol=1e-5)
