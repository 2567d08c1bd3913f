"""Masks beside a Kaggle folder: read, packed, compared, refused."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
import tifffile
from data_builders import patch_id
from PIL import Image

from pcam_automl.data.images import PatchFault
from pcam_automl.data.masks import decode_mask
from pcam_automl.data.pack import pack, verify
from pcam_automl.data.sources import fingerprint, open_source
from pcam_automl.data.store import TEST, open_store
from pcam_automl.data.synthetic import write_synthetic
from pcam_automl.errors import DataError


def mask_of(number: int) -> np.ndarray:
    return np.random.default_rng([9, number]).integers(0, 2, (96, 96), dtype=np.uint8) * np.uint8(255)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def masked(kaggle: Path) -> Path:
    (kaggle / "masks" / "train").mkdir(parents=True)
    for number in range(8):
        Image.fromarray(mask_of(number)).save(kaggle / "masks" / "train" / f"{patch_id(number)}.png")
    return kaggle


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("mode", ["L", "1"])
@pytest.mark.parametrize("high", [1, 255])
def test_any_two_values_become_0_and_1(kind: str, mode: str, high: int) -> None:
    mask = mask_of(0) > 0
    image = Image.fromarray(mask) if mode == "1" else Image.fromarray(mask.astype(np.uint8) * np.uint8(high))
    assert np.array_equal(decode_mask(encoded(image, kind), (96, 96)), mask)


@pytest.mark.parametrize("value", [0, 1, 255])
def test_a_mask_of_one_value_is_all_or_nothing(value: int) -> None:
    image = Image.fromarray(np.full((96, 96), value, np.uint8))
    assert (decode_mask(encoded(image), (96, 96)) == (value > 0)).all()


FAULTS = {
    "three values": (
        encoded(Image.fromarray(np.arange(9216, dtype=np.uint16).reshape(96, 96).astype(np.uint8) % 3)),
        "3 values",
    ),
    "no background": (
        encoded(Image.fromarray(mask_of(0) // 255 + 1)),
        r"2 values \(1, 2\), a mask has two: 0 and one larger",
    ),
    "small": (encoded(Image.fromarray(mask_of(0)[:64, :64])), "64x64 px, want 96x96"),
    "rgb": (encoded(Image.fromarray(mask_of(0)).convert("RGB")), "colour mode RGB"),
    "16 bit": (encoded(Image.fromarray(mask_of(0).astype(np.uint16))), "colour mode I;16"),
    "jpeg": (encoded(Image.fromarray(mask_of(0)), "JPEG"), "unreadable"),
    "truncated": (encoded(Image.fromarray(mask_of(0)))[:200], "unreadable"),
    "empty": (b"", "unreadable"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_mask_is_a_fault_of_one_line(name: str) -> None:
    raw, words = FAULTS[name]
    with pytest.raises(PatchFault, match=words) as caught:
        decode_mask(raw, (96, 96))
    assert "\n" not in str(caught.value)


def test_masks_of_training_patches_are_packed_and_absent_test_masks_are_zeros_and_said(
    masked: Path, tmp_path: Path
) -> None:
    source = open_source(masked)
    assert "4 test patches have no mask: theirs are packed as zeros" in source.notes
    store = pack(source, tmp_path / "pack")
    assert store.masks is not None
    for number in range(8):
        row = store.ids.tolist().index(patch_id(number))
        assert np.array_equal(store.masks[row], mask_of(number) // 255)
    assert not store.masks[store.part == TEST].any()
    assert verify(store, source) == 12


def test_masks_may_lie_in_one_folder_and_be_tiffs(kaggle: Path, tmp_path: Path) -> None:
    (kaggle / "masks").mkdir()
    for number in (*range(8), 1000):
        tifffile.imwrite(kaggle / "masks" / f"{patch_id(number)}.tif", mask_of(number), photometric="minisblack")
    store = pack(open_source(kaggle), tmp_path / "pack")
    assert store.masks is not None
    for number in (3, 1000):
        assert np.array_equal(store.masks[store.ids.tolist().index(patch_id(number))], mask_of(number) // 255)


def test_masks_count_in_fingerprint_and_content_hash(masked: Path, tmp_path: Path) -> None:
    first, stamp = pack(open_source(masked), tmp_path / "a"), fingerprint(open_source(masked))
    file = masked / "masks" / "train" / f"{patch_id(2)}.png"
    os.utime(file, ns=(1, 1))
    assert fingerprint(open_source(masked)) != stamp
    Image.fromarray(mask_of(77)).save(file)
    second = pack(open_source(masked), tmp_path / "b")
    (masked / "masks").rename(tmp_path / "away")
    third = pack(open_source(masked), tmp_path / "c")
    assert third.masks is None
    assert len({first.content_hash, second.content_hash, third.content_hash}) == 3


def test_a_training_patch_without_a_mask_is_named(masked: Path) -> None:
    (masked / "masks" / "train" / f"{patch_id(5)}.png").unlink()
    with pytest.raises(DataError, match=rf"1 training patches have no mask \({patch_id(5)}\); add"):
        open_source(masked)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_bad_mask_is_named_and_nothing_is_packed(masked: Path, tmp_path: Path, workers: int) -> None:
    folder = masked / "masks" / "train"
    (folder / f"{patch_id(1)}.png").write_bytes(FAULTS["three values"][0])
    (folder / f"{patch_id(6)}.png").write_bytes(FAULTS["small"][0])
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="2 masks cannot be used") as caught:
        pack(open_source(masked), tmp_path / "out" / "pack", workers=workers)
    assert f"{patch_id(1)}: 3 values" in str(caught.value)
    assert f"{patch_id(6)}: 64x64 px, want 96x96" in str(caught.value)
    assert not list((tmp_path / "out").iterdir())


def test_verify_names_changed_masks(masked: Path, tmp_path: Path) -> None:
    pack(open_source(masked), tmp_path / "pack")
    Image.fromarray(mask_of(77)).save(masked / "masks" / "train" / f"{patch_id(2)}.png")
    with pytest.raises(DataError, match=f"1 masks of the source are not what was packed: {patch_id(2)}"):
        verify(open_store(tmp_path / "pack"), open_source(masked))


def test_what_synth_writes_is_packed_with_all_its_masks(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "set", n_patches=80, n_slides=8, seed=1)
    source = open_source(tmp_path / "set")
    store = pack(source, tmp_path / "pack")
    assert store.masks is not None
    assert set(np.unique(store.masks)) == {0, 1}
    centre = store.masks[:, 32:64, 32:64].any(axis=(1, 2))
    train = store.part != TEST
    assert np.array_equal(centre[train], store.label[train] == 1)
    assert store.masks[~train].any()
