"""What a training of seconds to minutes comes to by crop, batch and length, on grouped folds of a training part.

    OMP_NUM_THREADS=1 python -m benchmarks.search.short --data colon96 --fold 1 --views 26000 --set crop_size=96 --set batch_size=32
    python -m benchmarks.search.short --weights given --views 12000 --set backbone=tf_efficientnet_lite0 --set crop_size=96
    python -m benchmarks.search.short --table

A line is one training of the recipe `default`, one cycle over so many views of four folds, judged on the fifth with eight views;
it is appended to `short.jsonl`. The test part is not read. Seconds include the prediction. Views and not seconds are set, so that other processes may run
beside; seconds are kept, on as many threads as the line says.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks.search.data import cache, data_folder
from benchmarks.search.run import weights_folder
from benchmarks.settings import host
from pcam_automl.batches import open_patches
from pcam_automl.calibration import probs_at
from pcam_automl.configs_folder import find_config
from pcam_automl.counter import key_of
from pcam_automl.data.packs import find_pack
from pcam_automl.data.splits import make_split, slides_aside
from pcam_automl.errors import InputError
from pcam_automl.metrics import auc, log_loss
from pcam_automl.models.weights import Weights
from pcam_automl.recipe import build_recipe
from pcam_automl.recipe_files import load_recipe, merge_fields
from pcam_automl.training.compute import fixed_variant, use_device
from pcam_automl.training.engine import Rung
from pcam_automl.training.fit import fit
from pcam_automl.training.scoring import Views, logits_of_rows
from pcam_automl.training.start import choose_rows, start_training

HERE = Path(__file__).parent
RESULTS = HERE / "short.jsonl"


def measure(
    data: str,
    fold: int,
    views: int,
    pins: dict[str, Any],
    weights: str = "none",
    networks: int = 1,
    keep_back: float = 0.0,
) -> dict[str, Any]:
    """Train so many networks of so many views each, judge the average of their logits; the line for the results.

    ``keep_back`` of the training patches, in whole slides, are left out, as ``finalize --keep-back`` does.

    Raises:
        InputError: a wrong field, or ``PCAM_WEIGHTS_DIR`` is wanted and not set.
    """
    start = Weights("none") if weights == "none" else Weights("folder", weights_folder())
    device = use_device("cpu")
    store = find_pack(data_folder(data), cache() / "packs")
    split = make_split(store, seed=0)
    base = load_recipe(find_config("recipes", "default")).model_dump()
    recipe = build_recipe(merge_fields(base, {"pretrained": start.pretrained, "epochs": None, "views": views, **pins}))
    order = split.train_order(fold)
    if keep_back:
        order = order[~np.isin(order, np.sort(order)[slides_aside(store, np.sort(order), keep_back, seed=split.seed)])]
    rows = choose_rows(store, recipe, order, split.score_rows(fold, len(split.order)))
    began, logits, losses = time.perf_counter(), [], []
    for number in range(networks):
        training = start_training(
            recipe.model_copy(update={"seed": recipe.seed + number}),
            store,
            rows,
            patches=open_patches(store, device),
            weights=start,
            compute=fixed_variant(device),
            key=key_of(recipe.seed, "views", number) if number else key_of(recipe.seed, "views"),
        )
        (result,) = fit(training, rows.train, (Rung(views, len(rows.train)),), scored=False)
        losses.append(result.train_loss)
        shown = Views(recipe, training.task.data.normalisation, "dihedral")
        with training.averaged() as network:
            patches = training.task.data.patches
            logits.append(logits_of_rows(network, patches, rows.score, shown, training.compute))
    seconds, label = time.perf_counter() - began, store.label[rows.score].astype(np.int64)
    probs = probs_at(np.mean([np.asarray(one) for one in logits], axis=0))
    return {
        "data": data,
        "fold": fold,
        "views": views,
        "set": pins,
        "weights": weights,
        "networks": networks,
        **({"keep_back": keep_back} if keep_back else {}),
        "auc": float(auc(label, probs)),
        "log_loss": float(log_loss(label, probs)),
        "train_loss": statistics.fmean(losses),
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": host(),
    }


def table(lines: list[dict[str, Any]]) -> list[str]:
    """Folds side by side: error (1 - AUC), log-loss and seconds of each (data, weights, views, set, date), and their medians."""
    by_what: dict[tuple[str, str, int, str, str], dict[int, dict[str, Any]]] = defaultdict(dict)
    for line in lines:
        what = ", ".join(f"{k}={v}" for k, v in sorted(line["set"].items()))
        what += f" x {line['networks']}" if line["networks"] > 1 else ""
        what += f", without {line['keep_back']:.0%}" if line.get("keep_back") else ""
        by_what[line["data"], line["weights"], line["views"], what, line["date"]][line["fold"]] = line
    head = f"{'data':<12} {'weights':<7} {'views':>7}  {'set':<60} {'date':<10} {'error':>8} {'log-loss':>9} {'seconds':>7}"
    text = [f"{head}   folds: error"]
    for (data, weights, views, what, date), folds in sorted(by_what.items()):
        errors = {fold: 1.0 - line["auc"] for fold, line in sorted(folds.items())}
        loss = statistics.median(line["log_loss"] for line in folds.values())
        each = ", ".join(f"{fold}: {error:.4f}" for fold, error in errors.items())
        took = statistics.median(line["seconds"] for line in folds.values())
        middle = f"{statistics.median(errors.values()):>8.4f} {loss:>9.4f} {took:>7.0f}"
        text.append(f"{data:<12} {weights:<7} {views:>7,}  {what:<60} {date} {middle}   {each}")
    return text


def main(arguments: list[str] | None = None) -> int:
    """Measure one training, or print what was measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search.short", description=__doc__)
    parser.add_argument("--data", default="colon96")
    parser.add_argument("--fold", type=int, default=0, choices=range(5))
    parser.add_argument("--views", type=int, default=13_000)
    parser.add_argument("--weights", default="none", choices=("none", "given"))
    parser.add_argument(
        "--networks", type=int, default=1, help="the logits of so many, each of its own seed, are averaged"
    )
    parser.add_argument("--keep-back", type=float, default=0.0, help="share of the training slides left out")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args(arguments)
    if args.table:
        if not args.results.is_file():
            print(f"{args.results} does not exist: nothing has been measured yet", file=sys.stderr)
            return 2
        print("\n".join(table([json.loads(line) for line in args.results.read_text().splitlines()])))
        return 0
    try:
        pins = {name: yaml.safe_load(value) for name, _, value in (text.partition("=") for text in args.set)}
        line = measure(args.data, args.fold, args.views, pins, args.weights, args.networks, args.keep_back)
    except InputError as fault:
        print(fault, file=sys.stderr)
        return 2
    with args.results.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
