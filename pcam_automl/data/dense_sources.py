"""Folders of images and masks for task dense: what pairs there are and whether their sizes agree. Decodes no image.

Layouts: ``inputs_{train,test}`` with ``outputs_{train,test}``; ``images`` with ``masks``, and both below
``{train,valid,test}/`` or above them. Each folder may hold its files in one sub-folder, as torchvision's ImageFolder wants.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pcam_automl.data.images import IMAGE_SUFFIXES, MAX_SIDE_PX
from pcam_automl.data.listing import list_images
from pcam_automl.data.store import TEST, TRAIN, VALID
from pcam_automl.errors import DataError, first_few

_PARTS = {"train": TRAIN, "valid": VALID, "val": VALID, "test": TEST}
_LAYOUTS = (("inputs_{}", "outputs_{}"), ("{}/images", "{}/masks"), ("images/{}", "masks/{}"))


@dataclass(frozen=True)
class Pairs:
    """Images of one part and their masks: paths relative to the root, by id; ``masks`` is empty where there are none."""

    part: int
    images: Mapping[str, str]
    masks: Mapping[str, str]


def find_pairs(root: Path) -> tuple[list[Pairs], list[str]]:
    """The parts of a folder of images and masks, and notes; no parts where it is no such folder.

    Raises:
        DataError: training images without masks or the reverse, no training images, or a folder of several sub-folders.
    """
    for images, masks in _LAYOUTS:
        found = {
            name: (images.format(name), masks.format(name)) for name in _PARTS if (root / images.format(name)).is_dir()
        }
        if "train" in found and (root / found["train"][1]).is_dir():
            return _read_parts(root, found)
    if (root / "images").is_dir() and (root / "masks").is_dir():
        return _read_parts(root, {"train": ("images", "masks")})
    return [], []


def _read_parts(root: Path, found: Mapping[str, tuple[str, str]]) -> tuple[list[Pairs], list[str]]:
    parts: list[Pairs] = []
    notes: list[str] = []
    for name, (images_at, masks_at) in found.items():
        images = _list_folder(root, images_at, notes)
        masks = _list_folder(root, masks_at, notes) if (root / masks_at).is_dir() else {}
        if _PARTS[name] == TEST and not masks:
            notes.append(f"{len(images)} test images have no masks: they can be predicted, not scored")
        else:
            _check_partners(root, images_at, masks_at, images, masks)
        if name == "train" and not images:
            raise DataError(f"{root / images_at} holds no TIFF, PNG or JPEG image")
        parts.append(Pairs(_PARTS[name], images, masks))
    return parts, notes


def _check_partners(
    root: Path, images_at: str, masks_at: str, images: Mapping[str, str], masks: Mapping[str, str]
) -> None:
    faults = []
    if alone := sorted(images.keys() - masks.keys()):
        faults.append(
            f"{len(alone)} of {len(images)} images in {images_at} have no mask in {masks_at} ({first_few(alone)})"
        )
    if alone := sorted(masks.keys() - images.keys()):
        faults.append(
            f"{len(alone)} of {len(masks)} masks in {masks_at} have no image in {images_at} ({first_few(alone)})"
        )
    if faults:
        raise DataError(f"{root}: {'; '.join(faults)}; an image and its mask have the same name before the dot")


def _list_folder(root: Path, at: str, notes: list[str]) -> dict[str, str]:
    """Images of a folder by id, or of its only sub-folder if it holds none itself."""
    found = list_images(root / at, f"{at}/", IMAGE_SUFFIXES)
    if not found.files and not found.n_bad:
        below = sorted(entry.name for entry in os.scandir(root / at) if entry.is_dir() and entry.name[0] != ".")
        if len(below) > 1:
            raise DataError(
                f"{root / at} holds no image but {len(below)} folders ({first_few(below)}); want one at most"
            )
        if below:
            at = f"{at}/{below[0]}"
            notes += found.notes
            found = list_images(root / at, f"{at}/", IMAGE_SUFFIXES)
    notes += found.notes
    return found.files


def check_sizes(root: Path, ids: Sequence[str], images: Sequence[str], masks: Sequence[str]) -> None:
    """Compare the sizes that the files' headers give: one size for all images, and each mask as large as its image.

    Files without a readable header are passed over: packing names them.

    Args:
        root: what the paths are relative to.
        ids: N names for messages.
        images: N paths.
        masks: N paths, empty where an image has none.

    Raises:
        DataError: sizes that differ; how many, and the first ones.
    """
    sizes = [_size_of(root / image) for image in images]
    known = Counter(size for size in sizes if size is not None)
    if len(known) > 1:
        usual = known.most_common(1)[0][0]
        other = [
            f"{name}: {_px(size)}" for name, size in zip(ids, sizes, strict=True) if size is not None and size != usual
        ]
        raise DataError(
            f"{root}: the images differ in size: {known[usual]} are {_px(usual)}, {len(other)} are not "
            f"({first_few(other)}); cut or pad them to one size"
        )
    differing = []
    for name, size, mask in zip(ids, sizes, masks, strict=True):
        of_mask = _size_of(root / mask) if mask else None
        if size is not None and of_mask is not None and size != of_mask:
            differing.append(f"{name}: image {_px(size)}, mask {_px(of_mask)}")
    if differing:
        raise DataError(f"{root}: {len(differing)} masks are not of their image's size ({first_few(differing)})")


def _px(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]} px"


def _size_of(path: Path) -> tuple[int, int] | None:
    """(width, height) by the header; None where it cannot be read or is beyond the limit."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of decompression bombs: refused by the limit below
            with path.open("rb") as file, Image.open(file, formats=("PNG", "TIFF", "JPEG")) as image:
                size = image.size
    except Exception:  # noqa: BLE001 - decoders of foreign bytes raise anything; packing names the file and its fault
        return None
    return size if max(size) <= MAX_SIDE_PX else None
