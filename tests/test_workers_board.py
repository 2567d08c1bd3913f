"""The live table of several workers, as a terminal of a given width shows it."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from pcam_automl import terminal
from pcam_automl.workers_board import Board


@pytest.fixture
def board() -> Board:
    board = Board(["cuda:0", "cuda:1", "cpu"], 3, "AUC")
    board.rows[0].begins(17, "tf_efficientnet_lite0", 9_000)
    board.rows[0].views, board.rows[0].rung, board.rows[0].score, board.rows[0].images_per_s = (
        3_000,
        2,
        0.98765,
        12_345.6,
    )
    board.rows[1].begins(18, "a_network_whose_name_is_longer_than_any_column", 9_000)
    return board


def shown(board: Board, width: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    monkeypatch.setattr(terminal, "err", console)
    console.print(board.table())
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_a_line_each_worker(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    header, first, second, third = shown(board, 120, monkeypatch)
    assert header.split() == ["worker", "trial", "backbone", "rung", "AUC", "images/s", "device", "views"]
    assert first.split()[:7] == ["0", "17", "tf_efficientnet_lite0", "2/3", "0.9877", "12,346", "cuda:0"]
    assert second.split()[0:2] == ["1", "18"]
    assert "…" in second
    assert third.split()[:3] == ["2", "-", "starting"]
    assert "━" in first


def test_a_narrow_terminal_keeps_one_line_each(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(board, 76, monkeypatch)
    assert len(lines) == 4
    assert max(map(len, lines)) <= 76
    assert "views" not in lines[0]
    assert lines[1].split()[-1] == "cuda:0"


def test_a_new_trial_starts_from_nothing(board: Board) -> None:
    board.rows[0].begins(20, "resnet18", 600)
    assert (board.rows[0].rung, board.rows[0].score, board.rows[0].views, board.rows[0].total) == (0, None, 0, 600)


def test_plain_lines_have_a_time_and_no_bars(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal.PLAIN, "on", True)
    monkeypatch.setattr(terminal, "err", Console(file=io.StringIO(), force_terminal=True, width=200, highlight=False))
    assert not terminal.Bars().shown
    terminal.say("a line")
    assert terminal.err.file.getvalue()[:2] == "20"  # type: ignore[attr-defined]
    assert terminal.err.file.getvalue().endswith(" a line\n")  # type: ignore[attr-defined]
