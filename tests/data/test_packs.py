"""The pack of a folder is found again, and made anew where an older release made it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_builders import patch_id, write_csv

from pcam_automl.data.packs import find_pack, holds
from pcam_automl.data.sources import fingerprints, open_source
from pcam_automl.data.store import VERSION, open_store
from pcam_automl.errors import DataError


def test_a_folder_is_packed_once_and_again_after_a_release_with_another_kind_of_pack(
    kaggle: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    packs = tmp_path / "packs"
    store = find_pack(kaggle, packs, say=said.append)
    assert find_pack(kaggle, packs, say=said.append).root == store.root
    assert [line.startswith("packing 12 patches once") for line in said] == [True]
    header = store.root / "store.json"
    older = json.loads(header.read_text()) | {"version": VERSION - 1}
    header.write_text(json.dumps(older))
    with pytest.raises(DataError, match=f"pack version {VERSION - 1}"):
        find_pack(store.root, packs)  # named by its user: not ours to replace
    assert find_pack(kaggle, packs, say=said.append).content_hash == store.content_hash
    assert len(said) == 2
    assert open_store(store.root).content_hash == store.content_hash


def test_what_is_left_out_is_said_whoever_packs(kaggle: Path, tmp_path: Path) -> None:
    (kaggle / "train" / f"{patch_id(2)}.tif").write_bytes(b"no picture")
    for _ in range(2):  # packed, and found again
        said: list[str] = []
        find_pack(kaggle, tmp_path / "packs", say=said.append)
        assert any("out of training" in line and patch_id(2) in line for line in said), said


def test_one_table_given_for_the_other_makes_another_pack(kaggle: Path, tmp_path: Path) -> None:
    write_csv(tmp_path / "t.csv", "id,group,domain", [(patch_id(n), f"s{n % 3}", f"c{n % 2}") for n in range(8)])
    by_mistake = find_pack(kaggle, tmp_path / "packs", domains=tmp_path / "t.csv")
    meant = find_pack(kaggle, tmp_path / "packs", groups=tmp_path / "t.csv")
    assert (by_mistake.group_names, meant.group_names) == ((), ("s0", "s1", "s2"))


def test_a_pack_of_before_the_fingerprint_told_slides_from_scanners_is_found_again(
    kaggle: Path, tmp_path: Path
) -> None:
    write_csv(kaggle / "train_groups.csv", "id,group", [(patch_id(n), f"s{n % 3}") for n in range(8)])
    packs = tmp_path / "packs"
    made = find_pack(kaggle, packs)
    new, older = fingerprints(open_source(kaggle))
    assert (made.root.name, new != older) == (new[:16], True)
    header = made.root / "store.json"
    header.write_text(header.read_text().replace(new, older))
    made.root.rename(packs / older[:16])
    assert find_pack(kaggle, packs).root.name == older[:16]
    assert holds(open_store(packs / older[:16]), open_source(kaggle))
    write_csv(tmp_path / "d.csv", "id,domain", [(patch_id(n), "c") for n in range(8)])
    assert not holds(open_store(packs / older[:16]), open_source(kaggle, domains=tmp_path / "d.csv"))


def test_a_damaged_header_is_named_and_not_packed_over(kaggle: Path, tmp_path: Path) -> None:
    store = find_pack(kaggle, tmp_path / "packs")
    (store.root / "store.json").write_text("{")
    with pytest.raises(DataError, match=r"store.json cannot be read"):
        find_pack(kaggle, tmp_path / "packs")
