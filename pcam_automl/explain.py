"""Where a network looks: Grad-CAM maps, how much of them lies in the centre, pictures. Trains and scores nothing.

Grad-CAM (Selvaraju et al., ICCV 2017) by captum. B images, px the network's input side, S side of the source patch.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pcam_automl.augment import centre_view
from pcam_automl.errors import InputError
from pcam_automl.predict import Predictor, image_probs
from pcam_automl.recipe import CENTRE_PX

LEAST_MAP = 4
"""Cells a side that a layer's map needs to say anything about a place."""
_PANEL_PX = 288
_STRONGEST_ALPHA = 0.75

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Explanation:
    """One patch, explained.

    Attributes:
        prob: of tumour, in [0, 1].
        centre_share: of the attention, inside the centre 32x32; NaN where the map is empty.
        overlay: (S, S, 3) uint8, the patch under its map.
        sentence: in plain words.
    """

    prob: float
    centre_share: float
    overlay: Pixels
    sentence: str


def attention(
    network: nn.Module, images: Tensor, *, toward: Tensor | None = None, least_map: int = LEAST_MAP
) -> Tensor:
    """What in each image speaks for the network's own call: for tumour where its logit is at least 0, else against it.

    The map is that of the deepest layer on the network's trunk with at least ``least_map`` cells a side, or of the last
    spatial one where none has so many: at 64 px the last map of a residual network is 2x2, too coarse for a place.

    Args:
        network: in evaluation mode, images (B, 3, px, px) -> logits (B, 1).
        images: (B, 3, px, px) normalised, on the network's device.
        toward: (B,) +1 to explain tumour, -1 to explain its absence; None goes by each logit.
        least_map: cells a side, at least 1.

    Returns:
        (B, px, px) float32 on the CPU in [0, 1], the maximum of each map being 1; all 0 where nothing speaks for the call.

    Raises:
        InputError: the network has no spatial layer, or its tokens form no square.
    """
    from captum.attr import LayerGradCam

    images = images.detach().clone().requires_grad_(True)  # captum warns where it has to ask for gradients itself
    with torch.enable_grad(), _map_layer(network, images, least_map) as layer:
        if toward is None:
            with torch.no_grad():
                toward = torch.where(network(images).flatten() >= 0, 1.0, -1.0)
        cam = LayerGradCam(network, layer).attribute(images, target=0)
    cam = (cam.detach().float() * toward.to(cam.device).view(-1, 1, 1, 1)).clamp(min=0)  # (B, 1, h, w)
    cam = F.interpolate(cam, size=images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    highest = cam.amax(dim=(1, 2), keepdim=True)
    return torch.where(highest > 0, cam / highest.clamp(min=torch.finfo(cam.dtype).tiny), cam).cpu()


class _Rearranged(nn.Module):
    """A layer whose output passes ``spy`` as a map (B, C, h, w): what captum reads, whatever the layer's own order."""

    def __init__(self, layer: nn.Module, *, n_prefix: int | None) -> None:
        super().__init__()
        self.layer, self.spy, self.n_prefix = layer, nn.Identity(), n_prefix

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        y: Tensor = self.layer(x, *args, **options)
        if self.n_prefix is None:  # (B, h, w, C)
            return torch.as_tensor(self.spy(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        tokens = y[:, self.n_prefix :]  # (B, prefix + h * w, C)
        side = math.isqrt(tokens.shape[1])
        seen = self.spy(tokens.transpose(1, 2).reshape(len(y), -1, side, side))
        return torch.cat([y[:, : self.n_prefix], seen.flatten(2).transpose(1, 2)], dim=1)


@contextmanager
def _map_layer(network: nn.Module, images: Tensor, least_map: int) -> Iterator[nn.Module]:
    """The layer whose output captum reads; a token or channels-last layer is wrapped for the time of the block."""
    shapes = output_shapes(network, images[:1])
    found = _token_layer(network, shapes)
    if found is not None:
        name, n_prefix = found
    else:
        name, n_prefix = _trunk_layer(network, shapes, least_map), None
        if not _channels_last_outputs(network):
            yield network.get_submodule(name)
            return
    layer = network.get_submodule(name)
    wrapped = _Rearranged(layer, n_prefix=n_prefix).eval()
    network.set_submodule(name, wrapped)
    try:
        yield wrapped.spy
    finally:
        network.set_submodule(name, layer)


def output_shapes(network: nn.Module, image: Tensor) -> dict[str, tuple[int, ...]]:
    """Output shape of every named module that runs and returns a tensor, in the order of completion.

    Args:
        network: on the image's device; torch's meta device computes shapes alone.
        image: (1, 3, px, px).
    """
    shapes: dict[str, tuple[int, ...]] = {}
    hooks = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                shapes.pop(name, None)
                shapes[name] = tuple(output.shape)

        return hook

    try:
        hooks += [module.register_forward_hook(watch(name)) for name, module in network.named_modules() if name]
        with torch.no_grad():
            network(image)
    finally:
        for hook in hooks:
            hook.remove()
    return shapes


def _channels_last_outputs(network: nn.Module) -> bool:
    """Whether timm says that the network's maps are (B, h, w, C), as Swin's are."""
    return any(str(getattr(module, "output_fmt", "")) == "NHWC" for module in network.modules())


def _token_layer(network: nn.Module, shapes: dict[str, tuple[int, ...]]) -> tuple[str, int] | None:
    """The last block's first norm of a timm ViT and the number of its prefix tokens; None for other networks.

    Behind the last block only the class token reaches the classifier, so its own inputs are the last that have a say.
    """
    n_prefix = next((int(m.num_prefix_tokens) for m in network.modules() if hasattr(m, "num_prefix_tokens")), None)  # type: ignore[arg-type]
    if n_prefix is None:
        return None
    names = [name for name, shape in shapes.items() if name.endswith(".norm1") and len(shape) == 3]
    n_tokens = shapes[names[-1]][1] - n_prefix if names else 0
    if not names or math.isqrt(n_tokens) ** 2 != n_tokens:
        raise InputError(
            f"Grad-CAM needs a square map of tokens, {type(network).__name__} has {n_tokens}; "
            "predict with this backbone without --explain"
        )
    return names[-1], n_prefix


def _trunk_layer(network: nn.Module, shapes: dict[str, tuple[int, ...]], least_map: int) -> str:
    """The deepest layer that the whole signal passes and whose map has ``least_map`` cells a side."""
    first = 1 if _channels_last_outputs(network) else 2
    sides = {name: min(shapes[name][first : first + 2]) for name in _trunk(network, "", shapes)}
    order = [name for name in shapes if sides.get(name, 0) > 1]
    if not order:
        raise InputError(
            f"Grad-CAM needs a layer with a map of at least 2x2 cells, {type(network).__name__} has none at this input; "
            "predict with this backbone without --explain, or train it at a larger crop_size or input_size"
        )
    fine = [name for name in order if sides[name] >= least_map]
    return fine[-1] if fine else order[-1]


def _trunk(module: nn.Module, prefix: str, shapes: dict[str, tuple[int, ...]]) -> Iterator[str]:
    """Names of modules with 4-D outputs that are in series: a block counts as a whole, its branches do not."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if len(shapes.get(path, ())) == 4 and not isinstance(child, nn.Sequential):
            yield path
        else:  # a sequence, or something that only wraps the trunk
            yield from _trunk(child, f"{path}.", shapes)


def centre_share(maps: Tensor | Floats, crop_size: int) -> NDArray[np.float64]:
    """The share of each map's sum that lies inside the centre 32x32 px of the source patch.

    Args:
        maps: (B, px, px) or (px, px), not negative, over the crop resized to px.
        crop_size: side of the crop in px of the source patch.

    Returns:
        (B,) or () in [0, 1]; NaN for a map of zeros. A uniform map has ``(32 / crop_size) ** 2``.
    """
    values = np.asarray(maps, np.float64)
    px = values.shape[-1]
    half = px * CENTRE_PX / crop_size / 2
    edges = np.arange(px + 1).clip(px / 2 - half, px / 2 + half)
    inside = np.diff(edges)  # how much of each row lies inside: 1, 0 or a part
    total = values.sum(axis=(-2, -1))
    centre = np.einsum("...ij,i,j->...", values, inside, inside)
    return np.asarray(np.divide(centre, total, out=np.full_like(total, np.nan), where=total > 0))


def overlay(patch: Pixels, attention_map: Tensor | Floats, crop_size: int) -> Pixels:
    """The patch with its map in yellow (cividis) over it, what the network does not see paled, the centre box drawn.

    Args:
        patch: (S, S, 3) uint8.
        attention_map: (px, px) in [0, 1] over the centre crop.
        crop_size: side of that crop in px of the patch, at most S.

    Returns:
        (S, S, 3) uint8.
    """
    from matplotlib import colormaps

    side = len(patch)
    start = (side - crop_size) // 2
    values = torch.as_tensor(np.asarray(attention_map, np.float32))[None, None]
    values = F.interpolate(values, size=(crop_size, crop_size), mode="bilinear", align_corners=False)
    strength = values[0, 0].numpy()[:, :, None]
    out = 255.0 - (255.0 - patch.astype(np.float32)) * 0.45  # outside the crop: paled
    seen = patch[start : start + crop_size, start : start + crop_size].astype(np.float32)
    colour = colormaps["cividis"](0.65 + 0.35 * strength[:, :, 0])[:, :, :3] * 255.0
    alpha = _STRONGEST_ALPHA * strength**1.5  # weak attention leaves the tissue as it is
    out[start : start + crop_size, start : start + crop_size] = seen * (1 - alpha) + colour * alpha
    return with_centre_box(out.round().clip(0, 255).astype(np.uint8))


def with_centre_box(patch: Pixels) -> Pixels:
    """A copy of (S, S, 3) with the outline of the centre 32x32 drawn just outside of it: white beside black."""
    out = patch.copy()
    low = (len(patch) - CENTRE_PX) // 2
    high = low + CENTRE_PX - 1
    for reach, level in ((2, 0), (1, 255)):
        a, b = low - reach, high + reach
        if a >= 0:
            out[a, a : b + 1] = out[b, a : b + 1] = level
            out[a : b + 1, a] = out[a : b + 1, b] = level
    return out


def explain_patches(
    predictor: Predictor, patches: Pixels, *, probs: NDArray[np.float64] | None = None, threshold: float = 0.5
) -> list[Explanation]:
    """Grad-CAM and a sentence for patches (B, S, S, 3) uint8.

    Below the threshold the map is that of "no tumour", and the sentence says so.

    Args:
        predictor: whose network is shown.
        patches: (B, S, S, 3) uint8.
        probs: (B,) in [0, 1] to explain, where they are not the predictor's own; None asks it, its views averaged.
        threshold: probability from which a patch is called tumour.

    Raises:
        InputError: the recipe is of dense maps, or the network has no spatial layer.
    """
    recipe, norm = predictor.bundle.recipe, predictor.bundle.normalisation
    if recipe.task == "dense":
        raise InputError("a dense recipe's probability map says itself where the tumour is; leave --explain out")
    if probs is None:
        probs = image_probs(predictor, patches)
    batch = torch.from_numpy(patches).to(predictor.compute.device).permute(0, 3, 1, 2)
    view = centre_view(batch, recipe.crop_size, recipe.network_px, norm.mean, norm.std, dtype=torch.float32)
    toward = torch.from_numpy(np.where(probs >= threshold, 1.0, -1.0).astype(np.float32))
    least_map = max(LEAST_MAP, math.ceil(2 * recipe.crop_size / CENTRE_PX))  # a cell is at most half the centre's side
    maps = attention(predictor.network, predictor.compute.layout(view), toward=toward, least_map=least_map).numpy()
    shares = centre_share(maps, recipe.crop_size)
    return [
        Explanation(float(p), float(s), overlay(patch, m, recipe.crop_size), sentence(float(p), float(s), threshold))
        for p, s, patch, m in zip(probs, shares, patches, maps, strict=True)
    ]


def sentence(prob: float, share: float, threshold: float = 0.5) -> str:
    """What a probability of tumour and a centre share (NaN: an empty map) mean, in plain words."""
    called = prob >= threshold
    start = f"Probability {prob:.2f} of tumour" + ("" if called else ", so the map shows what speaks against tumour")
    if math.isnan(share):
        return f"{start}: no region of the patch stands out."
    return (
        f"{start}: {100 * share:.0f} % of the network's attention lies inside the centre 32x32, "
        "which alone decides the label in PatchCamelyon."
    )


def explain_image(predictor: Predictor, patch: Pixels, prob: float | None = None) -> tuple[Pixels, str]:
    """(picture, sentence) of one patch (S, S, 3) uint8: the patch beside its Grad-CAM, the sentence below.

    Args:
        predictor: whose network is shown.
        patch: (S, S, 3) uint8.
        prob: to explain, where it is not the predictor's own.

    Returns:
        (H, W, 3) uint8 to save as PNG, and the sentence.

    Raises:
        InputError: as :func:`explain_patches`.
    """
    probs = None if prob is None else np.array([prob])
    found = explain_patches(predictor, np.stack([patch]), probs=probs)[
        0
    ]  # a copy: a decoded PNG is read-only, which torch dislikes
    return _side_by_side(with_centre_box(patch), found.overlay, found.sentence), found.sentence


def _side_by_side(left: Pixels, right: Pixels, text: str) -> Pixels:
    from PIL import Image, ImageDraw, ImageFont

    gap = 12
    lines = textwrap.wrap(text, 74)
    size = (2 * _PANEL_PX + 3 * gap, _PANEL_PX + 2 * gap + 20 * len(lines) + gap)
    sheet = Image.new("RGB", size, "white")
    for place, panel in enumerate((left, right)):
        scaled = Image.fromarray(panel).resize((_PANEL_PX, _PANEL_PX), Image.Resampling.NEAREST)
        sheet.paste(scaled, (gap + place * (_PANEL_PX + gap), gap))
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((gap, _PANEL_PX + 2 * gap), "\n".join(lines), fill="black", font=ImageFont.load_default(15))
    return np.asarray(sheet)
