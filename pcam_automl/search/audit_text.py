"""The fidelity audit in words and cells, for the command and the report. Computes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator

import optuna

from pcam_automl.config import StudySettings
from pcam_automl.search.audit import Audit, RungAudit, first_rung_advice
from pcam_automl.search.lineages import lineages_of, sign_of
from pcam_automl.search.probe_decisions import ProbeFidelity, probe_fidelity, results_of


def probe_audit(study: optuna.Study, settings: StudySettings) -> ProbeFidelity | None:
    """Whether the study's probe ranked as its whole trainings did; None where it had none."""
    results = results_of(settings.plan.get("probe") or {})
    if not results:
        return None
    lineages = lineages_of(study.get_trials(deepcopy=False))
    maximise = sign_of(study) > 0
    return probe_fidelity(lineages, results, whole_step=settings.rungs[-1][0], maximise=maximise, seed=settings.seed)


MOST_RUNGS = 4
"""That ``--rungs`` takes."""
AUDIT_HEADER = ("rung", "views", "scored", "went on", "tau", "tau of all", "regret of pruning", "verdict")


def audit_rows(audit: Audit) -> list[tuple[str, ...]]:
    """A line of :data:`AUDIT_HEADER` for each rung but the last; intervals are of 95 %."""
    return [_row(number, rung) for number, rung in enumerate(audit.rungs, 1)]


def _row(number: int, rung: RungAudit) -> tuple[str, ...]:
    regret = "unknown" if rung.regret is None else f"{rung.regret:.4f} ({rung.n_spared} ran on)"
    return (
        f"{number} -> {number + 1}",
        f"{rung.step:,} -> {rung.next_step:,}",
        f"{rung.n_at}",
        f"{rung.n_pairs}",
        _tau(rung.tau, rung.interval),
        _tau(rung.tau_of_all, rung.interval_of_all),
        regret,
        rung.verdict,
    )


def _tau(tau: float | None, interval: tuple[float, float]) -> str:
    if tau is None:
        return "-"
    return f"{tau:.2f}" if math.isnan(interval[0]) else f"{tau:.2f} ({interval[0]:.2f} to {interval[1]:.2f})"


def audit_notes(audit: Audit) -> Iterator[str]:
    """The reasons of the verdicts and how the table is to be read."""
    if not audit.rungs:
        yield "a trial has one rung here: none is pruned before its end, so that no rung can mislead"
    for number, rung in enumerate(audit.rungs, 1):
        yield f"rung {number} {rung.verdict}: {rung.why}"
    if any(rung.tau is not None and rung.share_of_spread < 1 for rung in audit.rungs):
        yield (
            "only recipes that were good at a rung went on, which makes tau too low; `tau of all` corrects for it (Thorndike's "
            "case 2), on the assumption that scores scatter alike at all heights"
        )
    if audit.rungs:
        yield (
            "regret: how much better the best recipe is that pruning at a rung drops but that ran on, than the best that it keeps; a "
            "lower bound, since few of the dropped run on, and unknown where none did"
        )


def advice(audit: Audit, settings: StudySettings) -> str:
    """One line: the plan may stay, or a larger first rung, and how another study has it."""
    advised, misleading = first_rung_advice(audit, settings.rungs), audit.misleading
    if advised is not None:
        now, then = (" -> ".join(f"{views:,}" for views, _ in rungs) for rungs in (settings.rungs, advised))
        kept = {views for views, _ in settings.rungs}
        if len(settings.rungs) > MOST_RUNGS:  # an epoch each
            return f"a larger first rung: {then} views instead of {now}"
        has = f"--rungs {len(advised)} has it" if advised[0][0] in kept else "--rungs 1 prunes nothing"
        return f"a larger first rung: {then} views instead of {now}; a new --study with {has}"
    if not misleading:
        return "nothing speaks for other rungs so far"
    which = " and ".join(str(n) for n, rung in enumerate(audit.rungs, 1) if rung in misleading)
    if settings.pruner == "asha":
        return f"the first rung may stay; the search ends nothing at rung {which} while that misleads"
    if settings.pruner == "none":
        return f"the first rung may stay; nothing is pruned here, at rung {which} either"
    return f"the first rung may stay; --pruner {settings.pruner} goes on ending trials at rung {which}, which --pruner asha does not while that misleads"
