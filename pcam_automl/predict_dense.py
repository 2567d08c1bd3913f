"""Tumour maps from a bundle of task dense: for image files, and epoch by epoch for one image. Trains nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pcam_automl.batches import open_masks, open_patches
from pcam_automl.bundle import ModelBundle
from pcam_automl.data.images import PatchFault, read_patch
from pcam_automl.data.store import PatchStore
from pcam_automl.data.tables import repeated
from pcam_automl.errors import BundleError, DataError, first_few
from pcam_automl.files import written_whole
from pcam_automl.scores import Scores
from pcam_automl.training.compute import Compute
from pcam_automl.training.dense import DenseTask, MapViews, always_negative_accuracy, logit_maps
from pcam_automl.training.task import Score, TrainingData

_STRIP_PX = 256  # a tile of the strip is at most this large
_GAP_PX = 4
_PASS_PIXELS = 1 << 18  # images that are judged together: 28 patches of 96 px, 2.5 times as fast as one at a time
_NOT_SEEN = 128  # grey: an epoch whose decision was not kept

Grey = NDArray[np.uint8]


@dataclass(frozen=True)
class MapPredictor:
    """A bundle's network, placed on a device.

    Attributes:
        bundle: recipe and normalisation.
        network: in evaluation mode.
        compute: device, precision, layout.
        views: tile size and what is averaged.
    """

    bundle: ModelBundle
    network: nn.Module
    compute: Compute
    views: MapViews

    def probs(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Probabilities (B, H, W) of tumour for images (B, H, W, 3) uint8 of any one size; reflected where they are smaller
        than a tile.
        """
        _, height, width, _ = images.shape
        short = [(0, max(0, self.views.tile_size - side)) for side in (height, width)]
        padded = np.pad(images, ((0, 0), *short, (0, 0)), mode="symmetric")
        batch = torch.from_numpy(padded).to(self.compute.device).permute(0, 3, 1, 2)
        logits = logit_maps(self.network, batch, self.views, self.compute)[:, :height, :width]
        return np.asarray(torch.sigmoid(logits).cpu().numpy())


def build_map_predictor(bundle: ModelBundle, compute: Compute, *, all_views: bool | None = None) -> MapPredictor:
    """Place the bundle's network on the device.

    Args:
        bundle: of a recipe of task dense.
        compute: device, precision, layout.
        all_views: average eight flips and turns; None as the recipe's ``tta`` says.

    Raises:
        BundleError: the bundle gives one probability a patch.
    """
    recipe = bundle.recipe
    if recipe.task != "dense":
        raise BundleError(f"the bundle is of task {recipe.task} and makes no maps; give one of task dense")
    eight = recipe.tta == "dihedral" if all_views is None else all_views
    views = MapViews(recipe.network_px, bundle.normalisation, eight)
    return MapPredictor(bundle, compute.place(bundle.build()).eval(), compute, views)


def write_maps(
    predictor: MapPredictor,
    files: Sequence[Path],
    out: Path,
    *,
    threshold: float | None = None,
    stop: Callable[[], None] = lambda: None,
    progress: Callable[[int], None] = lambda n: None,
) -> tuple[int, list[str]]:
    """Write ``<out>/<stem>.png`` for each image: 8 bits, grey, 255 times the probability; images of one size that
    follow each other are judged together, a quarter of a megapixel at a time.

    Args:
        predictor: see :func:`build_map_predictor`.
        files: images with distinct stems (see :func:`pcam_automl.predict.list_images`), at most 2048 px a side.
        out: folder, made if need be; older maps of the same names are replaced.
        threshold: also write ``<stem>_mask.png``, 255 where the probability is at least this, in [0, 1].
        stop: called before each pass; raises to end early.
        progress: called with the number of images just done.

    Returns:
        How many maps were written, and the files that could not be read, each with its fault.

    Raises:
        DataError: a map would replace an image or another map, or ``out`` cannot be written.
    """
    _check_targets([file.stem for file in files], files, out, threshold)
    images = ((file.stem, file.name, read_patch(file)) for file in files)
    return _write_all(predictor, images, out, threshold, stop, progress)


def write_row_maps(
    predictor: MapPredictor,
    store: PatchStore,
    rows: NDArray[np.int64],
    out: Path,
    *,
    threshold: float | None = None,
    stop: Callable[[], None] = lambda: None,
    progress: Callable[[int], None] = lambda n: None,
) -> tuple[int, list[str]]:
    """As :func:`write_maps` for rows of a pack, named by their ids; images that could not be read when it was packed are
    left out and named.
    """
    _check_targets(store.ids[rows].tolist(), (), out, threshold)
    images = (
        (str(store.ids[row]), str(store.ids[row]), store.faults.get(row) or np.array(store.patches[row]))
        for row in rows.tolist()
    )
    return _write_all(predictor, images, out, threshold, stop, progress)


def _write_all(
    predictor: MapPredictor,
    images: Iterable[tuple[str, str, NDArray[np.uint8] | PatchFault | str]],
    out: Path,
    threshold: float | None,
    stop: Callable[[], None],
    progress: Callable[[int], None],
) -> tuple[int, list[str]]:
    """Maps of images (stem, name for people, pixels or fault), those of one size that follow each other in one pass."""
    faults, n_written = [], 0
    waiting: list[tuple[str, NDArray[np.uint8]]] = []

    def flush() -> None:
        nonlocal n_written
        if not waiting:
            return
        stop()
        for (stem, _), probs in zip(waiting, predictor.probs(np.stack([image for _, image in waiting])), strict=True):
            _write_map(out, stem, probs, threshold)
        n_written += len(waiting)
        progress(len(waiting))
        waiting.clear()

    for stem, name, image in images:
        if not isinstance(image, np.ndarray):
            faults.append(f"{name}: {image}")
            progress(1)
            continue
        if waiting and (
            image.shape != waiting[0][1].shape or (len(waiting) + 1) * image.shape[0] * image.shape[1] > _PASS_PIXELS
        ):
            flush()
        waiting.append((stem, image))
    flush()
    return n_written, faults


def score_maps(
    predictor: MapPredictor, store: PatchStore, rows: NDArray[np.int64], *, stop: Callable[[], None] = lambda: None
) -> tuple[Score, Scores]:
    """Figures of a bundle on rows of a pack with masks (a holdout, a test part), seen as the predictor sees them.

    Raises:
        DataError: the pack has no masks, or those of the rows are all of one value.
    """
    device = torch.device(predictor.compute.device)
    data = TrainingData(
        open_patches(store, device),
        np.asarray(store.label),
        rows[:0],
        rows,
        predictor.views.normalisation,
        open_masks(store, device),
    )
    task = DenseTask(predictor.bundle.recipe, data, predictor.compute, key=0)
    task.views = predictor.views
    return task.score(predictor.network, stop)


def figures_on_test(
    predictor: MapPredictor, store: PatchStore, *, stop: Callable[[], None] = lambda: None
) -> tuple[dict[str, float | int | None], list[str]]:
    """Figures of the test images that came with masks, beside the network that never sees tumour; and why there are none.

    Returns:
        n, dice, accuracy, always_negative_accuracy, auc and loss (empty if no test image has a mask), and notes.
    """
    rows = [row for row in store.test_rows().tolist() if store.label[row] >= 0 and row not in store.faults]
    if store.masks is None or not rows:
        return {}, []
    known = np.array(rows, np.int64)
    try:
        score, _ = score_maps(predictor, store, known, stop=stop)
    except DataError as fault:  # masks of one value: the maps are good, a figure there cannot be
        return {}, [f"the test images are not scored: {fault}"]
    figures = {"n": len(known), "dice": score.dice, "accuracy": score.accuracy, "auc": score.auc, "loss": score.loss}
    return {**figures, "always_negative_accuracy": always_negative_accuracy(store, known)}, []


def _write_map(out: Path, name: str, probs: NDArray[np.float32], threshold: float | None) -> None:
    _write_png(out / f"{name}.png", np.rint(probs * 255).astype(np.uint8))
    if threshold is not None:
        _write_png(out / f"{name}_mask.png", (probs >= threshold).astype(np.uint8) * np.uint8(255))


def _check_targets(stems: Sequence[str], files: Sequence[Path], out: Path, threshold: float | None) -> None:
    if threshold is not None and not 0.0 <= threshold <= 1.0:
        raise DataError(f"--threshold must be in [0, 1], got {threshold}")
    if out.exists() and not out.is_dir():
        raise DataError(f"--out {out} is a file; maps are written into a folder, one PNG an image")
    names = [f"{stem}.png" for stem in stems]
    if threshold is not None:
        names += [f"{stem}_mask.png" for stem in stems]
    if twice := repeated(names):
        raise DataError(f"{len(twice)} maps would have the name of another ({first_few(twice)}); rename the images")
    inputs = {file.resolve() for file in files}
    if own := [name for name in names if (out / name).resolve() in inputs]:
        raise DataError(
            f"--out {out}: {len(own)} maps would replace the images ({first_few(own)}); choose another folder"
        )


def _write_png(path: Path, pixels: NDArray[np.uint8]) -> None:
    from PIL import Image

    with written_whole(path) as partial, partial.open("wb") as file:
        Image.fromarray(pixels).save(file, format="PNG")


def half_full_row(task: DenseTask, rows: np.ndarray) -> int:
    """The row whose mask is nearest to half tumour, the first of equals: the one most worth looking at."""
    share = np.concatenate(
        [
            task.masks.gather(rows[first : first + 64]).float().mean(dim=(1, 2, 3)).cpu().numpy()
            for first in range(0, len(rows), 64)
        ]
    )
    return int(rows[np.argmin(np.abs(share - 0.5))])


def decision_strip(image: NDArray[np.uint8], truth: Grey, decisions: Sequence[Grey]) -> NDArray[np.uint8]:
    """Original, truth, then one black-and-white tile an epoch, side by side: (h, w, 3) uint8, at most 256 px high.

    Args:
        image: (H, W, 3) uint8.
        truth: (H, W) 0 or 255.
        decisions: (H, W) or already as small as the strip's tiles, 0 or 255.
    """
    from PIL import Image

    height, width = truth.shape
    scale = min(1.0, _STRIP_PX / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    tiles = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))]
    for mask in (truth, *decisions):
        small = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
        tiles.append(np.repeat(small[..., None], 3, axis=2))
    gap = np.full((size[1], _GAP_PX, 3), 255, np.uint8)
    return np.concatenate([part for tile in tiles for part in (tile, gap)][:-1], axis=1)


class StripRecorder:
    """The strip of one image as a PNG that grows by one tile an epoch. The file is the whole state, so that a training
    that is resumed goes on with it.

    Args:
        task: of the training.
        path: the PNG.
        row: store row of the image; None is the scoring row whose mask is nearest to half tumour.

    Raises:
        DataError: no row is given and there are none to score on.
    """

    def __init__(self, task: DenseTask, path: Path, row: int | None = None) -> None:
        if row is None and not len(task.data.score_rows):
            raise DataError("the strip of decisions needs a row, or rows to score on")
        self.task, self.path = task, path
        self.row = half_full_row(task, task.data.score_rows) if row is None else row
        rows = np.array([self.row])
        self._image: Grey = task.data.patches.gather(rows)[0].permute(1, 2, 0).cpu().numpy()
        self._truth: Grey = task.masks.gather(rows)[0, 0].cpu().numpy() * np.uint8(255)

    def add(self, network: nn.Module, epoch: int) -> None:
        """Judge the image and write the strip with this decision as tile ``epoch``.

        Args:
            network: in evaluation mode with the weights to show, on the task's device.
            epoch: from 0; later tiles of an older strip are dropped, missing earlier ones are grey.
        """
        _, logits, _ = next(self.task.maps_of(network, np.array([self.row])))
        decision = (logits[0] >= 0).cpu().numpy().astype(np.uint8) * np.uint8(255)
        before = self._kept()[:epoch]
        missing = np.full(self._truth.shape, _NOT_SEEN, np.uint8)
        before += [missing] * (epoch - len(before))
        _write_png(self.path, decision_strip(self._image, self._truth, [*before, decision]))

    def _kept(self) -> list[Grey]:
        """The decisions in the file, if it is a strip of this image."""
        from PIL import Image

        if not self.path.is_file():
            return []
        bare = decision_strip(self._image, self._truth, [])
        try:
            with Image.open(self.path, formats=("PNG",)) as file:
                strip = np.asarray(file.convert("RGB"))
        except OSError:  # not a picture: begun anew, as if there were none
            return []
        if strip.shape[0] != bare.shape[0] or not np.array_equal(strip[:, : bare.shape[1]], bare):
            return []
        step = (bare.shape[1] + _GAP_PX) // 2
        tiles = [strip[:, left : left + step - _GAP_PX, 0] for left in range(2 * step, strip.shape[1], step)]
        return [np.ascontiguousarray(tile) for tile in tiles]
