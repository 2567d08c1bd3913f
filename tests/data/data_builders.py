"""Writers of tiny raw folders."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import tifffile


def patch_id(number: int) -> str:
    return hashlib.sha1(str(number).encode()).hexdigest()


def tissue(seed: int, side: int = 96) -> np.ndarray:
    return np.random.default_rng(seed).integers(20, 230, (side, side, 3), dtype=np.uint8)


def write_csv(path: Path, header: str, rows: Sequence[Sequence[object]]) -> None:
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n", encoding="utf-8")


def write_kaggle(root: Path, n_train: int = 8, n_test: int = 4) -> Path:
    """Patches 0..n_train-1 labelled by parity, test patches from 1000 on; the sample in descending number."""
    for part, numbers in (("train", range(n_train)), ("test", range(1000, 1000 + n_test))):
        (root / part).mkdir(parents=True)
        for number in numbers:
            tifffile.imwrite(root / part / f"{patch_id(number)}.tif", tissue(number), photometric="rgb")
    write_csv(root / "train_labels.csv", "id,label", [(patch_id(number), number % 2) for number in range(n_train)])
    sample = [(patch_id(number), 0) for number in reversed(range(1000, 1000 + n_test))]
    write_csv(root / "sample_submission.csv", "id,label", sample)
    return root


def write_h5(root: Path, n: dict[str, int], *, masks: bool = False, packed: bool = False, side: int = 96) -> Path:
    root.mkdir(exist_ok=True)
    for seed, (part, count) in enumerate(n.items()):
        rng = np.random.default_rng(seed)
        prefix = f"camelyonpatch_level_2_split_{part}_"
        arrays = {
            "x": rng.integers(20, 230, (count, side, side, 3), np.uint8),
            "y": rng.integers(0, 2, (count, 1, 1, 1), np.uint8),
        }
        if masks:
            arrays["mask"] = rng.integers(0, 2, (count, side, side, 1), np.uint8)
        for name, values in arrays.items():
            path = root / f"{prefix}{name}.h5"
            with h5py.File(path, "w") as file:
                file[name] = values
            if packed:
                (root / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), 1))
                path.unlink()
        write_csv(root / f"{prefix}meta.csv", ",coord_y,wsi", [(row, 7, f"slide_{row % 3}") for row in range(count)])
    return root
