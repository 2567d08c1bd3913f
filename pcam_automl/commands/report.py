"""`report`, and the page at the end of `train` and `finalize`: gathers what there is and has it drawn."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from pcam_automl import terminal
from pcam_automl.bundle import ModelBundle, load_bundle
from pcam_automl.commands.final_card import (
    final_card,
    final_figures,
    holdout_scores,
    maps_of,
    maps_on_test,
    out_of_fold_scores,
)
from pcam_automl.commands.status import is_of_another
from pcam_automl.config import GRACE_S, StudySettings, find_data, storage_url, studies_folder
from pcam_automl.data.packs import find_pack
from pcam_automl.data.splits import Split
from pcam_automl.data.store import PatchStore
from pcam_automl.errors import DataError, Interrupted
from pcam_automl.files import check_can_write
from pcam_automl.goals import Goal
from pcam_automl.interrupt import stop_signal
from pcam_automl.predict import Predictor, build_predictor, compute_of
from pcam_automl.recipe import Recipe, build_recipe
from pcam_automl.report.content import RateCurve, ReportContent
from pcam_automl.report.page import Written, write_report
from pcam_automl.scores import FILE as SCORES
from pcam_automl.scores import Scores, read_scores
from pcam_automl.search.budget import budget_of
from pcam_automl.search.whose_folder import ID_KEY
from pcam_automl.train import stage_folder, strip_file
from pcam_automl.training.compute import use_device
from pcam_automl.training.engine import RungResult
from pcam_automl.training.schedule import rates_at

LR_POINTS = 400


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
    ideal = bundle.recipe.schedule != "wsd" and not bundle.provenance.get(
        "by_clock"
    )  # else the parts' own rates are drawn
    curve = lr_curve(bundle.recipe, epochs[-1].views) if epochs and ideal else None
    return {"epochs": epochs, "lr_curve": curve}


def report_of_training(
    folder: Path,
    store: PatchStore,
    split: Split | None,
    *,
    device: torch.device,
    threshold: float,
    title: str,
    out: Path | None = None,
) -> Written:
    """The page of a bundle that `train` or `finalize` wrote, into ``out``, by default the bundle's own folder."""
    bundle = load_bundle(folder)
    card = final_card(folder, bundle)
    scores = read_scores(folder / SCORES, store.ids, store.part) if bundle.scores is not None else None
    if scores is None:
        scores = holdout_scores(folder, card, store)
    stages = []
    for number in range(len(bundle.recipe.stages) - 1):
        file = stage_folder(folder, number) / SCORES
        if file.is_file():
            stages.append((f"stage {number + 1}", read_scores(file, store.ids, store.part)))
    if stages and scores is not None:
        stages.append((f"stage {len(bundle.recipe.stages)}", scores))
    scores_before = scores is None
    if scores is None:
        scores = out_of_fold_scores(folder, card, store)
    content = ReportContent(
        title,
        store,
        split,
        bundle=bundle,
        scores=scores,
        scores_before=scores_before,
        threshold=threshold,
        reproduce=(str(command),) if (command := bundle.provenance.get("command")) else (),
        stages=tuple(stages),
        strips=_strips(folder),
        maps=maps_of(bundle, card),
        test_maps=maps_on_test(card),
        final=final_figures(card),
        **training_parts(bundle),
    )
    return draw(content, out or folder, predictor_of(bundle, device))


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
    from pcam_automl.search.pictures import pictures_of
    from pcam_automl.search.ranking import rank_study
    from pcam_automl.search.reading import TRIALS_KEY
    from pcam_automl.search.study import Asked, open_study

    with terminal.counting("packing") as call:
        opened = open_study(name, url, Asked(data=data), say=terminal.say, pack_call=call)
    folder = model or opened.folder / "final" / "model"
    bundle = load_bundle(folder) if (folder / "bundle.json").is_file() else None
    if bundle is not None and model is None:
        other_split = bundle.provenance.get("split_hash") != opened.split.hash
        if other_split or is_of_another(bundle.provenance, opened.study.user_attrs.get(ID_KEY)):
            why = "another split, perhaps of a deleted study" if other_split else "but of a deleted study of its name"
            terminal.say(f"{folder} is not of this study ({why}): left out")
            bundle = None
    trial = _trial_of(opened.study, bundle, opened.settings.goal)
    card = {} if bundle is None else final_card(folder, bundle)
    if scores is None:
        scores = holdout_scores(folder, card, opened.store)
    scores_before = scores is None
    if scores is None:
        scores = out_of_fold_scores(folder, card, opened.store)
    if scores is None and trial is not None:
        file = opened.folder / "trials" / str(trial.number) / SCORES
        scores = read_scores(file, opened.store.ids, opened.store.part) if file.is_file() else None
        if scores is not None:
            scores = replace(scores, on=f"{scores.on} of trial {trial.number}, before the final training")
    recipe = None
    if bundle is None and trial is not None and "recipe" in trial.user_attrs:
        recipe = build_recipe(json.loads(trial.user_attrs["recipe"]))
    content = ReportContent(
        f"Study {name}",
        opened.store,
        opened.split,
        recipe=recipe,
        bundle=bundle,
        scores=scores,
        scores_before=scores_before,
        threshold=threshold,
        study=opened.study,
        study_settings=opened.settings,
        ranking=rank_study(opened.study, opened.settings, opened.folder, store=opened.store),
        reproduce=study_commands(
            name,
            url,
            opened.settings,
            opened.study.get_trials(deepcopy=False),
            budget_of(opened.study),
            "" if bundle is None else str(card.get("finalize", "")),
            opened.study.user_attrs.get(TRIALS_KEY),
        ),
        maps=None if bundle is None else maps_of(bundle, card),
        test_maps=maps_on_test(card),
        final=final_figures(card),
        **(training_parts(bundle) if bundle is not None else {}),
    )
    written = draw(content, out or opened.folder, None if bundle is None else predictor_of(bundle, device))
    if trial is not None:
        pictures = pictures_of(opened.study, studies_folder(storage_url(url)) / "artifacts", opened.mirror)
        attach(opened.study, trial.number, written.pictures, pictures, page=str(written.page))
    return written


def _trial_of(study: Any, bundle: ModelBundle | None, goal: Goal) -> Any:
    """The trial that was retrained, else the best one; None before any is complete."""
    from pcam_automl.search.reading import best_of

    trials = study.get_trials(deepcopy=False)
    number = None if bundle is None else bundle.provenance.get("trial")
    if isinstance(number, int) and 0 <= number < len(trials) and bundle is not None:
        own = bundle.provenance.get("study") == study.study_name
        own = own and not is_of_another(bundle.provenance, study.user_attrs.get(ID_KEY))
        return trials[number] if own else best_of(trials, goal)
    return best_of(trials, goal)


def study_commands(
    name: str,
    url: str | None,
    settings: StudySettings,
    trials: list[Any],
    budget_s: float | None = None,
    final: str = "",
    total: int | None = None,
) -> tuple[str, ...]:
    """The two commands that repeat a study, from what it remembers: with the same budget, else with as many finished trials; at least one.
    ``final``: the options of `finalize`; ``total``: the trials that were asked for.
    """
    from pcam_automl.commands.advised import command_options
    from pcam_automl.search.reading import best_of, n_finished_in

    options = command_options(name, url)
    n = max(1, n_finished_in(trials))
    length = ["--trials", str(n)] if budget_s is None else ["--budget", f"{budget_s:.15g}s"]
    length += ["--trials", str(total)] if budget_s is not None and total is not None else []
    words = ["pcam-automl", "search", "--data", settings.data, *length, *search_options(settings)]
    search = f"{shlex.join(words)}{options}"
    if best_of(trials, settings.goal) is None:
        return (search, "# no trial is complete yet; once one is:", f"pcam-automl finalize{options}")
    return (search, f"pcam-automl finalize{options}{f' {final}' if final else ''}")


def search_options(settings: StudySettings) -> list[str]:
    """The words of `search` that make such a study anew; what is so by default is left out, but for the weights."""
    recipe, space = settings.plan["recipe_name"], settings.plan["space_name"]
    base = yaml.safe_load(settings.space).get("base") or {}
    # With --recipe and no --space a search keeps the recipe's network: only then is the backbone fixed without --set.
    around = space in ("default", "dense") and "backbone" in base and "backbone" not in settings.pins
    words = ["--recipe", recipe] if recipe != "default" or around else []
    words += ["--space", space] if not around and (recipe, space) != ("default", "default") else []
    for field, value in settings.pins.items():
        words += ["--set", f"{field}={value if isinstance(value, str) else json.dumps(value)}"]
    words += ["--weights", settings.weights if base.get("pretrained") else "none"]
    words += ["--groups", settings.groups] if settings.groups else []
    words += ["--domains", settings.domains] if settings.domains else []
    words += ["--domains", "estimate"] if settings.domains_hash else []
    words += ["--split", settings.split_by] if settings.split_by != "slides" else []
    words += ["--holdout", f"{settings.holdout:g}"] if settings.holdout else []
    if settings.cap_s is None and not {"views", "epochs"} & set(settings.pins):
        words += ["--views", str(settings.rungs[-1][0])]
    words += ["--objective", settings.objective] if settings.objective != "auc" else []
    words += ["--sampler", settings.sampler] if settings.sampler != "tpe" else []
    words += ["--pruner", settings.pruner] if settings.pruner != "asha" else []
    words += ["--rungs", str(settings.plan["n_rungs_asked"])] if settings.plan.get("n_rungs_asked") else []
    words += ["--cost-aware"] if settings.cost_aware else []
    words += ["--warm-start", settings.warm_start] if settings.warm_start else []
    words += ["--prior", settings.prior] if settings.prior else []
    words += ["--probe", mode] if (mode := settings.plan.get("probe_mode", "auto")) != "auto" else []
    words += ["--artifacts", settings.artifacts] if settings.artifacts else []
    words += ["--grace", f"{settings.grace_s:.15g}s"] if settings.grace_s != GRACE_S else []
    words += ["--deterministic"] if settings.deterministic else []
    return words + (["--seed", str(settings.seed)] if settings.seed else [])


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
    if model is None and (groups or domains):
        named = "--groups" if groups else "--domains"
        raise DataError(f"{named} goes with --model; a study remembers its slides and scanners: leave it out")
    if out is not None:
        check_can_write(out)
    place = use_device(device)
    with stop_signal("nothing was lost; repeat the command"):
        if model is None:
            written = report_of_study(name, url, data=data, model=None, out=out, threshold=threshold, device=place)
        else:
            folder = bundle_folder(model)
            bundle = load_bundle(folder)
            packs = studies_folder(storage_url(url)) / "packs"
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
                out=out,
            )
    terminal.result(str(written.page))


def after_work(work: Callable[[], Written], *, again: str) -> Written | None:
    """Draw a report after hours of training: whatever is wrong with the page, the training's result stands.

    Args:
        work: draws it.
        again: the command that draws it later.

    Raises:
        Interrupted: a signal came; the message says that the training is safe.
    """
    try:
        written = work()
    except Interrupted as stop:
        text = f"interrupted while the report was drawn; the training's results are written, `{again}` draws the report"
        raise Interrupted(text, stop.signum) from None
    except Exception as fault:  # noqa: BLE001 - a fault of ours in a picture must not hide the result of the training
        terminal.say(f"the report could not be written: {type(fault).__name__}: {fault}; `{again}` draws it again")
        return None
    terminal.say(f"report: {written.page}")
    return written
