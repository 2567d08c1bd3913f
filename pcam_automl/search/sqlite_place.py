"""What an SQLite file is good for: one host, a local disk, not too many processes. Opens no database."""

from __future__ import annotations

import re
from pathlib import Path

from pcam_automl.errors import StudyError

MOST_WORKERS = 32
"""One writer at a time: tiny trials fall from 65 to 28 a second between 1 and 24 processes; real ones take seconds each."""
NETWORK_FILE_SYSTEMS = frozenset(
    [
        "nfs",
        "nfs4",
        "cifs",
        "smb",
        "smb2",
        "smb3",
        "smbfs",
        "afs",
        "ncpfs",
        "lustre",
        "gpfs",
        "beegfs",
        "ceph",
        "glusterfs",
        "fuse.glusterfs",
        "fuse.sshfs",
        "sshfs",
        "fuse.ceph",
        "fuse.s3fs",
        "fuse.rclone",
        "pvfs2",
        "orangefs",
        "gfs2",
        "ocfs2",
        "wekafs",
        "panfs",
        "davfs",
        "fuse.davfs2",
        "fuse.drive",  # Google Drive in a Colab notebook
        "9p (drvfs)",  # a drive of Windows under WSL2
    ]
)
MOUNTS = Path("/proc/self/mountinfo")


def check_local(database: Path) -> None:
    """SQLite's locks and its shared memory do not hold over a network.

    Raises:
        StudyError: the file lies on a network file system, as far as this system tells.
    """
    kind = file_system_of(database, MOUNTS)
    if kind in NETWORK_FILE_SYSTEMS:
        raise StudyError(
            f"--storage sqlite:///{database} lies on a network file system ({kind}), which does not lock it reliably; "
            "put the file on a local disk, or take PostgreSQL (docs/distributed.md)"
        )


def check_few(url: str, n_workers: int) -> None:
    """Whether so many workers may share the storage.

    Raises:
        StudyError: it is SQLite, and they are more than it takes.
    """
    if url.startswith("sqlite") and n_workers > MOST_WORKERS:
        raise StudyError(
            f"{n_workers} workers on SQLite, which lets one write at a time; at most {MOST_WORKERS}, or take PostgreSQL (docs/distributed.md)"
        )


def file_system_of(path: Path, mounts: Path = MOUNTS) -> str | None:
    """Type of the file system that holds the path, or would; None where there is no /proc."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    full, best, kind = path.expanduser().resolve(), Path(), None
    for line in lines:
        # 36 35 98:0 /mnt1 /mnt/parent rw,noatime master:1 - ext3 /dev/root rw  (proc(5)); spaces are \040
        before, _, after = line.partition(" - ")
        fields = before.split()
        if len(fields) < 5 or not after:
            continue
        at = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4]))
        if full.is_relative_to(at) and len(at.parts) >= len(best.parts):  # of two on one place the later one is seen
            best, kind = at, after.split()[0] + " (drvfs)" * (after.startswith("9p ") and "drvfs" in after)
    return kind
