"""A tiny study: two test architectures, 192 views a trial. Databases of every kind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pcam_automl.errors import StudyError
from pcam_automl.search.storage import engine_of, open_storage
from pcam_automl.search.study import Asked

SERVERS = {
    "postgresql": ("PCAM_TEST_POSTGRES_URL", "postgresql://postgres@127.0.0.1:5432/test"),
    "mysql": ("PCAM_TEST_MYSQL_URL", "mysql://root@127.0.0.1:3306/test"),
}

SPACE = """\
base: {batch_size: 16, crop_size: 32}
parameters:
  backbone: {choice: [test_resnet, test_vit]}
  lr: {float: [1.0e-4, 1.0e-2], log: true}
"""


@pytest.fixture(scope="session")
def asked(easy_pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Asked:
    space = tmp_path_factory.mktemp("space") / "tiny.yaml"
    space.write_text(SPACE)
    return Asked(data=easy_pack, space=str(space), weights="none", views=192, device="cpu")


def server_url(backend: str) -> str:
    variable, local = SERVERS[backend]
    url = os.environ.get(variable, local)
    try:
        engine_of(open_storage(url)).dispose()
    except StudyError as fault:
        pytest.skip(f"no {backend} here ({variable} names none): {fault}")
    return url


@pytest.fixture(
    params=[
        "sqlite",
        pytest.param("postgresql", marks=pytest.mark.postgres),
        pytest.param("mysql", marks=pytest.mark.postgres),
    ]
)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/s.db" if request.param == "sqlite" else server_url(request.param)
