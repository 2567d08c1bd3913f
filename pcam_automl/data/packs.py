"""Finding the pack of a data folder, building it once where there is none. Reads no image itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pcam_automl.data.pack import pack, same_names
from pcam_automl.data.quality import UNUSABLE, findings
from pcam_automl.data.sources import PatchSource, fingerprints, missing_test_note, open_source
from pcam_automl.data.store import PatchStore, is_of_this_version, is_pack, open_store
from pcam_automl.errors import DataError
from pcam_automl.files import locked

PackCall = Callable[[int, int], None]
"""Told of progress while packing: (patches done, patches in all)."""


def find_pack(
    path: Path,
    packs: Path,
    *,
    groups: Path | None = None,
    domains: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
    call: PackCall | None = None,
) -> PatchStore:
    """The store of ``path``: itself if it is a pack, else the one packed from it earlier, else a new one.

    A raw folder is recognised by its fingerprint (relative names, sizes, times), so a changed folder is packed anew; so is
    one whose pack was made by a release with another kind of pack.

    Args:
        path: a pack or a raw folder.
        packs: where packs of raw folders are kept, by fingerprint.
        groups: CSV ``id,group``.
        domains: CSV ``id,domain``.
        say: told of notes, once each.
        call: progress while packing.

    Raises:
        DataError: the data is at fault, or ``groups`` / ``domains`` are given for a finished pack.
    """
    if is_pack(path):
        if groups is not None or domains is not None:
            raise DataError(
                f"{path} is a finished pack: --groups and --domains are given when it is made (pcam-automl prepare RAW --groups ...)"
            )
        store = open_store(path)
        if missing := store.missing_test_ids:
            say(missing_test_note(missing, "the sample submission"))
        return store
    source = open_source(path, groups=groups, domains=domains)
    for note in source.notes:
        say(note)
    new, older = (packs / one[:16] for one in fingerprints(source))
    for target in (new, older):
        if is_pack(target) and is_of_this_version(target) and same_names(found := open_store(target), source):
            return _with_findings_said(found, say)
    target = new
    with locked(
        packs / f".{target.name}.lock",
        busy=f"another process is packing {path} into {target}: waiting for it",
        waits=say,
    ):
        if is_pack(target) and is_of_this_version(target):
            return _with_findings_said(open_store(target), say)
        say(f"packing {len(source.ids):,} patches once into {target}")
        return _with_findings_said(pack(source, target, progress=call), say)


def holds(store: PatchStore, source: PatchSource) -> bool:
    """Whether the pack was made of just this source."""
    return store.source.get("fingerprint") in fingerprints(source) and same_names(store, source)


def _with_findings_said(store: PatchStore, say: Callable[[str], None]) -> PatchStore:
    """What is not trained on, and why, before anybody wonders where it went."""
    for line in findings(store).lines_of(UNUSABLE):
        say(line)
    return store
