"""`audit`, and the lines on ranking and fidelity under `search` and `status`. Computes nothing and imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import optuna

from pcam_automl import terminal
from pcam_automl.config import StudySettings
from pcam_automl.errors import first_few
from pcam_automl.search.audit import READ_ATTRS, Audit, RungAudit, audit_study, first_rung_advice
from pcam_automl.search.lineages import lineages_of, sign_of
from pcam_automl.search.probe_decisions import ProbeFidelity, probe_fidelity, results_of
from pcam_automl.search.ranking import Ranking
from pcam_automl.search.reading import load_study_to_read


def run_audit(name: str, url: str | None, *, as_json: bool) -> None:
    """Print how far each rung's order holds, what pruning there cost, and what to do."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study, settings = load_study_to_read(name, url, (*READ_ATTRS, "recipe"))
    audit = audit_study(study, settings)
    probe = probe_audit(study, settings)
    advised = first_rung_advice(audit, settings.rungs)
    if as_json:
        terminal.print_json(
            {
                "study": name,
                **audit.to_json(),
                "advised_rungs": advised,
                "probe": None if probe is None else probe.to_json(),
            }
        )
        return
    terminal.result(f"study {name}: {audit.n_lineages} recipes with a score; an order is judged by Kendall's tau-b")
    rows = [_row(number, rung) for number, rung in enumerate(audit.rungs, 1)]
    header = ("rung", "views", "scored", "went on", "tau", "tau of all", "regret of pruning", "verdict")
    if rows:
        terminal.table("does the order at a rung hold at the next?", header, rows)
    for line in audit_notes(audit):
        terminal.result(line)
    if any(rung.n_pairs for rung in audit.rungs):
        terminal.result(
            advice(advised, settings.rungs, [n for n, rung in enumerate(audit.rungs, 1) if rung in audit.misleading])
        )
    if probe is not None:
        terminal.result(str(probe))


def probe_audit(study: optuna.Study, settings: StudySettings) -> ProbeFidelity | None:
    """Whether the study's probe ranked as its whole trainings did; None where it had none."""
    results = results_of(settings.plan.get("probe") or {})
    if not results:
        return None
    lineages = lineages_of(study.get_trials(deepcopy=False))
    maximise = sign_of(study) > 0
    return probe_fidelity(lineages, results, whole_step=settings.rungs[-1][0], maximise=maximise, seed=settings.seed)


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


def advice(
    advised: tuple[tuple[int, int], ...] | None, rungs: tuple[tuple[int, int], ...], misleading: Sequence[int] = ()
) -> str:
    """One line: the plan may stay, or a larger first rung. ``misleading``: numbers of the rungs that mislead, from 1."""
    if advised is None and misleading:
        which = " and ".join(map(str, misleading))
        return f"advice: the first rung may stay; the search ends nothing at rung {which} while that misleads"
    if advised is None:
        return "advice: nothing speaks for other rungs so far"
    now = " -> ".join(f"{views:,}" for views, _ in rungs)
    return f"advice: a larger first rung: {' -> '.join(f'{views:,}' for views, _ in advised)} views instead of {now}"


def audit_warning(audit: Audit) -> Iterator[str]:
    """A line for each rung that misleads; none where the others are to be seen with `audit` only."""
    for rung in audit.misleading:
        yield (
            f"warning: scores after {rung.step:,} views say little about those after {rung.next_step:,} ({rung.why}); "
            "`pcam-automl audit` shows more"
        )


def ranking_lines(ranking: Ranking) -> Iterator[str]:
    """The best trial's interval, what it does not beat, and what `finalize` takes."""
    best = ranking.best
    if best is not None:
        low, high = best.interval
        if math.isnan(low):
            of = f"the {ranking.n_patches:,} validation patches"
            lone = f"all {of[4:]}" if ranking.n_clusters < 2 else f"all of a label among {of}"
            yield f"trial {best.number}: no interval, since {lone} are of one slide"
        else:
            alone = ranking.n_clusters == ranking.n_patches  # no slide is known, or each has one patch
            drawn = ", each drawn by itself" if alone else f" drawn by {ranking.n_clusters:,} slides"
            yield (
                f"trial {best.number}: AUC {best.auc:.4f}, 95 % {low:.4f} to {high:.4f} ({ranking.n_patches:,} validation patches{drawn})"
            )
            unbeaten = first_few([str(number) for number in ranking.unbeaten], 10)
            compared = f"{len(ranking.trials)} of {ranking.n_complete} complete trials compared"
            if unbeaten:
                yield f"  it does not beat trial{'s' * (len(ranking.unbeaten) > 1)} {unbeaten} ({compared})"
            elif len(ranking.trials) > 1:
                yield f"  it beats the others ({compared})"
        yield f"  without a confirmation finalize takes trial {ranking.picked}: {ranking.why}"
    for note in ranking.notes:
        yield f"  {note}"
