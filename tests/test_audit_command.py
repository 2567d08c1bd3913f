"""`audit`, and what `status` says of the best trial's interval and of misleading rungs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from optuna.trial import TrialState, create_trial
from planted_study import (
    probs_of,
    pruned_by_thirds,
    rung_values,
    scored_trial,
    settings_of,
    study_with,
    trials_of,
)

from pcam_automl.commands.audit import run_audit
from pcam_automl.commands.status import run_status
from pcam_automl.data.store import open_store
from pcam_automl.errors import StudyError

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def url(in_tmp: Path) -> str:
    return f"sqlite:///{in_tmp}/pcam.db"


def test_misleading_first_rung_is_said_with_a_larger_one_instead(url: str, capsys: Capture) -> None:
    study_with(trials_of(rung_values(40, (9.0, 0.2, 0.0))), url)
    run_audit("pcam", url, as_json=False)
    text = " ".join(capsys.readouterr().out.split())
    assert "misleads" in text
    assert "advice: a larger first rung: 300 -> 900 views instead of 100 -> 300 -> 900" in text
    assert "a lower bound" in text
    assert "Thorndike" not in text  # nothing was selected
    run_status("pcam", url, as_json=False)
    assert "warning: scores after 100 views say little about those after 300" in capsys.readouterr().out


def test_a_study_with_a_probe_is_told_whether_it_ranked_as_the_trainings_did(url: str, capsys: Capture) -> None:
    qualities = [(name, 0.6 + 0.05 * place) for place, name in enumerate("abcdef")]
    trials = trials_of(np.array([[0.5, 0.6, value + 0.001 * n] for _, value in qualities for n in range(2)]))
    for trial, name in zip(trials, [name for name, _ in qualities for _ in range(2)], strict=True):
        trial.set_user_attr("recipe", json.dumps({"backbone": name, "crop_size": 64, "input_size": None}))
    cell = {"crop_size": 64, "upscale": 1.0, "input_px": 64, "auc_95": (0.5, 0.9), "seconds": 1.0}
    record = {"results": [{"backbone": name, "auc": value, **cell} for name, value in qualities]}
    study_with(trials, url, settings_of().model_copy(update={"plan": {"probe": record}}))
    run_audit("pcam", url, as_json=False)
    assert "probe: holds, Kendall tau" in capsys.readouterr().out
    run_audit("pcam", url, as_json=True)
    assert json.loads(capsys.readouterr().out)["probe"]["n_cells"] == 6


def test_who_stops_a_search_finds_an_interrupted_trial_and_not_a_failed_one(url: str, capsys: Capture) -> None:
    reasons = ("interrupted", "worker lost", "error: RuntimeError: out of memory")
    failed = [create_trial(state=TrialState.FAIL, user_attrs={"reason": reason}) for reason in reasons]
    study_with([*trials_of(rung_values(3, (0.2, 0.1, 0.0))), *failed], url)
    run_status("pcam", url, as_json=False)
    first, second, third, *_ = capsys.readouterr().out.splitlines()
    assert "3 complete, 1 fail, 2 interrupted;" in first
    assert second.strip().startswith("interrupted: ended with its worker (Ctrl-C, a kill)")
    assert "RuntimeError" in third


def test_audit_as_json_and_of_survivors_alone(url: str, capsys: Capture) -> None:
    study_with(trials_of(pruned_by_thirds(rung_values(60, (0.2, 0.1, 0.0)))), url)
    run_audit("pcam", url, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert [rung["verdict"] for rung in found["rungs"]] == ["holds", "unclear"]
    assert found["advised_rungs"] is None
    assert found["rungs"][0]["regret"] is None
    run_audit("pcam", url, as_json=False)
    text = capsys.readouterr().out
    assert "Thorndike" in text
    assert "advice: nothing speaks for other rungs so far" in text
    run_status("pcam", url, as_json=False)
    assert "warning" not in capsys.readouterr().out


def test_a_study_without_trials_is_audited_and_an_absent_one_refused(url: str, capsys: Capture) -> None:
    study_with([], url)
    run_audit("pcam", url, as_json=False)
    assert "0 recipes with a score" in capsys.readouterr().out
    with pytest.raises(StudyError, match="there is no study 'other'"):
        run_audit("other", url, as_json=False)


def test_audit_imports_nothing_that_trains(url: str) -> None:
    study_with(trials_of(rung_values(12, (0.2, 0.1, 0.0))), url)
    code = (
        "import sys; from pcam_automl.commands.audit import run_audit\n"
        f"run_audit('pcam', {url!r}, as_json=False)\n"
        "print([name for name in ('torch', 'sklearn', 'scipy', 'sqlalchemy') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip().splitlines()[-1] == "[]"


def test_status_shows_the_interval_the_ties_and_what_finalize_takes(
    easy_pack: Path, in_tmp: Path, url: str, capsys: Capture
) -> None:
    store, folder = open_store(easy_pack), in_tmp / "pcam"
    best = probs_of(store, 0.1)
    trials = [
        scored_trial(store, folder, 0, best),
        scored_trial(store, folder, 1, best, images_per_s=250.0),
        scored_trial(store, folder, 2, probs_of(store, 4.0, seed=2)),
    ]
    study_with(trials, url, settings_of(store))
    run_status("pcam", url, as_json=False)
    text = capsys.readouterr().out
    assert f"trial 0: AUC {trials[0].value:.4f}, 95 % " in text
    assert "it does not beat trial 1 (3 of 3 complete trials compared)" in text
    assert "finalize takes trial 1: trial 0 scored the same and takes" in text
    run_status("pcam", url, as_json=True)
    ranking = json.loads(capsys.readouterr().out)["ranking"]
    assert (ranking["picked"], ranking["unbeaten"], ranking["n_clusters"]) == (1, [1], 12)
    low, high = ranking["trials"][0]["interval"]
    assert low < trials[0].value < high
    (folder / "trials" / "0" / "scores.csv").unlink()
    run_status("pcam", url, as_json=False)
    assert "no interval can be drawn" in capsys.readouterr().out
