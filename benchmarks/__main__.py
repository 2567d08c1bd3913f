"""`python -m benchmarks [NAME ...]`: run the named benchmarks, or all that need no GPU."""

import importlib
import sys

NAMES = ("ingest", "keras-cnn", "recipes", "startup", "study-size")

if __name__ == "__main__":
    wanted = sys.argv[1:] or list(NAMES)
    if unknown := [name for name in wanted if name not in NAMES]:
        sys.exit(f"no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}")
    for name in wanted:
        importlib.import_module(f"benchmarks.{name.replace('-', '_')}").main()
