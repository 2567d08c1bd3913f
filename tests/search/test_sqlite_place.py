"""Where an SQLite study may lie, and for how many workers."""

from __future__ import annotations

from pathlib import Path

import pytest

from pcam_automl.errors import StudyError
from pcam_automl.search import sqlite_place
from pcam_automl.search.sqlite_place import check_few, check_local, file_system_of
from pcam_automl.search.storage import open_storage

MOUNTS = r"""22 1 0:20 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
30 22 0:25 / {0} rw - xfs /dev/vdb rw
31 30 0:26 / {0}/home rw,relatime shared:3 master:1 - nfs4 server:/export rw,vers=4.2
32 31 0:27 / {0}/home/with\040space rw - tmpfs tmpfs rw
33 30 0:28 / {0}/over rw - ext4 /dev/vdc rw
34 33 0:29 / {0}/over rw - fuse.sshfs me@there: rw
35 30 0:30 / {0}/c rw,noatime - 9p drvfs rw,dirsync,aname=drvfs;path=C:\\;uid=1000
36 30 0:31 / {0}/own rw,noatime - 9p none rw,trans=fd
a line that is cut
"""


@pytest.fixture
def mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "mountinfo"
    file.write_text(MOUNTS.replace("{0}", str(tmp_path)))
    monkeypatch.setattr(sqlite_place, "MOUNTS", file)
    return file


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        ("a/s.db", "xfs"),
        ("home/me/s.db", "nfs4"),
        ("homes/s.db", "xfs"),
        ("home/with space/s.db", "tmpfs"),
        ("over/s.db", "fuse.sshfs"),
        ("c/s.db", "9p (drvfs)"),
        ("own/s.db", "9p"),
    ],
)
def test_the_deepest_and_latest_mount_holds_a_file(place: str, kind: str, tmp_path: Path, mounts: Path) -> None:
    assert file_system_of(tmp_path / place, mounts) == kind
    assert file_system_of(Path("/"), mounts) == "ext4"


def test_without_proc_nothing_is_known_and_nothing_refused(tmp_path: Path) -> None:
    assert file_system_of(tmp_path, tmp_path / "none") is None


def test_a_study_on_a_network_file_system_is_refused(tmp_path: Path, mounts: Path) -> None:
    with pytest.raises(StudyError, match=r"lies on a network file system \(nfs4\).*local disk, or take PostgreSQL"):
        open_storage(f"sqlite:///{tmp_path}/home/me/s.db")
    with pytest.raises(StudyError, match=r"network file system \(9p \(drvfs\)\)"):
        open_storage(f"sqlite:///{tmp_path}/c/s.db")
    assert not (tmp_path / "home").exists(), "nothing is made before"
    check_local(tmp_path / "s.db")


def test_sqlite_takes_some_workers_and_a_server_more() -> None:
    check_few("sqlite:///s.db", 32)
    check_few("postgresql://h/d", 64)
    with pytest.raises(StudyError, match=r"33 workers on SQLite.*at most 32, or take PostgreSQL"):
        check_few("sqlite:///s.db", 33)
