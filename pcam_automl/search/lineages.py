"""Lineages: one recipe being tried, through however many Optuna rows. Pure functions of trials; reads no study."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

LINEAGE = "lineage"
"""The trial's user attribute that names its lineage: a first run, its retries and its thaws share it."""
THAWED_FROM = "thawed_from"
"""User attribute of a row that goes on from a paused one: that one's trial number."""
DIVERGED = "diverged"
"""Beginning of such a row's user attribute ``reason``."""
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


def sign_of(study: Study) -> float:
    """1 where larger values are better, -1 where smaller ones are: times a value it grows with quality."""
    return -1.0 if study.direction == StudyDirection.MINIMIZE else 1.0


@dataclass(frozen=True)
class Lineage:
    """The rows of one recipe, as every decision sees them: once.

    Attributes:
        name: its key; that of a row that names none is its own.
        rows: in the order of their numbers, at least one.
    """

    name: str
    rows: tuple[FrozenTrial, ...]

    @property
    def values(self) -> dict[int, float]:
        """Step to value, ascending; of a step that several rows report, the last one's."""
        merged: dict[int, float] = {}
        for row in self.rows:
            merged |= row.intermediate_values
        return dict(sorted(merged.items()))

    @property
    def last(self) -> FrozenTrial:
        """The newest row, whatever its state."""
        return self.rows[-1]

    @property
    def finished(self) -> FrozenTrial | None:
        """The newest complete or pruned row; None before there is one."""
        return next((row for row in reversed(self.rows) if row.state in FINISHED), None)

    @property
    def is_running(self) -> bool:
        return self.last.state == TrialState.RUNNING

    def attr(self, name: str) -> Any:
        """A user attribute of the newest row that has it; None where none does."""
        return next((row.user_attrs[name] for row in reversed(self.rows) if name in row.user_attrs), None)


def has_diverged(trial: FrozenTrial) -> bool:
    """Whether the row ended by a loss that is not finite: it is pruned, and nothing goes on from it."""
    return str(trial.user_attrs.get("reason", "")).startswith(DIVERGED)


def lineage_of(trial: FrozenTrial) -> str:
    """The lineage's name; a row that names none is a lineage of its own."""
    name = trial.user_attrs.get(LINEAGE)
    return f"trial {trial.number}" if name is None else str(name)


def counts_in(trials: Iterable[FrozenTrial], lineage: str | None) -> bool:
    """Whether the lineage has a complete or pruned row among these; False for None, a lineage that has no row yet."""
    return any(trial.state in FINISHED and lineage_of(trial) == lineage for trial in trials)


def lineages_of(trials: Iterable[FrozenTrial]) -> list[Lineage]:
    """The lineages, in the order of their first rows."""
    rows: dict[str, list[FrozenTrial]] = {}
    for trial in sorted(trials, key=lambda one: one.number):
        rows.setdefault(lineage_of(trial), []).append(trial)
    return [Lineage(name, tuple(own)) for name, own in rows.items()]


def seconds_of_lineages(trials: Iterable[FrozenTrial]) -> dict[str, float]:
    """What each lineage took in all, its rows together: that of a thawed trial's last row is of its last rung alone."""
    taken: dict[str, float] = {}
    for trial in trials:
        name = lineage_of(trial)
        taken[name] = taken.get(name, 0.0) + float(trial.user_attrs.get("seconds", 0.0))
    return taken


def not_superseded(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The rows without the pruned ones that a later finished row of their lineage goes on from; failed rows stay."""
    newest = {lineage_of(trial): trial.number for trial in trials if trial.state in FINISHED}
    return [t for t in trials if t.state != TrialState.PRUNED or newest[lineage_of(t)] == t.number]


def current_rows(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The rows that count, by number: without those that a later row of their lineage goes on from."""
    kept = {lineage.name: (lineage.last if lineage.is_running else lineage.finished) for lineage in lineages_of(trials)}
    numbers = {row.number for row in kept.values() if row is not None}
    return [trial for trial in trials if trial.number in numbers]
