from __future__ import annotations

import io
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pcam_automl.data.images import MAX_SIDE_PX, PatchFault, _decode_tiff
from pcam_automl.data.tiff import decode_plain, parse_plain

IMAGE = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)


def tiff(image: np.ndarray = IMAGE, **options: object) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, image, **{"photometric": "rgb", **options})
    return buffer.getvalue()


def pillow_tiff(**options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(IMAGE).save(buffer, "TIFF", **options)
    return buffer.getvalue()


def fast(raw: bytes) -> np.ndarray | None:
    layout = parse_plain(raw, MAX_SIDE_PX)
    return None if layout is None else decode_plain(raw, layout)


PLAIN = {
    "tifffile": tiff(datetime="2018:11:15 17:21:23"),
    "big-endian": tiff(byteorder=">"),
    "strips": tiff(rowsperstrip=7),
    "deflate": tiff(compression="zlib"),
    "deflate in strips": tiff(compression="zlib", rowsperstrip=7),
    "pillow": pillow_tiff(),
    "pillow deflate": pillow_tiff(compression="tiff_adobe_deflate"),
}
UNUSUAL = {
    "lzw": tiff(compression="lzw"),
    "tiles": tiff(tile=(16, 16)),
    "bigtiff": tiff(bigtiff=True),
    "predictor": tiff(compression="zlib", predictor=True),
    "planar": tiff(np.moveaxis(IMAGE, 2, 0), planarconfig="separate"),
    "grey": tiff(IMAGE[..., 0], photometric="minisblack"),
    "16 bit": tiff(IMAGE.astype(np.uint16)),
    "two pages": tiff(np.stack([IMAGE, IMAGE])),
    "truncated": tiff()[:-1],
    "deflate cut": tiff(compression="zlib")[:-9],
    "private tag": tiff(extratags=[(65000, 3, 1, 7, True)]),
    "png": b"\x89PNG\r\n\x1a\n",
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_files_equal_tifffile(name: str) -> None:
    assert np.array_equal(fast(PLAIN[name]), tifffile.imread(io.BytesIO(PLAIN[name])))


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_files_are_left_to_tifffile(name: str) -> None:
    assert fast(UNUSUAL[name]) is None


def test_a_side_above_the_limit_is_left_to_tifffile() -> None:
    assert parse_plain(PLAIN["tifffile"], 23) is None
    assert parse_plain(PLAIN["tifffile"], 24) is not None


@pytest.mark.parametrize("tag", [256, 257])
def test_two_widths_or_heights_are_left_to_tifffile(tag: int) -> None:
    raw = bytearray(PLAIN["pillow deflate"])
    (at,) = struct.unpack_from("<I", raw, 4)
    (n_tags,) = struct.unpack_from("<H", raw, at)
    place = next(p for p in range(at + 2, at + 2 + 12 * n_tags, 12) if struct.unpack_from("<H", raw, p)[0] == tag)
    struct.pack_into("<I", raw, place + 4, 2)
    assert fast(bytes(raw)) is None


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_what_a_damaged_header_gives_is_what_tifffile_gives(data: st.DataObject) -> None:
    raw = bytearray(data.draw(st.sampled_from(list(PLAIN.values()))))
    tags = struct.unpack_from("<I" if raw[:2] == b"II" else ">I", raw, 4)[0]
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.one_of(st.integers(0, 7), st.integers(tags, min(tags + 200, len(raw) - 1))))
        raw[place] = data.draw(st.one_of(st.integers(0, 8), st.integers(0, 255)))
    image = fast(bytes(raw))
    if image is None:
        return
    try:
        slow = _decode_tiff(bytes(raw))
    except PatchFault as fault:
        raise AssertionError(f"read here, a fault for tifffile: {fault}") from fault
    assert np.array_equal(image, slow)


def test_a_plain_set_is_packed_without_tifffile(kaggle: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from pcam_automl.data.pack import pack\n"
        "from pcam_automl.data.sources import open_source\n"
        "pack(open_source(Path(sys.argv[1])), Path(sys.argv[2]))\n"
        "assert 'tifffile' not in sys.modules, 'tifffile was imported: 0.2 s'\n"
    )
    command = [sys.executable, "-c", code, str(kaggle), str(tmp_path / "pack")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
