"""The files of a pack beside its pixels: small arrays, header, table, picture sheet. Reads no source."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pcam_automl.data.pool import Job
from pcam_automl.data.quality import findings, write_sheet
from pcam_automl.data.sources import PatchSource
from pcam_automl.data.store import FORMAT, TEST, VERSION, Flag, channel_moments, content_hash, open_store
from pcam_automl.files import write_json

_PART_NAMES = ("train", "valid", "test")


def _codes(names: NDArray[np.str_]) -> tuple[NDArray[np.int32], list[str]]:
    """Names to codes in sorted order; the empty name is -1."""
    distinct, codes = np.unique(names, return_inverse=True)
    known = [str(name) for name in distinct if name]
    offset = len(distinct) - len(known)
    return (codes - offset).astype(np.int32), known


def write_pack_files(
    folder: Path,
    source: PatchSource,
    job: Job,
    arrays: dict[str, NDArray[Any]],
    faults: dict[int, str],
    *,
    stamp: str,
    keep_outliers: bool,
) -> None:
    """Write the small arrays, ``store.json``, ``table.csv`` and the picture sheet into ``folder``, which has the pixels.

    Args:
        folder: being filled; not yet in its place.
        source: what was packed, with its labels.
        job: the shape, and where the masks lie.
        arrays: digest, flags, stats and sharpness of all rows, as in :class:`~pcam_automl.data.store.PatchStore`.
        faults: row to reason, of patches that could not be used.
        stamp: the source's fingerprint.
        keep_outliers: as packing was asked.
    """
    group, group_names = _codes(source.group)
    domain, domain_names = _codes(source.domain)
    arrays |= {"ids": source.ids, "label": source.label, "group": group, "domain": domain, "part": source.part}
    for name, values in arrays.items():
        with (folder / f"{name}.npy").open("wb") as file:
            np.lib.format.write_array(file, values, allow_pickle=False)
    masks = None if job.masks is None else np.lib.format.open_memmap(job.masks, mode="r")
    digest = content_hash(
        shape=job.shape, arrays=arrays, group_names=group_names, domain_names=domain_names, masks=masks
    )
    mean, deviation = _channel_moments(source, arrays)
    header = {
        "format": FORMAT,
        "version": VERSION,
        "content_hash": digest,
        "n_patches": len(source),
        "shape": list(job.shape),
        "files": {path.stem: path.stat().st_size for path in sorted(folder.glob("*.npy"))},
        "group_names": group_names,
        "domain_names": domain_names,
        "channel_mean": mean,
        "channel_std": deviation,
        "counts": {str(flag.name).lower(): int(np.count_nonzero(arrays["flags"] & flag)) for flag in Flag},
        "faults": {str(row): reason for row, reason in faults.items()},
        "source": {
            "kind": source.kind,
            "root": str(source.root.resolve()),
            "fingerprint": stamp,
            "keep_outliers": keep_outliers,
            "notes": list(source.notes),
            "missing_test_ids": list(source.missing_test_ids),
        },
    }
    write_json(folder / "store.json", header)
    _write_table(folder / "table.csv", source, arrays)
    store = open_store(folder)
    if len(rows := findings(store).rows):
        write_sheet(store, rows, folder / "findings.png")


def _channel_moments(source: PatchSource, arrays: dict[str, NDArray[Any]]) -> tuple[list[float], list[float]]:
    """Means and deviations of all pixels of the development patches, from the patches' own; zeros if there are none."""
    use = (source.part != TEST) & (source.label >= 0) & ((arrays["flags"] & Flag.LEFT_OUT) == 0)
    if not use.any():
        return [0.0] * 3, [0.0] * 3
    mean, deviation = channel_moments(arrays["stats"][use])
    return [round(value, 6) for value in mean], [round(value, 6) for value in deviation]


def _write_table(path: Path, source: PatchSource, arrays: dict[str, NDArray[Any]]) -> None:
    """One line a patch, for people; nothing reads it back."""
    words = {int(value): Flag(int(value)) for value in np.unique(arrays["flags"])}
    named = {value: "+".join(str(flag.name).lower() for flag in flags) for value, flags in words.items()}
    colours = (arrays["stats"][:, :3] * 255).round().astype(int).tolist()
    rows = zip(
        source.ids.tolist(),
        source.label.tolist(),
        source.group.tolist(),
        source.domain.tolist(),
        (_PART_NAMES[code] for code in source.part.tolist()),
        (named[value] for value in arrays["flags"].tolist()),
        colours,
        arrays["sharpness"].round().astype(int).tolist(),
        strict=True,
    )
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["id", "label", "group", "domain", "part", "flags", "red", "green", "blue", "sharpness"])
        table.writerows((*row[:6], *row[6], row[7]) for row in rows)
