"""`audit`, and the lines on ranking and fidelity under `search` and `status`. Computes nothing and imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator

import optuna

from pcam_automl import terminal
from pcam_automl.errors import first_few
from pcam_automl.search.audit import READ_ATTRS, Audit, audit_study, first_rung_advice
from pcam_automl.search.audit_text import AUDIT_HEADER, advice, audit_notes, audit_rows, probe_audit
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
    if audit.rungs:
        terminal.table("does the order at a rung hold at the next?", AUDIT_HEADER, audit_rows(audit))
    for line in audit_notes(audit):
        terminal.result(line)
    if any(rung.n_pairs for rung in audit.rungs):
        terminal.result(f"advice: {advice(audit, settings)}")
    if probe is not None:
        terminal.result(str(probe))


def audit_warning(audit: Audit, options: str) -> Iterator[str]:
    """A line for each rung that misleads; none where the others are to be seen with `audit` only. ``options`` name the study."""
    for rung in audit.misleading:
        yield (
            f"warning: scores after {rung.step:,} views say little about those after {rung.next_step:,} ({rung.why}); "
            f"`pcam-automl audit{options}` shows more"
        )


def ranking_lines(ranking: Ranking) -> Iterator[str]:
    """The best trial's interval, what it does not beat, and what `finalize` takes."""
    best = ranking.best
    if best is not None:
        low, high = best.interval
        if math.isnan(low):
            of = f"the {ranking.n_patches:,} validation {ranking.what}"
            lone = f"all {of[4:]}" if ranking.n_clusters < 2 else f"all of a label among {of}"
            yield f"trial {best.number}: no interval, since {lone} are of one {ranking.over.removesuffix('s')}"
        else:
            alone = ranking.n_clusters == ranking.n_patches  # no slide is known, or each has one patch
            drawn = ", each drawn by itself" if alone else f" drawn by {ranking.n_clusters:,} {ranking.over}"
            yield (
                f"trial {best.number}: AUC {best.auc:.4f}, 95 % {low:.4f} to {high:.4f} ({ranking.n_patches:,} validation {ranking.what}{drawn})"
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
