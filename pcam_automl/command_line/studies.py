"""Commands on studies that there are: what they hold, finalize. Imported at every start: nothing slow at the top."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pcam_automl.command_line.options import (
    Data,
    Device,
    Domains,
    Groups,
    Json,
    Storage,
    StudyName,
    Threshold,
    WithReport,
    study_is_there,
)


def status(
    study: StudyName = "pcam",
    storage: Storage = None,
    all_: Annotated[
        bool, typer.Option("--all", help="One line for each study of the storage, in the order they are served.")
    ] = False,
    check: Annotated[
        bool,
        typer.Option("--check", help="Whether rows, slots, lineages, rungs and checkpoints agree; exit code 1 if not."),
    ] = False,
    json: Json = False,
) -> None:
    """Trials by state, the best trial, its interval and its equals, what mattered, seconds spent."""
    if check:
        from pcam_automl.commands.queue import run_check

        if not run_check(study, storage, as_json=json):
            raise typer.Exit(1)
        return
    if all_:
        from pcam_automl.commands.queue import run_status_all

        run_status_all(storage, as_json=json)
        return
    from pcam_automl.commands.status import run_status

    run_status(study, storage, as_json=json)


def audit(study: StudyName = "pcam", storage: Storage = None, json: Json = False) -> None:
    """Whether small rungs mislead: how far each rung's order of the trials holds at the next, and what pruning cost."""
    from pcam_automl.commands.audit import run_audit

    run_audit(study, storage, as_json=json)


def replay(
    trial: Annotated[str, typer.Argument(help="A trial's number, or best.", metavar="TRIAL")],
    study: StudyName = "pcam",
    storage: Storage = None,
    data: Data = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Train a stored trial again from its database row alone and compare every rung."""
    study_is_there(study, storage)
    from pcam_automl.commands.replay import run_replay

    if not run_replay(trial, study, storage, data=data, device=device, as_json=json):
        raise typer.Exit(1)


def export_prior(
    out: Annotated[Path, typer.Option("--out", help="YAML file to make.", metavar="FILE")],
    study: StudyName = "pcam",
    storage: Storage = None,
    name: Annotated[
        str | None,
        typer.Option("--data-name", help="What to call the data; their folder's name by default.", metavar="NAME"),
    ] = None,
    command: Annotated[
        str | None, typer.Option("--command", help="That made the study, where the study does not say.", metavar="TEXT")
    ] = None,
    most: Annotated[int, typer.Option("--most", min=1, max=12, help="Recipes at most.", metavar="K")] = 5,
    json: Json = False,
) -> None:
    """Write the diverse best recipes of a study for `search --prior`, with where they come from."""
    from pcam_automl.commands.prior import run_export_prior

    run_export_prior(study, storage, out, data=name, command=command, k=most, as_json=json)


def dashboard(
    storage: Storage = None,
    port: Annotated[int, typer.Option("--port", help="Port to listen on.")] = 8080,
    host: Annotated[str, typer.Option("--host", help="Address to bind; the dashboard has no login.")] = "127.0.0.1",
) -> None:
    """optuna-dashboard over the same storage, on this machine only unless told otherwise."""
    from pcam_automl.commands.status import run_dashboard

    run_dashboard(storage, host=host, port=port)


def finalize(
    study: StudyName = "pcam",
    trial: Annotated[
        str,
        typer.Option(
            "--trial",
            help="best: of those as good as the highest the cheapest (of a short search's two the one that has seen fewer images); highest: the highest score; or a trial's number.",
            metavar="best|highest|N",
        ),
    ] = "best",
    pick: Annotated[
        str,
        typer.Option(
            "--pick",
            help="What best means: the best value, or the knee of value against latency.",
            metavar="best|knee",
        ),
    ] = "best",
    data: Data = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder for model/, submission.csv and submission.json; studies/<study>/final by default.",
            metavar="DIR",
        ),
    ] = None,
    threshold: Threshold = None,
    epochs: Annotated[
        float | None,
        typer.Option(
            "--epochs",
            help="Passes over the training patches; by default what the budget leaves, without one four times a trial's views (3 to 20 epochs). Recipes with a schedule of their own keep theirs.",
        ),
    ] = None,
    confirm: Annotated[
        int,
        typer.Option(
            "--confirm",
            min=0,
            help="Train so many of the best trials anew first, with fresh seeds and on another fold; 0 takes the search's word.",
            metavar="K",
        ),
    ] = 3,
    confirm_folds: Annotated[
        int, typer.Option("--confirm-folds", min=1, max=4, help="On so many other folds each.", metavar="F")
    ] = 1,
    ensemble: Annotated[
        int,
        typer.Option(
            "--ensemble",
            min=1,
            help="At most so many of the confirmed trials judge together, if that helps out of fold.",
            metavar="K",
        ),
    ] = 1,
    keep_back: Annotated[
        float | None,
        typer.Option(
            "--keep-back",
            help="Share of the patches, in whole slides, that the final training leaves out, so that the printed AUC is of the final "
            "network; by default 0.1 with a budget (not with --no-budget or --epochs) and no holdout, else 0: everything is trained on.",
            metavar="F",
        ),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="What each ingredient was worth on the holdout, or on the slides kept back (needs either).",
        ),
    ] = False,
    no_budget: Annotated[
        bool,
        typer.Option("--no-budget", help="Do not hold the final training within what the study's --budget has left."),
    ] = False,
    no_submission: Annotated[
        bool,
        typer.Option("--no-submission", help="The network alone; `predict --sample CSV` writes the submission later."),
    ] = False,
    storage: Storage = None,
    report: WithReport = True,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Confirm the best trials, retrain the chosen one on all the data but slides kept back, write the checked submission."""
    study_is_there(study, storage)
    from pcam_automl.commands.models import run_finalize
    from pcam_automl.finalizing.result import FinalOptions

    run_finalize(
        study,
        storage,
        which=trial,
        data=data,
        out=out,
        threshold=threshold,
        epochs=epochs,
        device=device,
        as_json=json,
        with_report=report,
        pick=pick,
        options=FinalOptions(
            confirm, confirm_folds, ensemble, compare, keep_back=keep_back, submission=not no_submission
        ),
        within_budget=not no_budget,
    )


def report(
    study: StudyName = "pcam",
    storage: Storage = None,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            help="Of this bundle instead of a study; give its --data (and --groups, --domains).",
            metavar="DIR",
        ),
    ] = None,
    data: Data = None,
    groups: Groups = None,
    domains: Domains = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder of report.html; the study's own beside its database file, or the bundle's, by default.",
            metavar="DIR",
        ),
    ] = None,
    threshold: Annotated[float, typer.Option("--threshold", help="Called tumour at this probability.")] = 0.5,
    device: Device = "auto",
) -> None:
    """One HTML page of pictures: data, search, network, training, scores, what the network looks at."""
    if model is None:
        study_is_there(study, storage)
    from pcam_automl.commands.report import run_report

    run_report(
        study,
        storage,
        model=model,
        data=data,
        groups=groups,
        domains=domains,
        out=out,
        threshold=threshold,
        device=device,
    )
