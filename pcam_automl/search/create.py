"""Creating studies: options judged, data packed and split, speeds measured, everything remembered. Runs no trial."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from pcam_automl.clock import process_age_s
from pcam_automl.config import Enqueued, StudySettings, check_study_name, find_data, storage_url, studies_folder
from pcam_automl.configs_folder import find_config, list_configs
from pcam_automl.data.domains import Domains, with_domains, write_domains
from pcam_automl.data.packs import PackCall, find_pack
from pcam_automl.data.splits import Split, make_split, write_split
from pcam_automl.data.store import PatchStore
from pcam_automl.errors import DataError, InputError, RecipeError, first_few
from pcam_automl.files import write_json
from pcam_automl.goals import AUC, goal_of
from pcam_automl.models.factory import backbone_fault, check_runs, network_faults
from pcam_automl.models.weights import Weights, decide_weights
from pcam_automl.recipe import Recipe, build_recipe, load_recipe, merge_fields, scratch_warning
from pcam_automl.search.budget import plan_budget
from pcam_automl.search.dimension import UPSCALE
from pcam_automl.search.domains import DOMAINS, ESTIMATE, check_domains, choose_domains, split_of
from pcam_automl.search.plan import make_plan
from pcam_automl.search.priors import NONE, check_prior_holdout, load_prior, prior_entries
from pcam_automl.search.probe_study import LIMIT_S, MODES, check_mode, probe_study
from pcam_automl.search.pruner import build_pruner
from pcam_automl.search.reading import SETTINGS_KEY
from pcam_automl.search.sampler import build_sampler, check_cost_aware
from pcam_automl.search.slots import Slots
from pcam_automl.search.space import SearchSpace, load_space
from pcam_automl.search.start import start_list
from pcam_automl.search.storage import engine_of, open_storage, quiet_experimental
from pcam_automl.search.storage_url import normalised_url, safe_url, sqlite_path
from pcam_automl.search.study import (
    DEFAULT_SPACE,
    VALIDATION_FOLD,
    Asked,
    OpenStudy,
    Say,
    as_searched,
    check_pins,
    open_study,
    start_recipe,
)
from pcam_automl.search.warm_start import check_holdout, open_source_study, warm_entries, weights_warning
from pcam_automl.training.compute import choose_device, use_device
from pcam_automl.training.speed import SpeedBook
from pcam_automl.training.start import absent_ids, check_task, choose_rows, without_excluded
from pcam_automl.versions import versions

LARGEST_HOLDOUT = 0.5
DEFAULT_RECIPE = "default"
_DRAWS = 4


def create_or_open_study(
    name: str, url: str | None, asked: Asked, *, say: Say, pack_call: PackCall | None = None
) -> OpenStudy:
    """Open the study, or create it from what is asked and the defaults.

    Raises:
        StudyError, DataError, RecipeError, InputError: anything at fault, before a trial starts.
    """
    url = storage_url(url)
    check_study_name(name)
    check_options(asked)  # whatever is wrong is said before the hub is asked or the data packed
    database = sqlite_path(normalised_url(url))
    if database is not None and not database.exists():  # a new study for certain: no fault shall leave a database
        _load_asked_space(asked)
        find_data(asked.data)
    storage = open_storage(url)
    if name in optuna.get_all_study_names(storage):
        return open_study(name, url, asked, say=say, pack_call=pack_call)
    folder = studies_folder(url) / name
    settings, split, domains = _decide(name, url, asked, folder, say, pack_call)
    try:
        study = optuna.create_study(study_name=name, storage=storage, direction=settings.goal.direction)
    except optuna.exceptions.DuplicatedStudyError:  # another process was quicker: its settings hold
        return open_study(name, url, asked, say=say, pack_call=pack_call)
    study.set_user_attr(f"{SETTINGS_KEY}:creating", True)
    Slots(engine_of(study), name).clear()  # a deleted study of this name may have left its slots
    with quiet_experimental():
        study.set_metric_names([settings.goal.metric])
    write_split(split, folder / "split.npz")
    if domains is not None:
        write_domains(domains, folder / DOMAINS)
    write_json(folder / "settings.json", settings.model_dump(mode="json"))
    study.set_user_attr(SETTINGS_KEY, settings.model_dump_json())
    return open_study(name, url, say=say, pack_call=pack_call)


def _decide(
    name: str, url: str, asked: Asked, folder: Path, say: Say, pack_call: PackCall | None
) -> tuple[StudySettings, Split, Domains | None]:
    """Everything a new study remembers."""
    device = use_device(asked.device, n_workers=asked.n_workers, deterministic=asked.deterministic)
    pins = dict(asked.pins or {})
    space = _load_asked_space(asked)
    path = find_data(asked.data)
    weights, text = decide_weights(asked.weights or "auto")  # asks the network, up to 10 s: after what needs none
    say(text)
    space = around_recipe(space, asked)
    space = space.pinned({"pretrained": pins.get("pretrained", weights.pretrained and may_be_pretrained(asked))})
    space = drop_backbones_without_weights(space, weights, say)
    store = find_pack(
        path, folder.parent / "packs", groups=asked.groups, domains=asked.domains, say=say, call=pack_call
    )
    seed = asked.seed if asked.seed is not None else 0
    goal, split_by = goal_of(asked.objective or AUC.name), split_of(asked.split_by)
    domains = choose_domains(store, goal, split_by, estimate=asked.estimate_domains, seed=seed, say=say)
    store = store if domains is None else with_domains(store, domains)
    domains_hash = None if domains is None else domains.hash
    split = make_split(store, seed=seed, holdout=asked.holdout or 0.0, by=split_by, domains=domains_hash or "")
    for note in split.notes:
        say(note)
    start = start_recipe(asked.recipe or DEFAULT_RECIPE, bool(space.base["pretrained"]))
    common = build_recipe(merge_fields(start.model_dump(), recipe_fields(space)), where="recipe")
    space = without_stage_fields(space, common, asked, say)
    check_task(common, store)
    if absent := absent_ids(store, common):
        say(absent)
    if warning := scratch_warning(common):
        say(warning)
    check_masks(common, store, split)
    folds = split.train_order(VALIDATION_FOLD), split.score_rows(VALIDATION_FOLD)
    rows = choose_rows(store, common, *folds)
    n_train, n_valid = len(rows.train), len(rows.score)
    speed = SpeedBook(folder.parent / "speed.json", deterministic=asked.deterministic, quick=True)
    budget = None
    if asked.budget_s is not None:
        check_runs(common)
        rate = speed.images_per_s(common, device)
        budget = plan_budget(asked.budget_s, used_s=process_age_s(), images_per_s=rate, n_final=len(split.order))
    plan = make_plan(
        space,
        start,
        n_train=n_train,
        n_valid=n_valid,
        device=device,
        views=asked.views,
        trial_s=None if budget is None else budget.trial_s,
        speed=speed,
        progress=say,
    )
    check_networks(space, start)
    if plan.dropped:
        space = space.without_choices("backbone", list(plan.dropped))
    probe = None
    if check_mode(asked.probe or "auto", weights, deterministic=asked.deterministic):
        limit_s = LIMIT_S if budget is None else min(LIMIT_S, 2.0 * budget.trial_s)
        space, probe = probe_study(
            space, common, plan, store=store, rows=rows, weights=weights, device=device, say=say, seconds=limit_s
        )
    if goal.name == "worst_domain_auc":
        check_domains(store, without_excluded(store, common, folds[1][: plan.n_score]), common)
    asked_for = [*asked_entries(asked, url, space, store, split, say), *_probed_entries(probe)]
    first = start_list(space, start, asked_for, shipped_recipes(), plan, name=asked.recipe or DEFAULT_RECIPE)
    rungs = tuple((rung.views, rung.subset) for rung in plan.rungs)
    build_pruner(asked.pruner or "asha", rungs=[views for views, _ in rungs])
    settings = StudySettings(
        data=str(path),
        pack=str(store.root.resolve()),
        pack_hash=store.content_hash,
        split_hash=split.hash,
        seed=seed,
        holdout=asked.holdout or 0.0,
        deterministic=asked.deterministic,
        groups=_full(asked.groups),
        domains=_full(asked.domains),
        weights=str(weights),
        start=start.model_dump(mode="json"),
        space=space.to_yaml(),
        pins=pins,
        sampler=asked.sampler or "tpe",
        pruner=asked.pruner or "asha",
        rungs=rungs,
        n_score=plan.n_score,
        cap_s=plan.cap_s,
        plan={
            **plan.to_json(),
            "device": str(device),
            "space_name": asked.space or default_space(asked),
            "recipe_name": asked.recipe or DEFAULT_RECIPE,
            "n_train": n_train,
            "n_valid": n_valid,
            "trial_s": None if budget is None else budget.trial_s,
            "budget": None if budget is None else asdict(budget),
            "probe_mode": asked.probe or "auto",
            "probe": probe,
        },
        versions=versions(),
        objective=goal.name,
        split_by=split_by,
        domains_hash=domains_hash,
        enqueued=first.entries,
        warm_start=None if asked.warm_start is None else safe_url(asked.warm_start),
        prior=None if asked.prior in (None, NONE) else asked.prior,
        command=asked.command,
        cost_aware=asked.cost_aware,
    )
    return settings, split, domains


def _probed_entries(probe: dict[str, Any] | None) -> list[Enqueued]:
    """What the probe of frozen features would begin with."""
    return [Enqueued(origin="probe of frozen features", params=params) for params in (probe or {}).get("starts", ())]


def _full(path: Path | None) -> str | None:
    return None if path is None else str(path.expanduser().resolve())


def _load_asked_space(asked: Asked) -> SearchSpace:
    """The space that is asked for, with ``--set`` applied and every backbone's name looked up in timm."""
    return load_space(asked.space or default_space(asked), pins=asked.pins, backbone_fault=backbone_fault)


def shipped_recipes() -> dict[str, Recipe]:
    """Every shipped recipe by name, as a search starts from it: with the weights that its file names."""
    return {name: as_searched(load_recipe(find_config("recipes", name))) for name in list_configs("recipes")}


def asked_entries(
    asked: Asked, url: str, space: SearchSpace, store: PatchStore, split: Split, say: Say
) -> list[Enqueued]:
    """What ``--warm-start`` and ``--prior`` give the first trials, the warm start first.

    Raises:
        StudyError, RecipeError: no such study or prior, or nothing in it fits the space.
        DataError: they were searched on this study's holdout.
    """
    entries: list[Enqueued] = []
    here = bool(space.base["pretrained"])
    if asked.warm_start is not None:
        source = open_source_study(asked.warm_start, url)
        notes = [
            check_holdout(store, split, source),
            weights_warning(source.shown, pretrained=source.settings.weights != "none", here=here),
        ]
        entries += warm_entries(source, space)
        for note in filter(None, notes):
            say(note)
    if asked.prior not in (None, NONE):
        prior = load_prior(asked.prior)
        notes = [
            check_prior_holdout(prior, asked.prior, store, split),
            weights_warning(asked.prior, pretrained=prior.weights != "none", here=here),
        ]
        entries += prior_entries(prior, asked.prior, space)
        for note in filter(None, notes):
            say(note)
    return entries


def default_space(asked: Asked) -> str:
    """``dense`` where the recipe to start from is a dense one, else ``default``."""
    recipe = load_recipe(find_config("recipes", asked.recipe or DEFAULT_RECIPE))
    return "dense" if recipe.task == "dense" else DEFAULT_SPACE


def recipe_fields(space: SearchSpace) -> dict[str, Any]:
    """The fields that a space fixes and a recipe has."""
    return {name: value for name, value in space.base.items() if name in Recipe.model_fields}


def may_be_pretrained(asked: Asked) -> bool:
    """Whether pretrained weights are used where there are some: always for the default recipe, else as the recipe says."""
    return asked.recipe is None or load_recipe(find_config("recipes", asked.recipe)).pretrained


def around_recipe(space: SearchSpace, asked: Asked) -> SearchSpace:
    """A search around ``--recipe`` starts from just that recipe, unless a ``--space`` is named.

    Its network is kept (backbone, decoder, tile), and so is every value that the space cannot take: an optimizer that is
    no choice, a crop between two steps. Only then is trial 0 the recipe.
    """
    if asked.recipe is None or asked.space is not None:
        return space
    recipe, pins = load_recipe(find_config("recipes", asked.recipe)), asked.pins or {}
    fields = {**recipe.model_dump(), UPSCALE: recipe.network_px / recipe.crop_size}
    own = {name for name, p in space.parameters.items() if p.active(fields) and not p.contains(fields[name])}
    if UPSCALE in own:
        own = own - {UPSCALE} | {"input_size"}
    own |= {"backbone"} | ({"decoder", "tile_size"} if recipe.task == "dense" else set())
    return space.pinned({name: fields[name] for name in sorted(own) if name not in pins})


def check_networks(space: SearchSpace, start: Recipe) -> None:
    """Whether the fields that the space gives each of its backbones are options of that backbone, by a few draws of each.

    Raises:
        RecipeError: names every field and backbone that do not go together.
    """
    faults: dict[str, None] = {}
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for backbone in space.choices("backbone") or (start.backbone,):
        of_one = space.pinned({"backbone": backbone})
        for _ in range(_DRAWS):
            recipe = of_one.suggest(study.ask(), {**start.model_dump(), "epochs": None})
            faults |= dict.fromkeys(network_faults(recipe))
    if faults:
        raise RecipeError("; ".join(faults) + "; a parameter of some backbones alone needs `when: {backbone: [...]}`")


def check_masks(recipe: Recipe, store: PatchStore, split: Split) -> None:
    """Of a dense task, whether the images set aside hold both tumour and none: no map could be scored on them.

    Raises:
        DataError: they do not.
    """
    if recipe.task != "dense" or store.masks is None:
        return
    parts = (("validation fold", split.score_rows(VALIDATION_FOLD)), ("holdout", split.holdout_rows()))
    for what, rows in parts:
        share = float(np.mean([store.masks[row].mean() for row in rows.tolist()])) if len(rows) else 0.5
        if share in (0.0, 1.0):
            held = "no tumour" if share == 0.0 else "nothing but tumour"
            remedy = "choose another --seed" + (" or a larger --holdout" if what == "holdout" else "")
            raise DataError(f"the masks of the {what}'s {len(rows)} images hold {held}; {remedy}, or add images")


def without_stage_fields(space: SearchSpace, common: Recipe, asked: Asked, say: Say) -> SearchSpace:
    """A recipe with stages has its rates in them: what the space varies of them would have no effect.

    Raises:
        RecipeError: ``--set`` names such a field, or nothing is left to search.
    """
    if common.stages:
        fixed = ["lr", "lr_low", "trainable", "frozen"]
        fixed += ["weight_decay"] if all(stage.weight_decay is not None for stage in common.stages) else []
        if pinned := [name for name in fixed if name in (asked.pins or {})]:
            raise RecipeError(
                f"--set {', '.join(pinned)}: the recipe's stages fix it; set the stages themselves, or --set stages=[]"
            )
        if idle := [name for name in fixed if name in space.parameters]:
            say(f"not searched, since the recipe's stages fix them: {', '.join(idle)}")
            space = replace(space, parameters={name: p for name, p in space.parameters.items() if name not in idle})
    if not space.parameters:
        raise RecipeError(
            "nothing is left to search: every field of the space is fixed; use `pcam-automl train`, or another --space"
        )
    return space


def check_options(asked: Asked) -> None:
    """Options that can be judged without data.

    Raises:
        RecipeError, DataError, InputError: an unknown device, sampler or pruner, a value of ``--set`` that no recipe
            can have, a holdout out of range, or two budgets.
    """
    choose_device(asked.device)
    build_sampler(asked.sampler or "tpe", 0)
    if asked.cost_aware:
        check_cost_aware(asked.sampler or "tpe")
    build_pruner(asked.pruner or "asha", rungs=[1, 2])
    goal, split_by = goal_of(asked.objective or AUC.name), split_of(asked.split_by)
    if goal.name == "worst_domain_auc" and split_by == "domains":
        raise InputError(
            "--objective worst_domain_auc compares domains, but with --split domains the validation fold is a single one; "
            "take --objective auc, which is then the AUC of a domain that training has not seen"
        )
    if asked.estimate_domains and asked.domains is not None:
        raise InputError(f"--domains {asked.domains} and --domains {ESTIMATE} exclude each other; keep one")
    if asked.holdout is not None and not 0.0 <= asked.holdout <= LARGEST_HOLDOUT:
        raise DataError(f"--holdout must be in [0, {LARGEST_HOLDOUT}], got {asked.holdout}")
    if asked.views is not None and (named := {"views", "epochs"} & set(asked.pins or {})):
        raise RecipeError(f"--views {asked.views} and --set {', '.join(sorted(named))} both name the budget; keep one")
    check_pins(asked.pins or {})
    if asked.prior not in (None, NONE):
        load_prior(asked.prior)
    if asked.probe not in (None, *MODES):
        raise RecipeError(f"--probe must be one of {', '.join(MODES)}, got {asked.probe!r}")
    if asked.deterministic and asked.views is None and not {"views", "epochs"} & set(asked.pins or {}):
        raise RecipeError(
            "--deterministic needs --views (or --set epochs): by default the measured speed decides how much a trial trains"
        )


def drop_backbones_without_weights(space: SearchSpace, weights: Weights, say: Say) -> SearchSpace:
    """Leave out, by name, the backbones that the weights folder or hub does not have.

    Raises:
        RecipeError: none is left.
    """
    names = space.choices("backbone")
    if not space.base["pretrained"]:
        return space
    missing = [name for name in names if not weights.has(name)]
    if missing and len(missing) == len(names):
        raise RecipeError(
            f"no backbone of the space has weights in {weights} (it wants {first_few(names)}); "
            "name one with --set backbone=NAME, or give --weights none"
        )
    if missing:
        say(f"left out, no weights in {weights}: {', '.join(missing)}")
        return space.without_choices("backbone", missing)
    return space
