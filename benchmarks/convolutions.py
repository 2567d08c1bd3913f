"""Why a CPU training is routed and keeps its memory: passes of single layers by oneDNN and by our routes; page faults a step.

    python -m benchmarks convolutions        # 7 rounds
    PCAM_BENCH_BATCH=32 python -m benchmarks convolutions

For each layer the forward pass and the input and weight gradients of oneDNN and of the route taken; both in turn,
milliseconds, median. Then page faults and seconds of a resnet18 step at 96 px in float32, in two fresh processes: with the
C library as it is, and with ``keep_freed_memory``. Writes results/convolutions.json.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import device_here, machine
from benchmarks.settings import RESULTS, setting, write_result
from pcam_automl.models.convolution import route_of, routed_conv2d, trimmed

LAYERS = (  # channels in and out, kernel, map, stride, padding, groups
    (672, 672, 5, 7, 2, 0, 672),
    (96, 96, 3, 33, 2, 0, 96),
    (160, 160, 7, 4, 1, 3, 160),
    (320, 320, 7, 1, 1, 3, 320),
    (1152, 1152, 5, 2, 1, 2, 1152),
    (1152, 1152, 3, 2, 1, 1, 1152),
    (512, 512, 3, 1, 1, 1, 1),
    (512, 512, 3, 2, 1, 1, 1),
    (64, 128, 3, 16, 2, 1, 1),
    (1280, 320, 1, 2, 1, 0, 1),
)

STEPS = """
import json, resource, sys, time, timm, torch
if sys.argv[1] == "kept":
    from pcam_automl.heap import keep_freed_memory
    assert keep_freed_memory()
torch.set_num_threads(int(sys.argv[2]))
network = timm.create_model("resnet18", num_classes=1).train()
optimizer = torch.optim.AdamW(network.parameters(), fused=True)
images = torch.randn(64, 3, 96, 96)
def step():
    network(images).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
for _ in range(3):
    step()
before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
for _ in range(5):
    step()
after = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({
    "faults": (after.ru_minflt - before.ru_minflt) / 5,
    "system_s": (after.ru_stime - before.ru_stime) / 5,
    "seconds": (time.perf_counter() - began) / 5,
}))
"""


def passes(layer: tuple[int, ...], dtype: torch.dtype, batch: int, n_rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of forward and backward of both sides by what the backward pass is of."""
    channels, out, kernel, side, stride, pad, groups = layer
    x = torch.randn(batch, channels, side, side, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(out, channels // groups, kernel, kernel, dtype=dtype)
    pairs = (stride, stride), (pad, pad)
    sides: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "oneDNN": lambda x, w: F.conv2d(x, w, None, *pairs, 1, groups),
        "route": lambda x, w: routed_conv2d(x, w, None, *pairs, groups),
    }
    found: dict[str, dict[str, float]] = {}
    for what, of_input, of_weight in (("forward", True, True), ("input", True, False), ("weights", False, True)):
        times: dict[str, list[float]] = {name: [] for name in sides}
        for round_ in range(n_rounds + 1):
            for name, side_ in sides.items():
                began = time.perf_counter()
                answer = side_(x.requires_grad_(of_input), weight.requires_grad_(of_weight))
                if what != "forward":
                    gradient = torch.ones_like(answer)
                    began = time.perf_counter()
                    torch.autograd.grad(answer, [x if of_input else weight], gradient)
                if round_:
                    times[name].append(1000 * (time.perf_counter() - began))
        found[what] = {name: statistics.median(values) for name, values in times.items()}
    return found


def main() -> None:
    """Measure, print, write ``benchmarks/results/convolutions.json``."""
    device, batch, n_rounds = device_here(), setting("BATCH", 64), setting("ROUNDS", 7)
    print(f"convolutions: batch {batch}, {n_rounds} rounds, milliseconds of a pass; {machine(device)}")
    rows: list[dict[str, Any]] = []
    for layer in LAYERS:
        channels, out, kernel, side, stride, pad, groups = layer
        for dtype in (torch.bfloat16, torch.float32):
            shape = torch.Size((batch, channels, side, side))
            down, across, steps, pads = trimmed(shape[2:], torch.Size((kernel, kernel)), (stride, stride), (pad, pad))
            weights = torch.Size((out, channels // groups, down[1] - down[0], across[1] - across[0]))
            route = route_of(shape, weights, steps, pads, groups, dtype == torch.bfloat16)
            found = passes(layer, dtype, batch, n_rounds)
            name = f"{'depthwise ' if groups > 1 else ''}{kernel}x{kernel}, {channels} to {out} at {side} px, stride {stride}"
            text = "  ".join(f"{what}: {t['oneDNN']:.2f} -> {t['route']:.2f}" for what, t in found.items())
            print(f"  {name}, {str(dtype)[6:]}: {text}")
            rows.append({"layer": name, "dtype": str(dtype), "route": str(route), "ms": found})
    memory = {}
    for how in ("plain", "kept"):
        words = [sys.executable, "-c", STEPS, how, str(torch.get_num_threads())]
        memory[how] = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
        one = memory[how]
        print(
            f"  a resnet18 step, freed memory {'kept' if how == 'kept' else 'as glibc has it'}: {one['faults']:,.0f} page faults, "
            f"{one['seconds']:.2f} s, {one['system_s']:.2f} s of it core time in the kernel"
        )
    write_result(
        RESULTS / "convolutions.json", {"machine": machine(device), "batch": batch, "rows": rows, "step": memory}
    )


if __name__ == "__main__":
    main()
