"""Where the shipped search spaces, recipes and priors lie, and how a name finds its file. Reads no YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pcam_automl.errors import RecipeError, did_you_mean

Kind = Literal["space", "recipes", "priors"]

_WORDS: dict[Kind, str] = {"space": "search space", "recipes": "recipe", "priors": "prior"}
_SUFFIXES = (".yaml", ".yml")


def _folder(kind: Kind) -> Path:
    """``configs/`` inside the installed wheel, or beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    shipped = package / "configs" / kind
    return shipped if shipped.is_dir() else package.parent / "configs" / kind


def list_configs(kind: Kind) -> list[str]:
    """The sorted names of the shipped files of that kind."""
    return sorted(file.stem for file in _folder(kind).glob("*.yaml"))


def shown_name(path: Path) -> str:
    """How messages name a file that :func:`find_config` found: a shipped one by its name, the user's by its path."""
    shipped = any(path.parent == _folder(kind) for kind in _WORDS)
    return path.stem if shipped else str(path)


def find_config(kind: Kind, name_or_path: str) -> Path:
    """The file of a shipped name (``quick``), or the user's own YAML file (``my/space.yaml``).

    A bare name means a shipped file and nothing else; what ends in ``.yaml`` or ``.yml`` is a path.

    Raises:
        RecipeError: no such name (the nearest one is suggested), or no such file.
    """
    known = list_configs(kind)
    if name_or_path in known:
        return _folder(kind) / f"{name_or_path}.yaml"
    path = Path(name_or_path).expanduser() if name_or_path.startswith("~/") else Path(name_or_path)
    word = _WORDS[kind]
    if path.suffix.lower() not in _SUFFIXES:
        raise RecipeError(
            f"no {word} named {name_or_path!r}{did_you_mean(name_or_path, known)}; "
            f"known: {', '.join(known) or 'none'}; or give the path of a .yaml file"
        )
    if not path.is_file():
        reason = "is a folder" if path.is_dir() else "does not exist"
        raise RecipeError(
            f"{word} file {name_or_path} {reason}{did_you_mean(path.stem, known)}; known: {', '.join(known) or 'none'}"
        )
    return path


def first_line(path: Path) -> str:
    """The description of a shipped file: its first comment line, empty where it has none."""
    with path.open(encoding="utf-8") as file:
        line = file.readline().strip()
    return line.removeprefix("#").strip() if line.startswith("#") else ""
