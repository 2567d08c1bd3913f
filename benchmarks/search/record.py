"""Records a table of real rung results: random recipes, each trained through all rungs. Decides and prunes nothing.

    python unpack.py colon96.zip colon96
    OMP_NUM_THREADS=1 python -m benchmarks.search.record --data colon96 --n 300 --minutes 60

One line a recipe and rung is appended to `rungs.csv`, a recipe's lines all at once; what is there is skipped, so the same
command goes on. Recipe `i` and its seed follow from (--seed, i) alone. `auc` and `loss` are of the validation fold, as in a
search, `test_auc` of slides held out from everything. `seconds` is the CPU time of the rung on one core, scoring included:
beside other processes it is a better measure of the work than the clock. `rungs.json` says what the table was made with.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch

from pcam_automl.batches import open_patches
from pcam_automl.counter import key_of
from pcam_automl.data.pack import pack
from pcam_automl.data.sources import open_source
from pcam_automl.data.splits import Split, make_split
from pcam_automl.data.store import PatchStore, open_store
from pcam_automl.errors import InputError, Interrupted, TrainingDiverged
from pcam_automl.files import write_json, write_text
from pcam_automl.metrics import auc, log_loss
from pcam_automl.models.factory import smallest_input
from pcam_automl.models.weights import Weights
from pcam_automl.recipe import Recipe
from pcam_automl.scores import Scores
from pcam_automl.search.space import SearchSpace, load_space
from pcam_automl.search.study import VALIDATION_FOLD, start_recipe
from pcam_automl.training.compute import fixed_variant, use_device
from pcam_automl.training.engine import Rung
from pcam_automl.training.fit import fit
from pcam_automl.training.start import choose_rows, start_training

HERE = Path(__file__).parent
MEASURED = ("rung", "views", "subset", "auc", "loss", "test_auc", "seconds")
HOLDOUT = 0.2


@dataclass(frozen=True)
class Setup:
    """What every recipe of a table shares.

    Attributes:
        store: the pack.
        split: folds and the held-out slides.
        space: where recipes are drawn from.
        rungs: where each is scored, ascending.
        n_score: validation patches, and as many held-out ones, that a rung is scored on.
        seed: of split and recipes.
    """

    store: PatchStore
    split: Split
    space: SearchSpace
    rungs: tuple[Rung, ...]
    n_score: int
    seed: int

    @property
    def columns(self) -> list[str]:
        """The table's header."""
        return ["recipe", "seed", *self.space.parameters, *MEASURED]


def draw_recipe(setup: Setup, index: int) -> tuple[Recipe, dict[str, Any]]:
    """Recipe ``index`` of the table and its searched parameters: a random draw, the same whoever asks."""
    seed = key_of(setup.seed, "recipe", index) % 2**31
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed)).ask()
    fields = {
        **start_recipe("default", False).model_dump(),
        "epochs": None,
        "views": setup.rungs[-1].views,
        "seed": seed,
    }
    return setup.space.suggest(trial, fields, smallest_input=smallest_input), dict(trial.params)


def record_recipe(setup: Setup, index: int, device: torch.device, stop: Callable[[], None]) -> list[dict[str, Any]]:
    """Train a recipe through every rung; its lines. One that diverges has no figures from there on.

    Raises:
        Interrupted: ``stop`` said so; nothing of the recipe is kept.
    """
    recipe, params = draw_recipe(setup, index)
    training_rows = setup.split.train_order(VALIDATION_FOLD)
    valid = setup.split.score_rows(VALIDATION_FOLD, setup.n_score)
    held_out = setup.split.holdout_rows()
    picked = np.random.default_rng(setup.seed).permutation(len(held_out))[: setup.n_score]
    rows = choose_rows(setup.store, recipe, training_rows, np.concatenate([valid, held_out[np.sort(picked)]]))
    common = {"recipe": index, "seed": recipe.seed, **params}
    lines: list[dict[str, Any]] = []
    began = time.process_time()
    training = start_training(
        recipe,
        setup.store,
        rows,
        patches=open_patches(setup.store, device),
        weights=Weights("none"),
        compute=fixed_variant(device),
        key=key_of(recipe.seed, "views"),
    )
    try:
        for result in fit(training, rows.train, setup.rungs, stop=stop):
            assert training.scores is not None
            now = time.process_time()
            figures = figures_of(training.scores, valid)
            lines.append(common | _line(result.rung, setup.rungs) | figures | {"seconds": round(now - began, 3)})
            began = now
    except TrainingDiverged:
        spent = round(time.process_time() - began, 3)
        for rung in range(len(lines), len(setup.rungs)):
            lines.append(common | _line(rung, setup.rungs) | {"seconds": spent})
            spent = 0.0
    return lines


def _line(rung: int, rungs: tuple[Rung, ...]) -> dict[str, Any]:
    return {"rung": rung, "views": rungs[rung].views, "subset": rungs[rung].subset}


def figures_of(scores: Scores, valid: np.ndarray) -> dict[str, float]:
    """AUC and loss of the validation rows, and the AUC of the others, which are held out."""
    inside = np.isin(scores.rows, valid)
    return {
        "auc": round(auc(scores.label[inside], scores.prob[inside]), 5),
        "loss": round(log_loss(scores.label[inside], scores.prob[inside]), 5),
        "test_auc": round(auc(scores.label[~inside], scores.prob[~inside]), 5),
    }


def recorded(table: Path, columns: list[str]) -> set[int]:
    """The recipes that the table has; an absent table has none.

    Raises:
        InputError: the table has other columns.
    """
    if not table.is_file():
        return set()
    with table.open(encoding="utf-8", newline="") as file:
        lines = csv.DictReader(file)
        if lines.fieldnames != columns:
            raise InputError(f"--out {table} has the columns {lines.fieldnames}, not {columns}; give another file")
        return {int(line["recipe"]) for line in lines}


def append(table: Path, columns: list[str], lines: list[dict[str, Any]]) -> None:
    """Add a recipe's lines, all or none: the table is written whole."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    if not table.is_file():
        writer.writeheader()
    writer.writerows(lines)
    write_text(table, (table.read_text(encoding="utf-8") if table.is_file() else "") + text.getvalue())


def check_same(file: Path, made_with: Mapping[str, Any]) -> None:
    """Write what the table is made with, or compare it with what it was made with so far.

    Raises:
        InputError: names every difference.
    """
    if file.is_file():
        earlier = json.loads(file.read_text(encoding="utf-8"))
        if faults := [f"{k}: {earlier.get(k)!r} there, {v!r} now" for k, v in made_with.items() if earlier.get(k) != v]:
            raise InputError(
                f"{file} was made otherwise ({'; '.join(faults)}); repeat its command, or give another --out"
            )
        return
    write_json(file, dict(made_with))


def record(setup: Setup, table: Path, *, n: int, minutes: float, device: torch.device) -> int:
    """Record recipes 0 to ``n - 1`` that the table lacks until the minutes are over; how many it has then."""
    ends = time.monotonic() + 60 * minutes

    def stop() -> None:
        if time.monotonic() >= ends:
            raise Interrupted("the minutes are over", 15)

    done = recorded(table, setup.columns)
    for index in (index for index in range(n) if index not in done):
        try:
            lines = record_recipe(setup, index, device, stop)
        except Interrupted:
            break
        append(table, setup.columns, lines)
        done.add(index)
        last = lines[-1]
        print(
            f"recipe {index}: AUC {last.get('auc', 'diverged')}, test {last.get('test_auc', '-')}, "
            f"{sum(line['seconds'] for line in lines):.1f} s of CPU",
            flush=True,
        )
    return len(done)


def set_up(data: Path, space: str, rungs: list[int], n_score: int, seed: int, packs: Path) -> Setup:
    """Pack the data if they are raw, split them, and read the space."""
    root = data if (data / "store.json").is_file() else packs / data.name
    if not (root / "store.json").is_file():
        pack(open_source(data), root)
    store = open_store(root)
    split = make_split(store, seed=seed, holdout=HOLDOUT)
    n_train = len(split.train_order(VALIDATION_FOLD))
    loaded = load_space(space, pins={"pretrained": False})
    return Setup(store, split, loaded, tuple(Rung(v, min(v, n_train)) for v in sorted(rungs)), n_score, seed)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search.record", description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="raw set or pack with slides")
    parser.add_argument("--n", type=int, default=300, help="recipes in all")
    parser.add_argument("--rungs", default="100,300,900,2700", help="views of each rung")
    parser.add_argument("--score", type=int, default=300, help="validation patches a rung is scored on")
    parser.add_argument("--space", default=str(HERE / "cheap.yaml"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0, help="hard limit")
    parser.add_argument("--out", type=Path, default=HERE / "rungs.csv")
    return parser.parse_args()


def main() -> None:
    """Record, append, say how far it is."""
    asked = _arguments()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    device = use_device("cpu")
    torch.set_num_threads(1)
    rungs = [int(views) for views in asked.rungs.split(",")]
    packs = Path(tempfile.gettempdir()) / f"pcam-automl-packs-{os.getuid()}"
    setup = set_up(asked.data, asked.space, rungs, asked.score, asked.seed, packs)
    made_with = {
        "data": setup.store.content_hash,
        "split": setup.split.hash,
        "space": setup.space.to_yaml(),
        "rungs": [[rung.views, rung.subset] for rung in setup.rungs],
        "n_score": setup.n_score,
        "seed": setup.seed,
    }
    check_same(asked.out.with_suffix(".json"), made_with)
    n = record(setup, asked.out, n=asked.n, minutes=asked.minutes, device=device)
    print(f"{asked.out}: {n} of {asked.n} recipes")


if __name__ == "__main__":
    try:
        main()
    except InputError as fault:
        sys.exit(str(fault))
