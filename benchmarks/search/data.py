"""The data of the proofs: where they lie or how they are made, and the truth of their test parts. Trains nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from pcam_automl.data.synthetic import write_synthetic
from pcam_automl.errors import DataError
from pcam_automl.metrics import auc

CACHE = Path(__file__).parent / "data"
N_PATCHES, N_SLIDES = 3_200, 64
"""Of a synthetic set: 48 training slides of some 53 patches."""
NEW_SLIDES_SHARE = 0.25
N_QUARTERS = 4
_HIDDEN = ("test_labels.csv", "test_groups.csv", "test_domains.csv", "masks")


def cache() -> Path:
    """Where sets that are made are kept: PCAM_BENCH_CACHE, else beside this file."""
    return Path(os.environ.get("PCAM_BENCH_CACHE", str(CACHE))).resolve()


def data_folder(name: str) -> Path:
    """The folder of a data set in the Kaggle layout, with the truth beside it; synthetic ones are made once.

    Args:
        name: ``colon96`` (unpacked at PCAM_COLON96), ``colon96-dev:K`` (a quarter, 0 to 3, of its training part's tiles as the test
            part, to try things out on), ``synthetic:SEED`` or ``slides:SEED``.

    Raises:
        DataError: an unknown name, or colon96 is not where it should be.
    """
    kind, _, seed = name.partition(":")
    if kind == "colon96" and not seed:
        folder = Path(os.environ.get("PCAM_COLON96", "colon96"))
        if not (folder / "test_labels.csv").is_file():
            raise DataError(
                f"PCAM_COLON96 must name the unpacked set (python unpack.py colon96.zip OUT), got {folder} without test_labels.csv"
            )
        return folder.resolve()
    known = seed in map(str, range(N_QUARTERS)) if kind == "colon96-dev" else kind in ("synthetic", "slides")
    if not known or not seed.isdigit():
        raise DataError(
            f"--data must be colon96, colon96-dev:0 to {N_QUARTERS - 1}, synthetic:SEED or slides:SEED, got {name!r}"
        )
    folder = cache() / f"{kind}-{seed}"
    if not folder.is_dir():
        making = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        if kind == "colon96-dev":
            keep_quarter(data_folder("colon96"), making, int(seed))
        else:
            write_synthetic(making, n_patches=N_PATCHES, n_slides=N_SLIDES, seed=int(seed))
        if kind == "slides":
            keep_new_slides(making, np.random.default_rng([int(seed), 7]))
        making.replace(folder)
    return folder


def keep_new_slides(folder: Path, rng: np.random.Generator) -> None:
    """Make whole training slides the test part, in the training part's own mix of scanners; the former test part goes.

    The package's synthetic test part has other shares of the scanners than its training part, which no interval from
    validation can know. For the question whether intervals hold on new slides the mix must be the same.
    """
    tables = {kind: pd.read_csv(folder / f"train_{kind}.csv", dtype=str) for kind in ("labels", "groups", "domains")}
    slides = tables["groups"].merge(tables["domains"], on="id").groupby("domain")["group"].unique()
    aside = [s for of_one in slides for s in rng.permutation(of_one)[: max(1, round(NEW_SLIDES_SHARE * len(of_one)))]]
    shutil.rmtree(folder / "test")
    shutil.rmtree(folder / "masks")
    _move_aside(folder, tables, aside)


def keep_quarter(source: Path, folder: Path, quarter: int) -> None:
    """Copy the training part of ``source``, a quarter of its groups as the test part: what is chosen by looking at results is to be
    chosen there, and the source's own test part stays unseen.
    """
    shutil.copytree(source / "train", folder / "train")
    tables = {kind: pd.read_csv(source / f"train_{kind}.csv", dtype=str) for kind in ("labels", "groups")}
    groups = np.random.default_rng(7).permutation(sorted(tables["groups"]["group"].unique()))
    _move_aside(folder, tables, groups[quarter::N_QUARTERS])


def _move_aside(folder: Path, tables: dict[str, pd.DataFrame], groups: Iterable[str]) -> None:
    """Make whole groups of the training part the test part."""
    test = set(tables["groups"].loc[tables["groups"]["group"].isin(list(groups)), "id"])
    (folder / "test").mkdir()
    for name in test:
        (folder / "train" / f"{name}.tif").rename(folder / "test" / f"{name}.tif")
    for kind, table in tables.items():
        inside = table["id"].isin(test)
        table[~inside].to_csv(folder / f"train_{kind}.csv", index=False)
        table[inside].to_csv(folder / f"test_{kind}.csv", index=False)
    sample = tables["labels"][tables["labels"]["id"].isin(test)]
    sample.assign(label=0).to_csv(folder / "sample_submission.csv", index=False)


def without_truth(folder: Path, out: Path) -> Path:
    """A folder of links to everything but the truth of the test part: what the systems get to see."""
    out.mkdir(parents=True)
    for item in folder.iterdir():
        if item.name not in _HIDDEN and not item.name.startswith("."):
            (out / item.name).symlink_to(item)
    return out


def test_auc(predictions: Path, folder: Path) -> float:
    """AUC of predictions (id,label) against ``test_labels.csv``.

    Raises:
        DataError: an id is missing, or a probability is no finite number.
    """
    truth = pd.read_csv(folder / "test_labels.csv", dtype={"id": str}).set_index("id")["label"]
    given = pd.read_csv(predictions, dtype={"id": str}).drop_duplicates("id").set_index("id")["label"]
    if missing := truth.index.difference(given.index).tolist():
        raise DataError(f"{predictions.name} lacks {len(missing)} of {len(truth)} test ids")
    return auc(truth.to_numpy(), given.loc[truth.index].to_numpy(np.float64))
