"""Mask files to 0 and 1. Knows no labels, no folders' layout and nothing of packs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pcam_automl.data.images import PatchFault, check_shape, file_bytes


def read_masks(folder: Path, names: Sequence[str], shape: tuple[int, int]) -> NDArray[np.uint8] | dict[int, str]:
    """Read the mask files ``folder/name``; an empty name gives zeros.

    Args:
        folder: what ``names`` are relative to.
        names: B relative paths of PNG or TIFF files of one grey channel.
        shape: (H, W) px that each must have.

    Returns:
        (B, H, W) uint8, 1 where the file is not 0; or, if any is at fault, the reasons by row.
    """
    masks, faults = np.zeros((len(names), *shape), np.uint8), dict[int, str]()
    for row, name in enumerate(names):
        try:
            if name:
                masks[row] = decode_mask(file_bytes(folder / name), shape)
        except PatchFault as fault:
            faults[row] = fault.reason
    return faults or masks


def decode_mask(raw: bytes, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """The (H, W) mask of a whole PNG or TIFF file: True where it is not 0. The header is checked before decoding.

    Raises:
        PatchFault: not an image, not grey, another size, or values besides 0 and one other.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow warns about is a fault below or harmless
            with Image.open(BytesIO(raw), formats=("PNG", "TIFF")) as image:
                check_shape(np.broadcast_to(np.uint8(0), (image.height, image.width)), shape)
                if image.mode not in ("1", "L") or getattr(image, "n_frames", 1) != 1:
                    raise PatchFault(f"colour mode {image.mode}, want one grey image of 8 bits", wrong_shape=True)
                values = np.asarray(image)
    except PatchFault:
        raise
    except Exception as fault:  # noqa: BLE001 - decoders of foreign bytes raise anything; recorded as the mask's fault
        raise PatchFault(f"unreadable ({type(fault).__name__}: {' '.join(str(fault).split())[:120]})") from None
    mask: NDArray[np.bool_] = values != 0
    if (values[mask] != values.max()).any():
        found = np.unique(values).tolist()
        raise PatchFault(f"{len(found)} values ({', '.join(map(str, found[:5]))}), want 0 and at most one other")
    return mask
