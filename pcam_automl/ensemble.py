"""Several networks that judge together: their folder, and the weighted mean of their logits. Chooses no weights, trains nothing.

A folder with ``ensemble.json`` holds the members' bundles (``model``, ``model-2``, ...); without it ``model`` is on its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pcam_automl.batches import Patches
from pcam_automl.bundle import CARD as BUNDLE_CARD
from pcam_automl.bundle import load_bundle
from pcam_automl.calibration import Calibration
from pcam_automl.errors import BundleError
from pcam_automl.files import write_json
from pcam_automl.predict import Judge, Predictor, Progress, Stop, build_predictor, compute_of
from pcam_automl.training.scoring import Averaging

FORMAT = "pcam-automl ensemble 1"
CARD = "ensemble.json"
_WEIGHTS_SUM = 1e-6


@dataclass(frozen=True)
class Blended:
    """Members that judge together by the weighted mean of their logits, at one temperature.

    Attributes:
        members: at least one; their own temperatures are not used.
        weights: positive, summing to 1.
        temperature: of the mean logit.
    """

    members: tuple[Judge, ...]
    weights: tuple[float, ...]
    temperature: float

    def row_logits(
        self, patches: Patches, rows: np.ndarray, stop: Stop = lambda: None, progress: Progress = lambda n: None
    ) -> np.ndarray:
        return self._mean([member.row_logits(patches, rows, stop, progress) for member in self.members])

    def image_logits(self, images: np.ndarray) -> np.ndarray:
        return self._mean([member.image_logits(images) for member in self.members])

    def _mean(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        return np.asarray(np.asarray(self.weights) @ np.stack(parts).astype(np.float64))


def member_folder(out: Path, number: int) -> Path:
    """``model`` for member 0, then ``model-2``, ``model-3``, ..."""
    return out / ("model" if number == 0 else f"model-{number + 1}")


def write_ensemble(
    out: Path, weights: Sequence[float], calibration: Calibration | None, provenance: dict[str, Any]
) -> None:
    """Write ``ensemble.json`` over bundles that lie in ``out`` already, each named with its weights' SHA-256.

    Args:
        out: the folder of ``model``, ``model-2``, ...
        weights: one a member, positive, summing to 1.
        calibration: of the mean logit.
        provenance: how the weights were chosen.
    """
    members = []
    for number, weight in enumerate(weights):
        folder = member_folder(out, number)
        card = json.loads((folder / BUNDLE_CARD).read_text(encoding="utf-8"))
        members.append({"folder": folder.name, "weight": weight, "weights_sha256": card["weights_sha256"]})
    write_json(
        out / CARD,
        {
            "format": FORMAT,
            "blend": "weighted mean of logits",
            "members": members,
            "calibration": None if calibration is None else calibration.to_json(),
            **provenance,
        },
    )


def is_ensemble(folder: Path) -> bool:
    """Whether the folder says how several bundles judge together."""
    return (folder / CARD).is_file()


def open_judge(
    folder: Path, device: torch.device, *, averaging: Averaging | None = None
) -> tuple[Judge, tuple[Predictor, ...]]:
    """Whatever judges in a folder, ready on the device, and its networks, the one with the largest weight first.

    Args:
        folder: a bundle, a folder with ``model``, or one with ``ensemble.json``.
        device: where to predict.
        averaging: in place of the recipes' own.

    Raises:
        BundleError: neither, or changed since it was written.
    """
    if not is_ensemble(folder):
        nested = not (folder / BUNDLE_CARD).exists() and member_folder(folder, 0).is_dir()
        bundle = load_bundle(member_folder(folder, 0) if nested else folder)
        predictor = build_predictor(bundle, compute_of(bundle, device), averaging=averaging)
        return predictor, (predictor,)
    names, weights, calibration = _read(folder)
    predictors = []
    for name in names:
        bundle = load_bundle(folder / name)
        predictors.append(build_predictor(bundle, compute_of(bundle, device), averaging=averaging))
    temperature = 1.0 if calibration is None else calibration.temperature
    return Blended(tuple(predictors), weights, temperature), tuple(predictors)


def _read(folder: Path) -> tuple[list[str], tuple[float, ...], Calibration | None]:
    """Names, weights and calibration, the members' checksums compared."""
    file = folder / CARD
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(card, dict) or card.get("format") != FORMAT:
            found = card.get("format") if isinstance(card, dict) else type(card).__name__
            raise BundleError(f"{file} has format {found!r}, this version reads {FORMAT!r}")
        names = [Path(member["folder"]).name for member in card["members"]]  # never outside the folder
        weights = tuple(float(member["weight"]) for member in card["members"])
        sums = [str(member["weights_sha256"]) for member in card["members"]]
        calibration = None if card["calibration"] is None else Calibration.from_json(card["calibration"])
        held = [
            str(json.loads((folder / name / BUNDLE_CARD).read_text(encoding="utf-8"))["weights_sha256"])
            for name in names
        ]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as fault:
        raise BundleError(f"{file} is not a complete ensemble ({type(fault).__name__}: {str(fault)[:160]})") from None
    if not names or min(weights) <= 0 or abs(sum(weights) - 1.0) > _WEIGHTS_SUM:
        raise BundleError(f"{file}: weights must be positive and sum to 1, got {list(weights)}")
    if changed := [name for name, one, other in zip(names, held, sums, strict=True) if one != other]:
        raise BundleError(f"{file} is of other bundles than lie in {', '.join(changed)}; run finalize again")
    return names, weights, calibration
