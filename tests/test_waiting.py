"""How threads wait: by who else computes, unless the user has decided."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pcam_automl import waiting


@pytest.mark.parametrize(
    ("running", "cores", "own", "expected"),
    [
        (1, 2, 2, None),  # this process alone
        (2, 2, 2, "1000"),
        (9, 64, 16, None),  # a container of 16 cores on a machine where 48 others are free
        (60, 64, 16, "1000"),
    ],
)
def test_threads_spin_where_nobody_else_computes(
    running: int, cores: int, own: int, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loadavg").write_text(f"0.10 0.20 0.30 {running}/345 6789\n")
    monkeypatch.setattr(waiting, "_RUNNING", tmp_path / "loadavg")
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(own)), raising=False)
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    waiting.choose_waiting()
    assert os.environ.pop("GOMP_SPINCOUNT", None) == expected  # monkeypatch would bring it back


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_the_users_own_setting_holds(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loadavg").write_text("9.0 9.0 9.0 99/345 6789\n")
    monkeypatch.setattr(waiting, "_RUNNING", tmp_path / "loadavg")
    for other in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "mine")
    waiting.choose_waiting()
    assert {os.environ.get(other) for other in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")} == {"mine", None}


def test_a_system_that_does_not_say_counts_as_idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "_RUNNING", tmp_path / "absent")
    assert waiting.n_others_running() == 0
