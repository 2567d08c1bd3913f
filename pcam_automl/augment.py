"""Batched augmentation and evaluation views of patches on their own device. Chooses no magnitudes, reads no files.

A view is one patch under one draw. Every draw comes from :func:`pcam_automl.counter.uniforms`, keyed by (key, view
index), so it does not depend on how a batch is cut. Lengths are px of the source patch, x to the right, y down, the
origin at the patch's centre. The whole chain samples the patch once and keeps few passes over memory:

    quarter turn, flips, rotation, zoom, shift, crop, resize    one affine grid over the whole patch
    stain jitter                                                log, one 3x3 matrix a view, exp
    brightness, contrast, saturation, hue                       one 3x3 matrix and bias a view
    blur, clamp to [0, 1], normalisation

Stain comes before colour as in a laboratory: the tissue is stained, then a scanner sees it.

B views, S side of the source patch, c crop size, P out_px.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pcam_automl.counter import uniforms
from pcam_automl.errors import RecipeError
from pcam_automl.recipe import CENTRE_PX, Recipe

_N_COLUMNS = 20  # of uniform numbers a view; 17 are in use, the others keep the streams of later additions apart
_MIN_ZOOM = 0.5  # the centre box keeps at least half its side
_WHITE = 255.0
_LUMA = np.array([0.299, 0.587, 0.114])  # Rec. 601
_YIQ = np.array([_LUMA, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
# Optical densities of haematoxylin, eosin and DAB as rows (Ruifrok & Johnston, Anal Quant Cytol Histol 23, 2001).
_STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])


@dataclass(frozen=True)
class AugmentSpec:
    """What may happen to a view: the recipe's magnitudes already multiplied by its ``augment``; 0 switches a step off.

    ``crop_size`` and ``out_px`` are sides in px; the other fields are those of :class:`pcam_automl.recipe.Recipe`.
    """

    crop_size: int
    out_px: int
    strength: float = 0.0
    flips: bool = False
    quarter_turns: bool = False
    rotation_deg: float = 0.0
    shift_px: float = 0.0
    zoom: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    stain: float = 0.0
    blur: float = 0.0

    @property
    def moves(self) -> bool:
        """Whether a view can differ from a crop by more than flips and quarter turns, so that it is interpolated."""
        return self.zoom > 0 or (self.crop_size > CENTRE_PX and (self.rotation_deg > 0 or self.shift_px > 0))

    @property
    def colours(self) -> bool:
        """Whether brightness, contrast, saturation or hue can change."""
        return max(self.brightness, self.contrast, self.saturation, self.hue) > 0


def augment_spec(recipe: Recipe) -> AugmentSpec:
    """The recipe's augmentation with every magnitude multiplied by ``recipe.augment``."""
    strength = recipe.augment
    magnitudes = ("rotation_deg", "shift_px", "zoom", "brightness", "contrast", "saturation", "hue", "stain", "blur")
    return AugmentSpec(
        crop_size=recipe.crop_size,
        out_px=recipe.network_px,
        strength=strength,
        flips=recipe.flips and strength > 0,
        quarter_turns=recipe.quarter_turns and strength > 0,
        **{name: strength * getattr(recipe, name) for name in magnitudes},
    )


@dataclass(frozen=True)
class Draws:
    """What happens to each of B views, on the host. ``draws[8:16]`` are the draws of those views.

    A source point q goes to ``zoom * R(angle) * F * T * q + shift``: T swaps x and y where ``transpose``, F negates x
    where ``flip_x`` and y where ``flip_y``, R turns by ``angle`` radians from x towards y.
    """

    transpose: NDArray[np.bool_]  # (B,)
    flip_x: NDArray[np.bool_]  # (B,)
    flip_y: NDArray[np.bool_]  # (B,)
    angle: NDArray[np.float64]  # (B,)
    zoom: NDArray[np.float64]  # (B,) above 1 enlarges
    shift: NDArray[np.float64]  # (B, 2) x, y in px of the crop
    brightness: NDArray[np.float64]  # (B,) factor
    contrast: NDArray[np.float64]  # (B,) factor about the view's mean grey
    saturation: NDArray[np.float64]  # (B,) factor
    hue: NDArray[np.float64]  # (B,) turns of the chroma plane
    stain_scale: NDArray[np.float64]  # (B, 3) factors of haematoxylin, eosin, residual
    stain_shift: NDArray[np.float64]  # (B, 3) added to them, in natural optical density
    blur: NDArray[np.float64]  # (B,) share of the 3x3 binomial

    def __len__(self) -> int:
        return len(self.angle)

    def __getitem__(self, rows: slice) -> Draws:
        return Draws(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def linear(self) -> NDArray[np.float64]:
        """The 2x2 part of each view's geometry: (B, 2, 2), source to crop."""
        cos, sin = self.zoom * np.cos(self.angle), self.zoom * np.sin(self.angle)
        x, y = np.where(self.flip_x, -1.0, 1.0), np.where(self.flip_y, -1.0, 1.0)
        turned = np.stack([cos * x, -sin * y, sin * x, cos * y], axis=-1).reshape(-1, 2, 2)
        return np.where(self.transpose[:, None, None], turned[:, :, ::-1], turned)


def draw(spec: AugmentSpec, key: int, views: NDArray[np.integer[Any]]) -> Draws:
    """The draws of some views; a view's draw depends on (spec, key, its index) alone.

    The ranges shrink so far that the centre 32x32 px box lies wholly inside the crop: first the zoom-in, then the
    rotation, then the shift. At crop 32 nothing but zooming out, and the turn that it makes room for, is left.

    Args:
        spec: see :func:`augment_spec`.
        key: 64 bits, see :func:`pcam_automl.counter.key_of`.
        views: (B,) indices of the views, not negative.
    """
    u = uniforms(key, views, _N_COLUMNS).astype(np.float64)
    signed = 2.0 * u - 1.0  # [-1, 1)
    quarter = np.floor(u[:, 2] * 4).astype(np.int64) * spec.quarter_turns
    zoom, angle, shift = _inside(spec, u[:, 5], signed[:, 6], signed[:, 3:5])
    return Draws(
        transpose=quarter % 2 == 1,
        flip_x=((quarter >> 1) & 1 == 1) ^ (spec.flips & (u[:, 0] < 0.5)),
        flip_y=((quarter ^ quarter >> 1) & 1 == 1) ^ (spec.flips & (u[:, 1] < 0.5)),
        angle=angle,
        zoom=zoom,
        shift=shift,
        brightness=1.0 + spec.brightness * signed[:, 7],
        contrast=1.0 + spec.contrast * signed[:, 8],
        saturation=1.0 + spec.saturation * signed[:, 9],
        hue=spec.hue * signed[:, 10],
        stain_scale=1.0 + spec.stain * signed[:, 11:14],
        stain_shift=0.1 * spec.stain * signed[:, 14:17],
        blur=spec.blur * u[:, 17],
    )


def _inside(
    spec: AugmentSpec, zoom_u: NDArray[np.float64], angle_u: NDArray[np.float64], shift_u: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Zoom (B,), angle (B,) and shift (B, 2) from numbers in [0, 1), [-1, 1), [-1, 1), the centre box kept inside.

    Ranges are narrowed, not values clipped, so that no mass piles up at the limits.
    """
    room = spec.crop_size / CENTRE_PX
    lowest, highest = max(1.0 - spec.zoom, _MIN_ZOOM), min(1.0 + spec.zoom, room)
    zoom = lowest + (highest - lowest) * zoom_u
    # A square of side s turned by an angle spans s * (|cos| + |sin|) = s * sqrt(2) * sin(45 deg + |angle|).
    diagonal = room / zoom / np.sqrt(2.0)
    reach = np.where(diagonal >= 1.0, np.pi, np.arcsin(np.minimum(diagonal, 1.0)) - np.pi / 4)
    angle = angle_u * np.clip(reach, 0.0, np.deg2rad(spec.rotation_deg))
    half = CENTRE_PX / 2 * zoom * (np.abs(np.cos(angle)) + np.abs(np.sin(angle)))
    shift = shift_u * np.clip(spec.crop_size / 2 - half, 0.0, spec.shift_px)[:, None]
    return zoom, angle, shift


@torch.no_grad()
def augment(
    images: Tensor, draws: Draws, spec: AugmentSpec, mean: Sequence[float], std: Sequence[float], *, dtype: torch.dtype
) -> Tensor:
    """The views that ``draws`` describe, normalised.

    Args:
        images: (B, 3, S, S) uint8 on the target device, S >= crop_size; a permuted (B, S, S, 3) tensor is as good.
        draws: of B views, from :func:`draw` with the same ``spec``.
        spec: sizes, and which steps are switched on at all.
        mean: three channel means in [0, 1].
        std: three channel deviations in [0, 1].
        dtype: of the result; everything before is float32.

    Returns:
        (B, 3, P, P), contiguous. Where only flips and quarter turns move a view its pixels are exact.

    Raises:
        RecipeError: the crop is larger than the patches.
        ValueError: ``images`` is not (B, 3, S, S) uint8 or ``draws`` has another length.
    """
    _check(images, spec.crop_size)
    if len(draws) != len(images):
        raise ValueError(f"draws must have one row an image, got {len(draws)} for {len(images)} images")
    x = _sample(images, draws, spec) if spec.moves else _resized(_turned(images, draws, spec.crop_size), spec.out_px)
    if spec.stain > 0:
        x = _stained(x, draws)
    if spec.colours:
        x = _coloured(x, draws)
    if spec.blur > 0:
        x = x.lerp_(_binomial(x), _to_device(draws.blur[:, None, None, None], x.device))
    if spec.stain > 0 or spec.colours:
        x = x.clamp_(0.0, _WHITE)
    return _normalised(x, mean, std, dtype)


@torch.no_grad()
def centre_view(
    images: Tensor, crop_size: int, out_px: int, mean: Sequence[float], std: Sequence[float], *, dtype: torch.dtype
) -> Tensor:
    """The evaluation view: centre crop, bilinear resize where ``out_px`` differs, normalisation.

    Arguments, result and errors are those of :func:`augment`; without draws, every view is the same.
    """
    _check(images, crop_size)
    return _normalised(_resized(_centre(images, crop_size), out_px), mean, std, dtype)


def eight_views(x: Tensor) -> Iterator[Tensor]:
    """The eight flips and turns (the dihedral group D4) of square views x: (B, C, P, P), the first being x itself."""
    for turned in (x, x.transpose(-2, -1)):
        yield turned
        yield turned.flip(-1)
        yield turned.flip(-2)
        yield turned.flip(-2, -1)


def _check(images: Tensor, crop_size: int) -> None:
    shape = tuple(images.shape)
    if images.dtype != torch.uint8 or len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3]:
        raise ValueError(f"images must be (B, 3, S, S) uint8, got {shape} {images.dtype}")
    if crop_size > shape[2]:
        rule = f"must be at most the patches' side of {shape[2]} px"
        raise RecipeError(f"recipe.crop_size {rule}, got {crop_size}; use a smaller crop")


def _to_device(values: NDArray[np.float64], device: torch.device) -> Tensor:
    """Host numbers as float32 on the device, without waiting for it."""
    tensor = torch.from_numpy(values.astype(np.float32))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _centre(images: Tensor, crop_size: int) -> Tensor:
    start = (images.shape[-1] - crop_size) // 2
    return images[:, :, start : start + crop_size, start : start + crop_size]


def _resized(crops: Tensor, out_px: int) -> Tensor:
    """(B, 3, c, c) uint8 to (B, 3, P, P) float32 in [0, 255], contiguous."""
    x = crops.to(torch.float32, memory_format=torch.contiguous_format)
    if out_px == crops.shape[-1]:
        return x
    return F.interpolate(x, size=(out_px, out_px), mode="bilinear", align_corners=False)


def _turned(images: Tensor, draws: Draws, crop_size: int) -> Tensor:
    """Centre crops under their flips and quarter turns, uint8: exact pixels. One pass a member of D4, not an image."""
    crops = _centre(images, crop_size)
    codes = draws.transpose * 4 + draws.flip_y * 2 + draws.flip_x
    if not codes.any():
        return crops
    order = np.argsort(codes, kind="stable")
    bounds = np.searchsorted(codes[order], np.arange(9))
    rows = torch.from_numpy(np.stack([order, np.argsort(order)])).to(images.device, non_blocking=True)
    sorted_ = crops.index_select(0, rows[0])
    parts = []
    for code in range(8):
        part = sorted_[bounds[code] : bounds[code + 1]]
        part = part.transpose(-2, -1) if code & 4 else part
        dims = [dim for bit, dim in ((1, -1), (2, -2)) if code & bit]
        parts.append(part.flip(dims) if dims else part)
    return torch.cat(parts).index_select(0, rows[1])


def _sample(images: Tensor, draws: Draws, spec: AugmentSpec) -> Tensor:
    """(B, 3, P, P) float32 in [0, 255]: each view sampled once from its whole patch, reflected beyond the border."""
    side = images.shape[-1]
    inverse = np.linalg.inv(draws.linear())  # crop to source
    theta = np.empty((len(draws), 2, 3))
    theta[:, :, :2] = inverse * (spec.crop_size / side)
    theta[:, :, 2:] = inverse @ draws.shift[:, :, None] * (-2.0 / side)
    theta_ = _to_device(theta, images.device)
    u = torch.arange(1 - spec.out_px, spec.out_px, 2, device=images.device, dtype=torch.float32) / spec.out_px
    # x and y as planes: affine_grid's interleaved pairs take five times as long (0.86 against 0.17 ms, 64 crops of 64).
    rows = torch.addcmul(theta_[:, :, 2:], theta_[:, :, 1:2], u)  # (B, 2, P)
    grid = torch.addcmul(rows[:, :, :, None], theta_[:, :, :1, None], u).permute(0, 2, 3, 1)
    return F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _stained(x: Tensor, draws: Draws) -> Tensor:
    """Levels, overwritten, with jittered stains (Tellez et al., IEEE TMI 37, 2018): (od D^-1 * scale + shift) D."""
    mix = np.einsum("ij,bj,jk->bki", np.linalg.inv(_STAINS), draws.stain_scale, _STAINS)  # columns: source channels
    # With od = log 255 - log x: log x' = mix log x + log 255 * (1 - mix 1) - shift D.
    bias = np.log(_WHITE) * (1.0 - mix.sum(2)) - draws.stain_shift @ _STAINS
    packed = _to_device(np.concatenate([mix, bias[:, :, None]], axis=2), x.device)
    logs = x.clamp_(min=1.0).log_().flatten(2)
    # No level above white: one saturated pixel times e^10 would own the mean grey of the contrast.
    return torch.baddbmm(packed[:, :, 3:], packed[:, :, :3], logs).exp_().clamp_(max=_WHITE).view_as(x)


def _coloured(x: Tensor, draws: Draws) -> Tensor:
    """Brightness, contrast about the mean grey, saturation about each pixel's grey, hue: (B, 3, P, P) in [0, 255].

    Grey is a fixed point of the saturation and the hue matrix, so the contrast's bias stays grey behind them. Hue
    turns the chroma plane of YIQ: linear, and the luma stays.
    """
    turn = 2.0 * np.pi * draws.hue
    turns = np.zeros((len(draws), 3, 3))
    turns[:, 0, 0] = 1.0
    turns[:, 1, 1] = turns[:, 2, 2] = np.cos(turn)
    turns[:, 2, 1] = np.sin(turn)
    turns[:, 1, 2] = -turns[:, 2, 1]
    saturation = draws.saturation[:, None, None]
    matrix = np.linalg.inv(_YIQ) @ turns @ _YIQ @ (saturation * np.eye(3) + (1.0 - saturation) * _LUMA)
    matrix *= (draws.brightness * draws.contrast)[:, None, None]
    luma = (draws.brightness * (1.0 - draws.contrast))[:, None] * _LUMA
    packed = _to_device(np.concatenate([matrix, luma[:, None]], axis=1), x.device)  # (B, 4, 3)
    levels = x.flatten(2)
    grey = packed[:, 3:] @ levels.mean(2, keepdim=True)  # (B, 1, 1)
    return torch.baddbmm(grey, packed[:, :3], levels).view_as(x)


def _binomial(x: Tensor) -> Tensor:
    """A 3x3 binomial blur, reflected at the border. Sums of shifted slices: 0.2 ms where conv2d takes 15 (64 of 64)."""
    x = F.pad(x, (1, 1, 1, 1), mode="reflect")
    x = torch.add(x[:, :, :-2], x[:, :, 2:]).add_(x[:, :, 1:-1], alpha=2.0)
    return torch.add(x[..., :-2], x[..., 2:]).add_(x[..., 1:-1], alpha=2.0).mul_(1 / 16)


@lru_cache(maxsize=32)
def _scale_and_bias(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Levels in [0, 255] times the first plus the second are normalised: two (1, 3, 1, 1) float32 tensors."""
    deviations = np.asarray(std, np.float64)
    values = np.stack([1.0 / (_WHITE * deviations), -np.asarray(mean) / deviations])[:, None, :, None, None]
    scale, bias = _to_device(values, device)
    return scale, bias


def _normalised(x: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Float32 levels in [0, 255], overwritten, to ``(level / 255 - mean) / std``."""
    scale, bias = _scale_and_bias(tuple(mean), tuple(std), x.device)
    return x.mul_(scale).add_(bias).to(dtype)
