"""How torch's threads wait for each other. Imports nothing that computes: it must run before torch is imported."""

from __future__ import annotations

import os

SPIN_COUNT = "1000"
"""Turns of libgomp's waiting loop, some microseconds, before a thread sleeps. `python -m benchmarks waiting` compares it with
sleeping at once (OMP_WAIT_POLICY=PASSIVE: small networks lose a third) and with libgomp's own default (slow beside a busy process)."""


def wait_briefly() -> None:
    """Set it, unless the user has decided by ``GOMP_SPINCOUNT`` or ``OMP_WAIT_POLICY``."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
