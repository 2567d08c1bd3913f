"""The precision and layout that trainings use on a CPU against plain float32, on the synthetic set."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pcam_automl.batches import open_patches
from pcam_automl.counter import key_of
from pcam_automl.data.pack import pack
from pcam_automl.data.sources import open_source
from pcam_automl.data.splits import make_split
from pcam_automl.data.store import PatchStore, open_store
from pcam_automl.data.synthetic import write_synthetic
from pcam_automl.models.weights import Weights
from pcam_automl.recipe import Recipe
from pcam_automl.training.compute import Compute
from pcam_automl.training.engine import Rung
from pcam_automl.training.fit import fit
from pcam_automl.training.start import choose_rows, start_training

CPU = torch.device("cpu")
VIEWS, BAND = 12_800, 0.03
PLAIN = Compute("cpu", "fp32", channels_last=False)
QUICK = Compute("cpu", "bf16", channels_last=True, routed=True)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> PatchStore:
    root = tmp_path_factory.mktemp("synthetic")
    write_synthetic(root / "raw", n_patches=2_400, n_slides=24, seed=0)
    pack(open_source(root / "raw"), root / "pack")
    return open_store(root / "pack")


def auc_of(store: PatchStore, compute: Compute, seed: int) -> float:
    """Of slides that were not trained on, after 200 steps of 64."""
    recipe = Recipe(backbone="resnet10t", crop_size=48, batch_size=64, views=VIEWS, lr=2e-3, ema=0.99, seed=seed)
    split = make_split(store, seed=0)
    rows = choose_rows(store, recipe, split.train_order(0), split.score_rows(0, len(split.order)))
    training = start_training(
        recipe,
        store,
        rows,
        patches=open_patches(store, CPU),
        weights=Weights("none"),
        compute=compute,
        key=key_of(seed, "views"),
    )
    *_, last = fit(training, rows.train, (Rung(VIEWS, len(rows.train)),))
    assert last.auc is not None
    return last.auc


@pytest.mark.slow  # six trainings, two to five minutes
def test_bf16_channels_last_and_routes_end_where_plain_float32_does_on_the_synthetic_set(store: PatchStore) -> None:
    """Over three seeds the mean AUCs differ by at most 0.03, and both have learnt (docs/performance.md)."""
    plain, quick = (np.array([auc_of(store, compute, seed) for seed in range(3)]) for compute in (PLAIN, QUICK))
    print(f"float32 {plain.round(4)}, bf16 {quick.round(4)}, mean difference {quick.mean() - plain.mean():+.4f}")
    assert min(plain.mean(), quick.mean()) > 0.75
    assert abs(quick.mean() - plain.mean()) <= BAND
