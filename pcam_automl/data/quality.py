"""What is wrong with a patch: measures, flags, the report, the picture sheet. Reads no files, decides no splits."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128_digest

from pcam_automl.data.store import TEST, Flag, PatchStore
from pcam_automl.errors import first_few
from pcam_automl.files import written_whole

DARK_MAX = 10
"""A patch whose brightest byte is below this is all dark."""
BRIGHT_MIN = 245
"""A patch whose darkest byte is above this is all bright."""
BLUR_VARIANCE = 50.0
"""Below this variance of the Laplacian a patch is called blurred."""

_GREEN = 1
_SUB_BATCH_BYTES = 32 * 96 * 96 * 3  # wider copies stay in the cache
_EXACT_RUN = 258  # 258 * 255^2 < 2^24
_FAULTY = Flag.UNREADABLE | Flag.WRONG_SHAPE


@dataclass(frozen=True)
class Measures:
    """Of B patches."""

    stats: NDArray[np.float32]
    """(B, 6) channel means, then deviations, in [0, 1]."""
    sharpness: NDArray[np.float32]
    """(B,) variance of the 4-neighbour Laplacian of the green channel, in grey levels squared."""
    digest: NDArray[np.uint8]
    """(B, 16) XXH3-128 of the pixels."""
    flags: NDArray[np.uint16]
    """(B,) DARK, BRIGHT and BLURRED."""


@dataclass(frozen=True)
class Findings:
    """What the checks of a pack found."""

    by_flag: dict[str, tuple[str, ...]]
    """Flag name in lower case to "id" or "id (reason)" of every patch that has it; only flags that occur."""
    n_test: dict[str, int]
    """How many of them are test patches."""
    rows: NDArray[np.int64]
    """Rows of the store worth a look: left out, dark, bright, faulty or contradicting."""

    @property
    def counts(self) -> dict[str, int]:
        """Patches by flag name."""
        return {name: len(named) for name, named in self.by_flag.items()}

    def lines(self) -> list[str]:
        """One sentence a finding, for people; each names the first patches."""
        return self.lines_of(self.by_flag)

    def lines_of(self, flags: Iterable[str]) -> list[str]:
        """Those of some flags only."""
        texts = []
        for name in flags:
            if (named := self.by_flag.get(name)) is None:
                continue
            n_test = self.n_test[name]
            where = f" ({n_test} of them test patches, never left out)" if n_test else ""
            noun = "patch" if len(named) == 1 else "patches"
            shown = first_few(named, 20 if name == "left_out" else 5)
            texts.append(f"{len(named)} {noun} {_SENTENCES[name]}{where}: {shown}")
        return texts

    def to_json(self) -> dict[str, Any]:
        """``{"findings": {"dark": ["id", ...], ...}}``, every patch named."""
        return {"findings": {name: list(named) for name, named in self.by_flag.items()}}


class _Scratch(threading.local):
    """Arrays that every call uses again: fresh memory costs more than the arithmetic (30 page faults a patch)."""

    def __init__(self) -> None:
        self._bytes: dict[str, NDArray[np.uint8]] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
        """Room for ``shape``, with anything in it."""
        n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        if name not in self._bytes or len(self._bytes[name]) < n_bytes:
            self._bytes[name] = np.empty(n_bytes, np.uint8)
        return self._bytes[name][:n_bytes].view(dtype).reshape(shape)


_scratch = _Scratch()


def measure(patches: NDArray[np.uint8]) -> Measures:
    """Measure (B, H, W, 3) uint8 patches, H and W at least 3; about 26 us a patch of 96x96."""
    n = len(patches)
    stats = np.empty((n, 6), np.float32)
    sharpness = np.empty(n, np.float32)
    digest = np.empty((n, 16), np.uint8)
    step = max(1, _SUB_BATCH_BYTES // max(patches[:1].nbytes, 1))
    for first in range(0, n, step):
        part = slice(first, first + step)
        stats[part], sharpness[part] = _stats_and_sharpness(patches[part])
        digest[part] = pixel_digests(patches[part])
    flags = np.zeros(n, np.uint16)
    flat = patches.reshape(n, -1)
    # No patch is darker than its darkest byte or brighter than its brightest: few need a look at every byte.
    for row in np.flatnonzero(stats[:, :3].max(axis=1) * 255 < DARK_MAX):
        flags[row] |= Flag.DARK if flat[row].max() < DARK_MAX else 0
    for row in np.flatnonzero(stats[:, :3].min(axis=1) * 255 > BRIGHT_MIN):
        flags[row] |= Flag.BRIGHT if flat[row].min() > BRIGHT_MIN else 0
    flags[(sharpness < BLUR_VARIANCE) & (flags == 0)] |= np.uint16(Flag.BLURRED)
    return Measures(stats, sharpness, digest, flags)


def pixel_digests(patches: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(B, 16) XXH3-128 of each of (B, H, W, 3) C-contiguous patches; 2 us a patch of 96x96, SHA-256 15.

    They find duplicates and damage; nothing rests on their being hard to forge.
    """
    digests = b"".join([xxh3_128_digest(patch.data) for patch in patches.reshape(len(patches), -1)])
    return np.frombuffer(digests, np.uint8).reshape(-1, 16)


def _stats_and_sharpness(patches: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(B, H, W, 3) to (B, 6) and (B,). Channel by channel: 2.6 us a patch to take one out, then all runs are contiguous.

    The sums are exact: of at most 258 squares (float32 holds 2^24), then in float64.
    """
    n, height, width, _ = patches.shape
    n_px = height * width
    run = next((run for run in range(min(n_px, _EXACT_RUN), 2, -1) if n_px % run == 0), width)
    plane = _scratch.array("plane", (n, n_px // run, run), np.int16)
    values = _scratch.array("values", plane.shape, np.float32)
    ones = np.ones(_EXACT_RUN, np.float32)
    sums, squares = np.zeros((2, n, 3))
    for channel in (0, 2, _GREEN):
        np.copyto(plane.reshape(n, height, width), patches[..., channel])
        np.copyto(values, plane)
        for left in range(0, run, _EXACT_RUN):  # once, unless the picture cannot be cut into equal runs
            short = values[..., left : left + _EXACT_RUN]  # also: BLAS starts threads for more than 10,000
            sums[:, channel] += np.vecdot(short, ones[: short.shape[2]]).sum(axis=1, dtype=np.float64)
            squares[:, channel] += np.vecdot(short, short).sum(axis=1, dtype=np.float64)
    mean = sums / n_px
    deviation = np.sqrt(np.maximum(squares / n_px - mean**2, 0.0))
    stats = (np.concatenate([mean, deviation], axis=1) / 255.0).astype(np.float32)
    return stats, _laplacian_variance(plane.reshape(n, height, width), values)


def _laplacian_variance(green: NDArray[np.int16], values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of the green channel, where both stains absorb most. (B, H, W) to (B,); ``values`` is overwritten.

    One flat run over all patches; what it makes of the borders is set to zero.
    """
    _, height, width = green.shape
    flat = green.ravel()
    corner = _scratch.array("corner", (len(flat) - width + 1,), np.int16)
    np.add(flat[width - 1 :], flat[: 1 - width], out=corner)  # each pixel and the one below it to the left
    laplacian = _scratch.array("laplacian", green.shape, np.int16)
    inner = laplacian.ravel()[width:-width]
    np.multiply(flat[width:-width], 4, out=inner)
    inner -= corner[: len(inner)]  # above and left
    inner -= corner[width + 1 : width + 1 + len(inner)]  # right and below
    laplacian[:, :: height - 1] = 0
    laplacian[:, :, :: width - 1] = 0
    np.copyto(values, laplacian.reshape(values.shape))
    total = np.vecdot(values, np.ones(values.shape[2], np.float32)).sum(axis=1, dtype=np.float64)
    squares = np.vecdot(values, values).sum(axis=1, dtype=np.float64)
    n_inner = (height - 2) * (width - 2)
    return np.asarray(squares / n_inner - (total / n_inner) ** 2, np.float32)


def complete_flags(
    flags: NDArray[np.uint16],
    digest: NDArray[np.uint8],
    label: NDArray[np.int8],
    part: NDArray[np.int8],
    *,
    keep_outliers: bool,
) -> NDArray[np.uint16]:
    """Add what only the whole set shows: duplicates, contradictions, and what is left out of training.

    Args:
        flags: (N,) with DARK, BRIGHT, BLURRED, UNREADABLE, WRONG_SHAPE set.
        digest: (N, 16) as in :class:`~pcam_automl.data.store.PatchStore`.
        label: (N,) 0, 1 or -1.
        part: (N,) TRAIN, VALID or TEST.
        keep_outliers: do not leave out dark and bright patches.

    Returns:
        (N,) uint16. Test patches are never left out, contradicting duplicates neither.
    """
    flags = flags.copy()
    faulty = (flags & _FAULTY) != 0
    sound = np.flatnonzero(~faulty)
    keys = np.ascontiguousarray(digest[sound]).view("V16").ravel()
    _, cluster, size = np.unique(keys, return_inverse=True, return_counts=True)
    shared = size[cluster] > 1
    flags[sound[shared]] |= np.uint16(Flag.DUPLICATE)
    known = label[sound] >= 0
    in_train = part[sound] != TEST
    positive = _any_in(cluster, known & in_train & (label[sound] == 1), len(size))
    negative = _any_in(cluster, known & in_train & (label[sound] == 0), len(size))
    flags[sound[(positive & negative)[cluster] & in_train]] |= np.uint16(Flag.CONTRADICTING)
    both = _any_in(cluster, in_train, len(size)) & _any_in(cluster, ~in_train, len(size))
    flags[sound[both[cluster]]] |= np.uint16(Flag.IN_TRAIN_AND_TEST)
    outlier = (flags & (Flag.DARK | Flag.BRIGHT)) != 0
    flags[(part != TEST) & (faulty | (outlier & (not keep_outliers)))] |= np.uint16(Flag.LEFT_OUT)
    return flags


def _any_in(cluster: NDArray[np.intp], which: NDArray[np.bool_], n_clusters: int) -> NDArray[np.bool_]:
    found = np.zeros(n_clusters, dtype=bool)
    found[cluster[which]] = True
    return found


_SENTENCES = {
    "unreadable": "unreadable",
    "wrong_shape": "of another size or kind than the rest",
    "dark": f"all dark (max < {DARK_MAX})",
    "bright": f"all bright (min > {BRIGHT_MIN})",
    "blurred": f"blurred (Laplacian variance < {BLUR_VARIANCE:g}; reported only)",
    "duplicate": "exact copies of one another (they share a fold; reported only)",
    "contradicting": "exact copies with contradicting labels (kept in one fold; see exclude_ids of a recipe)",
    "in_train_and_test": "found in both train and test (kept; a score on them flatters)",
    "left_out": "left out of training",
}


UNUSABLE = ("unreadable", "wrong_shape", "dark", "bright", "left_out")
"""Names of what keeps a patch out of training."""


def findings(store: PatchStore) -> Findings:
    """Everything that is flagged in a pack, the least usable first."""
    flags = np.asarray(store.flags)
    by_flag: dict[str, tuple[str, ...]] = {}
    n_test: dict[str, int] = {}
    for name in _SENTENCES:
        hits = np.flatnonzero(flags & Flag[name.upper()])
        if len(hits):
            by_flag[name] = tuple(_named(store, row) for row in hits.tolist())
            n_test[name] = int(np.count_nonzero(store.part[hits] == TEST))
    worth = Flag.LEFT_OUT | Flag.DARK | Flag.BRIGHT | Flag.UNREADABLE | Flag.WRONG_SHAPE | Flag.CONTRADICTING
    return Findings(by_flag, n_test, np.flatnonzero(flags & worth).astype(np.int64))


def _named(store: PatchStore, row: int) -> str:
    reason = store.faults.get(row)
    return f"{store.ids[row]} ({reason})" if reason else str(store.ids[row])


def write_sheet(store: PatchStore, rows: Sequence[int] | NDArray[np.int64], path: Path, *, limit: int = 120) -> None:
    """A PNG of the named patches, eight in a line, with id and flags under each; the first ``limit`` of them.

    Raises:
        DataError: the file cannot be written.
    """
    from PIL import Image, ImageDraw, ImageFont

    shown = [int(row) for row in rows[:limit]]
    side, gap, text_px, n_columns = 96, 16, 44, 8
    n_lines = max(1, -(-len(shown) // n_columns))
    sheet = Image.new("RGB", (n_columns * (side + gap) + gap, n_lines * (side + gap + text_px) + gap), (228, 228, 232))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(9)
    for place, row in enumerate(shown):
        x = gap + place % n_columns * (side + gap)
        y = gap + place // n_columns * (side + gap + text_px)
        sheet.paste(Image.fromarray(np.asarray(store.patches[row])).resize((side, side)), (x, y))
        draw.rectangle((x - 1, y - 1, x + side, y + side), outline=(120, 120, 130))
        draw.multiline_text((x, y + side + 3), _caption(store, row), fill=(30, 30, 40), font=font, spacing=1)
    with written_whole(path) as partial, partial.open("wb") as file:
        sheet.save(file, format="PNG")


def _caption(store: PatchStore, row: int) -> str:
    name = str(store.ids[row])
    flags = Flag(int(store.flags[row])) & ~Flag.LEFT_OUT
    words = " ".join(str(flag.name).lower() for flag in flags)
    text = "\n".join(name[first : first + 18] for first in range(0, min(len(name), 54), 18))
    return f"{text}\n{words[:24]}".encode("ascii", "replace").decode()
