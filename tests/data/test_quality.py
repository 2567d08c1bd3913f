from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
import xxhash
from data_builders import patch_id, tissue, write_csv
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pcam_automl.data.pack import pack
from pcam_automl.data.quality import BLUR_VARIANCE, BRIGHT_MIN, DARK_MAX, complete_flags, findings, measure, write_sheet
from pcam_automl.data.sources import open_source
from pcam_automl.data.store import TEST, TRAIN, Flag


def laplacian_variance(green: np.ndarray) -> float:
    """Straight from the definition."""
    wide = green.astype(float)
    values = [
        4 * wide[y, x] - wide[y - 1, x] - wide[y + 1, x] - wide[y, x - 1] - wide[y, x + 1]
        for y in range(1, green.shape[0] - 1)
        for x in range(1, green.shape[1] - 1)
    ]
    return float(np.var(values))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 37), st.integers(3, 40), st.integers(0, 2**32 - 1))
def test_measures_equal_their_definitions(n: int, side: int, seed: int) -> None:
    patches = np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)
    measures = measure(patches)
    row = n - 1
    scaled = patches[row] / 255
    assert np.allclose(measures.stats[row], [*scaled.mean(axis=(0, 1)), *scaled.std(axis=(0, 1))], atol=1e-5)
    assert measures.sharpness[row] == pytest.approx(laplacian_variance(patches[row, ..., 1]), rel=1e-4, abs=0.5)
    assert measures.digest[row].tobytes() == xxhash.xxh3_128(patches[row].tobytes()).digest()


def slow_measures(patch: np.ndarray) -> tuple[np.ndarray, float, int]:
    """Stats, sharpness and flags in whole numbers, one pixel value after the other."""
    pixels = patch.reshape(-1, 3).astype(object)
    n = len(pixels)
    sums, squares = pixels.sum(axis=0), (pixels * pixels).sum(axis=0)
    mean = np.array([total / n for total in sums])
    deviation = np.array([(max(square / n - at**2, 0.0)) ** 0.5 for square, at in zip(squares, mean, strict=True)])
    green = patch[..., 1].astype(np.int64)
    centre = 4 * green[1:-1, 1:-1]
    laplacian = centre - green[:-2, 1:-1] - green[2:, 1:-1] - green[1:-1, :-2] - green[1:-1, 2:]
    sharpness = float(np.mean(laplacian**2) - np.mean(laplacian) ** 2)
    dark, bright = patch.max() < DARK_MAX, patch.min() > BRIGHT_MIN
    blurred = np.float32(sharpness) < BLUR_VARIANCE and not dark and not bright
    flags = Flag.DARK * dark | Flag.BRIGHT * bright | Flag.BLURRED * blurred
    return (np.concatenate([mean, deviation]) / 255.0).astype(np.float32), sharpness, int(flags)


@pytest.mark.parametrize("shape", [(96, 96), (95, 97), (3, 3), (3, 40), (64, 33), (130, 120), (263, 263)])
def test_fast_measures_equal_the_slow_ones(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    n = 41 if shape[0] < 263 else 3  # more than one batch of the measuring
    patches = np.empty((n, *shape, 3), np.uint8)
    for row in range(n):
        low = rng.integers(0, 250)
        patches[row] = rng.integers(
            low, rng.integers(low + 1, min(low + (2, 12, 40, 300)[row % 4], 255) + 1), (*shape, 3)
        )
    patches[0], patches[1], patches[2, 0, 0, 0] = 255, 0, 255
    measures = measure(patches)
    for row, patch in enumerate(patches):
        stats, sharpness, flags = slow_measures(patch)
        assert measures.flags[row] == flags
        assert np.array_equal(measures.stats[row], stats)
        assert measures.sharpness[row] == (
            np.float32(sharpness) if sharpness < 1800 else pytest.approx(sharpness, rel=1e-6)
        )


def test_measures_do_not_depend_on_the_batch() -> None:
    patches = np.stack([tissue(seed) for seed in range(40)])
    whole, single = measure(patches), measure(patches[33:34])
    assert np.allclose(whole.sharpness[33:34], single.sharpness, rtol=1e-5)
    for name in ("stats", "digest", "flags"):
        assert np.array_equal(getattr(whole, name)[33:34], getattr(single, name))


@pytest.mark.parametrize(
    ("low", "high", "flag"),
    [(0, 9, Flag.DARK), (0, 10, None), (246, 255, Flag.BRIGHT), (245, 255, None)],
)
def test_dark_and_bright_bounds(low: int, high: int, flag: Flag | None) -> None:
    patch = np.full((1, 96, 96, 3), low, np.uint8)
    patch[0, 5, 5, 1] = high
    assert Flag(int(measure(patch).flags[0])) & (Flag.DARK | Flag.BRIGHT) == (flag or Flag(0))


def test_smooth_patch_is_called_blurred_and_texture_is_not() -> None:
    ramp = np.linspace(40, 200, 96).astype(np.uint8)
    smooth = np.broadcast_to(ramp[:, None, None], (96, 96, 3))
    assert measure(np.stack([smooth, tissue(0)])).flags.tolist() == [Flag.BLURRED, 0]


def digests(*keys: int) -> np.ndarray:
    return np.repeat(np.array(keys, np.uint8)[:, None], 16, axis=1)


def test_duplicates_contradictions_and_leaks_are_flagged_and_kept() -> None:
    label = np.array([0, 1, 1, 1, 0, -1, -1], np.int8)
    part = np.array([TRAIN] * 5 + [TEST] * 2, np.int8)
    flags = complete_flags(np.zeros(7, np.uint16), digests(1, 1, 2, 2, 3, 3, 4), label, part, keep_outliers=False)
    contradicting = Flag.DUPLICATE | Flag.CONTRADICTING
    leaked = Flag.DUPLICATE | Flag.IN_TRAIN_AND_TEST
    assert flags.tolist() == [contradicting, contradicting, Flag.DUPLICATE, Flag.DUPLICATE, leaked, leaked, 0]


def test_faulty_patches_are_no_duplicates_of_one_another() -> None:
    faulty = np.array([Flag.UNREADABLE, Flag.WRONG_SHAPE, 0], np.uint16)
    flags = complete_flags(
        faulty, digests(0, 0, 0), np.array([0, 1, 1], np.int8), np.zeros(3, np.int8), keep_outliers=True
    )
    assert flags.tolist() == [Flag.UNREADABLE | Flag.LEFT_OUT, Flag.WRONG_SHAPE | Flag.LEFT_OUT, 0]


def test_findings_count_and_name_each_patch(kaggle: Path, tmp_path: Path) -> None:
    (kaggle / "train" / f"{patch_id(0)}.tif").write_bytes(b"")
    for number in (1, 1001):
        tifffile.imwrite(
            kaggle / ("train", "test")[number > 999] / f"{patch_id(number)}.tif", tissue(7), photometric="rgb"
        )
    write_csv(kaggle / "train_labels.csv", "id,label", [(patch_id(number), int(number == 7)) for number in range(8)])
    store = pack(open_source(kaggle), tmp_path / "pack")
    found = findings(store)
    expected = {"unreadable": 1, "duplicate": 3, "contradicting": 2, "in_train_and_test": 3, "left_out": 1}
    assert found.counts == expected
    assert found.to_json()["findings"]["unreadable"] == [f"{patch_id(0)} (empty file)"]
    assert sorted(found.by_flag["contradicting"]) == sorted([patch_id(1), patch_id(7)])
    assert len(found.lines()) == 5
    assert f"1 patch unreadable: {patch_id(0)} (empty file)" in found.lines()
    assert any("(1 of them test patches, never left out)" in line for line in found.lines())
    assert sorted(store.ids[found.rows].tolist()) == sorted(patch_id(number) for number in (0, 1, 7))


def test_sound_pack_has_nothing_to_say(kaggle: Path, tmp_path: Path) -> None:
    found = findings(pack(open_source(kaggle), tmp_path / "pack"))
    assert found.lines() == []
    assert found.rows.size == 0
    assert not (tmp_path / "pack" / "findings.png").exists()


def test_sheet_shows_the_named_patches(kaggle: Path, tmp_path: Path) -> None:
    store = pack(open_source(kaggle), tmp_path / "pack")
    write_sheet(store, [3, 5], tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet)
    assert np.array_equal(pixels[16:112, 16:112], store.patches[3])
    assert np.array_equal(pixels[16:112, 128:224], store.patches[5])
    write_sheet(store, [], tmp_path / "empty.png")
    assert (tmp_path / "empty.png").is_file()
