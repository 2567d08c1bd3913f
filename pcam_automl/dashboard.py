"""optuna-dashboard over the studies' storage. It has no login: loopback unless told otherwise."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

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


def check_ports(host: str, port: int, dashboard_port: int) -> None:
    """The two ports of `serve`; a dashboard's of 0 is none.

    Raises:
        InputError: one that cannot be bound, or the same one twice.
    """
    if dashboard_port == port:
        raise InputError(f"--port and --dashboard-port are both {port}; give two")
    check_port(host, port)
    if dashboard_port:
        check_port(host, dashboard_port, option="--dashboard-port")


def serve_dashboard(
    url: str, *, host: str, port: int, studies: Path, ready: Callable[[], None], say: Callable[[str], None]
) -> None:
    """Serve until interrupted.

    Args:
        url: the storage's.
        host: address to bind.
        port: in [1, 65535].
        studies: folder of the studies, which holds their artifacts; those of studies with a bucket come from there, too.
        ready: called once the address is bound.
        say: told of a bucket that cannot be reached.
    """
    import optuna_dashboard

    from pcam_automl.search.pictures import Pictures, mirrors_of
    from pcam_automl.search.storage import open_storage

    check_port(host, port)
    storage = open_storage(url, create=False)
    (studies / "artifacts").mkdir(parents=True, exist_ok=True)
    store = Pictures(studies / "artifacts", mirrors_of(storage, studies, say))
    pages = optuna_dashboard.wsgi(storage, artifact_store=store)
    with make_server(host, port, pages, server_class=_Server, handler_class=_Answers) as server:
        ready()
        faults: list[Exception] = []

        def serve() -> None:
            try:
                server.serve_forever()
            except Exception as fault:  # noqa: BLE001 - raised again below
                faults.append(fault)

        thread = threading.Thread(target=serve, name="dashboard", daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                thread.join(1.0)
        finally:
            server.shutdown()
        if faults:
            raise faults[0]


class _Server(ThreadingMixIn, WSGIServer):
    """A thread a request: a slow page holds up no other, and a signal never falls into one, where it would be swallowed."""

    daemon_threads = True


class _Answers(WSGIRequestHandler):
    def log_message(self, *_: object) -> None:
        """A page asks every few seconds: not worth a line each."""
