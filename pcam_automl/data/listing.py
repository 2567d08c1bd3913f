"""Lists the image files and the masks of a raw folder by id. Opens none of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pcam_automl.data.images import IMAGE_SUFFIXES
from pcam_automl.data.tables import Strings, all_ids, is_id
from pcam_automl.errors import DataError, first_few

MASK_SUFFIXES = frozenset({".png", ".tif", ".tiff"})
"""Lossless ones: JPEG would blur a mask's two values."""


@dataclass(frozen=True)
class Listing:
    """The image files of one folder.

    Attributes:
        files: id to path.
        notes: what was left out: names that cannot be ids, and files of other kinds.
        n_bad: how many names cannot be ids.
    """

    files: dict[str, str]
    notes: list[str]
    n_bad: int = 0


def list_images(folder: Path, prefix: str, suffixes: frozenset[str] = IMAGE_SUFFIXES) -> Listing:
    """Image files of one folder as id -> ``prefix`` + name; one scan, no stat. Hidden files are passed over without a word."""
    found: dict[str, str] = {}
    n_bad = 0
    twice: list[str] = []
    others: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            stem, dot, suffix = entry.name.rpartition(".")
            if entry.name.startswith(".") or not entry.is_file():
                continue
            if (dot + suffix).lower() not in suffixes:
                others.append(entry.name)
            elif stem in found:
                twice.append(stem)
            else:
                found[stem] = prefix + entry.name
    if not all_ids(list(found)):
        bad = {stem for stem in found if not is_id(stem)}
        n_bad = len(bad) + sum(stem in bad for stem in twice)
        found = {stem: name for stem, name in found.items() if stem not in bad}
        twice = [stem for stem in twice if stem not in bad]
    if twice:
        raise DataError(
            f"{folder} holds {len(twice)} ids in more than one file ({first_few(sorted(twice))}); keep one of each"
        )
    notes = [f"{n_bad} files in {folder.name}/ have unprintable names and are left out"] if n_bad else []
    if others:
        kinds = "/".join(sorted({suffix.strip(".").upper().replace("TIFF", "TIF") for suffix in suffixes}))
        examples = first_few([ascii(name)[1:-1] for name in sorted(others)])
        notes.append(f"{len(others)} files in {folder.name}/ are no {kinds} and are left out: {examples}")
    return Listing(found, notes, n_bad)


def find_masks(root: Path, train: Sequence[str], test: Sequence[str]) -> tuple[Strings | None, list[str]]:
    """The mask files of a Kaggle folder: ``masks/train/<id>.png`` and ``masks/test/<id>.png`` (or ``.tif``).

    Where there is no ``masks/train``, ``masks/<id>.png`` serves for both.

    Returns:
        (N,) paths relative to ``root``, train then test, empty for a test patch without a mask; None if there is no
        folder ``masks``. And notes.

    Raises:
        DataError: training patches have no mask, or one id has two.
    """
    if not (root / "masks").is_dir():
        return None, []
    split = (root / "masks" / "train").is_dir()
    found: list[dict[str, str]] = []
    for part in ("train", "test"):
        prefix = f"masks/{part}/" if split else "masks/"
        found.append(list_images(root / prefix, prefix, MASK_SUFFIXES).files if (root / prefix).is_dir() else {})
    if absent := [name for name in train if name not in found[0]]:
        raise DataError(
            f"{root / 'masks'}: {len(absent)} training patches have no mask ({first_few(absent)}); "
            "add masks/train/<id>.png for each, or move the folder masks away to pack none"
        )
    names = [found[0][name] for name in train] + [found[1].get(name, "") for name in test]
    n_absent = names.count("")
    notes = [f"{n_absent} test patches have no mask: theirs are packed as zeros"] if n_absent else []
    return np.array(names, dtype=np.str_), notes
