"""How long a network takes for one patch. Trains nothing and scores nothing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from pcam_automl.training.compute import Compute

LIMIT_S, MOST_TIMED, LEAST_TIMED = 0.1, 15, 3
"""Forward passes are timed until so many seconds or so many passes are over, but so many at least."""
_WARM_UP = 2  # the first pass allocates and picks kernels


@torch.inference_mode()
def latency_ms(
    network: nn.Module, side_px: int, compute: Compute, *, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Median milliseconds of a forward pass over a batch of one, from a patch on the device to its logit there.

    In evaluation mode, in the training's precision and layout, with the threads that this process has; fetching,
    cropping, normalising and test-time views are not in it. Other work on the machine is: compare trials of one machine.

    Args:
        network: on ``compute.device``; each module's mode is as before afterwards.
        side_px: of the network's square input.
        compute: of the training.
        clock: seconds.
    """
    device = torch.device(compute.device)
    modes = {module: module.training for module in network.modules()}
    network.eval()
    image = compute.layout(torch.full((1, 3, side_px, side_px), 0.5, device=device))
    taken: list[float] = []
    try:
        with torch.compiler.set_stance("force_eager" if compute.compiled else "default"), compute.autocast():
            for number in range(_WARM_UP + MOST_TIMED):
                began = clock()
                network(image)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                taken.append(clock() - began)
                if number >= _WARM_UP + LEAST_TIMED - 1 and sum(taken) >= LIMIT_S:
                    break
    finally:
        for module, mode in modes.items():
            module.training = mode
    return 1000.0 * statistics.median(taken[_WARM_UP:])
