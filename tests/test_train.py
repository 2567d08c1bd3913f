"""One recipe to a bundle: what a repeated command goes on from, what it is validated on, and what the bundle records."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from easy_set import TINY

from pcam_automl import train as train_module
from pcam_automl.bundle import ModelBundle
from pcam_automl.data.pack import pack
from pcam_automl.data.sources import open_source
from pcam_automl.data.store import VALID, PatchStore, open_store
from pcam_automl.data.synthetic import write_synthetic
from pcam_automl.errors import DataError, Interrupted
from pcam_automl.models.weights import Weights
from pcam_automl.recipe import Recipe
from pcam_automl.train import TrainWatch, train_to_bundle, training_split
from pcam_automl.training import compute as compute_module
from pcam_automl.training.compute import Compute, device_name
from pcam_automl.training.dense import always_negative_accuracy
from pcam_automl.training.scoring import inference_precision
from pcam_automl.training.speed import SpeedBook

CPU = torch.device("cpu")
RECIPE = Recipe(backbone=TINY, crop_size=32, batch_size=16, epochs=2)


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SpeedBook:
    """Without timing of variants: plain float32."""
    monkeypatch.setattr(SpeedBook, "compute_for", lambda self, recipe, device, views=None: Compute(str(device)))
    return SpeedBook(tmp_path / "speed.json")


def trained(store: PatchStore, recipe: Recipe, fold: int, out: Path, book: SpeedBook, **watch: Any) -> ModelBundle:
    torch.set_num_threads(1)
    _, train_rows, score_rows, _ = training_split(store, recipe, seed=0, fold=fold)
    return train_to_bundle(
        recipe,
        store,
        train_rows=train_rows,
        score_rows=score_rows,
        weights=Weights("none"),
        device=CPU,
        speed=book,
        out=out,
        provenance={"fold": fold},
        watch=TrainWatch(**watch),
    ).bundle


def killed_after_an_epoch(store: PatchStore, fold: int, out: Path, book: SpeedBook) -> None:
    done: list[int] = []

    def stop() -> None:
        if done:
            raise Interrupted("stopped", 15)

    with pytest.raises(Interrupted):
        trained(store, RECIPE, fold, out, book, stop=stop, epoch=lambda result: done.append(result.rung))


@pytest.mark.parametrize("fold", [0, 1])
def test_a_killed_training_is_gone_on_from_only_with_the_same_rows(
    fold: int, easy_pack: Path, tmp_path: Path, book: SpeedBook
) -> None:
    store, notes = open_store(easy_pack), list[str]()
    killed_after_an_epoch(store, 0, tmp_path / "b", book)
    again = trained(store, RECIPE, fold, tmp_path / "b", book, note=notes.append)
    fresh = trained(store, RECIPE, fold, tmp_path / "fresh", book)
    assert [("another recipe, seed, fold, data or weights" in note) for note in notes] == ([] if fold == 0 else [True])
    assert all(torch.equal(again.state[name], fresh.state[name]) for name in fresh.state)


def test_a_bundle_records_the_side_of_its_patches_and_the_fold_it_is_validated_on(
    easy_pack: Path, tmp_path: Path, book: SpeedBook
) -> None:
    store = open_store(easy_pack)
    short = RECIPE.model_copy(update={"epochs": 0.2})
    by_fold = trained(store, short, 2, tmp_path / "a", book)
    by_share = trained(store, short.model_copy(update={"valid_share": 0.3}), 2, tmp_path / "b", book)
    assert (by_fold.provenance["patch_px"], by_fold.provenance["fold"]) == (96, 2)
    assert by_share.provenance["fold"] is None
    assert by_fold.metrics["auc_on"].endswith(" validation patches")


def test_a_bundle_that_nothing_unseen_judges_predicts_in_float32(
    easy_pack: Path, tmp_path: Path, book: SpeedBook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what it was trained on a network knows the answers in any precision: no drift would be seen there."""
    store, short, asked = open_store(easy_pack), RECIPE.model_copy(update={"epochs": 0.2}), list[np.ndarray]()

    def judged(network: object, patches: object, rows: np.ndarray, *_: object) -> tuple[str, float]:
        asked.append(rows)
        return ("bf16", 0.0) if len(rows) else inference_precision(network, patches, rows, *_)  # type: ignore[arg-type]

    monkeypatch.setattr("pcam_automl.train.inference_precision", judged)
    _, train_rows, score_rows, _ = training_split(store, short, seed=0, fold=0)
    none, found = np.zeros(0, np.int64), list[str]()
    for number, (score, held) in enumerate(((score_rows, None), (none, score_rows), (none, None))):
        bundle = train_to_bundle(
            short, store, train_rows=train_rows, score_rows=score, weights=Weights("none"), device=CPU, speed=book,
            out=tmp_path / str(number), provenance={}, judged_rows=held,
        ).bundle  # fmt: skip
        found.append(bundle.provenance["inference"]["precision"])
    assert found == ["bf16", "bf16", "fp32"]
    assert [set(rows) == set(score_rows) for rows in asked] == [True, True, False]
    assert len(asked[2]) == 0


def test_a_dense_bundle_has_its_baseline_and_an_interval_over_images(tmp_path: Path, book: SpeedBook) -> None:
    write_synthetic(tmp_path / "raw", n_patches=100, n_slides=10, seed=1)
    store = pack(open_source(tmp_path / "raw"), tmp_path / "pack")
    recipe = Recipe(task="dense", backbone="unet", cnn_filters=(4, 8), tile_size=32, batch_size=4, views=8)
    _, _, score_rows, _ = training_split(store, recipe, seed=0, fold=0)
    by_slide = trained(store, recipe, 0, tmp_path / "a", book).metrics
    slideless = replace(store, group=np.where(np.isin(np.arange(len(store)), score_rows), -1, store.group))
    _, train_rows, _, _ = training_split(store, recipe, seed=0, fold=0)
    by_image = train_to_bundle(
        recipe, slideless, train_rows=train_rows, score_rows=score_rows, weights=Weights("none"), device=CPU, speed=book,
        out=tmp_path / "b", provenance={},
    ).bundle.metrics  # fmt: skip
    assert by_slide["always_negative_accuracy"] == always_negative_accuracy(store, score_rows)
    assert by_slide["auc_on"].endswith(f"px of {len(score_rows)} validation images")
    width = by_image["auc_95"][1] - by_image["auc_95"][0]
    assert width > 0.01  # over the 200,000 pixels as if they were independent it would be a few thousandths
    assert by_image["auc"] == by_slide["auc"]


def test_an_official_validation_part_is_validated_on_and_never_trained_on(easy_pack: Path) -> None:
    store = open_store(easy_pack)
    recipe = RECIPE.model_copy(update={"valid_share": 0.2})
    rows = store.development_rows()
    official = rows[store.group[rows] < 3]
    part = store.part.copy()
    part[official] = VALID
    split, train_rows, score_rows, fold = training_split(replace(store, part=part), recipe, seed=0, fold=3)
    assert fold == 0
    assert set(score_rows) == set(official)
    assert not set(train_rows) & set(official)
    assert not len(split.holdout_rows())
    assert training_split(store, recipe, seed=0, fold=3)[3] is None


def test_a_share_too_small_for_both_labels_names_the_recipes_field(easy_pack: Path) -> None:
    store = open_store(easy_pack)
    group = np.arange(len(store), dtype=np.int32)
    label = np.where(store.label < 0, -1, (np.arange(len(store)) < 60)).astype(np.int8)
    one_by_one = replace(store, group=group, label=label, group_names=tuple(map(str, group)))
    with pytest.raises(DataError, match="choose a larger valid_share or none"):
        training_split(one_by_one, RECIPE.model_copy(update={"valid_share": 0.001}), seed=0, fold=0)


def test_a_share_needs_no_folds_of_what_it_leaves(easy_pack: Path) -> None:
    """Four slides with tumour: one is set aside, and three are too few for the five folds that nothing would use."""
    store = open_store(easy_pack)
    group = np.where(store.label == 1, np.arange(len(store)) % 4, 4 + np.arange(len(store)) % 4).astype(np.int32)
    few = replace(store, group=group, group_names=tuple("abcdefgh"))
    _, train_rows, score_rows, fold = training_split(
        few, RECIPE.model_copy(update={"valid_share": 0.25}), seed=0, fold=0
    )
    assert fold is None
    assert not set(few.group[train_rows]) & set(few.group[score_rows])
    assert set(few.label[score_rows]) == set(few.label[train_rows]) == {0, 1}


def test_a_training_that_moved_to_a_cpu_without_bf16_goes_on_in_float32(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe, cpu = Recipe(backbone="test_resnet", epochs=1.0), torch.device("cpu")
    compute = Compute("cpu", "bf16", True, 0.5).to_json()
    state = {"recipe": recipe.hash, "data": "d", "compute": compute, "device_name": device_name(cpu), "views": 10}
    monkeypatch.setattr(train_module, "newest_checkpoint", lambda folder: (0, {}, state))
    monkeypatch.setattr(compute_module, "has_precision", lambda device, precision: precision == "fp32")
    found = train_module._variant(recipe, cpu, SpeedBook(tmp_path / "speed.json"), tmp_path, "d", 100)
    assert (found.precision, found.channels_last) == ("fp32", True)
