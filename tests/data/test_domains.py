"""Estimated domains against the truth of synthetic sets, one domain where there is one stain, and the file they are kept in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from pcam_automl.data.domains import (
    LEAST_UNITS,
    cluster_stains,
    estimate_domains,
    knows_domains,
    load_domains,
    with_domains,
    write_domains,
)
from pcam_automl.data.pack import pack
from pcam_automl.data.sources import open_source
from pcam_automl.data.stains import stain_shares, stain_table
from pcam_automl.data.store import Flag, PatchStore, open_store
from pcam_automl.data.synthetic import write_synthetic
from pcam_automl.errors import DataError


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> PatchStore:
    """160 patches of 16 slides of two scanners; 12 slides are to learn from, 3 of them of the rare scanner."""
    root = tmp_path_factory.mktemp("synthetic")
    write_synthetic(root / "raw", n_patches=160, n_slides=16, seed=2)
    pack(open_source(root / "raw"), root / "pack")
    return open_store(root / "pack")


def left_out(store: PatchStore, rows: np.ndarray) -> PatchStore:
    flags = np.array(store.flags)
    flags[rows] |= int(Flag.LEFT_OUT)
    return replace(store, flags=flags)


def without_slides(store: PatchStore) -> PatchStore:
    return replace(store, group=np.full(len(store), -1, np.int32))


def redder(store: PatchStore, rows: np.ndarray) -> PatchStore:
    """Those rows as a third laboratory would stain them: half as much red again in optical density, less blue."""
    pixels = np.array(store.patches)
    density = -np.log((pixels[rows] + 1.0) / 256.0) * np.array([1.7, 1.0, 0.8])
    pixels[rows] = (256.0 * np.exp(-density) - 1.0).clip(0, 255).round().astype(np.uint8)
    return replace(store, patches=pixels)


def agreement(store: PatchStore, truth: np.ndarray) -> float:
    rows = store.development_rows()
    return float(adjusted_rand_score(truth[rows], estimate_domains(store).code[rows]))


@pytest.mark.parametrize("slides_known", [True, False])
def test_two_scanners_are_found_again(two: PatchStore, slides_known: bool) -> None:
    store = two if slides_known else without_slides(two)
    found = estimate_domains(store)
    assert agreement(store, np.asarray(two.domain)) == 1.0
    assert found.names == ("stain 1", "stain 2")
    assert found.of_slides is slides_known
    sizes = np.bincount(found.code[store.development_rows()])
    assert sizes[0] > sizes[1]
    assert (found.code[store.test_rows()] == -1).all()
    assert f"stain 1 with {sizes[0]} patches" in found.line()


def test_of_a_handful_of_slides_the_patches_are_clustered_and_no_slide_is_cut(two: PatchStore) -> None:
    domain, group = np.asarray(two.domain), np.asarray(two.group)
    few = replace(two, group=(2 * domain + group % 2).astype(np.int32), group_names=tuple("abcd"))
    found = estimate_domains(few)
    assert (len(found.names), found.of_slides) == (2, False)
    assert agreement(few, domain) == 1.0
    mixed = replace(two, group=np.where(group % 5 == 0, 0, 1).astype(np.int32), group_names=("a", "b"))
    code, rows = estimate_domains(mixed).code, two.development_rows()
    assert all(len(np.unique(code[rows[np.asarray(mixed.group)[rows] == slide]])) == 1 for slide in (0, 1))


def test_three_stains_are_three_domains(two: PatchStore) -> None:
    third = np.flatnonzero((np.asarray(two.domain) == 0) & (np.asarray(two.group) % 2 == 0))
    truth = np.array(two.domain)
    truth[third] = 2
    assert agreement(redder(two, third), truth) == 1.0


@pytest.mark.parametrize("slides_known", [True, False])
def test_one_stain_is_one_domain(two: PatchStore, slides_known: bool) -> None:
    one = left_out(two, np.flatnonzero(np.asarray(two.domain) == 1))
    found = estimate_domains(one if slides_known else without_slides(one))
    assert (found.names, found.silhouette) == (("stain 1",), 0.0)
    assert set(found.code[one.development_rows()].tolist()) == {0}
    assert found.line().endswith("one, nothing separates")


def test_order_and_names_of_the_patches_do_not_matter(two: PatchStore) -> None:
    order = np.random.default_rng(0).permutation(len(two))
    names = np.random.default_rng(1).permutation(len(two.group_names))
    group = np.where(two.group >= 0, names[two.group], -1).astype(np.int32)
    arrays = {
        name: getattr(two, name)[order] for name in ("patches", "ids", "label", "domain", "part", "flags", "digest")
    }
    shuffled = replace(two, group=group[order], **arrays)
    assert np.array_equal(estimate_domains(shuffled).code, estimate_domains(two).code[order])


def test_estimated_domains_take_the_place_of_the_packs_and_leave_its_hash(two: PatchStore) -> None:
    found = estimate_domains(two)
    store = with_domains(two, found)
    assert (store.domain_names, store.content_hash) == (found.names, two.content_hash)
    assert knows_domains(store)
    assert not knows_domains(replace(two, domain=np.zeros(len(two), np.int32)))
    with pytest.raises(DataError, match="the estimated domains are of 160 patches, the pack has 1"):
        with_domains(replace(two, ids=two.ids[:1]), found)


def test_domains_are_read_as_they_were_written_and_damage_is_noticed(two: PatchStore, tmp_path: Path) -> None:
    found, file = estimate_domains(two), tmp_path / "domains.npz"
    write_domains(found, file)
    again = load_domains(file)
    assert np.array_equal(again.code, found.code)
    assert replace(again, code=found.code) == found
    write_domains(replace(found, code=np.zeros(len(two), np.int32)), file)
    with pytest.raises(DataError, match="its contents do not give its hash"):
        load_domains(file)
    file.write_bytes(b"PK")
    with pytest.raises(DataError, match="cannot be read as estimated domains"):
        load_domains(file)


def test_an_odd_slide_or_a_handful_of_slides_is_no_domain() -> None:
    rng = np.random.default_rng(0)
    shares = rng.normal([0.3, 0.2], 0.005, (30, 2))
    shares[0] += 0.2
    everything = np.ones(30, bool)
    assert cluster_stains(shares, everything)[0].max() == 0
    shares[:10] += 0.2
    code, silhouette = cluster_stains(shares, everything)
    assert code.tolist() == [1] * 10 + [0] * 20
    assert silhouette > 0.8
    few = np.arange(30) < LEAST_UNITS - 1
    assert cluster_stains(shares, few)[0].max() == 0


def test_units_outside_the_fit_are_assigned() -> None:
    rng = np.random.default_rng(0)
    shares = np.concatenate([rng.normal([0.2, 0.2], 0.005, (20, 2)), rng.normal([0.3, 0.3], 0.005, (20, 2))])
    fitted = np.arange(40) % 2 == 0
    assert cluster_stains(shares, fitted)[0].tolist() == [0] * 20 + [1] * 20


def test_shares_are_those_of_the_density_whatever_the_thickness() -> None:
    direction = np.array([0.5, 0.9, 0.6])
    thickness = np.random.default_rng(0).uniform(0.4, 1.5, (500, 1))
    pixels = (256.0 * np.exp(-thickness * direction) - 1.0).round().astype(np.uint8)
    assert stain_shares(pixels) == pytest.approx([0.25, 0.3], abs=0.005)
    white = np.full((500, 3), 255, np.uint8)
    assert stain_shares(np.concatenate([white, pixels])) == pytest.approx(stain_shares(pixels))
    assert stain_shares(white).tolist() == pytest.approx([1 / 3, 1 / 3])


def test_a_slide_is_one_unit_and_a_patch_of_no_slide_another(two: PatchStore) -> None:
    group = np.array(two.group)
    rows = two.development_rows()
    group[rows[:3]] = -1
    table = stain_table(replace(two, group=group), rows)
    n_slides = len(np.unique(group[rows[3:]]))
    assert table.is_slide.sum() == n_slides
    assert len(table.shares) == n_slides + 3
    assert not table.is_slide[table.unit[:3]].any()
