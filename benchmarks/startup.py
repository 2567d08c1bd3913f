"""How long a person waits: `--help`, `status` on 1,000 trials, and `search` up to its first training step.

    python -m benchmarks startup             # 5 rounds
    PCAM_BENCH_ROUNDS=9 PCAM_BENCH_TRIALS=1000 python -m benchmarks startup

Every run is a fresh process on a warm page cache, the commands in turn. Beside ours stands what cannot be saved: the bare
imports that a command needs, and for `status` Optuna reading the same file by its own storage. `search` packs 400
synthetic patches and trains the default recipe; its first step ends the run. The first study beside a storage also times
the backbone that it starts with, which later ones find in `speed.json`: it is shown apart, and so is `import torch, timm`.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.settings import RESULTS, setting, write_result

N_ROUNDS = setting("ROUNDS", 5)
N_TRIALS = setting("TRIALS", 1000)

OPTUNA = """
import sys, optuna
optuna.logging.set_verbosity(optuna.logging.ERROR)
study = optuna.load_study(study_name="pcam", storage=sys.argv[1])
print(len(study.trials), study.best_value, optuna.importance.get_param_importances(study))
"""

FIRST_STEP = """
import os, sys
from pcam_automl.cli import main  # first, as the console script does
from pcam_automl.training.engine import Training
step = Training.step
def one_step(*words, **options):
    step(*words, **options)
    print("first step done", flush=True)
    os._exit(0)
Training.step = one_step
sys.argv[0] = "pcam-automl"
main()
"""

WANTED_S = {"--help": 0.5, "status": 1.0, "search to its first step": 15.0}


def commands(folder: Path) -> dict[str, list[str]]:
    """Name to the words after the interpreter; makes the study, the images and the pack that they read."""
    import optuna

    from benchmarks.filled import create_study, make_trials
    from pcam_automl.data.synthetic import write_synthetic
    from pcam_automl.search.storage import open_storage

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    url = f"sqlite:///{folder}/pcam.db"
    storage = open_storage(url)
    create_study(storage, "pcam", make_trials(N_TRIALS))
    storage.engine.dispose()
    write_synthetic(folder / "raw", n_patches=400, n_slides=8, seed=0)
    search = ["search", "--data", f"{folder}/raw", "--trials", "1", "--weights", "none", "--storage"]
    return {
        "--help": ["-m", "pcam_automl", "--help"],
        "import typer": ["-c", "import typer, typer.rich_utils"],
        "status": ["-m", "pcam_automl", "status", "--storage", url],
        "status --json": ["-m", "pcam_automl", "status", "--json", "--storage", url],
        "import optuna, pydantic": ["-c", "import optuna, pydantic"],
        "the same by Optuna's storage": ["-c", OPTUNA, url],
        "search to its first step": ["-c", FIRST_STEP, *search, f"sqlite:///{folder}/kept/s.db", "--study", "sNEW"],
        "import torch, timm": ["-c", "import torch, timm"],
    }


def seconds_of(words: list[str], number: int) -> float:
    """One run, its output dropped."""
    words = [word.replace("NEW", str(number)) for word in words]
    began = time.perf_counter()
    run = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if run.returncode != 0 or not (run.stdout or words[0] == "-c"):
        raise RuntimeError(f"{' '.join(words)[-200:]} failed: {run.stderr[-500:]}")
    return seconds


def main() -> None:
    """Measure, print, write ``benchmarks/results/startup.json``."""
    with tempfile.TemporaryDirectory() as folder:
        runs = commands(Path(folder))
        times: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(N_ROUNDS + 1):
            for name, words in runs.items():
                seconds = seconds_of(words, number)
                if number > 0:  # the first round fills the page cache and the speed book
                    times[name].append(seconds)
                elif name.startswith("search"):
                    first_search_s = seconds
    print(f"startup: study of {N_TRIALS:,} trials, {os.cpu_count()} cores, {N_ROUNDS} rounds")
    for name, values in times.items():
        middle = statistics.median(values)
        wanted = f"  wanted {WANTED_S[name]:.1f} s" if name in WANTED_S else ""
        print(f"  {name:<30} median {middle:6.2f} s ({min(values):.2f} to {max(values):.2f}){wanted}")
    print(f"  the machine's first search, which also times a network: {first_search_s:.1f} s, once")
    write_result(
        RESULTS / "startup.json",
        {"trials": N_TRIALS, "rounds": N_ROUNDS, "seconds": times, "first_search_s": first_search_s},
    )


if __name__ == "__main__":
    main()
