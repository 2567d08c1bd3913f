"""Routed convolutions give torch's own answers and gradients, whatever their shape."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

from pcam_automl.models import convolution
from pcam_automl.models.convolution import (
    Route,
    RoutedConv2d,
    depthwise_weight_gradient,
    positions_weight_gradient,
    route_of,
    routed_conv2d,
    set_routed,
    spread_input_gradient,
    trimmed,
    windows_weight_gradient,
)

Pair = tuple[int, int]


def torchs_own(x: Tensor, weight: Tensor, gradient: Tensor, stride: Pair, padding: Pair, groups: int) -> list[Tensor]:
    """Gradients of input and weight in float64, which oneDNN does not take."""
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    nn.functional.conv2d(x, weight, None, stride, padding, 1, groups).backward(gradient.double())
    assert x.grad is not None
    assert weight.grad is not None
    return [x.grad.float(), weight.grad.float()]


@st.composite
def layers(draw: st.DrawFn, *, depthwise: bool) -> tuple[Tensor, Tensor, Tensor, Pair, Pair]:
    """Input, weight, output gradient, stride and padding of a convolution; the kernel may be larger than the map."""
    kernel = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    padding = draw(st.integers(0, kernel[0] - 1)), draw(st.integers(0, kernel[1] - 1))
    side = tuple(draw(st.integers(max(1, k - 2 * p), 9)) for k, p in zip(kernel, padding, strict=True))
    stride = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    channels, out, n = draw(st.integers(2, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    x = torch.randn(n, channels, *side, generator=rng).contiguous(memory_format=torch.channels_last)
    shape = (channels, 1, *kernel) if depthwise else (out, channels, *kernel)
    weight = torch.randn(shape, generator=rng)
    answer = nn.functional.conv2d(x, weight, None, stride, padding, 1, channels if depthwise else 1)
    return x, weight, torch.randn(answer.shape, generator=rng), stride, padding


@settings(deadline=None, max_examples=60)
@given(layers(depthwise=True))
def test_depthwise_gradients_are_torchs_own(layer: tuple[Tensor, Tensor, Tensor, Pair, Pair]) -> None:
    x, weight, gradient, stride, padding = layer
    for_x, for_weight = torchs_own(x, weight, gradient, stride, padding, x.shape[1])
    torch.testing.assert_close(spread_input_gradient(gradient, x, weight, stride, padding), for_x, rtol=1e-4, atol=1e-4)
    for route in (depthwise_weight_gradient, positions_weight_gradient):
        found = route(gradient, x, weight, stride, padding)
        torch.testing.assert_close(found, for_weight, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=60)
@given(layers(depthwise=True), st.booleans())
def test_a_depthwise_layer_is_the_plain_one_whatever_its_shape(
    layer: tuple[Tensor, Tensor, Tensor, Pair, Pair], low: bool
) -> None:
    x, weight, gradient, stride, padding = layer
    expected = torchs_own(x, weight, gradient, stride, padding, x.shape[1])
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        answer = routed_conv2d(x, weight, None, stride, padding, x.shape[1])
    plain = nn.functional.conv2d(x, weight, None, stride, padding, 1, x.shape[1]).detach()
    tolerance = 3e-2 if low else 1e-4
    torch.testing.assert_close(answer.float(), plain, rtol=tolerance, atol=tolerance * float(plain.abs().max()) + 1e-6)
    answer.backward(gradient.to(answer.dtype))
    for found, theirs in zip((x.grad, weight.grad), expected, strict=True):
        torch.testing.assert_close(found, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()) + 1e-6)


@settings(deadline=None, max_examples=60)
@given(layers(depthwise=False))
def test_weight_gradients_from_windows_are_torchs_own(layer: tuple[Tensor, Tensor, Tensor, Pair, Pair]) -> None:
    x, weight, gradient, stride, padding = layer
    _, for_weight = torchs_own(x, weight, gradient, stride, padding, 1)
    found = windows_weight_gradient(gradient, x, weight, stride, padding)
    torch.testing.assert_close(found, for_weight, rtol=1e-4, atol=1e-4)


CASES = {
    "1x1 as a product": ((2, 16, 4, 4), (8, 16, 1, 1), (1, 1), (0, 0), 1),
    "1x1 too large for a product": ((2, 16, 40, 40), (8, 16, 1, 1), (1, 1), (0, 0), 1),
    "1x1 with stride": ((2, 16, 8, 8), (8, 16, 1, 1), (2, 2), (0, 0), 1),
    "3x3 on a small map": ((2, 16, 4, 4), (8, 16, 3, 3), (1, 1), (1, 1), 1),
    "3x3 with stride on a large map": ((2, 32, 64, 64), (8, 32, 3, 3), (2, 2), (1, 1), 1),
    "stem": ((2, 3, 64, 64), (8, 3, 7, 7), (2, 2), (3, 3), 1),
    "depthwise 5x5": ((2, 16, 8, 8), (16, 1, 5, 5), (1, 1), (2, 2), 16),
    "depthwise 3x3 with stride": ((2, 16, 9, 9), (16, 1, 3, 3), (2, 2), (0, 0), 16),
    "depthwise 3x3 on 2x2": ((2, 16, 2, 2), (16, 1, 3, 3), (1, 1), (1, 1), 16),
    "depthwise 5x5 with stride on 7x7": ((2, 16, 7, 7), (16, 1, 5, 5), (2, 2), (0, 0), 16),
    "depthwise 7x7 on 1x1": ((2, 16, 1, 1), (16, 1, 7, 7), (1, 1), (3, 3), 16),
    "3x3 on 1x1": ((2, 16, 1, 1), (16, 16, 3, 3), (1, 1), (1, 1), 1),
    "depthwise 7x7 on 2x2": ((2, 16, 2, 2), (16, 1, 7, 7), (1, 1), (3, 3), 16),
    "groups": ((2, 16, 8, 8), (16, 4, 3, 3), (1, 1), (1, 1), 4),
}


@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_a_routed_layer_is_the_plain_one(case: str, low: bool) -> None:
    shape, kernel, stride, padding, groups = CASES[case]
    rng = torch.Generator().manual_seed(0)
    grads: list[list[Tensor]] = []
    images, weights = torch.randn(shape, generator=rng), torch.randn(kernel, generator=rng) * 0.1
    shift = torch.randn(kernel[0], generator=rng)
    for route in (routed_conv2d, nn.functional.conv2d):
        x = images.clone().contiguous(memory_format=torch.channels_last).requires_grad_()
        weight, bias = weights.clone().requires_grad_(), shift.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            if route is routed_conv2d:
                answer = routed_conv2d(x, weight, bias, stride, padding, groups)
            else:
                answer = nn.functional.conv2d(x, weight, bias, stride, padding, 1, groups)
        assert answer.dtype == (torch.bfloat16 if low else torch.float32)
        gradient = torch.randn(answer.shape, generator=torch.Generator().manual_seed(1))
        answer = torch.relu_(answer)  # layers behind a convolution overwrite its answer
        answer.backward(gradient.to(answer.dtype))
        grads.append([answer.detach().float(), *(t.grad.float() for t in (x, weight, bias) if t.grad is not None)])
    tolerance = 3e-2 if low else 1e-4
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050", "tf_efficientnet_lite0", "convnext_atto"])
def test_a_routed_network_has_the_gradients_of_the_plain_one(name: str, side: int) -> None:
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=1).train().to(memory_format=torch.channels_last)
    routed = copy.deepcopy(plain)
    set_routed(routed, True)
    images = torch.randn(4, 3, side, side).contiguous(memory_format=torch.channels_last)
    for network in (plain, routed):
        torch.manual_seed(1)  # stochastic depth
        network(images).square().sum().backward()
    assert list(routed.state_dict()) == list(plain.state_dict())
    largest = max(float(p.grad.norm()) for p in plain.parameters() if p.grad is not None)
    for (key, ours), theirs in zip(routed.named_parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert float((ours.grad - theirs.grad).norm()) < 1e-2 * float(theirs.grad.norm()) + 1e-4 * largest, key


def test_what_cannot_be_routed_is_left_and_routing_is_undone() -> None:
    network = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        Conv2dSame(4, 4, 3, stride=2),
        nn.ConvTranspose2d(4, 4, 3),
    )
    before = [type(module) for module in network]
    set_routed(network, True)
    assert [type(a) is not b for a, b in zip(network, before, strict=True)] == [True, False, False, False, True, False]
    assert isinstance(network[0], RoutedConv2d)
    set_routed(network, True)
    set_routed(network, False)
    assert [type(module) for module in network] == before


@pytest.mark.parametrize(
    ("side", "kernel", "stride", "padding", "expected"),
    [
        (1, 7, 1, 3, ((3, 4), 1, 0)),
        (2, 7, 1, 3, ((2, 5), 1, 1)),
        (1, 5, 2, 2, ((2, 3), 1, 0)),
        (2, 3, 2, 1, ((1, 3), 1, 0)),
        (2, 3, 1, 1, ((0, 3), 1, 1)),
        (3, 3, 2, 1, ((0, 3), 2, 1)),
        (9, 5, 2, 0, ((0, 5), 2, 0)),
        (2, 3, 1, 4, ((0, 3), 1, 4)),
    ],
)
def test_a_kernel_is_trimmed_to_what_meets_the_map(
    side: int, kernel: int, stride: int, padding: int, expected: tuple[Pair, int, int]
) -> None:
    sides, kernels = torch.Size((side, 9)), torch.Size((kernel, 3))
    rows, columns, strides, paddings = trimmed(sides, kernels, (stride, 1), (padding, 1))
    assert (rows, strides[0], paddings[0]) == expected
    assert (columns, strides[1], paddings[1]) == ((0, 3), 1, 1)


def test_rounding_by_positions_is_as_small_as_the_gradients_own() -> None:
    """Inputs far from zero and a gradient that sums to zero, as behind a rectifier and before a batch norm: pairs nearly cancel."""
    rng = torch.Generator().manual_seed(0)
    x = (torch.randn(64, 16, 8, 8, generator=rng) + 2).bfloat16()
    gradient = torch.randn(64, 16, 8, 8, generator=rng)
    gradient = (gradient - gradient.mean((0, 2, 3), keepdim=True)).bfloat16()
    weight = torch.zeros(16, 1, 7, 7).bfloat16()
    _, exact = torchs_own(x, weight, gradient, (1, 1), (3, 3), 16)
    errors = [
        float((route(gradient, x, weight, (1, 1), (3, 3)).float() - exact).norm() / exact.norm())
        for route in (positions_weight_gradient, depthwise_weight_gradient)
    ]
    assert errors[0] < 0.01
    assert errors[0] < 4 * errors[1]


def test_the_route_follows_from_the_shapes() -> None:
    def route(shape: tuple[int, ...], kernel: tuple[int, ...], stride: Pair, groups: int, low: bool) -> Route:
        pad = kernel[-1] // 2
        return route_of(torch.Size(shape), torch.Size(kernel), stride, (pad, pad), groups, low)

    assert route((64, 16, 4, 4), (8, 16, 1, 1), (1, 1), 1, False) == Route(product=True, weight="windows")
    assert route((64, 16, 8, 8), (8, 16, 1, 1), (1, 1), 1, True) == Route(weight="windows")
    assert route((64, 16, 8, 8), (8, 16, 1, 1), (1, 1), 1, False) == Route()
    assert route((64, 512, 2, 2), (512, 512, 3, 3), (1, 1), 1, False) == Route(weight="windows")
    assert route((64, 64, 16, 16), (64, 64, 3, 3), (1, 1), 1, True) == Route()
    assert route((64, 3, 64, 64), (64, 3, 7, 7), (2, 2), 1, True) == Route()
    assert route((64, 64, 16, 16), (128, 64, 3, 3), (2, 2), 1, True) == Route(weight="windows")
    assert route((64, 96, 16, 16), (96, 1, 3, 3), (2, 2), 96, True) == Route(spread=True)
    assert route((64, 96, 16, 16), (96, 1, 5, 5), (2, 2), 96, True) == Route(spread=True, weight="pieces")
    assert route((64, 96, 16, 16), (96, 1, 5, 5), (2, 2), 96, False) == Route()
    assert route((64, 96, 16, 16), (96, 24, 3, 3), (1, 1), 4, True) == Route()
    assert route((64, 96, 8, 8), (96, 1, 5, 5), (2, 2), 96, True) == Route(spread=True, weight="positions")
    assert route((64, 80, 8, 8), (80, 1, 7, 7), (1, 1), 80, True) == Route(weight="positions")
    assert route((64, 80, 8, 8), (80, 1, 7, 7), (1, 1), 80, False) == Route(weight="pieces")
    assert route((64, 40, 16, 16), (40, 1, 7, 7), (1, 1), 40, True) == Route(weight="pieces")
    assert route((64, 96, 2, 2), (96, 1, 3, 3), (1, 1), 96, True) == Route(weight="positions")
    assert route((64, 96, 2, 2), (96, 1, 3, 3), (1, 1), 96, False) == Route(weight="pieces")
    assert route((8, 40, 12, 12), (40, 1, 7, 7), (1, 1), 40, True) == Route(weight="pieces"), "few images"
    assert route((64, 96, 2, 400), (96, 1, 3, 3), (1, 1), 96, True) == Route(weight="pieces"), "too many pairs"
    assert route((64, 96, 4, 4), (96, 1, 3, 3), (1, 1), 96, True) == Route()
    assert route((64, 96, 4, 4), (96, 1, 3, 3), (2, 2), 96, True) == Route(spread=True)


@pytest.mark.parametrize(
    ("conv", "side"),
    [
        (RoutedConv2d(4, 8, 3, padding=1), 5),
        (RoutedConv2d(4, 4, 7, padding=3, groups=4), 5),
        (RoutedConv2d(4, 4, 7, padding=3, groups=4), 1),
    ],
    ids=["windows", "positions", "trimmed"],
)
def test_frozen_layers_get_no_gradient(conv: RoutedConv2d, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    conv.requires_grad_(False)
    x = torch.randn(2, 4, side, side, requires_grad=True)
    for route in ("windows_weight_gradient", "depthwise_weight_gradient", "positions_weight_gradient"):
        monkeypatch.setattr(convolution, route, None)  # would fail if it were called
    with torch.autocast("cpu", torch.bfloat16):
        answer = conv(x)
    answer.sum().backward()
    assert x.grad is not None
    assert conv.weight.grad is None
