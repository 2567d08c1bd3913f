"""What a device can do at most, and what a network asks of it: matrix rate, memory rate, FLOPs and bytes of a training step.

Used by training.py on a GPU; the functions run on a CPU as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import wait_for
from pcam_automl.training.compute import Compute

MATRIX_SIDE = 8192
COPY_BYTES = 1 << 30
COUNTED_BATCH = 8


def _best_seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The fastest of some calls, after one that does not count: a ceiling wants the best."""
    call()
    wait_for(device)
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        wait_for(device)
        times.append(time.perf_counter() - began)
    return min(times)


def matrix_flops(device: torch.device, *, side: int = MATRIX_SIDE, repeats: int = 20) -> float:
    """FLOP/s of a bf16 product of two square matrices."""
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    return 2 * side**3 / _best_seconds(lambda: a @ b, device, repeats)


def copy_bytes_per_s(device: torch.device, *, n_bytes: int = COPY_BYTES, repeats: int = 20) -> float:
    """Bytes/s of a copy within the device, read and written ones both counted."""
    source = torch.zeros(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * n_bytes / _best_seconds(lambda: target.copy_(source), device, repeats)


def step_of_image(network: nn.Module, px: int, compute: Compute) -> dict[str, float]:
    """FLOPs and least bytes of an image's forward and backward pass.

    Bytes: what autograd keeps for the backward pass is written once and read once at the very least; a real step moves more.
    Counted is by how much it grows with the batch, so that weights, and the copies of them that autocast makes, are left out.
    """
    network = compute.place(network).train()
    (flops, kept), (more_flops, more_kept) = (
        _step(network, px, compute, n) for n in (COUNTED_BATCH, 2 * COUNTED_BATCH)
    )
    return {"flops": (more_flops - flops) / COUNTED_BATCH, "bytes": 2 * (more_kept - kept) / COUNTED_BATCH}


def _step(network: nn.Module, px: int, compute: Compute, n: int) -> tuple[float, float]:
    """FLOPs of a step of ``n`` images, and bytes that autograd keeps in it."""
    images = compute.layout(torch.randn(n, 3, px, px, device=compute.device))
    own = {p.untyped_storage().data_ptr() for p in (*network.parameters(), *network.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter:
        with saved_tensors_hooks(note, lambda tensor: tensor), compute.autocast():
            loss = network(images).float().square().mean()
        loss.backward()
    network.zero_grad(set_to_none=True)
    return counter.get_total_flops(), sum(kept.values())


def ceilings(step: dict[str, float], flops_per_s: float, bytes_per_s: float) -> dict[str, Any]:
    """Images/s that arithmetic and memory would allow."""
    return {"by_arithmetic": flops_per_s / step["flops"], "by_memory": bytes_per_s / step["bytes"]}
