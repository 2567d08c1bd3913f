"""`report`, and the page at the end of `train` and `finalize`: gathers what there is and has it drawn."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pcam_automl import terminal
from pcam_automl.bundle import ModelBundle, load_bundle
from pcam_automl.config import find_data, storage_url, studies_folder
from pcam_automl.data.packs import find_pack
from pcam_automl.data.splits import Split
from pcam_automl.data.store import PatchStore
from pcam_automl.errors import DataError, PcamError
from pcam_automl.interrupt import stop_signal
from pcam_automl.predict import Predictor, build_predictor
from pcam_automl.recipe import Recipe, build_recipe
from pcam_automl.report.content import RateCurve, ReportContent
from pcam_automl.report.page import Written, write_report
from pcam_automl.scores import FILE as SCORES
from pcam_automl.scores import Scores, read_scores
from pcam_automl.train import stage_folder, strip_file
from pcam_automl.training.compute import Compute, choose_device, use_cores
from pcam_automl.training.engine import RungResult
from pcam_automl.training.schedule import rates_at

LR_POINTS = 400


def this_command() -> str:
    """What the user typed, to be shown under "how to reproduce"."""
    return shlex.join(["pcam-automl", *sys.argv[1:]])


def compute_of(bundle: ModelBundle, device: torch.device) -> Compute:
    """The bundle's measured precision and layout where it was trained on this device, else plain ones."""
    measured = bundle.provenance.get("compute", {})
    if measured.get("device") != str(device):
        return Compute(str(device))
    return Compute(str(device), measured.get("precision", "fp32"), measured.get("channels_last", False))


def bundle_folder(path: Path) -> Path:
    """The bundle itself: ``path``, or ``path/model`` as finalize writes it."""
    return path / "model" if not (path / "bundle.json").exists() and (path / "model").is_dir() else path


def lr_curve(recipe: Recipe, views: int) -> RateCurve:
    """The head's learning rate over a training of so many views, decay branches of a search left out."""
    at = np.linspace(0, views, LR_POINTS, endpoint=False).astype(np.int64)
    return RateCurve(at, np.array([rates_at(recipe, int(v), end=views, horizon=views).lr for v in at]))


def training_parts(bundle: ModelBundle) -> dict[str, Any]:
    """Epochs and schedule as the bundle remembers them."""
    epochs = tuple(RungResult(**result) for result in bundle.metrics.get("epochs", ()))
    curve = lr_curve(bundle.recipe, epochs[-1].views) if epochs and bundle.recipe.schedule != "wsd" else None
    return {"epochs": epochs, "lr_curve": curve}


def report_of_training(
    folder: Path, store: PatchStore, split: Split | None, *, device: torch.device, threshold: float, title: str
) -> Written:
    """The page of a bundle that `train` wrote, into the bundle's own folder."""
    bundle = load_bundle(folder)
    scores = read_scores(folder / SCORES, store.ids) if bundle.scores is not None else None
    stages = []
    for number in range(len(bundle.recipe.stages) - 1):
        file = stage_folder(folder, number) / SCORES
        if file.is_file():
            stages.append((f"stage {number + 1}", read_scores(file, store.ids)))
    if stages and scores is not None:
        stages.append((f"stage {len(bundle.recipe.stages)}", scores))
    content = ReportContent(
        title,
        store,
        split,
        bundle=bundle,
        scores=scores,
        threshold=threshold,
        reproduce=(this_command(),),
        stages=tuple(stages),
        strips=_strips(folder),
        **training_parts(bundle),
    )
    return draw(content, folder, predictor_of(bundle, device))


def _strips(folder: Path) -> tuple[tuple[str, Path | np.ndarray], ...]:
    strip = strip_file(folder)
    return (
        (("one validation image: itself, its truth, the decision after each epoch", strip),) if strip.is_file() else ()
    )


def predictor_of(bundle: ModelBundle, device: torch.device) -> Predictor | None:
    """For Grad-CAM; a dense network's map needs none."""
    return None if bundle.recipe.task == "dense" else build_predictor(bundle, compute_of(bundle, device))


def draw(content: ReportContent, out: Path, predictor: Predictor | None) -> Written:
    """Write the page with a bar that names the part being drawn."""
    with terminal.Bars() as bars:
        task = bars.add("report", None)
        return write_report(content, out, predictor=predictor, progress=lambda text: bars.set(task, text=text))


def report_of_study(
    name: str,
    url: str | None,
    *,
    data: Path | None,
    model: Path | None,
    out: Path | None,
    threshold: float,
    device: torch.device,
    scores: Scores | None = None,
) -> Written:
    """The page of a study: its search, the best trial's scores, and the final network where there is one.

    The pictures are also attached to the trial, so that optuna-dashboard shows them.
    """
    from pcam_automl.report.artifacts import attach
    from pcam_automl.search.study import Asked, open_study

    with terminal.counting("packing") as call:
        opened = open_study(name, url, Asked(data=data), say=terminal.say, pack_call=call)
    folder = model or opened.folder / "final" / "model"
    bundle = load_bundle(folder) if (folder / "bundle.json").is_file() else None
    trial = _trial_of(opened.study, bundle)
    if scores is None and trial is not None:
        file = opened.folder / "trials" / str(trial.number) / SCORES
        scores = read_scores(file, opened.store.ids) if file.is_file() else None
        if scores is not None:
            on = f"validation slides of trial {trial.number}, before the final training"
            scores = replace(scores, on=on)
    recipe = None
    if bundle is None and trial is not None and "recipe" in trial.user_attrs:
        recipe = build_recipe(_json(trial.user_attrs["recipe"]))
    content = ReportContent(
        f"Study {name}",
        opened.store,
        opened.split,
        recipe=recipe,
        bundle=bundle,
        scores=scores,
        threshold=threshold,
        study=opened.study,
        study_settings=opened.settings,
        reproduce=study_commands(name, url, opened.settings.data, len(opened.study.get_trials(deepcopy=False))),
        **(training_parts(bundle) if bundle is not None else {}),
    )
    written = draw(content, out or opened.folder, None if bundle is None else predictor_of(bundle, device))
    if trial is not None:
        artifacts = studies_folder(storage_url(url)) / "artifacts"
        attach(opened.study, trial.number, written.pictures, artifacts, page=str(written.page))
    return written


def _json(text: str) -> Any:
    import json

    return json.loads(text)


def _trial_of(study: Any, bundle: ModelBundle | None) -> Any:
    """The trial that was retrained, else the best one; None before any is complete."""
    from pcam_automl.search.reading import best_of

    trials = study.get_trials(deepcopy=False)
    number = None if bundle is None else bundle.provenance.get("trial")
    if isinstance(number, int) and 0 <= number < len(trials) and bundle is not None:
        return trials[number] if bundle.provenance.get("study") == study.study_name else best_of(trials)
    return best_of(trials)


def study_commands(name: str, url: str | None, data: str, n_trials: int) -> tuple[str, ...]:
    """The two commands that repeat a study; its own options are remembered by the study."""
    from pcam_automl.commands.search import command_options

    options = command_options(name, url)
    return (
        f"pcam-automl search --data {shlex.quote(data)} --trials {n_trials}{options}",
        f"pcam-automl finalize{options}",
    )


def run_report(
    name: str,
    url: str | None,
    *,
    model: Path | None,
    data: Path | None,
    groups: Path | None,
    domains: Path | None,
    out: Path | None,
    threshold: float,
    device: str,
) -> None:
    """The page of a study, or with ``model`` and ``data`` of a bundle."""
    if not 0.0 <= threshold <= 1.0:
        raise DataError(f"--threshold must be in [0, 1], got {threshold}")
    place = choose_device(device)
    use_cores()
    with stop_signal("nothing was lost; repeat the command"):
        if model is None:
            written = report_of_study(name, url, data=data, model=None, out=out, threshold=threshold, device=place)
        else:
            folder = bundle_folder(model)
            bundle = load_bundle(folder)
            packs = studies_folder(storage_url(None)) / "packs"
            with terminal.counting("packing") as call:
                store = find_pack(find_data(data), packs, groups=groups, domains=domains, say=terminal.say, call=call)
            if bundle.provenance.get("pack_hash") != store.content_hash:
                raise DataError(
                    f"{folder} was trained on pack {str(bundle.provenance.get('pack_hash'))[:12]}, the data given are "
                    f"{store.content_hash[:12]}; give the data it was trained on"
                )
            written = report_of_training(
                folder,
                store,
                None,
                device=place,
                threshold=threshold,
                title=f"{bundle.recipe.backbone} in {folder.name}",
            )
    terminal.result(str(written.page))


def after_work(work: Any) -> Written | None:
    """Draw a report after hours of training: whatever is wrong with the page, the training's result stands."""
    try:
        written: Written = work()
    except PcamError as fault:
        terminal.say(f"the report could not be written: {fault}; `pcam-automl report` draws it again")
        return None
    terminal.say(f"report: {written.page}")
    return written
