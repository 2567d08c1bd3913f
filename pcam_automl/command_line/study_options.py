"""The options that describe a study, of `search` and `submit`. Imports nothing slow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pcam_automl.command_line.options import data_can_be_found

if TYPE_CHECKING:
    from pcam_automl.search.study import Asked

Trials = Annotated[
    int | None,
    typer.Option(
        "--trials",
        "-n",
        min=1,
        help="Total of finished trials (complete and pruned); the same command again does only what is missing.",
        metavar="N",
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(
        "--budget",
        help="Wall clock for the search and finalize together: 30m, 2h. Give it, or --trials, or both.",
        metavar="TIME",
    ),
]
Recipe = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help="Recipe to start from: trial 0, and what the space leaves open; default by default.",
        metavar="NAME",
    ),
]
Space = Annotated[
    str | None,
    typer.Option("--space", help="Search space: default, quick, cnn, lr_only, dense, or a YAML file.", metavar="FILE"),
]
Holdout = Annotated[
    float | None,
    typer.Option(
        "--holdout",
        help="Share of the patches, in whole slides, that nothing is trained or scored on before finalize, in [0, 0.5].",
        metavar="F",
    ),
]
Views = Annotated[
    int | None,
    typer.Option(
        "--views",
        min=64,
        help="Training images of a whole trial; by default the device's speed decides.",
        metavar="N",
    ),
]
Objective = Annotated[
    str | None,
    typer.Option("--objective", help="auc (default), worst_domain_auc or log_loss, on the validation fold."),
]
WarmStart = Annotated[
    str | None,
    typer.Option(
        "--warm-start",
        help="The first trials take the diverse best of another study: its name, or URL#NAME of another storage.",
        metavar="STUDY|URL",
    ),
]
Prior = Annotated[
    str | None,
    typer.Option(
        "--prior",
        help="The first trials take the recipes of a prior (`export-prior` makes one): a shipped name, a YAML file, or none.",
        metavar="NAME|FILE",
    ),
]
Sampler = Annotated[str | None, typer.Option("--sampler", help="tpe, tpe-qmc, gp, cmaes, qmc or random.")]
Pruner = Annotated[str | None, typer.Option("--pruner", help="asha, hyperband, median, wilcoxon or none.")]
Rungs = Annotated[
    int | None,
    typer.Option(
        "--rungs",
        min=1,
        max=4,
        help="Scores of a trial on its way, each after three times the views of the one before: 3 begins at a ninth of a whole trial, 2 at "
        "a third (what `audit` advises where small subsets mislead), 1 prunes nothing.",
        metavar="N",
    ),
]
CostAware = Annotated[bool, typer.Option("--cost-aware", help="Judge proposals by expected improvement per second.")]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Seed of split, sampler and trainings.", metavar="N")]
DomainsOrEstimate = Annotated[
    str | None,
    typer.Option(
        "--domains",
        help="CSV id,domain: the scanner or centre of each patch; or estimate, by the stains of the slides.",
        metavar="CSV|estimate",
    ),
]
Split = Annotated[
    str | None,
    typer.Option("--split", help="slides (default): five folds of whole slides; domains: leave one domain out."),
]
Probe = Annotated[
    str | None,
    typer.Option(
        "--probe",
        help="Rank backbones and crops by a classifier on frozen pretrained features first (20 s): auto, on or off.",
    ),
]
Artifacts = Annotated[
    str | None,
    typer.Option(
        "--artifacts",
        help="s3://BUCKET/PREFIX for checkpoints and scores, where the workers share no disk; credentials as boto3 has them.",
        metavar="URL",
    ),
]
Launcher = Annotated[
    str, typer.Option("--launcher", help="Who starts the workers: here (this machine), or ray.", metavar="here|ray")
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray-address", help="Of the Ray cluster; else RAY_ADDRESS, else one on this machine.", metavar="ADDR"
    ),
]
Grace = Annotated[
    str | None,
    typer.Option(
        "--grace",
        help="A worker of another host without a sign of life for so long is taken for lost; 5m by default.",
        metavar="TIME",
    ),
]
NoThaw = Annotated[bool, typer.Option("--no-thaw", help="With --budget: what is pruned stays ended; for comparisons.")]
ThenFinalize = Annotated[
    bool, typer.Option("--finalize", help="Run finalize right after the search, with its defaults.")
]


def asked_of(command: str, options: Mapping[str, Any]) -> Asked:
    """What is asked of a study, from the options of a command by their parameters' names.

    Raises:
        InputError: neither trials nor a budget, or a value that cannot be read.
        DataError: the data that are named do not exist.
    """
    from pcam_automl.config import parse_duration
    from pcam_automl.errors import InputError
    from pcam_automl.recipe_files import parse_assignments

    def seconds(name: str) -> float | None:
        return None if options[name] is None else parse_duration(options[name])

    pins, budget_s, grace_s = parse_assignments(options["set_"] or []), seconds("budget"), seconds("grace")
    if options["trials"] is None and budget_s is None:
        raise InputError(f"{command} needs --trials N or --budget TIME, e.g. --trials 50 or --budget 30m")
    data_can_be_found(options["data"], options["study"], options["storage"])
    from pcam_automl.search.study import Asked

    domains = options["domains"]
    as_given = """data groups recipe space weights holdout seed sampler pruner views device deterministic objective
    warm_start prior cost_aware probe artifacts rungs"""
    return Asked(
        **{name: options[name] for name in as_given.split()},
        domains=None if domains in (None, "estimate") else Path(domains),
        estimate_domains=domains == "estimate",
        split_by=options["split"],
        pins=pins,
        budget_s=budget_s,
        grace_s=grace_s,
    )


def check_launcher(launcher: str, address: str | None, *, per_device: str | None, no_thaw: bool) -> str | None:
    """None for workers of this machine, else the address of the Ray cluster, empty for the usual one.

    Raises:
        InputError: an unknown launcher, an address without Ray, or what a cluster's workers are not told.
    """
    from pcam_automl.errors import InputError, did_you_mean

    if launcher not in ("here", "ray"):
        raise InputError(f"--launcher must be here or ray, got {launcher!r}{did_you_mean(launcher, ['here', 'ray'])}")
    if launcher == "here" and address is not None:
        raise InputError(f"--ray-address {address} goes with --launcher ray")
    if launcher == "ray" and (per_device is not None or no_thaw):
        raise InputError("--workers-per-device and --no-thaw go with workers of this machine; give --workers N for Ray")
    return None if launcher == "here" else address or ""
