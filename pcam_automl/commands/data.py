"""`prepare` and `synth`. Imports no torch."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np

from pcam_automl import terminal
from pcam_automl.data.pack import pack, same_names, verify
from pcam_automl.data.packs import holds
from pcam_automl.data.quality import findings, write_sheet
from pcam_automl.data.sources import open_source
from pcam_automl.data.split_groups import NO_SLIDES
from pcam_automl.data.store import PatchStore, is_pack, open_store
from pcam_automl.data.synthetic import write_synthetic
from pcam_automl.errors import DataError
from pcam_automl.files import own_name


def run_prepare(
    raw: Path,
    out: Path,
    *,
    groups: Path | None,
    domains: Path | None,
    sample: Path | None,
    keep_outliers: bool,
    check: bool,
    as_json: bool,
) -> None:
    """Pack a raw source, or with ``check`` compare an existing pack with it, patch by patch."""
    out = own_name(out)  # the pack takes the place of what a link names
    source = open_source(raw, groups=groups, domains=domains, sample=sample)
    for note in source.notes:
        terminal.say(note)
    if check and is_pack(out):
        _check_same_outliers(open_store(out), keep_outliers)
        with terminal.counting("verifying") as call:
            verify(store := open_store(out), source, progress=call)
        terminal.say(f"{out}: all {len(store):,} patches equal the source")
        _print_store(store, as_json)
        return
    if out.is_dir() and any(out.iterdir()):
        if is_pack(out) and holds(open_store(out), source):
            _check_same_outliers(open_store(out), keep_outliers)
            terminal.say(f"{out} already holds this source; nothing to do (--verify re-reads it)")
            _print_store(open_store(out), as_json)
            return
        other = "does not hold this source"
        if (
            is_pack(out)
            and np.array_equal((store := open_store(out)).ids, source.ids)
            and not same_names(store, source)
        ):
            other = "holds these patches with other slides or scanners (--groups, --domains)"
        raise DataError(f"--out {out} is not empty and {other}; choose another folder or remove it")
    with terminal.counting("packing") as call:
        store = pack(source, out, keep_outliers=keep_outliers, progress=call)
    if check:
        with terminal.counting("verifying") as call:
            verify(store, source, progress=call)
    _print_store(store, as_json)


def _check_same_outliers(store: PatchStore, keep_outliers: bool) -> None:
    """A pack that was made with the other choice is not what was asked for."""
    packed = bool(store.source.get("keep_outliers", False))
    if packed != keep_outliers:
        was, now = ("with" if kept else "without" for kept in (packed, keep_outliers))
        raise DataError(
            f"--out {store.root} holds this source packed {was} --keep-outliers, asked for is {now} it; "
            "choose another folder, or remove it"
        )


def _print_store(store: PatchStore, as_json: bool) -> None:
    found, sheet = findings(store), store.root / "findings.png"
    if len(found.rows) and not sheet.exists():
        write_sheet(store, found.rows, sheet)
    if as_json:
        terminal.print_json(
            {
                "pack": str(store.root),
                "patches": len(store),
                "content_hash": store.content_hash,
                **found.to_json(),
                "channel_mean": store.channel_mean,
                "channel_std": store.channel_std,
            }
        )
        return
    for line in found.lines():
        terminal.say(line)
    labelled = np.asarray(store.label) >= 0
    if labelled.any() and (np.asarray(store.group)[labelled] < 0).all():
        terminal.say(NO_SLIDES)
    if len(found.rows):
        terminal.say(f"pictures of them: {sheet}")
    terminal.say(
        f"next: pcam-automl search --data {shlex.quote(str(store.root))} --trials 50 (the pack holds all that it needs)"
    )
    terminal.result(f"{store.root}: {len(store):,} patches, content {store.content_hash[:16]}")


def run_synth(out: Path, *, n_patches: int, n_slides: int, seed: int) -> None:
    """Write a synthetic set in the Kaggle layout."""
    out = own_name(out)
    with terminal.counting("drawing patches") as call:
        write_synthetic(out, n_patches=n_patches, n_slides=n_slides, seed=seed, progress=call)
    terminal.result(
        f"{out}: {n_patches:,} patches of {n_slides} slides; next: pcam-automl search --data {shlex.quote(str(out))} --trials 12"
    )
