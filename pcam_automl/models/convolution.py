"""Convolutions on a CPU whose gradients take another route than oneDNN's where that is the quicker one. Times nothing.

oneDNN's backward passes fall far behind its forward ones for some shapes. Measured here (two cores with AVX-512 bf16, 64
images, channels last), milliseconds of oneDNN and of the route taken instead:

    depthwise 5x5, 672 channels at 7 px, stride 2, bf16    input gradient 97, spread 0.9     weights 17, in pieces 1.3, by positions 0.4
    depthwise 7x7, 160 channels at 4 px, bf16              weights 3.5, in pieces 1.4, by positions 0.2
    depthwise 3x3, 1152 channels at 2 px, bf16             weights 10, by positions 0.5
    depthwise 7x7, 320 channels at 1 px                    forward 5.3, trimmed to 1x1 0.1
    3x3, 512 to 512 channels at 2 px, bf16 (fp32)          weights 7.6 (8.4), product 3.6 (7.4)
    3x3, 64 to 128 channels at 16 px, stride 2, bf16       weights 5.3, product 2.4
    1x1, 1280 to 320 channels at 2 px, bf16 (fp32)         weights 2.4 (2.6), product 0.6 (1.5); forward 0.9, product 0.5

The answers are the same sums in another order; by positions, in bf16, each pair's sum is rounded to bf16 before pairs are added
(an error of 0.2 % of the gradient, 0.16 % in pieces). Which route a layer takes follows from its shapes alone, so that
equal trainings stay equal; whether a network is routed at all is measured (training/compute.py).

Legend: B images, C and D channels in and out, H x W and P x Q sides in and out, k kernel side.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.padding import pad_same
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Pair = tuple[int, int]

FEW_POSITIONS = 1024
"""B * P * Q up to which a 1x1 convolution is a plain matrix product (four times as many for the weights in bf16)."""
FEW_MEETINGS, FEW_MEETINGS_LARGE = (5_200, 256), (25_000, 1_300)
"""P * Q * H * W up to which a depthwise weight gradient in bf16 goes by positions, and the same an image, for kernels of up to 5
and of more: the pairs are summed once, however few the images.
"""
FEW_WINDOWS, FEW_WINDOWS_LOW = 300, 600
"""B * P * Q up to which the weight gradient of a larger kernel is a product with its copied windows, in fp32 and in bf16."""


def set_routed(network: nn.Module, routed: bool) -> None:
    """Let every convolution of the network that can be routed be so, or none. Weights, names and hooks stay.

    Left alone are dilated ones, paddings other than zeros, and classes of their own (weight standardisation).
    """
    for module in network.modules():
        if routed and type(module) in _ROUTED and _can_be_routed(module):
            module.__class__ = _ROUTED[type(module)]
        elif not routed and type(module) in _PLAIN:
            module.__class__ = _PLAIN[type(module)]


def _can_be_routed(conv: nn.Module) -> bool:
    assert isinstance(conv, nn.Conv2d)
    return conv.dilation == (1, 1) and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


class RoutedConv2d(nn.Conv2d):
    """``nn.Conv2d`` by :func:`routed_conv2d`."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert not isinstance(self.padding, str)
        return routed_conv2d(input, weight, bias, _pair(self.stride), _pair(self.padding), self.groups)


class RoutedConv2dSame(Conv2dSame):
    """timm's ``Conv2dSame`` (TensorFlow's padding) by :func:`routed_conv2d`."""

    def forward(self, x: Tensor) -> Tensor:
        x = pad_same(x, list(self.weight.shape[-2:]), list(_pair(self.stride)), [1, 1])
        return routed_conv2d(x, self.weight, self.bias, _pair(self.stride), (0, 0), self.groups)


_ROUTED: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: RoutedConv2d, Conv2dSame: RoutedConv2dSame}
_PLAIN = {routed: plain for plain, routed in _ROUTED.items()}


def _pair(value: Any) -> Pair:
    first, second = value
    return int(first), int(second)


@dataclass(frozen=True)
class Route:
    """How a layer's passes run; what is left at its default is oneDNN's."""

    product: bool = False
    """Forward pass and input gradient are plain matrix products."""
    spread: bool = False
    """The input gradient convolves the output's gradient with zeros between."""
    weight: Literal["onednn", "windows", "pieces", "positions"] = "onednn"


@cache
def route_of(shape: torch.Size, kernel: torch.Size, stride: Pair, padding: Pair, groups: int, low: bool) -> Route:
    """The route of a layer.

    Args:
        shape: (B, C, H, W) of its input.
        kernel: (D, C / groups, k, k) of its weights.
        stride: down, across.
        padding: down, across.
        groups: C and D are split into.
        low: it computes in bf16.
    """
    n, channels, *sides = shape
    out, _, *reach = kernel
    n_positions, n_meetings, cramped = n, 1, False
    for side, span, step, pad in zip(sides, reach, stride, padding, strict=True):
        n_out = (side + 2 * pad - span) // step + 1
        n_positions *= n_out
        n_meetings *= n_out * side
        # One or two outputs that reach over the map's far edge: oneDNN's fast program for 3x3 steps aside.
        cramped |= n_out <= 2 and (n_out - 1) * step + span - pad > side
    if groups > 1:
        if not groups == channels == out:
            return Route()
        large = max(reach) > 3
        most, most_of_image = FEW_MEETINGS if max(reach) <= 5 else FEW_MEETINGS_LARGE
        if low and (large or cramped) and n_meetings <= min(most, most_of_image * n):
            return Route(spread=stride != (1, 1), weight="positions")
        in_pieces = (low or stride == (1, 1)) if large else cramped
        return Route(spread=low and stride != (1, 1), weight="pieces" if in_pieces else "onednn")
    if reach == [1, 1]:
        few = n_positions <= (4 * FEW_POSITIONS if low else FEW_POSITIONS)
        product = stride == (1, 1) and padding == (0, 0) and n_positions <= FEW_POSITIONS
        return Route(product=product, weight="windows" if few else "onednn")
    strided = low and stride != (1, 1) and channels >= 32  # the stem's 3 channels are oneDNN's
    few = n_positions <= (FEW_WINDOWS_LOW if low else FEW_WINDOWS)
    return Route(weight="windows" if few or strided else "onednn")


def routed_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, groups: int) -> Tensor:
    """``F.conv2d`` without dilation, under autocast as that one is, its passes by the quicker route.

    Args:
        x: (B, C, H, W) on the CPU.
        weight: (D, C / groups, k, k).
        bias: (D,) or None.
        stride: down, across.
        padding: zeros on both sides, down and across.
        groups: C and D are split into.

    Returns:
        (B, D, P, Q).
    """
    (top, bottom), (left, right), stride, padding = trimmed(x.shape[2:], weight.shape[2:], stride, padding)
    if (bottom - top, right - left) != weight.shape[2:]:
        weight = weight[:, :, top:bottom, left:right]
    low_by_autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if low_by_autocast else x.dtype
    route = route_of(x.shape, weight.shape, stride, padding, groups, dtype == torch.bfloat16)
    if route == _ONEDNN:
        return F.conv2d(x, weight, bias, stride, padding, 1, groups)
    if low_by_autocast:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _RoutedConv.apply(x, weight, bias, stride, padding, groups, route)  # type: ignore[no-any-return]


class _RoutedConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, groups: int, route: Route
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings = stride, padding, groups, route
        return _product(x, weight, bias) if route.product else F.conv2d(x, weight, bias, stride, padding, 1, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, groups, route = ctx.settings
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        for_x = for_weight = None
        if wants_x and route.product:
            for_x = _product(gradient, weight.transpose(0, 1), None)
        elif wants_x and route.spread:
            for_x = spread_input_gradient(gradient, x, weight, stride, padding)
        if wants_weight and route.weight == "windows":
            for_weight = windows_weight_gradient(gradient, x, weight, stride, padding)
        elif wants_weight and route.weight == "pieces":
            for_weight = depthwise_weight_gradient(gradient, x, weight, stride, padding)
        elif wants_weight and route.weight == "positions":
            for_weight = positions_weight_gradient(gradient, x, weight, stride, padding)
        mask = (wants_x and for_x is None, wants_weight and for_weight is None, False)
        if any(mask):
            theirs = _by_onednn(gradient, x, weight, stride, padding, groups, mask)
            for_x = theirs[0] if mask[0] else for_x
            for_weight = theirs[1] if mask[1] else for_weight
        for_bias = gradient.sum((0, 2, 3)) if wants_bias else None
        return for_x, for_weight, for_bias, None, None, None, None


_ONEDNN = Route()


def _by_onednn(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Pair,
    padding: Pair,
    groups: int,
    mask: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten.convolution_backward(  # type: ignore[no-any-return]
        gradient, x, weight, None, stride, padding, (1, 1), False, (0, 0), groups, mask
    )


def _seen(side: int, n_out: int, span: int, step: int, pad: int) -> tuple[int, int]:
    """First and past last place of a kernel's axis that ever meets the map; the others meet the padding alone."""
    return max(0, pad - (n_out - 1) * step), min(span, side + pad)


@cache
def trimmed(side: torch.Size, kernel: torch.Size, stride: Pair, padding: Pair) -> tuple[Pair, Pair, Pair, Pair]:
    """A kernel without its edges that only ever meet the padding (7x7 on a map of 1x1).

    An axis that would need another padding before than behind is left as it is.

    Args:
        side: (H, W) of the input.
        kernel: (k, k).
        stride: down, across.
        padding: down, across.

    Returns:
        First and past last row of the kernel that is left, the same of its columns, and its stride and padding.
    """
    found = []
    for length, span, step, pad in zip(side, kernel, stride, padding, strict=True):
        n_out = (length + 2 * pad - span) // step + 1
        first, last = _seen(length, n_out, span, step, pad)
        left = length + 2 * (pad - first) - (last - first)  # how far the kernel that is left can move
        if last <= first or left // step + 1 != n_out:
            found.append((0, span, step, pad))
        else:
            found.append((first, last, 1 if left == 0 else step, pad - first))
    down, across = found
    return down[:2], across[:2], (down[2], across[2]), (down[3], across[3])


def _rows(x: Tensor) -> Tensor:
    """(B, C, H, W) to (B * H * W, C); no copy where channels are last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B, C, H, W) and (D, C, 1, 1) to (B, D, H, W), channels last: no view, since layers after it overwrite it."""
    n, _, height, width = x.shape
    answer = torch.empty((n, len(weight), height, width), dtype=x.dtype, memory_format=torch.channels_last)
    rows, across = answer.permute(0, 2, 3, 1).view(-1, len(weight)), weight.flatten(1).t()
    if bias is None:
        torch.mm(_rows(x), across, out=rows)
    else:
        torch.addmm(bias, _rows(x), across, out=rows)
    return answer


def spread_input_gradient(gradient: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
    """(B, C, H, W) for a depthwise convolution: the output's gradient with zeros between, convolved with the turned kernel.

    Args:
        gradient: (B, C, P, Q) of the output.
        x: (B, C, H, W); its shape alone is used.
        weight: (C, 1, k, k).
        stride: of the convolution.
        padding: of the convolution, less than k.
    """
    (height, width), (high, wide) = x.shape[2:], weight.shape[2:]
    n, channels, down, across = gradient.shape
    top, left = high - 1 - padding[0], wide - 1 - padding[1]
    room = gradient.new_zeros((n, height + high - 1, width + wide - 1, channels))
    ends = top + (down - 1) * stride[0] + 1, left + (across - 1) * stride[1] + 1
    room[:, top : ends[0] : stride[0], left : ends[1] : stride[1]] = gradient.permute(0, 2, 3, 1)
    return F.conv2d(room.permute(0, 3, 1, 2), weight.flip(2, 3), groups=channels)


def windows_weight_gradient(gradient: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
    """(D, C, k, k) as one product of the output's gradient with the windows that the kernel saw, copied beside each other.

    Args:
        gradient: (B, D, P, Q) of the output.
        x: (B, C, H, W).
        weight: (D, C, k, k); its shape alone is used.
        stride: of the convolution.
        padding: of the convolution.
    """
    (high, wide), (n, out, down, across) = weight.shape[2:], gradient.shape
    if (high, wide, *padding) == (1, 1, 0, 0):  # each window is a pixel: nothing to copy
        seen = x if stride == (1, 1) else x[:, :, :: stride[0], :: stride[1]]
        return torch.mm(_rows(gradient).t(), _rows(seen)).view(weight.shape)
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0]))  # (B, H', W', C)
    by_image, by_row, by_column, by_channel = padded.stride()
    windows = padded.as_strided(
        (n, down, across, high, wide, x.shape[1]),
        (by_image, by_row * stride[0], by_column * stride[1], by_row, by_column, by_channel),
    )
    windows = windows.reshape(n * down * across, -1)  # (B * P * Q, k * k * C)
    return torch.mm(_rows(gradient).t(), windows).view(out, high, wide, -1).permute(0, 3, 1, 2)


def depthwise_weight_gradient(gradient: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
    """(C, 1, k, k) from pieces of 3x3, the one depthwise kernel whose weight gradient oneDNN has a fast program for.

    Weights that only ever meet the padding (5x5 on a map of 2x2) are left out: their gradient is zero.

    Args:
        gradient: (B, C, P, Q) of the output.
        x: (B, C, H, W).
        weight: (C, 1, k, k); its shape alone is used.
        stride: of the convolution.
        padding: of the convolution.
    """
    channels = len(weight)
    found = weight.new_zeros(weight.shape)
    spans, reach = [], []
    for axis in (0, 1):
        side, out, pad, step = x.shape[2 + axis], gradient.shape[2 + axis], padding[axis], stride[axis]
        first, last = _seen(side, out, weight.shape[2 + axis], step, pad)
        spans.append([(at, min(3, last - at)) for at in range(first, last, 3)])
        reach.append((out - 1) * step + 3)
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1] + 3, padding[0], padding[0] + 3))
    piece = weight.new_empty((channels, 1, 3, 3))
    for top, high in spans[0]:
        for left, wide in spans[1]:
            seen = padded[:, top : top + reach[0], left : left + reach[1]].contiguous().permute(0, 3, 1, 2)
            _, part, _ = _by_onednn(gradient, seen, piece, stride, (0, 0), channels, (False, True, False))
            found[:, :, top : top + high, left : left + wide] = part[:, :, :high, :wide]
    return found


def positions_weight_gradient(gradient: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
    """(C, 1, k, k) for a depthwise convolution on a small map: every position of the output with every one of the input, a matrix
    product a channel, and the sums over those pairs that meet in the same weight, one more.

    Args:
        gradient: (B, C, P, Q) of the output.
        x: (B, C, H, W).
        weight: (C, 1, k, k); its shape alone is used.
        stride: of the convolution.
        padding: of the convolution.
    """
    channels, n = len(weight), len(x)
    ours = gradient.permute(1, 2, 3, 0).reshape(channels, -1, n)  # (C, P * Q, B)
    theirs = x.permute(1, 0, 2, 3).reshape(channels, n, -1)  # (C, B, H * W)
    pairs = torch.bmm(ours, theirs).view(channels, -1)
    meeting = _meeting(x.shape[2:], gradient.shape[2:], weight.shape[2:], stride, padding).to(x.dtype)
    return torch.mm(pairs, meeting).view(weight.shape)


@lru_cache(maxsize=32)  # of a search's many shapes the latest: 2 MB for 7x7 at 12 px
def _meeting(side: torch.Size, out: torch.Size, kernel: torch.Size, stride: Pair, padding: Pair) -> Tensor:
    """(P * Q * H * W, k * k) of 0/1: output position (p, q) and input position (h, w) meet in weight (i, j)."""
    down, across = (
        (torch.arange(o)[:, None, None] * step + torch.arange(k) - pad == torch.arange(h)[:, None]).float()  # (P, H, k)
        for h, o, k, step, pad in zip(side, out, kernel, stride, padding, strict=True)
    )
    return torch.einsum("phi,qwj->pqhwij", down, across).reshape(-1, kernel[0] * kernel[1]).bfloat16()
