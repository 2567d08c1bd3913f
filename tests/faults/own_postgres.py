"""A PostgreSQL server of the test's own, which it may stop and kill."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

USER = "postgres"
"""PostgreSQL does not run as root; then it runs as this user."""


class OwnServer:
    """Of one test."""

    def __init__(self, bindir: Path, folder: Path) -> None:
        self.bindir, self.data = bindir, folder / "data"
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = int(free.getsockname()[1])
        self._as = ["runuser", "-u", USER, "--"] if os.geteuid() == 0 else []
        self._run("initdb", "-D", str(self.data), "-U", USER, "--auth=trust", "--no-sync")
        with (self.data / "postgresql.conf").open("a") as file:
            file.write(f"port = {self.port}\nunix_socket_directories = '{folder}'\nlisten_addresses = '127.0.0.1'\n")
        self.start()

    @property
    def url(self) -> str:
        return f"postgresql://{USER}@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        self._run("pg_ctl", "-D", str(self.data), "-w", "-l", str(self.data.parent / "log"), "start")

    def stop(self) -> None:
        """As a restart does: connections are cut."""
        self._run("pg_ctl", "-D", str(self.data), "-w", "-m", "fast", "stop")

    def kill(self) -> None:
        """SIGKILL to the server and all its processes."""
        leader = int((self.data / "postmaster.pid").read_text().split()[0])
        family = subprocess.run(
            ["pgrep", "-P", str(leader)], capture_output=True, text=True, check=False
        ).stdout.split()
        for pid in (leader, *map(int, family)):
            os.kill(pid, signal.SIGKILL)

    def _run(self, *words: str) -> None:
        subprocess.run(
            [*self._as, str(self.bindir / words[0]), *words[1:]], check=True, cwd="/", stdout=subprocess.DEVNULL
        )


def find_bindir() -> Path | None:
    """Where this machine has PostgreSQL's programs, if it has them."""
    found = shutil.which("initdb")
    if found:
        return Path(found).parent
    return next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)


@contextmanager
def own_postgres(bindir: Path) -> Iterator[OwnServer]:
    """Started; gone at the end."""
    folder = Path(tempfile.mkdtemp(prefix="pcam-postgres-"))
    if os.geteuid() == 0:
        known = pwd.getpwnam(USER)
        os.chown(folder, known.pw_uid, known.pw_gid)
    server = OwnServer(bindir, folder)
    try:
        yield server
    finally:
        subprocess.run(
            [*server._as, str(bindir / "pg_ctl"), "-D", str(server.data), "-m", "immediate", "stop"],
            check=False, cwd="/", capture_output=True,
        )  # fmt: skip
        shutil.rmtree(folder, ignore_errors=True)
