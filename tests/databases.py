"""Database servers for tests: by PCAM_TEST_*_URL or on their local ports; a test without one is skipped with a word."""

from __future__ import annotations

import os

import pytest

from pcam_automl.errors import StudyError
from pcam_automl.search.storage import engine_of, open_storage

SERVERS = {
    "postgresql": ("PCAM_TEST_POSTGRES_URL", "postgresql://postgres@127.0.0.1:5432/test"),
    "mysql": ("PCAM_TEST_MYSQL_URL", "mysql://root@127.0.0.1:3306/test"),
}


def server_url(backend: str) -> str:
    variable, local = SERVERS[backend]
    url = os.environ.get(variable, local)
    try:
        engine_of(open_storage(url)).dispose()
    except StudyError as fault:
        pytest.skip(f"no {backend} here ({variable} names none): {fault}")
    return url
