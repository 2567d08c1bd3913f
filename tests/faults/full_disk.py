"""Every writer of the package on a disk that is full (files may not grow beyond a limit), then once more with space.

`python full_disk.py FOLDER RAW PACK` prints one JSON line for each writer: its words when the disk was full, whether anything
half-written or changed was left, and whether it succeeded afterwards.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

LIMIT = 1_500
"""Bytes; less than what any of the writers below writes."""


@contextmanager
def full_disk(limit: int = LIMIT) -> Iterator[None]:
    """Inside, no file grows beyond ``limit`` bytes: EFBIG, which is handled as a full disk is."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def writers(folder: Path, raw: Path, packed: Path) -> dict[str, tuple[Path, Callable[[], object]]]:
    """Name to what is written and the call that writes it."""
    import numpy as np
    import torch

    from pcam_automl.bundle import ModelBundle, write_bundle
    from pcam_automl.data.domains import estimate_domains, write_domains
    from pcam_automl.data.pack import pack
    from pcam_automl.data.sources import open_source
    from pcam_automl.data.splits import make_split, write_split
    from pcam_automl.data.store import open_store
    from pcam_automl.data.synthetic import write_synthetic
    from pcam_automl.files import write_json, write_png
    from pcam_automl.models.factory import Normalisation, build_network
    from pcam_automl.models.weights import Weights
    from pcam_automl.recipe import Recipe
    from pcam_automl.scores import Scores, write_scores
    from pcam_automl.submission import write_probabilities
    from pcam_automl.training.checkpoint import write_checkpoint

    store = open_store(packed)
    split = make_split(store, seed=0)
    domains = estimate_domains(store)
    recipe = Recipe(backbone="test_resnet", crop_size=32)
    state = dict(build_network(recipe, Weights("none"), seed=0).state_dict())
    bundle = ModelBundle(recipe, Normalisation((0.5,) * 3, (0.2,) * 3), state, {}, {})
    rows = np.arange(len(store.ids[:80]))
    scores = Scores(rows, np.asarray(store.label[rows]).astype(np.int64), np.full(len(rows), 0.123456789), "patches")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    return {
        "pack": (folder / "pack", lambda: pack(open_source(raw), folder / "pack")),
        "split": (folder / "split.npz", lambda: write_split(split, folder / "split.npz")),
        "domains": (folder / "domains.npz", lambda: write_domains(domains, folder / "domains.npz")),
        "checkpoint": (folder / "checkpoint" / "0", lambda: write_checkpoint(folder / "checkpoint" / "0", parts={"model": state}, state={"views": 1})),
        "bundle": (folder / "bundle", lambda: write_bundle(folder / "bundle", bundle)),
        "scores": (folder / "trials" / "0" / "scores.csv", lambda: write_scores(folder / "trials" / "0" / "scores.csv", scores, store.ids)),
        "submission": (folder / "submission.csv", lambda: write_probabilities(folder / "submission.csv", [str(i) for i in store.ids], np.full(len(store.ids), 0.123456789))),
        "json": (folder / "settings.json", lambda: write_json(folder / "settings.json", {"words": ["word"] * 500})),
        "png": (folder / "picture.png", lambda: write_png(folder / "picture.png", pixels)),
        "synthetic set": (folder / "synthetic", lambda: write_synthetic(folder / "synthetic", n_patches=96, n_slides=8, seed=0)),
        "study": (folder / "db" / "s.db", study_writer(folder / "db" / "s.db", torch.zeros(1))),
    }  # fmt: skip


def study_writer(database: Path, _: object) -> Callable[[], object]:
    """A trial with a long attribute, in a database that there is already."""
    import optuna

    from pcam_automl.search.retrying_storage import set_user_attrs
    from pcam_automl.search.storage import engine_of, open_storage, storage_faults

    url = f"sqlite:///{database}"
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(study_name="s", storage=open_storage(url))
    trial = study.ask()
    words = [0]

    def write() -> object:
        words[0] += 1
        with storage_faults(url):
            set_user_attrs(trial, text="x" * 20_000, n=words[0])
        found = optuna.load_study(study_name="s", storage=open_storage(url)).trials[0].user_attrs
        assert found["n"] == words[0]
        return engine_of(study)

    return write


def listing(folder: Path) -> dict[str, int]:
    """Everything below the folder but SQLite's own files, by size."""
    return {
        str(file.relative_to(folder)): file.stat().st_size
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.parent.name != "db"
    }


def main() -> None:
    """Full, then with space."""
    from pcam_automl.errors import PcamError

    folder, raw, packed = map(Path, sys.argv[1:4])
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for name, (target, write) in writers(folder, raw, packed).items():
        before, words = listing(folder), "it succeeded on a full disk"
        with full_disk():
            try:
                write()
            except PcamError as fault:
                words = str(fault)
            except BaseException as fault:  # noqa: BLE001 - told to the test, which fails
                words = f"not named: {type(fault).__name__}: {fault}"
        left = {
            file: size
            for file, size in listing(folder).items()
            if before.get(file) != size and not file.endswith(".lock")
        }
        write()
        print(json.dumps({"writer": name, "words": words, "left": left, "written": target.exists()}), flush=True)


if __name__ == "__main__":
    main()
