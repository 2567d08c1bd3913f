"""The studies of a storage in one line each, read by SQL aggregates: no trial is loaded. Changes nothing but queue entries."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.storages._rdb import models
from optuna.study import StudyDirection
from optuna.trial import TrialState

from pcam_automl.search.budget import short_search
from pcam_automl.search.ledger import union_of_attrs
from pcam_automl.search.patience import retry_transient
from pcam_automl.search.reading import CLOCK_KEY, ERROR, SETTINGS_KEY, TRIALS_KEY
from pcam_automl.search.slots import TABLE as SLOTS

PRIORITY_KEY, SUBMITTED_KEY, SEARCHED_KEY, SEARCHED_TRIALS_KEY = (
    f"pcam_automl:{name}" for name in ("priority", "submitted", "searched_budget_s", "searched_trials")
)
"""Study attributes: of the queue (higher first, then earlier); the budget whose search's part is over, and the total that it was over
with before its time, None where the time ended it."""


@dataclass(frozen=True)
class StudyLine:
    """A study as `status --all`, the queue and /metrics show it.

    Attributes:
        name: of the study.
        priority: higher is served first.
        submitted: seconds since 1970.
        total: trials asked for; None where a budget alone ends the search.
        budget_s: wall clock for search and finalize; None without one.
        spent_s: of the budget.
        searched: whether the search's part of the budget is over.
        states: trials (Optuna's rows) by state.
        n_errors: failed ones that ended by an error; the others were interrupted or lost their worker, and go on in another
            unless they are given up.
        slots: lineages by state: claimed, done, open.
        best: value of the best complete trial.
        objective: what it is the value of.
        images_per_s: training speed of the trials that finished last, at most five, on average; None before there is one.
    """

    name: str
    priority: int
    submitted: float
    total: int | None
    budget_s: float | None
    spent_s: float
    searched: bool
    states: Mapping[str, int]
    slots: Mapping[str, int]
    best: float | None
    objective: str
    images_per_s: float | None = None
    n_errors: int = 0

    @property
    def wants_workers(self) -> bool:
        """Whether another worker would find something to do: slots that are open or not made yet, and budget left; or, where the total is
        reached and a budget is left, trials that were stopped early and may go on.
        """
        if self.total is None and self.budget_s is None:
            return False
        if self.budget_s is not None and (self.searched or self.spent_s >= self.budget_s):
            return False
        held = self.slots.get("done", 0) + self.slots.get("claimed", 0)
        if self.total is None or held < self.total:
            return True
        return self.budget_s is not None and not self.slots.get("claimed", 0) and self.states.get("pruned", 0) > 0

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do, not even for the workers that are at it."""
        return not self.wants_workers and not self.slots.get("claimed", 0)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "wants_workers": self.wants_workers}


def overview(engine: sa.Engine, *, patient: bool = True) -> list[StudyLine]:
    """Every study of this package in the storage, in the order in which they are served.

    Args:
        engine: of the storage.
        patient: wait for a database that is away; False fails at once, for those who ask whether it is.
    """
    found = retry_transient(lambda: _read(engine)) if patient else _read(engine)
    return sorted(found, key=lambda line: (-line.priority, line.submitted, line.name))


def others(engine: sa.Engine) -> list[str]:
    """Names of the storage's other studies, sorted: of another program, or still being created."""
    study, attr = models.StudyModel, models.StudyUserAttributeModel
    ours = sa.select(attr.study_id).where(attr.key == SETTINGS_KEY)
    query = sa.select(study.study_name).where(study.study_id.not_in(ours)).order_by(study.study_name)

    def read() -> list[str]:
        with engine.connect() as connection:
            return list(connection.execute(query).scalars())

    return retry_transient(read)


def next_study(lines: list[StudyLine], *, without: frozenset[str] = frozenset()) -> StudyLine | None:
    """The one that a free worker takes: the first that wants workers."""
    return next((line for line in lines if line.wants_workers and line.name not in without), None)


def note_asked(study: optuna.Study, total: int | None, budget_s: float | None) -> None:
    """Write what workers that join shall work towards."""
    for key, value in ((TRIALS_KEY, total), (CLOCK_KEY, budget_s)):
        if study.user_attrs.get(key) != value:
            study.set_user_attr(key, value)


def submit(study: optuna.Study, *, total: int | None, budget_s: float | None = None, priority: int = 0) -> None:
    """Enter a study in the queue, or change its entry; its age counts from its first entry."""
    note_asked(study, total, budget_s)
    study.set_user_attr(PRIORITY_KEY, priority)
    if SUBMITTED_KEY not in study.user_attrs:
        study.set_user_attr(SUBMITTED_KEY, time.time())


def _read(engine: sa.Engine) -> list[StudyLine]:
    study, attr, trial = models.StudyModel, models.StudyUserAttributeModel, models.TrialModel
    with engine.connect() as connection:
        names = {row[0]: row[1] for row in connection.execute(sa.select(study.study_id, study.study_name))}
        attrs: dict[int, dict[str, Any]] = {number: {} for number in names}
        for number, key, text in connection.execute(sa.select(attr.study_id, attr.key, attr.value_json)):
            attrs.setdefault(number, {})[key] = json.loads(text)
        states: dict[int, dict[str, int]] = {number: {} for number in names}
        counted = sa.select(trial.study_id, trial.state, sa.func.count()).group_by(trial.study_id, trial.state)
        for number, state, n in connection.execute(counted):
            states.setdefault(number, {})[TrialState(state).name.lower()] = n
        slots: dict[str, dict[str, int]] = {}
        if sa.inspect(connection).has_table(SLOTS.name):
            claims = sa.select(SLOTS.c.study_name, SLOTS.c.state, sa.func.count()).group_by(
                SLOTS.c.study_name, SLOTS.c.state
            )
            for name, state, n in connection.execute(claims):
                word = "claimed" if state == "thawing" else state
                of = slots.setdefault(name, {})
                of[word] = of.get(word, 0) + n
        bests, began, errors = _bests(connection), _began(connection), _errors(connection)
        speeds = {number: _speed(connection, number) for number in names}
    found = []
    for number, name in names.items():
        known = attrs.get(number, {})
        if SETTINGS_KEY not in known:  # another program's, or still being created
            continue
        budget, settings = known.get(CLOCK_KEY), json.loads(known[SETTINGS_KEY])
        short = short_search(settings.get("plan", {}).get("budget"), budget)
        total = known.get(TRIALS_KEY) or (short.n_trials if short is not None else None)
        found.append(
            StudyLine(
                name=name,
                priority=int(known.get(PRIORITY_KEY, 0)),
                submitted=float(known.get(SUBMITTED_KEY, began.get(number, 0.0))),
                total=total,
                budget_s=None if budget is None else float(budget),
                spent_s=union_of_attrs(known),
                searched=budget is not None
                and known.get(SEARCHED_KEY) == budget
                and known.get(SEARCHED_TRIALS_KEY) in (None, total),
                states=states.get(number, {}),
                slots=slots.get(name, {}),
                best=bests.get(number),
                objective=str(settings.get("objective", "auc")),
                images_per_s=speeds.get(number),
                n_errors=errors.get(number, 0),
            )
        )
    return found


def _bests(connection: sa.Connection) -> dict[int, float]:
    """Study id to the best value of its complete trials."""
    trial, value, direction = models.TrialModel, models.TrialValueModel, models.StudyDirectionModel
    query = (
        sa.select(trial.study_id, direction.direction, sa.func.max(value.value), sa.func.min(value.value))
        .join(value, value.trial_id == trial.trial_id)
        .join(direction, direction.study_id == trial.study_id)
        .where(trial.state == TrialState.COMPLETE)
        .group_by(trial.study_id, direction.direction)
    )
    return {
        number: float(most if way == StudyDirection.MAXIMIZE else least)
        for number, way, most, least in connection.execute(query)
        if most is not None
    }


def _errors(connection: sa.Connection) -> dict[int, int]:
    """Study id to the number of its trials that failed by an error, where there are any."""
    trial, attr = models.TrialModel, models.TrialUserAttributeModel
    query = (
        sa.select(trial.study_id, sa.func.count())
        .join(attr, attr.trial_id == trial.trial_id)
        .where(trial.state == TrialState.FAIL, attr.key == "reason", attr.value_json.like(f'"{ERROR}%'))
        .group_by(trial.study_id)
    )
    return {row[0]: row[1] for row in connection.execute(query)}


def _began(connection: sa.Connection) -> dict[int, float]:
    """Study id to the start of its first trial, for studies that were not submitted."""
    trial = models.TrialModel
    query = sa.select(trial.study_id, sa.func.min(trial.__table__.c.datetime_start)).group_by(trial.study_id)
    # Naive UTC, as Optuna stores it.
    return {number: at.replace(tzinfo=UTC).timestamp() for number, at in connection.execute(query) if at is not None}


def _speed(connection: sa.Connection, study_id: int) -> float | None:
    """Images/s of the trials that noted theirs last."""
    trial, attr = models.TrialModel, models.TrialUserAttributeModel
    query = (
        sa.select(attr.value_json)
        .join(trial, trial.trial_id == attr.trial_id)
        .where(trial.study_id == study_id, attr.key == "images_per_s")
        .order_by(trial.number.desc())
        .limit(5)
    )
    rates = [float(json.loads(text)) for (text,) in connection.execute(query)]
    return sum(rates) / len(rates) if rates else None
