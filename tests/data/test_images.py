from __future__ import annotations

import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pcam_automl.data.images import MAX_FILE_BYTES, PatchFault, Template, decode_patch, read_patch, read_patches

IMAGE = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)


def tiff(image: np.ndarray = IMAGE, **options: object) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, image, **{"photometric": "rgb", **options})
    return buffer.getvalue()


def pillow(mode: str, kind: str, image: np.ndarray = IMAGE, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def bare_header(width: int, height: int, compression: int = 1, n_bytes: int = 4) -> bytes:
    """A TIFF of one strip whose header claims any size."""
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, 8 + 2 + 9 * 12 + 4), (259, 3, 1, compression)]
    tags += [(262, 3, 1, 2), (273, 4, 1, 136), (277, 3, 1, 3), (278, 4, 1, height), (279, 4, 1, n_bytes)]
    ifd = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", 8) + ifd + struct.pack("<3H", 8, 8, 8) + b"\0" * 8 + b"\0" * n_bytes


@pytest.mark.parametrize("compression", [None, "lzw", "zlib", "packbits", "lzma", "zstd", "webp", "png"])
@pytest.mark.parametrize("layout", [{}, {"tile": (32, 32)}, {"rowsperstrip": 7}, {"byteorder": ">"}, {"bigtiff": True}])
def test_every_lossless_tiff_equals_tifffile(compression: str | None, layout: dict[str, object]) -> None:
    options = {"compressionargs": {"lossless": True}} if compression == "webp" else {}
    assert np.array_equal(decode_patch(tiff(compression=compression, **layout, **options)), IMAGE)


def test_predictor_and_planar_files_hold_the_same_pixels() -> None:
    assert np.array_equal(decode_patch(tiff(compression="zlib", predictor=True)), IMAGE)
    planar = tiff(np.moveaxis(IMAGE, 2, 0), planarconfig="separate")
    assert np.array_equal(decode_patch(planar), IMAGE)


@pytest.mark.parametrize("compression", ["jpeg", "jpeg2000"])
def test_codecs_with_a_header_of_their_own_equal_tifffile(compression: str) -> None:
    raw = tiff(compression=compression)
    assert np.array_equal(decode_patch(raw), tifffile.imread(io.BytesIO(raw)))


def test_png_and_jpeg_equal_pillow() -> None:
    assert np.array_equal(decode_patch(pillow("RGB", "PNG")), IMAGE)
    raw = pillow("RGB", "JPEG", quality=95)
    assert np.array_equal(decode_patch(raw), np.asarray(Image.open(io.BytesIO(raw))))


HOSTILE: dict[str, tuple[bytes, bool, str]] = {
    "empty": (b"", False, "empty"),
    "html": (b"<!DOCTYPE html><html>not found</html>", False, "not a TIFF"),
    "truncated": (tiff()[:5000], False, "truncated"),
    "truncated lzw": (tiff(compression="lzw")[:-800], False, "truncated"),
    "header only": (b"II*\0" + struct.pack("<I", 8), False, ""),
    "magic only": (b"II*\0", False, ""),
    "no pixels": (bare_header(96, 96, n_bytes=0), False, "without pixels"),
    "too few pixels": (bare_header(96, 96, n_bytes=4), False, ""),
    "16 bit": (tiff(IMAGE.astype(np.uint16)), True, "16 bits"),
    "float": (tiff(IMAGE.astype(np.float32)), True, "32 bits"),
    "signed": (tiff(IMAGE.view(np.int8)), True, "int8"),
    "grey": (tiff(IMAGE[..., 0], photometric="minisblack"), True, "grey"),
    "rgba": (tiff(np.dstack([IMAGE, IMAGE[..., :1]]), extrasamples=["unassalpha"]), True, "RGBA"),
    "multi-page": (tiff(np.stack([IMAGE, IMAGE])), True, "more than one page"),
    "lab": (tiff(photometric="cielab"), True, "CIELAB"),
    "50000 x 50000": (bare_header(50_000, 50_000), True, "50000x50000"),
    "4 billion wide": (bare_header(2**32 - 1, 96), True, "4294967295"),
    "bomb in a strip": (tiff(np.zeros((4096, 96, 3), np.uint8), compression="zlib"), True, "96x4096"),
    "png 16 bit": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">IIBB", 96, 96, 16, 2) + b"\0" * 8, True, "16 bits"),
    "png 50000": (
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">IIBB", 50_000, 50_000, 8, 2) + b"\0" * 8,
        True,
        "50000",
    ),
    "png rgba": (pillow("RGBA", "PNG"), True, "RGBA"),
    "png grey": (pillow("L", "PNG"), True, "grey"),
    "png palette": (pillow("P", "PNG"), True, "palette"),
    "png truncated": (pillow("RGB", "PNG")[:3000], False, ""),
    "jpeg grey": (pillow("L", "JPEG"), True, "grey"),
    "jpeg cmyk": (pillow("CMYK", "JPEG"), True, "CMYK"),
    "jpeg truncated": (pillow("RGB", "JPEG")[:600], False, ""),
    "gif": (pillow("RGB", "GIF"), False, "not a TIFF"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_a_fault_of_one_line(name: str, tmp_path: Path) -> None:
    raw, wrong_shape, words = HOSTILE[name]
    (tmp_path / "x.tif").write_bytes(raw)
    fault = read_patch(tmp_path / "x.tif")
    assert isinstance(fault, PatchFault)
    assert fault.wrong_shape is wrong_shape, fault
    assert words in str(fault)
    assert "\n" not in str(fault)


def test_jpeg_strip_larger_than_its_tiff_is_never_decoded() -> None:
    inner = io.BytesIO()
    Image.new("RGB", (9000, 9000)).save(inner, "JPEG", quality=1)
    strip = inner.getvalue()
    raw = bare_header(96, 96, compression=7, n_bytes=len(strip))[: -len(strip)] + strip
    with pytest.raises(PatchFault, match="compressed data of 9000x9000"):
        decode_patch(raw)


def test_a_file_above_the_limit_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "x.tif").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    assert "larger than the limit" in str(read_patch(tmp_path / "x.tif"))


def test_missing_folder_and_named_pipe_are_faults_and_never_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tif")
    assert "regular file" in str(read_patch(tmp_path / "pipe.tif"))
    assert "cannot be read" in str(read_patch(tmp_path))
    assert "cannot be read" in str(read_patch(tmp_path / "absent.tif"))


def test_side_is_checked(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(pillow("RGB", "PNG"))
    assert "96x96 px, want 64x64" in str(read_patch(tmp_path / "x.png", 64))
    assert isinstance(read_patch(tmp_path / "x.png", 96), np.ndarray)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_random_damage_gives_pixels_or_a_fault(data: st.DataObject) -> None:
    raw = bytearray(
        data.draw(st.sampled_from([tiff(), tiff(compression="lzw"), pillow("RGB", "PNG"), bare_header(96, 96)]))
    )
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, min(len(raw), 320) - 1))
        raw[place] = data.draw(st.integers(0, 255))
    try:
        image = decode_patch(bytes(raw))
    except PatchFault as fault:
        lines = str(fault).splitlines()
    else:
        lines = [f"{image.dtype} {image.ndim}"]
        assert lines == ["uint8 3"]
    assert len(lines) == 1


def write_set(folder: Path, n: int) -> tuple[list[str], np.ndarray]:
    images = np.random.default_rng(1).integers(0, 256, (n, 96, 96, 3), dtype=np.uint8)
    for row in range(n):
        date = f"2018:11:15 17:21:{row:02d}"
        (folder / f"{row}.tif").write_bytes(tiff(images[row], datetime=date))
    return [f"{row}.tif" for row in range(n)], images


def test_template_is_found_once_and_gives_tifffiles_pixels(tmp_path: Path) -> None:
    names, images = write_set(tmp_path, 12)
    out, templates = np.empty_like(images), list[Template]()
    assert read_patches(tmp_path, names, out, templates) == {}
    assert np.array_equal(out, images)
    assert len(templates) == 1  # the dates differ and do not matter


def test_file_that_only_resembles_the_template_is_parsed(tmp_path: Path) -> None:
    names, images = write_set(tmp_path, 4)
    raw = (tmp_path / "1.tif").read_bytes()
    (tmp_path / "1.tif").write_bytes(raw[:-1])
    (tmp_path / "2.tif").write_bytes(raw[:40] + b"\xff" + raw[41:])
    out, templates = np.empty_like(images), list[Template]()
    faults = read_patches(tmp_path, names, out, templates)
    assert 1 in faults
    assert not out[1].any()
    for row in (0, 3):
        assert np.array_equal(out[row], images[row])
    if 2 not in faults:
        assert np.array_equal(out[2], tifffile.imread(tmp_path / "2.tif"))


def test_files_of_as_many_pixels_in_another_shape_are_faults(tmp_path: Path) -> None:
    for row in range(3):
        (tmp_path / f"{row}.tif").write_bytes(tiff(np.zeros((72, 128, 3), np.uint8)))
    out, templates = np.empty((3, 96, 96, 3), np.uint8), list[Template]()
    faults = read_patches(tmp_path, ["0.tif", "1.tif", "2.tif"], out, templates)
    assert {row: str(fault) for row, fault in faults.items()} == dict.fromkeys(range(3), "128x72 px, want 96x96")


def test_pixels_that_hold_the_header_make_no_template(tmp_path: Path) -> None:
    """An offset that points into the pixels would make the parse depend on them."""
    raw = bytearray(bare_header(96, 96, n_bytes=96 * 96 * 3))
    entry = 8 + 2 + 2 * 12 + 8
    raw[entry : entry + 4] = struct.pack("<I", 136 + 30)
    raw[136 + 30 : 136 + 36] = struct.pack("<3H", 8, 8, 8)
    (tmp_path / "x.tif").write_bytes(bytes(raw))
    templates: list[Template] = []
    out = np.empty((1, 96, 96, 3), np.uint8)
    assert read_patches(tmp_path, ["x.tif"], out, templates) == {}
    assert templates == []


def test_genuine_kaggle_files_equal_tifffile(genuine_kaggle: Path) -> None:
    folder = genuine_kaggle / "train"
    names = sorted(path.name for path in folder.iterdir())
    out, templates = np.empty((len(names), 96, 96, 3), np.uint8), list[Template]()
    assert read_patches(folder, names, out, templates) == {}
    assert [len(template.head) for template in templates] == [287]
    for row, name in enumerate(names):
        assert np.array_equal(out[row], tifffile.imread(folder / name))
