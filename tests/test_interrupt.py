"""Signals: when they raise, and what they wait for."""

from __future__ import annotations

import os
import signal

import pytest

import pcam_automl.interrupt as interrupt_module
from pcam_automl.errors import Interrupted
from pcam_automl.interrupt import signals_held, stop_signal


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_what_must_not_be_left_half_done_is_done_before_a_signal_raises(signum: signal.Signals) -> None:
    done = []

    def write() -> None:
        with signals_held():
            os.kill(os.getpid(), signum)
            done.append("written")
        done.append("never")

    with stop_signal("go on"), pytest.raises(Interrupted, match=signum.name):
        write()
    assert done == ["written"]


def test_without_a_signal_the_handlers_are_as_before() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with signals_held():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_once_more_at_once_is_the_same_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd tells a whole group, and the parent tells its children."""
    now = [100.0]
    monkeypatch.setattr(interrupt_module.time, "monotonic", lambda: now[0])
    with stop_signal("go on") as stop:
        with stop.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            now[0] += interrupt_module.ONE_SIGNAL_S
            with pytest.raises(Interrupted, match="SIGTERM"):
                os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted, match="SIGTERM"):
            stop.check()


def test_sigterm_after_ctrl_c_is_a_second_request() -> None:
    with stop_signal("go on") as stop, stop.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted, match="SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
