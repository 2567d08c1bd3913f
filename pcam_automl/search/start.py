"""What the first trials of a study are told to try: the default, what was asked for, the notebooks' recipes. Pure.

Which slot takes which entry is decided when the study is created and kept in its settings, so that every worker prescribes
the same. The sampler keeps at least three quarters of eight trials and more.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

from optuna.trial import FixedTrial

from pcam_automl.config import Enqueued
from pcam_automl.models.factory import smallest_input
from pcam_automl.recipe import PATCH_PX, Recipe
from pcam_automl.search.dimension import is_number
from pcam_automl.search.plan import Plan, stand_in, trial_seconds
from pcam_automl.search.slots import Slot
from pcam_automl.search.space import SearchSpace, in_one_stage

MOST_SHARE = 0.25
"""Of the study's trials that may be prescribed, trial 0 included."""
FIRST = 2
"""Trials that are prescribed in any case: the recipe that the search starts from, and what is most likely to be better."""
MOST_ENTRIES = 12
"""That a study remembers; a quarter of 50 trials."""
LEAST_VIEWS_SHARE = 0.5
"""A recipe fits the budget if its network sees at least this share of the planned views within a trial's seconds."""
MOST_SHRUNK = 1.125
"""Of the side that the start shows, that of the shrunk crop at most: a space may have no scale that gives just that side."""
LEAST_BATCH = 32
LEAST_STEPS = 200
"""Of a whole trial of the default recipe. Half the batch, so twice the steps, took a quarter to two thirds off the error of trainings from
scratch of 13,000 to 26,000 views and of fine-tunings of 1,300 to 4,000 at 96 px, for a tenth less views a second
(docs/experiments.md)."""


@dataclass(frozen=True)
class Start:
    """The prescribed entries in the order of their slots, and why others are not among them, a line each."""

    entries: tuple[Enqueued, ...]
    left_out: tuple[str, ...]


def start_list(
    space: SearchSpace,
    start: Recipe,
    asked_for: Iterable[Enqueued],
    recipes: Mapping[str, Recipe],
    plan: Plan,
    *,
    name: str,
    on: str = "",
    probed: Iterable[Enqueued] = (),
    least_share: float = LEAST_VIEWS_SHARE,
) -> Start:
    """Slot 0 is the recipe that the search starts from; then what was asked for, the same recipe at the largest crop, recipes that fit.

    What a user asked for (a warm start, a prior) goes before what nobody named: of 12 trials only 3 are prescribed. How much
    of the patch decides its label differs by data set more than anything else, and no sampler finds that out in a dozen
    trials whose other values differ, too. Equal parameter sets are listed once.

    Args:
        space: the study's, without the backbones that were dropped.
        start: the recipe of slot 0.
        asked_for: entries of a warm start and a prior, the best first.
        recipes: shipped recipes by name.
        plan: the speeds of the space's backbones.
        name: of ``start``.
        on: a word on the network that stands in for its own, from :func:`on_another`.
        probed: what a probe of frozen features would begin with.
        least_share: of the views that ``start`` must see at the largest crop.
    """
    left_out: list[str] = []
    on = f" ({on})" if on else ""
    listed = [Enqueued(origin=f"recipe {name}{on}", params=space.params_of(start, smallest_input)), *asked_for]
    for whole, px in at_largest_crop(start, space, plan, least_share):
        shrunk = f" shown at {px}" if px < whole.crop_size else ""
        origin = f"recipe {name} at {whole.crop_size} px{shrunk}{on}"
        listed.append(Enqueued(origin=origin, params=space.params_of(whole, smallest_input)))
    listed += probed
    for own, recipe in recipes.items():
        if own == name:
            continue
        fitted, said = fitting(recipe, space, plan)
        if fitted is None:
            left_out.append(f"recipe {own}: {said}")
        else:
            origin = f"recipe {own}" + (f" ({said})" if said else "")
            listed.append(Enqueued(origin=origin, params=space.params_of(fitted, smallest_input)))
    entries: list[Enqueued] = []
    for entry in listed:
        if all(entry.params != other.params for other in entries):
            entries.append(entry)
    return Start(tuple(entries[:MOST_ENTRIES]), tuple(left_out))


def with_steps_enough(recipe: Recipe, space: SearchSpace, plan: Plan) -> Recipe:
    """The recipe with the largest batch of the space, up to its own, whose whole trial takes ``LEAST_STEPS``; else with the smallest
    from ``LEAST_BATCH`` on. Of a dense task as it is.
    """
    batch = space.parameters.get("batch_size")
    choices = batch.choices if batch is not None and recipe.task == "patch" else ()
    sizes = [size for size in choices if is_number(size) and LEAST_BATCH <= size <= recipe.batch_size]
    enough = [size for size in sizes if plan.rungs[-1].views >= LEAST_STEPS * size]
    return recipe.model_copy(update={"batch_size": max(enough, default=min(sizes))}) if sizes else recipe


def at_largest_crop(recipe: Recipe, space: SearchSpace, plan: Plan, least_share: float) -> list[tuple[Recipe, int]]:
    """The recipe with the largest crop of the space, and the side in px that its network is shown: from scratch first shrunk to what
    the recipe itself shows, for which it costs nothing more, then at the same scale.

    What a training of minutes from scratch lacks is views, not detail: 96 px of colon96 shown at 64 had a quarter to six tenths of the
    error of 96 px as they are in equal seconds (docs/experiments.md). Pretrained networks know larger objects, and are not shown smaller ones.

    None where the largest is its own, is not searched, or is too slow, or where the sampler would fill in values that the recipe
    lacks: two such trials would not compare crops.
    """
    crop = space.parameters.get("crop_size")
    largest = None if crop is None or recipe.task != "patch" else crop.nearest(PATCH_PX)
    if not isinstance(largest, int) or largest <= recipe.crop_size or not space.is_whole(recipe):
        return []
    own = _as_trial(space, recipe, recipe)
    size = None if recipe.input_size is None else round(recipe.input_size * largest / recipe.crop_size)
    whole = recipe.model_copy(update={"crop_size": largest, "input_size": size})
    shrunk = whole.model_copy(update={"input_size": own.network_px})
    may_shrink = not recipe.pretrained and recipe.input_size is None
    taken: list[tuple[Recipe, int]] = []
    seen: list[Recipe] = []
    for one in (shrunk, whole) if may_shrink else (whole,):
        if not space.is_whole(one):
            continue
        shown = _as_trial(space, recipe, one)
        cost = (shown.network_px / plan.planned_px) ** plan.side_power
        too_large = one is shrunk and shown.network_px > MOST_SHRUNK * own.network_px
        too_slow = views_share(recipe, recipe.backbone, plan, cost=cost) < least_share
        if not too_large and not too_slow and shown not in seen:
            taken.append((one, shown.network_px))
            seen.append(shown)
    return taken


def _as_trial(space: SearchSpace, start: Recipe, recipe: Recipe) -> Recipe:
    """What a trial of the space with a recipe's values trains, the start being ``start``."""
    fixed = FixedTrial(space.params_of(recipe, smallest_input))
    return space.suggest(fixed, {**start.model_dump(), "epochs": None}, smallest_input)


def fitting(recipe: Recipe, space: SearchSpace, plan: Plan) -> tuple[Recipe | None, str]:
    """The recipe as a trial of the space can be it, with a word on what stands in; or None and the reason.

    Of a recipe with stages :func:`~pcam_automl.search.space.in_one_stage` is taken.
    """
    tasks = space.choices("task") or ("patch",)
    if recipe.task not in tasks:
        return None, f"its task is {recipe.task}, the search's {tasks[0]}"
    if recipe.pretrained and True not in space.choices("pretrained"):
        return None, "it starts from pretrained weights, the search from scratch"
    if (found := stand_in(recipe.backbone, space.choices("backbone"))) is None:
        return None, f"{recipe.backbone} is not in the space"
    share = views_share(recipe, found, plan)
    if share < LEAST_VIEWS_SHARE:
        return None, f"{found} would see {share:.0%} of a trial's views here, less than {LEAST_VIEWS_SHARE:.0%}"
    return in_one_stage(recipe).model_copy(update={"backbone": found}), on_another(recipe.backbone, found)


def on_another(backbone: str, found: str) -> str:
    """A word on the network that stands in for a recipe's; empty where it is that one, if with other weights."""
    return "" if found in (backbone, backbone.partition(".")[0]) else f"on {found}"


def views_share(recipe: Recipe, backbone: str, plan: Plan, *, cost: float = 1.0) -> float:
    """Share of the planned views that a trial of the backbone sees within the plan's seconds, in [0, 1]; 0 if dropped.

    Args:
        recipe: of the trial.
        backbone: its network.
        plan: the speeds, at ``planned_px``.
        cost: of an image of the trial's input, in those of the planned one.
    """
    if backbone in plan.dropped or backbone not in plan.images_per_s:
        return 0.0
    if plan.cap_s is None:
        return 1.0
    rate = plan.images_per_s[backbone] / cost
    return min(1.0, plan.cap_s / trial_seconds(recipe, plan.rungs, plan.n_score, rate))


def n_prescribed(n_entries: int, n_trials: int) -> int:
    """How many of the first slots of a study of ``n_trials`` take an entry: at most a quarter, and the first two."""
    return min(n_entries, max(FIRST, int(MOST_SHARE * n_trials)))


def enqueued_for(
    entries: Sequence[Enqueued], slot: Slot, n_trials: int, failed: Container[int | None] = ()
) -> Enqueued | None:
    """The slot's entry; None if it has none, goes on with a lineage, or is among the numbers of the slots that ``failed``: a recipe that
    cannot be trained is not tried again; one whose search was stopped before its first rung is, by the next search.
    """
    fresh = slot.lineage is None and slot.number not in failed
    return entries[slot.number] if fresh and slot.number < n_prescribed(len(entries), n_trials) else None
