"""Many workers on a simulated clock: real rung results, the package's own decisions, no training and no sleeping.

A worker takes a trial, spends each rung's recorded seconds and reports its recorded value; pruner and thaw rule are those of a
search and see what had been reported by that moment. Decisions themselves take no time.
"""

from __future__ import annotations

import heapq
import importlib
import importlib.util
import itertools
import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import optuna
from optuna.pruners import BasePruner
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from benchmarks.search.rung_table import RungTable, nearest
from pcam_automl.search.lineages import LINEAGE, THAWED_FROM, lineages_of
from pcam_automl.search.space import SearchSpace

_PROMOTION = "pcam_automl.search.promotion"
CAN_THAW = importlib.util.find_spec(_PROMOTION) is not None


@dataclass
class Job:
    """One row in work: its recipe in the table, and the next rung."""

    row: Any
    recipe: int
    rung: int


@dataclass(frozen=True)
class Run:
    """What a simulated search came to.

    Attributes:
        n_workers: that shared it.
        n_trials: lineages that were started.
        n_complete: of them trained through all rungs.
        n_thawed: times that a paused one went on.
        wall_s: until the last rung ended.
        busy_s: summed over the workers.
        longest_s: from the first start of a lineage to its end, waiting not counted, of the longest one: no number of workers
            is quicker.
        best: (time in s, recipe) whenever a fully trained recipe was better than those before, by validation AUC.
    """

    n_workers: int
    n_trials: int
    n_complete: int
    n_thawed: int
    wall_s: float
    busy_s: float
    longest_s: float
    best: tuple[tuple[float, int], ...]

    def seconds_to(self, value: float, table: RungTable) -> float:
        """When a fully trained recipe first had that validation AUC; infinite if never."""
        return next((when for when, recipe in self.best if table.values[recipe, -1] >= value), math.inf)

    def recipe_at(self, when: float) -> int | None:
        """The best fully trained recipe by then; None before there is one."""
        return next((recipe for moment, recipe in reversed(self.best) if moment <= when), None)


class Book(Protocol):
    """Where rows are kept and asked about: Optuna's study, or plain rows that look like one."""

    def start(self) -> Job: ...
    def thaw(self) -> Job | None: ...
    def report(self, job: Job, value: float) -> bool:
        """Note the value of the job's rung; whether the pruner ends the row there."""
        ...

    def finish(self, job: Job, state: TrialState) -> None: ...


@dataclass
class Rows:
    """Rows drawn from the table with replacement, kept as Optuna's frozen trials; to a pruner it is a study.

    ``thaws``: whether a free worker first takes up a paused lineage that has come to belong to the best (ASHA's promotion).
    """

    table: RungTable
    pruner: BasePruner
    rng: np.random.Generator
    thaws: bool = False
    rows: list[FrozenTrial] = field(default_factory=list)
    direction: StudyDirection = StudyDirection.MAXIMIZE

    def get_trials(self, deepcopy: bool = False, states: Any = None) -> list[FrozenTrial]:
        """The rows, as Optuna's study gives them."""
        return [row for row in self.rows if states is None or row.state in states]

    def start(self) -> Job:
        recipe = int(self.rng.integers(len(self.table)))
        return Job(self._row({LINEAGE: f"{len(self.rows)}", "recipe": recipe}, {}), recipe, 0)

    def _row(self, attrs: dict[str, Any], values: dict[int, float]) -> FrozenTrial:
        number = len(self.rows)
        row = FrozenTrial(number, TrialState.RUNNING, None, None, None, {}, {}, attrs, {}, values, number)
        self.rows.append(row)
        return row

    def thaw(self) -> Job | None:
        if not self.thaws:
            return None
        rule, steps = importlib.import_module(_PROMOTION), self.table.steps
        lineages = lineages_of(self.rows)
        found = rule.promotable(rule.paused_of(lineages, steps), lineages, steps)
        if not found:
            return None
        last = found[0].lineage.last
        attrs = {**last.user_attrs, THAWED_FROM: last.number}
        row = self._row(attrs, dict(found[0].lineage.values))
        return Job(row, attrs["recipe"], found[0].rung + 1)

    def report(self, job: Job, value: float) -> bool:
        job.row.intermediate_values[self.table.steps[job.rung]] = value
        return bool(self.pruner.prune(self, job.row))  # type: ignore[arg-type]

    def finish(self, job: Job, state: TrialState) -> None:
        job.row.state = state
        if state == TrialState.COMPLETE:
            job.row.value = float(self.table.values[job.recipe, -1])


@dataclass
class Sampled:
    """Rows proposed by a sampler in an Optuna study in memory; each proposal stands for the table's nearest recipe."""

    table: RungTable
    space: SearchSpace
    study: optuna.Study
    base: dict[str, Any]

    def start(self) -> Job:
        trial = self.study.ask()
        fields = dict(self.base)
        for parameter in self.space.parameters.values():
            if parameter.active(fields):
                fields[parameter.name] = parameter.suggest(trial)
        return Job(trial, nearest(self.table, self.space, trial.params), 0)

    def thaw(self) -> Job | None:
        return None

    def report(self, job: Job, value: float) -> bool:
        job.row.report(value, self.table.steps[job.rung])
        return bool(job.row.should_prune())

    def finish(self, job: Job, state: TrialState) -> None:
        value = float(self.table.values[job.recipe, -1])
        complete = state == TrialState.COMPLETE and not math.isnan(value)
        if complete:
            self.study.tell(job.row, value)
        else:
            self.study.tell(job.row, state=TrialState.PRUNED)


def simulate(table: RungTable, book: Book, *, n_workers: int, n_trials: int) -> Run:
    """Run ``n_trials`` lineages on ``n_workers``; each worker is free again when its row has ended.

    Args:
        table: seconds and values.
        book: where the rows are kept; made anew for each run.
        n_workers: at least 1.
        n_trials: lineages in all, at least 1.
    """
    last, order = len(table.steps) - 1, itertools.count()
    working: list[tuple[float, int, Job]] = []
    free, n_started, n_complete, n_thawed, busy_s, now = n_workers, 0, 0, 0, 0.0, 0.0
    best: list[tuple[float, int]] = []
    longest_s = 0.0

    def begin_rung(job: Job) -> None:
        nonlocal busy_s
        seconds = float(table.seconds[job.recipe, job.rung])
        busy_s += seconds
        heapq.heappush(working, (now + seconds, next(order), job))

    while True:
        while free:
            job = book.thaw()
            n_thawed += job is not None
            if job is None and n_started < n_trials:
                job, n_started = book.start(), n_started + 1
            if job is None:
                break
            free -= 1
            begin_rung(job)
        if not working:
            return Run(n_workers, n_started, n_complete, n_thawed, now, busy_s, longest_s, tuple(best))
        now, _, job = heapq.heappop(working)
        value = float(table.values[job.recipe, job.rung])
        ends = book.report(job, value)
        if job.rung < last and not ends:
            job.rung += 1
            begin_rung(job)
            continue
        complete = job.rung == last
        longest_s = max(longest_s, float(table.seconds[job.recipe, : job.rung + 1].sum()))
        book.finish(job, TrialState.COMPLETE if complete else TrialState.PRUNED)
        free += 1
        n_complete += complete
        if complete and value > max((table.values[recipe, -1] for _, recipe in best), default=-math.inf):
            best.append((now, job.recipe))
