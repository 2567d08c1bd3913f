"""Confirmations as values: stored, read back, averaged into a ranking. Trains nothing (see confirm.py)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.trial import FrozenTrial, TrialState

from pcam_automl.data.store import PatchStore
from pcam_automl.errors import DataError
from pcam_automl.files import folder_written_whole, write_json
from pcam_automl.goals import Goal
from pcam_automl.metrics import log_loss, worst_domain_auc
from pcam_automl.recipe import Recipe, build_recipe
from pcam_automl.scores import FILE as SCORES
from pcam_automl.scores import Scores, read_scores, write_scores
from pcam_automl.search.budget import budget_of
from pcam_automl.search.lineages import current_rows, has_diverged, lineage_of, sign_of

FOLDER = "confirmations"
CARD, ONE_VIEW = "confirmation.json", "one_view.csv"


@dataclass(frozen=True)
class Candidate:
    """A lineage that may be confirmed, by its row that counts."""

    lineage: str
    trial: FrozenTrial

    @property
    def recipe(self) -> Recipe:
        return build_recipe(json.loads(self.trial.user_attrs["recipe"]), where=f"trial {self.trial.number}")

    @property
    def search(self) -> float | None:
        """What the search measured at the last rung; None for a row that did not get there."""
        return self.trial.value if self.trial.state == TrialState.COMPLETE else None


@dataclass(frozen=True)
class Confirmation:
    """A lineage trained once more, with a fresh seed, and scored on another fold than the search's.

    Attributes:
        lineage: whose recipe.
        trial: number of its row.
        fold: that scored; the others trained.
        key: 64 hex digits over the recipe with its fresh seed, the rows, the weights and the rungs.
        search: the search's value; None where the row did not complete.
        auc: of the plain centre view, as in the search; None where the training diverged.
        auc_views: of the recipe's averaged views, as a final network predicts; None for a dense task, too.
        n: patches scored.
        n_train: patches trained on.
        views: training images seen.
        seconds: wall clock.
        images_per_s: of the training steps.
        diverged: why there is no score; None where there is one.
        device: on which it trained, None of one that an earlier release stored.
        cpu: of that machine.
        one_view: what ``auc`` is of.
        scores: what ``auc_views`` is of.
    """

    lineage: str
    trial: int
    fold: int
    key: str
    search: float | None
    auc: float | None
    auc_views: float | None
    n: int
    n_train: int
    views: int
    seconds: float
    images_per_s: float
    diverged: str | None = None
    device: str | None = None
    cpu: str | None = None
    one_view: Scores | None = None
    scores: Scores | None = None

    def to_json(self) -> dict[str, Any]:
        """The figures, without the scores."""
        return asdict(replace(self, one_view=None, scores=None), dict_factory=_without_scores)


def _without_scores(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in pairs if name not in ("one_view", "scores")}


ValueOf = Callable[[Confirmation], float]


def auc_of(confirmation: Confirmation) -> float:
    """The plain view's AUC, which is what a study maximises by default; NaN where the training diverged."""
    return float("nan") if confirmation.auc is None else confirmation.auc


def value_of_goal(goal: Goal, domain: NDArray[np.integer]) -> ValueOf:
    """The figure of a confirmation that the study's value is; NaN where the training diverged or has none.

    Args:
        goal: the study's objective.
        domain: (N,) by store row.
    """

    def value_of(confirmation: Confirmation) -> float:
        scores = confirmation.one_view
        if scores is None or confirmation.auc is None:
            return auc_of(confirmation)
        if goal.name == "log_loss":
            return log_loss(scores.label, scores.prob)
        found = worst_domain_auc(scores.label, scores.prob, np.asarray(domain)[scores.rows])
        return float("nan") if found is None else found

    return auc_of if goal.name == "auc" else value_of


def folder_of(study_folder: Path, lineage: str, fold: int) -> Path:
    """Where a confirmation lies: ``<study>/confirmations/<lineage>/fold<f>``."""
    return study_folder / FOLDER / lineage.replace(" ", "-") / f"fold{fold}"


def write_confirmation(folder: Path, confirmation: Confirmation, store: PatchStore) -> None:
    """Figures as JSON, scores as CSV, the folder whole or not at all."""
    with folder_written_whole(folder) as partial:
        for name, scores in ((ONE_VIEW, confirmation.one_view), (SCORES, confirmation.scores)):
            if scores is not None:
                write_scores(partial / name, scores, store.ids)
        write_json(partial / CARD, confirmation.to_json())


def read_confirmation(folder: Path, store: PatchStore, key: str | None = None) -> Confirmation | None:
    """What :func:`write_confirmation` wrote; None where there is none, or it is of another ``key``.

    Raises:
        DataError: it cannot be read; the message says which folder to remove.
    """
    file = folder / CARD
    if not file.is_file():
        return None
    try:
        found = Confirmation(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as fault:
        raise DataError(f"{file} cannot be read ({str(fault)[:120]}); remove {folder}, it is made anew") from None
    if key is not None and found.key != key:
        return None
    one_view, scores = (
        read_scores(folder / name, store.ids, store.part) if (folder / name).is_file() else None
        for name in (ONE_VIEW, SCORES)
    )
    return replace(found, one_view=one_view, scores=scores)


def top_candidates(study: optuna.Study, k: int) -> list[Candidate]:
    """The ``k`` best complete lineages by the study's value and direction, the best first; earlier ones of equals.

    Of a study whose budget ended before any trial was complete, the lineages that came furthest.
    """
    sign = sign_of(study)
    trials = study.get_trials(deepcopy=False)
    rows = [row for row in current_rows(trials) if row.value is not None and "recipe" in row.user_attrs]
    complete = [row for row in rows if row.state == TrialState.COMPLETE]
    if not complete and budget_of(study) is not None:
        rows = [row for row in rows if not has_diverged(row)]
        furthest = max((len(row.intermediate_values) for row in rows), default=0)
        complete = [row for row in rows if 0 < len(row.intermediate_values) == furthest]
    rows = sorted(complete, key=lambda row: (-sign * float(row.value or 0.0), row.number))
    return [Candidate(lineage_of(row), row) for row in rows[:k]]


@dataclass(frozen=True)
class Confirmed:
    """A lineage's confirmations together.

    Attributes:
        lineage: its name.
        trial: its row's number.
        search: the search's value.
        values: one a fold; NaN where a training diverged.
        drop: by how much the search's value is better than the mean of the confirmed ones: what its luck was worth, and how much
            harder the other slides are. None where there is no value to compare.
    """

    lineage: str
    trial: int
    search: float | None
    values: tuple[float, ...]
    drop: float | None

    @property
    def mean(self) -> float:
        """NaN where a training diverged."""
        return sum(self.values) / len(self.values)

    def to_json(self) -> dict[str, Any]:
        values = [None if math.isnan(value) else value for value in self.values]
        mean = None if math.isnan(self.mean) else self.mean
        return {"trial": self.trial, "search": self.search, "values": values, "mean": mean, "drop": self.drop}


def complete_folds(confirmations: Sequence[Confirmation]) -> list[int]:
    """Folds on which every lineage was confirmed."""
    held = {(one.lineage, one.fold) for one in confirmations}
    lineages = {one.lineage for one in confirmations}
    folds = dict.fromkeys(one.fold for one in confirmations)
    return [fold for fold in folds if all((lineage, fold) in held for lineage in lineages)]


def ranked(
    confirmations: Sequence[Confirmation], *, value_of: ValueOf = auc_of, maximise: bool = True
) -> list[Confirmed]:
    """Lineages by the mean of their confirmed values, the best first; of equals the search's better one, then the earlier.

    Compared are only folds on which every lineage was confirmed: on others luck would lie in the slides.
    """
    folds = complete_folds(confirmations)
    held = {(one.lineage, one.fold): one for one in confirmations}
    sign = 1.0 if maximise else -1.0
    found = []
    for lineage in dict.fromkeys(one.lineage for one in confirmations):
        own = [held[lineage, fold] for fold in folds]
        values = tuple(value_of(one) for one in own)
        mean, search = sum(values) / len(values), own[0].search
        drop = None if search is None or math.isnan(mean) else sign * (search - mean)
        found.append(Confirmed(lineage, own[0].trial, search, values, drop))
    worst = float("-inf")
    return sorted(
        found,
        key=lambda one: (
            worst if math.isnan(one.mean) else sign * one.mean,
            worst if one.search is None else sign * one.search,
            -one.trial,
        ),
        reverse=True,
    )


def mean_drop(found: Sequence[Confirmed]) -> float | None:
    """Mean of the drops that are known; None where none is."""
    drops = [one.drop for one in found if one.drop is not None]
    return sum(drops) / len(drops) if drops else None
