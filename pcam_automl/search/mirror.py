"""What machines without a shared disk need of each other, in an S3 bucket: checkpoints, scores, pictures. Trains nothing.

Objects lie under ``<prefix>/<study>/checkpoints/<lineage>/<rung>/``, ``trials/<number>/`` and ``artifacts/<id>``. A checkpoint's
``state.json`` is uploaded last: one without it is incomplete and not seen. Credentials, region and endpoint are boto3's own
(``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``, ...); they are never stored.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pcam_automl.errors import InputError, StudyError, WriteError
from pcam_automl.files import folder_written_whole, written_whole

LISTED_S = 30.0
LAST = "state.json"
"""Of a checkpoint, uploaded after everything else."""
Say = Callable[[str], None]


def parse_s3(url: str) -> tuple[str, str]:
    """Bucket and prefix of ``s3://bucket/prefix``.

    Raises:
        InputError: another form, or credentials in it.
    """
    found = re.fullmatch(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/([\w!.*'()/-]*))?", url)
    if found is None:
        raise InputError(
            f"--artifacts must look like s3://BUCKET/PREFIX, BUCKET being 3 to 63 of a-z, 0-9, '.' and '-', got {re.sub(r'//[^@/]*@', '//***@', url)!r}; credentials come from AWS_ACCESS_KEY_ID, a server of your own from AWS_ENDPOINT_URL"
        )
    return found[1], (found[2] or "").strip("/")


@dataclass(frozen=True)
class Mirror:
    """A study's part of the bucket.

    Attributes:
        client: boto3's.
        bucket: its name.
        root: of the study's objects, without a slash at the end.
        folder: the study's on this machine.
        say: told of what could not be copied; the training goes on.
    """

    client: Any
    bucket: str
    root: str
    folder: Path
    say: Say = lambda text: None
    _listed: list[tuple[float, frozenset[str]]] = field(default_factory=list)

    def check_empty(self) -> None:
        """For a study that is about to be made: whether nothing lies where it will keep its files. Scores of another one's trials,
        which go by their numbers, would be taken for its own.

        Raises:
            StudyError: something does; it is not removed, since it may be that of a study in another database.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            found = self.client.list_objects_v2(Bucket=self.bucket, Prefix=f"{self.root}/", MaxKeys=1).get(
                "KeyCount", 0
            )
        except (BotoCoreError, ClientError) as fault:
            raise InputError(
                f"--artifacts: s3://{self.bucket}/{self.root} cannot be listed ({str(fault)[:160]}); give the credentials the right to list the bucket"
            ) from None
        if found:
            raise StudyError(
                f"s3://{self.bucket}/{self.root}/ holds files of another study; take another --study name or --artifacts prefix, or, if that study "
                "is gone, remove them"
            )

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def push_checkpoint(self, checkpoint: Path) -> None:
        """Upload ``<checkpoints>/<lineage>/<rung>`` and remove what the bucket has of other rungs: earlier ones, and later ones of a deleted
        study of that name.
        """
        lineage, rung = checkpoint.parent.name, checkpoint.name
        with self._faults(f"the checkpoint of lineage {lineage}"):
            files = sorted(checkpoint.iterdir(), key=lambda file: file.name == LAST)
            for file in files:
                self.client.upload_file(str(file), self.bucket, self._key("checkpoints", lineage, rung, file.name))
            self._remove([key for n, keys in self._rungs(lineage).items() if n != int(rung) for key in keys])

    def pull_checkpoint(self, lineage: str) -> None:
        """Bring the newest complete checkpoint here, if it is newer than what is here."""
        with self._faults(f"the checkpoint of lineage {lineage}"):
            rungs = self._complete(lineage)
            here = [int(f.parent.name) for f in (self.folder / "checkpoints" / lineage).glob(f"[0-9]*/{LAST}")]
            if not rungs or max(rungs) <= max(here, default=-1):
                return
            newest = max(rungs)
            with folder_written_whole(self.folder / "checkpoints" / lineage / str(newest)) as partial:
                for key in rungs[newest]:
                    self.client.download_file(self.bucket, key, str(partial / Path(key).name))

    def lineages(self) -> frozenset[str]:
        """Names of those that have a complete checkpoint in the bucket, as of the last half minute."""
        if self._listed and time.monotonic() - self._listed[0][0] < LISTED_S:
            return self._listed[0][1]
        parts: list[list[str]] = []
        with self._faults("the list of checkpoints"):
            prefix = self._key("checkpoints") + "/"
            parts = [key.removeprefix(prefix).split("/") for key in self._keys(prefix)]
        found = frozenset(part[0] for part in parts if len(part) == 3 and part[2] == LAST)
        self._listed[:] = [(time.monotonic(), found)]
        return found

    def drop_checkpoints(self, lineage: str) -> None:
        """Its trial never goes on."""
        self._listed[:] = [(at, names - {lineage}) for at, names in self._listed]
        with self._faults(f"the checkpoints of lineage {lineage}"):
            self._remove([key for keys in self._rungs(lineage).values() for key in keys])

    # -- scores ------------------------------------------------------------------------------------------------------

    def push_trial(self, number: int) -> None:
        """Upload what the trial left in ``trials/<number>``."""
        with self._faults(f"the scores of trial {number}"):
            for file in sorted((self.folder / "trials" / str(number)).glob("*")):
                self.client.upload_file(str(file), self.bucket, self._key("trials", str(number), file.name))

    def pull_trials(self) -> int:
        """Bring here what other machines' trials left; the number of files."""
        n = 0
        with self._faults("the scores of other machines' trials"):
            prefix = self._key("trials") + "/"
            for key in self._keys(prefix):
                number, _, name = key.removeprefix(prefix).partition("/")
                if not number.isdigit() or not re.fullmatch(r"[\w.-]+", name):  # ids never become paths elsewhere
                    continue
                file = self.folder / "trials" / number / name
                if not file.exists():
                    with written_whole(file) as partial:
                        self.client.download_file(self.bucket, key, str(partial))
                    n += 1
        return n

    # -- pictures ----------------------------------------------------------------------------------------------------

    def push_artifact(self, file: Path) -> None:
        """Upload an artifact of Optuna's; its file is named by its id."""
        with self._faults(f"the picture {file.name}"):
            self.client.upload_file(str(file), self.bucket, self._key("artifacts", file.name))

    def pull_artifact(self, artifact_id: str, file: Path) -> bool:
        """Bring an artifact to ``file``; False where the bucket does not have it."""
        from botocore.exceptions import ClientError

        found = False
        with self._faults(f"the picture {artifact_id}"):
            try:
                with written_whole(file) as partial:
                    self.client.download_file(self.bucket, self._key("artifacts", artifact_id), str(partial))
                found = True
            except ClientError as fault:
                # 403: S3's word for a missing key where the credentials may not list
                if fault.response.get("Error", {}).get("Code") not in ("404", "403", "NoSuchKey"):
                    raise
        return found

    def drop_artifact(self, artifact_id: str) -> bool:
        """Remove an artifact from the bucket; whether it was there."""
        keys: list[str] = []
        with self._faults(f"the picture {artifact_id}"):
            key = self._key("artifacts", artifact_id)
            keys = [found for found in self._keys(key) if found == key]
            self._remove(keys)
        return bool(keys)

    # -- objects -----------------------------------------------------------------------------------------------------

    def _key(self, *parts: str) -> str:
        return "/".join((self.root, *parts))

    def _keys(self, prefix: str) -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", ())]

    def _rungs(self, lineage: str) -> dict[int, list[str]]:
        prefix, found = self._key("checkpoints", lineage) + "/", dict[int, list[str]]()
        for key in self._keys(prefix):
            rung, _, name = key.removeprefix(prefix).partition("/")
            if rung.isdigit() and re.fullmatch(r"[\w.-]+", name):
                found.setdefault(int(rung), []).append(key)
        return found

    def _complete(self, lineage: str) -> dict[int, list[str]]:
        return {n: keys for n, keys in self._rungs(lineage).items() if any(key.endswith(f"/{LAST}") for key in keys)}

    def _remove(self, keys: list[str]) -> None:
        for first in range(0, len(keys), 1000):  # S3's own limit
            objects = [{"Key": key} for key in keys[first : first + 1000]]
            self.client.delete_objects(Bucket=self.bucket, Delete={"Objects": objects, "Quiet": True})

    @contextlib.contextmanager
    def _faults(self, what: str) -> Iterator[None]:
        """A bucket that is away costs the others a recomputation, and this trial nothing."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (Boto3Error, BotoCoreError, ClientError, WriteError, OSError) as fault:  # OSError: gone meanwhile, say
            self.say(
                f"{what} could not be copied to or from s3://{self.bucket} ({type(fault).__name__}: {str(fault)[:120]})"
            )


def find_mirror(url: str | None, study: str, folder: Path, say: Say, *, quick: bool = False) -> Mirror | None:
    """The study's part of the bucket, if it has one; where it cannot be reached a line says so and all goes on without it."""
    if url is None:
        return None
    try:
        return open_mirror(url, study, folder, say, quick=quick)
    except InputError as fault:
        say(f"warning: {fault}; going on without it")
        return None


def open_mirror(url: str, study: str, folder: Path, say: Say = lambda text: None, *, quick: bool = False) -> Mirror:
    """The study's part of ``s3://bucket/prefix``, whose bucket must exist.

    Args:
        url: of the bucket.
        study: its name.
        folder: the study's on this machine.
        say: told of what could not be copied.
        quick: give up after seconds, for those who answer people meanwhile; a training waits for a minute or two.

    Raises:
        InputError: boto3 is not installed, a wrong URL, or a bucket that cannot be reached.
    """
    bucket, prefix = parse_s3(url)
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        raise InputError(f"--artifacts {url} needs boto3; run: pip install boto3") from None
    try:
        attempts, connect_s = (2, 3) if quick else (8, 10)
        retries = {"mode": "standard", "max_attempts": attempts}
        client = boto3.client("s3", config=Config(retries=retries, connect_timeout=connect_s))
        client.head_bucket(Bucket=bucket)
    except (BotoCoreError, ClientError, ValueError) as fault:
        raise InputError(
            f"--artifacts {url}: bucket {bucket!r} cannot be reached ({str(fault)[:160]}); check its name, AWS_ENDPOINT_URL and the credentials"
        ) from None
    return Mirror(client, bucket, "/".join(part for part in (prefix, study) if part), folder, say)


def forget(mirror: Mirror | None, checkpoints: Path, lineage: str) -> None:
    """Remove a lineage's checkpoints here and in the bucket."""
    shutil.rmtree(checkpoints / lineage, ignore_errors=True)  # another process may be at the same
    if mirror is not None:
        mirror.drop_checkpoints(lineage)
