"""Where and in which precision a bundle predicts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from easy_set import TINY

from pcam_automl.bundle import ModelBundle
from pcam_automl.models.factory import Normalisation, build_network
from pcam_automl.models.weights import Weights
from pcam_automl.predict import compute_of
from pcam_automl.recipe import Recipe

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
