"""A study read from its SQLite file by plain SQL is the study that Optuna's own storage gives."""

from __future__ import annotations

import json
import math
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import RDBStorage
from optuna.trial import TrialState, create_trial
from test_reading import SETTINGS

from pcam_automl.errors import StudyError
from pcam_automl.search.plain_reader import read_study
from pcam_automl.search.reading import SETTINGS_KEY, load_study, load_study_to_read
from pcam_automl.search.storage import open_storage
from pcam_automl.search.storage_url import plain_sqlite_path
from pcam_automl.search.summary import READ_ATTRS, READ_OF_COMPLETE, summarise
from pcam_automl.search.trial_rows import KNOWN_SCHEMA

SPACE: dict[str, optuna.distributions.BaseDistribution] = {
    "backbone": CategoricalDistribution(["resnet10t", None, 2, 0.5, True]),
    "crop_size": IntDistribution(32, 96, step=16),
    "width": IntDistribution(1, 1024, log=True),
    "lr": FloatDistribution(1e-4, 1e-2, log=True),
    "augment": FloatDistribution(0.0, 1.0),
    "share": FloatDistribution(0.0, 1.0, step=0.25),
}
NOT_READ = {"rungs", "lineage"}


def params_of(number: int) -> dict[str, Any]:
    choices = SPACE["backbone"].choices  # type: ignore[attr-defined]
    params = {
        "backbone": choices[number % len(choices)],
        "crop_size": 32 + 16 * (number % 5),
        "width": 2 ** (number % 11),
        "lr": 1e-4 * 10 ** (number / 10),
        "augment": number * 7 % 20 / 20,
        "share": number % 5 / 4,
    }
    return params if number % 3 else {name: value for name, value in params.items() if name != "width"}


def add(study: optuna.Study, number: int, state: TrialState, **rest: Any) -> None:
    params = params_of(number)
    attrs = {"seconds": 0.1 * number, "lineage": str(number), "rungs": [{"auc": 0.5}], "device": "cpu"}
    attrs |= {"reason": f"error: OSError: {number}", "recipe": json.dumps(params)}
    distributions = {name: SPACE[name] for name in params}
    study.add_trial(create_trial(state=state, params=params, distributions=distributions, user_attrs=attrs, **rest))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Complete, pruned, failed, running and waiting trials, values and reports that are not finite; a second study."""
    file = tmp_path_factory.mktemp("made") / "pcam #1 µ.db"
    storage = open_storage(f"sqlite:///{file}")
    study = optuna.create_study(study_name="pcam", storage=storage, direction="maximize")
    study.set_user_attr(SETTINGS_KEY, SETTINGS.model_dump_json())
    other = optuna.create_study(study_name="other", storage=storage, direction="minimize")
    for number in range(11):
        add(study, number, TrialState.COMPLETE, value=number / 20, intermediate_values={30: 0.1, 10: number / 20})
        if number % 5 == 0:
            add(other, number, TrialState.COMPLETE, value=-1.0)
    add(study, 3, TrialState.COMPLETE, value=-math.inf, intermediate_values={10: math.inf, 30: -math.inf})
    add(study, 4, TrialState.PRUNED, intermediate_values={10: 0.25})
    add(study, 5, TrialState.PRUNED, intermediate_values={10: math.nan})
    add(study, 6, TrialState.FAIL)
    add(study, 7, TrialState.RUNNING, intermediate_values={10: 0.5})
    study.enqueue_trial({"lr": 1e-3})
    storage.engine.dispose()
    return file


@pytest.fixture
def url(made: Path, tmp_path: Path) -> str:
    """A copy of the file, alone in its folder."""
    return f"sqlite:///{shutil.copy(made, tmp_path)}"


def file_of(url: str) -> Path:
    file = plain_sqlite_path(url)
    assert file is not None
    return file


def plain(trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
    """Everything of a trial; NaN as text, since it equals nothing."""
    found = {name: getattr(trial, name) for name in ("number", "_trial_id", "state", "values", "distributions")}
    found["params"] = list(trial.params.items())  # in their order
    found["types"] = [type(value) for value in trial.params.values()]
    found["user_attrs"] = {name: value for name, value in trial.user_attrs.items() if name not in NOT_READ}
    found["reports"] = {step: str(value) for step, value in trial.intermediate_values.items()}
    return found


def test_trials_equal_those_of_optunas_storage(url: str) -> None:
    whole = optuna.load_study(study_name="pcam", storage=RDBStorage(url)).get_trials()
    read = read_study(url, "pcam", (*READ_ATTRS, *READ_OF_COMPLETE))
    assert read is not None
    assert [plain(trial) for trial in read.get_trials()] == [plain(trial) for trial in whole]
    assert {trial.state for trial in whole} == set(TrialState)
    assert read.direction == optuna.study.StudyDirection.MAXIMIZE
    assert [t.number for t in read.get_trials(states=(TrialState.PRUNED,))] == [12, 13]


def test_what_is_asked_of_complete_trials_only_is_not_read_of_others(url: str) -> None:
    whole = optuna.load_study(study_name="pcam", storage=RDBStorage(url)).get_trials()
    read = read_study(url, "pcam", ("seconds",), of_complete=("device", "recipe"))
    assert read is not None
    for ours, one in zip(read.get_trials(), whole, strict=True):
        complete = one.state == TrialState.COMPLETE
        wanted = ("seconds", "device", "recipe") if complete else ("seconds",)
        assert ours.user_attrs == {name: one.user_attrs[name] for name in wanted if name in one.user_attrs}
        assert list(ours.params.items()) == (list(one.params.items()) if complete else [])
        assert str(ours.intermediate_values) == str(dict(sorted(one.intermediate_values.items())))


def test_whether_a_study_is_there_is_known_without_its_trials(url: str) -> None:
    read = read_study(url, "pcam", None)
    assert read is not None
    assert (read.trials, set(read.user_attrs)) == ([], {SETTINGS_KEY})


def test_the_summary_is_that_of_optunas_storage_to_the_letter(url: str) -> None:
    read = load_study_to_read("pcam", url, READ_ATTRS, of_complete=READ_OF_COMPLETE)
    ours, whole = summarise(*read), summarise(*load_study("pcam", url))
    assert json.dumps(ours.to_json()) == json.dumps(whole.to_json())
    assert ours.importances
    assert ours.states == {"running": 1, "complete": 12, "pruned": 2, "fail": 1, "waiting": 1}


def test_status_needs_no_sqlalchemy_and_leaves_the_folder_as_it_was(url: str) -> None:
    code = (
        "import sys; from pcam_automl.commands.status import run_status\n"
        f"run_status('pcam', {url!r}, as_json=True)\n"
        "print([name for name in ('sqlalchemy', 'alembic', 'torch') if name in sys.modules], file=sys.stderr)"
    )
    held = file_of(url).read_bytes()
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout)["study"] == "pcam"
    assert ran.stderr.strip() == "[]"
    assert [file.name for file in file_of(url).parent.iterdir()] == [file_of(url).name]
    assert file_of(url).read_bytes() == held


def test_a_study_is_read_while_a_worker_writes(url: str) -> None:
    with sqlite3.connect(file_of(url)) as worker:
        worker.execute("BEGIN IMMEDIATE")
        worker.execute("DELETE FROM trial_params")
        read = read_study(url, "pcam", ())
        worker.rollback()
    assert read is not None
    assert read.trials[0].params


def test_what_the_reader_does_not_know_is_left_to_optuna(url: str, tmp_path: Path) -> None:
    file = file_of(url)
    assert read_study(url, "pcam", ()) is not None
    assert read_study(url, "absent", ()) is None
    assert read_study(f"sqlite:///{tmp_path}/absent.db", "pcam", ()) is None
    assert not (tmp_path / "absent.db").exists()
    (tmp_path / "text.db").write_text("no database" * 1000)
    assert read_study(f"sqlite:///{tmp_path}/text.db", "pcam", ()) is None
    optuna.create_study(study_name="two", storage=open_storage(url), directions=["minimize", "maximize"])
    assert read_study(url, "two", ()) is None
    with sqlite3.connect(file) as database:
        database.execute("UPDATE alembic_version SET version_num = 'v9.9.9.a'")
    assert read_study(url, "pcam", ()) is None
    with pytest.raises(StudyError, match="no longer compatible"):
        load_study_to_read("pcam", url, READ_ATTRS)


def test_the_installed_optuna_makes_tables_that_the_reader_knows(url: str) -> None:
    head = open_storage(url).get_head_version()
    assert head in KNOWN_SCHEMA, f"Optuna {optuna.__version__} has new tables ({head}): check plain_reader.py"


@pytest.mark.parametrize(
    ("url", "want"),
    [
        ("sqlite:///studies/pcam.db", Path("studies/pcam.db")),
        ("sqlite:////tmp/a b.db", Path("/tmp/a b.db")),
        ("sqlite:///s.db?timeout=3", None),
        ("sqlite:///a%20b.db", None),
        ("sqlite:///:memory:", None),
        ("sqlite:///file:s.db?uri=true", None),
        ("sqlite:///", None),
        ("sqlite+pysqlite:///s.db", None),
        ("postgresql://host/db", None),
    ],
)
def test_only_a_plain_file_is_read_directly(url: str, want: Path | None) -> None:
    assert plain_sqlite_path(url) == want


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:Sec/ret@127.0.0.1:1/test",
        "mysql://u:Sec/ret@127.0.0.1:1/test",
        "postgresql://u:Secret\u2100@127.0.0.1:1/test",
        "postgresql://u:S[ecret@127.0.0.1:1/test",
        "postgresql://u:Secret@127.0.0.1:abc/test",
        "postgresql://u:Secret@127.0.0.1:99999/test",
        "postgresql://u:1234/x@127.0.0.1:1/test",
        "postgresql://u:Secret@127.0.0.1:1",
        "postgresql://u:Se%40cret@127.0.0.1:1/test",
        "mysql://u:Se%40cret@127.0.0.1:1/test",
    ],
)
def test_no_url_is_unexpected_and_no_password_is_said(url: str) -> None:
    with pytest.raises(StudyError) as told:
        load_study_to_read("pcam", url, READ_ATTRS)
    assert not any(part in str(told.value) for part in ("Sec", "S[ecret", "cret@", "1234"))
