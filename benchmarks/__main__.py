"""`python -m benchmarks [NAME ...]`: run the named benchmarks, or all that need no GPU and for which everything is here."""

import importlib
import importlib.util
import os
import subprocess
import sys

from pcam_automl.waiting import choose_waiting

NAMES = (
    "ingest",
    "batches",
    "training",
    "inference",
    "overhead",
    "workers",
    "intervals",
    "waiting",
    "convolutions",
    "startup",
    "study-size",
    "large-study",
    "keras-cnn",
    "recipes",
    "replay",
)
NEEDS = {"keras-cnn": ("keras", "uv pip install -e '.[benchmark]'")}
"""Module that is no dependency of the package, and how to get it; named benchmarks say so themselves."""

if __name__ == "__main__":
    # A second start finds compiled modules, unless the environment forbids them: imports then take twice as long.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    choose_waiting()  # as `pcam-automl` does; it helps a DataLoader's workers beside torch's threads as well
    if unknown := [name for name in sys.argv[1:] if name not in NAMES]:
        print(f"no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}", file=sys.stderr)
        sys.exit(2)
    names = sys.argv[1:] or list(NAMES)
    for name in names:
        module, remedy = NEEDS.get(name, ("torch", ""))
        if not sys.argv[1:] and importlib.util.find_spec(module) is None:
            print(f"{name}: skipped, {module} is not installed: {remedy}")
        elif len(names) == 1:
            importlib.import_module(f"benchmarks.{name.replace('-', '_')}").main()
        elif code := subprocess.run([sys.executable, "-m", "benchmarks", name], check=False).returncode:
            sys.exit(code)  # a process each: the largest size of a child counts from its parent's
