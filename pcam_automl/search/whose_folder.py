"""Whose ``studies/NAME`` is: two storages may hold studies of one name, and a folder belongs to one of them. Opens no database."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import optuna

from pcam_automl.errors import StudyError
from pcam_automl.files import write_json
from pcam_automl.search.storage_url import plain_sqlite_path, safe_url

ID_KEY = "pcam_automl:id"
"""User attribute of a study, made with it; its folder holds the same in ``FILE``."""
FILE = "study.json"


def check_free(folder: Path, url: str) -> None:
    """Before a study is made: whether its folder holds another storage's. What a deleted study of this storage left is taken.

    Raises:
        StudyError: it does.
    """
    held = _held(folder)
    if held is not None and held[1] != _place(url):
        raise _not_ours(folder, held[1])


def give_id(study: optuna.Study, folder: Path, url: str) -> None:
    """Mark a study that has just been made, and its folder."""
    number = uuid.uuid4().hex
    study.set_user_attr(ID_KEY, number)
    write_json(folder / FILE, {"id": number, "storage": _place(url)})


def claim(study: optuna.Study, folder: Path, url: str) -> None:
    """The folder is the study's, or from now on, where it is new on this machine.

    Raises:
        StudyError: it is another's.
    """
    if (fault := foreign(study, folder)) is not None:
        raise fault
    number = study.user_attrs.get(ID_KEY)
    if number is not None and _held(folder) is None:
        write_json(folder / FILE, {"id": number, "storage": _place(url)})


def foreign(study: optuna.Study, folder: Path) -> StudyError | None:
    """What is to be said where the folder is another study's; None where it is this one's, or nobody's. Studies that were made
    before they had an id own whatever is there.
    """
    held, number = _held(folder), study.user_attrs.get(ID_KEY)
    if held is None or number is None or held[0] == number:
        return None
    return _not_ours(folder, held[1])


def _held(folder: Path) -> tuple[str, str] | None:
    """Id and storage that the folder names."""
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return str(found["id"]), safe_url(str(found["storage"]))  # as it is spelled today
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _place(url: str) -> str:
    """The storage, without a password; a file by its whole path."""
    file = plain_sqlite_path(url)
    return safe_url(url) if file is None else f"sqlite:///{file.resolve()}"


def _not_ours(folder: Path, storage: str) -> StudyError:
    return StudyError(
        f"{folder} belongs to the study of that name in {storage}; take another --study name or working directory, "
        f"or remove {folder} if that study is gone"
    )
