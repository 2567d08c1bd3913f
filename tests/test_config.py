"""Where things are found, durations, contradictions."""

from __future__ import annotations

from pathlib import Path

import pytest

from pcam_automl.config import check_study_name, check_unchanged, find_data, parse_duration, storage_url, studies_folder
from pcam_automl.errors import DataError, InputError, StudyError
from pcam_automl.search.storage_url import sqlite_path


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("30m", 1800), ("1h30m", 5400), ("2d", 172800), ("1.5h", 5400), ("1m30", 90)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-5m", "m", "ten", "5 m x", "1x", "nan"])
def test_bad_durations_are_named(text: str) -> None:
    with pytest.raises(InputError, match="duration must be positive"):
        parse_duration(text)


def test_the_home_folder_in_a_url_is_the_database_s_and_its_files_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    url = storage_url("sqlite:///~/studies/pcam.db")
    assert (sqlite_path(url), studies_folder(url)) == (tmp_path / "studies" / "pcam.db", tmp_path / "studies")
    assert storage_url("sqlite:///~x/pcam.db") == "sqlite:///~x/pcam.db"


@pytest.mark.parametrize("name", ["", "a/b", "..", "-x", "a b", "x" * 101, "packs"])
def test_study_names_are_folder_names(name: str) -> None:
    with pytest.raises(StudyError, match="--study must be"):
        check_study_name(name)


def test_data_is_looked_for_in_order(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"kaggle competitions download .*quickstart"):
        find_data(None)
    for name in ("a", "b", "c", "data/pack", "histopathologic-cancer-detection"):
        (in_tmp / name).mkdir(parents=True)
    assert find_data(None) == in_tmp / "data/pack"
    assert find_data(None, str(in_tmp / "c")) == in_tmp / "c"
    monkeypatch.setenv("PCAM_AUTOML_DATA", str(in_tmp / "b"))
    assert find_data(None, str(in_tmp / "c")) == in_tmp / "b"
    assert find_data(Path("a"), str(in_tmp / "c")) == in_tmp / "a"
    with pytest.raises(DataError, match="does not exist"):
        find_data(Path("nowhere"))


def test_contradictions_name_both_values() -> None:
    check_unchanged({"seed": 0}, {"seed": None}, "s")
    check_unchanged({"seed": 0}, {"seed": 0}, "s")
    with pytest.raises(StudyError, match=r"--seed is 3, the study has 0; --holdout is 0.1, the study has 0.2"):
        check_unchanged({"seed": 0, "holdout": 0.2}, {"seed": 3, "holdout": 0.1}, "s")


def test_studies_lie_beside_their_sqlite_file(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert storage_url(None) == "sqlite:///studies/pcam.db"
    assert studies_folder(storage_url(None)) == in_tmp / "studies"
    assert studies_folder("sqlite:///x/y.db") == in_tmp / "x"
    assert studies_folder("sqlite+pysqlite:///x/y.db?timeout=5") == in_tmp / "x"
    percent = "sqlite:///my%20x/y.db"
    assert studies_folder(percent) == (in_tmp / str(sqlite_path(percent))).parent, "whatever SQLAlchemy makes of it"
    assert studies_folder("postgresql://h/db") == in_tmp / "studies"
    monkeypatch.setenv("PCAM_AUTOML_STORAGE", "postgresql://h/db")
    assert storage_url(None) == "postgresql://h/db"
