"""Who goes on: which paused lineage is thawed, and whose checkpoint is given up. Pure functions of lineages; runs nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from optuna.trial import FrozenTrial, TrialState

from pcam_automl.search.lineages import Lineage, has_diverged
from pcam_automl.search.reading import errors_of

MOST_FAILED_THAWS = 1
"""So often is a paused row gone on from again, after going on from it ended by an error."""


@dataclass(frozen=True)
class Paused:
    """A lineage that waits at a rung.

    Attributes:
        lineage: its rows; the newest one is pruned, but for a thaw of it that ended by an error.
        rung: index of the last rung that it has a value of.
        value: that value.
    """

    lineage: Lineage
    rung: int
    value: float


def paused_of(lineages: Sequence[Lineage], steps: Sequence[int]) -> list[Paused]:
    """The lineages that could go on: pruned at a rung before the last one, with a finite value, not diverged.

    Args:
        lineages: of the study.
        steps: what the rungs report at, ascending.
    """
    rows = {lineage.name: _waiting(lineage) for lineage in lineages}
    held = [one for one in lineages if (row := rows[one.name]) is not None and not has_diverged(row)]
    return _between_rungs(held, steps)


def interrupted_of(lineages: Sequence[Lineage], names: Collection[str], steps: Sequence[int]) -> list[Paused]:
    """Of the lineages whose open slots wait for somebody to go on, those that have a rung behind them and one before them.

    Args:
        lineages: of the study.
        names: of those with an open slot.
        steps: what the rungs report at, ascending.
    """
    return _between_rungs([one for one in lineages if one.name in names and not one.is_running], steps)


def _between_rungs(lineages: Sequence[Lineage], steps: Sequence[int]) -> list[Paused]:
    found = []
    for lineage in lineages:
        reached = [number for number, step in enumerate(steps) if step in lineage.values]
        if not reached or reached[-1] == len(steps) - 1:
            continue
        value = lineage.values[steps[reached[-1]]]
        if math.isfinite(value):
            found.append(Paused(lineage, reached[-1], value))
    return found


def _waiting(lineage: Lineage) -> FrozenTrial | None:
    """The paused row that could be gone on from: the last one, or the one before a thaw that an error ended.

    Rows that were interrupted or lost leave their slot open and are gone on with by a claim, or were given up.
    """
    row = lineage.finished
    if row is None or row.state != TrialState.PRUNED:
        return None
    later = [one for one in lineage.rows if one.number > row.number]
    if not later:
        return row
    return row if errors_of(later[-1:]) and len(errors_of(later)) <= MOST_FAILED_THAWS else None


def promotable(
    paused: Sequence[Paused], lineages: Sequence[Lineage], steps: Sequence[int], *, eta: int = 3, sign: float = 1.0
) -> list[Paused]:
    """The paused lineages that belong to the best ``floor(n / eta)`` of the ``n`` at their rung, highest rungs first.

    The promotion rule of asynchronous successive halving (Li et al. 2020, arXiv:1810.05934, algorithm 2): a lineage that was not
    among the best when it reported may be so later, as more come to its rung.

    Args:
        paused: from :func:`paused_of`.
        lineages: all of the study; each counts once at every rung that it has a value of.
        steps: what the rungs report at, ascending.
        eta: one in ``eta`` goes on.
        sign: 1 where larger values are better, -1 where smaller ones are.
    """
    found = []
    for rung in reversed(range(len(steps) - 1)):
        values = sorted((sign * one.values[steps[rung]] for one in lineages if steps[rung] in one.values), reverse=True)
        n_kept = len(values) // eta
        if n_kept:
            found += [one for one in paused if one.rung == rung and sign * one.value >= values[n_kept - 1]]
    return sorted(found, key=lambda one: (-one.rung, -sign * one.value))


def by_promise(paused: Sequence[Paused], *, sign: float = 1.0) -> list[Paused]:
    """The most promising first: those that came furthest, of these the best value, of equals the earliest."""
    return sorted(paused, key=lambda one: (-one.rung, -sign * one.value, one.lineage.rows[0].number))


def seconds_to_next_rung(one: Paused, steps: Sequence[int], decay: float) -> float:
    """Expected seconds until its next score, by the seconds of its last rung; infinite where those are not known.

    Args:
        one: a paused lineage.
        steps: planned views of the rungs; its own views are the same share of each.
        decay: share of a rung's views in the decay branch, which is trained again from the stable state.
    """
    rungs = one.lineage.attr("rungs") or []
    if one.rung >= len(rungs):
        return math.inf
    return float(rungs[one.rung]["seconds"]) * rung_ratio(steps, one.rung, decay)


def rung_ratio(steps: Sequence[int], rung: int, decay: float) -> float:
    """Views that the rung after ``rung`` takes, by those that ``rung`` took; see :mod:`pcam_automl.training.fit`."""
    stable = [0.0, *(step * (1.0 - decay) for step in steps)]
    return (steps[rung + 1] - stable[rung + 1]) / (steps[rung] - stable[rung])


def to_give_up(
    held: Sequence[tuple[str, int]],
    lineages: Sequence[Lineage],
    steps: Sequence[int],
    *,
    quota_bytes: int,
    keep: Collection[str] = (),
    sign: float = 1.0,
    is_busy: Callable[[Lineage], bool] = lambda lineage: lineage.is_running,
) -> list[str]:
    """Lineages whose checkpoints go, the least promising first, until the rest fits.

    Args:
        held: (lineage, bytes) of every checkpoint folder there is.
        lineages: of the study.
        steps: what the rungs report at.
        quota_bytes: what may stay, in bytes.
        keep: lineages that stay whatever their size.
        sign: 1 where larger values are better.
        is_busy: whether a lineage is being trained; it stays.
    """
    of_name = {lineage.name: lineage for lineage in lineages}
    order = [one.lineage.name for one in by_promise(paused_of(lineages, steps), sign=sign)]
    place = {name: number for number, name in enumerate(order)}
    total = sum(size for _, size in held)
    gone = []
    for name, size in sorted(held, key=lambda pair: -place.get(pair[0], len(place))):
        if total <= quota_bytes:
            break
        if name in keep or (name in of_name and is_busy(of_name[name])):
            continue
        gone.append(name)
        total -= size
    return gone
