"""Quality against cost: the trials that no other beats in both, and the knee among them. Pure functions; reads no study."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from optuna.trial import FrozenTrial, TrialState

from pcam_automl.cpu import machine_of
from pcam_automl.errors import StudyError
from pcam_automl.goals import Goal
from pcam_automl.search.lineages import current_rows

LATENCY, PARAMETERS = "latency_ms", "n_parameters"
"""The trial's user attributes that a front is drawn against."""
Pick = Literal["best", "knee"]
PICKS: tuple[Pick, ...] = ("best", "knee")

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Tradeoff:
    """Complete trials with their values and costs, one a lineage.

    Attributes:
        trials: n of them, in the order of their numbers.
        values: (n,) of the objective.
        costs: (n,) of the cost attribute, all taken on one device where it is a time.
        front: positions of the trials that no other beats, the cheapest first.
        knee: position of the front's knee; None where no trial is.
        device: that the costs are of; None where they depend on none.
        n_left_out: complete trials without the attribute or of another device.
    """

    trials: tuple[FrozenTrial, ...]
    values: Floats
    costs: Floats
    front: Ints
    knee: int | None
    device: str | None = None
    n_left_out: int = 0


@dataclass(frozen=True)
class Picked:
    """A trial and, in a sentence, why it was taken."""

    trial: FrozenTrial
    why: str


def pareto_front(values: Floats, costs: Floats, *, maximize: bool) -> Ints:
    """Positions that no other dominates (as good and as cheap, and better in one), the cheapest first.

    Equals do not dominate each other: all of them are on the front, by position.

    Args:
        values: (n,) finite.
        costs: (n,) finite, less is better.
        maximize: whether larger values are better.
    """
    gain = values if maximize else -values
    order = np.lexsort((-gain, costs))  # by cost, among equals the best first; stable, so by position
    front: list[int] = []
    for place in order.tolist():
        last = front[-1] if front else None
        if last is None or gain[place] > gain[last] or (gain[place] == gain[last] and costs[place] == costs[last]):
            front.append(place)
    return np.array(front, np.int64)


def knee_of(values: Floats, costs: Floats, *, maximize: bool) -> int | None:
    """Position of the front's knee: farthest from the chord between its ends, both axes stretched to [0, 1].

    From there on more cost buys less quality than on the average of the front (Das, "On characterizing the 'knee' of the
    Pareto curve", Structural Optimization 18, 1999; for discrete points Satopaa et al., "Finding a 'kneedle' in a
    haystack", ICDCSW 2011). A front without a point beyond its chord has no knee, and its best end is given. Of equal
    distances the better value counts.

    Args:
        values: (n,) finite.
        costs: (n,) finite, less is better.
        maximize: whether larger values are better.

    Returns:
        None where there is no point.
    """
    front = pareto_front(values, costs, maximize=maximize)
    if not len(front):
        return None
    gain, cost = (values if maximize else -values)[front], costs[front]
    best = int(front[gain.argmax()])
    if np.ptp(gain) == 0 or np.ptp(cost) == 0:
        return best
    beyond = (gain - gain.min()) / np.ptp(gain) - (cost - cost.min()) / np.ptp(cost)  # times sqrt(1/2), the distance
    if beyond.max() <= 1e-12:
        return best
    return int(front[np.flatnonzero(beyond >= beyond.max() - 1e-12)[-1]])


def tradeoff_of(trials: Sequence[FrozenTrial], goal: Goal, cost: str = LATENCY) -> Tradeoff:
    """The complete trials of a study by objective and cost.

    Times of two devices do not compare: of a study that ran on several, the device with the most trials counts.

    Args:
        trials: of the study, in any state; of a lineage the row that counts.
        goal: the study's.
        cost: the user attribute, smaller is better.
    """
    rows = [t for t in current_rows(trials) if t.state == TrialState.COMPLETE and t.value is not None]
    known = [t for t in rows if cost in t.user_attrs]
    device = None
    if cost == LATENCY and known:
        device = collections.Counter(map(_machine, known)).most_common(1)[0][0]
        known = [t for t in known if _machine(t) == device]
    values = np.array([t.value for t in known], np.float64)
    costs = np.array([t.user_attrs[cost] for t in known], np.float64)
    front, knee = pareto_front(values, costs, maximize=goal.maximize), knee_of(values, costs, maximize=goal.maximize)
    return Tradeoff(tuple(known), values, costs, front, knee, device, len(rows) - len(known))


def _machine(trial: FrozenTrial) -> str:
    device, cpu = machine_of(trial.user_attrs.get("device"), trial.user_attrs.get("cpu"))
    return f"{device}, {cpu}" if cpu else str(device)


def pick_knee(trials: Sequence[FrozenTrial], goal: Goal) -> Picked:
    """The knee of value against latency, and what it gives up for what.

    Raises:
        StudyError: no complete trial has a latency, as those of earlier releases.
    """
    found = tradeoff_of(trials, goal)
    if found.knee is None:
        raise StudyError(
            "--pick knee needs complete trials with a measured latency_ms, there is none; run more trials, or take --pick best"
        )
    knee, best = found.knee, int(found.front[-1])
    trial, n = found.trials[knee], len(found.front)
    of = f"{n} of {len(found.trials)} complete trials that no other beats in {goal.label} and latency"
    left = f" ({found.n_left_out} others were not timed on {found.device})" if found.n_left_out else ""
    if knee == best:
        why = f"it is the best of the {of}{left}: among the cheaper ones none lies beyond the line between the front's ends"
        return Picked(trial, f"picked the knee, trial {trial.number}: {why}")
    gap = abs(float(found.values[knee] - found.values[best]))
    return Picked(
        trial,
        f"picked the knee, trial {trial.number} of the {of}{left}: {found.costs[knee]:.2f} ms a patch instead of "
        f"{found.costs[best]:.2f}, for {gap:.4f} less quality ({goal.short} {found.values[knee]:.4f}) than the best, "
        f"trial {found.trials[best].number}",
    )
