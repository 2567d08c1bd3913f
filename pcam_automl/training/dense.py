"""Task dense: tiles with their masks, one logit a pixel, and how maps are put together and scored. Takes no step.

Legend: B images, H and W their sides, px the side of a tile, T tiles of an image.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pcam_automl.augment import augment_pair, augment_spec, draw, eight_views
from pcam_automl.batches import Patches, in_batches
from pcam_automl.calibration import probs_at
from pcam_automl.colour import normalised
from pcam_automl.counter import key_of
from pcam_automl.data.store import PatchStore
from pcam_automl.errors import DataError, TrainingDiverged
from pcam_automl.metrics import Confusion, accuracy_of, auc, dice_of
from pcam_automl.models.factory import Normalisation, logit_of
from pcam_automl.recipe import Recipe
from pcam_automl.scores import Scores
from pcam_automl.training.compute import Compute
from pcam_automl.training.scoring import unless_out_of_memory
from pcam_automl.training.task import Score, TrainingData

N_SCORED_PIXELS = 200_000
"""The AUC is exact over this many pixels at most; loss, accuracy and Dice are over all."""
_BATCH_PIXELS = 1 << 20  # of images whose maps are in memory at a time: 12 MB of float32 pixels, 113 patches of 96 px
_TILE_PIXELS = 1 << 20  # a pass of the network


@dataclass(frozen=True)
class MapViews:
    """How an image is shown to a network that maps it.

    Attributes:
        tile_size: side in px of what the network sees, a multiple of 16.
        normalisation: channel means and deviations.
        eight: average the eight flips and turns of every tile, each undone on its map.
    """

    tile_size: int
    normalisation: Normalisation
    eight: bool = False


def tile_starts(side: int, tile: int) -> list[int]:
    """Where tiles begin along a side: evenly spaced from end to end, overlapping by a quarter of a tile or more."""
    if side <= tile:
        return [0]
    n = int(np.ceil((side - tile) / (0.75 * tile))) + 1
    return [round(place * (side - tile) / (n - 1)) for place in range(n)]


@torch.inference_mode()
def logit_maps(network: nn.Module, images: Tensor, views: MapViews, compute: Compute) -> Tensor:
    """Logits (B, H, W) float32 on the device for images (B, 3, H, W) uint8, H and W at least a tile.

    The image is covered by tiles without gaps; where they overlap the logits are averaged.
    """
    norm, tile = views.normalisation, views.tile_size
    x = normalised(images.to(torch.float32, memory_format=torch.contiguous_format), norm.mean, norm.std, torch.float32)
    total, count = torch.zeros_like(x[:, 0]), torch.zeros_like(x[:1, 0])
    n_images = max(1, _TILE_PIXELS // tile**2)  # fewer where memory is short

    def of_tiles(tiles: Tensor) -> Tensor:
        return _tile_logits(network, tiles, views.eight, compute)

    for top in tile_starts(x.shape[2], tile):
        for left in tile_starts(x.shape[3], tile):
            here = (..., slice(top, top + tile), slice(left, left + tile))
            first = 0
            while first < len(x):
                tiles = x[first : first + n_images][here]
                answer = unless_out_of_memory(of_tiles, tiles, len(tiles), least=1)
                if answer is None:
                    n_images = len(tiles) // 2
                    continue
                total[first : first + len(tiles)][here] += answer
                first += len(tiles)
            count[here] += 1
    return total / count


def _tile_logits(network: nn.Module, tiles: Tensor, eight: bool, compute: Compute) -> Tensor:
    """Logits (B, px, px) of normalised tiles (B, 3, px, px), averaged over the views."""
    if not eight:
        with compute.autocast():
            return logit_of(network(compute.layout(tiles))).float()
    total = torch.zeros_like(tiles[:, 0])
    for number, view in enumerate(eight_views(tiles)):
        with compute.autocast():
            answer = logit_of(network(compute.layout(view))).float()
        total += _undone(answer, number)
    return total / 8


def _undone(maps: Tensor, number: int) -> Tensor:
    """Maps (B, px, px) of the view ``number`` of :func:`~pcam_automl.augment.eight_views`, turned back."""
    dims = [dim for bit, dim in ((1, -1), (2, -2)) if number & bit]
    flipped = maps.flip(dims) if dims else maps
    return flipped.transpose(-2, -1) if number & 4 else flipped


def always_negative_accuracy(store: PatchStore, rows: np.ndarray) -> float:
    """Pixel accuracy on store rows of a network that never sees tumour: the baseline of a dense task.

    Raises:
        DataError: no masks or no rows.
    """
    if store.masks is None or not len(rows):
        raise DataError(f"the always-negative baseline needs masks and at least one image, got {len(rows)} images")
    n_positive = sum(int(np.count_nonzero(store.masks[row])) for row in rows)
    return float(1.0 - n_positive / (len(rows) * store.masks.shape[1] * store.masks.shape[2]))


class PixelSample:
    """A fixed draw of at most ``N_SCORED_PIXELS`` pixels, as many of each image; a pure function of key and rows.

    Args:
        masks: of the store.
        rows: (m,) store rows, at least one.
        key: of the draw.
    """

    def __init__(self, masks: Patches, rows: np.ndarray, key: int) -> None:
        self.rows = rows[:N_SCORED_PIXELS]  # of more images than that, the first ones
        self._key, labels = key, []
        self._each = 0
        for batch in in_batches(self.rows, 64):
            truth = masks.gather(batch).flatten(1).cpu()  # (B, H * W)
            self._each = self._each or min(truth.shape[1], N_SCORED_PIXELS // len(self.rows))
            labels.append(truth.gather(1, self.pixels_of(batch, truth.shape[1])))
        self.label: NDArray[np.int64] = torch.cat(labels).flatten().numpy().astype(np.int64)
        """(n,) 0 or 1, the pixels of one row after those of another."""

    @property
    def n_each(self) -> int:
        """Pixels drawn of each image."""
        return self._each

    def pixels_of(self, rows: np.ndarray, n_pixels: int) -> Tensor:
        """(B, n_each) int64 places among the ``n_pixels`` of each row, ascending."""
        if self._each == n_pixels:
            return torch.arange(n_pixels).expand(len(rows), -1)
        drawn = [
            np.random.Generator(np.random.Philox(key=key_of(self._key, "pixels", int(row)))).choice(
                n_pixels, self._each, replace=False, shuffle=False
            )
            for row in rows
        ]
        return torch.from_numpy(np.sort(np.stack(drawn), axis=1).astype(np.int64))


class DenseTask:
    """One logit a pixel, binary cross-entropy, scored on whole images.

    Raises:
        DataError: the data have no masks, or the masks to score on are all of one value.
    """

    def __init__(self, recipe: Recipe, data: TrainingData, compute: Compute, key: int) -> None:
        if data.masks is None:
            raise DataError("task dense needs masks, got data without them")
        self.recipe, self.data, self.compute, self.key = recipe, data, compute, key
        self.masks = data.masks
        self.views = MapViews(recipe.network_px, data.normalisation)
        self._spec = augment_spec(recipe)
        self._sample: PixelSample | None = None
        if len(data.score_rows):
            self._sample = PixelSample(data.masks, data.score_rows, key_of(0, "scored pixels"))
            if (n_positive := int(self._sample.label.sum())) in (0, len(self._sample.label)):
                what = "no tumour" if n_positive == 0 else "nothing but tumour"
                trains = len(data.train_rows) > 0
                raise DataError(
                    f"the masks of the {len(data.score_rows)} {'validation ' * trains}images hold {what}, so a map cannot be scored"
                    + "; choose another --fold or --seed, or add images" * trains
                )

    def expect(self, rows: np.ndarray) -> None:
        """Announce the rows of the next :meth:`batch`."""
        self.data.patches.expect(rows)
        self.masks.expect(rows)

    def batch(self, rows: np.ndarray, views: np.ndarray) -> tuple[Tensor, Tensor]:
        """Augmented tiles (B, 3, px, px) float32 and their masks (B, px, px) float32 of 0 and 1, on the device."""
        norm = self.data.normalisation
        return augment_pair(
            self.data.patches.gather(rows),
            self.masks.gather(rows),
            draw(self._spec, self.key, views),
            self._spec,
            norm.mean,
            norm.std,
            dtype=torch.float32,
        )

    def maps_of(self, network: nn.Module, rows: np.ndarray) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
        """Some store rows at a time: their numbers, logits (B, H, W) float32 and masks (B, H, W) uint8, on the device."""
        side = self.masks.gather(rows[:1]).shape[2:]
        batches = list(in_batches(rows, max(1, _BATCH_PIXELS // (side[0] * side[1]))))
        for batch, following in itertools.zip_longest(batches, batches[1:]):
            images, masks = self.data.patches.gather(batch), self.masks.gather(batch)[:, 0]
            if following is not None:
                self.expect(following)
            yield batch, logit_maps(network, images, self.views, self.compute), masks

    @torch.inference_mode()
    def score(self, network: nn.Module, stop: Callable[[], None]) -> tuple[Score, Scores]:
        """Log-loss, accuracy and Dice at 0.5 over every pixel; AUC and the scores over the sampled ones.

        Raises:
            TrainingDiverged: an output is not finite.
            DataError: there are no rows to score on.
        """
        if self._sample is None:
            raise DataError("a score needs validation images, got none")
        loss, n_pixels, sampled = torch.zeros((), dtype=torch.float64, device=self.compute.device), 0, []
        counts = torch.zeros(4, dtype=torch.int64, device=self.compute.device)
        n_images = 0
        for rows, logits, truth in self.maps_of(network, self.data.score_rows):
            stop()
            loss += F.binary_cross_entropy_with_logits(logits, truth.float(), reduction="sum").double()
            counts += torch.bincount((truth * 2 + (logits >= 0)).flatten().long(), minlength=4)
            n_pixels += truth.numel()
            of_sample = rows[: max(0, len(self._sample.rows) - n_images)]
            n_images += len(rows)
            if len(of_sample):
                at = self._sample.pixels_of(of_sample, truth[0].numel()).to(logits.device)
                sampled.append(logits[: len(of_sample)].flatten(1).gather(1, at).flatten())
        answers = torch.cat(sampled).cpu().numpy()
        if not (bool(torch.isfinite(loss)) and np.isfinite(answers).all()):
            raise TrainingDiverged("the network's outputs on the validation images are not finite")
        return self._figures(answers, float(loss) / n_pixels, Confusion(*counts.tolist()))

    def _figures(self, answers: np.ndarray, loss: float, counts: Confusion) -> tuple[Score, Scores]:
        assert self._sample is not None
        probs, label = probs_at(answers), self._sample.label
        images = f"{len(self.data.score_rows):,} validation images"
        scores = Scores(
            np.repeat(self._sample.rows, self._sample.n_each), label, probs, f"{len(label):,} px of {images}"
        )
        return Score(auc(label, probs), loss, accuracy_of(counts), dice_of(counts)), scores
