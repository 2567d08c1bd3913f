"""Packing Kaggle-like TIFFs against a loop of `tifffile.imread`; both end with a packed array on disk.

    python -m benchmarks ingest              # 20,000 files, 5 rounds
    PCAM_BENCH_PATCHES=5000 PCAM_BENCH_ROUNDS=3 python -m benchmarks ingest

Ours also checks quality, hashes every patch and writes the tables. Both sides run in turn, in fresh processes, on a warm page cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import tifffile

N_PATCHES = int(os.environ.get("PCAM_BENCH_PATCHES", "20000"))
N_ROUNDS = int(os.environ.get("PCAM_BENCH_ROUNDS", "5"))
N_DIFFERENT = 500

LOOP = """
import sys, time, resource; from pathlib import Path; import numpy as np, tifffile
root, out = Path(sys.argv[1]), Path(sys.argv[2])
began = time.perf_counter()
files = sorted((root / "train").iterdir())
packed = np.lib.format.open_memmap(out, "w+", np.uint8, (len(files), 96, 96, 3))
for row, file in enumerate(files):
    packed[row] = tifffile.imread(file)
packed.flush()
print(time.perf_counter() - began)
"""

OURS = """
import sys, time; from pathlib import Path
from pcam_automl.data.pack import pack
from pcam_automl.data.sources import open_source
if __name__ == "__main__":
    began = time.perf_counter()
    pack(open_source(Path(sys.argv[1])), Path(sys.argv[2]))
    print(time.perf_counter() - began)
"""


def write_files(root: Path, n: int) -> None:
    """``n`` uncompressed one-strip TIFFs of 96x96 RGB, N_DIFFERENT pictures written out n / N_DIFFERENT times."""
    rng = np.random.default_rng(0)
    (root / "train").mkdir(parents=True)
    raw = []
    for _ in range(min(N_DIFFERENT, n)):
        tifffile.imwrite(root / "one.tif", rng.integers(20, 230, (96, 96, 3), np.uint8), photometric="rgb")
        raw.append(bytearray((root / "one.tif").read_bytes()))
    (root / "one.tif").unlink()
    lines = ["id,label"]
    for number in range(n):
        name = hashlib.sha1(str(number).encode()).hexdigest()
        data = raw[number % len(raw)]
        data[-8:-4] = number.to_bytes(4, "little")  # no two files are duplicates
        (root / "train" / f"{name}.tif").write_bytes(data)
        lines.append(f"{name},{number % 2}")
    (root / "train_labels.csv").write_text("\n".join(lines) + "\n")


def seconds_of(code: Path, root: Path, out: Path) -> float:
    """One run in a fresh process; what it wrote is removed."""
    run = subprocess.run([sys.executable, str(code), str(root), str(out)], capture_output=True, text=True, check=True)
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    return float(run.stdout.split()[-1])


def main() -> None:
    """Measure, print, write ``benchmarks/results/ingest.json``."""
    with tempfile.TemporaryDirectory() as folder:
        root, times = Path(folder) / "raw", {"tifffile loop": [], "pcam-automl pack": []}
        write_files(root, N_PATCHES)
        scripts = {}
        for name, code in (("tifffile loop", LOOP), ("pcam-automl pack", OURS)):
            scripts[name] = Path(folder) / f"side_{len(scripts)}.py"  # not tifffile.py, which would shadow the package
            scripts[name].write_text(code)
        for _ in range(N_ROUNDS):
            for name, script in scripts.items():
                times[name].append(seconds_of(script, root, Path(folder) / "out"))
    ratios = [a / b for a, b in zip(times["tifffile loop"], times["pcam-automl pack"], strict=True)]
    print(f"ingest: {N_PATCHES:,} uncompressed Kaggle-like TIFFs, {os.cpu_count()} cores, {N_ROUNDS} rounds")
    for name, values in times.items():
        middle = statistics.median(values)
        print(
            f"  {name:<18} median {middle:6.2f} s ({min(values):.2f} to {max(values):.2f})  {N_PATCHES / middle:8,.0f} patches/s"
        )
    print(f"  ratio, round by round: median {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    results = Path(__file__).parent / "results" / "ingest.json"
    results.parent.mkdir(exist_ok=True)
    results.write_text(
        json.dumps({"patches": N_PATCHES, "cores": os.cpu_count(), "seconds": times, "ratios": ratios}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
