"""`status` and `dashboard`, and a trial in a line. Imports no torch, so that they start at once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from pcam_automl import terminal
from pcam_automl.commands.advised import command_options
from pcam_automl.commands.audit import audit_warning, ranking_lines
from pcam_automl.config import storage_url, studies_folder
from pcam_automl.goals import Goal
from pcam_automl.interrupt import stop_signal
from pcam_automl.search.audit import Audit, audit_study
from pcam_automl.search.lineages import THAWED_FROM
from pcam_automl.search.ranking import Ranking, rank_study
from pcam_automl.search.reading import ERROR, load_study_to_read
from pcam_automl.search.storage_url import safe_url
from pcam_automl.search.summary import READ_ATTRS, READ_OF_COMPLETE, Summary, summarise
from pcam_automl.search.trial_rows import collector_paused
from pcam_automl.search.whose_folder import ID_KEY, foreign

OF_ONE_TRAINING = ("data_key", "train_s")
"""Of a bundle's provenance: what `finalize` also writes beside it, and no other training has."""


@collector_paused()
def run_status(name: str, url: str | None, *, as_json: bool) -> None:
    """Print a study's counts, best trial, importances and seconds."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study, settings = load_study_to_read(name, url, READ_ATTRS, of_complete=READ_OF_COMPLETE)
    summary = summarise(study, settings)
    folder = studies_folder(storage_url(url)) / name
    if (fault := foreign(study, folder)) is not None:
        terminal.say(f"warning: {fault}; of this study only what its storage holds is shown")
        folder = folder / "of another study"  # not there
    ranking = rank_study(study, settings, folder)
    audit = audit_study(study, settings)
    final = final_of(folder, study.user_attrs.get(ID_KEY), command_options(name, url))
    if as_json:
        terminal.print_json({**summary.to_json(), **judged(ranking, audit), "final": final})
        return
    _print_summary(summary, ranking, audit, command_options(name, url))
    if final is not None:
        several = len(final["trials"]) > 1
        of = (
            f"the ensemble of trials {', '.join(map(str, final['trials']))}"
            if several
            else f"of trial {final['trial']}"
        )
        terminal.result(f"final network: {final['model']}, {of}{_scored(final)}")


def _scored(final: dict[str, Any]) -> str:
    if final["auc"] is None:
        return ""
    interval = "" if final["auc_95"] is None else " (95 % {:.4f} to {:.4f})".format(*final["auc_95"])
    return f": AUC {final['auc']:.4f}{interval} on the {final['auc_on']}"


def final_of(folder: Path, study_id: Any, options: str) -> dict[str, Any] | None:
    """What `finalize` wrote into the study's own folder: where the network lies (of an ensemble the folder of all), whose recipe it has,
    and the printed AUC; None where there is none, it lies elsewhere (``--out``) or is of a deleted study of that name.

    Args:
        folder: the study's.
        study_id: the study's own, None where it has none.
        options: those that name it, for advice.
    """
    card_file, model = folder / "final" / "submission.json", folder / "final" / "model"
    if not (card_file.is_file() and model.is_dir()):
        return None
    try:
        card, of_model = _card_and_provenance(folder / "final")
        if is_of_another(of_model, study_id):
            terminal.say(f"{model} is of a deleted study of this name: not shown")
            return None
        if not of_one_training(card, of_model):
            asked = f" {words}" if (words := of_model.get("finalize")) else ""
            terminal.say(
                f"warning: {card_file} is of an older network than {model}, whose finalize was cut off; repeat `pcam-automl finalize{options}{asked}`"
            )
            trial = int(of_model["trial"])
            found = {"model": str(model), "trial": trial, "trials": [trial]}
            return {**found, "auc": None, "auc_on": None, "auc_95": None}
        trials = [int(number) for number in card.get("members") or (card["trial"],)]
        found = {
            "model": str(model if len(trials) == 1 else model.parent),
            "trial": int(card["trial"]),
            "trials": trials,
        }
        return {**found, **{name: card.get(name) for name in ("auc", "auc_on", "auc_95")}}
    except (OSError, ValueError, KeyError, TypeError) as fault:
        terminal.say(
            f"warning: {card_file}, or bundle.json beside it, cannot be read ({type(fault).__name__}: {fault}); `pcam-automl finalize{options}` writes both anew"
        )
        return None


def whole_final(final: Path) -> str | None:
    """The options of a finalize that has come to its end in that folder: what it wrote last is of the network that lies there; else None."""
    try:
        card, of_model = _card_and_provenance(final)
        return str(card.get("finalize", "")) if of_one_training(card, of_model) else None
    # Absent, or of another hand: both are written anew.
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _card_and_provenance(final: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `finalize` wrote beside the network, and what the network's bundle says of itself; raises whatever is wrong with the files."""
    card = json.loads((final / "submission.json").read_text(encoding="utf-8"))
    return card, json.loads((final / "model" / "bundle.json").read_text(encoding="utf-8"))["provenance"]


def of_one_training(card: Mapping[str, Any], provenance: Mapping[str, Any]) -> bool:
    """Whether both are of one training: a finalize that was cut off leaves an older network's card beside the new bundle."""
    return all(card.get(name) == provenance.get(name) for name in OF_ONE_TRAINING)


def is_of_another(provenance: Mapping[str, Any], study_id: Any) -> bool:
    """Whether a bundle says that it is of another study, be it of the same name; False where either does not say."""
    own = provenance.get("study_id")
    return own is not None and study_id is not None and own != study_id


def judged(ranking: Ranking, audit: Audit) -> dict[str, Any]:
    """Both as JSON."""
    return {"ranking": ranking.to_json(), "audit": audit.to_json()}


def print_judged(ranking: Ranking, audit: Audit, options: str) -> None:
    """The lines under a best trial: how sure, and whether small rungs mislead. ``options`` name the study, for advice."""
    for line in (*ranking_lines(ranking), *audit_warning(audit, options)):
        terminal.result(line)


def _print_summary(summary: Summary, ranking: Ranking, audit: Audit, options: str) -> None:
    n_stopped = summary.states.get("fail", 0) - len(summary.errors)
    shown = {**summary.states, "fail": len(summary.errors), "interrupted": n_stopped}
    states = ", ".join(f"{n} {state}" for state, n in shown.items() if n) or "no trials yet"
    terminal.result(f"study {summary.study}: {states}; {terminal.duration(summary.seconds)} of trials")
    if n_stopped:
        terminal.result(
            "  interrupted: ended with its worker (Ctrl-C, a kill), not by an error; another row goes on with it, or has, unless it was given up"
        )
    for reason in sorted(set(summary.errors)):
        terminal.result(f"  {summary.errors.count(reason)} x {reason}")
    if summary.best is None:
        terminal.result("no complete trial yet")
    else:
        best: dict[str, Any] = summary.best
        terminal.result(
            f"best: trial {best['number']}, {summary.settings.goal.label} {best['value']:.4f}, {terminal.duration(best['seconds'] or 0.0)} on {best['device']}"
        )
        print_judged(ranking, audit, options)
        recipe = best["recipe"] or {}
        always = ("backbone", "pretrained", "crop_size", "views")
        varied = [name for name in recipe if name in best["params"] or name in always]
        terminal.table(
            "its recipe",
            ("field", "value"),
            [
                (name, f"{recipe[name]:.4g}" if isinstance(recipe[name], float) else str(recipe[name]))
                for name in varied
            ],
        )
    if summary.importances:
        rows = [(name, f"{share:.1%}", "█" * round(30 * share)) for name, share in summary.importances.items()]
        terminal.table("what mattered (PED-ANOVA share of the variance)", ("parameter", "share", ""), rows)
    else:
        terminal.result(f"parameter importances: {summary.importances_note}")


def finished_line(trial: FrozenTrial, best: FrozenTrial | None, goal: Goal) -> str:
    """A trial that has just ended, and the best one so far."""
    return trial_line(trial, goal) + (f"  best {best.value:.4f} (trial {best.number})" if best is not None else "")


def trial_line(trial: FrozenTrial, goal: Goal) -> str:
    """One trial in one line."""
    attrs, params = trial.user_attrs, trial.params
    reason = str(attrs.get("reason", ""))
    state = trial.state.name.lower()
    if trial.state == TrialState.FAIL:  # Optuna's word also for one that goes on in another row
        state = "failed" if reason.startswith(ERROR) else "stopped"
    score = list(trial.intermediate_values.values())[-1] if trial.intermediate_values else None
    text = f"trial {trial.number:>3} {state:<8} " + (
        f"{goal.short} {score:.4f}" if score is not None else f"{goal.short}   -   "
    )
    text += (f"  {params['backbone']:<24}" if "backbone" in params else "") + (
        f" crop {params['crop_size']}" if "crop_size" in params else ""
    )
    text += f"  {terminal.duration(float(attrs.get('seconds', 0.0)))}"
    if THAWED_FROM in attrs:
        text += f"  after trial {attrs[THAWED_FROM]}"
    if trial.state != TrialState.COMPLETE:
        text += f"  {reason}"
    return text


def warn_of_open_address(host: str, port: int) -> None:
    """A line where others than this machine can reach the dashboard."""
    if host not in ("127.0.0.1", "localhost", "::1"):
        terminal.say(
            f"warning: optuna-dashboard has no login; everyone who reaches {host}:{port} can change and delete studies"
        )


def run_dashboard(url: str | None, *, host: str, port: int) -> None:
    """Serve optuna-dashboard until Ctrl-C."""
    from pcam_automl.dashboard import check_port, serve_dashboard

    url = storage_url(url)
    check_port(host, port)
    warn_of_open_address(host, port)
    line = f"dashboard of {safe_url(url)}: http://{host}:{port}/  (Ctrl-C ends it)"
    with stop_signal("nothing was lost"):
        serve_dashboard(
            url,
            host=host,
            port=port,
            studies=studies_folder(url),
            say=terminal.say,
            ready=lambda: terminal.result(line),
        )
