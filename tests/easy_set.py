"""An easy tiny set in the Kaggle layout, which a network learns in a few steps."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import tifffile

TINY = "test_resnet"  # timm's own test architecture: 0.5 M parameters


def easy_patches(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(n, 96, 96, 3) uint8 and labels: label 1 has a dark blob in the centre. A network learns it in a few steps."""
    rng = np.random.default_rng(seed)
    images = rng.normal(180, 25, (n, 96, 96, 3))
    label = (np.arange(n) % 2).astype(np.int8)
    images[label == 1, 38:58, 38:58, :2] -= 90
    return images.clip(11, 240).astype(np.uint8), label


def write_easy_set(root: Path, *, n_train: int = 120, n_test: int = 30, n_groups: int = 12, seed: int = 0) -> Path:
    """A Kaggle folder with groups, domains and the truth of the test part."""
    images, label = easy_patches(n_train + n_test, seed)
    ids = [hashlib.sha1(f"{seed}/{i}".encode()).hexdigest() for i in range(n_train + n_test)]
    for part, members in (("train", range(n_train)), ("test", range(n_train, n_train + n_test))):
        (root / part).mkdir(parents=True)
        for i in members:
            tifffile.imwrite(root / part / f"{ids[i]}.tif", images[i], photometric="rgb")
    train, test = list(range(n_train)), list(range(n_train, n_train + n_test))
    write_table(root / "train_labels.csv", "id,label", [(ids[i], label[i]) for i in train])
    write_table(root / "train_groups.csv", "id,group", [(ids[i], f"slide{i // 2 % n_groups}") for i in train])
    write_table(root / "train_domains.csv", "id,domain", [(ids[i], f"scanner{i // 2 % n_groups % 2}") for i in train])
    write_table(root / "sample_submission.csv", "id,label", [(ids[i], 0) for i in reversed(test)])
    write_table(root / "test_labels.csv", "id,label", [(ids[i], label[i]) for i in test])
    return root


def write_table(path: Path, header: str, rows: list[tuple[object, ...]]) -> None:
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n", encoding="utf-8")
