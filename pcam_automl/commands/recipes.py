"""`recipes`, `lr-find` and `compare-backbones`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from pcam_automl import terminal
from pcam_automl.batches import open_patches
from pcam_automl.bundle import load_bundle
from pcam_automl.commands.setup import DataOptions, set_up
from pcam_automl.compare import Compared, compare_backbone, ranked, recipe_for
from pcam_automl.errors import RecipeError, TrainingDiverged, first_few
from pcam_automl.files import check_can_write, sha256_of_json, write_json
from pcam_automl.interrupt import stop_signal
from pcam_automl.lr_find import find_lr, write_curves
from pcam_automl.models.factory import backbone_fault
from pcam_automl.models.weights import Weights
from pcam_automl.training.start import Rows, choose_rows, data_key
from pcam_automl.training.task import Score


def run_lr_find(
    recipe: str,
    pins: dict[str, Any],
    options: DataOptions,
    *,
    out: Path,
    weights: str | None,
    device: str,
    weight_decays: list[float],
    n_steps: int,
    stage: int,
    start: Path | None,
    as_json: bool,
) -> None:
    """Range tests over several weight decays: one plot, one JSON, one suggestion each."""
    from pcam_automl.report.lr_figure import write_lr_figure

    if not weight_decays or min(weight_decays) < 0:
        raise RecipeError(f"--weight-decay must be at least 0, got {weight_decays}")
    with stop_signal("nothing was written; repeat the command") as stop:
        setup = set_up(recipe, pins, options, weights=weights, device=device)
        check_can_write(out)
        bundle = None if start is None else load_bundle(start)
        rows = choose_rows(setup.store, setup.recipe, setup.train_rows, setup.score_rows[:0])
        with stop.deferred(), terminal.Bars() as bars:
            task = bars.add("range test", n_steps * len(weight_decays))
            curves = find_lr(
                setup.recipe,
                setup.store,
                rows,
                weights=setup.weights,
                compute=setup.speed.compute_for(setup.recipe, setup.device),
                weight_decays=weight_decays,
                n_steps=n_steps,
                start=bundle,
                stage=stage,
                stop=stop.check,
                progress=lambda n: bars.step(task, n),
            )
    write_curves(curves, out / "lr_find.json")
    write_lr_figure(curves, out / "lr_find.png", title=f"{setup.recipe.backbone}, batch {setup.recipe.batch_size}")
    if as_json:
        terminal.print_json({"out": str(out), "curves": [dataclasses.asdict(curve) for curve in curves]})
        return
    rows_ = [
        (
            f"{c.weight_decay:g}",
            f"{min(c.loss):.4f}" if c.loss else "-",
            "-" if c.suggestion is None else f"{c.suggestion:.2e}",
        )
        for c in curves
    ]
    terminal.table("learning-rate range test", ("weight decay", "lowest loss", "suggested lr"), rows_)
    terminal.result(str(out / "lr_find.png"))


def run_compare(
    recipe: str,
    pins: dict[str, Any],
    options: DataOptions,
    *,
    out: Path,
    backbones: list[str],
    weights: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Train each backbone shortly on the same patches; finished ones are kept, so that the same command goes on."""
    if faults := [f"backbone {name} {fault}" for name in backbones if (fault := backbone_fault(name)) is not None]:
        raise RecipeError("; ".join(faults))
    with stop_signal("finished backbones are stored; the same command goes on") as stop:
        setup = set_up(recipe, pins, options, weights=weights, device=device)
        check_can_write(out)
        recipes = [recipe_for(setup.recipe, name) for name in backbones]
        missing = [r.backbone for r in recipes if setup.recipe.pretrained and not setup.weights.has(r.backbone)]
        patches, results, diverged = open_patches(setup.store, setup.device), [], dict[str, str]()
        of_data = data_key(setup.store, Rows(setup.train_rows, setup.score_rows))  # a split has several folds
        with stop.deferred(), terminal.Bars() as bars:
            task = bars.add("preparing", None)
            for chosen in recipes:
                if chosen.backbone in missing:
                    terminal.say(f"{chosen.backbone}: no weights in {setup.weights}, trained from scratch")
                    chosen = chosen.model_copy(update={"pretrained": False, "trainable": 1.0})
                key = sha256_of_json([chosen.hash, of_data, str(setup.weights)])
                file = out / f"{chosen.backbone}.json"
                found = _stored(file, key)
                if found is None:
                    n_views = chosen.n_views(
                        len(choose_rows(setup.store, chosen, setup.train_rows, setup.score_rows).train)
                    )
                    bars.restart(task, f"{chosen.backbone} views", n_views)
                    try:
                        found = compare_backbone(
                            chosen,
                            setup.store,
                            setup.train_rows,
                            setup.score_rows,
                            patches=patches,
                            weights=setup.weights if chosen.pretrained else Weights("none"),
                            device=setup.device,
                            speed=setup.speed,
                            stop=stop.check,
                            progress=lambda n: bars.step(task, n),
                        )
                    except TrainingDiverged as fault:
                        diverged[chosen.backbone] = str(fault)
                        terminal.say(f"{chosen.backbone}: diverged, {fault}")
                        continue
                    write_json(file, {"key": key, **found.to_json()})
                terminal.say(
                    f"{found.backbone}: loss {found.initial.loss:.4f} -> {found.trained.loss:.4f}, {terminal.duration(found.seconds)}"
                )
                results.append(found)
    if not results:
        raise TrainingDiverged(
            f"every backbone diverged ({first_few([f'{n}: {why}' for n, why in diverged.items()])}); try a smaller --set lr="
        )
    _print_compared(ranked(results), diverged, out, as_json)


def _stored(file: Path, key: str) -> Compared | None:
    """A result of an earlier run of the same comparison."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        if value.pop("key") != key:
            return None
        return Compared(**{**value, "initial": Score(**value["initial"]), "trained": Score(**value["trained"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # absent or of another version: trained again
        return None


def _print_compared(results: list[Compared], diverged: dict[str, str], out: Path, as_json: bool) -> None:
    write_json(out / "comparison.json", [result.to_json() for result in results])
    if as_json:
        terminal.print_json([result.to_json() for result in results])
        return
    by_initial = sorted(results, key=lambda one: one.initial.loss)
    rows = [
        (
            one.backbone,
            f"{one.n_parameters / 1e6:.1f} M",
            f"{one.input_px}",
            f"{one.initial.loss:.3f} / {one.initial.accuracy:.3f} ({by_initial.index(one) + 1}.)",
            f"{one.trained.loss:.3f} / {one.trained.accuracy:.3f}",
            f"{one.trained.auc:.4f}",
            f"{one.images_per_s:,.0f}",
            terminal.duration(one.seconds),
        )
        for one in results
    ]
    header = (
        "backbone",
        "weights",
        "px",
        "before: loss / acc. (rank)",
        "after: loss / acc.",
        "AUC",
        "images/s",
        "time",
    )
    terminal.table("backbones by validation loss after the short training", header, rows)
    for name, why in diverged.items():
        terminal.say(f"not in the table: {name}, which diverged ({why})")
    terminal.result(str(out / "comparison.json"))
