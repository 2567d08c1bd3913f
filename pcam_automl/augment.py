"""Batched augmentation and evaluation views of patches on their own device. Chooses no magnitudes, reads no files.

A view is one patch under one draw. Every draw comes from :func:`pcam_automl.counter.uniforms`, keyed by (key, view
index), so it does not depend on how a batch is cut. Lengths are px of the source patch, x to the right, y down, the
origin at the patch's centre. The whole chain samples the patch once and keeps few passes over memory:

    quarter turn, flips, rotation, zoom, shift, crop, resize    one affine grid over the whole patch
    stain jitter                                                log, one 3x3 matrix a view, exp
    brightness, contrast, saturation, hue                       one 3x3 matrix and bias a view
    blur, clamp to [0, 1], normalisation

Stain comes before colour as in a laboratory: the tissue is stained, then a scanner sees it.

A dense task's views are tiles: drawn uniformly over an image of H x W px, moved as the recipe says and not held to a centre
box; masks move along. What changes colours is in colour.py.

B views, S side of the source patch (H, W of an image), c crop or tile size, P out_px.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pcam_automl.colour import WHITE, blurred, coloured, normalised, stained, to_device
from pcam_automl.counter import uniforms
from pcam_automl.crops import centre, corners, resized, tiles, turned
from pcam_automl.errors import RecipeError
from pcam_automl.recipe import CENTRE_PX, Recipe

_N_COLUMNS = 20  # of uniform numbers a view; all are in use
_MIN_ZOOM = 0.5  # the centre box keeps at least half its side


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
    centred: bool = True
    """Of a patch: the crop lies in the middle and the centre box stays inside; else the tile may lie anywhere."""

    @property
    def moves(self) -> bool:
        """Whether a view can differ from a crop by more than flips and quarter turns, so that it is interpolated."""
        can_turn = self.crop_size > CENTRE_PX or not self.centred
        return self.zoom > 0 or (can_turn and (self.rotation_deg > 0 or self.shift_px > 0))

    @property
    def colours(self) -> bool:
        """Whether brightness, contrast, saturation or hue can change."""
        return max(self.brightness, self.contrast, self.saturation, self.hue) > 0


def augment_spec(recipe: Recipe) -> AugmentSpec:
    """The recipe's augmentation with every magnitude multiplied by ``recipe.augment``."""
    strength = recipe.augment
    magnitudes = ("rotation_deg", "shift_px", "zoom", "brightness", "contrast", "saturation", "hue", "stain", "blur")
    return AugmentSpec(
        crop_size=recipe.crop_size if recipe.tile_size is None else recipe.tile_size,
        centred=recipe.task == "patch",
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
    place: NDArray[np.float64]  # (B, 2) x, y in [0, 1) of a tile that is not centred

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

    Of a patch, the ranges shrink so far that the centre 32x32 px box lies wholly inside the crop: first the zoom-in, then the
    rotation, then the shift. At crop 32 nothing but zooming out, and the turn that it makes room for, is left.

    Args:
        spec: see :func:`augment_spec`.
        key: 64 bits, see :func:`pcam_automl.counter.key_of`.
        views: (B,) indices of the views, not negative.
    """
    u = uniforms(key, views, _N_COLUMNS).astype(np.float64)
    signed = 2.0 * u - 1.0  # [-1, 1)
    quarter = np.floor(u[:, 2] * 4).astype(np.int64) * spec.quarter_turns
    zoom, angle, shift = (_inside if spec.centred else _anywhere)(spec, u[:, 5], signed[:, 6], signed[:, 3:5])
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
        place=u[:, 18:20],
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


def _anywhere(
    spec: AugmentSpec, zoom_u: NDArray[np.float64], angle_u: NDArray[np.float64], shift_u: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """As :func:`_inside`, with nothing to be kept inside."""
    lowest, highest = max(1.0 - spec.zoom, _MIN_ZOOM), 1.0 + spec.zoom
    zoom = lowest + (highest - lowest) * zoom_u
    return zoom, angle_u * np.deg2rad(spec.rotation_deg), shift_u * spec.shift_px


@torch.no_grad()
def augment(
    images: Tensor, draws: Draws, spec: AugmentSpec, mean: Sequence[float], std: Sequence[float], *, dtype: torch.dtype
) -> Tensor:
    """The views that ``draws`` describe, normalised.

    Args:
        images: (B, 3, S, S) uint8 on the target device, S >= crop_size; a permuted (B, S, S, 3) tensor is as good. Tiles
            are cut from (B, 3, H, W).
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
    _check(images, draws, spec)
    return _appearance(_geometry(images, draws, spec), draws, spec, mean, std, dtype)


@torch.no_grad()
def augment_pair(
    images: Tensor,
    masks: Tensor,
    draws: Draws,
    spec: AugmentSpec,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """As :func:`augment`, and the masks (B, 1, H, W) uint8 under the same geometry: (B, P, P) float32, 0 or 1.

    Masks are sampled at the nearest pixel and reflected beyond the border as the images are.
    """
    _check(images, draws, spec)
    if masks.shape != (len(images), 1, *images.shape[2:]) or masks.dtype != torch.uint8:
        raise ValueError(f"masks must be uint8 as large as the images, got {tuple(masks.shape)} {masks.dtype}")
    views = _appearance(_geometry(images, draws, spec), draws, spec, mean, std, dtype)
    return views, _geometry(masks, draws, spec, "nearest")[:, 0]


@torch.no_grad()
def centre_view(
    images: Tensor, crop_size: int, out_px: int, mean: Sequence[float], std: Sequence[float], *, dtype: torch.dtype
) -> Tensor:
    """The evaluation view: centre crop, bilinear resize where ``out_px`` differs, normalisation.

    Arguments, result and errors are those of :func:`augment`; without draws, every view is the same.
    """
    _check_images(images, crop_size, square=True)
    return normalised(resized(centre(images, crop_size), out_px), mean, std, dtype)


def eight_views(x: Tensor) -> Iterator[Tensor]:
    """The eight flips and turns (the dihedral group D4) of square views x: (B, C, P, P), the first being x itself."""
    for view in (x, x.transpose(-2, -1)):
        yield view
        yield view.flip(-1)
        yield view.flip(-2)
        yield view.flip(-2, -1)


def _check(images: Tensor, draws: Draws, spec: AugmentSpec) -> None:
    _check_images(images, spec.crop_size, square=spec.centred)
    if len(draws) != len(images):
        raise ValueError(f"draws must have one row an image, got {len(draws)} for {len(images)} images")


def _check_images(images: Tensor, crop_size: int, *, square: bool) -> None:
    shape = tuple(images.shape)
    if images.dtype != torch.uint8 or len(shape) != 4 or shape[1] != 3 or (square and shape[2] != shape[3]):
        raise ValueError(f"images must be (B, 3, {'S, S' if square else 'H, W'}) uint8, got {shape} {images.dtype}")
    if crop_size > min(shape[2:]):
        field, what = ("crop_size", "crop") if square else ("tile_size", "tile")
        rule = f"must be at most the patches' side of {min(shape[2:])} px"
        raise RecipeError(f"recipe.{field} {rule}, got {crop_size}; use a smaller {what}")


def _geometry(
    images: Tensor, draws: Draws, spec: AugmentSpec, mode: Literal["bilinear", "nearest"] = "bilinear"
) -> Tensor:
    """(B, C, H, W) uint8 to (B, C, P, P) float32 levels; exact pixels where only flips and quarter turns move a view."""
    if spec.moves:
        grid = _grid(images, draws, spec)
        return F.grid_sample(images.float(), grid, mode=mode, padding_mode="reflection", align_corners=False)
    corner = corners(images.shape[2:], draws.place, spec.crop_size)
    crops = centre(images, spec.crop_size) if spec.centred else tiles(images, corner, spec.crop_size)
    codes = draws.transpose * 4 + draws.flip_y * 2 + draws.flip_x
    return resized(turned(crops, codes), spec.out_px)


def _appearance(
    x: Tensor, draws: Draws, spec: AugmentSpec, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """Stain, colours, blur and normalisation of levels, overwritten."""
    if spec.stain > 0:
        x = stained(x, draws.stain_scale, draws.stain_shift)
    if spec.colours:
        x = coloured(x, draws.brightness, draws.contrast, draws.saturation, draws.hue)
    if spec.blur > 0:
        x = blurred(x, draws.blur)
    if spec.stain > 0 or spec.colours:
        x = x.clamp_(0.0, WHITE)
    return normalised(x, mean, std, dtype)


def _grid(images: Tensor, draws: Draws, spec: AugmentSpec) -> Tensor:
    """(B, P, P, 2) where each view is sampled in its whole image, x and y in [-1, 1]."""
    height, width = images.shape[2:]
    side = np.array([[width], [height]], np.float64)
    inverse = np.linalg.inv(draws.linear())  # crop to source
    theta = np.empty((len(draws), 2, 3))
    theta[:, :, :2] = inverse * (spec.crop_size / side)
    theta[:, :, 2:] = inverse @ draws.shift[:, :, None] * (-2.0 / side)
    if not spec.centred:
        middle = corners((height, width), draws.place, spec.crop_size)[:, :, None] + spec.crop_size / 2 - side / 2
        theta[:, :, 2:] += middle * (2.0 / side)
    theta_ = to_device(theta, images.device)
    u = torch.arange(1 - spec.out_px, spec.out_px, 2, device=images.device, dtype=torch.float32) / spec.out_px
    # x and y as planes: affine_grid's interleaved pairs take five times as long (0.86 against 0.17 ms, 64 crops of 64).
    rows = torch.addcmul(theta_[:, :, 2:], theta_[:, :, 1:2], u)  # (B, 2, P)
    return torch.addcmul(rows[:, :, :, None], theta_[:, :, :1, None], u).permute(0, 2, 3, 1)
