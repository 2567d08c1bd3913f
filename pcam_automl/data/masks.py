"""Mask files to 0 and 1. Knows no labels, no folders' layout and nothing of packs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pcam_automl.data.images import MAX_SIDE_PX, PatchFault, check_shape, file_bytes


@dataclass(frozen=True)
class MaskRule:
    """Which files are masks.

    Attributes:
        background: the value that is not tumour; the other one, if there is one, is.
        any_kind: also JPEG, palette and RGB files with equal channels, as foreign folders have them.
    """

    background: int = 0
    any_kind: bool = False


KAGGLE = MaskRule()


def read_masks(
    folder: Path, names: Sequence[str], shape: tuple[int, int], rule: MaskRule = KAGGLE
) -> NDArray[np.uint8] | dict[int, str]:
    """Read the mask files ``folder/name``; an empty name gives zeros.

    Args:
        folder: what ``names`` are relative to.
        names: B relative paths of image files.
        shape: (H, W) px that each must have.
        rule: which files are masks.

    Returns:
        (B, H, W) uint8, 1 where the file is not background; or, if any is at fault, the reasons by row.
    """
    masks, faults = np.zeros((len(names), *shape), np.uint8), dict[int, str]()
    for row, name in enumerate(names):
        try:
            if name:
                masks[row] = decode_mask(file_bytes(folder / name), shape, rule)
        except PatchFault as fault:
            faults[row] = fault.reason
    return faults or masks


def find_background(folder: Path, names: Sequence[str]) -> int:
    """The background of a set of masks: the smaller value of its first mask of two values, 0 if there is none.

    So an all-one-value mask can be told: of masks of 1 and 2 one that is 1 throughout holds no tumour, of masks of 0 and
    255 one that is 255 throughout holds nothing else. Faulty masks are passed over here; packing names them.
    """
    for name in names:
        if name:
            try:
                values = np.unique(_grey_values(file_bytes(folder / name), None, any_kind=True))
            except PatchFault:
                continue
            if len(values) == 2:
                return int(values[0])
    return 0


def decode_mask(raw: bytes, shape: tuple[int, int], rule: MaskRule = KAGGLE) -> NDArray[np.bool_]:
    """The (H, W) mask of a whole file: True where it is not background. The header is checked before decoding.

    Raises:
        PatchFault: not an image, not grey, another size, or values besides the background and one other, larger one.
    """
    values = _grey_values(raw, shape, any_kind=rule.any_kind)
    mask: NDArray[np.bool_] = values != rule.background
    high = values.max()
    if (values[mask] != high).any() or high < rule.background:
        found = np.unique(values).tolist()
        many = "s" if len(found) > 1 else ""
        hint = "; JPEG blurs edges, save masks as PNG" if raw[:2] == b"\xff\xd8" else ""
        raise PatchFault(
            f"{len(found)} value{many} ({', '.join(map(str, found[:5]))}), "
            f"a mask has two: {rule.background} and one larger{hint}"
        )
    return mask


def _grey_values(raw: bytes, shape: tuple[int, int] | None, *, any_kind: bool) -> NDArray[np.uint8]:
    """(H, W) values of a file of one grey channel, or with ``any_kind`` of equal colours."""
    from PIL import Image

    formats = ("PNG", "TIFF", "JPEG") if any_kind else ("PNG", "TIFF")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow warns about is a fault below or harmless
            with Image.open(BytesIO(raw), formats=formats) as image:
                check_shape(np.broadcast_to(np.uint8(0), (image.height, image.width)), shape)
                if max(image.size) > MAX_SIDE_PX:
                    raise PatchFault(f"{image.width}x{image.height} px, the limit is {MAX_SIDE_PX}x{MAX_SIDE_PX}")
                accepted = ("1", "L", "P", "RGB") if any_kind else ("1", "L")
                if image.mode not in accepted or getattr(image, "n_frames", 1) != 1:
                    raise PatchFault(f"colour mode {image.mode}, want one grey image of 8 bits", wrong_shape=True)
                return _one_channel(image)
    except PatchFault:
        raise
    except Exception as fault:  # noqa: BLE001 - decoders of foreign bytes raise anything; recorded as the mask's fault
        raise PatchFault(f"unreadable ({type(fault).__name__}: {' '.join(str(fault).split())[:120]})") from None


def _one_channel(image: Any) -> NDArray[np.uint8]:
    if image.mode in ("1", "L"):
        return np.asarray(image).astype(np.uint8, copy=False)
    colours = np.asarray(image.convert("RGB"))  # of a palette: its order means nothing, its colours do
    if (colours != colours[..., :1]).any():
        raise PatchFault("colours in it, want grey (equal channels)", wrong_shape=True)
    return colours[..., 0]
