"""Networks for dense tasks: the notebook's U-Net and its linear baseline, and a U-Net decoder behind a timm encoder.

Legend: B images, px their side. Images (B, 3, px, px) -> logits (B, 2, px, px) of the two classes, or (B, 1, px, px).
Reads no weights.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcam_automl.errors import RecipeError
from pcam_automl.models.cnn import register

UNET_FILTERS = (64, 128, 256, 512, 1024)
OPTIONS = {"unet": frozenset({"filters"}), "dense_linear": frozenset({"kernel"})}
"""What a recipe may override, without its prefix ``cnn_``; the names are those of all networks that are dense by themselves."""

DECODER_CHANNELS = (256, 128, 64, 32, 16)
"""segmentation-models-pytorch's own, coarse to fine."""


class Unet(nn.Module):
    """U-Net (Ronneberger et al. 2015) with padded convolutions and no batch norm, two classes.

    Args:
        filters: widths from the finest to the coarsest level; the input's side is a multiple of 2^(levels - 1).
        num_classes: outputs a pixel.
        in_chans: input channels.
        drop_rate: dropout before the last convolution.
    """

    def __init__(
        self,
        filters: tuple[int, ...] = UNET_FILTERS,
        *,
        num_classes: int = 2,
        in_chans: int = 3,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        widths = (in_chans, *filters)
        self.down = nn.ModuleList(_pair(a, b) for a, b in pairwise(widths))
        self.pool = nn.MaxPool2d(2)
        ups = list(zip(filters[:0:-1], filters[-2::-1], strict=True))  # (1024, 512), (512, 256), ...
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in ups)
        # the finest stage has no activations: the notebook's last stage is two plain convolutions and the 1x1
        self.merge = nn.ModuleList(_pair(2 * b, b, plain=n == len(ups) - 1) for n, (_, b) in enumerate(ups))
        self.drop = nn.Dropout(drop_rate)
        self.head = nn.Conv2d(filters[0], num_classes, 1)

    def get_classifier(self) -> nn.Module:
        """The last convolution."""
        return self.head

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, px, px) -> (B, filters[0], px, px)."""
        skips = []
        for number, stage in enumerate(self.down):
            x = stage(self.pool(x) if number else x)
            skips.append(x)
        for up, merge, skip in zip(self.up, self.merge, skips[-2::-1], strict=True):
            x = merge(torch.cat([skip, up(x)], dim=1))
        return x

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, px, px) -> (B, num_classes, px, px)."""
        return self.head(self.drop(self.forward_features(x)))  # type: ignore[no-any-return]


class DenseLinear(nn.Module):
    """One padded convolution: the least that can look at a pixel's surroundings."""

    def __init__(self, kernel: int = 3, *, num_classes: int = 2, in_chans: int = 3, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.drop = nn.Dropout(drop_rate)
        self.head = nn.Conv2d(in_chans, num_classes, kernel, padding=kernel // 2)

    def get_classifier(self) -> nn.Module:
        """The convolution."""
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, px, px) -> (B, num_classes, px, px)."""
        return self.head(self.drop(x))  # type: ignore[no-any-return]


class TimmUnet(nn.Module):
    """segmentation-models-pytorch's U-Net decoder behind a timm encoder: (B, 3, px, px) -> (B, 1, px, px), any px >= 32.

    Args:
        backbone: timm's name; its encoder starts from fresh weights, see :meth:`load_encoder`.
        drop_rate: dropout before the last convolution.

    Raises:
        RecipeError: the backbone gives no maps at halved sides.
    """

    def __init__(self, backbone: str, *, drop_rate: float = 0.0) -> None:
        super().__init__()
        from segmentation_models_pytorch import Unet as SmpUnet  # slow to import, and only dense tasks need it

        depth = _encoder_depth(backbone)
        try:
            self.unet = SmpUnet(
                f"tu-{backbone}",
                encoder_depth=depth,
                encoder_weights=None,
                decoder_channels=DECODER_CHANNELS[:depth],
                in_channels=3,
                classes=1,
            )
        except (ValueError, RuntimeError, AttributeError, KeyError, IndexError) as fault:
            raise _no_encoder(backbone, fault) from None
        self.unet.segmentation_head = nn.Sequential(nn.Dropout(drop_rate), self.unet.segmentation_head)
        self.stride = 2**depth

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        """All that stands behind the encoder."""
        return self.unet.decoder, self.unet.segmentation_head

    def load_encoder(self, plain: nn.Module) -> None:
        """Copy the weights of timm's whole network of the same name into the encoder."""
        encoder: nn.Module = self.unet.encoder.model
        # timm's feature wrappers rename "layer1.0.conv1" to "layer1_0.conv1", or put "model." in front
        flat = {name.replace(".", "_"): tensor for name, tensor in plain.state_dict().items()}
        state = {}
        for name in encoder.state_dict():
            key = name.replace(".", "_")
            state[name] = flat[key] if key in flat else flat[key.removeprefix("model_").removeprefix("body_")]
        encoder.load_state_dict(state)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, px, px) -> (B, 1, px, px); a side that the encoder cannot halve evenly is padded and cut again."""
        height, width = x.shape[-2:]
        right, below = -width % self.stride, -height % self.stride
        if right or below:
            x = F.pad(x, (0, right, 0, below), mode="replicate")
        return self.unet(x)[..., :height, :width]  # type: ignore[no-any-return]


def _pair(channels: int, width: int, *, plain: bool = False) -> nn.Sequential:
    """Two padded 3x3 convolutions, each with ReLU unless ``plain``."""
    layers: list[nn.Module] = []
    for a in (channels, width):
        layers += [nn.Conv2d(a, width, 3, padding=1), *([] if plain else [nn.ReLU()])]
    return nn.Sequential(*layers)


def _encoder_depth(backbone: str) -> int:
    """How often the backbone halves the picture's side, 5 at most (all that the decoder is made for)."""
    try:
        with torch.device("meta"):
            features: Any = timm.create_model(backbone, features_only=True)
            reductions = features.feature_info.reduction()
    except (RuntimeError, AttributeError, ValueError, AssertionError, TypeError) as fault:
        raise _no_encoder(backbone, fault) from None
    if list(reductions) != sorted(set(reductions)):  # a vision transformer: one side throughout
        raise _no_encoder(backbone, f"its maps are reduced by {reductions}")
    return min(5, int(math.log2(max(reductions))))


def _no_encoder(backbone: str, fault: object) -> RecipeError:
    reason = " ".join(str(fault).split())[:120]
    return RecipeError(
        f"recipe.backbone {backbone} cannot stand before a U-Net decoder ({reason}); "
        "choose a network whose maps halve their side stage by stage, resnet18d say"
    )


def _build_unet(**options: Any) -> Unet:
    return Unet(**options)


def _build_dense_linear(**options: Any) -> DenseLinear:
    return DenseLinear(**options)


register("unet", _build_unet, px=512, classifier="head", first_conv="down.0.0", fixed_size=False)
register("dense_linear", _build_dense_linear, px=512, classifier="head", first_conv="head", fixed_size=False)
