"""How torch's threads should wait: training steps under several settings of OpenMP, alone and beside a busy process.

    python -m benchmarks waiting             # 5 rounds
    PCAM_BENCH_ROUNDS=3 PCAM_BENCH_NETWORKS="resnet18" python -m benchmarks waiting

Each figure is a fresh process (libgomp reads its settings once) of 6 steps of the bare network, batch 64 at 64 px, float32,
channels last; the median step counts. The settings take turns.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

from benchmarks.settings import RESULTS, setting, write_result
from pcam_automl.waiting import BUSY_SPIN_COUNT

N_ROUNDS = setting("ROUNDS", 5)
NETWORKS = os.environ.get("PCAM_BENCH_NETWORKS", "mobilenetv3_small_100 resnet10t").split()
SETTINGS: dict[str, dict[str, str]] = {
    "libgomp's default": {},
    "sleep at once": {"OMP_WAIT_POLICY": "PASSIVE"},
    "ours, busy": {"GOMP_SPINCOUNT": BUSY_SPIN_COUNT},
    "10 times that": {"GOMP_SPINCOUNT": str(10 * int(BUSY_SPIN_COUNT))},
}
STEPS = """
import statistics, sys, time, timm, torch
network = timm.create_model(sys.argv[1], num_classes=1).to(memory_format=torch.channels_last).train()
images = torch.randn(64, 3, 64, 64).contiguous(memory_format=torch.channels_last)
optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
seconds = []
for _ in range(7):
    began = time.perf_counter()
    network(images).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    seconds.append(time.perf_counter() - began)
print(64 / statistics.median(seconds[1:]))
"""


def images_per_s(network: str, waits: dict[str, str]) -> float:
    """Training images a second in a fresh process."""
    bare = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    line = [sys.executable, "-c", STEPS, network]
    run = subprocess.run(line, env={**bare, **waits}, stdout=subprocess.PIPE, text=True, check=True)
    return float(run.stdout.split()[-1])


def main() -> None:
    """Measure, print, write ``benchmarks/results/waiting.json``."""
    found: dict[str, dict[str, list[float]]] = {}
    for network in NETWORKS:
        for load in ("alone", "beside a busy process"):
            busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if load != "alone" else None
            try:
                rates: dict[str, list[float]] = {name: [] for name in SETTINGS}
                for _ in range(N_ROUNDS):
                    for name, waits in SETTINGS.items():
                        rates[name].append(images_per_s(network, waits))
            finally:
                if busy is not None:
                    busy.kill()
                    busy.wait()
            found[f"{network}, {load}"] = rates
            print(f"{network}, {load}: training images/s")
            for name, values in rates.items():
                print(
                    f"  {name:<18} {statistics.median(values):6.0f} ({min(values):.0f} to {max(values):.0f})",
                    flush=True,
                )
    write_result(RESULTS / "waiting.json", {"rounds": N_ROUNDS, "images_per_s": found})


if __name__ == "__main__":
    main()
