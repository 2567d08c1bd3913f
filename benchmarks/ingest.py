"""Packing Kaggle-like TIFFs against loops of `tifffile.imread` and of OpenCV; all end with a packed array on disk.

    python -m benchmarks ingest              # 20,000 files, 5 rounds
    PCAM_BENCH_PATCHES=5000 PCAM_BENCH_ROUNDS=3 python -m benchmarks ingest
    PCAM_BENCH_COMPRESSION=deflate python -m benchmarks ingest

Ours also checks quality, hashes every patch and writes the tables. The sides run in turn, in fresh processes, on a warm page
cache. Core time is user and system time of a side and its workers, without imports: it hardly depends on what else runs.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from benchmarks.settings import RESULTS, host, setting

N_PATCHES = setting("PATCHES", 20_000)
N_ROUNDS = setting("ROUNDS", 5)
COMPRESSION = os.environ.get("PCAM_BENCH_COMPRESSION", "none")
N_DIFFERENT = 500
NOT_INSTALLED = "not installed"
OURS, TIFFFILE, OPENCV = "pcam-automl pack", "tifffile loop", "OpenCV loop"
_PATCH_BYTES = 96 * 96 * 3

_CLOCK = """
import sys, time, resource; from pathlib import Path; import numpy as np
def cores():
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)
"""
_LOOP = (
    _CLOCK
    + """
IMPORT
root, out = Path(sys.argv[1]), Path(sys.argv[2])
began, used = time.perf_counter(), cores()
files = sorted((root / "train").iterdir())
packed = np.lib.format.open_memmap(out, "w+", np.uint8, (len(files), 96, 96, 3))
for row, file in enumerate(files):
    packed[row] = READ
packed.flush()
print(time.perf_counter() - began, cores() - used)
"""
)
_PACK = (
    _CLOCK
    + """
from pcam_automl.data.pack import pack
from pcam_automl.data.sources import open_source
if __name__ == "__main__":
    began, used = time.perf_counter(), cores()
    pack(open_source(Path(sys.argv[1])), Path(sys.argv[2]))
    print(time.perf_counter() - began, cores() - used)
"""
)
SIDES = {
    TIFFFILE: _LOOP.replace("IMPORT", "import tifffile").replace("READ", "tifffile.imread(file)"),
    OPENCV: _LOOP.replace("IMPORT", "import cv2").replace(
        "READ", "cv2.cvtColor(cv2.imread(str(file)), cv2.COLOR_BGR2RGB)"
    ),
    OURS: _PACK,
}


def write_files(root: Path, n: int, compression: str = "none") -> None:
    """``n`` one-strip TIFFs of 96x96 RGB, all different; deflate makes 0.7 of their bytes, as of real patches."""
    rng = np.random.default_rng(0)
    (root / "train").mkdir(parents=True)
    ramp = np.linspace(90, 170, 96)[:, None, None]
    images = [
        np.clip(ramp + rng.normal(0, 12, (96, 96, 3)), 0, 255).astype(np.uint8) for _ in range(min(N_DIFFERENT, n))
    ]
    tifffile.imwrite(root / "one.tif", images[0], photometric="rgb")
    header = (root / "one.tif").read_bytes()[:-_PATCH_BYTES]
    (root / "one.tif").unlink()
    lines = ["id,label"]
    for number in range(n):
        name = hashlib.sha1(str(number).encode()).hexdigest()
        image = images[number % len(images)].copy()
        image.reshape(-1)[-4:] = np.frombuffer(number.to_bytes(4, "little"), np.uint8)  # no two files are duplicates
        if compression == "none":
            (root / "train" / f"{name}.tif").write_bytes(header + image.tobytes())
        else:
            tifffile.imwrite(root / "train" / f"{name}.tif", image, photometric="rgb", compression="zlib")
        lines.append(f"{name},{number % 2}")
    (root / "train_labels.csv").write_text("\n".join(lines) + "\n")


def touch_memory(folder: Path, n_bytes: int) -> None:
    """Write and remove a file: a virtual machine takes memory that was given back anew, 40 us a patch for the first side."""
    with (folder / "memory").open("wb") as file:
        for _ in range(n_bytes >> 20):
            file.write(bytes(1 << 20))
    (folder / "memory").unlink()


def run_side(script: Path, root: Path, out: Path) -> tuple[float, float]:
    """(seconds, core seconds) of one run in a fresh process; what it wrote is removed."""
    touch_memory(out.parent, min(N_PATCHES * _PATCH_BYTES, 1 << 30))
    run = subprocess.run([sys.executable, str(script), str(root), str(out)], capture_output=True, text=True, check=True)
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    wall, cores = map(float, run.stdout.split()[-2:])
    return wall, cores


def anonymous_bytes(pid: int) -> int:
    """Memory of a process and its descendants that belongs to no file; pages that they share count once."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        children = [
            name for task in Path(f"/proc/{pid}/task").iterdir() for name in (task / "children").read_text().split()
        ]
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return 0
    own = sum(int(line.split()[1]) << 10 for line in rollup.splitlines() if line.startswith("Pss_Anon:"))
    return own + sum(anonymous_bytes(int(child)) for child in children)


def peak_anonymous_mb(script: Path, root: Path, out: Path) -> float:
    """The most memory seen, every 50 ms, in one more run: looking would cost the timed runs."""
    peak = 0
    run = subprocess.Popen([sys.executable, str(script), str(root), str(out)], stdout=subprocess.DEVNULL)
    while run.poll() is None:
        peak = max(peak, anonymous_bytes(run.pid))
        time.sleep(0.05)
    if run.returncode or not peak:
        raise RuntimeError(f"the run whose memory was to be measured ended with {run.returncode}, {peak} bytes seen")
    shutil.rmtree(out)
    return peak / 1e6


def measure_sides(folder: Path) -> dict[str, Any]:
    """Every side ``N_ROUNDS`` times in turn, then the memory of ours."""
    root, out = folder / "raw", folder / "out"
    write_files(root, N_PATCHES, COMPRESSION)
    sides = [name for name in SIDES if name != OPENCV or importlib.util.find_spec("cv2")]
    scripts = {}
    for number, name in enumerate(sides):
        scripts[name] = folder / f"side_{number}.py"  # not tifffile.py, which would shadow the package
        scripts[name].write_text(SIDES[name])
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(N_ROUNDS):
        for name, script in scripts.items():
            runs[name].append(run_side(script, root, out))
    seconds: dict[str, Any] = {
        name: [wall for wall, _ in runs[name]] if name in runs else NOT_INSTALLED for name in SIDES
    }
    cores: dict[str, Any] = {
        name: [core for _, core in runs[name]] if name in runs else NOT_INSTALLED for name in SIDES
    }
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": host(),
        "patches": N_PATCHES,
        "compression": COMPRESSION,
        "seconds": seconds,
        "core_seconds": cores,
        "ratios": {
            name: [a / b for a, b in zip(seconds[name], seconds[OURS], strict=True)] for name in sides if name != OURS
        },
        "peak_anonymous_mb": peak_anonymous_mb(scripts[OURS], root, out),
    }


def main() -> None:
    """Measure, print, enter the figures in ``benchmarks/results/ingest.json`` under size and compression."""
    if COMPRESSION not in ("none", "deflate"):
        sys.exit(f"PCAM_BENCH_COMPRESSION must be none or deflate, got {COMPRESSION!r}")
    with tempfile.TemporaryDirectory() as folder:
        found = measure_sides(Path(folder))
    print(f"ingest: {N_PATCHES:,} Kaggle-like TIFFs ({COMPRESSION}), {os.cpu_count()} cores, {N_ROUNDS} rounds")
    for name, walls in found["seconds"].items():
        if walls == NOT_INSTALLED:
            print(f"  {name:<18} {NOT_INSTALLED}")
            continue
        core_us = [core / N_PATCHES * 1e6 for core in found["core_seconds"][name]]
        print(
            f"  {name:<18} median {statistics.median(walls):6.2f} s ({min(walls):.2f} to {max(walls):.2f})  "
            f"core time {statistics.median(core_us):4.0f} us a patch ({min(core_us):.0f} to {max(core_us):.0f})"
        )
    for name, ratios in found["ratios"].items():
        print(
            f"  ours against the {name}, round by round: median {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )
    print(f"  peak anonymous memory of ours, workers included: {found['peak_anonymous_mb']:.0f} MB")
    results = RESULTS / "ingest.json"
    results.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(results.read_text()) if results.is_file() else {}
    known = {key: run for key, run in known.items() if isinstance(run, dict) and "compression" in run}
    known[f"{N_PATCHES} {COMPRESSION}"] = found
    results.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main()
