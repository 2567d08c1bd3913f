"""Probabilities from a bundle, for rows of a pack or for image files. Writes no file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn

from pcam_automl.batches import Patches
from pcam_automl.bundle import ModelBundle
from pcam_automl.calibration import probs_at
from pcam_automl.data.images import IMAGE_SUFFIXES, PatchFault, read_patch
from pcam_automl.errors import DataError
from pcam_automl.training.compute import Compute, fixed_variant, has_precision
from pcam_automl.training.scoring import (
    EVAL_BATCH,
    Averaging,
    Views,
    logits_of_images,
    logits_of_rows,
    unless_out_of_memory,
)

Stop = Callable[[], None]
Progress = Callable[[int], None]


def _go_on() -> None:
    """Nobody asks to stop."""


def _untold(n: int) -> None:
    """Nobody watches."""


class Judge(Protocol):
    """What gives patches logits, averaged over views and not calibrated, and says at which temperature to read them.

    One network does, and several together (ensemble.py). :func:`row_probs` and :func:`image_probs` read them.
    """

    @property
    def temperature(self) -> float:
        """What logits are divided by before they become probabilities."""
        ...

    def row_logits(
        self, patches: Patches, rows: np.ndarray, stop: Stop = _go_on, progress: Progress = _untold
    ) -> np.ndarray:
        """Logits (n,) of store rows; ``progress`` is told of every batch of every network."""
        ...

    def image_logits(self, images: np.ndarray) -> np.ndarray:
        """Logits (B,) of patches (B, S, S, 3) uint8 of the side S that it was trained on."""
        ...


def row_probs(
    judge: Judge, patches: Patches, rows: np.ndarray, stop: Stop = _go_on, progress: Progress = _untold
) -> np.ndarray:
    """Probabilities (n,) of store rows."""
    return probs_at(judge.row_logits(patches, rows, stop, progress), judge.temperature)


def image_probs(judge: Judge, images: np.ndarray) -> np.ndarray:
    """Probabilities (B,) of patches (B, S, S, 3) uint8."""
    return probs_at(judge.image_logits(images), judge.temperature)


@dataclass(frozen=True)
class Predictor:
    """A bundle's network, placed on a device.

    Attributes:
        bundle: recipe, normalisation and calibration.
        network: in evaluation mode.
        compute: device, precision, layout.
        views: what is shown of each patch and averaged.
    """

    bundle: ModelBundle
    network: nn.Module
    compute: Compute
    views: Views

    @property
    def temperature(self) -> float:
        """What logits are divided by; 1 for a bundle that was not calibrated."""
        return 1.0 if self.bundle.calibration is None else self.bundle.calibration.temperature

    def row_logits(
        self, patches: Patches, rows: np.ndarray, stop: Stop = _go_on, progress: Progress = _untold
    ) -> np.ndarray:
        return logits_of_rows(self.network, patches, rows, self.views, self.compute, stop=stop, progress=progress)

    def image_logits(self, images: np.ndarray) -> np.ndarray:
        batch = torch.from_numpy(images).to(self.compute.device).permute(0, 3, 1, 2)
        found = unless_out_of_memory(
            lambda some: logits_of_images(self.network, some, self.views, self.compute), batch, len(images)
        )
        if found is not None:
            return found.cpu().numpy()
        half = len(images) // 2
        return np.concatenate([self.image_logits(images[:half]), self.image_logits(images[half:])])


def compute_of(bundle: ModelBundle, device: torch.device) -> Compute:
    """The bundle's layout, and the precision that left its AUC as it is, where it was trained on this kind of device; else float32 in the
    layout that is usually the faster one.
    """
    measured = bundle.provenance.get("compute", {})
    if torch.device(measured.get("device", "meta")).type != device.type:
        return replace(fixed_variant(device), precision="fp32", routed=False)
    judged = bundle.provenance.get("inference", measured)  # of a dense network the training's own
    precision = judged.get("precision", "fp32")
    if not has_precision(device, precision):  # another machine's CPU
        precision = "fp32"
    return Compute(str(device), precision, measured.get("channels_last", False))


def patch_side(bundle: ModelBundle) -> int:
    """Side in px of the patches that the bundle was trained on; bundles of before it was noted are of 96 px."""
    return int(bundle.provenance.get("patch_px", 96))


def build_predictor(bundle: ModelBundle, compute: Compute, *, averaging: Averaging | None = None) -> Predictor:
    """Place the bundle's network on the device; views are averaged as its recipe says unless ``averaging`` does."""
    views = Views(bundle.recipe, bundle.normalisation, averaging or bundle.recipe.tta)
    return Predictor(bundle, compute.place(bundle.build()).eval(), compute, views)


def list_images(inputs: Sequence[Path]) -> list[Path]:
    """Image files named, and those directly inside folders named, sorted within each folder.

    Raises:
        DataError: something does not exist, a folder holds no image, or two files have one id (stem).
    """
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            found = sorted(
                f for f in path.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES and not f.name.startswith(".")
            )
            if not found:
                raise DataError(
                    f"--input {path}: no image in that folder; looked for {', '.join(sorted(IMAGE_SUFFIXES))}"
                )
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise DataError(f"--input {path} does not exist")
    stems: dict[str, Path] = {}
    for file in files:
        if file.stem in stems:
            raise DataError(f"--input: {stems[file.stem]} and {file} have the same id {file.stem!r}; ids must differ")
        stems[file.stem] = file
    return files


def predict_files(
    judge: Judge, files: Sequence[Path], *, side_px: int = 96
) -> Iterator[tuple[list[str], np.ndarray, list[str]]]:
    """Batches of (ids, probabilities, faults); a file that cannot be read is named in ``faults`` and left out.

    Host memory stays at one batch, however many files there are.
    """
    for start in range(0, len(files), EVAL_BATCH):
        ids, images, faults = [], [], []
        for file in files[start : start + EVAL_BATCH]:
            read = read_patch(file, side_px)
            if isinstance(read, PatchFault):
                faults.append(f"{file.name}: {read}")
            else:
                ids.append(file.stem)
                images.append(read)
        yield ids, image_probs(judge, np.stack(images)) if images else np.zeros(0), faults
