"""Where pictures of trials lie: Optuna's artifact store over a folder, and over the buckets of studies that have one. Draws nothing."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import optuna
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.storages import BaseStorage

from pcam_automl.files import written_whole
from pcam_automl.search.mirror import Mirror, Say, find_mirror
from pcam_automl.search.reading import SETTINGS_KEY

AWAY_S = 60.0
"""A bucket that cannot be reached is not asked again for so long."""


class Pictures:
    """An artifact store (Optuna's protocol): the folder first, then the buckets; what came from one stays in the folder.

    Optuna's own copies a file in place; here it is written aside and renamed.

    Args:
        folder: ``<studies>/artifacts``.
        mirrors: the buckets, asked for whenever the folder does not hold an artifact. What is written goes there where there is
            just one: the store is not told of which study an artifact is, and another study's bucket may be another team's.
    """

    def __init__(self, folder: Path, mirrors: Callable[[], Sequence[Mirror]] = lambda: ()) -> None:
        self.folder, self.mirrors = folder, mirrors

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """The artifact's bytes.

        Raises:
            ArtifactNotFound: nobody has it.
        """
        file = self._file(artifact_id)
        if not file.is_file() and not any(mirror.pull_artifact(artifact_id, file) for mirror in self.mirrors()):
            raise ArtifactNotFound(f"no artifact {artifact_id}")
        return file.open("rb")

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Keep an artifact.

        Raises:
            WriteError: the disk is full or read-only.
        """
        file = self._file(artifact_id)
        with written_whole(file) as partial, partial.open("wb") as out:
            shutil.copyfileobj(content_body, out)
        if len(mirrors := self.mirrors()) == 1:
            mirrors[0].push_artifact(file)

    def remove(self, artifact_id: str) -> None:
        """Forget an artifact, here and in the buckets.

        Raises:
            ArtifactNotFound: nobody has it.
        """
        file = self._file(artifact_id)
        here = file.is_file()
        file.unlink(missing_ok=True)
        there = [mirror.drop_artifact(artifact_id) for mirror in self.mirrors()]
        if not here and not any(there):
            raise ArtifactNotFound(f"no artifact {artifact_id}")

    def _file(self, artifact_id: str) -> Path:
        if not re.fullmatch(r"[0-9A-Za-z-]{1,64}", artifact_id):  # an id never becomes a path elsewhere
            raise ArtifactNotFound(f"no artifact {artifact_id[:64]!r}")
        return self.folder / artifact_id


def mirrors_of(storage: BaseStorage, studies: Path, say: Say) -> Callable[[], Sequence[Mirror]]:
    """The buckets of all studies in the storage, those of new studies, too; one that was away is tried again after a minute.

    Args:
        storage: of the studies.
        studies: the folder that holds theirs.
        say: told of a bucket that cannot be reached.
    """
    open_ones: dict[tuple[str, str], Mirror] = {}
    away: dict[tuple[str, str], float] = {}

    def found() -> Sequence[Mirror]:
        here = []
        for study in storage.get_all_studies():
            url = json.loads(study.user_attrs.get(SETTINGS_KEY, "{}")).get("artifacts")
            key = (study.study_name, str(url))
            if url is None or time.monotonic() - away.get(key, -math.inf) < AWAY_S:
                continue
            if key not in open_ones:
                mirror = find_mirror(url, study.study_name, studies / study.study_name, say, quick=True)
                if mirror is None:
                    away[key] = time.monotonic()
                    continue
                open_ones[key] = mirror
            here.append(open_ones[key])
        return here

    return found


def pictures_of(study: optuna.Study, folder: Path, mirror: Mirror | None) -> Pictures:
    """The store for one study's pictures."""
    return Pictures(folder, lambda: [] if mirror is None else [mirror])
