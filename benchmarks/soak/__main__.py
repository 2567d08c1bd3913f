"""`python -m benchmarks.soak NAME`: kills, instant, outage; see each module."""

import importlib
import sys

NAMES = ("kills", "instant", "outage")

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        print(f"python -m benchmarks.soak {'|'.join(NAMES)} [options]", file=sys.stderr)
        sys.exit(2)
    importlib.import_module(f"benchmarks.soak.{sys.argv.pop(1)}").main()
