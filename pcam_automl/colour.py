"""What changes the colours of a batch: stain, brightness, contrast, saturation, hue, blur, normalisation. Moves no pixel.

B views, P their side; levels are float32 in [0, 255].
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

WHITE = 255.0
_LUMA = np.array([0.299, 0.587, 0.114])  # Rec. 601
_YIQ = np.array([_LUMA, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
# Optical densities of haematoxylin, eosin and DAB as rows (Ruifrok & Johnston, Anal Quant Cytol Histol 23, 2001).
_STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])

Floats = NDArray[np.float64]


def to_device(values: Floats, device: torch.device) -> Tensor:
    """Host numbers as float32 on the device, without waiting for it."""
    tensor = torch.from_numpy(values.astype(np.float32))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def stained(x: Tensor, scale: Floats, shift: Floats) -> Tensor:
    """Levels, overwritten, with jittered stains (Tellez et al., IEEE TMI 37, 2018): (od D^-1 * scale + shift) D.

    Args:
        x: (B, 3, P, P) float32 in [0, 255].
        scale: (B, 3) factors of haematoxylin, eosin, residual.
        shift: (B, 3) added to them, in natural optical density.
    """
    mix = np.einsum("ij,bj,jk->bki", np.linalg.inv(_STAINS), scale, _STAINS)  # columns: source channels
    # With od = log 255 - log x: log x' = mix log x + log 255 * (1 - mix 1) - shift D.
    bias = np.log(WHITE) * (1.0 - mix.sum(2)) - shift @ _STAINS
    packed = to_device(np.concatenate([mix, bias[:, :, None]], axis=2), x.device)
    logs = x.clamp_(min=1.0).log_().flatten(2)
    # No level above white: one saturated pixel times e^10 would own the mean grey of the contrast.
    return torch.baddbmm(packed[:, :, 3:], packed[:, :, :3], logs).exp_().clamp_(max=WHITE).view_as(x)


def coloured(x: Tensor, brightness: Floats, contrast: Floats, saturation: Floats, hue: Floats) -> Tensor:
    """Brightness, contrast about the mean grey, saturation about each pixel's grey, hue: (B, 3, P, P) in [0, 255].

    Grey is a fixed point of the saturation and the hue matrix, so the contrast's bias stays grey behind them. Hue
    turns the chroma plane of YIQ: linear, and the luma stays. Each is (B,): three factors, and turns of the circle.
    """
    turn = 2.0 * np.pi * hue
    turns = np.zeros((len(hue), 3, 3))
    turns[:, 0, 0] = 1.0
    turns[:, 1, 1] = turns[:, 2, 2] = np.cos(turn)
    turns[:, 2, 1] = np.sin(turn)
    turns[:, 1, 2] = -turns[:, 2, 1]
    saturation = saturation[:, None, None]
    matrix = np.linalg.inv(_YIQ) @ turns @ _YIQ @ (saturation * np.eye(3) + (1.0 - saturation) * _LUMA)
    matrix *= (brightness * contrast)[:, None, None]
    luma = (brightness * (1.0 - contrast))[:, None] * _LUMA
    packed = to_device(np.concatenate([matrix, luma[:, None]], axis=1), x.device)  # (B, 4, 3)
    levels = x.flatten(2)
    grey = packed[:, 3:] @ levels.mean(2, keepdim=True)  # (B, 1, 1)
    return torch.baddbmm(grey, packed[:, :3], levels).view_as(x)


def blurred(x: Tensor, share: Floats) -> Tensor:
    """``x``, overwritten, with (B,) shares of its 3x3 binomial blur mixed in."""
    return x.lerp_(_binomial(x), to_device(share[:, None, None, None], x.device))


def _binomial(x: Tensor) -> Tensor:
    """A 3x3 binomial blur, reflected at the border. Sums of shifted slices: 0.2 ms where conv2d takes 15 (64 of 64)."""
    x = F.pad(x, (1, 1, 1, 1), mode="reflect")
    x = torch.add(x[:, :, :-2], x[:, :, 2:]).add_(x[:, :, 1:-1], alpha=2.0)
    return torch.add(x[..., :-2], x[..., 2:]).add_(x[..., 1:-1], alpha=2.0).mul_(1 / 16)


@lru_cache(maxsize=32)
def _scale_and_bias(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Levels in [0, 255] times the first plus the second are normalised: two (1, 3, 1, 1) float32 tensors."""
    deviations = np.asarray(std, np.float64)
    values = np.stack([1.0 / (WHITE * deviations), -np.asarray(mean) / deviations])[:, None, :, None, None]
    scale, bias = to_device(values, device)
    return scale, bias


def normalised(x: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Float32 levels in [0, 255], overwritten, to ``(level / 255 - mean) / std``."""
    scale, bias = _scale_and_bias(tuple(mean), tuple(std), x.device)
    return x.mul_(scale).add_(bias).to(dtype)
