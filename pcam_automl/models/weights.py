"""Where pretrained weights come from: timm's hub, a local folder of safetensors, or nowhere. Builds no network."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from pcam_automl.errors import RecipeError, first_few

HUB_TIMEOUT_S = 10.0
_PROBED_REPOSITORY = "timm/resnet18.a1_in1k"


@dataclass(frozen=True)
class Weights:
    """A decided source of pretrained weights.

    Attributes:
        kind: ``hub`` (timm's), ``folder`` (safetensors named after the timm model) or ``none`` (from scratch).
        folder: the folder, for ``folder``.
    """

    kind: Literal["hub", "folder", "none"]
    folder: Path | None = None

    @property
    def pretrained(self) -> bool:
        return self.kind != "none"

    def __str__(self) -> str:
        return str(self.folder) if self.kind == "folder" else self.kind

    def file_of(self, backbone: str) -> Path | None:
        """The backbone's file in the folder: ``<name with tag>.safetensors`` first, then ``<name>.safetensors``."""
        if self.folder is None:
            return None
        for stem in dict.fromkeys((backbone, backbone.partition(".")[0])):
            if (file := self.folder / f"{stem}.safetensors").is_file():
                return file
        return None

    def has(self, backbone: str) -> bool:
        """Whether a training of ``backbone`` can start from this source (``none`` starts everything, from scratch)."""
        if self.kind == "folder":
            return self.file_of(backbone) is not None
        if self.kind == "hub":
            import timm

            return timm.models.is_model_pretrained(backbone)
        return True


def decide_weights(text: str, *, timeout_s: float = HUB_TIMEOUT_S) -> tuple[Weights, str]:
    """Turn ``auto | hub | none | DIR`` into a source and one line that says what was decided.

    Raises:
        RecipeError: ``hub`` without an answer from the hub, or a folder without safetensors.
    """
    if text == "none":
        return Weights("none"), "weights: from scratch"
    if text in ("auto", "hub"):
        fault = hub_fault(timeout_s)
        if fault is None:
            return Weights("hub"), "weights: pretrained, from timm's hub"
        if text == "auto":
            return Weights(
                "none"
            ), f"weights: FROM SCRATCH, since timm's hub did not answer ({fault}); --weights DIR uses a local folder"
        raise RecipeError(
            f"--weights hub: timm's hub did not answer within {timeout_s:g} s ({fault}); "
            "check the network, or give --weights DIR (safetensors named after the timm model) or --weights none"
        )
    folder = Path(text).expanduser().resolve()
    if not folder.is_dir():
        raise RecipeError(f"--weights must be auto, hub, none or an existing folder, got {text!r}")
    names = sorted(file.stem for file in folder.glob("*.safetensors"))
    if not names:
        raise RecipeError(f"--weights {text}: no *.safetensors file in that folder; name them after the timm model")
    return Weights("folder", folder), f"weights: pretrained, from {folder} ({first_few(names)})"


def parse_weights(text: str) -> Weights:
    """A source as ``str(weights)`` wrote it into a study or a bundle; nothing is decided again."""
    return Weights(text) if text in ("hub", "none") else Weights("folder", Path(text))  # type: ignore[arg-type]


def hub_fault(timeout_s: float) -> str | None:
    """None if timm's hub answers in time, else a short reason. The look-up runs in a thread, so that the limit holds."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return "HF_HUB_OFFLINE is set"
    answer: list[str | None] = []

    def ask() -> None:
        from huggingface_hub import HfApi

        try:
            HfApi().model_info(_PROBED_REPOSITORY, timeout=timeout_s)
        except Exception as fault:  # noqa: BLE001  any failure means "no answer"; its kind is what the caller reports
            answer.append(type(fault).__name__)
        else:
            answer.append(None)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return answer[0] if answer else f"no answer within {timeout_s:g} s"


def load_folder_weights(network: nn.Module, backbone: str, weights: Weights) -> None:
    """Copy the backbone's file into the network; the classifier keeps its fresh initial values.

    Raises:
        RecipeError: no file, not safetensors, or tensors that do not fit the architecture.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = weights.file_of(backbone)
    if file is None:
        raise RecipeError(f"no weights for {backbone} in {weights.folder}: {backbone}.safetensors is missing")
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as fault:
        raise RecipeError(f"{file} is not a readable safetensors file ({str(fault)[:120]})") from None
    classifier = {f"{name}.{leaf}" for name in _classifier_names(network) for leaf in ("weight", "bias")}
    expected = network.state_dict()
    wrong = _misfits(tensors, expected, classifier)
    if wrong and tensors.keys() >= set(wrong):  # other shapes: a windowed network of another input side, say
        tensors = _as_timm_fits_them(tensors, network)
        wrong = _misfits(tensors, expected, classifier)
    if wrong:
        raise RecipeError(
            f"{file} does not fit timm's {backbone}: {len(wrong)} tensors are missing or of another shape ({first_few(wrong, 3)})"
        )
    network.load_state_dict(
        {
            name: tensors[name].to(expected[name].dtype)
            for name in expected
            if name in tensors and name not in classifier
        },
        strict=False,
    )


def _misfits(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], classifier: Collection[str]) -> list[str]:
    """What the network wants and the file lacks, or has in another shape."""
    return [
        name
        for name, tensor in expected.items()
        if name not in classifier
        and (name not in tensors or tensors[name].shape != tensor.shape)
        and not name.endswith("num_batches_tracked")
    ]


def _as_timm_fits_them(tensors: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """By the architecture's own rule for its checkpoints (position tables are resized), as timm loads them from its hub."""
    fit = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if fit is None:
        return tensors
    try:
        return dict(fit(tensors, network))
    except (AttributeError, KeyError, IndexError, RuntimeError, TypeError, ValueError):
        return tensors  # of another architecture, which the caller says


def _classifier_names(network: nn.Module) -> tuple[str, ...]:
    names = network.default_cfg["classifier"]  # type: ignore[index]
    return (names,) if isinstance(names, str) else tuple(names)
