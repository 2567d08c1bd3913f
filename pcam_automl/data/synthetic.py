"""A synthetic lymph-node set in the Kaggle layout: plans slides, draws them and writes the files. Reads no images."""

from __future__ import annotations

import hashlib
import io
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import tifffile
from numpy.typing import NDArray
from PIL import Image

from pcam_automl.data.store import Progress
from pcam_automl.data.synthetic_drawing import PLAIN, TUMOUR_CENTRE, TUMOUR_OUTSIDE, Bytes, SlideLook, draw_patches
from pcam_automl.errors import DataError
from pcam_automl.files import check_replaceable, folder_written_whole
from pcam_automl.recipe import PATCH_PX

MIN_SLIDES = 8
MIN_PATCHES_A_SLIDE = 10
POSITIVE_SHARE = 0.4
TEST_SHARE = 0.2

_CHUNK = 32  # patches drawn at a time: the windows of their nuclei stay in the cache
_N_THREADS = 2  # numpy frees the interpreter for most of the work

_DOMAINS = ("scanner_a", "scanner_b")


@dataclass(frozen=True)
class _Slide:
    """One slide: where it belongs and how it looks."""

    name: str
    test: bool
    domain: int
    n_patches: int
    n_positive: int
    look: SlideLook


def write_synthetic(out: Path, *, n_patches: int, n_slides: int, seed: int, progress: Progress | None = None) -> None:
    """Write a synthetic set: the same arguments give the same bytes.

    A patch is positive if a tumour nucleus touches its centre 32x32 (about 40 %); four of ten negatives hold tumour
    outside the centre. Test slides (a fifth of the patches) are none of the training slides; the second domain has a
    quarter of the training slides and half of the test slides.

    Args:
        out: a folder that does not exist or is empty. Gets ``train/`` and ``test/`` (uncompressed RGB TIFFs),
            ``masks/train`` and ``masks/test`` (PNG, 255 = tumour nucleus), ``train_labels.csv``,
            ``train_groups.csv``, ``train_domains.csv``, the ``test_`` counterparts and ``sample_submission.csv``.
        n_patches: training and test patches together, at least 10 a slide.
        n_slides: training and test slides together, at least 8.
        seed: of every draw, at least 0.
        progress: called with (patches written, patches in all).

    Raises:
        DataError: an argument is out of range, ``out`` is not an empty folder or cannot be written.
    """
    _check(out, n_patches, n_slides, seed)
    slides = _plan_slides(n_patches, n_slides, seed)
    kinds = [_plan_kinds(np.random.default_rng([seed, 1, number]), slide) for number, slide in enumerate(slides)]
    ids = [hashlib.sha1(f"pcam_automl synthetic {seed} {index}".encode()).hexdigest() for index in range(n_patches)]
    with folder_written_whole(out) as folder:
        for part in ("train", "test", "masks/train", "masks/test"):
            (folder / part).mkdir(parents=True)
        _write_chunks(_tasks(folder, slides, kinds, ids, seed), n_patches, progress)
        _write_tables(folder, slides, kinds, ids)


def _write_chunks(tasks: list[_Task], n_patches: int, progress: Progress | None) -> None:
    done = 0
    pool = ThreadPoolExecutor(_N_THREADS)
    try:
        for future in as_completed([pool.submit(_write_chunk, *task) for task in tasks]):
            done += future.result()
            if progress is not None:
                progress(done, n_patches)
    finally:  # after Ctrl-C or a full disk nothing that has not begun is begun
        pool.shutdown(cancel_futures=True)


_Task = tuple[Path, _Slide, NDArray[np.int64], list[str], list[int]]


def _tasks(
    folder: Path, slides: list[_Slide], kinds: list[NDArray[np.int64]], ids: list[str], seed: int
) -> list[_Task]:
    """The arguments of every :func:`_write_chunk`."""
    tasks: list[_Task] = []
    first = 0
    for number, (slide, of_slide) in enumerate(zip(slides, kinds, strict=True)):
        for chunk, begin in enumerate(range(0, slide.n_patches, _CHUNK)):
            part = of_slide[begin : begin + _CHUNK]
            names = ids[first + begin : first + begin + len(part)]
            tasks.append((folder, slide, part, names, [seed, 2, number, chunk]))
        first += slide.n_patches
    return tasks


def _write_chunk(folder: Path, slide: _Slide, kinds: NDArray[np.int64], ids: list[str], entropy: list[int]) -> int:
    """Draw and write some patches of one slide; returns how many."""
    patches, masks = draw_patches(np.random.default_rng(entropy), slide.look, kinds)
    part = "test" if slide.test else "train"
    head = _tiff_head(patches[0])  # one strip of one size: every file has the same header, as Kaggle's have
    for name, patch, mask in zip(ids, patches, masks, strict=True):
        (folder / part / f"{name}.tif").write_bytes(head + patch.tobytes())
        Image.fromarray(mask).save(folder / "masks" / part / f"{name}.png", compress_level=1)
    return len(ids)


def _check(out: Path, n_patches: int, n_slides: int, seed: int) -> None:
    if n_slides < MIN_SLIDES:
        raise DataError(f"slides must be at least {MIN_SLIDES} (training and test, two scanners), got {n_slides}")
    if n_patches < MIN_PATCHES_A_SLIDE * n_slides:
        raise DataError(
            f"patches must be at least {MIN_PATCHES_A_SLIDE} a slide, that is {MIN_PATCHES_A_SLIDE * n_slides} for"
            f" {n_slides} slides, got {n_patches}; ask for more patches or fewer slides"
        )
    if seed < 0:
        raise DataError(f"seed must be 0 or more, got {seed}")
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; name a folder for the synthetic set")
    check_replaceable(out)
    if out.is_dir() and any(out.iterdir()):
        raise DataError(f"{out} is not empty; name a new folder for the synthetic set or empty this one")


def _shares(total: int, weights: NDArray[np.float64], least: int) -> NDArray[np.int64]:
    """``total`` split in proportion to ``weights``, each share at least ``least`` (largest remainders)."""
    free = total - least * len(weights)
    exact = free * weights / weights.sum()
    share = np.floor(exact).astype(np.int64)
    share[np.argsort(share - exact, kind="stable")[: free - share.sum()]] += 1
    return np.asarray(share + least)


def _plan_slides(n_patches: int, n_slides: int, seed: int) -> list[_Slide]:
    rng = np.random.default_rng([seed, 0])
    n_test = max(2, round(n_slides / 4))
    n_train = n_slides - n_test
    test = np.arange(n_slides) >= n_train
    rare = np.r_[np.arange(n_train) < -(-n_train // 4), np.arange(n_test) < n_test // 2]
    n_test_patches = round(TEST_SHARE * n_patches)
    weight = rng.uniform(0.7, 1.3, n_slides)
    least = MIN_PATCHES_A_SLIDE // 2
    size = np.r_[
        _shares(n_patches - n_test_patches, weight[~test], least), _shares(n_test_patches, weight[test], least)
    ]
    share = rng.uniform(-0.12, 0.12, n_slides)
    for part in (test, ~test):
        share[part] += POSITIVE_SHARE - np.average(share[part], weights=size[part])
    names = rng.permutation(n_slides)
    return [
        _plan_slide(rng, f"slide_{names[i]:03d}", bool(test[i]), int(rare[i]), int(size[i]), float(share[i]))
        for i in range(n_slides)
    ]


def _plan_slide(rng: np.random.Generator, name: str, test: bool, domain: int, size: int, share: float) -> _Slide:
    # read off genuine Kaggle patches: one scanner gives violet nuclei on pink, the other brown-black ones on salmon
    stains = ([[0.66, 0.92, 0.30], [0.17, 0.62, 0.14]], [[0.60, 0.78, 0.56], [0.16, 0.52, 0.36]])[domain]
    white = ([0.92, 0.91, 0.94], [0.985, 0.97, 0.955])[domain]
    vectors = np.array(stains) * rng.normal(1.0, 0.07, (2, 3)) * rng.normal(1.0, 0.12, (2, 1))
    return _Slide(
        name=name,
        test=test,
        domain=domain,
        n_patches=size,
        n_positive=min(size - 1, max(1, round(share * size))),
        look=SlideLook(
            vectors=vectors.astype(np.float32),
            white=(np.array(white) * rng.normal(1.0, 0.015)).clip(0.0, 1.0).astype(np.float32),
            blur=float((0.10, 0.17)[domain] + rng.uniform(-0.03, 0.03)),
            noise=float((0.012, 0.018)[domain] * rng.uniform(0.8, 1.2)),
            cellularity=float(rng.uniform(0.65, 0.95)),
        ),
    )


def _plan_kinds(rng: np.random.Generator, slide: _Slide) -> NDArray[np.int64]:
    """What each patch of the slide shows, in random order."""
    kinds = np.full(slide.n_patches, PLAIN)
    kinds[: slide.n_positive] = TUMOUR_CENTRE
    kinds[slide.n_positive :][: round(0.4 * (slide.n_patches - slide.n_positive))] = TUMOUR_OUTSIDE
    return rng.permutation(kinds)


def _tiff_head(image: Bytes) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, image, photometric="rgb", metadata=None, software=False, rowsperstrip=PATCH_PX)
    raw = file.getvalue()
    assert raw.endswith(image.tobytes())
    return raw[: len(raw) - image.nbytes]


def _write_tables(folder: Path, slides: list[_Slide], kinds: list[NDArray[np.int64]], ids: list[str]) -> None:
    sizes = [slide.n_patches for slide in slides]
    table = pd.DataFrame(
        {
            "id": ids,
            "label": (np.concatenate(kinds) == TUMOUR_CENTRE).astype(int),
            "group": np.repeat([slide.name for slide in slides], sizes),
            "domain": np.repeat([_DOMAINS[slide.domain] for slide in slides], sizes),
            "test": np.repeat([slide.test for slide in slides], sizes),
        }
    ).sort_values("id")
    for part, rows in (("train", table[~table["test"]]), ("test", table[table["test"]])):
        for column, name in (("label", "labels"), ("group", "groups"), ("domain", "domains")):
            rows[["id", column]].to_csv(folder / f"{part}_{name}.csv", index=False)
    table[table["test"]].assign(label=0)[["id", "label"]].to_csv(folder / "sample_submission.csv", index=False)
