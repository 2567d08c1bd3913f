"""Pictures of a trial in Optuna's artifact store, and a note that shows them in optuna-dashboard. Draws nothing."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.artifacts import get_all_artifact_meta, upload_artifact
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.trial import FrozenTrial

from pcam_automl.errors import StudyError
from pcam_automl.files import sha256_of_file, write_faults
from pcam_automl.search.pictures import Pictures

_DASHBOARD_PREFIX = "dashboard:artifacts:"  # optuna_dashboard/artifact/_backend.py
NOTE_HEAD = "### Report of trial {number}\n\nWritten by `pcam-automl`; the whole page is `{page}`."


@dataclass(frozen=True)
class Attached:
    """A picture in the store: its file name, the artifact's id and whether this call uploaded it."""

    name: str
    artifact_id: str
    new: bool


def attach(
    study: optuna.Study, number: int, files: Sequence[Path], pictures: Pictures, *, page: str = "report.html"
) -> list[Attached]:
    """Upload PNGs for a trial and write its note with the pictures inline; the same pictures are not stored twice.

    Optuna refuses to change a finished trial, so its pictures become artifacts of the study, and optuna-dashboard's own
    list of the trial's artifacts (which lies with the study) names them: they appear on the trial's page either way.

    Args:
        study: in the storage that the dashboard serves.
        number: the trial's, finished or not.
        files: PNGs in the order of the note.
        pictures: the store that the dashboard serves.
        page: where the whole report lies, for the note.

    Raises:
        StudyError: the study has no such trial.
        DataError: the disk is full or the folder is read-only.
    """
    trial = _trial(study, number)
    owner = study if trial.state.is_finished() else trial
    storage = study._storage  # Optuna names no public way from a study to its storage
    folder = pictures.folder
    with write_faults(folder):
        folder.mkdir(parents=True, exist_ok=True)
        known = {}
        for meta in get_all_artifact_meta(owner, storage=storage):
            with contextlib.suppress(ArtifactNotFound), pictures.open_reader(meta.artifact_id) as held:
                known[meta.filename, hashlib.sha256(held.read()).hexdigest()] = meta.artifact_id
        attached = []
        for file in files:
            found = known.get((file.name, sha256_of_file(file)))
            artifact_id = found or upload_artifact(
                artifact_store=pictures,
                file_path=str(file),
                study_or_trial=owner,
                storage=storage,
                mimetype="image/png",
            )
            attached.append(Attached(file.name, artifact_id, found is None))
    if trial.state.is_finished():
        _list_with_trial(study, trial, attached)
    _write_note(study, trial, attached, page)
    return attached


def _list_with_trial(study: optuna.Study, trial: FrozenTrial, attached: Sequence[Attached]) -> None:
    """Name the study's artifacts in the dashboard's list of the trial's, as its own uploads were before Optuna had any."""
    for one in attached:
        meta = {"artifact_id": one.artifact_id, "filename": one.name, "mimetype": "image/png", "encoding": None}
        key = f"{_DASHBOARD_PREFIX}{trial._trial_id}:{one.artifact_id}"
        study._storage.set_study_system_attr(study._study_id, key, json.dumps(meta))


def _trial(study: optuna.Study, number: int) -> FrozenTrial:
    for trial in study.get_trials(deepcopy=False):
        if trial.number == number:
            return trial
    raise StudyError(f"study {study.study_name!r} has no trial {number}; `pcam-automl status` lists them")


def _write_note(study: optuna.Study, trial: FrozenTrial, attached: Sequence[Attached], page: str) -> None:
    """Markdown with the dashboard's own addresses of the artifacts."""
    from optuna_dashboard import save_note
    from optuna_dashboard.artifact import get_artifact_path

    handle = optuna.Trial(study, trial._trial_id)  # the dashboard's functions take no FrozenTrial
    pictures = [f"![{a.name.removesuffix('.png')}]({get_artifact_path(handle, a.artifact_id)})" for a in attached]
    save_note(handle, "\n\n".join([NOTE_HEAD.format(number=trial.number, page=page), *pictures]) + "\n")
