from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_builders import write_kaggle

from pcam_automl.data.pack import pack
from pcam_automl.data.sources import open_source
from pcam_automl.data.store import Flag, PatchStore, content_hash, is_pack, open_store
from pcam_automl.errors import DataError


@pytest.fixture
def store(tmp_path: Path) -> PatchStore:
    return pack(open_source(write_kaggle(tmp_path / "raw")), tmp_path / "pack")


def test_arrays_have_the_agreed_types(store: PatchStore) -> None:
    n = len(store)
    assert n == 12
    assert (store.patches.shape, store.patches.dtype) == ((n, 96, 96, 3), np.uint8)
    assert store.ids.dtype.kind == "U"
    types = {"label": np.int8, "group": np.int32, "domain": np.int32, "part": np.int8, "flags": np.uint16}
    for name, dtype in types.items():
        array = getattr(store, name)
        assert (array.shape, array.dtype) == ((n,), dtype), name
    assert (store.stats.shape, store.stats.dtype) == ((n, 6), np.float32)
    assert (store.digest.shape, store.digest.dtype) == ((n, 16), np.uint8)
    assert store.masks is None
    assert len(store.content_hash) == 64
    assert store.missing_test_ids == ()


def test_opens_memory_mapped_and_read_only_in_milliseconds(store: PatchStore) -> None:
    taken = []
    for _ in range(3):  # the collector may pass by
        start = time.process_time()
        opened = open_store(store.root)
        taken.append(time.process_time() - start)
    assert min(taken) < 0.1
    assert isinstance(opened.patches, np.memmap)
    for array in (opened.patches, opened.label, opened.flags):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_a_read_only_folder_is_enough(store: PatchStore) -> None:
    for path in (*store.root.iterdir(), store.root):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert open_store(store.root).content_hash == store.content_hash
    finally:
        store.root.chmod(0o755)


def test_development_rows_are_labelled_training_rows(store: PatchStore) -> None:
    assert store.development_rows().tolist() == list(range(8))
    assert store.development_rows().dtype == np.int64
    assert store.test_rows().tolist() == list(range(8, 12))


def test_missing_and_foreign_folders_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist; make it with"):
        open_store(tmp_path / "absent")
    with pytest.raises(DataError, match="not a pack"):
        open_store(tmp_path)
    assert not is_pack(tmp_path)
    (tmp_path / "store.json").write_text('{"format": "something"}')
    assert is_pack(tmp_path)
    with pytest.raises(DataError, match="not of a pack of this package"):
        open_store(tmp_path)
    (tmp_path / "store.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="cannot be read"):
        open_store(tmp_path)


HEADER_FAULTS = [
    ("version", 99, "pack version 99"),
    ("n_patches", "12", "n_patches missing or of the wrong kind"),
    ("n_patches", 11, r"must be U \(11,\)"),
    ("shape", [64, 64], r"patches.npy must be uint8 \(12, 64, 64, 3\)"),
    ("content_hash", "x", "content_hash missing or of the wrong kind"),
    ("files", {}, "ids.npy has .* bytes, store.json says None"),
    ("source", None, "source missing"),
    ("faults", {"a": "b"}, "faults missing or of the wrong kind"),
    ("group_names", [1], "group_names missing or of the wrong kind"),
]


@pytest.mark.parametrize(("key", "value", "words"), HEADER_FAULTS)
def test_a_damaged_header_is_one_line(store: PatchStore, key: str, value: object, words: str) -> None:
    path = store.root / "store.json"
    header = json.loads(path.read_text())
    header[key] = value
    path.write_text(json.dumps(header))
    with pytest.raises(DataError, match=words) as caught:
        open_store(store.root)
    assert "\n" not in str(caught.value)
    assert "prepare" in str(caught.value)


@pytest.mark.parametrize("name", ["patches", "ids", "label", "digest"])
def test_missing_truncated_and_pickled_arrays_are_one_line(store: PatchStore, name: str) -> None:
    path = store.root / f"{name}.npy"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(DataError, match=rf"{name}\.npy has {size - 1} bytes, store.json says {size}"):
        open_store(store.root)
    for content in (pickle.dumps([1]), b"PK\x03\x04", b"\x93NUMPY\x01\x00\x06\x00{'desc", b"\0"):
        path.write_bytes(content.ljust(size, b"\0"))
        with pytest.raises(DataError, match=rf"{name}\.npy cannot be read"):
            open_store(store.root)
    path.unlink()
    with pytest.raises(DataError, match=rf"{name}\.npy is missing"):
        open_store(store.root)


def test_an_array_of_objects_is_never_unpickled(store: PatchStore) -> None:
    path = store.root / "ids.npy"
    np.save(path, np.array([print] * 12, dtype=object), allow_pickle=True)
    header = json.loads((store.root / "store.json").read_text())
    header["files"]["ids"] = path.stat().st_size
    (store.root / "store.json").write_text(json.dumps(header))
    with pytest.raises(DataError, match=r"ids\.npy cannot be read"):
        open_store(store.root)


def test_codes_without_a_name_are_refused(store: PatchStore) -> None:
    np.save(store.root / "group.npy", np.full(12, 3, np.int32))
    with pytest.raises(DataError, match=r"group\.npy holds codes 3\.\.3, at most -1 is known"):
        open_store(store.root)


def hashable(n: int = (1 << 14) + 4) -> dict[str, np.ndarray]:
    """What a content hash is of, for more patches than it reads at a time; no two neighbours are alike."""
    number = np.arange(n)
    return {
        "digest": np.repeat(number[:, None] % 251, 16, axis=1).astype(np.uint8),
        "ids": np.array([f"{row:x}" for row in number]),
        "label": (number % 2).astype(np.int8),
        "group": (number % 3).astype(np.int32),
        "domain": (number % 2).astype(np.int32),
        "part": (number % 3).astype(np.int8),
        "flags": np.where(number % 2, Flag.LEFT_OUT, 0).astype(np.uint16),
        "masks": np.zeros((n, 2, 2), np.uint8),
    }


def hash_of(arrays: dict[str, np.ndarray]) -> str:
    rest: dict[str, Any] = {"shape": (2, 2), "group_names": ("a", "b", "c"), "domain_names": ("x", "y")}
    return content_hash(arrays=arrays, masks=arrays["masks"], **rest)


@pytest.mark.parametrize("name", ["digest", "ids", "label", "group", "domain", "part", "flags"])
@pytest.mark.parametrize("first", [0, -2])
def test_two_patches_that_change_places_in_one_column_are_other_content(name: str, first: int) -> None:
    """As many patches of each slide as before, and other ones: a network would be scored on what it was trained on."""
    arrays = hashable()
    before, swapped = hash_of(arrays), arrays[name].copy()
    swapped[[first, first + 1]] = swapped[[first + 1, first]]
    assert hash_of({**arrays, name: swapped}) != before
    assert hash_of({**arrays, name: arrays[name].copy()}) == before


def test_one_pixel_of_a_mask_is_other_content() -> None:
    arrays = hashable()
    found = [hash_of(arrays)]
    for place in ((0, 0, 0), (-1, 1, 1)):
        masks = arrays["masks"].copy()
        masks[place] = 1
        found.append(hash_of({**arrays, "masks": masks}))
    assert len(set(found)) == 3


def test_a_flag_that_leaves_no_patch_out_is_the_same_content() -> None:
    arrays = hashable()
    assert hash_of({**arrays, "flags": arrays["flags"] | np.uint16(Flag.BLURRED)}) == hash_of(arrays)


def test_data_modules_import_no_torch() -> None:
    code = "import sys, pcam_automl.data.pack, pcam_automl.data.quality; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
