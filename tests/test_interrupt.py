"""Signals: when they raise, and what they wait for."""

from __future__ import annotations

import os
import signal

import pytest

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
