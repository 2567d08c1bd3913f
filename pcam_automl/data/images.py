"""One patch file to (H, W, 3) uint8 pixels, or a fault. Knows no folders, labels or packs.

Headers are checked before anything is decoded, so that a hostile file costs neither memory nor time.
"""

from __future__ import annotations

import logging
import os
import stat
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pcam_automl.data.template import Template, find_template
from pcam_automl.data.tiff import decode_plain, parse_plain
from pcam_automl.errors import DataError

if TYPE_CHECKING:
    import tifffile

MAX_SIDE_PX = 2048
MAX_FILE_BYTES = 32 << 20
IMAGE_SUFFIXES = frozenset({".tif", ".tiff", ".png", ".jpg", ".jpeg"})

_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_JPEG_MAGIC = b"\xff\xd8\xff"
# Codecs that write no more than the size they are given.
_PLAIN_CODECS = frozenset({1, 5, 8, 32773, 32946, 34925, 34926, 50000})
# Codecs whose own header decides how much they allocate: that header is read first.
_JPEG_CODECS = frozenset({7, 33007})
_JPEG2000_CODECS = frozenset({33003, 33004, 33005, 34712})
_WEBP_CODECS = frozenset({34927, 50001})
_PNG_CODEC = 34933
_RGB, _YCBCR = 2, 6
_MAX_TEMPLATES = 4


class PatchFault(DataError):
    """A patch file cannot be used.

    Args:
        reason: a few words, e.g. ``"grey (1 channel), want RGB"``.
        wrong_shape: the file is a sound image of another kind; else it is unreadable.
    """

    def __init__(self, reason: str, wrong_shape: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.wrong_shape = wrong_shape

    def __reduce__(self) -> tuple[type[PatchFault], tuple[str, bool]]:
        return type(self), (self.reason, self.wrong_shape)


def read_patch(path: Path, side_px: int | None = None) -> NDArray[np.uint8] | PatchFault:
    """Read one TIFF, PNG or JPEG patch.

    Args:
        path: the file; its kind is told by its content, not its name.
        side_px: height and width it must have; None takes any up to ``MAX_SIDE_PX``.

    Returns:
        (H, W, 3) uint8, C-contiguous; or the fault, returned and not raised: one bad file among thousands is no error.
    """
    try:
        image = decode_patch(file_bytes(path))
        check_shape(image, None if side_px is None else (side_px, side_px))
    except PatchFault as fault:
        return fault
    return image


def read_patches(
    folder: Path, names: Sequence[str], out: NDArray[np.uint8], templates: list[Template]
) -> dict[int, PatchFault]:
    """Read the files ``folder/name`` into the rows of ``out``; rows of faulty files are set to zero.

    Args:
        folder: what ``names`` are relative to.
        names: B relative paths.
        out: (>= B, H, W, 3) uint8, C-contiguous; H and W are what every file must have.
        templates: known headers, the latest first; new ones are added.

    Returns:
        The faults by row.

    Raises:
        DataError: ``folder`` cannot be opened.
    """
    faults: dict[int, PatchFault] = {}
    reader: _TemplateReader | None = None
    rows = [memoryview(row).cast("B") for row in out[: len(names)]]
    try:
        folder_fd = os.open(folder, os.O_RDONLY)
    except OSError as fault:
        raise DataError(f"{folder} cannot be read ({fault.strerror})") from None
    try:
        for row, name in enumerate(names):
            try:
                if templates and (reader is None or reader.template is not templates[0]):
                    reader = _TemplateReader(folder_fd, templates[0])
                if reader is None or not reader.read(name, rows[row], out.shape[1:3]):
                    image = _decode_with_templates(file_bytes(Path(name), folder_fd), templates)
                    check_shape(image, out.shape[1:3])
                    out[row] = image
            except PatchFault as fault:
                faults[row] = fault
                out[row] = 0
    finally:
        os.close(folder_fd)
    return faults


def decode_patch(raw: bytes) -> NDArray[np.uint8]:
    """The (H, W, 3) uint8 pixels of a whole TIFF, PNG or JPEG file.

    Raises:
        PatchFault: see :func:`read_patch`.
    """
    return _decode_with_templates(raw, None)


def check_shape(image: NDArray[np.uint8], shape: tuple[int, ...] | None) -> None:
    """Raise a :class:`PatchFault` unless ``image`` is ``shape`` = (H, W) px."""
    if shape is not None and image.shape[:2] != tuple(shape):
        raise PatchFault(f"{image.shape[1]}x{image.shape[0]} px, want {shape[1]}x{shape[0]}", wrong_shape=True)


class _TemplateReader:
    """Reads files of one template under an open folder."""

    def __init__(self, folder_fd: int, template: Template) -> None:
        self.template = template
        self._folder_fd = folder_fd
        self._head, self._tail = bytearray(len(template.head)), bytearray(len(template.tail) + 1)
        self._n_bytes = len(template.head) + template.n_pixel_bytes + len(template.tail)

    def read(self, name: str, row: memoryview, shape: tuple[int, ...]) -> bool:
        """One system call scatters header, pixels and tail; False if the file is not of the template, or that not (H, W) = ``shape``."""
        if self.template.shape[:2] != shape:
            return False
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK, dir_fd=self._folder_fd)
        except OSError as fault:
            raise PatchFault(f"cannot be opened ({fault.strerror})") from None
        try:
            n_read = os.readv(fd, (self._head, row, self._tail))
        except OSError:
            return False  # file_bytes meets and words the same fault
        finally:
            os.close(fd)
        return n_read == self._n_bytes and self.template.fits(self._head, self._tail[:-1])


def file_bytes(path: Path, folder_fd: int | None = None) -> bytes:
    """The file's content; O_NONBLOCK so that a named pipe cannot hang us."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK, dir_fd=folder_fd)
        with open(fd, "rb", closefd=True) as file:  # noqa: PTH123 - a descriptor, not a path
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise PatchFault("not a regular file")
            if status.st_size > MAX_FILE_BYTES:
                raise PatchFault(f"{status.st_size} bytes, larger than the limit of {MAX_FILE_BYTES}")
            return file.read(status.st_size + 1)  # room for the limit would cost 100 us
    except OSError as fault:
        raise PatchFault(f"cannot be read ({fault.strerror})") from None


def _decode_with_templates(raw: bytes, templates: list[Template] | None) -> NDArray[np.uint8]:
    for template in templates or ():
        image = template.pixels(raw)
        if image is not None:
            return image
    if not raw:
        raise PatchFault("empty file")
    if (plain := _decode_plain_tiff(raw, templates)) is not None:
        return plain
    try:
        with _quiet_decoders():
            if raw.startswith(_TIFF_MAGIC):
                image = _decode_tiff(raw)
            elif raw.startswith(_PNG_MAGIC):
                image = _decode_png(raw)
            elif raw.startswith(_JPEG_MAGIC):
                image = _decode_jpeg(raw)
            else:
                raise PatchFault(f"not a TIFF, PNG or JPEG file (starts with {raw[:12]!r})")
    except PatchFault:
        raise
    except Exception as fault:  # noqa: BLE001 - decoders of foreign bytes raise anything; recorded as the patch's fault
        reason = " ".join(str(fault).split())[:120]
        raise PatchFault(f"unreadable ({type(fault).__name__}: {reason})") from None
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise PatchFault(f"decoded to {image.shape} {image.dtype}, want (H, W, 3) uint8", wrong_shape=True)
    return np.ascontiguousarray(image)


@contextmanager
def _quiet_decoders() -> Iterator[None]:
    """Mute what tifffile logs and Pillow warns about: files that we report as faults anyway."""
    logger = logging.getLogger("tifffile")
    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before


def _check_header(width: int, height: int, n_channels: int, n_bits: int) -> None:
    """Raise unless this is a patch of 8-bit RGB of bearable size."""
    if n_channels != 3:
        kind = {1: "grey or palette", 2: "grey with alpha", 4: "RGBA or CMYK"}.get(n_channels, "not RGB")
        raise PatchFault(f"{kind} ({n_channels} channels), want RGB", wrong_shape=True)
    if n_bits != 8:
        raise PatchFault(f"{n_bits} bits a channel, want 8", wrong_shape=True)
    if not (0 < width <= MAX_SIDE_PX and 0 < height <= MAX_SIDE_PX):
        raise PatchFault(f"{width}x{height} px, the limit is {MAX_SIDE_PX}x{MAX_SIDE_PX}", wrong_shape=True)


def _decode_plain_tiff(raw: bytes, templates: list[Template] | None) -> NDArray[np.uint8] | None:
    """By our own reader, None if the file is not a plain TIFF: the import of tifffile alone takes 0.2 s."""
    layout = parse_plain(raw, MAX_SIDE_PX)
    image = None if layout is None else decode_plain(raw, layout)
    if layout is None or image is None:
        return None
    template = None if templates is None else find_template(raw, layout)
    if templates is not None and template is not None:
        templates[:] = [template, *templates][:_MAX_TEMPLATES]
    return image


def _decode_tiff(raw: bytes) -> NDArray[np.uint8]:
    import tifffile

    with tifffile.TiffFile(BytesIO(raw)) as tif:
        page = tif.pages.first
        _check_header(page.imagewidth, page.imagelength, page.samplesperpixel, _n_bits(page))
        if page.dtype != np.uint8 or page.ndim != 3:
            raise PatchFault(f"{page.shape} {page.dtype}, want (H, W, 3) uint8", wrong_shape=True)
        _check_one_page(tif)
        _check_segments(raw, page)
        image: NDArray[np.uint8] = page.asarray(maxworkers=1)
    return np.moveaxis(image, 0, 2) if page.planarconfig == 2 else image


def _n_bits(page: tifffile.TiffPage) -> int:
    bits = page.bitspersample
    return int(bits if isinstance(bits, int) else max(bits))


def _check_one_page(tif: tifffile.TiffFile) -> None:
    try:
        tif.pages[1]
    except IndexError:
        return
    raise PatchFault("more than one page, want one", wrong_shape=True)


def _check_segments(raw: bytes, page: tifffile.TiffPage) -> None:
    """Every strip or tile lies inside the file and decodes to no more than its header says."""
    codec = int(page.compression)
    if page.photometric != _RGB and not (page.photometric == _YCBCR and codec not in _PLAIN_CODECS):
        raise PatchFault(
            f"colour space {getattr(page.photometric, 'name', page.photometric)}, want RGB", wrong_shape=True
        )
    if page.is_tiled and page.tilewidth * page.tilelength * page.tiledepth > MAX_SIDE_PX**2:
        raise PatchFault(f"tiles of {page.tilewidth}x{page.tilelength} px, the limit is {MAX_SIDE_PX}x{MAX_SIDE_PX}")
    if not page.dataoffsets or len(page.dataoffsets) != len(page.databytecounts):
        raise PatchFault("a header without pixels")
    for offset, n_bytes in zip(page.dataoffsets, page.databytecounts, strict=True):
        if n_bytes == 0 or offset == 0:
            raise PatchFault("a header without pixels")
        if offset + n_bytes > len(raw):
            raise PatchFault(f"truncated: {len(raw)} bytes, pixels should reach byte {offset + n_bytes}")
        if codec not in _PLAIN_CODECS:
            width, height = _segment_size(raw[offset : offset + n_bytes], codec)
            if not (width <= MAX_SIDE_PX and height <= MAX_SIDE_PX):
                raise PatchFault(f"compressed data of {width}x{height} px", wrong_shape=True)


def _segment_size(data: bytes, codec: int) -> tuple[int, int]:
    """(width, height) from the header inside a compressed strip or tile."""
    from PIL import Image

    if codec in _JPEG_CODECS or codec in _JPEG2000_CODECS:
        kind = "JPEG" if codec in _JPEG_CODECS else "JPEG2000"
        with Image.open(BytesIO(data), formats=(kind,)) as image:
            return image.size
    if codec == _PNG_CODEC:
        return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    if codec in _WEBP_CODECS:
        return _webp_size(data)
    raise PatchFault(f"TIFF compression {codec} is not accepted; convert to deflate, LZW, JPEG or none")


def _webp_size(data: bytes) -> tuple[int, int]:
    """(width, height) of the three WebP layouts (RFC 9649)."""
    if data[12:16] == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF


def _decode_png(raw: bytes) -> NDArray[np.uint8]:
    """IHDR is read by hand: Pillow turns 16-bit channels into 8 without a word."""
    from PIL import Image

    if raw[12:16] != b"IHDR" or len(raw) < 33:
        raise PatchFault("truncated PNG header")
    n_channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(raw[25], 0)
    _check_header(int.from_bytes(raw[16:20], "big"), int.from_bytes(raw[20:24], "big"), n_channels, raw[24])
    with Image.open(BytesIO(raw), formats=("PNG",)) as image:
        return _pixels_of(image)


def _decode_jpeg(raw: bytes) -> NDArray[np.uint8]:
    from PIL import Image

    with Image.open(BytesIO(raw), formats=("JPEG",)) as image:
        _check_header(*image.size, len(image.getbands()), 8)
        return _pixels_of(image)


def _pixels_of(image: Any) -> NDArray[np.uint8]:
    if getattr(image, "n_frames", 1) != 1:
        raise PatchFault("more than one frame, want one", wrong_shape=True)
    if image.mode != "RGB":
        raise PatchFault(f"colour mode {image.mode}, want RGB", wrong_shape=True)
    return np.asarray(image)
