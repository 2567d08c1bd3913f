"""Trials from the rows of Optuna's tables, whoever read them. Opens no database and imports no SQLAlchemy."""

from __future__ import annotations

import functools
import gc
import itertools
import json
import math
import operator
import sys
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import optuna
from optuna.distributions import json_to_distribution
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

PARAM, VALUE, INTERMEDIATE, USER_ATTR, SYSTEM_ATTR = range(5)
"""What a row of details holds."""

KNOWN_SCHEMA = ("v3.2.0.a",)
"""Alembic's revisions of Optuna's tables that are read here without Optuna: that of Optuna 3.2 to 5.0."""

Head = tuple[int, int, TrialState, datetime | None, datetime | None]
"""Trial id, number, state, start and end as they are stored: naive UTC."""
Detail = Sequence[Any]
"""Kind, trial id, name (of a parameter or attribute; the objective's or rung's number), value, text (JSON, or kind of value)."""

_NOT_FINITE = {"INF_POS": math.inf, "INF_NEG": -math.inf, "NAN": math.nan}


@contextmanager
def collector_paused() -> Iterator[None]:
    """Python's search for cycles waits: among a large study's dictionaries it is a quarter of the time, and finds nothing."""
    if (
        not gc.isenabled()
    ):  # whoever turned it off turns it on again: another thread's pause must not outlive this one's
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@collector_paused()
def assemble(heads: Iterable[Head], details: Iterable[Detail]) -> list[FrozenTrial]:
    """The trials, in the order of ``heads``, as ``RDBStorage._build_frozen_trial_from_trial_model`` builds them.

    Trials share their distributions: few differ, and parsing one takes 15 us, a third of Optuna's seven seconds for 10,000. They
    also share attributes of the same text (versions, device, ...), which nobody changes: a fifth of a large study's memory.

    Args:
        heads: one a trial.
        details: of these trials, the parameters of each in the order in which they were suggested.
    """
    trials = {head[0]: _bare(*head) for head in heads}
    values: dict[int, dict[int, float]] = {}
    parsed: dict[str, Any] = {}
    for kind, rows in itertools.groupby(details, key=operator.itemgetter(0)):
        if kind == PARAM:
            for _, trial_id, name, value, text in rows:
                trial, name, found = trials[trial_id], sys.intern(name), _distribution(text)
                trial.distributions[name] = found
                trial.params[name] = found.to_external_repr(value)
        elif kind == VALUE:
            for _, trial_id, name, value, text in rows:
                values.setdefault(trial_id, {})[int(name)] = value if value is not None else _NOT_FINITE[text]
        elif kind == INTERMEDIATE:
            for _, trial_id, name, value, text in rows:
                reported = value if value is not None else _NOT_FINITE[text]
                trials[trial_id].intermediate_values[int(name)] = reported
        elif kind == USER_ATTR:
            for _, trial_id, name, _none, text in rows:
                if (held := parsed.get(text, parsed)) is parsed:  # itself: of no attribute
                    held = parsed[text] = json.loads(text)
                trials[trial_id].user_attrs[sys.intern(name)] = held
        else:
            for _, trial_id, name, _none, text in rows:
                trials[trial_id].system_attrs[sys.intern(name)] = json.loads(text)
    for trial_id, of_trial in values.items():
        trials[trial_id].values = [of_trial[objective] for objective in sorted(of_trial)]
    return list(trials.values())


_distribution = functools.lru_cache(maxsize=4096)(json_to_distribution)


class _ReadTrials(InMemoryStorage):
    """Optuna's storage in memory around trials that are there already; it would copy each of them deeply."""

    def __init__(self, trials: list[FrozenTrial]) -> None:
        super().__init__()
        self._read = trials

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        return [trial for trial in self._read if states is None or trial.state in states]


def study_to_read(
    name: str, direction: StudyDirection, trials: list[FrozenTrial], user_attrs: Mapping[str, Any]
) -> optuna.Study:
    """A study in memory around trials that were read, which nobody writes to."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(level, optuna.logging.WARNING))  # it would say that a study was created
    try:
        study = optuna.create_study(study_name=name, direction=direction, storage=_ReadTrials(trials))
    finally:
        optuna.logging.set_verbosity(level)
    for key, value in user_attrs.items():
        study.set_user_attr(key, value)
    return study


def _bare(
    trial_id: int, number: int, state: TrialState, started: datetime | None, completed: datetime | None
) -> FrozenTrial:
    return FrozenTrial(
        number=number,
        state=state,
        value=None,
        values=None,
        datetime_start=_local(started),
        datetime_complete=_local(completed),
        params={},
        distributions={},
        user_attrs={},
        system_attrs={},
        intermediate_values={},
        trial_id=trial_id,
    )


def _local(utc: datetime | None) -> datetime | None:
    """Optuna stores naive UTC and hands out naive local time."""
    return None if utc is None else utc.replace(tzinfo=UTC).astimezone().replace(tzinfo=None)
