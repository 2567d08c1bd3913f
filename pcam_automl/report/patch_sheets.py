"""Sheets of patches as PNG: real pixels twice enlarged, a line or two of text under each. Chooses no patches."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pcam_automl.data.store import PatchStore
from pcam_automl.report.blocks import Picture
from pcam_automl.report.style import TUMOUR

_LARGEST_PX = 192
_WIDE_PX = 560
_GAP, _LINE_PX, _FONT_PX = 14, 20, 16
_OUTLINE = (0, 158, 115)  # bluish green stands out on eosin and haematoxylin

Pixels = NDArray[np.uint8]


def patch_of(store: PatchStore, row: int) -> Pixels:
    """(S, S, 3) uint8, copied from the memory map."""
    return np.array(store.patches[row])


def with_mask_outline(patch: Pixels, mask: NDArray[np.uint8]) -> Pixels:
    """A copy of (H, W, 3) with the border of a two-valued (H, W) mask drawn in green, as wide as it takes to be seen in a sheet."""
    inside = core = mask > 0
    for _ in range(max(1, round(len(mask) / _LARGEST_PX))):
        core = _eroded(core)
    out = patch.copy()
    out[inside & ~core] = _OUTLINE
    return out


def _eroded(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Without the pixels that touch the outside by an edge; beyond the picture the mask goes on as it ends."""
    wide = np.pad(mask, 1, mode="edge")
    return mask & wide[2:, 1:-1] & wide[:-2, 1:-1] & wide[1:-1, 2:] & wide[1:-1, :-2]


def sheet(
    tiles: Sequence[Pixels],
    name: str,
    *,
    alt: str,
    caption: str,
    texts: Sequence[str] = (),
    marked: Sequence[bool] = (),
    columns: int = 5,
) -> Picture:
    """One picture of equally high tiles.

    Args:
        tiles: (h, w, 3) uint8 each; patches of 96 px are shown at twice their size, large ones are made smaller.
        name: of the PNG.
        alt: for those who cannot see it.
        caption: what to look for.
        texts: one a tile, lines parted by newlines; none for no text.
        marked: whether to frame a tile in the tumour's colour; none for no frames.
        columns: tiles a line.
    """
    shown = [_sized(tile) for tile in tiles]
    width, height = max(tile.width for tile in shown), max(tile.height for tile in shown)
    lines = max((text.count("\n") + 1 for text in texts), default=0)
    columns = min(columns, len(shown))
    step = (width + _GAP, height + _GAP + lines * _LINE_PX + (4 if lines else 0))
    paper = Image.new("RGB", (columns * step[0] + _GAP, -(-len(shown) // columns) * step[1] + _GAP), (255, 255, 255))
    draw, font = ImageDraw.Draw(paper), ImageFont.load_default(_FONT_PX)
    for place, tile in enumerate(shown):
        x, y = _GAP + place % columns * step[0], _GAP + place // columns * step[1]
        if place < len(marked) and marked[place]:
            draw.rectangle((x - 4, y - 4, x + tile.width + 3, y + tile.height + 3), fill=TUMOUR)
        paper.paste(tile, (x, y))
        if place < len(texts):
            draw.multiline_text((x, y + height + 5), texts[place], fill=(34, 34, 34), font=font, spacing=2)
    return Picture(name, png_of(paper), alt, caption, wide=paper.width > _WIDE_PX)


def _sized(tile: Pixels) -> Image.Image:
    """Twice as large by repeating pixels, or averaged down to at most 192 px in height."""
    image = Image.fromarray(tile)
    scale = _LARGEST_PX // image.height
    if scale >= 1:
        return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    return image.resize((image.width * _LARGEST_PX // image.height, _LARGEST_PX), Image.Resampling.BOX)


def png_of(image: Image.Image | Pixels) -> bytes:
    """PNG bytes."""
    buffer = BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(buffer, format="PNG", compress_level=9)
    return buffer.getvalue()
