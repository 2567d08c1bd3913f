"""The range test's start from a bundle: the recipe's network or an error that says what differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from easy_set import TINY

from pcam_automl.bundle import ModelBundle
from pcam_automl.data.store import open_store
from pcam_automl.errors import RecipeError
from pcam_automl.lr_find import LrCurve, find_lr
from pcam_automl.models.factory import build_network, normalisation
from pcam_automl.models.weights import Weights
from pcam_automl.recipe import Recipe
from pcam_automl.training.compute import Compute
from pcam_automl.training.start import choose_rows


def curves_from(easy_pack: Path, theirs: Recipe, ours: Recipe) -> list[LrCurve]:
    torch.set_num_threads(1)
    state = build_network(theirs, Weights("none"), seed=1).state_dict()
    start = ModelBundle(theirs, normalisation(theirs.backbone), state, {}, {}, None)
    store = open_store(easy_pack)
    rows = store.development_rows()
    return find_lr(
        ours, store, choose_rows(store, ours, rows, rows[:0]), weights=Weights("none"), compute=Compute("cpu"),
        weight_decays=[0.0], n_steps=2, start=start,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("backbone", "changes", "words"),
    [
        (TINY, {"head": "mlp", "hidden": (8,)}, r"head \(--from mlp, recipe linear\)"),
        ("keras_cnn_1", {"crop_size": 64}, r"crop_size \(--from 64, recipe 48\)"),  # its dense layers see the whole map
    ],
)
def test_a_bundle_of_another_network_is_refused_by_what_differs(
    backbone: str, changes: dict[str, Any], words: str, easy_pack: Path
) -> None:
    ours = Recipe(backbone=backbone, crop_size=48, batch_size=4)
    theirs = ours.model_copy(update=changes)
    with pytest.raises(RecipeError, match=words):
        curves_from(easy_pack, theirs, ours)


def test_fields_that_shape_no_weight_may_differ(easy_pack: Path) -> None:
    ours = Recipe(backbone=TINY, crop_size=48, batch_size=4)
    (curve,) = curves_from(easy_pack, ours.model_copy(update={"crop_size": 64, "dropout": 0.5, "lr": 1e-4}), ours)
    assert len(curve.loss) == 2
