"""Commands on data and submissions. Imported at every start: nothing slow at the top."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pcam_automl.command_line.options import Device, Domains, Groups, Json


def prepare(
    raw: Annotated[Path, typer.Argument(help="Kaggle folder, class folders (0/, 1/) or PCam HDF5 folder.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the pack.", metavar="DIR")],
    groups: Groups = None,
    domains: Domains = None,
    sample: Annotated[
        Path | None, typer.Option("--sample", help="Sample submission of another name or place.", metavar="CSV")
    ] = None,
    keep_outliers: Annotated[
        bool, typer.Option("--keep-outliers", help="Train on all-dark and all-bright patches, too.")
    ] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Re-read the source and compare every patch.")] = False,
    json: Json = False,
) -> None:
    """Check a raw source and pack it into memory-mapped arrays."""
    from pcam_automl.commands.data import run_prepare

    run_prepare(
        raw, out, groups=groups, domains=domains, sample=sample, keep_outliers=keep_outliers, check=verify, as_json=json
    )


def synth(
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    patches: Annotated[
        int, typer.Option("--patches", help="Number of patches, train and test together.", metavar="N")
    ] = 6000,
    slides: Annotated[int, typer.Option("--slides", help="Number of slides.", metavar="S")] = 24,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
) -> None:
    """Write a synthetic set in the Kaggle layout, with groups, domains, masks and test labels."""
    from pcam_automl.commands.data import run_synth

    run_synth(out, n_patches=patches, n_slides=slides, seed=seed)


def quickstart(
    out: Annotated[
        Path,
        typer.Option("--out", help="Folder for everything it makes; an existing run in it goes on.", metavar="DIR"),
    ] = Path("studies/quickstart"),
    patches: Annotated[int, typer.Option("--patches", help="Number of synthetic patches.")] = 5000,
    trials: Annotated[int, typer.Option("--trials", min=1, help="Number of trials.")] = 8,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    device: Device = "auto",
) -> None:
    """The whole path on a synthetic set: synth, prepare, search, finalize, score."""
    from pcam_automl.commands.quickstart import run_quickstart

    run_quickstart(out, n_patches=patches, n_trials=trials, seed=seed, device=device)


def score(
    submission: Annotated[Path, typer.Argument(help="CSV id,label with probabilities.")],
    labels: Annotated[Path, typer.Option("--labels", help="CSV id,label with the truth.", metavar="CSV")],
    groups: Annotated[
        Path | None,
        typer.Option(
            "--groups",
            help="CSV id,group: the slide of each patch; without it the interval treats patches as independent.",
            metavar="CSV",
        ),
    ] = None,
    threshold: Annotated[float, typer.Option("--threshold", min=0.0, max=1.0, help="For the accuracy.")] = 0.5,
    json: Json = False,
) -> None:
    """AUC of a submission against true labels, with its interval."""
    from pcam_automl.commands.score import run_score

    run_score(submission, labels, groups=groups, threshold=threshold, as_json=json)


def check_submission(
    submission: Annotated[Path, typer.Argument(help="CSV to check.")],
    sample: Annotated[
        Path, typer.Option("--sample", help="Sample submission with the ids that are wanted, in order.", metavar="CSV")
    ],
) -> None:
    """Check ids, order, NaN and range of a submission against the sample."""
    from pcam_automl.commands.score import run_check_submission

    run_check_submission(submission, sample)
