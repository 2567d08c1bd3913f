"""Task dense: batches, maps of whole images, figures over pixels. On tiny networks and images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pcam_automl.training.dense as dense
from pcam_automl.batches import ResidentPatches, open_masks, open_patches
from pcam_automl.data.pack import pack
from pcam_automl.data.sources import open_source
from pcam_automl.data.splits import make_split
from pcam_automl.data.store import PatchStore, open_store
from pcam_automl.data.synthetic import write_synthetic
from pcam_automl.errors import DataError, Interrupted, RecipeError, TrainingDiverged
from pcam_automl.metrics import accuracy, auc, dice, log_loss
from pcam_automl.models.factory import Normalisation
from pcam_automl.models.weights import Weights
from pcam_automl.recipe import Recipe, build_recipe
from pcam_automl.training.compute import Compute
from pcam_automl.training.dense import (
    DenseTask,
    MapViews,
    PixelSample,
    always_negative_accuracy,
    logit_maps,
    tile_starts,
)
from pcam_automl.training.engine import Rung
from pcam_automl.training.fit import fit
from pcam_automl.training.start import check_task, choose_rows, start_training
from pcam_automl.training.task import TrainingData

CPU = torch.device("cpu")
UNIT = Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
RECIPE = Recipe(
    task="dense",
    backbone="unet",
    cnn_filters=(8, 16),
    tile_size=32,
    normalise="unit",
    batch_size=8,
    lr=5e-3,
    ema=0.0,
    schedule="constant",
    warmup=0.0,
    augment=0.5,
    weight_decay=0.0,
)


class RedNetwork(nn.Module):
    """The logit of a pixel is 8 times its red level less 4: a perfect network where red is the mask."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1] * 8 - 4


class EdgeNetwork(nn.Module):
    """Not the same under flips and turns, and sees the tile's border (zero padding)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(3, 1, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def blobs(n: int, height: int = 48, width: int = 48, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images whose red channel is 255 inside the mask, noise elsewhere below 60, and the masks."""
    rng = np.random.default_rng(seed)
    y, x = np.indices((height, width))
    masks = np.zeros((n, height, width), np.uint8)
    for mask in masks:
        cy, cx, radius = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(4, 20)
        mask[(y - cy) ** 2 + (x - cx) ** 2 < radius**2] = 1
    images = rng.integers(0, 60, (n, height, width, 3), dtype=np.uint8)
    images[..., 0][masks == 1] = 255
    return images, masks


def data_of(images: np.ndarray, masks: np.ndarray, n_train: int) -> TrainingData:
    rows = np.arange(len(images))
    label = masks.any(axis=(1, 2)).astype(np.int8)
    tensors = ResidentPatches(torch.from_numpy(images), CPU), ResidentPatches(torch.from_numpy(masks)[..., None], CPU)
    return TrainingData(tensors[0], label, rows[:n_train], rows[n_train:], UNIT, tensors[1])


def task_of(n: int = 12, n_train: int = 6, recipe: Recipe = RECIPE, **shape: int) -> DenseTask:
    return DenseTask(recipe, data_of(*blobs(n, **shape), n_train), Compute("cpu"), key=1)


def no_stop() -> None:
    return


@pytest.mark.parametrize(("side", "tile"), [(96, 96), (64, 96), (97, 96), (512, 96), (100, 16), (1000, 512)])
def test_tiles_cover_a_side_without_gaps_and_overlap(side: int, tile: int) -> None:
    starts = tile_starts(side, tile)
    assert starts[0] == 0
    if side > tile:
        assert starts[-1] + tile == side
        assert max(np.diff(starts)) <= np.ceil(0.75 * tile)
    covered = np.zeros(max(side, tile), bool)
    for start in starts:
        covered[start : start + tile] = True
    assert covered[:side].all()


def test_a_batch_is_tiles_and_their_masks() -> None:
    images, target = task_of().batch(np.array([0, 1, 2]), np.array([5, 6, 7]))
    assert images.shape == (3, 3, 32, 32)
    assert target.shape == (3, 32, 32)
    assert target.dtype == images.dtype == torch.float32
    assert set(target.unique().tolist()) <= {0.0, 1.0}


def test_a_pixelwise_network_gives_the_same_map_tiled_or_whole() -> None:
    images = torch.from_numpy(blobs(3, 80, 112)[0]).permute(0, 3, 1, 2)
    want = RedNetwork()(images / 255)[:, 0]
    for eight in (False, True):
        got = logit_maps(RedNetwork(), images, MapViews(32, UNIT, eight), Compute("cpu"))
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("room", [1, 2, 7])
def test_maps_of_what_does_not_fit_are_made_of_fewer_tiles_at_a_time(room: int) -> None:
    class Hungry(RedNetwork):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(x)

    images = torch.from_numpy(blobs(9, 48, 40)[0]).permute(0, 3, 1, 2)
    for eight in (False, True):
        views = MapViews(32, UNIT, eight)
        whole = logit_maps(RedNetwork(), images, views, Compute("cpu"))
        torch.testing.assert_close(logit_maps(Hungry(), images, views, Compute("cpu")), whole, atol=1e-5, rtol=0)
    room = 0
    with pytest.raises(torch.OutOfMemoryError):
        logit_maps(Hungry(), images, MapViews(32, UNIT), Compute("cpu"))


def test_overlaps_are_averaged() -> None:
    images, network = torch.from_numpy(blobs(2, 32, 40)[0]).permute(0, 3, 1, 2), EdgeNetwork()
    assert tile_starts(40, 32) == [0, 8]
    with torch.no_grad():
        left, right = (network(images[..., at : at + 32] / 255)[:, 0] for at in (0, 8))
    got = logit_maps(network, images, MapViews(32, UNIT), Compute("cpu"))
    torch.testing.assert_close(got[..., :8], left[..., :8])
    torch.testing.assert_close(got[..., 8:32], (left[..., 8:] + right[..., :24]) / 2)
    torch.testing.assert_close(got[..., 32:], right[..., 24:])


def test_eight_views_make_a_map_turn_with_its_image() -> None:
    images = torch.from_numpy(blobs(2)[0]).permute(0, 3, 1, 2)
    views, network = MapViews(48, UNIT, True), EdgeNetwork()
    plain = logit_maps(network, images, views, Compute("cpu"))
    turned = logit_maps(network, images.rot90(1, (2, 3)).flip(3), views, Compute("cpu"))
    torch.testing.assert_close(turned, plain.rot90(1, (1, 2)).flip(2), atol=1e-5, rtol=0)
    one = logit_maps(network, images, replace(views, eight=False), Compute("cpu"))
    assert not torch.allclose(one, plain, atol=1e-3)


def test_a_perfect_network_scores_perfectly() -> None:
    score, scores = task_of().score(RedNetwork(), no_stop)
    assert score.auc == score.accuracy == score.dice == 1.0
    assert score.loss < 0.05
    assert len(scores.label) == 6 * 48 * 48  # fewer than the limit: every pixel
    assert set(scores.rows.tolist()) == set(range(6, 12))


@pytest.mark.parametrize("limit", [200_000, 5_000])
def test_figures_are_those_of_the_whole_maps(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "N_SCORED_PIXELS", limit)
    monkeypatch.setattr(dense, "_BATCH_PIXELS", 2 * 48 * 64)  # two images at a time
    task, network = task_of(n=11, n_train=4, height=48, width=64), EdgeNetwork()
    score, scores = task.score(network, no_stop)
    rows = np.arange(4, 11)
    logits = logit_maps(network, task.data.patches.gather(rows), task.views, task.compute)
    probs, truth = torch.sigmoid(logits).numpy().ravel(), task.masks.gather(rows).numpy().ravel()
    assert score.loss == pytest.approx(log_loss(truth, probs), rel=1e-5)
    assert score.accuracy == pytest.approx(accuracy(truth, probs))
    assert score.dice == pytest.approx(dice(truth, probs))
    assert len(scores.label) == min(limit // 7, 48 * 64) * 7
    assert score.auc == auc(scores.label, scores.prob)
    if limit > truth.size:
        assert score.auc == pytest.approx(auc(truth, probs))
        assert np.array_equal(scores.label, truth)
    again, _ = task.score(network, no_stop)
    assert again == score


def test_the_pixel_sample_is_fixed_by_its_key_and_of_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "N_SCORED_PIXELS", 1000)
    masks, rows = ResidentPatches(torch.from_numpy(blobs(9)[1])[..., None], CPU), np.arange(2, 9)
    one, same, other = (PixelSample(masks, rows, key) for key in (1, 1, 2))
    places = one.pixels_of(rows, 48 * 48)
    assert places.shape == (7, 142)
    assert all(len(set(row.tolist())) == 142 for row in places)
    assert torch.equal(places, same.pixels_of(rows, 48 * 48))
    assert not torch.equal(places, other.pixels_of(rows, 48 * 48))
    assert torch.equal(places[3:], one.pixels_of(rows[3:], 48 * 48))  # a row's pixels are its own
    assert np.array_equal(one.label, masks.gather(rows).flatten(1).gather(1, places).flatten().numpy())


def test_scoring_can_be_stopped_and_diverged_outputs_are_told() -> None:
    task = task_of()

    def stop() -> None:
        raise Interrupted("stopped", 2)

    with pytest.raises(Interrupted):
        task.score(RedNetwork(), stop)

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :1] * float("nan")

    with pytest.raises(TrainingDiverged, match="not finite"):
        task.score(Broken(), no_stop)


@pytest.mark.parametrize(("value", "words"), [(0, "hold no tumour"), (1, "hold nothing but tumour")])
def test_masks_of_one_value_cannot_be_scored_on_and_are_refused_at_the_start(value: int, words: str) -> None:
    images, masks = blobs(6)
    masks[4:] = value
    with pytest.raises(DataError, match=words):
        DenseTask(RECIPE, data_of(images, masks, 4), Compute("cpu"), key=1)
    with pytest.raises(DataError, match="needs masks"):
        DenseTask(RECIPE, replace(data_of(images, masks, 6), masks=None), Compute("cpu"), key=1)


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> PatchStore:
    root = tmp_path_factory.mktemp("dense")
    write_synthetic(root / "raw", n_patches=100, n_slides=10, seed=1)
    return pack(open_source(root / "raw"), root / "pack")


def test_masks_are_opened_beside_the_patches(synthetic: PatchStore, easy_pack: Path) -> None:
    rows = np.array([5, 0, 7])
    masks = open_masks(synthetic, CPU).gather(rows)
    assert masks.shape == (3, 1, 96, 96)
    assert synthetic.masks is not None
    assert np.array_equal(masks[:, 0].numpy(), synthetic.masks[rows])
    assert open_patches(synthetic, CPU).gather(rows).shape == (3, 3, 96, 96)
    with pytest.raises(DataError, match="holds no masks"):
        open_masks(open_store(easy_pack), CPU)


def test_the_always_negative_baseline_is_the_share_of_negative_pixels(synthetic: PatchStore) -> None:
    rows = synthetic.development_rows()
    assert synthetic.masks is not None
    assert always_negative_accuracy(synthetic, rows) == pytest.approx(1 - synthetic.masks[rows].mean())
    with pytest.raises(DataError, match="at least one image, got 0"):
        always_negative_accuracy(synthetic, rows[:0])


def test_a_dense_recipe_trains_and_beats_its_start(synthetic: PatchStore) -> None:
    split = make_split(synthetic)
    recipe = RECIPE.model_copy(update={"tile_size": 64, "views": 160})
    check_task(recipe, synthetic)
    rows = choose_rows(synthetic, recipe, split.train_order(0), split.score_rows(0))
    training = start_training(
        recipe,
        synthetic,
        rows,
        patches=open_patches(synthetic, CPU),
        weights=Weights("none"),
        compute=Compute("cpu"),
        key=1,
    )
    before, _ = training.score()
    results = list(fit(training, rows.train, (Rung(80, len(rows.train)), Rung(160, len(rows.train)))))
    assert results[-1].loss is not None
    assert results[-1].loss < before.loss
    assert results[-1].dice is not None
    assert results[-1].auc is not None
    assert results[-1].accuracy is not None


def test_fields_that_mean_patches_are_refused(synthetic: PatchStore, easy_pack: Path) -> None:
    for fields, words in (
        ({"tta": "random"}, "recipe.tta must be dihedral or none for task dense"),
        ({"balance": "undersample"}, "recipe.balance belongs to task patch"),
        ({"tile_size": 112}, "recipe.tile_size must be at most the images' side of 96 px, got 112; set tile_size=96"),
    ):
        with pytest.raises(RecipeError, match=words):
            check_task(build_recipe({**RECIPE.model_dump(), **fields}), synthetic)
    with pytest.raises(RecipeError, match=r"recipe\.task is dense, but the data have no masks"):
        check_task(RECIPE, open_store(easy_pack))
