"""ModelBundle: weights as safetensors and everything else as JSON. Loading never unpickles; predicts nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pcam_automl import __version__
from pcam_automl.calibration import Calibration
from pcam_automl.errors import BundleError, DataError, RecipeError
from pcam_automl.files import check_replaceable, folder_written_whole, sha256_of_file, write_json
from pcam_automl.models.factory import Normalisation, build_network
from pcam_automl.models.weights import Weights
from pcam_automl.recipe import Recipe, build_recipe
from pcam_automl.scores import FILE as SCORES

FORMAT = "pcam-automl bundle 1"
WEIGHTS = "model.safetensors"
CARD = "bundle.json"


@dataclass(frozen=True)
class ModelBundle:
    """A trained model: what it takes to predict, and where it came from.

    Attributes:
        recipe: the training that made it; crop and input size are read from here.
        normalisation: channel means and deviations its network expects.
        state: tensor name to value.
        metrics: figures of the training, e.g. ``auc`` and on what it was measured.
        provenance: data, split, study, versions, seconds.
        scores: text of ``scores.csv``, the validation patches' probabilities; None where there was no validation.
        calibration: the temperature of its recipe's views, which predictions divide the logits by; None leaves them.
    """

    recipe: Recipe
    normalisation: Normalisation
    state: dict[str, Tensor]
    metrics: dict[str, Any]
    provenance: dict[str, Any]
    scores: str | None = None
    calibration: Calibration | None = None

    def build(self) -> nn.Module:
        """The network with its weights, on the CPU, in evaluation mode.

        Raises:
            BundleError: the weights do not fit the architecture that this timm builds.
        """
        bare = self.recipe.model_copy(update={"pretrained": False})
        network = build_network(bare, Weights("none"), seed=0)
        try:
            network.load_state_dict(self.state)
        except RuntimeError as fault:
            line = " ".join(str(fault).split())[:200]
            raise BundleError(
                f"the bundle's weights do not fit {self.recipe.backbone} as this timm builds it: {line}"
            ) from None
        return network.eval()


def check_bundle_target(folder: Path, *, option: str = "--out") -> None:
    """A bundle replaces its folder as a whole: refuse one that holds anything but a bundle, before hours of training.

    Args:
        folder: what :func:`write_bundle` will be given.
        option: the option that named it, for the message.

    Raises:
        DataError: it is a file, a mount point, or a folder that is not empty and has no ``bundle.json``.
    """
    check_replaceable(folder, option)
    if folder.is_dir():
        if (folder / CARD).is_file() or not any(folder.iterdir()):
            return
        fault = f"is not empty and holds no {CARD}; a bundle takes the place of the whole folder"
    elif folder.exists():
        fault = "is a file; a bundle is a folder"
    else:
        return
    raise DataError(f"{option} {folder} {fault}; choose another folder, or remove it")


def write_bundle(folder: Path, bundle: ModelBundle) -> None:
    """Write ``model.safetensors`` and ``bundle.json``, the folder whole or not at all.

    Raises:
        DataError: the disk is full or the folder is read-only.
    """
    from safetensors.torch import save

    with folder_written_whole(folder) as partial:
        tensors = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in bundle.state.items()}
        (partial / WEIGHTS).write_bytes(save(tensors))  # save_file hides the operating system's error
        if bundle.scores is not None:
            (partial / SCORES).write_text(bundle.scores, encoding="utf-8")
        write_json(partial / CARD, _card(bundle, sha256_of_file(partial / WEIGHTS)))


def _card(bundle: ModelBundle, weights_sha256: str) -> dict[str, Any]:
    """``bundle.json``; a calibration stands in it only where there is one, as in bundles of before there was any."""
    card = {
        "format": FORMAT,
        "pcam_automl": __version__,
        "recipe": bundle.recipe.model_dump(mode="json"),
        "normalisation": {"mean": bundle.normalisation.mean, "std": bundle.normalisation.std},
        "weights_sha256": weights_sha256,
        "metrics": bundle.metrics,
        "provenance": bundle.provenance,
    }
    return card if bundle.calibration is None else {**card, "calibration": bundle.calibration.to_json()}


def write_calibration(folder: Path, calibration: Calibration | None) -> ModelBundle:
    """Give a bundle another calibration, or none; its weights stay as they are. Returns the bundle.

    Raises:
        BundleError: not a bundle, or incomplete.
        DataError: the disk is full or the folder is read-only.
    """
    bundle = replace(load_bundle(folder), calibration=calibration)
    write_json(folder / CARD, _card(bundle, sha256_of_file(folder / WEIGHTS)))
    return bundle


def load_bundle(folder: Path) -> ModelBundle:
    """Read a bundle, its checksum verified.

    Raises:
        BundleError: not a bundle, of another version, incomplete or changed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    card_file, weights_file = folder / CARD, folder / WEIGHTS
    if not card_file.is_file():
        raise BundleError(
            f"{folder} is not a model bundle: {CARD} is missing; give the folder that train or finalize wrote"
        )
    try:
        card = json.loads(card_file.read_text(encoding="utf-8"))
        if not isinstance(card, dict) or card.get("format") != FORMAT:
            found = card.get("format") if isinstance(card, dict) else type(card).__name__
            raise BundleError(f"{card_file} has format {found!r}, this version reads {FORMAT!r}")
        recipe = build_recipe(card["recipe"], where="bundle.recipe")
        mean, std = (tuple(float(v) for v in card["normalisation"][name]) for name in ("mean", "std"))
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise BundleError(
                f"{card_file}: normalisation must be three means and three positive deviations, got {mean} and {std}"
            )
        if sha256_of_file(weights_file) != card["weights_sha256"]:
            raise BundleError(f"{weights_file} has changed since the bundle was written (its SHA-256 differs)")
        state = load_file(weights_file)
        scores = (folder / SCORES).read_text(encoding="utf-8") if (folder / SCORES).is_file() else None
        norm, held = Normalisation(mean, std), card.get("calibration")
        calibration = None if held is None else Calibration.from_json(held)
        return ModelBundle(recipe, norm, state, dict(card["metrics"]), dict(card["provenance"]), scores, calibration)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError, RecipeError) as fault:
        raise BundleError(
            f"{folder} is not a complete model bundle ({type(fault).__name__}: {str(fault)[:160]})"
        ) from None
