"""`search`, the command with the most options. Imported at every start: nothing slow at the top."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pcam_automl.command_line.options import (
    Data,
    Deterministic,
    Device,
    Groups,
    Json,
    Sets,
    Storage,
    StudyName,
    WeightsFrom,
)
from pcam_automl.command_line.studies import finalize


def search(
    trials: Annotated[
        int | None,
        typer.Option(
            "--trials",
            "-n",
            min=1,
            help="Total of finished trials (complete and pruned); the same command again does only what is missing.",
            metavar="N",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            help="Wall clock for the search and finalize together: 30m, 2h. Give it, or --trials, or both.",
            metavar="TIME",
        ),
    ] = None,
    data: Data = None,
    study: StudyName = "pcam",
    storage: Storage = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            help="Recipe to start from: trial 0, and what the space leaves open; default by default.",
            metavar="NAME",
        ),
    ] = None,
    space: Annotated[
        str | None,
        typer.Option(
            "--space", help="Search space: default, quick, cnn, lr_only, dense, or a YAML file.", metavar="FILE"
        ),
    ] = None,
    set_: Sets = None,
    weights: WeightsFrom = None,
    timeout: Annotated[
        str | None,
        typer.Option("--timeout", help="No new trial starts after this time: 90s, 30m, 1h30m.", metavar="TIME"),
    ] = None,
    holdout: Annotated[
        float | None,
        typer.Option(
            "--holdout", help="Share of the slides that nothing reads before finalize, in [0, 0.5].", metavar="F"
        ),
    ] = None,
    views: Annotated[
        int | None,
        typer.Option(
            "--views",
            min=64,
            help="Training images of a whole trial; by default the device's speed decides.",
            metavar="N",
        ),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option("--objective", help="auc (default), worst_domain_auc or log_loss, on the validation fold."),
    ] = None,
    warm_start: Annotated[
        str | None,
        typer.Option(
            "--warm-start",
            help="The first trials take the diverse best of another study: its name, or URL#NAME of another storage.",
            metavar="STUDY|URL",
        ),
    ] = None,
    prior: Annotated[
        str | None,
        typer.Option(
            "--prior",
            help="The first trials take the recipes of a prior (`export-prior` makes one): a shipped name, a YAML file, or none.",
            metavar="NAME|FILE",
        ),
    ] = None,
    sampler: Annotated[str | None, typer.Option("--sampler", help="tpe, tpe-qmc, gp, cmaes, qmc or random.")] = None,
    pruner: Annotated[str | None, typer.Option("--pruner", help="asha, hyperband, median, wilcoxon or none.")] = None,
    cost_aware: Annotated[
        bool, typer.Option("--cost-aware", help="Judge proposals by expected improvement per second.")
    ] = False,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Seed of split, sampler and trainings.", metavar="N")
    ] = None,
    groups: Groups = None,
    domains: Annotated[
        str | None,
        typer.Option(
            "--domains",
            help="CSV id,domain: the scanner or centre of each patch; or estimate, by the stains of the slides.",
            metavar="CSV|estimate",
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option("--split", help="slides (default): five folds of whole slides; domains: leave one domain out."),
    ] = None,
    device: Device = "auto",
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, max=64, help="Worker processes on this machine; 1 by default.", metavar="N"),
    ] = None,
    workers_per_device: Annotated[
        str | None,
        typer.Option(
            "--workers-per-device",
            help="Workers on each GPU (or the CPU): a number, or auto to measure what fits and pays.",
            metavar="N",
        ),
    ] = None,
    deterministic: Deterministic = False,
    probe: Annotated[
        str | None,
        typer.Option(
            "--probe",
            help="Rank backbones and crops by a classifier on frozen pretrained features first (20 s): auto, on or off.",
        ),
    ] = None,
    checkpoint_quota: Annotated[
        str,
        typer.Option(
            "--checkpoint-quota",
            help="What paused trials' checkpoints may take; the least promising go first.",
            metavar="SIZE",
        ),
    ] = "5GB",
    max_retries: Annotated[
        int,
        typer.Option(
            "--max-retries",
            min=0,
            help="How often a trial whose worker was killed goes on from its last checkpoint.",
            metavar="N",
        ),
    ] = 3,
    no_thaw: Annotated[
        bool, typer.Option("--no-thaw", help="With --budget: what is pruned stays ended; for comparisons.")
    ] = False,
    finalize_: Annotated[
        bool, typer.Option("--finalize", help="Run finalize right after the search, with its defaults.")
    ] = False,
    json: Json = False,
) -> None:
    """Search training recipes with Optuna; every result is stored as it comes."""
    from pcam_automl.config import parse_bytes, parse_duration
    from pcam_automl.errors import InputError
    from pcam_automl.recipe import parse_assignments

    pins = parse_assignments(set_ or [])
    timeout_s = None if timeout is None else parse_duration(timeout)
    budget_s = None if budget is None else parse_duration(budget)
    quota_bytes = parse_bytes(checkpoint_quota)
    if trials is None and budget_s is None:
        raise InputError("search needs --trials N or --budget TIME, e.g. --trials 50 or --budget 30m")
    from pcam_automl.commands.search import run_search
    from pcam_automl.search.study import Asked

    asked = Asked(
        data=data,
        groups=groups,
        domains=None if domains in (None, "estimate") else Path(domains),
        estimate_domains=domains == "estimate",
        split_by=split,
        recipe=recipe,
        space=space,
        pins=pins,
        weights=weights,
        holdout=holdout,
        seed=seed,
        sampler=sampler,
        pruner=pruner,
        views=views,
        device=device,
        deterministic=deterministic,
        budget_s=budget_s,
        objective=objective,
        warm_start=warm_start,
        prior=prior,
        cost_aware=cost_aware,
        probe=probe,
    )
    run_search(
        study,
        storage,
        asked,
        n_trials=trials,
        timeout_s=timeout_s,
        as_json=json and not finalize_,
        n_workers=workers,
        per_device=workers_per_device,
        quota_bytes=quota_bytes,
        thaws=not no_thaw,
        max_retries=max_retries,
    )
    if finalize_:
        finalize(study=study, storage=storage, device=device, json=json)
