"""Reading a study is light, and its importances are Optuna's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import optuna
import pytest

from pcam_automl.config import StudySettings
from pcam_automl.errors import StudyError
from pcam_automl.goals import AUC
from pcam_automl.search.reading import SETTINGS_KEY, best_of, errors_of, load_study, n_finished_of
from pcam_automl.search.storage import open_storage

SETTINGS = StudySettings(
    data="d", pack="p", pack_hash="0" * 64, split_hash="1" * 64, seed=0, holdout=0.0, weights="none",
    start={}, space="parameters: {}", pins={}, sampler="tpe", pruner="asha", rungs=((10, 10), (30, 30)), n_score=500, cap_s=None,
    plan={}, versions={},
)  # fmt: skip
RANGES: dict[str, optuna.distributions.BaseDistribution] = {
    "lr": optuna.distributions.FloatDistribution(0.0, 1.0),
    "dropout": optuna.distributions.FloatDistribution(0.0, 1.0),
}


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A study of 12 complete trials whose value is their lr, one pruned and two failed."""
    url = f"sqlite:///{tmp_path / 'pcam.db'}"
    study = optuna.create_study(study_name="pcam", storage=open_storage(url), direction="maximize")
    study.set_user_attr(SETTINGS_KEY, SETTINGS.model_dump_json())
    for number in range(12):
        params = {"lr": number / 12, "dropout": number * 5 % 12 / 12}
        study.add_trial(optuna.create_trial(params=params, distributions=RANGES, value=number / 12))
    states = optuna.trial.TrialState
    study.add_trial(optuna.create_trial(state=states.PRUNED, user_attrs={"reason": "pruned at rung 1"}))
    for reason in ("interrupted", "error: OSError: no space"):
        study.add_trial(optuna.create_trial(state=states.FAIL, user_attrs={"reason": reason}))
    return url


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_status_imports_nothing_that_trains(url: str) -> None:
    heavy = ("torch", "timm", "pandas", "sklearn", "scipy", "pcam_automl.search.study")
    out = run_python(
        "import sys; from pcam_automl.commands.status import run_status\n"
        f"run_status('pcam', {url!r}, as_json=False)\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    assert "what mattered" in out
    assert out.strip().splitlines()[-1] == "[]"


def test_a_study_is_read_with_its_settings_and_counts(url: str) -> None:
    study, settings = load_study("pcam", url)
    trials = study.get_trials()
    assert settings == SETTINGS
    assert n_finished_of(study) == 13
    assert errors_of(trials) == ["error: OSError: no space"]
    best = best_of(trials, AUC)
    assert best is not None
    assert best.number == 11
    assert best_of(trials[12:], AUC) is None
    with pytest.raises(StudyError, match=r"there is no study 'pcan' .*did you mean 'pcam'"):
        load_study("pcan", url)


def test_importances_are_optunas_and_its_package_stays_whole(url: str) -> None:
    out = run_python(
        "from pcam_automl.search.reading import load_study; from pcam_automl.search.importances import ped_anova\n"
        f"study, _ = load_study('pcam', {url!r})\n"
        "ours = ped_anova(study)\n"
        "import optuna.importance as whole\n"
        "assert ours == whole.get_param_importances(study), ours\n"
        "assert whole.FanovaImportanceEvaluator(seed=0).evaluate(study)\n"
        "print(max(ours, key=ours.get))"
    )
    assert out.strip() == "lr"
