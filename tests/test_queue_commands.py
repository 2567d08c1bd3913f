"""`submit`, `worker` without a study, `status --all`: a queue in the storage, served by priority."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
from typer.testing import CliRunner

from pcam_automl.cli import app
from pcam_automl.commands import queue
from pcam_automl.errors import DeviceFailed, InputError, SearchFailed, StudyError
from pcam_automl.search.create import SERVED_START_S
from pcam_automl.search.overview import StudyLine, overview
from pcam_automl.search.reading import load_study, n_finished_of
from pcam_automl.search.storage import open_storage
from pcam_automl.search.study import open_study

pytestmark = pytest.mark.filterwarnings("ignore")
PINS = ["backbone=test_resnet", "crop_size=32", "batch_size=16"]


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "IDLE_S", 0.1)
    monkeypatch.setattr(queue, "WATCH_S", 0.2)
    monkeypatch.setattr(queue.QueueWatch, "grace_s", 1.0)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'studies' / 's.db'}"


def call(*words: str) -> str:
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def submit(url: str, data: Path, name: str, trials: int, *more: str) -> str:
    words = ["submit", "--study", name, "--trials", str(trials), "--data", str(data), "--storage", url]
    words += ["--views", "96", "--device", "cpu", "--weights", "none"]
    return call(*words, *(word for pin in PINS for word in ("--set", pin)), *more)


def test_a_queue_is_served_by_priority_until_it_is_idle(
    easy_pack: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = submit(url, easy_pack, "later", 1)
    assert "study later is in the queue of sqlite:///" in said
    submit(url, easy_pack, "urgent", 2, "--priority", "3")
    table = call("status", "--all", "--storage", url)
    assert table.index("urgent") < table.index("later")
    assert "0 of 2" in table
    out = call("worker", "--storage", url, "--device", "cpu", "--until-idle")
    assert "has work left: 3 trials finished here" in out
    assert out.index("study urgent: 2 trials finished here") < out.index("study later: 1 trials finished here")
    lines = json.loads(CliRunner().invoke(app, ["status", "--all", "--json", "--storage", url]).stdout)
    assert [(line["name"], line["slots"], line["wants_workers"]) for line in lines] == [
        ("urgent", {"done": 2}, False),
        ("later", {"done": 1}, False),
    ]
    assert all(0.0 <= line["best"] <= 1.0 for line in lines)


def test_a_worker_leaves_a_study_for_a_more_urgent_one(
    easy_pack: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(url, easy_pack, "slow", 3)
    real, asked = queue.next_study, []

    def next_study(lines: list[StudyLine], **options: Any) -> StudyLine | None:
        asked.append(len(lines))
        if len(asked) == 3:  # before the second trial of the first study
            submit(url, easy_pack, "urgent", 1, "--priority", "1")
            storage = open_storage(url)
            lines = overview(storage.engine)
            storage.engine.dispose()
        return real(lines, **options)

    monkeypatch.setattr(queue, "next_study", next_study)
    out = call("worker", "--storage", url, "--device", "cpu", "--until-idle")
    assert "a study of higher priority waits" in out
    first, urgent, rest = (
        out.index(text)
        for text in (
            "study slow: 1 trials finished here",
            "study urgent: 1 trials finished here",
            "study slow: 2 trials finished here",
        )
    )
    assert first < urgent < rest
    assert n_finished_of(load_study("slow", url)[0]) == 3


def test_a_study_whose_data_are_gone_does_not_hold_up_the_others(easy_pack: Path, url: str, tmp_path: Path) -> None:
    moved = tmp_path / "pack"
    moved.mkdir()
    for file in easy_pack.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    submit(url, moved, "lost", 1, "--priority", "1")
    submit(url, easy_pack, "fine", 1)
    moved.rename(tmp_path / "elsewhere")
    ended = CliRunner().invoke(app, ["worker", "--storage", url, "--device", "cpu", "--until-idle"])
    out = " ".join(ended.output.split())
    assert out.count("study lost: data: ") == queue.FAULTS_OF_A_STUDY
    assert "left to other workers" in out
    assert "study fine: 1 trials finished here" in out
    assert isinstance(ended.exception, SearchFailed)
    assert "failed at 1 studies that have work left (lost; why is said above)" in str(ended.exception)


def test_a_worker_whose_time_is_up_says_so(easy_pack: Path, url: str) -> None:
    submit(url, easy_pack, "one", 3)
    out = call("worker", "--storage", url, "--device", "cpu", "--timeout", "0.001s")
    n = n_finished_of(load_study("one", url)[0])  # a quick machine begins one within that time
    assert f"time is up: {n} trials finished here" in out
    assert "has work left" not in out


def test_a_worker_whose_gpu_failed_ends_whatever_the_study(
    easy_pack: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(url, easy_pack, "one", 1)

    def join(*_: object, **__: object) -> None:
        raise DeviceFailed("cuda:0 failed in trial 0")

    monkeypatch.setattr("pcam_automl.commands.join.join", join)
    found = CliRunner().invoke(app, ["worker", "--storage", url, "--device", "cpu", "--until-idle"])
    assert isinstance(found.exception, DeviceFailed)
    assert "tried again" not in found.output


def test_the_queue_of_an_empty_storage_is_said_to_be_empty(url: str) -> None:
    storage = open_storage(url)
    assert "no studies in sqlite:///" in call("status", "--all", "--storage", url)
    optuna.create_study(study_name="someone's", storage=storage)
    said = CliRunner().invoke(app, ["status", "--all", "--storage", url])
    assert "no studies in sqlite:///" in said.stdout
    assert "not shown: 1 that pcam-automl did not make: someone's" in said.stderr
    storage.engine.dispose()


def test_a_budget_counts_from_when_its_study_is_served(
    easy_pack: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker of the queue may be older than any budget."""
    for module in ("search.ledger", "search.create", "commands.search"):
        monkeypatch.setattr(f"pcam_automl.{module}.process_age_s", lambda: 7200.0)
    words = [
        "submit",
        "--study",
        "short",
        "--budget",
        "10m",
        "--trials",
        "1",
        "--data",
        str(easy_pack),
        "--storage",
        url,
    ]
    call(*words, "--views", "96", "--device", "cpu", "--weights", "none", *(w for pin in PINS for w in ("--set", pin)))
    planned = open_study("short", url).settings.plan["budget"]
    assert planned["used_s"] == SERVED_START_S, "what packing took is not of the budget"
    out = call("worker", "--storage", url, "--device", "cpu", "--until-idle")
    assert "study short: 1 trials finished here" in out
    (line,) = json.loads(CliRunner().invoke(app, ["status", "--all", "--json", "--storage", url]).stdout)
    assert 0 < line["spent_s"] < 300


def test_what_the_last_command_asked_holds(easy_pack: Path, url: str) -> None:
    submit(url, easy_pack, "s", 1, "--budget", "2h")
    submit(url, easy_pack, "s", 2)
    (line,) = json.loads(CliRunner().invoke(app, ["status", "--all", "--json", "--storage", url]).stdout)
    assert (line["total"], line["budget_s"]) == (2, None)


def test_wrong_words_end_in_a_line(easy_pack: Path, url: str) -> None:
    with pytest.raises(InputError, match=r"needs --trials N or --budget TIME"):
        call("submit", "--study", "s", "--storage", url)
    with pytest.raises(InputError, match="--until-idle is for a worker without --study"):
        call("worker", "--study", "s", "--until-idle", "--storage", url)
    with pytest.raises(StudyError, match="there are no studies in"):
        call("worker", "--storage", url, "--device", "cpu")
    submit(url, easy_pack, "s", 2, "--budget", "2h")
    with pytest.raises(StudyError, match=r"--budget is 1 h 00 min, study 's' has 2 h 00 min"):
        submit(url, easy_pack, "s", 2, "--budget", "1h")
