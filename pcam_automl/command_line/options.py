"""Options that several commands have. Imports nothing slow."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="Raw folder or prepared pack. Else an existing study's own pack, PCAM_AUTOML_DATA, ./data/pack or ./histopathologic-cancer-detection.",
        metavar="PATH",
    ),
]
Groups = Annotated[
    Path | None,
    typer.Option(
        "--groups",
        help="CSV id,group (or id,wsi): the slide of each patch. train_groups.csv beside the labels is used unasked.",
        metavar="CSV",
    ),
]
Domains = Annotated[
    Path | None, typer.Option("--domains", help="CSV id,domain: the scanner or centre of each patch.", metavar="CSV")
]


def checked_name(name: str | None) -> str | None:
    """Before the seconds of importing torch."""
    from pcam_automl.config import check_study_name

    if name is not None:
        check_study_name(name)
    return name


def _checked_storage(url: str | None) -> str | None:
    if url is not None:
        from pcam_automl.search.storage_url import check_scheme

        check_scheme(url)
    return url


def storage_is_there(url: str | None) -> None:
    """For commands that make no study and take long to import."""
    from pcam_automl.config import storage_url
    from pcam_automl.search.storage_url import check_scheme, check_there

    check_scheme(storage_url(url))
    check_there(storage_url(url))


def study_is_there(name: str, url: str | None) -> None:
    """For commands on a study that take long to import."""
    from pcam_automl.search.reading import load_study_to_read

    storage_is_there(url)
    load_study_to_read(name, url, None)


def data_can_be_found(data: Path | None, study: str, url: str | None) -> None:
    """For commands that make a study where there is none, and take long to import: data are named, or lie in a usual place, or
    the study knows some.
    """
    from pcam_automl.config import find_data
    from pcam_automl.errors import DataError, NoStudyError

    try:
        find_data(data)
    except DataError as fault:
        if data is not None:
            raise
        try:
            study_is_there(study, url)
        except NoStudyError:  # any other fault, a server that is not there, is the first thing to say
            raise fault from None


def storage_can_be(url: str | None) -> None:
    """For commands that make one where there is none, and take long to import: whether it, or PCAM_AUTOML_STORAGE, is a URL."""
    from pcam_automl.config import storage_url
    from pcam_automl.search.storage_url import check_scheme

    check_scheme(storage_url(url))


StudyName = Annotated[str, typer.Option("--study", help="Name of the study.", metavar="NAME", callback=checked_name)]
Storage = Annotated[
    str | None,
    typer.Option(
        "--storage",
        help="sqlite:///FILE, postgresql://... or mysql://... Else PCAM_AUTOML_STORAGE, else sqlite:///studies/pcam.db.",
        metavar="URL",
        callback=_checked_storage,
    ),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Deterministic = Annotated[
    bool,
    typer.Option(
        "--deterministic", help="Same seed, same device, same weights: no measurement decides, some speed is lost."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", help="Pin a recipe field, e.g. --set crop_size=64; repeatable.", metavar="FIELD=VALUE"),
]
Threshold = Annotated[
    float | None, typer.Option("--threshold", help="Also write 0/1 labels at this probability.", metavar="T")
]
WeightsFrom = Annotated[
    str | None,
    typer.Option(
        "--weights",
        help="auto (timm's hub where it answers, else from scratch), hub, none, or a folder of safetensors named after the timm model; by default auto where the recipe is pretrained (search: also for recipe default), else none.",
        metavar="auto|hub|none|DIR",
    ),
]

Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=1,
        max=64,
        help="Worker processes on this machine; one a GPU by default, on a CPU one.",
        metavar="N",
    ),
]
WorkersPerDevice = Annotated[
    str | None,
    typer.Option(
        "--workers-per-device",
        help="Workers on each GPU (or the CPU): a number, or auto to measure what fits and pays.",
        metavar="N",
    ),
]
CheckpointQuota = Annotated[
    str,
    typer.Option(
        "--checkpoint-quota",
        help="What paused trials' checkpoints may take on this disk; the least promising go first.",
        metavar="SIZE",
    ),
]
MaxRetries = Annotated[
    int,
    typer.Option(
        "--max-retries",
        min=0,
        help="How often a trial whose worker was killed goes on from its last checkpoint.",
        metavar="N",
    ),
]
Timeout = Annotated[
    str | None,
    typer.Option("--timeout", help="No new trial starts after this time: 90s, 30m, 1h30m.", metavar="TIME"),
]


def _plain(on: bool) -> bool:
    from pcam_automl import terminal

    terminal.PLAIN.on = on or terminal.PLAIN.on
    return on


Plain = Annotated[
    bool, typer.Option("--plain", callback=_plain, help="No bars and tables, a time before each line: for logs.")
]
DEFAULT_QUOTA = "5GB"
WithReport = Annotated[bool, typer.Option("--report/--no-report", help="Write report.html at the end.")]
RecipeName = Annotated[str, typer.Argument(help="Name of a shipped recipe (`recipes` lists them), or a YAML file.")]
Fold = Annotated[
    int, typer.Option("--fold", min=0, max=4, help="Validation fold, for recipes without a valid_share.", metavar="F")
]
SplitSeed = Annotated[
    int, typer.Option("--seed", min=0, help="Seed of the split; the training's is --set seed=N.", metavar="N")
]
