"""Shared fixtures: an easy tiny set in the Kaggle layout, its pack, short probes, threads that two test workers can share."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from easy_set import write_easy_set
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two xdist workers on two cores; intra-op threads would fight
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the hub

# The same examples in every run and no deadline: what a property misses is found by PCAM_TEST_HYPOTHESIS=default, not by somebody's push.
settings.load_profile(os.environ.get("PCAM_TEST_HYPOTHESIS", "ci"))


def pytest_configure(config: pytest.Config) -> None:
    """Only the GPU's own tests see one: the others expect what a CPU does, bit for bit."""
    asked = str(config.getoption("markexpr"))
    if asked and "gpu" not in asked.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks; commands that tests start inherit it


REPO = Path(__file__).resolve().parents[1]
SHARED = REPO.parent / "shared"


@pytest.fixture(scope="session", autouse=True)
def _quick_studies() -> Iterator[None]:
    """A hundred studies are made here. What repeats itself in each of them is done once, and timed by a step, not for seconds.

    Every variant of a network is still timed before it trains. Only modules that the run's tests have imported are touched.
    """
    with pytest.MonkeyPatch.context() as patch:
        if "torch" in sys.modules:
            from pcam_automl.training import compute

            patch.setattr(compute, "THOROUGH", replace(compute.THOROUGH, rounds=1, turn_s=0.0))
        if (plan := sys.modules.get("pcam_automl.search.plan")) is not None:
            patch.setattr(plan, "training_cost", functools.cache(plan.training_cost))  # 0.3 s a network
        if (storage := sys.modules.get("optuna.storages._rdb.storage")) is not None:
            build = storage._VersionManager._create_alembic_script
            made: list[object] = []  # Optuna reads its ten migration scripts at every opening, twice or more: 0.1 s

            def script(self: object) -> object:
                if not made:
                    made.append(build(self))
                return made[0]

            patch.setattr(storage._VersionManager, "_create_alembic_script", script)
        yield


@pytest.fixture(autouse=True)
def _not_deterministic_for_ever() -> Iterator[None]:
    """A deterministic study sets torch's mode for its process; the next test is another."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None and torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(False)


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


@pytest.fixture
def command_line(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs a command line in this process, as one that has just begun: (exit code, stdout, stderr)."""
    import torch

    from pcam_automl import cli, clock

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pcam-automl", *map(str, words)])
        monkeypatch.setattr(clock, "_IMPORTED", time.monotonic())
        torch.set_num_threads(1)
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            torch.use_deterministic_algorithms(False)
        out, err = capfd.readouterr()
        return code, out, err

    return call
