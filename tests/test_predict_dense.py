"""Maps of image files and the strip of decisions that grows with the epochs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pcam_automl import predict_dense
from pcam_automl.batches import ResidentPatches
from pcam_automl.bundle import ModelBundle
from pcam_automl.data.pack import pack
from pcam_automl.data.sources import open_source
from pcam_automl.data.store import PatchStore
from pcam_automl.errors import BundleError, DataError, Interrupted
from pcam_automl.models.factory import Normalisation, build_network
from pcam_automl.models.weights import Weights
from pcam_automl.predict_dense import (
    MapPredictor,
    StripRecorder,
    build_map_predictor,
    decision_strip,
    figures_on_test,
    half_full_row,
    score_maps,
    write_maps,
    write_row_maps,
)
from pcam_automl.recipe import Recipe
from pcam_automl.training.compute import Compute
from pcam_automl.training.dense import DenseTask, MapViews
from pcam_automl.training.task import TrainingData

CPU = torch.device("cpu")
UNIT = Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
RECIPE = Recipe(task="dense", backbone="unet", cnn_filters=(4, 8), tile_size=32, normalise="unit")


class RedNetwork(nn.Module):
    """Probability near 1 where red is bright."""

    def __init__(self, sign: float = 1.0) -> None:
        super().__init__()
        self.sign = sign

    def forward(self, x: Tensor) -> Tensor:
        return self.sign * (x[:, :1] * 20 - 10)


def bundle_of(recipe: Recipe = RECIPE) -> ModelBundle:
    state = build_network(recipe, Weights("none"), seed=1).state_dict()
    return ModelBundle(recipe, UNIT, dict(state), {}, {})


@pytest.fixture
def red() -> MapPredictor:
    return MapPredictor(bundle_of(), RedNetwork(), Compute("cpu"), MapViews(32, UNIT, eight=True))


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path: Path, image: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return path


def one(predictor: MapPredictor, image: np.ndarray) -> np.ndarray:
    return predictor.probs(image[None])[0]


@pytest.mark.parametrize("size", [(32, 32), (100, 45), (20, 70), (5, 3), (64, 64)])
def test_a_map_is_as_large_as_its_image_and_right_at_every_pixel(size: tuple[int, int], red: MapPredictor) -> None:
    image = picture(*size)
    probs = one(red, image)
    want = 1 / (1 + np.exp(-(image[..., 0] / 255 * 20 - 10)))
    assert probs.shape == size
    np.testing.assert_allclose(probs, want, atol=1e-4)


def test_a_bundles_map_turns_with_the_image_when_all_views_are_averaged() -> None:
    predictor = build_map_predictor(bundle_of(), Compute("cpu"))
    assert predictor.views.eight  # tta: dihedral is the recipe's
    image = picture(32, 32)
    np.testing.assert_allclose(one(predictor, np.rot90(image).copy()), np.rot90(one(predictor, image)), atol=1e-5)
    assert not build_map_predictor(bundle_of(), Compute("cpu"), all_views=False).views.eight


def test_a_bundle_of_patches_makes_no_maps() -> None:
    recipe = Recipe(backbone="test_resnet", crop_size=32)
    with pytest.raises(BundleError, match="the bundle is of task patch and makes no maps"):
        build_map_predictor(bundle_of(recipe), Compute("cpu"))


def test_maps_and_masks_are_written_for_readable_images_and_the_others_named(red: MapPredictor, tmp_path: Path) -> None:
    files = [save(tmp_path / "in" / f"{name}.png", picture(40, 50, seed)) for seed, name in enumerate("ab")]
    (tmp_path / "in" / "c.png").write_bytes(b"no picture")
    done: list[int] = []
    n, faults = write_maps(
        red, [*files, tmp_path / "in" / "c.png"], tmp_path / "out", threshold=0.5, progress=done.append
    )
    assert n == 2
    assert done == [1, 2]  # the broken one, then both others in one pass
    assert [fault.split(":")[0] for fault in faults] == ["c.png"]
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == ["a.png", "a_mask.png", "b.png", "b_mask.png"]
    with Image.open(tmp_path / "out" / "a.png") as file:
        assert file.mode == "L"
        grey = np.asarray(file)
    assert np.array_equal(grey, np.rint(one(red, picture(40, 50, 0)) * 255).astype(np.uint8))
    with Image.open(tmp_path / "out" / "a_mask.png") as file:
        mask = np.asarray(file)
    assert np.array_equal(mask == 255, one(red, picture(40, 50, 0)) >= 0.5)
    assert set(np.unique(mask)) == {0, 255}


def test_images_of_several_sizes_are_judged_as_one_at_a_time(
    red: MapPredictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict_dense, "_PASS_PIXELS", 40 * 40 * 2)
    sizes = [(40, 40), (40, 40), (40, 40), (36, 44), (40, 40), (100, 90)]
    files = [save(tmp_path / "in" / f"{seed}.png", picture(*size, seed)) for seed, size in enumerate(sizes)]
    done: list[int] = []
    assert write_maps(red, files, tmp_path / "out", progress=done.append) == (6, [])
    assert done == [2, 1, 1, 1, 1]
    for seed, size in enumerate(sizes):
        with Image.open(tmp_path / "out" / f"{seed}.png") as file:
            assert np.array_equal(np.asarray(file), np.rint(one(red, picture(*size, seed)) * 255).astype(np.uint8))


def test_without_a_threshold_there_is_one_file_an_image(red: MapPredictor, tmp_path: Path) -> None:
    write_maps(red, [save(tmp_path / "in" / "a.tif", picture(32, 32))], tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["a.png"]


def test_maps_never_replace_images_or_each_other(red: MapPredictor, tmp_path: Path) -> None:
    a, b = save(tmp_path / "in" / "a.png", picture(32, 32)), save(tmp_path / "in" / "a_mask.png", picture(32, 32))
    before = a.read_bytes()
    with pytest.raises(DataError, match=r"2 maps would replace the images \(a.png, a_mask.png\)"):
        write_maps(red, [a, b], tmp_path / "in")
    with pytest.raises(DataError, match=r"1 maps would have the name of another \(a_mask.png\)"):
        write_maps(red, [a, b], tmp_path / "out", threshold=0.5)
    with pytest.raises(DataError, match=r"threshold must be in \[0, 1\], got 2"):
        write_maps(red, [a], tmp_path / "out", threshold=2)
    with pytest.raises(DataError, match="is a file; maps are written into a folder"):
        write_maps(red, [a], a)
    assert a.read_bytes() == before
    assert not (tmp_path / "out").exists()


def test_stopping_keeps_the_maps_written_so_far(
    red: MapPredictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict_dense, "_PASS_PIXELS", 32 * 32)
    files = [save(tmp_path / "in" / f"{name}.png", picture(32, 32)) for name in "abc"]
    left = [2]

    def stop() -> None:
        if not left[0]:
            raise Interrupted("stopped", 2)
        left[0] -= 1

    with pytest.raises(Interrupted):
        write_maps(red, files, tmp_path / "out", stop=stop)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["a.png", "b.png"]


@pytest.fixture
def task() -> DenseTask:
    """Images 0..5 of 40 px, n / 5 of each tumour; red is the mask; 2..5 to score on."""
    masks = np.zeros((6, 40, 40), np.uint8)
    for number, mask in enumerate(masks):
        mask[: number * 8] = 1
    images = np.zeros((6, 40, 40, 3), np.uint8)
    images[..., 0] = masks * 255
    data = TrainingData(
        ResidentPatches(torch.from_numpy(images), CPU),
        masks.any(axis=(1, 2)).astype(np.int8),
        np.arange(2),
        np.arange(2, 6),
        UNIT,
        ResidentPatches(torch.from_numpy(masks)[..., None], CPU),
    )
    return DenseTask(RECIPE, data, Compute("cpu"), key=1)


def tiles_of(path: Path) -> list[np.ndarray]:
    with Image.open(path) as file:
        strip = np.asarray(file)
    assert strip.shape[0] == 40
    return [strip[:, left : left + 40] for left in range(0, strip.shape[1], 44)]


def test_the_strip_grows_by_a_tile_an_epoch_and_shows_image_truth_and_decisions(
    task: DenseTask, tmp_path: Path
) -> None:
    strip = StripRecorder(task, tmp_path / "strip.png")
    assert strip.row == half_full_row(task, np.arange(2, 6)) == 2  # 16 of 40 rows: as near to half as 24, and first
    for epoch, sign in enumerate((-1.0, 1.0, 1.0)):
        strip.add(RedNetwork(sign), epoch)
        assert len(tiles_of(tmp_path / "strip.png")) == 3 + epoch
    image, truth, first, second, third = tiles_of(tmp_path / "strip.png")
    assert np.array_equal(image[..., 0], truth[..., 0])
    assert np.array_equal(255 - first, truth)
    assert np.array_equal(second, truth)
    assert np.array_equal(third, truth)


def test_a_resumed_training_goes_on_with_its_strip(task: DenseTask, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole.png", tmp_path / "parts.png"
    for epoch, sign in enumerate((-1.0, 1.0, -1.0)):
        StripRecorder(task, whole).add(RedNetwork(sign), epoch)
    StripRecorder(task, parts).add(RedNetwork(-1.0), 0)
    StripRecorder(task, parts).add(RedNetwork(1.0), 1)
    StripRecorder(task, parts).add(RedNetwork(1.0), 2)
    StripRecorder(task, parts).add(RedNetwork(-1.0), 2)  # an epoch that is repeated takes its own place
    assert whole.read_bytes() == parts.read_bytes()


def test_foreign_files_are_begun_anew_and_missing_epochs_are_grey(task: DenseTask, tmp_path: Path) -> None:
    path = tmp_path / "strip.png"
    for content in (picture(40, 172), picture(10, 10)):
        save(path, content)
        StripRecorder(task, path, row=3).add(RedNetwork(), 1)
        tiles = tiles_of(path)
        assert len(tiles) == 4
        assert (tiles[2] == 128).all()
        assert np.array_equal(tiles[3], tiles[1])
    path.write_bytes(b"no picture")
    StripRecorder(task, path, row=3).add(RedNetwork(), 0)
    assert len(tiles_of(path)) == 3


def test_large_images_are_shown_small() -> None:
    strip = decision_strip(picture(600, 300), np.zeros((600, 300), np.uint8), [np.zeros((600, 300), np.uint8)])
    assert strip.shape == (256, 3 * 128 + 2 * 4, 3)


def test_a_strip_of_a_training_without_validation_needs_a_row(task: DenseTask, tmp_path: Path) -> None:
    bare = DenseTask(
        RECIPE,
        TrainingData(task.data.patches, task.data.label, np.arange(6), np.arange(0), UNIT, task.masks),
        Compute("cpu"),
        key=1,
    )
    with pytest.raises(DataError, match="needs a row"):
        StripRecorder(bare, tmp_path / "strip.png")
    StripRecorder(bare, tmp_path / "strip.png", row=4).add(RedNetwork(), 0)
    assert len(tiles_of(tmp_path / "strip.png")) == 3


def packed_pairs(root: Path, *, truth: np.ndarray | None = None) -> PatchStore:
    """Four images of 40 px whose red channel is the mask, and two test images, one of them broken; ``truth`` is the other's mask."""
    if truth is not None:
        for name in ("u0", "u1"):
            save(root / "raw" / "outputs_test" / f"{name}.png", truth)
    for number in range(4):
        mask = np.zeros((40, 40), np.uint8)
        mask[: 10 * number] = 255
        image = picture(40, 40, number)
        image[..., 0] = mask
        save(root / "raw" / "inputs_train" / f"t{number}.png", image)
        save(root / "raw" / "outputs_train" / f"t{number}.png", mask)
    save(root / "raw" / "inputs_test" / "u0.png", picture(40, 40, 9))
    (root / "raw" / "inputs_test" / "u1.png").write_bytes(b"no picture")
    return pack(open_source(root / "raw"), root / "pack")


def test_rows_of_a_pack_are_mapped_and_scored_as_files_are(red: MapPredictor, tmp_path: Path) -> None:
    store = packed_pairs(tmp_path)
    n, faults = write_row_maps(red, store, store.test_rows(), tmp_path / "out")
    assert n == 1
    assert [fault.split(":")[0] for fault in faults] == ["u1"]
    with Image.open(tmp_path / "out" / "u0.png") as file:
        assert np.array_equal(np.asarray(file), np.rint(one(red, picture(40, 40, 9)) * 255).astype(np.uint8))
    score, scores = score_maps(red, store, store.development_rows())
    assert score.auc == score.dice == score.accuracy == 1.0
    assert set(scores.rows.tolist()) == {0, 1, 2, 3}


def test_test_images_with_masks_are_scored_and_those_without_are_not(red: MapPredictor, tmp_path: Path) -> None:
    assert figures_on_test(red, packed_pairs(tmp_path / "none")) == ({}, [])
    truth = np.zeros((40, 40), np.uint8)
    truth[:10] = 255
    store = packed_pairs(tmp_path / "some", truth=truth)
    figures, notes = figures_on_test(red, store)
    assert notes == []
    assert figures["n"] == 1  # the broken one is left out
    assert figures["always_negative_accuracy"] == 0.75
    decided = one(red, picture(40, 40, 9)) >= 0.5
    assert figures["accuracy"] == pytest.approx((decided == (truth > 0)).mean())
    _, notes = figures_on_test(red, packed_pairs(tmp_path / "empty", truth=np.zeros_like(truth)))
    assert "not scored" in notes[0]
    assert "the masks of the 1 images hold no tumour" in notes[0]
    assert "--fold" not in notes[0], "no other one would change the test part"
