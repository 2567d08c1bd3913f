"""Fixtures: a tiny Kaggle folder and the genuine patches."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from data_builders import write_kaggle

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture
def kaggle(tmp_path: Path) -> Path:
    return write_kaggle(tmp_path / "raw")


@pytest.fixture(scope="session")
def genuine_kaggle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 112 + 18 files of the competition."""
    archive = SHARED / "kaggle_real.zip"
    if not archive.is_file():
        pytest.skip("no genuine Kaggle patches: shared/data/kaggle_real.zip is not there")
    root = tmp_path_factory.mktemp("kaggle_real")
    with zipfile.ZipFile(archive) as members:
        members.extractall(root)
    return root
