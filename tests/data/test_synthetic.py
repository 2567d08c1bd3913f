from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image
from sklearn.ensemble import HistGradientBoostingClassifier

from pcam_automl.data.sources import open_source
from pcam_automl.data.synthetic import write_synthetic
from pcam_automl.errors import DataError
from pcam_automl.metrics import auc

N_PATCHES, N_SLIDES = 240, 16
CENTRE = slice(32, 64)


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthetic") / "set"
    write_synthetic(out, n_patches=N_PATCHES, n_slides=N_SLIDES, seed=3)
    return out


def column(root: Path, part: str, name: str) -> pd.Series:
    return pd.read_csv(root / f"{part}_{name}s.csv", index_col="id")[name]


def masks(root: Path, part: str) -> dict[str, np.ndarray]:
    return {path.stem: np.asarray(Image.open(path)) for path in (root / "masks" / part).iterdir()}


def patches(root: Path, part: str) -> np.ndarray:
    return np.stack([tifffile.imread(path) for path in sorted((root / part).iterdir())])


def hashes(root: Path) -> dict[str, str]:
    files = [path for path in root.rglob("*") if path.is_file()]
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_kaggle_source_reads_it_with_its_slides_and_domains(synthetic: Path) -> None:
    source = open_source(synthetic)
    assert len(source) == N_PATCHES
    names = pd.concat(
        [column(synthetic, "train", "group"), column(synthetic, "train", "domain").rename("domain")], axis=1
    )
    train = source.part == 0
    assert list(source.group[train]) == list(names["group"])
    assert list(source.domain[train]) == list(names["domain"])


@pytest.mark.parametrize("part", ["train", "test"])
def test_images_masks_and_tables_name_the_same_patches_in_sorted_order(synthetic: Path, part: str) -> None:
    ids = list(column(synthetic, part, "label").index)
    assert ids == sorted(ids)
    assert {path.stem for path in (synthetic / part).iterdir()} == set(ids) == set(masks(synthetic, part))
    assert ids == list(column(synthetic, part, "group").index) == list(column(synthetic, part, "domain").index)
    assert all(re.fullmatch("[0-9a-f]{40}", name) for name in ids)


def test_sample_submission_names_the_test_patches_and_no_label(synthetic: Path) -> None:
    sample = pd.read_csv(synthetic / "sample_submission.csv")
    assert list(sample.columns) == ["id", "label"]
    assert list(sample["id"]) == list(column(synthetic, "test", "label").index)
    assert (sample["label"] == 0).all()


def test_images_are_uncompressed_one_strip_tiffs_with_one_header(synthetic: Path) -> None:
    paths = sorted((synthetic / "train").iterdir())
    heads = set()
    for path in paths:
        with tifffile.TiffFile(path) as file:
            page = file.pages[0]
            assert (page.shape, page.dtype, page.compression, len(page.dataoffsets)) == ((96, 96, 3), np.uint8, 1, 1)
            heads.add(path.read_bytes()[: page.dataoffsets[0]])
    assert len(heads) == 1


@pytest.mark.parametrize("part", ["train", "test"])
def test_positive_is_tumour_in_the_centre(synthetic: Path, part: str) -> None:
    label, mask = column(synthetic, part, "label"), masks(synthetic, part)
    for name, value in label.items():
        assert (mask[str(name)][CENTRE, CENTRE].max() == 255) == bool(value)
        assert set(np.unique(mask[str(name)])) <= {0, 255}


def test_shares_of_positives_test_patches_and_tumour_outside_the_centre(synthetic: Path) -> None:
    label, mask = column(synthetic, "train", "label"), masks(synthetic, "train")
    assert len(column(synthetic, "test", "label")) == round(0.2 * N_PATCHES)
    for part in ("train", "test"):
        assert 0.3 < column(synthetic, part, "label").mean() < 0.5
    with_tumour = [mask[str(name)].any() for name in label.index[label == 0]]
    assert 0.25 < np.mean(with_tumour) < 0.55


def test_test_slides_are_new_and_the_second_domain_is_rarer_in_train(synthetic: Path) -> None:
    train, test = column(synthetic, "train", "group"), column(synthetic, "test", "group")
    assert not set(train) & set(test)
    assert len(set(train) | set(test)) == N_SLIDES
    rare = {}
    for part, group in (("train", train), ("test", test)):
        table = pd.DataFrame({"group": group, "domain": column(synthetic, part, "domain")}).drop_duplicates()
        assert table["group"].is_unique  # a slide has one scanner
        rare[part] = (table["domain"] == "scanner_b").mean()
    assert rare == {"train": 0.25, "test": 0.5}


def test_ids_tell_neither_label_nor_slide(synthetic: Path) -> None:
    label, group = column(synthetic, "train", "label"), column(synthetic, "train", "group")
    runs = (np.diff(label.to_numpy()) != 0).mean()
    assert 0.35 < runs < 0.6  # 2 x 0.4 x 0.6 = 0.48 in a random order
    assert (group.to_numpy()[1:] == group.to_numpy()[:-1]).mean() < 0.25


def test_tissue_is_violet_and_pink_and_nuclei_are_darker_than_their_surroundings(synthetic: Path) -> None:
    images = patches(synthetic, "train").astype(float)
    mean = images.mean(axis=(0, 1, 2))
    assert mean[0] > mean[1] < mean[2]  # stains absorb green most
    assert 120 < mean.mean() < 210
    tumour = np.stack([masks(synthetic, "train")[path.stem] for path in sorted((synthetic / "train").iterdir())]) > 0
    assert images[tumour].mean() < images[~tumour].mean()


def test_domains_and_slides_differ_in_colour_more_than_by_chance(synthetic: Path) -> None:
    blue_over_red = np.log(patches(synthetic, "train") + 1.0).mean(axis=(1, 2)) @ np.array([-1.0, 0.0, 1.0])
    domain, group = column(synthetic, "train", "domain"), column(synthetic, "train", "group")
    value = pd.Series(blue_over_red, index=domain.index)
    means = value.groupby(domain).mean()
    assert means["scanner_a"] > means["scanner_b"] + 0.1
    first = value[domain == "scanner_a"]
    of_slide = first.groupby(group).mean()
    assert of_slide.std() > 2 * first.std() / np.sqrt(len(first) / len(of_slide))


def test_no_two_patches_are_equal(synthetic: Path) -> None:
    images = [path.read_bytes() for part in ("train", "test") for path in (synthetic / part).iterdir()]
    assert len(set(images)) == N_PATCHES


def test_the_same_arguments_give_the_same_bytes_and_another_seed_none(tmp_path: Path) -> None:
    for name, seed in (("one", 5), ("two", 5), ("three", 6)):
        write_synthetic(tmp_path / name, n_patches=80, n_slides=8, seed=seed)
    one, two, three = (hashes(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two
    images, others = ({(k, v) for k, v in found.items() if k.endswith(".tif")} for found in (one, three))
    assert len(images) == 80
    assert not {k for k, _ in images} & {k for k, _ in others}
    assert not {v for _, v in images} & {v for _, v in others}


def test_progress_counts_every_patch_once(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    write_synthetic(tmp_path / "set", n_patches=81, n_slides=8, seed=0, progress=lambda *call: calls.append(call))
    done = [call[0] for call in calls]
    assert done == sorted(set(done))
    assert calls[-1] == (81, 81)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_slides": 7}, "slides must be at least 8.*got 7"),
        ({"n_patches": 79}, "at least 10 a slide, that is 80 for 8 slides, got 79"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
    ],
)
def test_arguments_out_of_range_are_refused_before_anything_is_written(
    tmp_path: Path, wrong: dict[str, int], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        write_synthetic(tmp_path / "set", **({"n_patches": 80, "n_slides": 8, "seed": 0} | wrong))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_empty_and_a_file_are_left_alone(tmp_path: Path) -> None:
    kept = tmp_path / "kept.txt"
    kept.write_text("mine")
    with pytest.raises(DataError, match="is not empty; name a new folder"):
        write_synthetic(tmp_path, n_patches=80, n_slides=8, seed=0)
    with pytest.raises(DataError, match="is a file"):
        write_synthetic(kept, n_patches=80, n_slides=8, seed=0)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_a_writing_that_fails_leaves_no_half_set(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_synthetic(tmp_path / "set", n_patches=80, n_slides=8, seed=0, progress=stop)
    assert not list(tmp_path.iterdir())


def colour_features(images: np.ndarray) -> np.ndarray:
    """Channel means, deviations and 16-bin histograms of patch and centre."""
    features = []
    for pixels in (images, images[:, CENTRE, CENTRE]):
        flat = pixels.reshape(len(images), -1, 3)
        features += [flat.mean(axis=1), flat.std(axis=1)]
        features += [np.stack([np.bincount(row, minlength=16) for row in flat[:, :, c] >> 4]) for c in range(3)]
    return np.concatenate(features, axis=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 2])
def test_colour_alone_does_not_solve_it(tmp_path: Path, seed: int) -> None:
    write_synthetic(tmp_path / "set", n_patches=4000, n_slides=24, seed=seed)
    x, test_x = (colour_features(patches(tmp_path / "set", part)) for part in ("train", "test"))
    y, test_y = (column(tmp_path / "set", part, "label").to_numpy() for part in ("train", "test"))
    model = HistGradientBoostingClassifier(random_state=0).fit(x, y)
    assert 0.55 < auc(test_y, model.predict_proba(test_x)[:, 1]) < 0.75  # measured 0.69 to 0.72
