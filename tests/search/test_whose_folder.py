"""Two storages with a study of one name do not write into one folder."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import torch
from easy_set import write_easy_set
from typer.testing import CliRunner

from pcam_automl.cli import app
from pcam_automl.errors import StudyError
from pcam_automl.search.create import create_or_open_study
from pcam_automl.search.objective import Objective
from pcam_automl.search.storage import open_storage
from pcam_automl.search.study import Asked, OpenStudy, open_study
from pcam_automl.search.turns import Limits
from pcam_automl.search.whose_folder import FILE, ID_KEY
from pcam_automl.search.worker import run_worker

pytestmark = pytest.mark.filterwarnings("ignore")


def made(asked: Asked, url: str) -> OpenStudy:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    opened = create_or_open_study("pcam", url, replace(asked, views=64), say=lambda text: None)
    torch.set_num_threads(1)
    return opened


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_second_storage_beside_the_first_is_refused_and_the_first_goes_on(asked: Asked, tmp_path: Path) -> None:
    first, second = f"sqlite:///{tmp_path}/a.db", f"sqlite:///{tmp_path}/b.db"
    opened = made(asked, first)
    run_worker(Objective(opened, torch.device("cpu")), Limits(1))
    before = contents(opened.folder)
    write_easy_set(tmp_path / "other", n_train=60, seed=1)
    with pytest.raises(StudyError, match=rf"pcam belongs to the study of that name in {first}; take another --study"):
        made(replace(asked, data=tmp_path / "other"), second)
    assert "pcam" not in optuna.get_all_study_names(open_storage(second))
    assert contents(opened.folder) == before
    again = open_study("pcam", first)
    assert run_worker(Objective(again, torch.device("cpu")), Limits(2)).n_finished == 1


def test_a_folder_that_another_storage_took_is_refused_and_status_says_so(asked: Asked, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        run_worker(Objective(made(asked, f"sqlite:///{folder}/s.db"), torch.device("cpu")), Limits(1))
    shutil.rmtree(here / "pcam")
    shutil.copytree(there / "pcam", here / "pcam")
    with pytest.raises(StudyError, match=r"pcam belongs to the study of that name in .*there/s\.db"):
        open_study("pcam", f"sqlite:///{here}/s.db")
    for words in (["status"], ["status", "--check"]):
        told = CliRunner().invoke(app, [*words, "--storage", f"sqlite:///{here}/s.db"])
        assert told.exit_code == (1 if "--check" in words else 0)
        assert "belongs to the study of that name in" in told.output
    shutil.rmtree(here / "pcam")
    again = open_study("pcam", f"sqlite:///{here}/s.db")  # a machine that has never seen it
    assert (again.folder / FILE).is_file()


def test_a_deleted_study_may_be_made_again_and_one_without_an_id_is_opened_as_before(
    asked: Asked, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    first = made(asked, url)
    old = first.study.user_attrs[ID_KEY]
    optuna.delete_study(study_name="pcam", storage=open_storage(url))
    second = made(asked, url)
    assert second.study.user_attrs[ID_KEY] != old
    second.study.set_user_attr(ID_KEY, None)  # as studies of older versions are
    (second.folder / FILE).unlink()
    assert open_study("pcam", url).split.hash == second.split.hash
