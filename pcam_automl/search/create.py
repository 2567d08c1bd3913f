"""Creating studies: options judged, data packed and split, speeds measured, everything remembered. Runs no trial."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch

from pcam_automl.clock import process_age_s
from pcam_automl.config import GRACE_S, SplitBy, StudySettings, check_study_name, find_data, storage_url, studies_folder
from pcam_automl.data.domains import Domains, with_domains, write_domains
from pcam_automl.data.packs import PackCall, find_pack
from pcam_automl.data.splits import Split, make_split, write_split
from pcam_automl.data.store import PatchStore
from pcam_automl.errors import RecipeError, StudyError
from pcam_automl.files import write_json
from pcam_automl.goals import AUC, Goal, goal_of
from pcam_automl.interrupt import signals_held
from pcam_automl.models.factory import backbone_fault
from pcam_automl.recipe import PATCH_PX, Recipe, build_recipe, scratch_warning
from pcam_automl.recipe_files import merge_fields
from pcam_automl.search.asking import (
    DEFAULT_RECIPE,
    around_recipe,
    check_masks,
    check_networks,
    check_options,
    default_space,
    recipe_fields,
    with_weights,
    without_shrinking,
    without_stage_fields,
)
from pcam_automl.search.budget import (
    KEPT_BACK_SHARE,
    N_RUNGS,
    N_SHORT,
    BudgetPlan,
    n_test_views,
    plan_budget,
    too_late,
    too_many_to_predict,
)
from pcam_automl.search.cost import TrialSeconds, mean_trial_s, share_of_views
from pcam_automl.search.domains import DOMAINS, check_domains, choose_domains, split_of
from pcam_automl.search.mirror import open_mirror
from pcam_automl.search.plan import (
    SLOWEST_SHARE,
    Plan,
    first_backbone,
    first_that_runs,
    make_plan,
    prediction_seconds,
    trial_seconds,
)
from pcam_automl.search.priors import NONE
from pcam_automl.search.probe_decisions import LEAST_LEFT
from pcam_automl.search.probe_study import LIMIT_S, check_mode, probe_study
from pcam_automl.search.pruner import build_pruner
from pcam_automl.search.reading import SETTINGS_KEY
from pcam_automl.search.slots import Slots
from pcam_automl.search.space import SearchSpace, load_space
from pcam_automl.search.start import (
    LEAST_VIEWS_SHARE,
    MOST_ENTRIES,
    n_prescribed,
    on_another,
    start_list,
    with_steps_enough,
)
from pcam_automl.search.start_sources import asked_entries, probed_entries, shipped_recipes
from pcam_automl.search.storage import engine_of, open_storage, quiet_experimental
from pcam_automl.search.storage_url import normalised_url, safe_url, sqlite_path
from pcam_automl.search.study import (
    VALIDATION_FOLD,
    Asked,
    OpenStudy,
    Say,
    open_study,
    own_files,
    start_recipe,
)
from pcam_automl.search.whose_folder import check_free, give_id
from pcam_automl.training.compute import use_device
from pcam_automl.training.speed import SpeedBook
from pcam_automl.training.start import Rows, absent_ids, check_task, choose_rows, unseen_border, without_excluded
from pcam_automl.versions import versions

SERVED_START_S = 5.0
"""What opening a study takes of its budget where another process serves it."""


def create_or_open_study(
    name: str, url: str | None, asked: Asked, *, say: Say, pack_call: PackCall | None = None, spends: bool = False
) -> OpenStudy:
    """Open the study, or create it from what is asked and the defaults.

    Args:
        name: the study's.
        url: of the storage; None is the default one.
        asked: what a user gave.
        say: told of what is decided.
        pack_call: a bar for the packing.
        spends: whether the budget's seconds are this process's, so that a budget that they have used up makes no study; a study that is
            queued begins its budget when it is served.

    Raises:
        StudyError, DataError, RecipeError, InputError: anything at fault, before a trial starts.
    """
    url = storage_url(url)
    check_study_name(name)
    check_options(asked)  # whatever is wrong is said before the hub is asked or the data packed
    mirror = None if asked.artifacts is None else open_mirror(asked.artifacts, name, studies_folder(url) / name)
    database = sqlite_path(normalised_url(url))
    if database is not None and not database.exists():  # a new study for certain: no fault shall leave a database
        _load_asked_space(asked)
        find_data(asked.data)
    folder = studies_folder(url) / name
    if database is not None and not database.exists():
        check_free(folder, url)
    storage = open_storage(url)
    if name in optuna.get_all_study_names(storage):
        return open_study(name, url, asked, say=say, pack_call=pack_call)
    check_free(folder, url)
    if mirror is not None:
        mirror.check_empty()
    settings, split, domains = _decide(name, url, asked, folder, say, pack_call, spends)
    with signals_held():  # a study without its settings could never be opened
        is_new = _new_study(name, storage, settings, split, domains, folder, url)
    # Where another process was quicker, its settings hold.
    return open_study(name, url, None if is_new else asked, say=say, pack_call=pack_call)


def _new_study(
    name: str,
    storage: optuna.storages.BaseStorage,
    settings: StudySettings,
    split: Split,
    domains: Domains | None,
    folder: Path,
    url: str,
) -> bool:
    """Write the study with everything that it remembers; False where one of that name is there by now."""
    try:
        study = optuna.create_study(study_name=name, storage=storage, direction=settings.goal.direction)
    except optuna.exceptions.DuplicatedStudyError:
        return False
    study.set_user_attr(f"{SETTINGS_KEY}:creating", True)
    give_id(study, folder, url)
    Slots(engine_of(study), name).clear()  # a deleted study of this name may have left its slots
    with quiet_experimental():
        study.set_metric_names([settings.goal.metric])
    write_split(split, folder / "split.npz")
    if domains is not None:
        write_domains(domains, folder / DOMAINS)
    write_json(folder / "settings.json", settings.model_dump(mode="json"))
    study.set_user_attr(SETTINGS_KEY, settings.model_dump_json())
    return True


@dataclass(frozen=True)
class _Data:
    """What a study is about: the pack, with the domains that were estimated for it if any were, and its split."""

    store: PatchStore
    split: Split
    split_by: SplitBy
    goal: Goal
    domains: Domains | None
    seed: int


def _decide(
    name: str, url: str, asked: Asked, folder: Path, say: Say, pack_call: PackCall | None, spends: bool
) -> tuple[StudySettings, Split, Domains | None]:
    """Everything a new study remembers."""
    device = use_device(asked.device, n_workers=asked.n_workers, deterministic=asked.deterministic)
    space = _load_asked_space(asked)
    path = find_data(asked.data)
    space, weights = with_weights(around_recipe(space, asked), asked, say)  # after what needs no network
    start = start_recipe(asked.recipe or DEFAULT_RECIPE, bool(space.base["pretrained"]))
    patience = space.base.get("patience", start.patience)
    if asked.rungs is not None and patience is not None:
        raise RecipeError(
            f"--rungs {asked.rungs} goes with trials whose length is planned; the recipe's patience of {patience} ends them, and each epoch is a rung"
        )
    data = _data_of(path, asked, folder, say, pack_call)
    space, start = _within_patches(space, start, data.store, say)
    space = without_shrinking(space, start) if asked.space is None else space
    common = build_recipe(merge_fields(start.model_dump(), recipe_fields(space)), where="recipe")
    space = without_stage_fields(space, common, asked, say)
    _check_common(common, data, say)
    rows = choose_rows(data.store, common, *_search_rows(data.split))
    used_s = process_age_s() if spends else SERVED_START_S
    plan, budget = _planned(space, start, common, data, rows, asked, folder, device, say, used_s)
    if (
        spends
        and budget is not None
        and (why := too_late(budget.total_s, process_age_s(), budget.predict_s)) is not None
    ):
        raise StudyError(why)  # before there is a study that others would take up
    check_networks(space, start)
    if plan.dropped:
        space = space.without_choices("backbone", list(plan.dropped))
    # The recipe's own network may lack weights: trial 0, its neighbours and the probe take the same one in its place.
    first_network = first_backbone(start, plan.left)
    on = "" if "backbone" in space.base else on_another(start.backbone, first_network)
    start = start.model_copy(update={"backbone": first_network})
    if asked.recipe is None:
        start = with_steps_enough(start, space, plan)
    common = build_recipe(merge_fields(start.model_dump(), recipe_fields(space)), where="recipe")
    least_share = LEAST_VIEWS_SHARE if budget is None else SLOWEST_SHARE
    asked_for = asked_entries(asked, url, space, data.store, data.split, say)
    n_ahead = len(start_list(space, start, asked_for, {}, plan, name="", least_share=least_share).entries)
    probe = None
    if check_mode(asked.probe or "auto", weights, deterministic=asked.deterministic) and (
        asked.probe == "on" or _may_be_followed(space, budget, n_ahead)
    ):
        limit_s = LIMIT_S if budget is None else min(LIMIT_S, 2.0 * budget.trial_s)
        space, probe = probe_study(
            space,
            common,
            plan,
            store=data.store,
            rows=rows,
            weights=weights,
            device=device,
            say=say,
            seconds=limit_s,
            keep=[str(one.params["backbone"]) for one in asked_for if "backbone" in one.params],
        )
    if data.goal.name == "worst_domain_auc":
        scored = _search_rows(data.split)[1][: plan.n_score]
        for line in check_domains(data.store, without_excluded(data.store, common, scored), common):
            say(line)
    first = start_list(
        space,
        start,
        asked_for,
        shipped_recipes(),
        plan,
        name=asked.recipe or DEFAULT_RECIPE,
        on=on,
        probed=probed_entries(probe),
        least_share=least_share,
    )
    if budget is not None and budget.short:
        budget = budget.with_trial(budget.whole_s, n_short=min(N_SHORT, len(first.entries)))
    build_pruner(asked.pruner or "asha", rungs=[rung.views for rung in plan.rungs])
    record = {
        **plan.to_json(),
        "device": str(device),
        "space_name": asked.space or default_space(asked),
        "recipe_name": asked.recipe or DEFAULT_RECIPE,
        "files": own_files(asked),
        "n_train": len(rows.train),
        "n_valid": len(rows.score),
        "budget": None if budget is None else asdict(budget),
        "n_rungs_asked": asked.rungs,
        "probe_mode": asked.probe or "auto",
        "probe": probe,
    }
    settings = StudySettings(
        **_asked_settings(asked),
        data=str(path),
        pack=str(data.store.root.resolve()),
        pack_hash=data.store.content_hash,
        split_hash=data.split.hash,
        seed=data.seed,
        weights=str(weights),
        start=start.model_dump(mode="json"),
        space=space.to_yaml(),
        rungs=tuple((rung.views, rung.subset) for rung in plan.rungs),
        n_score=plan.n_score,
        cap_s=plan.cap_s,
        plan=record,
        versions=versions(),
        objective=data.goal.name,
        split_by=data.split_by,
        domains_hash=None if data.domains is None else data.domains.hash,
        enqueued=first.entries,
    )
    return settings, data.split, data.domains


def _within_patches(space: SearchSpace, start: Recipe, store: PatchStore, say: Say) -> tuple[SearchSpace, Recipe]:
    """The space and its start without crops that are larger than the patches; what somebody fixed is left to be refused."""
    side = min(store.patches.shape[1:3])
    if side >= PATCH_PX or start.task != "patch" or "crop_size" not in space.parameters:
        return space, start
    fitted = space.capped("crop_size", side)
    crop = fitted.parameters["crop_size"].nearest(min(start.crop_size, side))
    say(f"the patches are {side} px: crops up to {max(fitted.parameters['crop_size'].spread(2))} px are searched")
    return fitted, start.model_copy(update={"crop_size": crop})


def _may_be_followed(space: SearchSpace, budget: BudgetPlan | None, n_ahead: int) -> bool:
    """Whether a probe's ranking could begin a trial behind ``n_ahead`` prescribed ones, or leave a backbone out."""
    if budget is None:
        return True
    if budget.short:  # its seconds are its trials'
        return False
    return n_prescribed(MOST_ENTRIES, budget.n_started) > n_ahead or len(space.choices("backbone")) > LEAST_LEFT


def _asked_settings(asked: Asked) -> dict[str, Any]:
    """The settings that are options as they were given, or their defaults."""
    return {
        "pins": dict(asked.pins or {}),
        "holdout": asked.holdout or 0.0,
        "deterministic": asked.deterministic,
        "groups": _full(asked.groups),
        "domains": _full(asked.domains),
        "sampler": asked.sampler or "tpe",
        "pruner": asked.pruner or "asha",
        "warm_start": None if asked.warm_start is None else safe_url(asked.warm_start),
        "prior": None if asked.prior in (None, NONE) else asked.prior,
        "command": asked.command,
        "cost_aware": asked.cost_aware,
        "artifacts": asked.artifacts,
        "grace_s": GRACE_S if asked.grace_s is None else asked.grace_s,
    }


def _data_of(path: Path, asked: Asked, folder: Path, say: Say, pack_call: PackCall | None) -> _Data:
    """Pack and split the data."""
    store = find_pack(
        path, folder.parent / "packs", groups=asked.groups, domains=asked.domains, say=say, call=pack_call
    )
    seed = asked.seed if asked.seed is not None else 0
    goal, split_by = goal_of(asked.objective or AUC.name), split_of(asked.split_by)
    domains = choose_domains(store, goal, split_by, estimate=asked.estimate_domains, seed=seed, say=say)
    store = store if domains is None else with_domains(store, domains)
    of_domains = "" if domains is None else domains.hash
    split = make_split(store, seed=seed, holdout=asked.holdout or 0.0, by=split_by, domains=of_domains)
    for note in split.notes:
        say(note)
    return _Data(store, split, split_by, goal, domains, seed)


def _search_rows(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Rows that a search trains and scores on."""
    return split.train_order(VALIDATION_FOLD), split.score_rows(VALIDATION_FOLD)


def _check_common(common: Recipe, data: _Data, say: Say) -> None:
    """Whether what all trials share can be trained on the data."""
    check_task(common, data.store)
    if absent := absent_ids(data.store, common):
        say(absent)
    for warning in (scratch_warning(common), unseen_border(common, data.store)):
        if warning:
            say(warning)
    check_masks(common, data.store, data.split)


def _planned(
    space: SearchSpace,
    start: Recipe,
    common: Recipe,
    data: _Data,
    rows: Rows,
    asked: Asked,
    folder: Path,
    device: torch.device,
    say: Say,
    used_s: float,
) -> tuple[Plan, BudgetPlan | None]:
    """The rungs, by the speed of the device, and the parts of the budget if there is one, of which ``used_s`` are over by now."""
    speed = SpeedBook(folder.parent / "speed.json", deterministic=asked.deterministic, quick=True)
    budget = None
    if asked.budget_s is not None:
        first = first_that_runs(common, space)
        rate, n_final = speed.images_per_s(first, device), len(data.split.order)
        n_judged = len(data.store.test_rows()) + (len(data.split.holdout_rows()) or round(KEPT_BACK_SHARE * n_final))
        a_view_s = prediction_seconds(n_judged, rate)
        # On a CPU each worker's speed is that of its share of the cores; what several do on one GPU is not known.
        here = asked.n_workers if device.type == "cpu" else min(asked.n_workers, torch.cuda.device_count())
        n_workers = (
            max(here, asked.n_planned or 1) if asked.n_workers == 1 else here
        )  # those of a cluster have devices of their own
        least_s = a_view_s / (asked.n_workers if device.type == "cpu" else 1)  # finalize has the cores of all workers
        if common.task == "patch" and (why := too_many_to_predict(asked.budget_s, least_s, n_judged)) is not None:
            raise StudyError(why)
        budget = plan_budget(
            asked.budget_s,
            used_s=used_s,
            images_per_s=rate,
            n_final=n_final,
            may_be_short=not _wants_search(asked),
            predict_s=a_view_s
            * (8 if common.task == "dense" else n_test_views(asked.budget_s, a_view_s, common.n_test_views)),
            n_workers=n_workers,
            n_trials=asked.n_trials,
            n_rungs=asked.rungs or N_RUNGS,
        )
    plan = make_plan(
        space,
        start,
        n_train=len(rows.train),
        n_valid=len(rows.score),
        device=device,
        views=asked.views,
        trial_s=None if budget is None else budget.trial_s,
        cap_s=None if budget is None else budget.cap_s,
        n_rungs=(asked.rungs or N_RUNGS) if budget is None else budget.n_rungs,
        speed=speed,
        progress=say,
    )
    if budget is None:
        return plan, None
    cap_s, fields = plan.cap_s or math.inf, merge_fields(start.model_dump(), space.base)
    images, rates = (
        trial_seconds(start, plan.rungs, plan.n_score, 1.0),
        {name: plan.images_per_s[name] for name in plan.left},
    )
    seconds = TrialSeconds(rates, plan.planned_px, images, fields, side_power=plan.side_power)
    share = share_of_views(seconds, cap_s, SLOWEST_SHARE, space)
    whole_s = min(images / rates[first_backbone(start, plan.left)], cap_s)
    return plan, budget.with_trial(whole_s, mean_s=mean_trial_s(share, space))


def _wants_search(asked: Asked) -> bool:
    """Whether somebody named what is searched, or how."""
    return (
        asked.cost_aware
        or asked.probe == "on"
        or any(word is not None for word in (asked.space, asked.sampler, asked.pruner, asked.rungs))
    )


def _full(path: Path | None) -> str | None:
    return None if path is None else str(path.expanduser().resolve())


def _load_asked_space(asked: Asked) -> SearchSpace:
    """The space that is asked for, with ``--set`` applied and every backbone's name looked up in timm."""
    return load_space(asked.space or default_space(asked), pins=asked.pins, backbone_fault=backbone_fault)
