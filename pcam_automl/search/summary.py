"""What a study holds, as plain values for `status`. Prints nothing."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from pcam_automl.config import StudySettings
from pcam_automl.goals import Goal
from pcam_automl.search.importances import ped_anova
from pcam_automl.search.lineages import lineage_of, not_superseded, seconds_of_lineages
from pcam_automl.search.reading import FIGURES, auc_of, best_of, errors_of

LEAST_FOR_IMPORTANCE = 4
READ_ATTRS = ("reason", "seconds", "lineage")
"""The trials' user attributes that a summary is made of,"""
READ_OF_COMPLETE = ("recipe", "images_per_s", "device", "cpu", "slot", FIGURES)
"""and those of complete trials."""


@dataclass(frozen=True)
class Summary:
    """A study in numbers.

    Attributes:
        states: state name to number of trials.
        best: number, value of the objective, auc, params and recipe of the best complete trial; None before there is one.
        importances: parameter to share in [0, 1]; empty with the reason in ``importances_note``.
        seconds: training and scoring seconds of all trials.
        errors: reasons of the trials that failed by an error.
    """

    study: str
    states: dict[str, int]
    best: dict[str, Any] | None
    importances: dict[str, float]
    importances_note: str | None
    seconds: float
    errors: list[str]
    settings: StudySettings

    def to_json(self) -> dict[str, Any]:
        return {
            "study": self.study,
            "states": self.states,
            "finished": self.states.get("complete", 0) + self.states.get("pruned", 0),
            "best": self.best,
            "importances": self.importances,
            "importances_note": self.importances_note,
            "seconds": self.seconds,
            "errors": self.errors,
            "settings": self.settings.model_dump(mode="json", exclude={"space"}),
        }


def summarise(study: optuna.Study, settings: StudySettings) -> Summary:
    """Count, find the best, rank the parameters."""
    trials = study.get_trials(deepcopy=False)
    counted = not_superseded(trials)  # a paused trial that went on counts once
    states = {state.name.lower(): n for state in TrialState if (n := sum(t.state == state for t in counted))}
    importances, note = _importances(study, trials)
    best = best_of(trials, settings.goal)
    return Summary(
        study.study_name,
        states,
        None if best is None else _best(best, settings.goal, seconds_of_lineages(trials)[lineage_of(best)]),
        importances,
        note,
        round(sum(float(t.user_attrs.get("seconds", 0.0)) for t in trials), 1),
        errors_of(trials),
        settings,
    )


def _best(trial: FrozenTrial, goal: Goal, seconds: float) -> dict[str, Any]:
    attrs = trial.user_attrs
    return {
        "number": trial.number,
        "objective": goal.name,
        "value": trial.value,
        "auc": auc_of(trial, goal),
        "params": trial.params,
        "recipe": json.loads(attrs["recipe"]) if "recipe" in attrs else None,
        "seconds": seconds,
        "images_per_s": attrs.get("images_per_s"),
        "device": attrs.get("device"),
    }


def _importances(study: optuna.Study, trials: list[FrozenTrial]) -> tuple[dict[str, float], str | None]:
    """PED-ANOVA (Watanabe et al. 2023), Optuna's default, over the complete trials."""
    n = sum(t.state == TrialState.COMPLETE for t in trials)
    if n < LEAST_FOR_IMPORTANCE:
        return {}, f"needs {LEAST_FOR_IMPORTANCE} complete trials, there are {n}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # Of few trials or equal values: the shares are equal then, which the table shows by itself.
            warnings.filterwarnings("ignore", "Target and region quantiles", UserWarning)
            found = ped_anova(study)
    except (ValueError, RuntimeError) as fault:  # e.g. every value equal, or no parameter common to the trials
        return {}, str(fault)[:200]
    return {name: round(float(share), 4) for name, share in found.items()}, None
