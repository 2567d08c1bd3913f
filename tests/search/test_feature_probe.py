"""A probe against scikit-learn's own pipeline; what it refuses; what it leaves untouched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from easy_set import TINY
from probe_weights import write_probe_weights
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pcam_automl.batches import open_patches
from pcam_automl.data.splits import make_split
from pcam_automl.data.store import PatchStore, open_store
from pcam_automl.errors import DataError, RecipeError
from pcam_automl.models.factory import build_network
from pcam_automl.models.weights import Weights
from pcam_automl.recipe import Recipe, build_recipe
from pcam_automl.search.feature_probe import STRENGTH, features_of_rows, fit_probe, probe_result
from pcam_automl.training.start import Rows

CPU = torch.device("cpu")
RECIPE = build_recipe({"backbone": TINY, "crop_size": 32, "pretrained": True})


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return Weights("folder", write_probe_weights(tmp_path_factory.mktemp("weights")))


@pytest.fixture
def store(easy_pack: Path) -> PatchStore:
    return open_store(easy_pack)


@pytest.fixture
def rows(store: PatchStore) -> Rows:
    split = make_split(store)
    return Rows(split.train_order(0), split.score_rows(0))


def test_a_probe_is_scikit_learns_pipeline_on_the_frozen_features(
    store: PatchStore, rows: Rows, weights: Weights
) -> None:
    probe = fit_probe(store, rows, RECIPE, weights, CPU, n_train=40)
    patches = open_patches(store, CPU)
    train, features = rows.train[:40], probe.network[0]
    x, given = (features_of_rows(features, patches, part, probe.views, probe.compute) for part in (train, rows.score))
    reference = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, max_iter=1000))
    reference.fit(x.astype(np.float64), store.label[train])
    np.testing.assert_allclose(probe.rows(patches, rows.score), reference.predict_proba(given)[:, 1], atol=1e-4)
    assert probe.n_train == 40
    assert probe.converged


def test_features_are_those_of_the_given_weights_and_stay_frozen(
    store: PatchStore, rows: Rows, weights: Weights
) -> None:
    probe = fit_probe(store, rows, RECIPE, weights, CPU, n_train=40)
    loaded = build_network(RECIPE, weights, seed=0).state_dict()
    held = probe.network[0].network.state_dict()
    classifier = ("fc.weight", "fc.bias")
    assert all(torch.equal(held[name], loaded[name]) for name in loaded if name not in classifier)


def test_eight_views_average_logits_and_plain_ones_repeat(store: PatchStore, rows: Rows, weights: Weights) -> None:
    probe, patches = fit_probe(store, rows, RECIPE, weights, CPU, n_train=40), open_patches(store, CPU)
    plain = probe.rows(patches, rows.score)
    assert np.array_equal(plain, probe.rows(patches, rows.score))
    eight = probe.rows(patches, rows.score, averaging="dihedral")
    assert eight.shape == plain.shape
    assert not np.array_equal(eight, plain)


def test_the_head_of_the_recipe_does_not_matter(store: PatchStore, rows: Rows, weights: Weights) -> None:
    other = RECIPE.model_copy(update={"head": "mlp", "hidden": (8,), "dropout": 0.5})
    patches = open_patches(store, CPU)
    one, two = (fit_probe(store, rows, r, weights, CPU, n_train=40).rows(patches, rows.score) for r in (RECIPE, other))
    assert np.array_equal(one, two)


def test_a_learned_network_beats_its_own_random_weights(
    store: PatchStore, rows: Rows, weights: Weights, tmp_path: Path
) -> None:
    random = Weights("folder", write_probe_weights(tmp_path / "random", steps=0))
    learned, untaught = (probe_result(store, rows, RECIPE, source, CPU, upscale=1.0) for source in (weights, random))
    assert learned.auc >= untaught.auc
    assert learned.auc > 0.9
    assert learned.auc_95[0] <= learned.auc <= learned.auc_95[1]
    assert (learned.backbone, learned.crop_size, learned.input_px) == (TINY, 32, 32)


@pytest.mark.parametrize("source", [Weights("none"), Weights("folder", Path("nowhere"))])
def test_without_pretrained_weights_it_is_refused(store: PatchStore, rows: Rows, source: Weights) -> None:
    with pytest.raises(RecipeError, match=r"a probe needs pretrained weights, got none for test_resnet.*--probe off"):
        fit_probe(store, rows, RECIPE, source, CPU)


def test_a_dense_task_is_refused(store: PatchStore, rows: Rows, weights: Weights) -> None:
    dense: Recipe = build_recipe({"task": "dense", "backbone": TINY, "decoder": "unet", "tile_size": 32})
    with pytest.raises(RecipeError, match="a probe judges whole patches"):
        fit_probe(store, rows, dense, weights, CPU)


def test_one_label_is_refused(store: PatchStore, rows: Rows, weights: Weights) -> None:
    negative = rows.train[store.label[rows.train] == 0]
    with pytest.raises(DataError, match="a probe needs both labels"):
        fit_probe(store, Rows(negative, rows.score), RECIPE, weights, CPU)


def test_stop_ends_it_within_a_batch(store: PatchStore, rows: Rows, weights: Weights) -> None:
    def stop() -> None:
        raise TimeoutError("enough")

    with pytest.raises(TimeoutError, match="enough"):
        fit_probe(store, rows, RECIPE, weights, CPU, stop=stop)
