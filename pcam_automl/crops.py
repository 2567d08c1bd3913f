"""Exact cuts of a batch: centre crops, tiles, flips and quarter turns, resizing. Draws nothing, changes no colour."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor


def centre(images: Tensor, crop_size: int) -> Tensor:
    """The centre crops (B, C, c, c) of patches (B, C, S, S), a view."""
    start = (images.shape[-1] - crop_size) // 2
    return images[:, :, start : start + crop_size, start : start + crop_size]


def corners(shape: Sequence[int], place: NDArray[np.float64], crop_size: int) -> NDArray[np.int64]:
    """(B, 2) x, y of the upper left pixel of each tile, uniform over all places where it lies in the image.

    Args:
        shape: (H, W) of the image, at least ``crop_size``.
        place: (B, 2) x, y in [0, 1).
        crop_size: side of a tile.
    """
    room = np.array([shape[1], shape[0]]) - crop_size + 1
    return np.asarray(np.minimum((place * room).astype(np.int64), room - 1))


def tiles(images: Tensor, corner: NDArray[np.int64], crop_size: int) -> Tensor:
    """The tiles (B, C, c, c) of images (B, C, H, W) from (B, 2) x, y on: exact pixels, one gather for all of them."""
    if tuple(images.shape[2:]) == (crop_size, crop_size):
        return images
    at = torch.from_numpy(corner).to(images.device, non_blocking=True)
    along = torch.arange(crop_size, device=images.device)
    rows, columns = at[:, 1:] + along, at[:, :1] + along  # (B, c)
    views = torch.arange(len(images), device=images.device)[:, None, None]
    cut = images.permute(0, 2, 3, 1)[views, rows[:, :, None], columns[:, None, :]]  # (B, c, c, C)
    return cut.permute(0, 3, 1, 2)


def resized(crops: Tensor, out_px: int) -> Tensor:
    """(B, C, c, c) uint8 to (B, C, P, P) float32 in [0, 255], contiguous."""
    x = crops.to(torch.float32, memory_format=torch.contiguous_format)
    if out_px == crops.shape[-1]:
        return x
    return F.interpolate(x, size=(out_px, out_px), mode="bilinear", align_corners=False)


def turned(crops: Tensor, codes: NDArray[np.int64]) -> Tensor:
    """Crops under their flips and quarter turns, exact pixels. One pass a member of D4, not an image.

    Args:
        crops: (B, C, c, c).
        codes: (B,) 4 to swap x and y, then 2 to negate y, 1 to negate x, added up.
    """
    if not codes.any():
        return crops
    order = np.argsort(codes, kind="stable")
    bounds = np.searchsorted(codes[order], np.arange(9))
    rows = torch.from_numpy(np.stack([order, np.argsort(order)])).to(crops.device, non_blocking=True)
    sorted_ = crops.index_select(0, rows[0])
    parts = []
    for code in range(8):
        part = sorted_[bounds[code] : bounds[code + 1]]
        part = part.transpose(-2, -1) if code & 4 else part
        dims = [dim for bit, dim in ((1, -1), (2, -2)) if code & bit]
        parts.append(part.flip(dims) if dims else part)
    return torch.cat(parts).index_select(0, rows[1])
