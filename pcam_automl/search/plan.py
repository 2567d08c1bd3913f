"""How much a trial trains: rung sizes from the measured speed of the device. Runs no trial."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pcam_automl.errors import RecipeError
from pcam_automl.models.cost import training_cost
from pcam_automl.models.factory import check_runs, smallest_input
from pcam_automl.recipe import Recipe, build_recipe
from pcam_automl.recipe_files import merge_fields
from pcam_automl.search.budget import ETA, N_RUNGS
from pcam_automl.search.dimension import UPSCALE, scaled_side
from pcam_automl.search.space import SearchSpace
from pcam_automl.training.engine import Rung
from pcam_automl.training.fit import stable_views
from pcam_automl.training.speed import SpeedBook

TYPICAL_TRIAL_S = 30.0
"""A full trial of the median backbone; a whole trial of any backbone is held under CAP_S by training on fewer views. A
budget sets both by itself (budget.py)."""
CAP_S = 60.0
SLOWEST_SHARE, SLOWEST_SHARE_OF_BUDGET = 0.2, 0.5
"""A backbone that could see less than this share of the planned views within CAP_S is left out of the search; of one with a
budget, whose trials may be seconds long, less than half, but for the one that the search starts with."""
ESTIMATE_ERROR = 2.0
"""A backbone whose speed is only estimated is left out only if it would be too slow at so many times that speed, too."""
OVERHEAD = 1.2
"""A real step also gathers, augments, averages and records: about a fifth more than the measured bare step."""
EVAL_SPEEDUP = 2.5
"""Scoring is about this much faster than training, per image (forward only: a third of the arithmetic)."""
MOST_EPOCHS = 20
LEAST_VIEWS = 1_800
SCORE_LIMIT = {"cpu": 4_000, "cuda": 20_000}
STAND_INS = {"densenet169": "densenet121", "resnetv2_101": "resnet50"}
"""A notebook's network to the largest of its family in the default space, which takes the notebook's values."""
SCORE_SHARE = 0.06
"""Share of a typical trial that the scoring of one rung may take."""


PIXELS = 2.0
"""The power of a side by which an input's pixels grow."""
LARGEST_PX = 192
"""A whole patch at twice its side, the largest input that a search without a space of its own tries."""


@dataclass(frozen=True)
class Plan:
    """What every trial of the study does.

    Attributes:
        rungs: views and subset of each rung; the last is a whole training.
        n_score: validation patches that a rung is scored on.
        cap_s: seconds that a trial may take by the measured speed of its network; None is no limit.
        images_per_s: backbone to training images a second at ``planned_px``.
        estimated: those of them whose speed was not measured but follows from a measured one and the networks' shapes.
        dropped: backbones left out, with the reason.
        planned_px: network side that the speeds were measured at.
        side_power: by which power of the input's side a step's seconds grow.
    """

    rungs: tuple[Rung, ...]
    n_score: int
    cap_s: float | None
    images_per_s: dict[str, float]
    dropped: dict[str, str]
    planned_px: int
    estimated: tuple[str, ...] = ()
    side_power: float = PIXELS

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def left(self) -> tuple[str, ...]:
        """The backbones that were not left out, in the space's order."""
        return tuple(name for name in self.images_per_s if name not in self.dropped)


def trial_seconds(recipe: Recipe, rungs: tuple[Rung, ...], n_score: int, images_per_s: float) -> float:
    """Expected seconds of a whole trial: every rung's stable part and decay branch, and its scoring."""
    views = rungs[-1].views + sum(rung.views - stable_views(recipe, rung) for rung in rungs[:-1])
    return OVERHEAD * (views + len(rungs) * n_score / EVAL_SPEEDUP) / images_per_s


def prediction_seconds(n_views: int, images_per_s: float) -> float:
    """Expected seconds of showing a network so many views that it only judges, by its training speed."""
    return OVERHEAD * n_views / EVAL_SPEEDUP / images_per_s


def planned_reach(planned: Mapping[str, Any], n_rungs: int) -> list[int]:
    """Trials that are expected to reach each rung.

    Args:
        planned: the study's :class:`~pcam_automl.search.budget.BudgetPlan` as its settings keep it.
        n_rungs: of each trial.
    """
    eta = 1 if planned.get("short") else ETA  # those few run through
    return [max(1, round(planned["n_started"] / eta**rung)) for rung in range(n_rungs)]


def build_rungs(views: int, n_train: int, n_rungs: int = N_RUNGS) -> tuple[Rung, ...]:
    """By default three rungs at 1/9, 1/3 and all of the views; each draws from as many patches as it has views, at most all."""
    sizes = [max(1, views // ETA**power) for power in range(n_rungs - 1, -1, -1)]
    return tuple(Rung(size, min(n_train, size)) for size in sizes)


def epoch_rungs(views: int, n_train: int) -> tuple[Rung, ...]:
    """A rung an epoch, for trainings that end early by their recipe's ``patience``."""
    return tuple(
        Rung(min(views, n_train * (epoch + 1)), n_train) for epoch in range(max(1, math.ceil(views / n_train)))
    )


def scaled(rungs: tuple[Rung, ...], share: float) -> tuple[Rung, ...]:
    """The same rungs with fewer views each, for a network that is too slow for all of them."""
    return tuple(
        Rung(max(1, round(rung.views * share)), min(rung.subset, max(1, round(rung.views * share)))) for rung in rungs
    )


def make_plan(
    space: SearchSpace,
    default: Recipe,
    *,
    n_train: int,
    n_valid: int,
    device: torch.device,
    speed: SpeedBook,
    views: int | None = None,
    trial_s: float | None = None,
    cap_s: float | None = None,
    n_rungs: int = N_RUNGS,
    progress: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Set the rungs by the speeds of the space's backbones.

    Timed is only the backbone that the search starts with; the others are as much slower as their shapes say, unless this
    machine has timed them before. A trial measures its own network before it trains, and its views follow from that.

    Args:
        space: its backbones are planned for.
        default: what the fields outside the space are.
        n_train: labelled patches outside the validation fold.
        n_valid: labelled patches in the validation fold.
        device: where the trials will run.
        speed: remembered measurements.
        views: training images of a whole trial; None decides from the speed. Naming them, or epochs or views in the
            space's base, lifts the limit on a trial's seconds.
        trial_s: seconds of a whole trial of the median backbone; by default ``TYPICAL_TRIAL_S``.
        cap_s: that no trial exceeds; by default ``CAP_S``.
        n_rungs: of each trial; one where none is pruned, so that nothing is spent on scores that decide nothing.
        progress: told of the backbone that had to be timed; nothing if its speed was known.
    """
    if searched := sorted({"views", "epochs"} & set(space.parameters)):
        raise RecipeError(
            f"{' and '.join(searched)} cannot be searched: the rungs decide how long a trial trains; fix it in the "
            "space's base, or give --views N or --set epochs=N"
        )
    fields = merge_fields(default.model_dump(), {name: v for name, v in space.base.items() if name != UPSCALE})
    asked = views if views is not None else _asked_views(fields, space, n_train)
    planned_px = planned_side(fields, space)
    recipes, dropped = _recipes_that_run(fields, space, planned_px)
    first = first_backbone(default, tuple(recipes))
    rates, estimated = _speeds(recipes, first, device, speed, progress)
    typical, typical_s = statistics.median(rates.values()), trial_s or TYPICAL_TRIAL_S
    whole = asked or max(LEAST_VIEWS, min(int(typical_s * typical), MOST_EPOCHS * n_train))
    limit = SCORE_LIMIT[device.type]
    affordable = limit if speed.deterministic else int(SCORE_SHARE * typical_s * typical * EVAL_SPEEDUP)
    n_score = min(n_valid, limit, max(500, affordable))
    rungs = epoch_rungs(whole, n_train) if fields["patience"] is not None else build_rungs(whole, n_train, n_rungs)
    if whole < ETA ** (len(rungs) - 1) and fields["patience"] is None:
        raise RecipeError(f"{whole} views of a whole trial are too few for {n_rungs} rungs; give --views 64 or more")
    cap_s = (cap_s or CAP_S) if asked is None else None
    least = SLOWEST_SHARE if trial_s is None else SLOWEST_SHARE_OF_BUDGET
    if cap_s is not None:
        for name, rate in rates.items():
            seconds = trial_seconds(default, rungs, n_score, rate)
            doubt = ESTIMATE_ERROR if name in estimated and trial_s is None else 1.0
            # The known-good start on fewer views is worth more than whatever is quick.
            share = SLOWEST_SHARE if name == first else least
            if seconds * share > cap_s * doubt:
                about = "about " if name in estimated else ""
                dropped[name] = (
                    f"a trial would take {about}{seconds:.0f} s at {planned_px} px here, the limit is {cap_s:.0f} s"
                )
        if set(dropped) >= set(rates):
            if trial_s is None:
                raise RecipeError(
                    f"every backbone of the space is too slow here ({'; '.join(dropped.values())}); give --views to lift the limit"
                )
            del dropped[max(rates, key=rates.__getitem__)]  # a budget is spent as well as it can be
    power = side_power(recipes[first], device, speed)
    return Plan(rungs, n_score, cap_s, rates, dropped, planned_px, estimated, power)


def side_power(recipe: Recipe, device: torch.device, speed: SpeedBook) -> float:
    """By which power of its input's side a training step's seconds grow: with the pixels on a CPU. On a GPU it is measured up to the
    largest input that a search tries, where a step of small images is mostly launches: between 0 and that.

    Args:
        recipe: of a network.
        device: where it trains.
        speed: measures it.
    """
    if device.type == "cpu" or recipe.task == "dense" or 1.25 * recipe.network_px > LARGEST_PX:
        return PIXELS  # between sides so close noise would decide
    larger = recipe.model_copy(update={"input_size": LARGEST_PX})
    slower = speed.images_per_s(recipe, device) / speed.images_per_s(larger, device)
    return round(min(PIXELS, max(0.0, math.log(slower) / math.log(larger.network_px / recipe.network_px))), 2)


def _recipes_that_run(
    fields: dict[str, Any], space: SearchSpace, planned_px: int
) -> tuple[dict[str, Recipe], dict[str, str]]:
    """Backbone to the recipe that its speed is of, and to why it cannot run.

    Raises:
        RecipeError: none can.
    """
    recipes: dict[str, Recipe] = {}
    dropped: dict[str, str] = {}
    for name in space.choices("backbone") or [fields["backbone"]]:
        recipe = planned_recipe(fields, name, planned_px)
        try:
            check_runs(recipe)
        except RecipeError as fault:
            dropped[name] = str(fault)
        else:
            recipes[name] = recipe
    if not recipes:
        raise RecipeError(f"no backbone of the space can be built: {'; '.join(dropped.values())}")
    return recipes, dropped


def stand_in(backbone: str, names: Sequence[str]) -> str | None:
    """That one, the same with other weights, or the largest of its family among the names; None where there is none."""
    family = backbone.partition(".")[0]
    return next((one for one in (backbone, family, STAND_INS.get(family)) if one in names), None)


def first_backbone(default: Recipe, names: Sequence[str]) -> str:
    """The backbone that the search starts with: that of the recipe or its stand-in, else (its weights are missing, say) the first of
    the space.
    """
    if not names:
        return default.backbone
    return stand_in(default.backbone, names) or names[0]


def first_that_runs(common: Recipe, space: SearchSpace) -> Recipe:
    """The recipe that times the backbone that the search starts with, or where that cannot run the first one of the space that can.

    Args:
        common: the recipe with what the space fixes.
        space: the study's.

    Raises:
        RecipeError: none can.
    """
    fields = common.model_dump()
    recipes, _ = _recipes_that_run(fields, space, planned_side(fields, space))
    return recipes[first_backbone(common, tuple(recipes))]


def _speeds(
    recipes: dict[str, Recipe], first: str, device: torch.device, speed: SpeedBook, progress: Callable[[str], None]
) -> tuple[dict[str, float], tuple[str, ...]]:
    """Training images a second of each backbone, and which of them are estimates."""
    known = {name for name, recipe in recipes.items() if speed.knows(recipe, device)}
    rate = speed.images_per_s(recipes[first], device)
    if first not in known:
        progress(f"timed {first}: {rate:,.0f} training images/s at {recipes[first].network_px} px")
    estimated = tuple(name for name in recipes if name not in known and name != first)
    cost = {name: training_cost(recipes[name]) for name in (first, *estimated)} if estimated else {}
    rates = {
        name: rate * cost[first] / cost[name] if name in estimated else speed.images_per_s(recipe, device)
        for name, recipe in recipes.items()
    }
    return rates, estimated


def planned_side(fields: dict[str, Any], space: SearchSpace) -> int:
    """Side in px at which networks are timed: what the space fixes, else that of the recipe that the search starts from, at least 64.

    A trial's seconds are planned for that side, so that the start and all that shows fewer pixels train on equally many views.
    """
    if fields["task"] == "dense":
        return int(fields["tile_size"])
    scale = float(space.base.get(UPSCALE, 1.0))
    if fields["input_size"] or (crop := space.parameters.get("crop_size")) is None:
        return int(fields["input_size"] or scaled_side(fields["crop_size"], scale))
    return max(64, scaled_side(int(crop.nearest(fields["crop_size"])), scale))  # as trial 0 shows it


def planned_recipe(fields: dict[str, Any], backbone: str, px: int) -> Recipe:
    """The recipe that times a backbone; its input is raised to what the backbone needs."""
    sized = {} if fields["task"] == "dense" else {"input_size": max(px, smallest_input(backbone))}
    return build_recipe(merge_fields(fields, {"backbone": backbone, **sized}))


def _asked_views(fields: dict[str, Any], space: SearchSpace, n_train: int) -> int | None:
    """Views that the space or ``--set`` fix by ``views`` or ``epochs``; None where neither is named."""
    if not {"views", "epochs"} & set(space.base):
        return None
    return build_recipe(fields).n_views(n_train)
