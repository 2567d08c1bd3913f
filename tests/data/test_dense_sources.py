"""Folders of images and masks: every layout becomes the same pack, every fault is one line."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from data_builders import tissue, write_csv
from PIL import Image

from pcam_automl.data import pack as pack_module
from pcam_automl.data.masks import MaskRule, decode_mask, find_background
from pcam_automl.data.pack import pack, verify
from pcam_automl.data.packs import find_pack
from pcam_automl.data.pool import chunk_for
from pcam_automl.data.sources import fingerprint, open_source
from pcam_automl.data.splits import make_split
from pcam_automl.data.store import TEST, TRAIN, VALID, PatchStore
from pcam_automl.errors import DataError


def image_of(number: int, size: tuple[int, int] = (40, 40)) -> np.ndarray:
    return np.random.default_rng([1, number]).integers(20, 230, (*size, 3), dtype=np.uint8)


def mask_of(number: int, size: tuple[int, int] = (40, 40)) -> np.ndarray:
    """A disc of tumour, larger for larger numbers; none for number 0."""
    y, x = np.indices(size)
    return (((y - size[0] / 2) ** 2 + (x - size[1] / 2) ** 2) < (3 * number) ** 2).astype(np.uint8)


def write_pair(
    images: Path, masks: Path | None, number: int, values: tuple[int, int] = (0, 255), **how: object
) -> None:
    size, suffix = how.get("size", (40, 40)), how.get("suffix", ".png")
    assert isinstance(size, tuple)
    images.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image_of(number, size)).save(images / f"tile{number}{suffix}")
    if masks is not None:
        masks.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray(np.array(values, np.uint8)[mask_of(number, size)])
        grey.convert(str(how.get("mode", "L"))).save(masks / f"tile{number}.png")


def write_set(root: Path, *, train: str = "", sub: str = "", n: int = 6, **how: object) -> Path:
    """``inputs_train`` and so on by default; ``train`` names another place ``images|masks``."""
    images, masks = train.split("|") if train else ("inputs_train", "outputs_train")
    for number in range(n):
        write_pair(root / images / sub, root / masks / sub, number, **how)  # type: ignore[arg-type]
    return root


def packed(root: Path) -> PatchStore:
    return pack(open_source(root), root.parent / f"pack of {root.name}")


LAYOUTS = {
    "inputs and outputs": {},
    "with class sub-folder": {"sub": "class0"},
    "images and masks": {"train": "images|masks"},
    "parts above": {"train": "train/images|train/masks"},
    "parts below": {"train": "images/train|masks/train"},
    "0 and 1": {"values": (0, 1)},
    "any two values": {"values": (7, 9)},
    "RGB with equal channels": {"mode": "RGB"},
    "palette": {"mode": "P"},
    "bits": {"mode": "1"},
    "TIFF images": {"suffix": ".tif"},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_images_and_masks(name: str, tmp_path: Path) -> None:
    source = open_source(write_set(tmp_path / "set", **LAYOUTS[name]))  # type: ignore[arg-type]
    store = pack(source, tmp_path / "pack")
    assert store.ids.tolist() == [f"tile{number}" for number in range(6)]
    assert store.masks is not None
    for number in range(6):
        assert np.array_equal(store.patches[number], image_of(number))
        assert np.array_equal(store.masks[number], mask_of(number))
    assert store.label.tolist() == [0, 1, 1, 1, 1, 1]
    assert (store.part == TRAIN).all()
    assert verify(store, source) == 6


def test_verify_copies_large_images_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(write_set(tmp_path / "set"))
    store, lengths = pack(source, tmp_path / "pack"), list[int]()
    monkeypatch.setattr(pack_module, "chunk_for", lambda shape: 4)
    digests = pack_module.pixel_digests
    monkeypatch.setattr(pack_module, "pixel_digests", lambda pixels: (lengths.append(len(pixels)), digests(pixels))[1])
    assert verify(store, source) == 6
    assert lengths == [4, 2]


def test_jpeg_images_are_taken_and_smeared_jpeg_masks_are_refused_with_the_remedy(tmp_path: Path) -> None:
    write_set(tmp_path / "set", train="images|masks", n=2, suffix=".jpg")
    assert len(packed(tmp_path / "set")) == 2
    (tmp_path / "set" / "masks" / "tile1.png").unlink()
    Image.fromarray(mask_of(4) * np.uint8(255)).save(tmp_path / "set" / "masks" / "tile1.jpg", quality=50)
    with pytest.raises(DataError, match=r"tile1: \d+ values \(.*JPEG blurs edges, save masks as PNG"):
        pack(open_source(tmp_path / "set"), tmp_path / "other")


def test_test_and_validation_parts_are_kept_apart_with_their_masks(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set")
    for number in (7, 8):
        write_pair(root / "inputs_test", root / "outputs_test", number)
    store = packed(root)
    assert store.part.tolist() == [TRAIN] * 6 + [TEST] * 2
    assert store.masks is not None
    assert np.array_equal(store.masks[7], mask_of(8))
    assert store.label[store.part == TEST].tolist() == [1, 1]
    assert not set(store.development_rows()) & set(store.test_rows())
    other = write_set(tmp_path / "parts", train="train/images|train/masks")
    write_pair(other / "valid" / "images", other / "valid" / "masks", 9)
    store = packed(other)
    assert store.part.tolist() == [TRAIN] * 6 + [VALID]
    assert make_split(store, n_folds=3).fold[6] == 0


def test_test_images_without_masks_are_said_and_have_no_label(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set")
    write_pair(root / "inputs_test", None, 7)
    source = open_source(root)
    assert "1 test images have no masks: they can be predicted, not scored" in source.notes
    assert pack(source, tmp_path / "pack").label[-1] == -1


def test_images_need_not_be_square(tmp_path: Path) -> None:
    store = packed(write_set(tmp_path / "set", size=(40, 64)))
    assert store.patches.shape == (6, 40, 64, 3)
    assert store.masks is not None
    assert np.array_equal(store.masks[3], mask_of(3, (40, 64)))


def test_large_images_are_packed_a_few_at_a_time() -> None:
    assert chunk_for((96, 96)) == 512
    assert chunk_for((512, 512)) == 18
    assert chunk_for((2048, 2048)) == 1


def test_masks_of_one_value_are_told_by_the_others_of_their_set(tmp_path: Path) -> None:
    for values, whole, positive in (((1, 2), 1, False), ((1, 2), 2, True), ((0, 255), 255, True), ((0, 255), 0, False)):
        root = write_set(tmp_path / f"{values}{whole}", values=values)
        Image.fromarray(np.full((40, 40), whole, np.uint8)).save(root / "outputs_train" / "tile0.png")
        assert find_background(root / "outputs_train", ["tile0.png", "tile3.png"]) == values[0]
        store = packed(root)
        assert store.masks is not None
        assert (store.masks[0] == positive).all()
        assert store.label[0] == positive


def test_a_set_of_empty_and_full_masks_alone_takes_zero_for_background(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", n=2)
    for number, value in ((0, 0), (1, 200)):
        Image.fromarray(np.full((40, 40), value, np.uint8)).save(root / "outputs_train" / f"tile{number}.png")
    assert packed(root).label.tolist() == [0, 1]


def test_slides_come_from_a_table_beside_the_images_or_given(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set")
    rows = [(f"tile{number}", f"s{number % 3}") for number in range(6)]
    write_csv(root / "train_groups.csv", "id,group", rows)
    assert packed(root).group.tolist() == [0, 1, 2, 0, 1, 2]
    write_csv(tmp_path / "domains.csv", "id,domain", [(name, "x") for name, _ in rows])
    assert set(open_source(root, domains=tmp_path / "domains.csv").domain.tolist()) == {"x"}


def test_a_changed_mask_changes_the_fingerprint_and_is_found_by_verify(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set")
    store, stamp = packed(root), fingerprint(open_source(root))
    Image.fromarray(mask_of(9) * np.uint8(255)).save(root / "outputs_train" / "tile2.png")
    assert fingerprint(open_source(root)) != stamp
    with pytest.raises(DataError, match="1 masks of the source are not what was packed: tile2"):
        verify(store, open_source(root))
    assert find_pack(root, tmp_path / "packs").content_hash != store.content_hash


def remove_mask(root: Path) -> None:
    (root / "outputs_train" / "tile2.png").unlink()
    (root / "outputs_train" / "tile4.png").unlink()


def remove_image(root: Path) -> None:
    (root / "inputs_train" / "tile3.png").unlink()


def resize_mask(root: Path) -> None:
    Image.fromarray(mask_of(1, (30, 40)) * np.uint8(255)).save(root / "outputs_train" / "tile1.png")


def resize_image(root: Path) -> None:
    write_pair(root / "inputs_train", root / "outputs_train", 5, size=(48, 40))


def add_a_value(root: Path) -> None:
    Image.fromarray((np.arange(1600) % 3).astype(np.uint8).reshape(40, 40)).save(root / "outputs_train" / "tile3.png")


def colour_a_mask(root: Path) -> None:
    Image.fromarray(tissue(3, 40)).save(root / "outputs_train" / "tile3.png")


def two_subfolders(root: Path) -> None:
    (root / "inputs_train").rename(root / "away")
    for name in ("a", "b"):
        write_pair(root / "inputs_train" / name, None, 1)


def empty_images(root: Path) -> None:
    for file in [*(root / "inputs_train").iterdir(), *(root / "outputs_train").iterdir()]:
        file.unlink()


FAULTS = {
    remove_mask: r"2 of 6 images in inputs_train have no mask in outputs_train \(tile2, tile4\)",
    remove_image: r"1 of 6 masks in outputs_train have no image in inputs_train \(tile3\)",
    resize_mask: r"1 masks are not of their image's size \(tile1: image 40x40 px, mask 40x30 px\)",
    resize_image: r"5 are 40x40 px, 1 are not \(tile5: 40x48 px\); cut or pad them to one size",
    add_a_value: r"1 masks cannot be used \(tile3: 3 values \(0, 1, 2\), a mask has two: 0 and one larger\); save them",
    colour_a_mask: r"tile3: colours in it, want grey \(equal channels\)",
    two_subfolders: r"holds no image but 2 folders \(a, b\)",
    empty_images: r"inputs_train holds no TIFF, PNG or JPEG image",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_one_line_that_names_the_first_files(fault, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    fault(write_set(tmp_path / "set"))
    with pytest.raises(DataError, match=FAULTS[fault]) as caught:
        packed(tmp_path / "set")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "pack of set").exists()


def test_the_read_limit_holds_for_masks_and_images(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("L", (5000, 5000)).save(buffer, "PNG")
    with pytest.raises(DataError, match="5000x5000 px"):
        decode_mask(buffer.getvalue(), (5000, 5000), MaskRule(any_kind=True))
    root = write_set(tmp_path / "set")
    (root / "outputs_train" / "tile2.png").write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match="tile2: 5000x5000 px"):
        packed(root)


def test_sets_with_tumour_in_every_image_are_split_by_its_share(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for number in range(1, 21):
        y = np.indices((40, 40))[0]
        (root / "images").mkdir(parents=True, exist_ok=True)
        (root / "masks").mkdir(exist_ok=True)
        Image.fromarray(image_of(number)).save(root / "images" / f"{number:02}.png")
        Image.fromarray((y < number).astype(np.uint8) * np.uint8(255)).save(root / "masks" / f"{number:02}.png")
    store = packed(root)
    assert (store.label == 1).all()
    split = make_split(store)
    heavy = np.arange(20) >= 10
    for fold in range(5):
        assert heavy[split.fold == fold].sum() == 2
        assert (~heavy[split.fold == fold]).sum() == 2
    aside = make_split(store, holdout=0.2).holdout_rows()
    assert heavy[aside].sum() == 2


def test_few_slides_of_one_load_are_still_split(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", n=10)
    write_csv(root / "train_groups.csv", "id,group", [(f"tile{n}", f"s{n // 2}") for n in range(10)])
    split = make_split(packed(root))
    assert sorted(np.bincount(split.fold).tolist()) == [2, 2, 2, 2, 2]


@pytest.mark.parametrize(("images", "masks"), [("images", "masks"), ("inputs_train", "outputs_train")])
def test_pictures_without_masks_are_told_what_is_missing(images: str, masks: str, tmp_path: Path) -> None:
    (tmp_path / images).mkdir()
    with pytest.raises(DataError, match=f"has {images}/ but no {masks}/ beside it; add the masks"):
        open_source(tmp_path)
