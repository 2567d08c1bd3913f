"""Where pictures of trials lie: Optuna's artifact store over a folder, and over the buckets of studies that have one. Draws nothing."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import optuna
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.storages import BaseStorage

from pcam_automl.files import written_whole
from pcam_automl.search.mirror import Mirror, Say, find_mirror
from pcam_automl.search.reading import SETTINGS_KEY


class Pictures:
    """An artifact store (Optuna's protocol): the folder first, then the buckets; what came from one stays in the folder.

    Optuna's own copies a file in place; here it is written aside and renamed.

    Args:
        folder: ``<studies>/artifacts``.
        mirrors: the buckets, asked for whenever the folder does not hold an artifact; what is written goes into each.
    """

    def __init__(self, folder: Path, mirrors: Callable[[], Sequence[Mirror]] = lambda: ()) -> None:
        self.folder, self.mirrors = folder, mirrors

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """Raises ``ArtifactNotFound`` where nobody has it."""
        file = self._file(artifact_id)
        if not file.is_file() and not any(mirror.pull_artifact(artifact_id, file) for mirror in self.mirrors()):
            raise ArtifactNotFound(f"no artifact {artifact_id}")
        return file.open("rb")

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Raises :class:`~pcam_automl.errors.DataError` on a full or read-only disk."""
        file = self._file(artifact_id)
        with written_whole(file) as partial, partial.open("wb") as out:
            shutil.copyfileobj(content_body, out)
        for mirror in self.mirrors():
            mirror.push_artifact(file)

    def remove(self, artifact_id: str) -> None:
        """Raises ``ArtifactNotFound`` where this machine does not have it."""
        try:
            self._file(artifact_id).unlink()
        except FileNotFoundError:
            raise ArtifactNotFound(f"no artifact {artifact_id}") from None
        finally:
            for mirror in self.mirrors():
                mirror.drop_artifact(artifact_id)

    def _file(self, artifact_id: str) -> Path:
        if not re.fullmatch(r"[0-9A-Za-z-]{1,64}", artifact_id):  # an id never becomes a path elsewhere
            raise ArtifactNotFound(f"no artifact {artifact_id[:64]!r}")
        return self.folder / artifact_id


def mirrors_of(storage: BaseStorage, studies: Path, say: Say) -> Callable[[], Sequence[Mirror]]:
    """The buckets of all studies in the storage, those of new studies, too; each is opened once.

    Args:
        storage: of the studies.
        studies: the folder that holds theirs.
        say: told of a bucket that cannot be reached.
    """
    known: dict[str, Mirror | None] = {}

    def found() -> Sequence[Mirror]:
        for study in storage.get_all_studies():
            name = study.study_name
            if name in known or SETTINGS_KEY not in study.user_attrs:
                continue
            url = json.loads(study.user_attrs[SETTINGS_KEY]).get("artifacts")
            known[name] = find_mirror(url, name, studies / name, say)
        return [mirror for mirror in known.values() if mirror is not None]

    return found


def pictures_of(study: optuna.Study, folder: Path, mirror: Mirror | None) -> Pictures:
    """The store for one study's pictures."""
    return Pictures(folder, lambda: [] if mirror is None else [mirror])
