"""Database servers for tests: by PCAM_TEST_*_URL or on their local ports; a test without one is skipped with a word."""

from __future__ import annotations

import os
import socket

import pytest
import sqlalchemy as sa

from pcam_automl.search.storage import engine_of, open_storage

SERVERS = {
    "postgresql": ("PCAM_TEST_POSTGRES_URL", "postgresql://postgres@127.0.0.1:5432/test"),
    "mysql": ("PCAM_TEST_MYSQL_URL", "mysql://root@127.0.0.1:3306/test"),
}


def server_url(backend: str) -> str:
    variable, local = SERVERS[backend]
    if variable not in os.environ:
        port = sa.make_url(local).port
        try:
            socket.create_connection(("127.0.0.1", int(port or 0)), timeout=5).close()
        except OSError as fault:
            pytest.skip(f"no {backend} here ({variable} names none): port {port}: {fault}")
    url = os.environ.get(variable, local)
    engine_of(open_storage(url)).dispose()  # a server that is there and does not work is a failure
    return url
