"""Commands on single recipes and networks. Imported at every start: nothing slow at the top."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pcam_automl.command_line.options import (
    Data,
    Deterministic,
    Device,
    Domains,
    Fold,
    Groups,
    Json,
    RecipeName,
    Sets,
    SplitSeed,
    Threshold,
    WeightsFrom,
    WithReport,
)


def _checked_pins(recipe: str, sets: list[str] | None) -> dict[str, Any]:
    """``--set`` as fields, the recipe judged with them before anything slow is imported.

    Raises:
        RecipeError: no such recipe, or faults in it or in a field.
    """
    from pcam_automl.configs_folder import find_config
    from pcam_automl.recipe_files import load_recipe, parse_assignments

    pins = parse_assignments(sets or [])
    load_recipe(find_config("recipes", recipe), overrides=pins)
    return pins


def predict(
    model: Annotated[
        Path, typer.Option("--model", help="Bundle or ensemble folder that train or finalize wrote.", metavar="DIR")
    ],
    input: Annotated[list[Path], typer.Option("--input", help="Image folder or file; repeatable.", metavar="PATH")],
    out: Annotated[
        Path,
        typer.Option("--out", help="CSV to write: id,label; of a dense bundle a folder of maps.", metavar="CSV|DIR"),
    ],
    files: Annotated[list[Path] | None, typer.Argument(help="More image files.")] = None,
    threshold: Threshold = None,
    sample: Annotated[
        Path | None,
        typer.Option(
            "--sample",
            help="Sample submission: write its ids, all of them, in its order (a submission).",
            metavar="CSV",
        ),
    ] = None,
    one_view: Annotated[
        bool,
        typer.Option("--one-view", help="The centre view only instead of the mean of the recipe's views (faster)."),
    ] = False,
    explain: Annotated[
        Path | None,
        typer.Option("--explain", help="Folder for a Grad-CAM picture and a sentence for each image.", metavar="DIR"),
    ] = None,
    device: Device = "auto",
) -> None:
    """Probabilities, and labels if asked, for image files."""
    from pcam_automl.commands.predict import run_predict

    run_predict(
        model,
        [*input, *(files or [])],
        out,
        threshold=threshold,
        device=device,
        all_views=not one_view,
        explain=explain,
        sample=sample,
    )


def train(
    recipe: RecipeName,
    out: Annotated[Path, typer.Option("--out", help="Folder of the model bundle.", metavar="DIR")],
    data: Data = None,
    set_: Sets = None,
    weights: WeightsFrom = None,
    groups: Groups = None,
    domains: Domains = None,
    fold: Fold = 0,
    seed: SplitSeed = 0,
    report: WithReport = True,
    device: Device = "auto",
    deterministic: Deterministic = False,
    json: Json = False,
) -> None:
    """Train one recipe, validated on the split, as a bundle."""
    pins = _checked_pins(recipe, set_)
    from pcam_automl.commands.models import run_train
    from pcam_automl.commands.setup import DataOptions

    run_train(
        recipe,
        pins,
        DataOptions(data, groups, domains, fold, seed),
        out=out,
        weights=weights,
        device=device,
        deterministic=deterministic,
        with_report=report,
        as_json=json,
    )


def recipes(json: Json = False) -> None:
    """The shipped recipes, a line each: `train NAME` trains one."""
    from pcam_automl import terminal
    from pcam_automl.configs_folder import find_config, first_line, list_configs

    lines = {name: first_line(find_config("recipes", name)) for name in list_configs("recipes")}
    if json:
        terminal.print_json(lines)
        return
    for name, line in lines.items():
        terminal.result(f"{name:<22} {line}")


def lr_find(
    recipe: RecipeName,
    out: Annotated[Path, typer.Option("--out", help="Folder for lr_find.png and lr_find.json.", metavar="DIR")],
    data: Data = None,
    weight_decay: Annotated[
        list[float] | None,
        typer.Option("--weight-decay", help="A curve each; 1e-2, 1e-4 and 1e-6 by default.", metavar="WD"),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=10, help="Steps of a curve.", metavar="N")] = 600,
    stage: Annotated[int, typer.Option("--stage", min=1, help="Stage whose layers train, from 1.", metavar="N")] = 1,
    start: Annotated[
        Path | None,
        typer.Option("--from", help="Begin with this bundle's weights, e.g. OUT-stage1 of `train`.", metavar="DIR"),
    ] = None,
    set_: Sets = None,
    weights: WeightsFrom = None,
    groups: Groups = None,
    domains: Domains = None,
    fold: Fold = 0,
    seed: SplitSeed = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Loss against a rising learning rate, for several weight decays in one plot."""
    pins = _checked_pins(recipe, set_)
    from pcam_automl.commands.recipes import run_lr_find
    from pcam_automl.commands.setup import DataOptions

    run_lr_find(
        recipe,
        pins,
        DataOptions(data, groups, domains, fold, seed),
        out=out,
        weights=weights,
        device=device,
        weight_decays=weight_decay or [1e-2, 1e-4, 1e-6],
        n_steps=steps,
        stage=stage - 1,
        start=start,
        as_json=json,
    )


def compare_backbones(
    out: Annotated[Path, typer.Option("--out", help="Folder for the results; finished ones are kept.", metavar="DIR")],
    backbones: Annotated[
        list[str] | None,
        typer.Argument(
            help="timm names; by default mobilenetv2_100, resnetv2_152, inception_resnet_v2, densenet201, efficientnet_b2."
        ),
    ] = None,
    recipe: Annotated[
        str, typer.Option("--recipe", help="Everything but the backbone.", metavar="NAME")
    ] = "resnet152v2_transfer",
    data: Data = None,
    set_: Sets = None,
    weights: WeightsFrom = None,
    groups: Groups = None,
    domains: Domains = None,
    fold: Fold = 0,
    seed: SplitSeed = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Rank backbones by their first and by their short-training validation loss and accuracy."""
    pins = _checked_pins(recipe, set_)
    from pcam_automl.commands.recipes import run_compare
    from pcam_automl.commands.setup import DataOptions
    from pcam_automl.compare import PUBLISHED

    run_compare(
        recipe,
        pins,
        DataOptions(data, groups, domains, fold, seed),
        out=out,
        backbones=backbones or list(PUBLISHED),
        weights=weights,
        device=device,
        as_json=json,
    )
