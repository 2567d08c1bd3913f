"""Every shipped recipe for the same seconds of training on the same split: AUC, seconds, images/s, beside what its notebook said.

    PCAM_BENCH_DATA=colon96 python -m benchmarks recipes                 # all; cells that are done are kept
    PCAM_BENCH_DATA=colon96 PCAM_BENCH_RECIPES=keras_cnn_1 python -m benchmarks recipes

Patch recipes train on PCAM_BENCH_DATA (a raw folder or pack), dense ones on a synthetic set that is made once beside the
results. Each gets PCAM_BENCH_SECONDS (45) of training by its measured speed, at most 20 epochs, fold 0 validates. Without
pretrained weights (PCAM_BENCH_WEIGHTS, none by default) a backbone cannot stay frozen: those recipes train all layers, which
the table says. Writes results/recipes/<name>.json and the table in docs/recipes.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import settings

RESULTS = settings.RESULTS / "recipes"
PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
BEGIN, END = "<!-- table: python -m benchmarks recipes -->", "<!-- end of the table -->"
SECONDS = float(os.environ.get("PCAM_BENCH_SECONDS", "45"))
WEIGHTS = os.environ.get("PCAM_BENCH_WEIGHTS", "none")
OVERHEAD, MOST_EPOCHS = 1.2, 20
REPORTED = {
    "keras_cnn_1": "82.7 % ROC with 0/1 labels",
    "keras_cnn_2": "-",
    "resnet152v2_transfer": "0.9499 public, 0.9272 private",
    "densenet169_onecycle": "validation AUC 0.9941, accuracy 0.968",
    "cnn_basic": "-",
    "cnn_deep": "-",
    "cnn_prelu": "-",
    "unet_dense": "- (always-negative pixel accuracy 85 %)",
    "dense_linear": "-",
    "unet_timm": "-",
    "default": "(no notebook)",
}
FROM_SCRATCH: dict[str, list[str]] = {
    "resnet152v2_transfer": ["trainable=1.0"],
    "densenet169_onecycle": ["stages=[{share: 1.0, lr: 4.0e-4, lr_low: 4.0e-5}]"],
}
"""Overrides where there are no pretrained weights."""
SMALLER = {"unet_dense": ["tile_size=96"], "dense_linear": ["tile_size=96"]}
"""The synthetic set's images are 96 px."""


def command() -> str:
    """The command line of this environment."""
    return str(Path(sys.executable).with_name("pcam-automl"))


def dense_data() -> Path:
    """A synthetic set with masks, made once."""
    folder = RESULTS / "synthetic"
    if not (folder / "train_labels.csv").is_file():
        RESULTS.mkdir(parents=True, exist_ok=True)
        subprocess.run([command(), "synth", str(folder), "--patches", "3000", "--slides", "24"], check=True)
    return folder


def views_for(name: str, sets: list[str], data: Path) -> int:
    """Views that fit into the seconds by the measured speed."""
    import torch

    from pcam_automl.commands.setup import DataOptions, set_up
    from pcam_automl.recipe_files import parse_assignments

    setup = set_up(name, parse_assignments(sets), DataOptions(data=data), weights=WEIGHTS, device="cpu")
    rate = setup.speed.images_per_s(setup.recipe, torch.device("cpu"))
    return max(2 * setup.recipe.batch_size, min(round(SECONDS * rate / OVERHEAD), MOST_EPOCHS * len(setup.train_rows)))


def run_cell(name: str, data: Path) -> dict[str, Any]:
    """Train one recipe, or read what an earlier run of the same cell wrote."""
    sets = ["valid_share=null", *SMALLER.get(name, [])]
    sets += FROM_SCRATCH.get(name, []) if WEIGHTS == "none" else []
    key = {"seconds": SECONDS, "weights": WEIGHTS, "sets": sets, "data": data.name}
    file = RESULTS / f"{name}.json"
    if file.is_file() and (known := json.loads(file.read_text()))["key"] == key:
        return dict(known)
    views = views_for(name, sets, data)
    print(f"{name}: {views:,} views", file=sys.stderr)
    options = [part for text in [*sets, f"views={views}"] for part in ("--set", text)]
    out = RESULTS / "models" / name
    line = [
        command(),
        "train",
        name,
        "--data",
        str(data),
        "--out",
        str(out),
        "--json",
        "--no-report",
        "--device",
        "cpu",
    ]
    run = subprocess.run([*line, "--weights", WEIGHTS, *options], check=True, stdout=subprocess.PIPE, text=True)
    result = json.loads(run.stdout)
    card = json.loads((out / "bundle.json").read_text())
    kept = {
        "key": key,
        "auc": result["auc"],
        "auc_95": result["auc_95"],
        "accuracy": card["metrics"]["accuracy"],
        "dice": card["metrics"].get("dice"),
        "wall_s": result["wall_s"],
        "images_per_s": result["images_per_s"],
        "views": views,
        "n_train": card["provenance"]["n_train"],
        "n_parameters": card["provenance"]["n_parameters"],
        "backbone": card["recipe"]["backbone"],
        "task": card["recipe"]["task"],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(kept, indent=2) + "\n")
    return kept


def row_of(name: str, cell: dict[str, Any]) -> str:
    """One line of the table."""
    low, high = cell["auc_95"]
    score = f"{cell['auc']:.4f} ({low:.3f}-{high:.3f})"
    if cell["task"] == "dense":
        score += f", Dice {cell['dice']:.3f}, accuracy {cell['accuracy']:.3f}"
    changed = ", ".join(text for text in cell["key"]["sets"] if text != "valid_share=null") or "-"
    return (
        f"| `{name}` | {cell['n_parameters'] / 1e6:.2f} M | {cell['views'] / cell['n_train']:.1f} | {score} | "
        f"{cell['wall_s']:.0f} | {cell['images_per_s']:,.0f} | {changed} | {REPORTED.get(name, '-')} |"
    )


def main() -> None:
    """Run or read the cells, print their lines, write the page once all are there."""
    from pcam_automl.configs_folder import find_config, list_configs
    from pcam_automl.recipe_files import load_recipe

    data = os.environ.get("PCAM_BENCH_DATA")
    if data is None or not Path(data).exists():
        print(
            "recipes: skipped, PCAM_BENCH_DATA names no data set (docs/recipes.md says which one the table was made with)"
        )
        return
    wanted = os.environ.get("PCAM_BENCH_RECIPES", "").split() or list_configs("recipes")
    cells = {}
    for name in wanted:
        dense = load_recipe(find_config("recipes", name)).task == "dense"
        cells[name] = run_cell(name, dense_data() if dense else Path(data))
        print(row_of(name, cells[name]), flush=True)
    if set(wanted) == set(list_configs("recipes")):
        write_page(cells)


def write_page(cells: dict[str, dict[str, Any]]) -> None:
    """Put the table between its marks in docs/recipes.md."""
    head = "| recipe | weights | epochs | validation AUC (95 %) | wall s | images/s | changed | the notebook, on its own data |"
    rule = "|---|---|---|---|---|---|---|---|"
    table = "\n".join([head, rule, *(row_of(name, cell) for name, cell in cells.items())])
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    print(f"table written into {PAGE}")
