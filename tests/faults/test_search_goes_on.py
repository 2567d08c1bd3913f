"""What befalls a search from outside while it runs: a disk that fills, data that disappear or may not be written to, a clock
that jumps. It ends with one line or goes on, and the study is sound either way.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import torch
from easy_set import write_easy_set
from full_disk import full_disk
from optuna.trial import TrialState

from pcam_automl.errors import DataError
from pcam_automl.search.budget import BudgetClock
from pcam_automl.search.create import create_or_open_study
from pcam_automl.search.ledger import Ledger, spent_s
from pcam_automl.search.objective import Objective, Watch
from pcam_automl.search.reading import n_finished_of
from pcam_automl.search.slots import Slots
from pcam_automl.search.soundness import check_study
from pcam_automl.search.storage import engine_of
from pcam_automl.search.study import Asked, OpenStudy
from pcam_automl.search.turns import Limits
from pcam_automl.search.worker import run_worker

N = 3
PINS = {"backbone": "mobilenetv3_small_050", "crop_size": 32, "batch_size": 16}
SPACE_LEFT = 2 * 2**20
"""Bytes that a file may have on the full disk: the database's log fits in, a checkpoint's 2.3 MB do not."""


@pytest.fixture
def asked(easy_pack: Path) -> Asked:
    return Asked(data=easy_pack, weights="none", views=96, pins=PINS, device="cpu")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    torch.set_num_threads(1)


def opened_with(asked: Asked) -> OpenStudy:
    opened = create_or_open_study("tiny", "sqlite:///studies/s.db", asked, say=lambda text: None)
    torch.set_num_threads(1)
    return opened


def check_sound(opened: OpenStudy, n: int = N) -> None:
    found = check_study(
        opened.study.get_trials(), Slots(engine_of(opened.study), opened.name).all(), opened.checkpoints, total=n
    )
    assert found.faults == ()
    assert n_finished_of(opened.study) == n


def test_a_disk_that_fills_ends_the_search_with_a_line_and_it_goes_on_once_there_is_space(asked: Asked) -> None:
    opened = opened_with(asked)
    run_worker(Objective(opened, torch.device("cpu")), Limits(1))
    with (
        full_disk(SPACE_LEFT),
        pytest.raises(DataError, match=r"no space left to write .*checkpoints.*free some") as told,
    ):
        run_worker(Objective(opened, torch.device("cpu")), Limits(N))
    assert "\n" not in str(told.value)
    assert list(Path("studies").rglob(".*.partial")) == [], "nothing half-written"
    trials = opened.study.get_trials()
    assert [trial.state for trial in trials[1:]] == [TrialState.FAIL], "one is interrupted, no other begins"
    assert trials[-1].user_attrs["reason"].startswith("interrupted: no space left")
    assert n_finished_of(opened.study) < N

    again = opened_with(Asked())
    assert run_worker(Objective(again, torch.device("cpu")), Limits(N)).why == "done"
    check_sound(again)


def test_raw_data_that_disappear_during_a_trial_end_nothing_and_the_next_start_says_what_is_missing(
    asked: Asked, tmp_path: Path
) -> None:
    raw = write_easy_set(tmp_path / "raw")
    opened = opened_with(replace(asked, data=raw))

    def vanish(number: int, recipe: object, views: int) -> None:
        shutil.rmtree(raw, ignore_errors=True)

    objective = Objective(opened, torch.device("cpu"), watch=Watch(begins=vanish))
    assert run_worker(objective, Limits(N)).why == "done"  # trials read the pack
    check_sound(opened)
    with pytest.raises(DataError, match="raw"):
        opened_with(Asked(data=raw))


def test_a_pack_that_disappears_during_a_trial_ends_nothing_and_the_next_start_makes_it_anew(
    asked: Asked, tmp_path: Path
) -> None:
    raw = write_easy_set(tmp_path / "raw")
    opened = opened_with(replace(asked, data=raw))
    folders = list(Path("studies/packs").glob("[0-9a-f]*"))
    assert len(folders) == 1

    def vanish(number: int, recipe: object, views: int) -> None:
        shutil.rmtree(folders[0], ignore_errors=True)

    objective = Objective(opened, torch.device("cpu"), watch=Watch(begins=vanish))
    assert run_worker(objective, Limits(N)).why == "done"  # the mapping outlives the file's name
    check_sound(opened)
    again = opened_with(Asked())
    assert folders[0].is_dir()
    assert run_worker(Objective(again, torch.device("cpu")), Limits(N + 1)).n_finished == 1
    check_sound(again, N + 1)


def test_a_clock_that_jumps_changes_neither_totals_nor_budgets(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """``time.time`` goes back and forth by days; budgets and patience go by the monotonic clock."""
    opened = opened_with(replace(asked, budget_s=600.0))
    real, jumps = time.time, iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: real() + 86_400.0 * (-3, 5, 0, -40)[next(jumps) % 4])
    began = time.monotonic()
    ledger = Ledger(opened.study, "search", since=began)
    clock = BudgetClock(600.0, 0.0, began, len(opened.split.order), None)
    objective = Objective(opened, torch.device("cpu"))
    end = run_worker(objective, Limits(N, clock=clock))
    ledger.note()
    monkeypatch.undo()
    took = time.monotonic() - began
    assert end.why == "done"  # the total is reached, with time left
    assert next(jumps) > 10
    assert 0.5 * took < ledger.seconds < took + 1
    assert spent_s(opened.study) == pytest.approx(ledger.seconds, abs=1.0)
    check_sound(opened)


def test_data_folders_are_left_as_they_are(asked: Asked, tmp_path: Path) -> None:
    """A read-only folder will do: nothing is written into it (root may write anywhere, so what changes is looked at)."""
    raw = write_easy_set(tmp_path / "raw")

    def state() -> dict[str, tuple[int, int]]:
        found = {str(path): path.stat() for path in [raw, *sorted(raw.rglob("*"))]}
        return {name: (one.st_mtime_ns, one.st_size) for name, one in found.items()}

    before = state()
    opened = opened_with(replace(asked, data=raw))
    run_worker(Objective(opened, torch.device("cpu")), Limits(1))
    assert state() == before
