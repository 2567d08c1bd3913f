"""optuna-dashboard over the studies' storage. It has no login: loopback unless told otherwise."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path

from pcam_automl.errors import InputError


def check_port(host: str, port: int, option: str = "--port") -> None:
    """Say in one line that the address cannot be bound, before a study is loaded.

    Raises:
        InputError: the port is out of range or taken, or the host is not this machine's.
    """
    if not 0 < port < 65536:
        raise InputError(f"{option} must be in [1, 65535], got {port}")
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as fault:
        raise InputError(
            f"{option} {port} on {host} cannot be used ({fault.strerror}); choose another with {option}"
        ) from None


def serve_dashboard(
    url: str, *, host: str, port: int, studies: Path, ready: Callable[[], None], say: Callable[[str], None]
) -> None:
    """Serve until interrupted, in a thread: a signal that is raised inside a request is swallowed by the server.

    Args:
        url: the storage's.
        host: address to bind.
        port: in [1, 65535].
        studies: folder of the studies, which holds their artifacts; those of studies with a bucket come from there, too.
        ready: called once the storage is open, just before serving.
        say: told of a bucket that cannot be reached.
    """
    import optuna_dashboard

    from pcam_automl.search.pictures import Pictures, mirrors_of
    from pcam_automl.search.storage import open_storage

    check_port(host, port)
    storage = open_storage(url, create=False)
    (studies / "artifacts").mkdir(parents=True, exist_ok=True)
    ready()
    store = Pictures(studies / "artifacts", mirrors_of(storage, studies, say))
    faults: list[BaseException] = []

    def serve() -> None:
        try:
            optuna_dashboard.run_server(storage, host=host, port=port, artifact_store=store)
        except BaseException as fault:  # noqa: BLE001 - raised again below
            faults.append(fault)

    server = threading.Thread(target=serve, name="dashboard", daemon=True)
    server.start()
    while server.is_alive():
        server.join(1.0)
    if faults:
        raise faults[0]
