"""Reads the id tables (labels, groups, domains, sample submissions) strictly. Opens no image."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pcam_automl.errors import DataError, did_you_mean, first_few

MAX_TABLE_BYTES = 512 << 20

Strings = NDArray[np.str_]

# One name, no path: nothing that could lead out of a folder, hide or break a line.
_ID = re.compile(r"(?!\.{1,2}$)[^/\\\x00-\x1f\x7f]{1,200}")
_LABELS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}


def read_labels(path: Path) -> tuple[Strings, NDArray[np.int8]]:
    """An ``id,label`` table: (N,) ids and (N,) int8 labels in {0, 1}, in the file's order.

    Raises:
        DataError: missing, not UTF-8, no such columns, bad or repeated ids, other labels; all faults in one line.
    """
    columns = _read_columns(path, ("id", "label"))
    texts = columns["label"]
    labels = np.array([_LABELS.get(text.strip(), -1) for text in texts], dtype=np.int8)
    faults = _id_faults(columns["id"])
    if wrong := [f"{columns['id'][row]!r}: {texts[row]!r}" for row in np.flatnonzero(labels < 0)]:
        faults.append(f"{len(wrong)} labels are not 0 or 1 ({first_few(wrong)})")
    _raise_faults(path, faults)
    return _as_strings(columns["id"]), labels


def read_names(path: Path, column: str) -> tuple[Strings, Strings]:
    """An ``id,<column>`` table (group or domain): (N,) ids and (N,) names; an empty name means unknown.

    Raises:
        DataError: missing, not UTF-8, no such columns, bad or repeated ids.
    """
    columns = _read_columns(path, ("id", column))
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


def repeated(names: Sequence[str]) -> list[str]:
    """The names that occur more than once, each once, sorted."""
    seen: set[str] = set()
    return sorted({name for name in names if name in seen or seen.add(name)})  # type: ignore[func-returns-value]


def _id_faults(ids: list[str]) -> list[str]:
    faults = []
    if bad := [ascii(text) for text in ids if not is_id(text)]:
        faults.append(f"{len(bad)} ids are empty, paths or unprintable; an id is a plain name ({first_few(bad)})")
    if twice := repeated(ids):
        faults.append(f"{len(twice)} ids are given more than once ({first_few([ascii(text)[1:-1] for text in twice])})")
    return faults


def _raise_faults(path: Path, faults: list[str]) -> None:
    if faults:
        raise DataError(f"{path}: {'; '.join(faults)}")


def _as_strings(values: list[str]) -> Strings:
    return np.array(values, dtype=np.str_)


def _read_columns(path: Path, names: Sequence[str]) -> dict[str, list[str]]:
    """The named columns as lists of text; nothing is taken for a number or for missing."""
    frame = _read_frame(path)
    known = [str(name).strip() for name in frame.columns]
    if missing := [name for name in names if name not in known]:
        hint = did_you_mean(missing[0], known)
        raise DataError(
            f"{path}: no column {', '.join(map(repr, missing))}{hint}; the first line must name {','.join(names)}, "
            f"got {', '.join(map(ascii, known[:6]))}"
        )
    if not len(frame):
        raise DataError(f"{path}: no rows below the first line")
    return {name: frame.iloc[:, known.index(name)].tolist() for name in names}


def _read_frame(path: Path) -> Any:
    import pandas as pd

    try:
        if path.stat().st_size > MAX_TABLE_BYTES:
            raise DataError(f"{path} is larger than {MAX_TABLE_BYTES} bytes; that is not a table of patch ids")
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            return pd.read_csv(path, dtype=object, na_filter=False, index_col=False, encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except OSError as fault:
        raise DataError(f"{path} cannot be read ({fault.strerror or fault})") from None
    except UnicodeDecodeError as fault:
        raise DataError(f"{path} is not UTF-8 text (byte {fault.start}: {fault.reason}); save it as UTF-8") from None
    except pd.errors.EmptyDataError:
        raise DataError(f"{path} is empty") from None
    except (pd.errors.ParserError, pd.errors.ParserWarning, ValueError) as fault:
        raise DataError(f"{path} is not a comma-separated table ({' '.join(str(fault).split())[:200]})") from None
