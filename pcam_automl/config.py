"""Settings of a run: where studies, storages and data are found, and what a study remembers. Opens nothing."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pcam_automl.errors import DataError, InputError, StudyError
from pcam_automl.goals import Goal, ObjectiveName, goal_of

SplitBy = Literal["slides", "domains"]
DEFAULT_STUDY = "pcam"
STORAGE_VARIABLE = "PCAM_AUTOML_STORAGE"
DEFAULT_STORAGE = "sqlite:///studies/pcam.db"
GRACE_S, LEAST_GRACE_S = 300.0, 2.0
DATA_PLACES = ("data/pack", "histopathologic-cancer-detection")
HOW_TO_GET_DATA = (
    "get it with `kaggle competitions download -c histopathologic-cancer-detection` and unzip it, then give --data FOLDER; "
    "or try `pcam-automl quickstart`, which needs none"
)


def storage_url(given: str | None) -> str:
    """``--storage``, else ``PCAM_AUTOML_STORAGE``, else the default SQLite file under ``studies/``; with the home folder for a ``~``, which
    no shell replaces inside a URL.
    """
    url = given or os.environ.get(STORAGE_VARIABLE) or DEFAULT_STORAGE
    return re.sub(r"^(sqlite(?:\+\w+)?:///)~(?=/)", lambda found: found[1] + Path.home().as_posix(), url)


def studies_folder(url: str) -> Path:
    """Where studies of this storage keep their files: beside the SQLite file, else ``./studies``. Absolute."""
    begin, _, file = url.partition(":///")
    if not re.fullmatch(r"sqlite(\+\w+)?", begin):
        return Path("studies").resolve()
    file = file.partition("?")[0]
    if "%" in file:  # which releases of SQLAlchemy read differently
        import sqlalchemy as sa

        file = sa.make_url(url).database or file
    return Path(file).resolve().parent


def check_study_name(name: str) -> str:
    """A study's name is a folder's name, too.

    Raises:
        StudyError: empty, too long, or with characters that a folder should not have.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name) or name == "packs":
        raise StudyError(
            f"--study must be 1 to 100 letters, digits, dots, dashes or underscores, starting with a letter or digit (and not 'packs'), got {name!r}"
        )
    return name


def find_data(given: Path | None, remembered: str | None = None) -> Path:
    """``--data``, else ``PCAM_AUTOML_DATA``, else what the study remembers, else the usual places.

    Raises:
        DataError: it does not exist, or there is none; the message says how to get the data.
    """
    named = (
        given
        or (Path(text) if (text := os.environ.get("PCAM_AUTOML_DATA")) else None)
        or (Path(remembered) if remembered else None)
    )
    if named is not None:
        path = named.expanduser().resolve()
        if not path.exists():
            raise DataError(f"data: {path} does not exist; {HOW_TO_GET_DATA}")
        return path
    for place in DATA_PLACES:
        if Path(place).is_dir():
            return Path(place).resolve()
    raise DataError(
        f"no data: neither --data, PCAM_AUTOML_DATA, the study, nor ./{' or ./'.join(DATA_PLACES)} names any; {HOW_TO_GET_DATA}"
    )


def parse_duration(text: str) -> float:
    """``90``, ``90s``, ``30m``, ``1h30m``, ``2d`` to seconds.

    Raises:
        InputError: anything else, or nothing at all.
    """
    units = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "": 1.0}
    parts = re.fullmatch(r"\s*((?:\d+(?:\.\d+)?[dhms])*)(\d+(?:\.\d+)?)?\s*", text.lower())
    pairs = re.findall(r"(\d+(?:\.\d+)?)([dhms]?)", text.lower()) if parts else []
    seconds = sum(float(number) * units[unit] for number, unit in pairs)
    if seconds <= 0:
        raise InputError(f"a duration must be positive and look like 90s, 30m or 1h30m, got {text!r}")
    return seconds


def parse_bytes(text: str, option: str = "--checkpoint-quota") -> int:
    """``5GB``, ``800 MB``, ``2000000 B``, ``0``: decimal units, in any case; a number without one may mean anything.

    Raises:
        InputError: anything else.
    """
    given = text.strip().lower()
    plain = given.removesuffix("b").strip()
    units = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
    number, unit = (plain[:-1], units[plain[-1]]) if plain[-1:] in units else (plain, 1)
    try:
        size = float(number) * unit
    except ValueError:
        size = -1.0
    if not 0 <= size < 1e18 or (size > 0 and given[-1].isdigit()):
        raise InputError(f"{option} must be a size like 5GB or 800MB, got {text!r}")
    return int(size)


class Enqueued(BaseModel):
    """Parameters that the trial of one of the first slots takes, and where they come from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    origin: str
    params: dict[str, Any]


class StudySettings(BaseModel):
    """What a study remembers, written once when it is created; every worker and later command reads it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = 1
    data: str
    pack: str
    pack_hash: str
    split_hash: str
    seed: Annotated[int, Field(ge=0)]
    holdout: float
    deterministic: bool = False
    groups: str | None = None
    domains: str | None = None
    weights: str
    start: dict[str, Any]
    space: str
    pins: dict[str, Any]
    sampler: str
    pruner: str
    rungs: tuple[tuple[int, int], ...]
    n_score: int
    cap_s: float | None
    plan: dict[str, Any]
    versions: dict[str, str]
    cost_aware: bool = False
    enqueued: tuple[Enqueued, ...] = ()
    warm_start: str | None = None
    prior: str | None = None
    command: str = ""
    grace_s: Annotated[float, Field(ge=LEAST_GRACE_S)] = GRACE_S
    """Seconds without a sign of life after which a worker of another host is taken for lost."""
    artifacts: str | None = None
    """``s3://bucket/prefix`` where workers without a shared disk keep checkpoints and scores."""
    objective: ObjectiveName = "auc"
    split_by: SplitBy = "slides"
    domains_hash: str | None = None
    """Of the domains that were estimated for this study; None where it takes those of its data."""

    @property
    def goal(self) -> Goal:
        """What the study optimises."""
        return goal_of(self.objective)


def check_unchanged(remembered: dict[str, Any], asked: dict[str, Any], study: str) -> None:
    """Every option given (not None) must equal what the study remembers.

    Raises:
        StudyError: names every contradiction with both values.
    """
    faults = [
        f"--{name} is {value!r}, the study has {remembered[name]!r}"
        for name, value in asked.items()
        if value is not None and value != remembered[name]
    ]
    if faults:
        raise StudyError(
            f"study {study!r} was created otherwise: {'; '.join(faults)}; leave the option out, or take another --study name"
        )
