"""Heads with dense layers behind a timm backbone: ``mlp`` and ``fastai``. The backbone's own linear head is timm's.

Legend: B images, C channels of the last map, F features, px the input side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from pcam_automl.errors import RecipeError


class MlpNetwork(nn.Module):
    """Backbone, its own pooling (average for convolutional networks, the token of a ViT), dropout, dense layers.

    Args:
        backbone: timm's network without classifier, images (B, 3, px, px) -> (B, F).
        hidden: widths; each is dense, ReLU, batch norm.
        dropout: before the first dense layer.
        px: input side at which F is found.
    """

    def __init__(self, backbone: nn.Module, hidden: Sequence[int], *, dropout: float, px: int) -> None:
        super().__init__()
        self.backbone = backbone
        units = _output_shape(backbone, px)[-1]
        layers: list[nn.Module] = [nn.Dropout(dropout)]
        for width in hidden:
            layers += [nn.Linear(units, width), nn.ReLU(), nn.BatchNorm1d(width)]
            units = width
        self.head = nn.Sequential(*layers, nn.Linear(units, 1))

    def get_classifier(self) -> nn.Module:
        """All that stands behind the pooling."""
        return self.head

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, px, px) -> (B, 1)."""
        return self.head(self.backbone(images))  # type: ignore[no-any-return]


class FastaiNetwork(nn.Module):
    """Backbone and fastai's head: average and max pool side by side, (BN, dropout, dense, ReLU) each, BN, dropout, dense.

    As in fastai's ``create_head`` the dropouts before the last have half its rate, and a dense layer before a batch norm
    has no bias.

    Args:
        backbone: timm's network without classifier; its ``forward_features`` gives a map.
        name: the backbone's name, for messages.
        hidden: widths of the dense layers.
        dropout: of the last dropout.
        px: input side at which C is found.

    Raises:
        RecipeError: the backbone gives tokens, not a map.
    """

    def __init__(self, backbone: nn.Module, name: str, hidden: Sequence[int], *, dropout: float, px: int) -> None:
        super().__init__()
        self.backbone = backbone
        shape = _output_shape(backbone, px, features=True)
        channels = int(backbone.num_features)  # type: ignore[arg-type]
        if len(shape) != 4 or channels not in (shape[1], shape[3]):
            raise RecipeError(
                f"recipe.head fastai pools a map of features, but {name} gives tokens {tuple(shape[1:])}; "
                "use head mlp or linear, or a convolutional backbone"
            )
        self.channels_last = shape[1] != channels
        units = 2 * channels
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [nn.BatchNorm1d(units), nn.Dropout(dropout / 2), nn.Linear(units, width, bias=False), nn.ReLU()]
            units = width
        self.head = nn.Sequential(*layers, nn.BatchNorm1d(units), nn.Dropout(dropout), nn.Linear(units, 1))

    def get_classifier(self) -> nn.Module:
        """All that stands behind the pooling."""
        return self.head

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, px, px) -> (B, 1)."""
        features: Tensor = self.backbone.forward_features(images)  # type: ignore[operator]
        sides = (1, 2) if self.channels_last else (2, 3)
        return self.head(torch.cat([features.mean(sides), features.amax(sides)], dim=1))  # type: ignore[no-any-return]


def build_head(
    backbone: nn.Module, kind: Literal["mlp", "fastai"], name: str, hidden: Sequence[int], *, dropout: float, px: int
) -> nn.Module:
    """The backbone with a head of that kind: images (B, 3, px, px) -> logits (B, 1)."""
    if kind == "mlp":
        return MlpNetwork(backbone, hidden, dropout=dropout, px=px)
    return FastaiNetwork(backbone, name, hidden, dropout=dropout, px=px)


@torch.no_grad()
def _output_shape(backbone: nn.Module, px: int, *, features: bool = False) -> tuple[int, ...]:
    """Shape of what the backbone gives for one picture of zeros."""
    device = next(backbone.parameters()).device
    backbone.eval()
    image = torch.zeros(1, 3, px, px, device=device)
    output = backbone.forward_features(image) if features else backbone(image)  # type: ignore[operator]
    backbone.train()
    return tuple(output.shape)
