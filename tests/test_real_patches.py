"""The genuine files of the competition, and tables at their full size. Skipped where shared/data is absent."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from pcam_automl import cli
from pcam_automl.bundle import ModelBundle, write_bundle
from pcam_automl.data.store import open_store
from pcam_automl.data.tables import read_ids, read_labels
from pcam_automl.models.factory import build_network, normalisation
from pcam_automl.models.weights import Weights
from pcam_automl.recipe import Recipe
from pcam_automl.submission import check_submission, write_submission

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="module")
def genuine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    archive = SHARED / "data" / "kaggle_real.zip"
    if not archive.is_file():
        pytest.skip("no genuine Kaggle patches: shared/data/kaggle_real.zip is not there")
    root = tmp_path_factory.mktemp("genuine")
    with zipfile.ZipFile(archive) as members:
        members.extractall(root)
    return root


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["pcam-automl", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code in (0, None)


def test_the_genuine_patches_go_through_prepare_and_predict(
    genuine: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "prepare", genuine, "--out", "pack", "--json")
    prepared = json.loads(capfd.readouterr().out)
    assert prepared["patches"] == 130
    store = open_store(Path("pack"))
    assert len(store.development_rows()) == 112
    assert store.patches.shape == (130, 96, 96, 3)

    recipe = Recipe(backbone="test_resnet", crop_size=64)
    torch.set_num_threads(1)
    state = build_network(recipe, Weights("none"), seed=0).state_dict()
    write_bundle(Path("m"), ModelBundle(recipe, normalisation("test_resnet"), state, {}, {}))
    run(monkeypatch, "predict", "--model", "m", "--input", genuine / "test", "--out", "p.csv")
    predicted = pd.read_csv("p.csv", dtype={"id": str})
    assert sorted(predicted["id"]) == sorted(f.stem for f in (genuine / "test").iterdir())
    assert predicted["label"].between(0, 1).all()
    assert "18 probabilities" in capfd.readouterr().out


def test_a_submission_of_full_size_passes_the_check(genuine: Path, in_tmp: Path) -> None:
    sample = read_ids(genuine / "full_scale" / "sample_submission.csv")
    assert len(sample) == 57_458
    file = write_submission(in_tmp, sample.tolist(), np.random.default_rng(0).random(57_458), {}, threshold=None)
    assert check_submission(file, sample.tolist()) == 57_458


def test_labels_of_full_size_are_read_as_they_are(genuine: Path) -> None:
    ids, label = read_labels(genuine / "full_scale" / "train_labels_partial.csv")
    assert len(ids) == 170_527
    assert set(np.unique(label)) == {0, 1}
    assert all(len(name) == 40 for name in ids[:1000])


def test_given_weights_fit_timms_architecture() -> None:
    folder = SHARED / "weights"
    if not (folder / "tf_efficientnet_lite0.safetensors").is_file():
        pytest.skip("no weights: shared/weights is not there")
    recipe = Recipe(backbone="tf_efficientnet_lite0", pretrained=True)
    loaded = build_network(recipe, Weights("folder", folder), seed=0).state_dict()
    fresh = build_network(recipe.model_copy(update={"pretrained": False}), Weights("none"), seed=0).state_dict()
    assert not torch.equal(loaded["conv_stem.weight"], fresh["conv_stem.weight"])
    assert torch.equal(loaded["classifier.weight"], fresh["classifier.weight"])
