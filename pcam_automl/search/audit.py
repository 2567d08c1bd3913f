"""Fidelity audit: does the order at a rung hold at the next, and what does pruning there cost? Reads trials, prunes none."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.trial import FrozenTrial

from pcam_automl.config import StudySettings
from pcam_automl.counter import key_of
from pcam_automl.metrics import percentile_interval
from pcam_automl.search.lineages import Lineage, lineages_of, sign_of

ETA = 3
LEAST_LINEAGES = 8
"""Fewer than so many lineages at both rungs say nothing: of 8 in random order tau is above 0.5 once in 30 times."""
FAITHFUL = 0.3
"""Kendall's tau from which a rung's order is of use: 65 % of all pairs stand in the order of the next rung."""
DOUBTFUL = 0.5
"""A rung misleads only if its tau is surely below this: 75 % of all pairs."""
MOST_PAIRED = 500
"""Of more lineages at both rungs a fixed draw is compared: every pair of them takes part in every draw of the bootstrap."""
AUDIT_ONE_IN, AUDIT_MOST = 12, 3
AUDIT_EVERY = 10
"""Rows between two looks of a search at its own audit."""
READ_ATTRS = ("lineage",)
"""The trials' user attributes that an audit is made of."""

Verdict = Literal["holds", "unclear", "misleads"]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RungAudit:
    """How far a rung can be trusted to prune.

    Attributes:
        step: views at which it is reported, of the plan.
        next_step: of the next rung.
        n_at: lineages with a value at this rung.
        n_pairs: those that have one at the next rung, too.
        tau: Kendall's tau-b between the two rungs over these; None where it is undefined.
        interval: 95 % of it, of bootstrap draws of lineages; NaN where there are too few.
        share_of_spread: standard deviation at this rung (in normal scores) of the lineages that reached the next, as a share
            of that of all; 1 where nothing was selected, about 0.5 where a third went on.
        tau_of_all, interval_of_all: the same corrected for that selection, see :func:`unrestricted_tau`.
        regret: how much better, in the objective's own unit, the best that went through to the last rung is than the best
            of those among them that pruning here keeps, at least 0; None where nothing that it drops went through.
        n_through: lineages with a value at the last rung.
        n_spared: those of them that pruning here would have dropped.
        verdict: ``holds``: tau_of_all is at least 0.3 and surely above 0. ``misleads``: it is below 0.3 and surely below
            0.5. Else, or with fewer than 8 lineages, ``unclear``.
        why: the verdict in words.
    """

    step: int
    next_step: int
    n_at: int
    n_pairs: int
    tau: float | None
    interval: tuple[float, float]
    share_of_spread: float
    tau_of_all: float | None
    interval_of_all: tuple[float, float]
    regret: float | None
    n_through: int
    n_spared: int
    verdict: Verdict
    why: str


@dataclass(frozen=True)
class Audit:
    """The audit of a study, a part for each rung but the last.

    All rungs are scored on the same validation patches, which the objective itself looks at: agreement of two rungs
    does not show that either is right about new slides.
    """

    rungs: tuple[RungAudit, ...]
    n_lineages: int

    @property
    def misleading(self) -> tuple[RungAudit, ...]:
        return tuple(rung for rung in self.rungs if rung.verdict == "misleads")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def audit_trials(
    trials: Iterable[FrozenTrial], steps: Sequence[int], *, maximise: bool = True, n_draws: int = 1000, seed: int = 0
) -> Audit:
    """Audit the rungs from the trials at hand; each lineage counts once, however many rows it has.

    Args:
        trials: rows of a study.
        steps: the plan's rungs, ascending, as they are reported.
        maximise: whether a higher value is better.
        n_draws: of the bootstrap over lineages.
        seed: of the draws.
    """
    lineages = lineages_of(trials)
    table = rung_table(lineages, steps) * (1.0 if maximise else -1.0)
    rungs = [_audit_rung(table, steps, place, n_draws, seed) for place in range(len(steps) - 1)]
    return Audit(tuple(rungs), int((~np.isnan(table)).any(axis=1).sum()) if table.size else 0)


def audit_study(study: optuna.Study, settings: StudySettings) -> Audit:
    """The audit of a study's own rungs."""
    steps = [views for views, _ in settings.rungs]
    trials = study.get_trials(deepcopy=False)
    return audit_trials(trials, steps, maximise=sign_of(study) > 0, seed=settings.seed)


def rung_table(lineages: Sequence[Lineage], steps: Sequence[int]) -> Floats:
    """(lineages, rungs) reported values; NaN where a lineage has none, or one that is not finite."""
    table = np.full((len(lineages), len(steps)), np.nan)
    for row, lineage in enumerate(lineages):
        values = lineage.values
        for column, step in enumerate(steps):
            value = values.get(step, math.nan)
            table[row, column] = value if math.isfinite(value) else math.nan
    return table


def _audit_rung(table: Floats, steps: Sequence[int], place: int, n_draws: int, seed: int) -> RungAudit:
    here, after, final = table[:, place], table[:, place + 1], table[:, -1]
    at = ~np.isnan(here)
    both = at & ~np.isnan(after)
    tau, drawn = tau_draws(here[both], after[both], n_draws, seed)
    enough = int(both.sum()) >= LEAST_LINEAGES
    interval = percentile_interval(drawn) if enough else (math.nan, math.nan)
    spread = share_of_spread(here[at], both[at])
    of_all = None if tau is None else unrestricted_tau(tau, spread)
    interval_of_all = (unrestricted_tau(interval[0], spread), unrestricted_tau(interval[1], spread))
    regret, n_spared = regret_of_pruning(here, final)
    verdict, why = judge(int(both.sum()), of_all, interval_of_all)
    return RungAudit(
        step=steps[place],
        next_step=steps[place + 1],
        n_at=int(at.sum()),
        n_pairs=int(both.sum()),
        tau=tau,
        interval=interval,
        share_of_spread=spread,
        tau_of_all=of_all,
        interval_of_all=interval_of_all,
        regret=regret,
        n_through=int((at & ~np.isnan(final)).sum()),
        n_spared=n_spared,
        verdict=verdict,
        why=why,
    )


def tau_draws(x: Floats, y: Floats, n_draws: int = 1000, seed: int = 0) -> tuple[float | None, Floats]:
    """Kendall's tau-b of two rankings, and of bootstrap draws of their members.

    Args:
        x: (n,) finite values.
        y: (n,) finite values.
        n_draws: draws with replacement.
        seed: of the draws.

    Returns:
        tau-b, None where all of ``x`` or of ``y`` are equal or n < 2, and the draws' (n_draws,), NaN where undefined.
    """
    if len(x) > MOST_PAIRED:
        some = np.random.default_rng(seed).choice(len(x), MOST_PAIRED, replace=False)
        x, y = x[some], y[some]
    n = len(x)
    if n < 2:
        return None, np.full(n_draws, np.nan)
    # Tied copies of a member that was drawn twice count as ties, so a draw's tau is a quadratic form in its counts.
    sign_x, sign_y = (np.sign(z[:, None] - z[None, :]).astype(np.float32) for z in (x, y))
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), n_draws)
    counts = np.vstack([np.ones(n), drawn]).astype(
        np.float32
    )  # all sums are whole numbers below 2**24: exact, and quicker
    agree, in_x, in_y = (
        ((counts @ form) * counts).sum(axis=1, dtype=np.float64) for form in (sign_x * sign_y, sign_x**2, sign_y**2)
    )
    pairs = np.sqrt(in_x * in_y)
    tau = np.divide(agree, pairs, out=np.full(len(counts), np.nan), where=pairs > 0)
    return (None if np.isnan(tau[0]) else float(tau[0])), tau[1:]


def share_of_spread(values: Floats, went_on: NDArray[np.bool_]) -> float:
    """Standard deviation of those that went on as a share of that of all, in normal scores of the ranks; at most 1.

    Args:
        values: (n,) at a rung.
        went_on: (n,) who reached the next rung.
    """
    if went_on.all() or went_on.sum() < 2:
        return 1.0
    rank = values.argsort(kind="stable").argsort(kind="stable")
    scores = np.array([NormalDist().inv_cdf((r + 0.5) / len(values)) for r in rank])
    return float(min(1.0, scores[went_on].std() / scores.std()))


def unrestricted_tau(tau: float, spread: float) -> float:
    """What tau would be had every lineage gone on, not those alone that were best at the rung.

    Pruning selects on the very value whose fidelity is asked for: among the best third, values differ less, noise does
    not, and tau is too low. Thorndike's correction for direct range restriction (case 2; Thorndike, "Personnel
    Selection", 1949; as in Sackett & Yang, J. Applied Psychology 85, 2000) on the normal scale, where
    tau = 2/pi asin(rho) (Greiner). It is exact for a normal copula; lineages that ran through for the audit, or were
    thawed, widen the spread and make the correction smaller, hence surer.

    Args:
        tau: among those that went on, in [-1, 1].
        spread: see :func:`share_of_spread`, in (0, 1].
    """
    if math.isnan(tau) or spread >= 1.0 or spread <= 0.0:
        return tau
    rho = math.sin(math.pi * tau / 2)
    widened = rho / spread
    whole = widened / math.sqrt(1 - rho**2 + widened**2)
    return 2 / math.pi * math.asin(max(-1.0, min(1.0, whole)))


def regret_of_pruning(here: Floats, final: Floats, eta: int = ETA) -> tuple[float | None, int]:
    """What pruning at a rung costs: the best final value less that of the best which pruning there keeps.

    Kept are the best ``max(1, floor(n / eta))`` of the n lineages with a value at the rung, as the pruner does it once
    all are there. Only those that went through to the last rung have a final value, so dropped lineages that would
    have won and never ran through are missing: the regret is a lower bound.

    Args:
        here: (n,) values at the rung, higher is better, NaN where there is none.
        final: (n,) values at the last rung, likewise.
        eta: one in so many is kept.

    Returns:
        The regret, None where none that pruning drops went through, or none that it keeps; and how many went through
        that it drops.
    """
    at = ~np.isnan(here)
    if not at.any():
        return None, 0
    n_kept = max(1, int(at.sum()) // eta)
    kept = at & (here >= np.sort(here[at])[-n_kept])
    through = at & ~np.isnan(final)
    dropped = through & ~kept
    if not dropped.any() or not (through & kept).any():
        return None, int(dropped.sum())
    return float(max(0.0, final[dropped].max() - final[through & kept].max())), int(dropped.sum())


def judge(n_pairs: int, tau: float | None, interval: tuple[float, float]) -> tuple[Verdict, str]:
    """The verdict on a rung and its reason; the rule is that of :class:`RungAudit`."""
    if n_pairs < LEAST_LINEAGES:
        return "unclear", f"too few lineages reached the next rung ({n_pairs} of at least {LEAST_LINEAGES})"
    if tau is None or math.isnan(interval[0]):
        return "unclear", "all values are equal"
    shown = f"tau {tau:.2f} (95 % {interval[0]:.2f} to {interval[1]:.2f})"
    if tau >= FAITHFUL and interval[0] > 0:
        return "holds", f"its order is that of the next rung: {shown}"
    if tau < FAITHFUL and interval[1] < DOUBTFUL:
        return "misleads", f"its order says little about the next rung's: {shown}"
    return "unclear", f"too few lineages to tell: {shown}"


def first_rung_advice(audit: Audit, rungs: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...] | None:
    """The rungs to go on with where the first ones mislead; None where the plan may stay.

    Leading rungs that mislead are dropped, so that the first decision falls on a larger subset. Where that would leave
    whole trainings only, nothing would be pruned any more: then the last of them is doubled instead, if that stays
    within two thirds of a whole training.

    Args:
        audit: of a study with these rungs.
        rungs: (views, subset) of each, ascending; the last is a whole training.

    Raises:
        ValueError: the audit is of other rungs.
    """
    if [rung.step for rung in audit.rungs] != [views for views, _ in rungs[:-1]]:
        raise ValueError(
            f"the audit is of rungs at {[r.step for r in audit.rungs]} views, the plan has {list(rungs[:-1])}"
        )
    n_bad = next((i for i, rung in enumerate(audit.rungs) if rung.verdict != "misleads"), len(audit.rungs))
    if n_bad == 0:
        return None
    kept = tuple((views, subset) for views, subset in rungs[n_bad:])
    views, subset = rungs[n_bad - 1]
    if len(kept) == 1 and 3 * 2 * views <= 2 * kept[0][0]:
        return ((2 * views, min(2 * subset, kept[0][1])), *kept)
    return kept


def misleading_steps(audit: Audit) -> frozenset[int]:
    """The rungs, by the views that trials report at, at which nothing should end."""
    return frozenset(rung.step for rung in audit.misleading)


def runs_through(lineage: str, earlier: Iterable[str] = (), *, seed: int = 0) -> bool:
    """Whether a lineage is trained to the last rung whatever its values, so that pruning can be audited without selection.

    One in 12 by its name alone, at most the first 3 of a study: a draw that no value can sway and that every worker, a
    retry and a second run make alike. Of 50 trials it costs about 2 whole trainings more than the 13 that 50 trials cost
    when a third goes on at each of three rungs.

    Args:
        lineage: its name.
        earlier: names of the lineages that began before it.
        seed: of the study.
    """
    if not _drawn(lineage, seed):
        return False
    return sum(_drawn(other, seed) for other in {*earlier} - {lineage}) < AUDIT_MOST


def _drawn(lineage: str, seed: int) -> bool:
    return key_of(seed, "audit", lineage) % AUDIT_ONE_IN == 0
