"""Reading a study: its settings, which trials are finished, best or failed. Creates and runs nothing, imports no torch."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterable
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from pydantic import ValidationError

from pcam_automl.config import StudySettings, check_study_name, storage_url
from pcam_automl.errors import NoStudyError, StudyError, did_you_mean, first_few
from pcam_automl.goals import Goal
from pcam_automl.search.lineages import FINISHED, lineage_of
from pcam_automl.search.plain_reader import read_study
from pcam_automl.search.storage_url import safe_url

SETTINGS_KEY = "pcam_automl"
TRIALS_KEY, CLOCK_KEY = "pcam_automl:trials", "pcam_automl:by_clock"
"""Total of finished trials and budget in seconds that the last `search` or `submit` asked for, None where it named none: what a
worker that joins works towards."""
ERROR = "error: "
"""Beginning of the user attribute ``reason`` of a trial that an error ended."""
NO_DATABASE = "interrupted: the database: "
"""Beginning of the same of a trial whose database did not answer any more; another row goes on with it."""
FIGURES = "figures"
"""The user attribute of a trial that holds every objective's value at its last rung: {"auc": 0.98, "log_loss": 0.2}."""
_WAIT_FOR_CREATOR_S = 60.0


def load_study(name: str, url: str | None = None) -> tuple[optuna.Study, StudySettings]:
    """An existing study and what it remembers; neither its data nor its split is opened.

    Raises:
        StudyError: no such study, or one that this package did not create.
    """
    from pcam_automl.search.storage import open_storage

    url = storage_url(url)
    check_study_name(name)
    storage = open_storage(url, create=False)
    try:
        study = optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        known = optuna.get_all_study_names(storage)
        hint = f"it has {first_few(sorted(known))}" if known else "it has none yet; `pcam-automl search` makes one"
        raise NoStudyError(
            f"there is no study {name!r} in {safe_url(url)}: {hint}{did_you_mean(name, known)}"
        ) from None
    return study, _settings_of(study)


def load_study_to_read(
    name: str, url: str | None, attrs: Collection[str] | None, *, of_complete: Collection[str] | None = None
) -> tuple[optuna.Study, StudySettings]:
    """As :func:`load_study`, for those who write nothing and need no user attributes of trials but ``attrs``, and of complete
    trials also ``of_complete``; where that is given, no parameters of others either. ``attrs`` of None: for those who need no
    trials.

    It is read without SQLAlchemy and Optuna's ORM, 0.1 instead of 3 s for 1,000 trials; trials have no dates.

    Raises:
        StudyError: see :func:`load_study`.
    """
    check_study_name(name)
    study = read_study(storage_url(url), name, attrs, of_complete=of_complete)
    if study is None or SETTINGS_KEY not in study.user_attrs:  # of another kind, or still being created
        return load_study(name, url)
    return study, _settings_of(study)


def _settings_of(study: optuna.Study) -> StudySettings:
    """Settings of a study; waits while another process is still creating it."""
    deadline = time.monotonic() + _WAIT_FOR_CREATOR_S
    while (text := study.user_attrs.get(SETTINGS_KEY)) is None:
        being_made = study.user_attrs.get(f"{SETTINGS_KEY}:creating") is not None
        if being_made and time.monotonic() > deadline:
            raise StudyError(
                f"study {study.study_name!r} was never finished being created: its process was killed; take another --study name, or remove "
                f"it (optuna delete-study --study-name {study.study_name} --storage URL)"
            )
        if not being_made:
            raise StudyError(
                f"study {study.study_name!r} was not made by pcam-automl search (it has no settings); take another --study name"
            )
        time.sleep(0.5)
    try:
        return StudySettings.model_validate(json.loads(text))
    except (ValidationError, ValueError) as fault:
        raise StudyError(
            f"study {study.study_name!r} was written by another version of pcam-automl ({str(fault)[:120]}); use that version, or another --study name"
        ) from None


def best_of(trials: list[FrozenTrial], goal: Goal) -> FrozenTrial | None:
    """The complete trial with the best value, the earliest of equals."""
    complete = [t for t in trials if t.state == TrialState.COMPLETE and t.value is not None]
    return max(complete, key=lambda t: (goal.sign * float(t.value or 0.0), -t.number), default=None)


def auc_of(trial: FrozenTrial, goal: Goal) -> float:
    """The trial's validation AUC, whatever the study optimises; NaN where nothing was scored."""
    if goal.name == "auc":
        return float("nan") if trial.value is None else float(trial.value)
    return float(trial.user_attrs.get(FIGURES, {}).get("auc", "nan"))


def recipe_field(trial: FrozenTrial, name: str) -> Any:
    """The recipe's value of a field, pinned or suggested; None where the trial has neither."""
    if name in trial.params:
        return trial.params[name]
    return json.loads(trial.user_attrs["recipe"]).get(name) if "recipe" in trial.user_attrs else None


def errors_of(trials: list[FrozenTrial]) -> list[str]:
    """Reasons of the trials that failed by an error (not by an interruption or a lost worker)."""
    return [
        t.user_attrs["reason"]
        for t in trials
        if t.state == TrialState.FAIL and str(t.user_attrs.get("reason", "")).startswith(ERROR)
    ]


def n_finished_of(study: optuna.Study) -> int:
    """Lineages of the study with a complete or pruned row: a thawed one counts once."""
    return n_finished_in(study.get_trials(deepcopy=False, states=FINISHED))


def n_finished_in(trials: Iterable[FrozenTrial]) -> int:
    """Of these trials, the lineages with a complete or pruned row."""
    return len({lineage_of(trial) for trial in trials if trial.state in FINISHED})
