"""A tiny study: two test architectures, 192 views a trial. Databases of every kind."""

from __future__ import annotations

from pathlib import Path

import pytest
from databases import server_url

from pcam_automl.search.study import Asked

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


@pytest.fixture(
    params=[
        "sqlite",
        pytest.param("postgresql", marks=pytest.mark.postgres),
        pytest.param("mysql", marks=pytest.mark.postgres),
    ]
)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/s.db" if request.param == "sqlite" else server_url(request.param)
