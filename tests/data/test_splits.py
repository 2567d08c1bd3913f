"""Folds by slide, the holdout, the nested order."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pcam_automl.data.split_groups import slides_caveat, trained_caveat
from pcam_automl.data.splits import HOLDOUT, UNUSED, Split, load_split, make_split, write_split
from pcam_automl.data.store import TEST, TRAIN, VALID, Flag, PatchStore
from pcam_automl.errors import DataError


def build_store(
    label: np.ndarray,
    group: np.ndarray | None = None,
    domain: np.ndarray | None = None,
    part: np.ndarray | None = None,
    pixels: np.ndarray | None = None,
) -> PatchStore:
    """A store of patches that nobody looks at; equal ``pixels`` (codes from 1) are exact duplicates."""
    n = len(label)
    group = np.full(n, -1) if group is None else group
    domain = np.full(n, -1) if domain is None else domain
    pixels = np.arange(1, n + 1) if pixels is None else pixels
    digest = np.zeros((n, 16), np.uint8)
    digest[:, :4] = np.asarray(pixels, "<u4").view(np.uint8).reshape(n, 4)
    return PatchStore(
        root=Path(),
        patches=np.zeros((n, 1, 1, 3), np.uint8),
        ids=np.array([f"{i:040x}" for i in range(n)]),
        label=np.asarray(label, np.int8),
        group=np.asarray(group, np.int32),
        domain=np.asarray(domain, np.int32),
        part=np.full(n, TRAIN, np.int8) if part is None else np.asarray(part, np.int8),
        flags=np.zeros(n, np.uint16),
        stats=np.zeros((n, 6), np.float32),
        digest=digest,
        masks=None,
        group_names=tuple(f"slide_{i}" for i in range(int(group.max()) + 1)),
        domain_names=tuple(f"scanner_{i}" for i in range(int(domain.max()) + 1)),
        content_hash="0" * 64,
        source={},
    )


@st.composite
def stores(draw: st.DrawFn, known: float = 1.0) -> PatchStore:
    """12 to 30 slides in two domains, with duplicates within and between slides, test patches and patches left out."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_slides = draw(st.integers(12, 30))
    n = draw(st.integers(20, 40)) * n_slides
    group = rng.integers(0, n_slides, n)
    pixels = np.arange(1, n + 1)
    for copy in rng.integers(0, n, draw(st.integers(0, 4))):
        pixels[copy] = pixels[rng.integers(0, n)]
    domain = group % 4 == 0
    part = np.where(rng.random(n) < 0.1, TEST, TRAIN)
    label = np.where(part == TEST, -1, rng.random(n) < rng.uniform(0.3, 0.6))
    group = np.where(rng.random(n) < known, group, -1)
    store = build_store(label, group, domain.astype(int), part, pixels)
    store.flags[rng.integers(0, n, 5)] = Flag.LEFT_OUT
    return store


def spans(fold: np.ndarray, code: np.ndarray) -> bool:
    """Whether equal codes lie in two folds."""
    return len(np.unique(np.stack([fold, code]), axis=1).T) > len(np.unique(code))


def of_digest(store: PatchStore) -> np.ndarray:
    return np.unique(store.digest, axis=0, return_inverse=True)[1].reshape(-1)


few = settings(max_examples=25, deadline=None)


@few
@given(stores(), st.integers(0, 99), st.sampled_from([0.0, 0.15]))
def test_slides_and_duplicates_never_span_two_folds_nor_the_holdout(
    store: PatchStore, seed: int, holdout: float
) -> None:
    split, rows = make_split(store, seed=seed, holdout=holdout), store.development_rows()
    assert not spans(split.fold[rows], store.group[rows])
    assert not spans(split.fold[rows], of_digest(store)[rows])
    assert split.grouped


@few
@given(stores(known=0.5), st.integers(0, 99))
def test_patches_without_a_slide_are_mixed_with_slides(store: PatchStore, seed: int) -> None:
    split, rows = make_split(store, seed=seed), store.development_rows()
    known = rows[store.group[rows] >= 0]
    assert not spans(split.fold[known], store.group[known])
    assert not spans(split.fold[rows], of_digest(store)[rows])
    assert any("have no slide" in note for note in split.notes)


@few
@given(stores(), st.sampled_from([0.0, 0.15]))
def test_every_development_row_lies_in_one_fold_or_the_holdout_and_no_other_row_does(
    store: PatchStore, holdout: float
) -> None:
    split, rows = make_split(store, holdout=holdout), store.development_rows()
    used = np.concatenate([split.holdout_rows(), *(split.score_rows(fold, len(rows)) for fold in range(5))])
    assert np.array_equal(np.sort(used), rows)
    others = np.setdiff1d(np.arange(len(store)), rows)
    assert (split.fold[others] == UNUSED).all()
    assert split.fold.dtype == np.int8


@few
@given(stores(), st.integers(0, 4))
def test_order_holds_every_row_with_a_fold_once_and_parts_into_training_and_scoring(
    store: PatchStore, fold: int
) -> None:
    split = make_split(store, holdout=0.1)
    assert np.array_equal(np.sort(split.order), np.flatnonzero(split.fold >= 0))
    train, score = split.train_order(fold), split.score_rows(fold, len(store))
    assert set(train) | set(score) == set(split.order)
    assert not set(train) & set(score)
    assert (split.fold[score] == fold).all()
    assert np.array_equal(split.score_rows(fold, 7), score[:7])  # smaller subsets lie in larger ones


@few
@given(stores())
def test_every_prefix_has_the_label_ratio_of_the_whole(store: PatchStore) -> None:
    split = make_split(store)
    positive = store.label[split.order] == 1
    drift = np.cumsum(positive) - np.arange(1, len(positive) + 1) * positive.mean()
    assert np.abs(drift).max() <= 3  # patches


@few
@given(stores(), st.integers(0, 99))
def test_the_same_arguments_give_the_same_split_and_another_seed_another(store: PatchStore, seed: int) -> None:
    one, two, other = make_split(store, seed=seed), make_split(store, seed=seed), make_split(store, seed=seed + 1)
    assert np.array_equal(one.fold, two.fold)
    assert np.array_equal(one.order, two.order)
    assert one.hash == two.hash != other.hash
    assert not np.array_equal(one.order, other.order)


def simple(n_slides: int = 12, n_each: int = 20, seed: int = 0) -> PatchStore:
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(n_slides), n_each)
    return build_store(rng.integers(0, 2, len(group)), group, (group % 2).astype(int))


@pytest.mark.parametrize("seed", range(5))
def test_folds_have_about_the_size_and_the_label_ratio_of_the_whole(seed: int) -> None:
    store = simple(40, seed=seed)
    split = make_split(store, seed=seed)
    for fold in range(5):
        label = store.label[split.fold == fold]
        assert abs(label.mean() - store.label.mean()) < 0.1
        assert 0.15 < len(label) / len(store) < 0.25


def test_small_subsets_are_spread_over_slides_and_domains() -> None:
    rng = np.random.default_rng(0)
    group = rng.choice(24, 6000, p=np.r_[0.5, np.full(23, 0.5 / 23)])  # one slide holds half of the patches
    store = build_store(rng.integers(0, 2, 6000), group, (group % 4 == 0).astype(int))
    first = make_split(store).order[:96]
    assert len(np.unique(store.group[first])) >= 20
    assert 0.1 < store.domain[first].mean() < 0.7
    assert (store.group[first] == 0).mean() < 0.4


def test_every_fold_holds_the_rare_domain() -> None:
    group = np.repeat(np.arange(24), 30)
    for seed in range(5):
        store = build_store(np.random.default_rng(seed).integers(0, 2, 720), group, (group < 5).astype(int))
        split = make_split(store, seed=seed)
        assert [len(np.unique(store.domain[split.fold == fold])) for fold in range(5)] == [2] * 5


@pytest.mark.parametrize("holdout", [0.1, 0.25, 0.5])
def test_holdout_is_about_as_large_as_asked_and_stratified(holdout: float) -> None:
    store = simple(40)
    split = make_split(store, holdout=holdout)
    rows = split.holdout_rows()
    assert len(rows) == pytest.approx(holdout * len(store), rel=0.15)
    assert abs(store.label[rows].mean() - store.label.mean()) < 0.1
    assert (split.fold[rows] == HOLDOUT).all()
    assert not set(rows) & set(split.order)


def test_without_slides_folds_are_stratified_and_one_note_says_that_validation_is_optimistic() -> None:
    store = build_store(np.r_[np.ones(400), np.zeros(600)], domain=np.arange(1000) % 2)
    split = make_split(store)
    assert not split.grouped
    assert len(split.notes) == 1
    assert "optimistic" in split.notes[0]
    for fold in range(5):
        label = store.label[split.fold == fold]
        assert (len(label), label.sum()) == (pytest.approx(200, abs=4), pytest.approx(80, abs=4))


def test_without_slides_duplicates_still_share_a_fold() -> None:
    store = build_store(np.arange(600) % 3 == 0, pixels=np.arange(600) // 2 + 1)
    assert not spans(make_split(store).fold, np.arange(600) // 2)


def test_chains_of_duplicates_tie_slides_together() -> None:
    store = simple(15)
    for one, other in ((0, 20), (21, 40), (41, 60)):  # slides 0 - 1 - 2 - 3
        store.digest[other] = store.digest[one]
    assert len(set(make_split(store).fold[:80])) == 1


def test_official_validation_part_is_fold_0() -> None:
    group = np.repeat(np.arange(20), 20)
    store = build_store(np.arange(400) % 2, group, part=np.where(group >= 14, VALID, TRAIN))
    split = make_split(store)
    assert np.array_equal(np.flatnonzero(split.fold == 0), np.flatnonzero(store.part == VALID))
    assert sorted(set(split.fold[store.part == TRAIN])) == [1, 2, 3, 4]


def test_holdout_leaves_the_official_validation_part_alone() -> None:
    group = np.repeat(np.arange(30), 20)
    store = build_store(np.arange(600) % 2, group, part=np.where(group >= 24, VALID, TRAIN))
    split = make_split(store, holdout=0.25)
    assert (split.fold[store.part == VALID] == 0).all()
    assert len(split.holdout_rows())


def test_fewer_slides_than_folds_is_an_error_that_counts_them() -> None:
    with pytest.raises(DataError, match=r"at least 5 slides.*got 4"):
        make_split(simple(4))


def test_one_label_only_is_an_error() -> None:
    with pytest.raises(DataError, match="label"):
        make_split(build_store(np.ones(100), np.arange(100) % 10))
    with pytest.raises(DataError, match="no"):
        make_split(build_store(np.full(100, -1), np.arange(100) % 10))


def test_a_fold_that_must_lack_a_label_is_an_error() -> None:
    group = np.repeat(np.arange(10), 10)
    with pytest.raises(DataError, match="label"):
        make_split(build_store(group < 2, group))


@pytest.mark.parametrize("holdout", [-0.1, 0.51, float("nan")])
def test_holdout_out_of_range_is_an_error(holdout: float) -> None:
    with pytest.raises(DataError, match=r"holdout must be in \[0, 0.5\], got"):
        make_split(simple(), holdout=holdout)


def same(one: Split, other: Split) -> bool:
    scalars = (one.seed, one.grouped, one.notes, one.hash) == (other.seed, other.grouped, other.notes, other.hash)
    return scalars and np.array_equal(one.fold, other.fold) and np.array_equal(one.order, other.order)


def test_written_and_read_is_the_same_split(tmp_path: Path) -> None:
    for store in (simple(), replace(simple(), group=np.full(240, -1, np.int32))):
        split = make_split(store, seed=4, holdout=0.2)
        write_split(split, tmp_path / "split.npz")
        assert same(load_split(tmp_path / "split.npz"), split)
    assert [path.name for path in tmp_path.iterdir()] == ["split.npz"]


@pytest.mark.parametrize("name", ["fold", "order", "seed", "hash"])
def test_a_changed_split_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "split.npz"
    write_split(make_split(simple()), path)
    with np.load(path) as stored:
        arrays = dict(stored)
    other = {
        "fold": arrays["fold"][::-1],
        "order": arrays["order"][::-1],
        "seed": np.array(77),
        "hash": np.array("f" * 64),
    }
    with path.open("wb") as file:
        np.savez(file, **(arrays | {name: other[name]}))
    with pytest.raises(DataError, match=r"split\.npz"):
        load_split(path)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04 cut", b"\x93NUMPY\x01\x00"])
def test_a_file_that_is_no_split_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "split.npz"
    with pytest.raises(DataError, match=r"split\.npz"):
        load_split(path)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"split\.npz"):
        load_split(path)


def test_training_patches_that_share_a_slide_or_pixels_with_the_official_validation_part_are_unused() -> None:
    group = np.repeat(np.arange(20), 20)
    store = build_store(np.arange(400) % 2, group, part=np.where(group >= 14, VALID, TRAIN))
    store.part[280:285] = TRAIN  # slide 14 lies on both sides
    store.digest[0] = store.digest[399]  # a patch of slide 0 is a copy of a validation patch
    split = make_split(store)
    assert (split.fold[280:285] == UNUSED).all()
    assert (split.fold[:20] == UNUSED).all()
    assert not spans(split.fold[split.fold >= 0], of_digest(store)[split.fold >= 0])
    assert any(note.startswith("25 training patches share") for note in split.notes)


def test_faulty_patches_are_no_duplicates_of_each_other() -> None:
    store = simple(15)
    store.digest[::20] = 0  # one in each slide: zeros where the file was faulty
    assert len(set(make_split(store).fold)) == 5


def test_a_few_duplicates_among_many_patches_without_slides_stay_quick() -> None:
    n = 50_000
    pixels = np.arange(1, n + 1)
    pixels[1] = 1
    began = time.perf_counter()
    make_split(build_store(np.arange(n) % 3 == 0, pixels=pixels))
    assert time.perf_counter() - began < 8


@few
@given(stores(), st.integers(0, 4))
def test_every_prefix_of_a_folds_training_and_scoring_rows_has_its_label_ratio(store: PatchStore, fold: int) -> None:
    split = make_split(store)
    for rows in (split.train_order(fold), split.score_rows(fold, len(store))):
        positive = store.label[rows] == 1
        assert np.abs(np.cumsum(positive) - np.arange(1, len(rows) + 1) * positive.mean()).max() <= 3


def test_a_domain_missing_from_a_fold_is_told() -> None:
    group = np.repeat(np.arange(24), 30)
    store = build_store(np.arange(720) % 2, group, (group < 2).astype(int))
    assert any("scanner_1 lies in 2 of 5" in note for note in make_split(store).notes)


def test_what_is_said_of_unknown_slides_counts_them() -> None:
    assert slides_caveat(np.array([0, 0, 3])) == ""
    assert slides_caveat(np.array([-1, -1])).startswith(", whose slides are unknown")
    assert slides_caveat(np.array([2, -1, 5, -1])).startswith(", 2 of which have no known slide")
    assert slides_caveat(np.zeros(0, np.int64)) == ""


def test_a_figure_on_what_was_trained_on_says_so() -> None:
    group = np.array([0, 0, 1, 2, -1, -1, -1])
    digest = np.arange(1, 8, dtype=np.uint8)[:, None].repeat(16, axis=1)
    digest[[4, 6]] = 0  # faulty files are no copies of each other
    judged, trained = np.array([1, 3, 4, 5]), np.array([0, 2, 6])
    assert trained_caveat(group, digest, judged, trained) == ", of which 1 are of slides that were trained on: too high"
    assert trained_caveat(group, digest, judged[1:], trained) == "", "patches of unknown slides are of no slide"
    digest[5] = digest[2]
    assert trained_caveat(group, digest, judged, trained) == (
        ", of which 1 are of slides that were trained on and 1 are copies of what was trained on: too high"
    )
    assert trained_caveat(group, digest, judged, np.zeros(0, np.int64)) == ""
