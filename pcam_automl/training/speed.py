"""Remembered speed measurements, one JSON file a machine. Measures through compute.py; plans nothing."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from pcam_automl.files import write_json
from pcam_automl.models.factory import build_network
from pcam_automl.models.weights import Weights
from pcam_automl.recipe import Recipe
from pcam_automl.training.compute import Compute, device_name, measure

PROBE_BATCH_CPU = 32
"""Images a probe step takes on a CPU, where the rate hardly depends on it; a GPU is measured at the recipe's own batch."""


_NETWORK_FIELDS = (
    "task",
    "decoder",
    "head",
    "hidden",
    *(name for name in Recipe.model_fields if name.startswith("cnn_")),
)


def _built_otherwise(recipe: Recipe) -> list[str]:
    """The fields beside the backbone that change the network, where they are not the defaults."""
    return [
        f"{name}={value}"
        for name in _NETWORK_FIELDS
        if (value := getattr(recipe, name)) != Recipe.model_fields[name].default
    ]


class SpeedBook:
    """Fastest variant and step time of a network on a device, measured once and kept.

    The key is (backbone, network px, batch, device, torch version, threads).
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._known: dict[str, dict[str, object]] = {}
        self._read()

    def _read(self) -> None:
        try:
            known = json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # absent or cut off: only measurements are lost, and they are made again
            return
        if isinstance(known, dict):
            self._known = known | self._known

    def compute_for(self, recipe: Recipe, device: torch.device) -> Compute:
        """The variant to train the recipe with; ``step_s`` is for :meth:`probe_batch` images."""
        batch, key = self.probe_batch(recipe, device), self._key(recipe, device)
        if key not in self._known:
            bare = recipe.model_copy(update={"pretrained": False})
            compute = measure(lambda: build_network(bare, Weights("none"), seed=0), recipe.network_px, batch, device)
            self._read()  # another worker may have written meanwhile
            self._known[key] = {
                "precision": compute.precision,
                "channels_last": compute.channels_last,
                "step_s": compute.step_s,
            }
            write_json(self.file, self._known)
        return Compute(str(device), **self._known[key])  # type: ignore[arg-type]

    def knows(self, recipe: Recipe, device: torch.device) -> bool:
        """Whether the recipe's network has been measured here, so that nothing need be."""
        return self._key(recipe, device) in self._known

    def _key(self, recipe: Recipe, device: torch.device) -> str:
        network = [recipe.backbone, *_built_otherwise(recipe)]
        batch = str(self.probe_batch(recipe, device))
        return "/".join([*network, str(recipe.network_px), batch, device_name(device), torch.__version__])

    def images_per_s(self, recipe: Recipe, device: torch.device) -> float:
        """Training images a second, by the measured step."""
        compute = self.compute_for(recipe, device)
        assert compute.step_s is not None
        return self.probe_batch(recipe, device) / compute.step_s

    @staticmethod
    def probe_batch(recipe: Recipe, device: torch.device) -> int:
        return min(recipe.batch_size, PROBE_BATCH_CPU) if device.type == "cpu" else recipe.batch_size
