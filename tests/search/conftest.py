"""A tiny study: two test architectures, 192 views a trial."""

from __future__ import annotations

from pathlib import Path

import pytest

from pcam_automl.search.study import Asked

SPACE = """\
base: {batch_size: 16, crop_size: 32}
parameters:
  backbone: {choice: [test_resnet, test_vit]}
  lr: {float: [1.0e-4, 1.0e-2], log: true}
"""


@pytest.fixture
def asked(easy_pack: Path, tmp_path: Path) -> Asked:
    (tmp_path / "tiny.yaml").write_text(SPACE)
    return Asked(data=easy_pack, space=str(tmp_path / "tiny.yaml"), weights="none", views=192, device="cpu")
