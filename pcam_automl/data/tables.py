"""Reads the id tables (labels, groups, domains, sample submissions) strictly. Opens no image."""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pcam_automl.errors import DataError, did_you_mean, first_few

MAX_TABLE_BYTES = 512 << 20
_GZIP_MAGIC = b"\x1f\x8b"

Strings = NDArray[np.str_]

# One name, no path: nothing that could lead out of a folder, hide or break a line.
_ID = re.compile(r"(?!\.{1,2}$)[^/\\\x00-\x1f\x7f]{1,200}")
_SIMPLE_IDS = re.compile(r"(?:[A-Za-z0-9_-]{1,200}\n)*")
_ALIASES = {"group": "wsi"}
_LABELS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}


def read_labels(path: Path) -> tuple[Strings, NDArray[np.int8]]:
    """An ``id,label`` table: (N,) ids and (N,) int8 labels in {0, 1}, in the file's order.

    Raises:
        DataError: missing, not UTF-8, no such columns, bad or repeated ids, other labels; all faults in one line.
    """
    columns = _read_columns(path, ("id", "label"))
    texts = columns["label"]
    codes = {text: _LABELS.get(text.strip(), -1) for text in set(texts)}
    labels = np.array([codes[text] for text in texts], dtype=np.int8)
    faults = _id_faults(columns["id"])
    if wrong := [f"{columns['id'][row]!r}: {texts[row]!r}" for row in np.flatnonzero(labels < 0)]:
        faults.append(f"{len(wrong)} labels are not 0 or 1 ({first_few(wrong)})")
    _raise_faults(path, faults)
    return _as_strings(columns["id"]), labels


def read_names(path: Path, column: str) -> tuple[Strings, Strings]:
    """An ``id,<column>`` table (group or domain): (N,) ids and (N,) names; an empty name means unknown.

    Slides may also stand in a column ``wsi``, as in the tables that Kaggle's participants share.

    Raises:
        DataError: missing, not UTF-8, no such columns, bad or repeated ids.
    """
    columns = _read_columns(path, ("id", column), {column: _ALIASES.get(column, column)})
    _raise_faults(path, _id_faults(columns["id"]))
    return _as_strings(columns["id"]), _as_strings([name.strip() for name in columns[column]])


def read_ids(path: Path) -> Strings:
    """The ids of a sample submission, in its order; other columns are not looked at.

    Raises:
        DataError: missing, not UTF-8, no column ``id``, bad or repeated ids.
    """
    columns = _read_columns(path, ("id",))
    _raise_faults(path, _id_faults(columns["id"]))
    return _as_strings(columns["id"])


def read_column(path: Path, column: str) -> list[str]:
    """One column of a CSV as text, in the file's order.

    Raises:
        DataError: missing, not UTF-8, no such column.
    """
    return _read_columns(path, (column,))[column]


def is_id(text: str) -> bool:
    """Whether ``text`` can be a patch id: a plain name, not a path."""
    return _ID.fullmatch(text) is not None and text.isprintable()


def all_ids(texts: Sequence[str]) -> bool:
    """Whether every text is a patch id of letters, digits, ``_`` and ``-``: one pass, 0.2 us each; False decides nothing."""
    joined = "\n".join([*texts, ""])
    return _SIMPLE_IDS.fullmatch(joined) is not None and joined.count("\n") == len(texts)


def repeated(names: Sequence[str]) -> list[str]:
    """The names that occur more than once, each once, sorted."""
    if len(set(names)) == len(names):
        return []
    seen: set[str] = set()
    return sorted({name for name in names if name in seen or seen.add(name)})  # type: ignore[func-returns-value]


def _id_faults(ids: list[str]) -> list[str]:
    faults = []
    if not all_ids(ids) and (bad := [ascii(text) for text in ids if not is_id(text)]):
        faults.append(f"{len(bad)} ids are empty, paths or unprintable; an id is a plain name ({first_few(bad)})")
    if twice := repeated(ids):
        faults.append(f"{len(twice)} ids are given more than once ({first_few([ascii(text)[1:-1] for text in twice])})")
    return faults


def _raise_faults(path: Path, faults: list[str]) -> None:
    if faults:
        raise DataError(f"{path}: {'; '.join(faults)}")


def _as_strings(values: list[str]) -> Strings:
    return np.array(values, dtype=np.str_)


def _read_columns(path: Path, names: Sequence[str], aliases: Mapping[str, str] | None = None) -> dict[str, list[str]]:
    """The named columns as lists of text; nothing is taken for a number or for missing, a short row ends in ``""``.

    A column that is not there is looked for under its alias. Spaces around ids are no part of them.
    """
    first, rows = _read_rows(path)
    known = [name.strip() for name in first]
    for name, other in (aliases or {}).items():
        if name not in known and other in known:
            known[known.index(other)] = name
    if missing := [name for name in names if name not in known]:
        hint = did_you_mean(missing[0], known)
        wanted = ",".join(
            name + (f" (or {aliases[name]})" if aliases and aliases.get(name, name) != name else "") for name in names
        )
        raise DataError(
            f"{path}: no column {', '.join(map(repr, missing))}{hint}; the first line must name {wanted}, "
            f"got {', '.join(map(ascii, known[:6]))}"
        )
    if not rows:
        raise DataError(f"{path}: no rows below the first line")
    places = {name: known.index(name) for name in names}
    found = {name: [row[at] if at < len(row) else "" for row in rows] for name, at in places.items()}
    if "id" in found:  # "label, id" has a space before each
        found["id"] = [text.strip() for text in found["id"]]
    return found


def _read_rows(path: Path) -> tuple[list[str], list[list[str]]]:
    """The first line and the others, empty lines left out. The csv module: pandas takes a second to import."""
    text = _read_text(path)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = [row for row in reader if row]
    except csv.Error as fault:
        raise DataError(f"{path} is not a comma-separated table (line {reader.line_num}: {fault})") from None
    if not rows:
        raise DataError(f"{path} is empty")
    first, *rest = rows
    if wide := next((row for row in rest if len(row) > len(first)), None):
        raise DataError(
            f"{path} is not a comma-separated table (its first line has {len(first)} fields, "
            f"but {first_few([ascii(','.join(wide)[:60])])} has {len(wide)})"
        )
    return first, rest


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_TABLE_BYTES:
            raise DataError(f"{path} is larger than {MAX_TABLE_BYTES} bytes; that is not a table of patch ids")
        return _inflated(path.read_bytes(), path).decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except OSError as fault:
        raise DataError(f"{path} cannot be read ({fault.strerror or fault})") from None
    except UnicodeDecodeError as fault:
        raise DataError(f"{path} is not UTF-8 text (byte {fault.start}: {fault.reason}); save it as UTF-8") from None


def _inflated(raw: bytes, path: Path) -> bytes:
    """The table of a ``.csv.gz``; other bytes as they are."""
    if not raw.startswith(_GZIP_MAGIC):
        return raw
    try:
        with gzip.open(io.BytesIO(raw)) as file:
            text = file.read(MAX_TABLE_BYTES + 1)
    except EOFError:
        raise DataError(f"{path} is a gzip file that ends too early; copy it again") from None
    except (OSError, zlib.error) as fault:
        raise DataError(f"{path} is a damaged gzip file ({fault}); copy it again") from None
    if len(text) > MAX_TABLE_BYTES:
        raise DataError(f"{path} holds more than {MAX_TABLE_BYTES} bytes; that is not a table of patch ids")
    return text
