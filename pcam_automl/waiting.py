"""How torch's threads wait for each other. Imports nothing that computes: it must run before torch is imported."""

from __future__ import annotations

import os
import time
from pathlib import Path

BUSY_SPIN_COUNT = "1000"
"""Turns of libgomp's waiting loop, some microseconds, before a thread sleeps.

`python -m benchmarks waiting`, mobilenetv3_small_100 at 64 px, training images/s alone and beside a busy process: libgomp's
default 675 and 151, this 464 and 222, sleeping at once (OMP_WAIT_POLICY=PASSIVE) 345 and 289.
"""
_RUNNING = Path("/proc/loadavg")
_LOOKS = 3


def choose_waiting() -> None:
    """On a machine with idle cores threads spin as libgomp has it; where others compute, only briefly.

    Judged once, now, for this process and those that it starts; ``GOMP_SPINCOUNT`` or ``OMP_WAIT_POLICY`` of the user's hold.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys() and n_others_running() > _n_spare_cores():
        os.environ["GOMP_SPINCOUNT"] = BUSY_SPIN_COUNT


def n_others_running() -> int:
    """Other threads of the machine that run or could run, the least of three looks within 10 ms; 0 where the system does not
    say (macOS).
    """
    seen = []
    for _ in range(_LOOKS):
        try:
            running = _RUNNING.read_text(encoding="ascii").split()[3].split("/")[0]
        except OSError:
            return 0
        seen.append(max(0, int(running) - 1))
        time.sleep(0.005)
    return min(seen)


def _n_spare_cores() -> int:
    """Cores of the machine that this process may not use: others can have them without disturbing it."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return (os.cpu_count() or 1) - own
