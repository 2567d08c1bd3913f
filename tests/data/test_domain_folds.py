"""Leave one domain out: whole domains, whole slides, both labels in each fold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_splits import build_store

from pcam_automl.data.domain_folds import domain_folds
from pcam_automl.data.splits import HOLDOUT, load_split, make_split, write_split
from pcam_automl.data.store import TRAIN, VALID
from pcam_automl.errors import DataError

few = settings(max_examples=25, deadline=None)


@few
@given(st.integers(0, 2**32 - 1), st.integers(2, 5), st.floats(0.0, 0.2))
def test_every_fold_is_one_domain_and_holds_both_labels(seed: int, n_domains: int, holdout: float) -> None:
    rng = np.random.default_rng(seed)
    n_slides = 8 * n_domains
    group = rng.integers(0, n_slides, 30 * n_slides)
    label = (rng.random(len(group)) < 0.4).astype(int)
    store = build_store(label, group, group % n_domains)
    split = make_split(store, seed=1, holdout=holdout, by="domains")
    for fold in range(n_domains):
        rows = split.score_rows(fold)
        assert len(np.unique(store.domain[rows])) == 1
        assert set(store.label[rows].tolist()) == {0, 1}
        assert not set(store.domain[split.train_order(fold)].tolist()) & set(store.domain[rows].tolist())
    assert int(split.fold.max()) == n_domains - 1
    aside = split.holdout_rows()
    assert not set(group[aside].tolist()) & set(group[split.order].tolist())
    assert len(aside) == int((split.fold == HOLDOUT).sum())


def test_the_smallest_domain_with_a_tenth_of_the_patches_validates() -> None:
    domain = np.repeat([0, 1, 2, 3], [500, 300, 150, 50])
    label = np.arange(1000) % 2
    fold, notes = domain_folds(np.arange(1000), domain, label, ("a", "b", "c", "d"), both=True)
    assert [int(fold[domain == code][0]) for code in range(4)] == [2, 1, 0, 3]
    assert notes == ["folds are domains: 0 c (150), 1 b (300), 2 a (500), 3 d (50)"]


def test_a_slide_of_two_domains_stays_whole_where_most_of_it_lies() -> None:
    joined = np.repeat(np.arange(20), 10)
    domain = joined // 10
    domain[0] = 1
    fold, notes = domain_folds(joined, domain, np.arange(200) % 2, ("a", "b"), both=True)
    assert len({(slide, f) for slide, f in zip(joined.tolist(), fold.tolist(), strict=True)}) == 20
    assert fold[0] == fold[1]
    assert any(note.startswith("1 slides or groups") for note in notes)


def test_patches_of_no_domain_and_domains_of_one_label_go_with_the_largest() -> None:
    domain = np.repeat([0, 1, 2, -1], [100, 60, 20, 10])
    label = np.arange(190) % 2
    label[domain == 2] = 0
    fold, notes = domain_folds(np.arange(190), domain, label, ("a", "b", "c"), both=True)
    assert {int(f) for f in fold[domain == 0]} == {int(f) for f in fold[(domain == 2) | (domain == -1)]} == {1}
    assert notes[1].startswith("30 patches of domains with one label, or of none known")


def test_one_domain_cannot_be_left_out() -> None:
    label = np.arange(200) % 2
    with pytest.raises(
        DataError, match=r"--split domains needs 2 to 100 domains with both labels, got 1 .*scanner_0 100/100"
    ):
        make_split(build_store(label, np.arange(200) // 10, np.zeros(200, int)), by="domains")
    with pytest.raises(DataError, match="no domain is known"):
        make_split(build_store(label, np.arange(200) // 10), by="domains")


def test_domains_rule_over_official_parts() -> None:
    n = 400
    part = np.where(np.arange(n) < 100, VALID, TRAIN)
    store = build_store(np.arange(n) % 2, np.arange(n) // 10, np.arange(n) // 10 % 2, part)
    split = make_split(store, by="domains")
    assert [set(store.domain[split.score_rows(fold)].tolist()) for fold in (0, 1)] == [{0}, {1}]


def test_the_hash_binds_the_estimated_domains_and_old_splits_keep_theirs(tmp_path: Path) -> None:
    store = build_store(np.arange(400) % 2, np.arange(400) // 10, np.arange(400) // 10 % 2)
    own, estimated = make_split(store), make_split(store, domains="ab" * 32)
    assert np.array_equal(own.fold, estimated.fold)
    assert own.hash != estimated.hash
    write_split(estimated, tmp_path / "split.npz")
    again = load_split(tmp_path / "split.npz")
    assert (again.hash, again.domains) == (estimated.hash, "ab" * 32)
    with np.load(tmp_path / "split.npz") as stored:
        fields = {name: stored[name] for name in stored.files if name != "domains"}
    np.savez(tmp_path / "old.npz", **{**fields, "hash": np.array(own.hash)})
    assert replace(load_split(tmp_path / "old.npz"), fold=own.fold, order=own.order) == own
