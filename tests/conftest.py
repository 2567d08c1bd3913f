"""Shared fixtures: an easy tiny set in the Kaggle layout, its pack, and threads that two test workers can share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from easy_set import write_easy_set

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two xdist workers on two cores; intra-op threads would fight
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the hub

REPO = Path(__file__).resolve().parents[1]
SHARED = REPO.parent / "shared"


@pytest.fixture(scope="session")
def easy_raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw folder that tests only read."""
    return write_easy_set(tmp_path_factory.mktemp("easy") / "raw")


@pytest.fixture(scope="session")
def easy_pack(easy_raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its pack, read only, too."""
    from pcam_automl.data.pack import pack
    from pcam_automl.data.sources import open_source

    out = tmp_path_factory.mktemp("packs") / "easy"
    pack(open_source(easy_raw), out)
    return out


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with none of the package's environment variables."""
    monkeypatch.chdir(tmp_path)
    for name in ("PCAM_AUTOML_DATA", "PCAM_AUTOML_STORAGE", "PCAM_AUTOML_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path
