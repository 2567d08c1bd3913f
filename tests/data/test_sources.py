from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from data_builders import patch_id, tissue, write_csv, write_h5
from PIL import Image

from pcam_automl.data.sources import fingerprint, open_source
from pcam_automl.data.store import TEST, TRAIN, VALID
from pcam_automl.data.tables import is_id, read_ids, read_labels, read_names
from pcam_automl.errors import DataError


def test_kaggle_rows_are_train_by_id_then_test_in_sample_order(kaggle: Path) -> None:
    source = open_source(kaggle)
    train, test = source.part == TRAIN, source.part == TEST
    assert source.kind == "kaggle"
    assert source.ids[train].tolist() == sorted(patch_id(number) for number in range(8))
    assert source.ids[test].tolist() == [patch_id(number) for number in (1003, 1002, 1001, 1000)]
    labels = dict(zip(source.ids.tolist(), source.label.tolist(), strict=True))
    assert [labels[patch_id(number)] for number in range(8)] == [0, 1] * 4
    assert (source.label[test] == -1).all()
    assert source.notes == ()
    assert all((kaggle / name).is_file() for name in source.files)


def test_groups_and_domains_beside_the_labels_are_used_unasked_and_said(kaggle: Path) -> None:
    write_csv(kaggle / "train_groups.csv", "id,group", [(patch_id(number), f"s{number % 3}") for number in range(7)])
    write_csv(kaggle / "train_domains.csv", "id,domain", [(patch_id(number), "a") for number in range(8)])
    source = open_source(kaggle)
    assert dict(zip(source.ids.tolist(), source.group.tolist(), strict=True))[patch_id(4)] == "s1"
    assert source.domain[source.part == TRAIN].tolist() == ["a"] * 8
    assert any("3 groups for 7 training patches from train_groups.csv, found beside" in note for note in source.notes)
    assert any(note.startswith("1 training patches have no group") and patch_id(7) in note for note in source.notes)


def test_given_groups_win_over_those_beside_the_labels(kaggle: Path, tmp_path: Path) -> None:
    write_csv(kaggle / "train_groups.csv", "id,group", [(patch_id(number), "beside") for number in range(8)])
    write_csv(tmp_path / "mine.csv", "id,group", [(patch_id(number), "given") for number in range(8)])
    assert set(open_source(kaggle, groups=tmp_path / "mine.csv").group.tolist()) == {"given", ""}


def test_labels_without_images_and_images_without_labels_are_counted_and_named(kaggle: Path) -> None:
    rows = [(patch_id(number), 1) for number in range(3)] + [
        ("0" * 40, 0),
        *((f"absent{number}", 0) for number in range(6)),
    ]
    write_csv(kaggle / "train_labels.csv", "id,label", rows)
    source = open_source(kaggle)
    assert int((source.part == TRAIN).sum()) == 3
    assert any(note.startswith("7 labelled ids have no image") and "and 2 more" in note for note in source.notes)
    assert any(note.startswith("5 images in train/ have no label") for note in source.notes)
    assert any("every training label is 1" in note for note in source.notes)


def test_many_images_that_are_absent_may_be_a_folder_still_being_unpacked(kaggle: Path) -> None:
    (kaggle / "train" / f"{patch_id(0)}.tif").unlink()
    (note,) = (note for note in open_source(kaggle).notes if "labelled ids have no image" in note)
    assert "That is 12% of them" in note
    assert "wait until it is whole" in note
    rows = [(patch_id(number), number % 2) for number in range(1, 8)]
    images = [kaggle / "train" / f"many{number}.tif" for number in range(150)]
    for image in images:
        shutil.copy(kaggle / "train" / f"{patch_id(1)}.tif", image)
    rows += [(image.stem, 1) for image in images] + [("more", 0)]
    write_csv(kaggle / "train_labels.csv", "id,label", rows)
    (note,) = (note for note in open_source(kaggle).notes if "labelled ids have no image" in note)
    assert note == "1 labelled ids have no image in train/ and are left out: more", "less than a hundredth"


def test_an_archive_that_nobody_unpacked_is_named(kaggle: Path) -> None:
    shutil.rmtree(kaggle / "train")
    (kaggle / "train.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"no folder train/ with the images; unpack train\.zip into train/"):
        open_source(kaggle)


def test_slides_are_read_from_a_shared_table_as_it_is(kaggle: Path, tmp_path: Path) -> None:
    text = "id,wsi\n" + "".join(f"{patch_id(number)},camelyon16_{number % 3}\n" for number in range(8))
    (tmp_path / "patch_id_wsi_full.csv.gz").write_bytes(gzip.compress(text.encode()))
    source = open_source(kaggle, groups=tmp_path / "patch_id_wsi_full.csv.gz")
    assert dict(zip(source.ids.tolist(), source.group.tolist(), strict=True))[patch_id(4)] == "camelyon16_1"
    (tmp_path / "both.csv").write_text(f"id,wsi,group\n{patch_id(0)},w,g\n")
    assert read_names(tmp_path / "both.csv", "group")[1].tolist() == ["g"]
    with pytest.raises(DataError, match="no column 'domain'"):
        read_names(tmp_path / "both.csv", "domain")


def test_a_damaged_or_huge_gzip_table_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gzip.compress(b"id,group\n" + b"a,b\n" * 1000)
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(b"id,group\na,b\n") + gzip.compress(b"c,d\n") + b"\0\0")
    assert read_ids(tmp_path / "t.csv.gz").tolist() == ["a", "c"], "two files, one behind the other"
    for raw, words in (
        (whole[:-9], "ends too early"),
        (whole[:10] + b"\xff" * 40, "damaged gzip file"),
        (whole + b"more", "damaged gzip file"),
    ):
        (tmp_path / "t.csv.gz").write_bytes(raw)
        with pytest.raises(DataError, match=words):
            read_ids(tmp_path / "t.csv.gz")
    monkeypatch.setattr("pcam_automl.data.tables.MAX_TABLE_BYTES", 500)
    (tmp_path / "t.csv.gz").write_bytes(whole)
    with pytest.raises(DataError, match="holds more than 500 bytes"):
        read_ids(tmp_path / "t.csv.gz")


def test_no_label_with_an_image_is_an_error(kaggle: Path) -> None:
    write_csv(kaggle / "train_labels.csv", "id,label", [("a.tif", 0)])
    with pytest.raises(DataError, match=r"none of its 1 ids has an image .* \(labels name a.tif, the folder holds"):
        open_source(kaggle)


def test_sample_ids_without_an_image_are_kept_accessible(kaggle: Path) -> None:
    (kaggle / "test" / f"{patch_id(1001)}.tif").unlink()
    shutil.copy(kaggle / "train" / f"{patch_id(0)}.tif", kaggle / "test" / "extra.tif")
    source = open_source(kaggle)
    assert source.missing_test_ids == (patch_id(1001),)
    (note,) = (note for note in source.notes if "1 ids of sample_submission.csv have no image" in note)
    assert note.startswith("warning: ")
    assert "no submission without them" in note
    assert any("extra" in note and "not in sample_submission.csv" in note for note in source.notes)
    assert "extra" not in source.ids


def test_without_a_sample_the_test_folder_is_taken_sorted_and_without_a_test_folder_there_is_none(kaggle: Path) -> None:
    (kaggle / "sample_submission.csv").unlink()
    source = open_source(kaggle)
    assert source.ids[source.part == TEST].tolist() == sorted(patch_id(number) for number in range(1000, 1004))
    shutil.rmtree(kaggle / "test")
    assert not (open_source(kaggle).part == TEST).any()


def test_sample_of_another_name(kaggle: Path, tmp_path: Path) -> None:
    write_csv(tmp_path / "other.csv", "id,label", [(patch_id(1002), 0)])
    source = open_source(kaggle, sample=tmp_path / "other.csv")
    assert source.ids[source.part == TEST].tolist() == [patch_id(1002)]


@pytest.mark.parametrize("prefix", ["", "train/"])
def test_class_folders_give_labels_and_no_paths_in_ids(tmp_path: Path, prefix: str) -> None:
    for label in (0, 1):
        folder = tmp_path / f"{prefix}{label}"
        folder.mkdir(parents=True)
        for number in range(3):
            Image.fromarray(tissue(10 * label + number)).save(folder / f"p{label}{number}.png")
    source = open_source(tmp_path)
    assert source.ids.tolist() == ["p00", "p01", "p02", "p10", "p11", "p12"]
    assert source.label.tolist() == [0, 0, 0, 1, 1, 1]
    shutil.copy(tmp_path / f"{prefix}0" / "p00.png", tmp_path / f"{prefix}1" / "p00.png")
    with pytest.raises(DataError, match=r"1 ids lie in both 0/ and 1/ \(p00\)"):
        open_source(tmp_path)


def write_classes(root: Path, files: dict[str, int]) -> Path:
    for number, name in enumerate(files):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(tissue(files[name] or number)).save(root / name)
    return root


def test_what_is_not_packed_is_said(tmp_path: Path) -> None:
    names = ("0/a.png", "0/b.bmp", "0/c.webp", "1/d.png", "2/e.png", "10/f.png", "test/unknown/g.png")
    root = write_classes(tmp_path, dict.fromkeys(names, 0))
    (root / "0" / ".hidden").touch()
    source = open_source(root)
    assert source.ids.tolist() == ["a", "d"]
    assert source.notes == (
        "2 files in 0/ are no JPEG/JPG/PNG/TIF and are left out: b.bmp, c.webp",
        "the class folders 10, 2 are left out: the classes are 0 and 1",
        "test/ holds no image: there is nothing to predict for a submission; its folders are not looked into (unknown)",
    )
    write_classes(tmp_path, {"test/0/h.png": 0, "test/i.png": 0})
    source = open_source(root)
    assert source.ids.tolist() == ["a", "d", "h"]
    assert source.notes[2:] == ("1 images lie in test/ beside its class folders and are left out: i",)


def test_a_sample_is_refused_where_the_source_has_its_own_test_part(tmp_path: Path) -> None:
    write_csv(tmp_path / "sample.csv", "id,label", [("a", 0)])
    h5 = write_h5(tmp_path / "h5", {"train": 3, "test": 2})
    classes = write_classes(tmp_path / "classes", dict.fromkeys(("0/a.png", "1/b.png", "test/0/c.png"), 0))
    dense = write_classes(tmp_path / "dense", dict.fromkeys(("images/a.png", "masks/a.png"), 0))
    for root in (h5, classes, dense):
        open_source(root)
        with pytest.raises(DataError, match=r"--sample .*sample.csv: .* name their own test part.*leave it out"):
            open_source(root, sample=tmp_path / "sample.csv")


def test_a_table_names_no_test_patch_that_shares_its_id_with_a_training_patch(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "set", dict.fromkeys(("0/a.png", "1/b.png", "test/0/a.png", "test/1/c.png"), 0))
    write_csv(root / "train_groups.csv", "id,group", [("a", "s1"), ("b", "s2"), ("c", "s3")])
    source = open_source(root)
    assert list(zip(source.ids.tolist(), source.group.tolist(), strict=True)) == [
        ("a", "s1"),
        ("b", "s2"),
        ("a", ""),
        ("c", "s3"),
    ]


def test_names_that_reach_no_training_patch_say_why(kaggle: Path, tmp_path: Path) -> None:
    table = tmp_path / "groups.csv"
    write_csv(table, "id,group", [(f"{patch_id(0)}.tif", "s1")])
    with pytest.raises(
        DataError, match=rf"it names {patch_id(0)}\.tif, the folder holds {min(map(patch_id, range(8)))}"
    ):
        open_source(kaggle, groups=table)
    write_csv(table, "id,group", [(patch_id(0), "")])
    with pytest.raises(DataError, match="every group there is empty"):
        open_source(kaggle, groups=table)


@pytest.mark.parametrize(("prefix", "valid"), [("", "valid/"), ("train/", "valid/"), ("train/", "val/"), ("", "val/")])
def test_a_validation_folder_is_kept_and_shares_no_id(tmp_path: Path, prefix: str, valid: str) -> None:
    for folder, numbers in ((f"{prefix}0", (0, 1)), (f"{prefix}1", (2, 3)), (f"{valid}0", (4,)), (f"{valid}1", (5,))):
        (tmp_path / folder).mkdir(parents=True)
        for number in numbers:
            Image.fromarray(tissue(number)).save(tmp_path / folder / f"p{number}.png")
    source = open_source(tmp_path)
    assert source.ids[source.part == VALID].tolist() == ["p4", "p5"]
    assert not any("warning" in note for note in source.notes)
    (tmp_path / f"{valid}1" / "p5.png").rename(tmp_path / "p5.png")
    assert any(
        note.startswith("warning: the validation part holds patches of label 0 only")
        for note in open_source(tmp_path).notes
    )
    (tmp_path / "p5.png").rename(tmp_path / f"{valid}1" / "p5.png")
    shutil.copy(tmp_path / f"{prefix}0" / "p0.png", tmp_path / f"{valid}1" / "p0.png")
    with pytest.raises(DataError, match=r"1 ids are in the training and in the validation part \(p0\)"):
        open_source(tmp_path)


@pytest.mark.parametrize("packed", [False, True])
def test_h5_keeps_official_splits_slides_and_test_labels(tmp_path: Path, packed: bool) -> None:
    source = open_source(write_h5(tmp_path / "h5", {"train": 6, "valid": 3, "test": 4}, packed=packed))
    assert source.kind == "h5"
    assert source.part.tolist() == [TRAIN] * 6 + [VALID] * 3 + [TEST] * 4
    assert source.ids[[0, 6, 12]].tolist() == ["train_000000", "valid_000000", "test_000003"]
    assert source.group[:4].tolist() == ["slide_0", "slide_1", "slide_2", "slide_0"]
    assert set(source.label.tolist()) == {0, 1}
    assert source.files[6:9].tolist() == [0, 1, 2]


def test_h5_without_labels_or_with_broken_ones_is_one_line(tmp_path: Path) -> None:
    root = write_h5(tmp_path / "h5", {"train": 4}, packed=True)
    labels = root / "camelyonpatch_level_2_split_train_y.h5.gz"
    labels.write_bytes(labels.read_bytes()[:40])
    with pytest.raises(DataError, match="cannot be inflated"):
        open_source(root)
    labels.write_bytes(gzip.compress(b"no hdf5"))
    with pytest.raises(DataError, match="not a readable HDF5 file"):
        open_source(root)
    labels.unlink()
    with pytest.raises(DataError, match="has no labels beside it"):
        open_source(root)


def test_missing_and_foreign_folders_say_what_was_looked_for_and_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not exist .*kaggle competitions download .*quickstart"):
        open_source(tmp_path / "absent")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"train_labels.csv .*0/ and 1/.*camelyonpatch.*it holds notes.txt"):
        open_source(tmp_path)
    write_csv(tmp_path / "train_labels.csv", "id,label", [("a", 0)])
    with pytest.raises(DataError, match="no folder train/"):
        open_source(tmp_path)


def test_one_id_in_two_files_is_an_error(kaggle: Path) -> None:
    (kaggle / "train" / f"{patch_id(0)}.png").write_bytes(b"")
    with pytest.raises(DataError, match=f"1 ids in more than one file \\({patch_id(0)}\\)"):
        open_source(kaggle)


def test_unprintable_file_names_are_left_out_and_counted(kaggle: Path) -> None:
    (kaggle / "train" / "a\nb.tif").write_bytes(b"")
    (kaggle / "train" / os.fsdecode(b"caf\xe9.tif")).write_bytes(b"")
    assert any(note.startswith("2 files in train/") for note in open_source(kaggle).notes)


def test_fingerprint_follows_names_sizes_and_times(kaggle: Path) -> None:
    first = fingerprint(open_source(kaggle))
    assert fingerprint(open_source(kaggle)) == first
    file = kaggle / "train" / f"{patch_id(3)}.tif"
    os.utime(file, ns=(1, 1))
    touched = fingerprint(open_source(kaggle))
    assert touched != first
    write_csv(kaggle / "train_groups.csv", "id,group", [(patch_id(0), "a")])
    source = open_source(kaggle)
    assert fingerprint(source) != touched
    file.unlink()
    with pytest.raises(DataError, match="has gone"):
        fingerprint(source)


# tables ------------------------------------------------------------------------------------------------------------


def test_ids_stay_text(tmp_path: Path) -> None:
    ids = ["000123", "1e5", "9" * 40, "NA", "nan", "True", "1_000"]
    write_csv(tmp_path / "t.csv", "id,label", [(name, 1) for name in ids])
    assert read_labels(tmp_path / "t.csv")[0].tolist() == ids


def test_byte_order_mark_crlf_and_further_columns_are_fine(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbflabel,id,more\r\n1.0,a,x\r\n0,b,y\r\n")
    ids, labels = read_labels(tmp_path / "t.csv")
    assert ids.tolist() == ["a", "b"]
    assert labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "is empty"),
        (b"id,label\n", "no rows"),
        (b"id,lable\na,1\n", r"no column 'label' \(did you mean 'lable'\?\)"),
        (b"a,1\nb,0\n", "no column 'id', 'label'"),
        (b"id,label\na,1\na,0\nb,1\n", r"1 ids are given more than once \(a\)"),
        (b"id,label\na,2\nb,\nc,x\n", r"3 labels are not 0 or 1 \('a': '2', 'b': '', 'c': 'x'\)"),
        (b"id,label\n../x,1\n/abs,0\na\\b,1\n,0\n..,1\n", "5 ids are empty, paths or unprintable"),
        (b"id,label\na\0b,1\n", "1 ids are empty, paths or unprintable"),
        (b"id,label\n../x,7\n../x,7\n", "2 ids are .*1 ids are given more.*2 labels are not"),
        (b"id,label\ncaf\xe9,1\n", "not UTF-8"),
        (b"id,label\na,1,2,3\n", "not a comma-separated table"),
        (b'id,label\n"a,1\n', "not a comma-separated table"),
        (b"\n\r\n", "is empty"),
        (b"id,label\n" + b"a" * 200_000 + b",1\n", "not a comma-separated table"),
        (b"\x89PNG\r\n\x1a\n\0\0", "not UTF-8"),
    ],
)
def test_a_bad_table_is_one_clear_line(tmp_path: Path, text: bytes, words: str) -> None:
    (tmp_path / "t.csv").write_bytes(text)
    with pytest.raises(DataError, match=words) as caught:
        read_labels(tmp_path / "t.csv")
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "t.csv") in str(caught.value)


def test_quotes_and_empty_lines_are_those_of_csv(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('id,group\n\n"a","s,1"\n\nb,"say ""x"""\n')
    ids, names = read_names(tmp_path / "t.csv", "group")
    assert ids.tolist() == ["a", "b"]
    assert names.tolist() == ["s,1", 'say "x"']


def test_reading_a_kaggle_folder_imports_no_pandas(kaggle: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pcam_automl.data.sources import open_source\n"
        "open_source(Path(sys.argv[1])); sys.exit('pandas' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(kaggle)], check=False).returncode == 0


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_ids(tmp_path / "t.csv")
    with pytest.raises(DataError, match="cannot be read"):
        read_ids(tmp_path)


def test_spaces_around_an_id_are_no_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("label, id\n1, a\n0, b \n")
    ids, labels = read_labels(tmp_path / "t.csv")
    assert (ids.tolist(), labels.tolist()) == (["a", "b"], [1, 0])
    (tmp_path / "t.csv").write_text("id,group\na,s1\na ,s2\n")
    with pytest.raises(DataError, match=r"1 ids are given more than once \(a\)"):
        read_names(tmp_path / "t.csv", "group")


def test_names_may_be_empty_and_ids_not(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("id,group\na,s1\nb,\nc\n")
    ids, names = read_names(tmp_path / "t.csv", "group")
    assert ids.tolist() == ["a", "b", "c"]
    assert names.tolist() == ["s1", "", ""]
    assert not is_id("")


def test_a_table_of_kaggles_size_is_read_in_about_a_second(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(
        "id,label\n" + "".join(f"{number:040x},{number % 2}\n" for number in range(220_025))
    )
    start = time.process_time()
    ids, labels = read_labels(tmp_path / "t.csv")
    assert time.process_time() - start < 4
    assert len(ids) == 220_025
    assert labels.sum() == 110_012


def test_genuine_labels_and_full_size_sample_are_read(genuine_kaggle: Path) -> None:
    sample = genuine_kaggle / "full_scale" / "sample_submission.csv"
    assert len(read_ids(sample)) == 57_458
    source = open_source(genuine_kaggle, sample=sample)
    assert int((source.part == TEST).sum()) + len(source.missing_test_ids) == 57_458
    assert int((source.part == TRAIN).sum()) == 112
