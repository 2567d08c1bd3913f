"""`worker`: everything but the place of the data comes from the study."""

from __future__ import annotations

from pathlib import Path

import pytest
from easy_set import write_easy_set
from typer.testing import CliRunner

from pcam_automl.cli import app
from pcam_automl.commands import join
from pcam_automl.commands.join import version_differences
from pcam_automl.errors import DataError, StudyError
from pcam_automl.search.reading import TRIALS_KEY, load_study, n_finished_of

pytestmark = pytest.mark.filterwarnings("ignore")
PINS = ["backbone=test_resnet", "crop_size=32", "batch_size=16"]


@pytest.fixture
def url(easy_pack: Path, tmp_path: Path) -> str:
    url = f"sqlite:///{tmp_path / 'studies' / 's.db'}"
    words = ["search", "--trials", "1", "--data", str(easy_pack), "--storage", url, "--views", "96", "--device", "cpu"]
    words += ["--weights", "none", *(word for pin in PINS for word in ("--set", pin))]
    assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0
    return url


def run(*words: str) -> str:
    result = CliRunner().invoke(app, ["worker", "--study", "pcam", "--device", "cpu", *words], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_a_worker_works_towards_the_studys_total_and_no_further(url: str) -> None:
    assert "0 trials finished here, 1 of 1 in all; the study is complete" in run("--storage", url)
    study, _ = load_study("pcam", url)
    study.set_user_attr(TRIALS_KEY, 3)
    assert "2 trials finished here, 3 of 3 in all; the study is complete" in run("--storage", url)
    assert n_finished_of(load_study("pcam", url)[0]) == 3


def test_other_data_are_refused_with_both_hashes(url: str, tmp_path: Path) -> None:
    write_easy_set(tmp_path / "other", n_train=60, seed=1)
    with pytest.raises(DataError, match=r"pack [0-9a-f]{12} at .*, the study has [0-9a-f]{12}"):
        run("--storage", url, "--data", str(tmp_path / "other"))


def test_a_study_without_a_total_is_refused_with_the_remedy(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(join, "TRIALS_KEY", "another")
    with pytest.raises(StudyError, match=r"neither a total of trials nor a budget.*search --storage .* --trials N"):
        run("--storage", url)


def test_there_must_be_such_a_study(url: str) -> None:
    with pytest.raises(StudyError, match="there is no study 'other'"):
        CliRunner().invoke(app, ["worker", "--storage", url, "--study", "other"], catch_exceptions=False)


def test_other_versions_are_named() -> None:
    (line,) = version_differences({"torch": "2.11.0", "timm": "1.0", "gone": "1"}, {"torch": "2.15.0", "timm": "1.0"})
    assert line.startswith("torch is 2.15.0 here, the study was made with 2.11.0")
