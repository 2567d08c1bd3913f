"""PatchSource: what a raw folder holds, in the order it is packed. Lists files and reads tables; opens no image.

Kinds: the Kaggle folder (the synthetic sets use its layout), class folders ``0/`` and ``1/``, the PCam HDF5 files, folders
of images and masks (dense).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pcam_automl.data.dense_sources import Pairs, find_pairs
from pcam_automl.data.h5 import H5_PREFIX, PART_CODES, H5Part, find_h5_parts, read_h5_labels
from pcam_automl.data.listing import find_masks, list_images
from pcam_automl.data.stamp import Stamp
from pcam_automl.data.store import TEST, TRAIN, VALID
from pcam_automl.data.tables import Strings, read_column, read_ids, read_labels, read_names, repeated
from pcam_automl.errors import DataError, first_few

GET_THE_DATA = (
    "get the data with `kaggle competitions download -c histopathologic-cancer-detection` and unzip it, "
    "or try `pcam-automl quickstart`"
)


MANY_ABSENT = 0.01
"""Of the labelled ids: if more have no image, the folder may not be whole."""


@dataclass(frozen=True)
class PatchSource:
    """N patches of a raw folder: train (by id), valid, then test in the order of the sample submission."""

    kind: Literal["kaggle", "classes", "h5", "dense"]
    root: Path
    ids: Strings
    label: NDArray[np.int8]
    """(N,) 0 or 1, -1 where there is none; of dense sets -1 until their masks are read."""
    part: NDArray[np.int8]
    group: Strings
    """(N,) name of the slide, empty where unknown."""
    domain: Strings
    """(N,) name of the scanner or stain, empty where unknown."""
    files: NDArray[Any]
    """(N,) paths relative to ``root``; for HDF5 the int64 position in its part's ``x``."""
    notes: tuple[str, ...] = ()
    missing_test_ids: tuple[str, ...] = ()
    """Ids of the sample submission that have no image: a submission cannot be complete."""
    tables: tuple[Path, ...] = ()
    """CSVs and small HDF5 files that were read."""
    h5: Mapping[int, H5Part] = field(default_factory=dict)
    """By part code; empty unless ``kind`` is ``h5``."""
    masks: Strings | None = None
    """(N,) paths of mask files relative to ``root``, empty for a test patch without one; None without masks or for h5."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def has_masks(self) -> bool:
        """Whether masks are packed: of HDF5 files where every part has them."""
        return self.masks is not None or (bool(self.h5) and all(part.mask for part in self.h5.values()))


def open_source(
    path: Path, *, groups: Path | None = None, domains: Path | None = None, sample: Path | None = None
) -> PatchSource:
    """Find out what a raw folder is and list it.

    Args:
        path: a Kaggle folder, class folders (``0/``, ``1/``, perhaps under ``train/``), the PCam HDF5 files, or folders of
            images and masks (see dense_sources.py).
        groups: ``id,group`` CSV; None takes ``train_groups.csv`` beside the labels if it is there.
        domains: ``id,domain`` CSV; None takes ``train_domains.csv`` likewise.
        sample: the sample submission; None takes ``sample_submission.csv`` if it is there, else the test folder's ids.

    Raises:
        DataError: nothing usable is there, or a table is at fault.
    """
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"data folder {root} does not exist or is no folder; {GET_THE_DATA}")
    try:
        if (root / "train_labels.csv").is_file():
            source = _open_kaggle(root, sample)
        elif parts := find_h5_parts(root):
            _check_no_sample(sample, "HDF5 files")
            source = _open_h5(root, parts)
        elif (pairs := find_pairs(root))[0]:
            _check_no_sample(sample, "images and masks")
            source = _open_dense(root, *pairs)
        elif classes := _class_root(root):
            source = _open_classes(root, classes, sample)
        else:
            raise DataError(_nothing_found(root))
    except OSError as fault:
        raise DataError(f"{fault.filename or root} cannot be read ({fault.strerror})") from None
    source = _with_names(source, "group", groups)
    source = _with_names(source, "domain", domains)
    valid = source.label[source.part == VALID]
    if source.kind != "dense" and len(valid) and len(np.unique(valid)) == 1:
        held = f"warning: the validation part holds patches of label {valid[0]} only"
        source = _noted(source, f"{held}: a search needs both there; complete it, or remove it, and pack again")
    known = source.label[source.part != TEST]
    if len(np.unique(known[known >= 0])) == 1:
        source = _noted(source, f"every training label is {known.max()}: a search needs both classes")
    return source


def fingerprint(source: PatchSource) -> str:
    """SHA-256 (64 hex) over the relative names, sizes and modification times of every file used, and over the row plan.

    Raises:
        DataError: a file has gone since the source was opened.
    """
    return fingerprints(source)[0]


def fingerprints(source: PatchSource) -> tuple[str, str]:
    """:func:`fingerprint`, and what it was before 2026-11-30, when it did not tell slides from scanners: a pack of that name is of this
    source if its slides and scanners are (:func:`~pcam_automl.data.packs.holds`).
    """
    stamp = Stamp(source)
    stamp.add([] if source.h5 else source.files.tolist())
    return stamp.hexdigest(), stamp.hexdigest(names=False)


def _nothing_found(root: Path) -> str:
    inside = sorted(entry.name + "/" * entry.is_dir() for entry in os.scandir(root))
    if "store.json" in inside:
        return f"{root} is a prepared pack, not a raw folder; give it as --data"
    for images, masks in (("images/", "masks/"), ("inputs_train/", "outputs_train/")):
        if images in inside and masks not in inside:
            return f"{root} has {images} but no {masks} beside it; add the masks, one a picture and of its name"
    holds = f"it holds {first_few([ascii(name)[1:-1] for name in inside])}" if inside else "it is empty"
    return (
        f"{root} holds no train_labels.csv (Kaggle), no class folders 0/ and 1/, no camelyonpatch_level_2_split_train_x.h5, "
        f"and neither images/ and masks/ nor inputs_train/ and outputs_train/; {holds}; {GET_THE_DATA}"
    )


def _open_kaggle(root: Path, sample: Path | None) -> PatchSource:
    labels_csv = root / "train_labels.csv"
    if not (root / "train").is_dir():
        archive = next((name for name in ("train.zip", "train.tar.gz", "train.tar") if (root / name).is_file()), None)
        remedy = GET_THE_DATA if archive is None else f"unpack {archive} into train/ (and test likewise)"
        raise DataError(f"{root} has train_labels.csv but no folder train/ with the images; {remedy}")
    ids, labels = read_labels(labels_csv)
    listed = list_images(root / "train", "train/")
    images, notes = listed.files, listed.notes
    label_of = dict(zip(ids.tolist(), labels.tolist(), strict=True))
    if absent := [name for name in label_of if name not in images]:
        notes.append(
            f"{len(absent)} labelled ids have no image in train/ and are left out: {first_few(absent)}{_if_unfinished(len(absent), len(ids))}"
        )
    if unlabelled := sorted(name for name in images if name not in label_of):
        notes.append(f"{len(unlabelled)} images in train/ have no label and are left out: {first_few(unlabelled)}")
    train = sorted(name for name in label_of if name in images)
    if not train:
        example = first_few(sorted(images), 1) or "no image"
        raise DataError(
            f"{labels_csv}: none of its {len(ids)} ids has an image in {root / 'train'} "
            f"(labels name {ids[0]}, the folder holds {example})"
        )
    test, test_files, missing, test_notes, sample_csv = _list_test(root, sample)
    masks, mask_notes = find_masks(root, train, test)
    return _assemble(
        _Rows(train, [images[name] for name in train], [label_of[name] for name in train]),
        _Rows([], [], []),
        _Rows(test, test_files, [-1] * len(test)),
        kind="kaggle",
        root=root,
        masks=masks,
        notes=(*notes, *test_notes, *mask_notes),
        missing_test_ids=missing,
        tables=(labels_csv, *sample_csv),
    )


def missing_test_note(missing: Sequence[str], sample: str) -> str:
    """What to say where ids of the sample submission have no image, before anything is searched."""
    return (
        f"warning: {len(missing)} ids of {sample} have no image in test/: {first_few(missing)}; finalize can write no submission without "
        "them (--no-submission), and a study stays with the files it began with: complete the folder first"
    )


def _if_unfinished(n_absent: int, n: int) -> str:
    """What to say where so many images are absent that the folder may be half unpacked."""
    if n_absent <= MANY_ABSENT * n:
        return ""
    return (
        f". That is {n_absent / n:.0%} of them: if the folder is still being unpacked, wait until it is whole, since a study stays with "
        "the files it began with"
    )


def _list_test(root: Path, sample: Path | None) -> tuple[list[str], list[str], tuple[str, ...], list[str], list[Path]]:
    """Ids and files of ``test/`` in submission order, ids without an image, notes, the sample file if one was read."""
    found: dict[str, str] = {}
    notes: list[str] = []
    if (root / "test").is_dir():
        listed = list_images(root / "test", "test/")
        found = listed.files
        notes += listed.notes
        if not found:
            below = sorted(entry.name for entry in os.scandir(root / "test") if entry.is_dir())
            unseen = f"; its folders are not looked into ({first_few(below)})" if below else ""
            notes.append(f"test/ holds no image: there is nothing to predict for a submission{unseen}")
    else:
        notes.append("no folder test/: there is nothing to predict for a submission")
    csv = sample or root / "sample_submission.csv"
    if sample is None and not csv.is_file():
        if found:
            notes.append(f"no sample_submission.csv: the submission will hold the {len(found)} ids of test/, sorted")
        names = sorted(found)
        return names, [found[name] for name in names], (), notes, []
    wanted = read_ids(csv).tolist()
    known = set(wanted)
    missing = tuple(name for name in wanted if name not in found)
    if missing:
        notes.append(missing_test_note(missing, csv.name))
    if extra := sorted(name for name in found if name not in known):
        notes.append(f"{len(extra)} images in test/ are not in {csv.name} and are left out: {first_few(extra)}")
    names = [name for name in wanted if name in found]
    if found and not names:
        raise DataError(
            f"none of the {len(wanted):,} ids of {csv} has an image among the {len(found):,} in test/; "
            "pack the folder with the list of these images (pcam-automl prepare RAW --out PACK --sample CSV), or remove that file: all of test/ is predicted then"
        )
    return names, [found[name] for name in names], missing, notes, [csv]


def _open_dense(root: Path, pairs: Sequence[Pairs], notes: Sequence[str]) -> PatchSource:
    parts: dict[int, list[tuple[str, str, str]]] = {TRAIN: [], VALID: [], TEST: []}
    for pair in pairs:
        parts[pair.part] += [(name, pair.images[name], pair.masks.get(name, "")) for name in sorted(pair.images)]
    rows = [_Rows([r[0] for r in part], [r[1] for r in part], [-1] * len(part)) for part in parts.values()]
    masks = np.array([row[2] for part in parts.values() for row in part], dtype=np.str_)
    return _assemble(*rows, kind="dense", root=root, masks=masks, notes=tuple(notes))


def _class_root(root: Path) -> str | None:
    """The prefix under which ``0/`` and ``1/`` lie."""
    for prefix in ("", "train/"):
        if (root / f"{prefix}0").is_dir() and (root / f"{prefix}1").is_dir():
            return prefix or "./"
    return None


def _open_classes(root: Path, prefix: str, sample: Path | None) -> PatchSource:
    notes: list[str] = []
    train = _list_classes(root, "" if prefix == "./" else prefix, notes)
    if not train.ids:
        raise DataError(f"{root}: the class folders {prefix}0/ and {prefix}1/ hold no TIFF, PNG or JPEG files")
    valid_in = next((name for name in ("valid/", "val/") if any((root / name / c).is_dir() for c in "01")), None)
    valid = _list_classes(root, valid_in, notes) if valid_in else _Rows([], [], [])
    missing: tuple[str, ...] = ()
    sample_csv: list[Path] = []
    if (root / "test" / "0").is_dir() or (root / "test" / "1").is_dir():
        _check_no_sample(sample, "class folders in test/")
        test = _list_classes(root, "test/", notes)
        if beside := list_images(root / "test", "test/").files:
            notes.append(
                f"{len(beside)} images lie in test/ beside its class folders and are left out: {first_few(sorted(beside))}"
            )
    else:
        ids, files, missing, test_notes, sample_csv = _list_test(root, sample)
        test = _Rows(ids, files, [-1] * len(ids))
        notes += test_notes
    return _assemble(
        train,
        valid,
        test,
        kind="classes",
        root=root,
        notes=tuple(notes),
        missing_test_ids=missing,
        tables=tuple(sample_csv),
    )


def _check_no_sample(sample: Path | None, what: str) -> None:
    if sample is not None:
        raise DataError(
            f"--sample {sample}: {what} name their own test part; a sample submission goes with unlabelled images in test/, so leave it out"
        )


def _list_classes(root: Path, prefix: str, notes: list[str]) -> _Rows:
    rows: list[tuple[str, str, int]] = []
    for label in (0, 1):
        folder = root / f"{prefix}{label}"
        if folder.is_dir():
            listed = list_images(folder, f"{prefix}{label}/")
            notes += listed.notes
            rows += [(name, file, label) for name, file in listed.files.items()]
    rows.sort()
    with os.scandir(root / prefix) as entries:
        others = sorted(
            one.name for one in entries if one.name.isdigit() and one.name not in ("0", "1") and one.is_dir()
        )
    if others:
        notes.append(f"the class folders {prefix}{first_few(others)} are left out: the classes are 0 and 1")
    if both := repeated([name for name, _, _ in rows]):
        raise DataError(
            f"{root}/{prefix}: {len(both)} ids lie in both 0/ and 1/ ({first_few(both)}); an id has one label"
        )
    return _Rows([row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows])


@dataclass(frozen=True)
class _Rows:
    """The rows of one part, as lists."""

    ids: list[str]
    files: list[str]
    labels: list[int]


def _assemble(train: _Rows, valid: _Rows, test: _Rows, **rest: Any) -> PatchSource:
    parts = (train, valid, test)
    ids = [name for part in parts for name in part.ids]
    if shared := sorted(set(train.ids) & set(valid.ids)):
        raise DataError(
            f"{rest['root']}: {len(shared)} ids are in the training and in the validation part ({first_few(shared)}); an id names one "
            "patch: give the files of one part other names"
        )
    if both := repeated(ids):
        rest["notes"] = (*rest["notes"], f"{len(both)} ids are in more than one part: {first_few(both)}")
    codes = np.repeat(np.array([TRAIN, VALID, TEST], np.int8), [len(part.ids) for part in parts])
    unknown = np.full(len(ids), "", dtype="U1")
    return PatchSource(
        ids=np.array(ids, dtype=np.str_),
        files=np.array([file for part in parts for file in part.files], dtype=np.str_),
        label=np.array([label for part in parts for label in part.labels], dtype=np.int8),
        part=codes,
        group=unknown,
        domain=unknown,
        **rest,
    )


def _with_names(source: PatchSource, column: Literal["group", "domain"], given: Path | None) -> PatchSource:
    """Fill ``group`` or ``domain`` from a table: the given one, or ``train_<column>s.csv`` beside the labels."""
    csv = given or source.root / f"train_{column}s.csv"
    if given is None and not csv.is_file():
        return source
    names = dict(zip(*(array.tolist() for array in read_names(csv, column)), strict=True))
    values = np.array([names.get(name, "") for name in source.ids.tolist()], dtype=np.str_)
    values[is_ambiguous(source.ids, source.part)] = ""
    train = source.part != TEST
    n_named = int(np.count_nonzero(values[train] != ""))
    if not n_named:
        known = np.isin(source.ids[train], list(names))
        why = (
            f"every {column} there is empty"
            if known.any()
            else f"it names {next(iter(names))}, the folder holds {source.ids[train][0]}"
        )
        raise DataError(
            f"{csv}: none of its {len(names)} rows gives a training patch of {source.root} a {column} ({why})"
        )
    distinct = len(np.unique(values[train & (values != "")]))
    notes = [
        f"{distinct} {column}s for {n_named} training patches from {csv.name}"
        + (", found beside the labels" * (not given))
    ]
    if unnamed := source.ids[train & (values == "")].tolist():
        notes.append(f"{len(unnamed)} training patches have no {column} in {csv.name}: {first_few(unnamed)}")
    changed = {column: values, "tables": (*source.tables, csv)}
    return _noted(replace(source, **changed), *notes)  # type: ignore[arg-type]


def is_ambiguous(ids: NDArray[Any], part: NDArray[Any]) -> NDArray[np.bool_]:
    """(N,) whether a table's row of that id may be of another patch: a test patch that has a training patch's id."""
    test = np.asarray(part) == TEST
    return np.asarray(test & np.isin(ids, ids[~test]), bool)


def _noted(source: PatchSource, *notes: str) -> PatchSource:
    return replace(source, notes=(*source.notes, *notes))


def _open_h5(root: Path, parts: dict[str, dict[str, Path]]) -> PatchSource:
    """Ids are ``train_000000``..., groups the slides of ``meta.csv``; official splits and test labels are kept."""
    if "train" not in parts:
        raise DataError(f"{root} has no {H5_PREFIX}train_x.h5 (or .h5.gz); only {', '.join(parts)}")
    columns: dict[str, list[Any]] = {name: [] for name in ("ids", "label", "part", "group", "files")}
    h5: dict[int, H5Part] = {}
    tables: list[Path] = []
    notes: list[str] = []
    for name, files in parts.items():
        labels = read_h5_labels(files, name)
        n = len(labels)
        slides = read_column(files["meta"], "wsi") if "meta" in files else [""] * n
        if len(slides) != n:
            raise DataError(f"{files['meta']} has {len(slides)} rows, {files['x'].name} has {n} patches")
        columns["ids"].append(np.char.add(f"{name}_", np.char.zfill(np.arange(n).astype(np.str_), 6)))
        columns["label"].append(labels)
        columns["part"].append(np.full(n, PART_CODES[name], np.int8))
        columns["group"].append(np.array([slide.strip() for slide in slides], dtype=np.str_))
        columns["files"].append(np.arange(n, dtype=np.int64))
        mask = files.get("mask")
        h5[PART_CODES[name]] = H5Part(files["x"].name, mask.name if mask else None, n)
        tables += [files[what] for what in ("y", "meta") if what in files]
        if "meta" in files:
            notes.append(f"{len(set(slides))} groups of {name} from column wsi of {files['meta'].name}")
    arrays: dict[str, Any] = {name: np.concatenate(values) for name, values in columns.items()}
    if sum(part.mask is not None for part in h5.values()) not in (0, len(h5)):
        notes.append("masks are there for some splits only; they are not packed")
    unknown = np.full(len(arrays["ids"]), "", dtype="U1")
    return PatchSource(kind="h5", root=root, domain=unknown, notes=tuple(notes), tables=tuple(tables), h5=h5, **arrays)
