"""The notebooks' small convolutional networks, in timm's registry. One block network; holds no weights and no recipe.

Legend: B images, C channels, px the input side. They are built as Keras builds them (initial values, batch norm's epsilon and
momentum, flattening in the order H, W, C), so that a Keras network's weights carry over and give the same logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

NORM_EPS = 1e-3
NORM_MOMENTUM = 0.01
"""Keras' BatchNormalization: epsilon 1e-3 and momentum 0.99, which torch counts from the other end."""

PRELU_SLOPE = 0.25

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "leaky_relu": nn.LeakyReLU,
}


@dataclass(frozen=True)
class Blocks:
    """What a block network is made of; the recipe's ``cnn_*`` fields of the same names replace single values.

    Attributes:
        filters: of each block.
        convs: convolutions in a block.
        kernel: side of the kernels, odd.
        activation: after every convolution and every dense layer of the top.
        pool: ``max`` or ``avg``, 2x2 behind a block.
        norm: ``none``; ``each`` is conv, activation, BN, activation; ``block`` is one BN behind the pooling.
        dropout: behind a block.
        dense: widths of the top's dense layers.
        first_same: the network's first convolution keeps the side ("same"); all others are "valid".
    """

    filters: tuple[int, ...]
    convs: int
    dense: tuple[int, ...]
    kernel: int = 3
    activation: str = "relu"
    pool: str = "max"
    norm: str = "none"
    dropout: float = 0.0
    first_same: bool = False


OPTIONS = frozenset(field.name for field in fields(Blocks)) - {"first_same"}
"""What a recipe may override, without its prefix ``cnn_``."""

NETWORKS: dict[str, tuple[Blocks, int]] = {
    "keras_cnn_1": (Blocks((16, 32), convs=2, dense=(256,)), 64),
    "keras_cnn_2": (Blocks((32, 32), convs=2, dense=(512,), norm="each"), 64),
    "cnn_basic": (
        Blocks((32,), convs=2, dense=(512, 256, 64), norm="block", dropout=0.25, first_same=True),
        96,
    ),
    "cnn_deep": (
        Blocks((32, 64, 128, 256), convs=2, dense=(512, 256, 64), norm="block", dropout=0.25, first_same=True),
        96,
    ),
    "cnn_prelu": (
        Blocks(
            (32, 64, 128),
            convs=5,
            dense=(512, 256, 64),
            activation="prelu",
            norm="block",
            dropout=0.25,
            first_same=True,
        ),
        96,
    ),
}
"""Name to blocks and the notebook's own input side in px."""


class ElementPReLU(nn.Module):
    """A slope for every element of the input (C, H, W) or (F,), as Keras' PReLU has without ``shared_axes``."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.full(shape, PRELU_SLOPE))

    def forward(self, x: Tensor) -> Tensor:
        """(B, *shape) -> (B, *shape)."""
        slope = self.slope.to(x.dtype)  # else all that follows would be float32 under autocast
        return torch.where(x > 0, x, slope * x)


class BlockCnn(nn.Module):
    """Blocks of convolutions, then dense layers on the flattened map: images (B, 3, px, px) -> logits (B, num_classes).

    Args:
        blocks: its parts.
        img_size: input side in px; the first dense layer's width depends on it.
        num_classes: outputs; 0 leaves the last layer out.
        in_chans: input channels.
        drop_rate: dropout before the last layer.

    Raises:
        ValueError: nothing of the map is left at this side.
    """

    def __init__(
        self,
        blocks: Blocks,
        *,
        img_size: int | tuple[int, int] = 96,
        num_classes: int = 1,
        in_chans: int = 3,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        px = img_size if isinstance(img_size, int) else img_size[0]
        parts: list[nn.Module] = []
        channels, side = in_chans, px
        for number, width in enumerate(blocks.filters):
            same = blocks.first_same and number == 0
            block, side = _block(blocks, channels, width, side, first_same=same)
            parts.append(block)
            channels = width
        self.features = nn.Sequential(*parts)
        self.feature_info = [
            {"num_chs": width, "reduction": 2 ** (number + 1), "module": f"features.{number}"}
            for number, width in enumerate(blocks.filters)
        ]
        self.num_features = channels
        top: list[nn.Module] = []
        units = channels * side * side
        for width in blocks.dense:
            top += [nn.Linear(units, width), _activation(blocks.activation, width)]
            units = width
        self.top = nn.Sequential(*top)
        self.head_hidden_size = units
        self.drop = nn.Dropout(drop_rate)
        self.fc: nn.Module = nn.Linear(units, num_classes) if num_classes else nn.Identity()
        self.apply(_initialise)

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh last layer; there is no global pooling to choose."""
        self.num_classes = num_classes
        self.fc = nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()
        self.fc.apply(_initialise)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, px, px) -> (B, C, h, w), the map behind the last block."""
        return self.features(x)  # type: ignore[no-any-return]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, C, h, w) -> (B, num_classes), or (B, F) before the last layer."""
        x = self.top(x.permute(0, 2, 3, 1).flatten(1))  # Keras flattens H, W, C
        return x if pre_logits else self.fc(self.drop(x))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, px, px) -> (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


def _block(blocks: Blocks, channels: int, width: int, side: int, *, first_same: bool) -> tuple[nn.Sequential, int]:
    """One block and the side of its output."""
    layers: list[nn.Module] = []
    for number in range(blocks.convs):
        same = first_same and number == 0
        layers.append(nn.Conv2d(channels, width, blocks.kernel, padding=blocks.kernel // 2 if same else 0))
        side -= 0 if same else blocks.kernel - 1
        if side < 2:
            raise ValueError("nothing of the picture is left before the pooling")
        layers.append(_activation(blocks.activation, width, side, side))
        if blocks.norm == "each":
            layers += [_norm(width), _activation(blocks.activation, width, side, side)]
        channels = width
    layers.append(nn.MaxPool2d(2) if blocks.pool == "max" else nn.AvgPool2d(2))
    side //= 2
    if blocks.norm == "block":
        layers.append(_norm(width))
    if blocks.dropout:
        layers.append(nn.Dropout(blocks.dropout))
    return nn.Sequential(*layers), side


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=NORM_EPS, momentum=NORM_MOMENTUM)


def _activation(name: str, *shape: int) -> nn.Module:
    return ElementPReLU(*shape) if name == "prelu" else _ACTIVATIONS[name]()


def _initialise(module: nn.Module) -> None:
    """Keras' default for convolutions and dense layers: Glorot uniform, biases zero."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def register(
    name: str, build: Callable[..., nn.Module], *, px: int, classifier: str, first_conv: str, fixed_size: bool
) -> None:
    """Make ``timm.create_model(name, ...)`` call ``build``, with a configuration that leaves pixels in [0, 1] as they are.

    Args:
        name: not yet one of timm's.
        build: takes timm's options (``num_classes``, ``in_chans``, ``img_size``) and those of its own.
        px: the input side of its configuration.
        classifier: name of its last layer.
        first_conv: name of its first convolution.
        fixed_size: whether the network is built for one input side and takes ``img_size``.
    """

    def entry(pretrained: bool = False, **options: Any) -> Any:
        return build_model_with_cfg(build, name, pretrained, **options)

    entry.__name__, entry.__module__ = name, __name__  # timm's names for it
    default_cfgs[name] = generate_default_cfgs(
        {
            name: {
                "input_size": (3, px, px),
                "fixed_input_size": fixed_size,
                "num_classes": 1,
                "mean": (0.0, 0.0, 0.0),
                "std": (1.0, 1.0, 1.0),
                "classifier": classifier,
                "first_conv": first_conv,
            }
        }
    )[name]
    register_model(entry)


def _builder(name: str) -> Callable[..., BlockCnn]:
    def build(**options: Any) -> BlockCnn:
        overrides = {key: options.pop(key) for key in OPTIONS & set(options)}
        return BlockCnn(replace(NETWORKS[name][0], **overrides), **options)

    return build


default_cfgs: dict[str, Any] = {}
"""Where timm's ``register_model`` looks for a name's configuration."""

__all__ = ["NETWORKS", "OPTIONS", "BlockCnn", "Blocks", "ElementPReLU", "register"]

for _name, (_blocks, _px) in NETWORKS.items():
    register(_name, _builder(_name), px=_px, classifier="fc", first_conv="features.0.0", fixed_size=True)
