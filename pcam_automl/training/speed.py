"""Remembered speed measurements, one JSON file a machine. Measures through compute.py; plans nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pcam_automl.files import write_json
from pcam_automl.models.factory import build_network
from pcam_automl.models.weights import Weights
from pcam_automl.recipe import Recipe
from pcam_automl.training.compute import (
    QUICK,
    THOROUGH,
    Compute,
    available_bytes,
    cpu_name,
    device_name,
    fixed_variant,
    forward_seconds,
    is_out_of_memory,
    measure_compiled,
    measure_fitting,
    peak_of_step,
)
from pcam_automl.training.scoring import EVAL_BATCH_ON_GPU, LEAST_BATCH
from pcam_automl.versions import versions

PROBE_BATCH_CPU = THOROUGH.largest_batch
"""Images that a step's seconds are of on a CPU, at most; a GPU is measured at the recipe's own batch."""
PROBE = "variants 3"
"""Part of every key: what an earlier release measured, among other variants, is measured again."""
MORE_MEMORY = 1.2
"""Of the memory in which a micro-batch was found: with so much there is another look."""
COMPILE_FROM_S = {"cpu": 3600.0, "cuda": 600.0}
"""Trainings that are shorter by the measured step do not try `torch.compile`: on a GPU it takes about a minute by itself, on a CPU up to
three, so that the look costs a long training a twentieth and a tenth of its time at most.
"""

_NETWORK_FIELDS = (
    "task",
    "decoder",
    "head",
    "hidden",
    *(name for name in Recipe.model_fields if name.startswith("cnn_")),
)


def network_shape(recipe: Recipe) -> list[str]:
    """What the seconds of a network depend on beside its input: the backbone, and the other fields where they are not the defaults."""
    return [
        recipe.backbone,
        *(
            f"{name}={value}"
            for name in _NETWORK_FIELDS
            if (value := getattr(recipe, name)) != Recipe.model_fields[name].default
        ),
    ]


class SpeedBook:
    """Fastest variant and step time of a network on a device, measured once and kept.

    The key is (backbone, network px, batch, device, CPU and its instructions, threads, torch and timm version, probe): a studies
    folder may move to a machine without bf16, and what an earlier version's networks took is measured again.

    Args:
        file: the JSON; made at the first measurement.
        deterministic: no measurement decides how a network runs (see :func:`~pcam_automl.training.compute.fixed_variant`).
        quick: for trainings of seconds. A network is timed in few steps; on a CPU only where nothing is known of it at any
            side: from another side's measurement its variant is taken, and its seconds by the number of pixels. A GPU's
            step is mostly launches where the input is small, and does not grow with the pixels.
    """

    def __init__(self, file: Path, *, deterministic: bool = False, quick: bool = False) -> None:
        self.file, self.deterministic, self.quick = file, deterministic, quick
        self._known: dict[str, dict[str, Any]] = {}
        self._read()

    def _read(self) -> None:
        try:
            known = json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # absent or cut off: only measurements are lost, and they are made again
            return
        if isinstance(known, dict):
            self._known |= known  # what this one measured is in the file, too, unless another measured it better since

    def compute_for(self, recipe: Recipe, device: torch.device, *, views: int | None = None) -> Compute:
        """The variant to train the recipe with; ``step_s`` is for :meth:`probe_batch` images.

        Args:
            recipe: its network, input and batch.
            device: where it trains.
            views: training images of the whole training, where it may be long enough for ``torch.compile`` to pay.
        """
        if self.deterministic:
            return fixed_variant(device)
        eager = Compute(str(device), **{k: v for k, v in self._entry(recipe, device).items() if k != "compiled"})
        if views is None or self._seconds(recipe, device, eager, views) < COMPILE_FROM_S[device.type]:
            return eager
        return self._if_compiled_pays(recipe, device, eager, views)

    def for_the_rest(self, recipe: Recipe, device: torch.device, compute: Compute, views: int) -> Compute:
        """The variant of a training that was cut off, for the views that are left: not compiled once more for a few of them."""
        if compute.compiled and self._seconds(recipe, device, compute, views) < COMPILE_FROM_S[device.type]:
            return replace(compute, compiled=False)
        return compute

    def _seconds(self, recipe: Recipe, device: torch.device, compute: Compute, views: int) -> float:
        assert compute.step_s is not None
        return views / self.probe_batch(recipe, device) * compute.step_s

    def _if_compiled_pays(self, recipe: Recipe, device: torch.device, eager: Compute, views: int) -> Compute:
        """The compiled variant where compiling and training with it take less time together than training without."""
        key, entry = self._key(recipe, device), self._entry(recipe, device)
        if "compiled" not in entry:
            batch = eager.micro_batch or self.probe_batch(recipe, device)
            if (found := measure_compiled(_builder(recipe), recipe.network_px, batch, eager)) is None:
                return eager
            scale = self.probe_batch(recipe, device) / batch
            note = {"fault": found} if isinstance(found, str) else {"ready_s": found[0], "step_s": found[1] * scale}
            self._note(key, {**self._known[key], "compiled": note})
            entry = self._known[key]
        measured = entry["compiled"]
        if "fault" in measured:
            return eager
        compiled = replace(eager, compiled=True, step_s=measured["step_s"])
        gain_s = self._seconds(recipe, device, eager, views) - self._seconds(recipe, device, compiled, views)
        return compiled if gain_s > measured["ready_s"] else eager

    def _entry(self, recipe: Recipe, device: torch.device) -> dict[str, Any]:
        """What is known of the network, measured if that is not enough."""
        key = self._key(recipe, device)
        known = self._known.get(key, {})
        if _was_short(known, device):
            known = {}
        if "step_s" in known and (self.quick or not known.get("quick")):
            return _bare(known)
        short: dict[str, Any] = {name: known[name] for name in ("micro_batch", "available_bytes") if name in known}
        if self.quick and (near := self._at_another_side(recipe, device)) is not None:
            return near | _bare(short)
        measured = self._measured(recipe, device)
        if short and short["micro_batch"] < (measured.get("micro_batch") or recipe.batch_size):
            measured |= short  # a training's, which needed more memory than the probe's bare steps
        self._note(key, measured)
        return _bare(self._known[key])

    def _measured(self, recipe: Recipe, device: torch.device) -> dict[str, Any]:
        whole = batch = self.probe_batch(recipe, device)
        how: dict[str, Any] = {}
        if self.quick:
            batch = min(batch, QUICK.largest_batch) if device.type == "cpu" else batch
            how = {"probe": QUICK}
        compute = measure_fitting(_builder(recipe), recipe.network_px, batch, device, **how)
        assert compute.step_s is not None
        entry: dict[str, Any] = {name: getattr(compute, name) for name in ("precision", "channels_last", "routed")}
        entry["step_s"] = compute.step_s * whole / batch
        entry |= {} if compute.micro_batch is None else _short_of_memory(compute.micro_batch, device)
        return entry | ({"quick": True} if self.quick else {})

    def _at_another_side(self, recipe: Recipe, device: torch.device) -> dict[str, Any] | None:
        """What is known of the same network at the nearest other side, its step's seconds by the pixels."""
        if device.type != "cpu":
            return None
        px = recipe.network_px
        before, after = self._key(recipe, device).split(f"/{px}/", 1)
        sides = [
            int(side)
            for key, entry in self._known.items()
            if key.startswith(f"{before}/")
            and key.endswith(f"/{after}")
            and (side := key[len(before) + 1 : -len(after) - 1]).isdigit()
            and "step_s" in entry
        ]
        if not sides:
            return None
        near = min(sides, key=lambda side: (abs(math.log(side / px)), side))
        entry = _bare(self._known[f"{before}/{near}/{after}"])
        entry.pop("micro_batch", None)  # of another side's memory; a training that is short of it halves its own
        return {**entry, "step_s": entry["step_s"] * (px / near) ** 2}

    def note_micro_batch(self, recipe: Recipe, device: torch.device, micro_batch: int) -> None:
        """Remember what fitted in the end, where a training needed more memory than the probe's bare steps had.

        Where nothing was measured at this side it is all that is known there. A deterministic training leaves no note: it has no
        measured variant, and others take other memory.
        """
        key = self._key(recipe, device)
        self._read()  # another process may have measured it meanwhile
        known = self._known.get(key, {})
        if not self.deterministic and micro_batch < (known.get("micro_batch") or recipe.batch_size):
            self._note(key, {**known, **_short_of_memory(micro_batch, device)})

    def judged_per_s(self, recipe: Recipe, device: torch.device) -> float:
        """Images that the network judges in a second, in float32, which a prediction may fall back to; measured once and kept."""
        compute = replace(self.compute_for(recipe, device), precision="fp32", compiled=False)
        key, batch = self._key(recipe, device), compute.micro_batch or self.probe_batch(recipe, device)
        known = self._known.get(key, {})
        if "forward_s" not in known:
            batch = batch if device.type == "cpu" else EVAL_BATCH_ON_GPU
            each_s = _forward_s(recipe, batch, compute)
            if "step_s" not in known:  # deterministic, or by another side's measurement: nothing is kept of it
                return 1.0 / each_s
            self._note(key, {**known, "forward_s": each_s})
        return 1.0 / float(self._known[key]["forward_s"])

    def peak_bytes(self, recipe: Recipe, device: torch.device) -> int:
        """Of a GPU's memory, what training steps of the recipe take at most; measured now."""
        compute = self.compute_for(recipe, device)
        batch = compute.micro_batch or self.probe_batch(recipe, device)
        return peak_of_step(_builder(recipe), recipe.network_px, batch, compute)

    def _note(self, key: str, entry: dict[str, Any]) -> None:
        self._read()  # another worker may have written meanwhile
        self._known[key] = entry
        write_json(self.file, self._known)

    def knows(self, recipe: Recipe, device: torch.device) -> bool:
        """Whether enough has been measured here of the recipe's network, so that nothing need be."""
        entry = self._known.get(self._key(recipe, device), {})
        if "step_s" not in entry:
            return self.quick and self._at_another_side(recipe, device) is not None
        return self.quick or not entry.get("quick")

    def _key(self, recipe: Recipe, device: torch.device) -> str:
        batch = str(self.probe_batch(recipe, device))
        where = device_name(device)
        if device.type == "cpu":
            where += f", {cpu_name().replace('/', ' ')}"
        releases = (torch.__version__, f"timm {versions()['timm']}")
        return "/".join([*network_shape(recipe), str(recipe.network_px), batch, where, *releases, PROBE])

    def images_per_s(self, recipe: Recipe, device: torch.device) -> float:
        """Training images a second, by the measured step."""
        return self.probe_batch(recipe, device) / float(self._entry(recipe, device)["step_s"])

    @staticmethod
    def probe_batch(recipe: Recipe, device: torch.device) -> int:
        return min(recipe.batch_size, PROBE_BATCH_CPU) if device.type == "cpu" else recipe.batch_size


def _bare(entry: dict[str, Any]) -> dict[str, Any]:
    """What a :class:`Compute` takes, and ``compiled``."""
    return {name: value for name, value in entry.items() if name not in ("quick", "available_bytes", "forward_s")}


def _short_of_memory(micro_batch: int, device: torch.device) -> dict[str, int]:
    """A micro-batch, and on a GPU in how much memory it was found."""
    return {"micro_batch": micro_batch} | (
        {"available_bytes": available_bytes(device)} if device.type == "cuda" else {}
    )


def _forward_s(recipe: Recipe, batch: int, compute: Compute) -> float:
    """Seconds an image of a forward pass of so many, or of the largest halving that fits."""
    while True:
        try:
            return forward_seconds(_builder(recipe), recipe.network_px, batch, compute) / batch
        except (torch.OutOfMemoryError, RuntimeError) as fault:
            if not is_out_of_memory(fault) or batch <= LEAST_BATCH:
                raise
        batch = max(LEAST_BATCH, batch // 2)


def _was_short(entry: dict[str, Any], device: torch.device) -> bool:
    """Whether a micro-batch was found while others held the GPU's memory, and there is clearly more of it now."""
    before = entry.get("available_bytes")
    return before is not None and available_bytes(device) >= MORE_MEMORY * before


def _builder(recipe: Recipe) -> Callable[[], nn.Module]:
    bare = recipe.model_copy(update={"pretrained": False})
    return lambda: build_network(bare, Weights("none"), seed=0)
