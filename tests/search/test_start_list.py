"""The start list: what the first slots take, in which order, and why a recipe does not fit."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from pcam_automl.config import Enqueued
from pcam_automl.data.store import PatchStore
from pcam_automl.recipe import Recipe
from pcam_automl.search.create import _within_patches
from pcam_automl.search.plan import Plan, build_rungs, first_backbone, planned_side, trial_seconds
from pcam_automl.search.reading import ERROR
from pcam_automl.search.settling import LOST
from pcam_automl.search.slots import Slot
from pcam_automl.search.space import SearchSpace, load_space
from pcam_automl.search.start import (
    MOST_ENTRIES,
    enqueued_for,
    n_prescribed,
    start_list,
    with_steps_enough,
)
from pcam_automl.search.start_sources import shipped_recipes
from pcam_automl.search.study import start_recipe
from pcam_automl.search.worker import slots_that_failed

RECIPES = shipped_recipes()


def plan_for(space: SearchSpace, rate: float = 1000.0, cap_s: float | None = 60.0, slow: tuple[str, ...] = ()) -> Plan:
    rates = {name: 10.0 if name in slow else rate for name in space.choices("backbone")}
    return Plan(build_rungs(9000, 9000), 500, cap_s, rates, {}, 64)


def space_of(name: str, pretrained: bool) -> SearchSpace:
    return load_space(name).pinned({"pretrained": pretrained})


def origins(space: SearchSpace, plan: Plan, name: str = "default", asked: tuple[Enqueued, ...] = ()) -> list[str]:
    start = start_recipe(name, bool(space.base["pretrained"]))
    return [entry.origin for entry in start_list(space, start, asked, RECIPES, plan, name=name).entries]


@pytest.mark.parametrize(
    ("space", "pretrained", "expected"),
    [
        ("default", False, ["recipe default", "recipe default at 96 px shown at 64", "recipe default at 96 px"]),
        (
            "default",
            True,
            [
                "recipe default",
                "recipe default at 96 px",
                "recipe densenet169_onecycle (on densenet121)",
                "recipe resnet152v2_transfer (on resnet50)",
            ],
        ),
        ("quick", False, ["recipe default"]),
        # What the default has not, the blocks of small networks, the sampler fills in: two such trials compare no crops.
        ("cnn", False, ["recipe default", "recipe keras_cnn_1", "recipe keras_cnn_2"]),
    ],
)
def test_the_notebooks_recipes_that_fit_follow_the_default(space: str, pretrained: bool, expected: list[str]) -> None:
    found = space_of(space, pretrained)
    assert origins(found, plan_for(found)) == expected


def test_the_start_is_tried_at_the_largest_crop_where_that_is_not_its_own_and_not_too_slow() -> None:
    space = space_of("default", False)
    start = start_recipe("default", False)

    def second(recipe: Recipe, rate: float = 1000.0) -> dict[str, object] | None:
        entries = start_list(space, recipe, (), {}, plan_for(space, rate), name="mine").entries
        return entries[1].params if len(entries) > 1 else None

    found = second(start)
    assert found is not None
    assert found == {**space.params_of(start), "crop_size": 96, "upscale": 0.67}
    assert space.suggest(optuna.trial.FixedTrial(found), start.model_dump()).network_px == 64, "as quick as the start"
    upscaled = second(start.model_copy(update={"crop_size": 48, "input_size": 96}))
    assert upscaled is not None
    assert (upscaled["crop_size"], upscaled["upscale"]) == (96, 2.0)
    assert second(start.model_copy(update={"crop_size": 48, "input_size": 96}), rate=1200.0 / 4) is None, (
        "9 times the pixels"
    )
    assert second(start.model_copy(update={"crop_size": 96})) is None
    entries = start_list(space, start, (), {}, plan_for(space, 1000.0), name="mine").entries
    assert entries[2].params == {**found, "upscale": 1.0}
    entries = start_list(space, start, (), {}, plan_for(space, 200.0), name="mine").entries
    assert len(entries) == 2, "2.25 times the pixels: a third of the views"
    fixed = space.pinned({"crop_size": 64})
    assert len(start_list(fixed, start, (), {}, plan_for(fixed), name="mine").entries) == 1


def test_a_crop_is_not_shrunk_for_pretrained_networks_nor_where_the_space_cannot_nor_beyond_what_the_start_shows() -> (
    None
):
    def sides(space: SearchSpace, start: Recipe) -> list[int]:
        entries = start_list(space, start, (), {}, plan_for(space), name="mine").entries
        shown = [space.suggest(optuna.trial.FixedTrial(entry.params), start.model_dump()) for entry in entries]
        return [recipe.network_px for recipe in shown]

    scratch, own = space_of("default", False), start_recipe("default", False)
    assert sides(scratch, own) == [64, 64, 96]
    assert sides(space_of("default", True), start_recipe("default", True)) == [64, 96]
    scale = replace(scratch.parameters["upscale"], choices=(1.0, 1.5))
    whole_only = replace(scratch, parameters={**scratch.parameters, "upscale": scale})
    assert sides(whole_only, own) == [64, 96]
    assert sides(scratch, own.model_copy(update={"crop_size": 48})) == [48, 96], "0.67 of 96 px is a third more than 48"
    assert sides(scratch, own.model_copy(update={"input_size": 96})) == [96, 144], "a side of its own is kept in scale"


def test_what_a_trial_would_really_show_is_named_counted_and_listed_once() -> None:
    start = start_recipe("default", False)

    def listed(space: SearchSpace, plan: Plan | None = None) -> list[str]:
        entries = start_list(space, start, (), {}, plan or plan_for(space), name="mine").entries
        return [entry.origin.removeprefix("recipe mine") for entry in entries]

    def with_scale(**changes: object) -> SearchSpace:
        space = space_of("default", False)
        scale = replace(space.parameters["upscale"], **changes)  # type: ignore[arg-type]
        return replace(space, parameters={**space.parameters, "upscale": scale})

    assert listed(with_scale(choices=(0.75, 1.0))) == ["", " at 96 px shown at 72", " at 96 px"]
    assert listed(with_scale(when=(("backbone", ("resnet18d",)),))) == ["", " at 96 px"], (
        "it does not apply to resnet10t"
    )
    pinned = space_of("default", False).pinned({"upscale": 0.5})
    assert planned_side(start.model_dump(), pinned) == 64
    assert planned_side({**start.model_dump(), "crop_size": 80}, pinned.pinned({"crop_size": 80})) == 40
    slow = plan_for(pinned, 200.0)
    assert listed(pinned, slow) == ["", " at 96 px shown at 48"], "a quarter of the pixels that it would have"


def test_a_recipe_too_slow_for_half_of_the_views_is_left_out_by_name() -> None:
    space = space_of("default", True)
    plan = plan_for(space, slow=("densenet121",))
    found = start_list(space, start_recipe("default", True), (), RECIPES, plan, name="default")
    rest = ["recipe default at 96 px", "recipe resnet152v2_transfer (on resnet50)"]
    assert [entry.origin for entry in found.entries] == ["recipe default", *rest]
    (line,) = [line for line in found.left_out if "densenet169" in line]
    assert line.startswith(
        "recipe densenet169_onecycle: densenet121 would see 5% of a trial's views here, less than 50%"
    )
    without_cap = replace(plan, cap_s=None)
    assert len(origins(space, without_cap)) == 4, "where the views are given, seconds decide nothing"
    dropped = replace(without_cap, dropped={"densenet121": "too slow"})
    assert len(origins(space, dropped)) == 3


def test_reasons_name_weights_task_and_backbone() -> None:
    space = space_of("default", False)
    found = start_list(space, start_recipe("default", False), (), RECIPES, plan_for(space), name="default")
    reasons = dict(line.removeprefix("recipe ").split(": ", 1) for line in found.left_out)
    assert reasons["densenet169_onecycle"] == "it starts from pretrained weights, the search from scratch"
    assert reasons["unet_dense"] == "its task is dense, the search's patch"
    assert reasons["cnn_deep"] == "cnn_deep is not in the space"
    assert set(reasons) == set(RECIPES) - {"default"}


def test_a_recipe_with_stages_gives_the_rates_of_its_last_one() -> None:
    space = space_of("default", True)
    found = start_list(space, start_recipe("default", True), (), RECIPES, plan_for(space), name="default")
    params = found.entries[2].params
    assert (params["backbone"], params["lr"], params["frozen"]) == ("densenet121", 4e-4, 0.3)
    assert (params["weight_decay"], params["crop_size"], params["batch_size"]) == (1e-4, 96, 128)


def test_what_was_asked_for_goes_before_the_recipes_and_equal_sets_stand_once() -> None:
    space = space_of("cnn", False)
    start = start_recipe("default", False)
    asked = (
        Enqueued(origin="warm start other, trial 3", params={**space.params_of(start), "lr": 3e-4}),
        Enqueued(origin="warm start other, trial 4", params=space.params_of(start)),
    )
    assert origins(space, plan_for(space), asked=asked) == [
        "recipe default",
        "warm start other, trial 3",
        "recipe keras_cnn_1",
        "recipe keras_cnn_2",
    ]
    space = space_of("default", False)
    assert origins(space, plan_for(space), asked=asked[:1])[1:] == [
        "warm start other, trial 3",
        "recipe default at 96 px shown at 64",
        "recipe default at 96 px",
    ]
    many = tuple(Enqueued(origin=f"{i}", params={"lr": 1e-4 * (i + 1)}) for i in range(20))
    assert len(origins(space, plan_for(space), asked=many)) == MOST_ENTRIES


def test_every_entry_is_a_trial_of_the_space() -> None:
    """What is prescribed is taken: each value is one that its dimension holds."""
    for name, pretrained in (("default", True), ("cnn", False), ("quick", False)):
        space = space_of(name, pretrained)
        for entry in start_list(
            space, start_recipe("default", pretrained), (), RECIPES, plan_for(space), name="d"
        ).entries:
            assert all(space.parameters[field].contains(value) for field, value in entry.params.items())


@pytest.mark.parametrize(("n_trials", "expected"), [(1, 2), (7, 2), (8, 2), (12, 3), (50, 12), (4000, 12)])
def test_at_most_a_quarter_of_the_trials_is_prescribed_and_two_always(n_trials: int, expected: int) -> None:
    assert n_prescribed(12, n_trials) == expected


def slot(number: int, lineage: str | None = None, attempts: int = 1) -> Slot:
    return Slot(number, "claimed", lineage, None, None, attempts, 0)


def test_a_slot_takes_its_entry_until_it_fails_and_never_in_place_of_its_lineage() -> None:
    entries = tuple(Enqueued(origin=f"{i}", params={}) for i in range(3))
    assert enqueued_for(entries, slot(2), 12) == entries[2]
    assert enqueued_for(entries, slot(3), 12) is None
    assert enqueued_for(entries, slot(2), 8) is None
    assert enqueued_for(entries, slot(1, lineage="1"), 12) is None
    assert enqueued_for(entries, slot(1, attempts=2), 12) == entries[1], "stopped before its first rung"
    assert enqueued_for(entries, slot(1, attempts=2), 12, failed={1}) is None, "a recipe that failed is not tried again"
    assert enqueued_for((), slot(0), 12) is None


@pytest.mark.parametrize(("views", "expected"), [(1_000, 32), (6_400, 32), (12_799, 32), (12_800, 64), (10**6, 64)])
def test_a_short_trial_takes_smaller_batches_and_no_larger_ones_than_the_recipe_s(views: int, expected: int) -> None:
    space = space_of("default", False)
    plan = replace(plan_for(space), rungs=build_rungs(views, 10_000))
    recipe = start_recipe("default", False)
    assert with_steps_enough(recipe, space, plan).batch_size == expected
    pinned = space.pinned({"batch_size": 128})
    assert with_steps_enough(recipe, pinned, plan) == recipe
    few = replace(plan, rungs=build_rungs(100, 10_000))
    assert with_steps_enough(recipe, space, few).batch_size == 32
    dense = recipe.model_copy(update={"task": "dense"})
    assert with_steps_enough(dense, space, few) == dense


def test_a_short_search_compares_the_crops_also_where_the_larger_sees_few_views() -> None:
    space = space_of("default", False)
    plan, recipe = plan_for(space), start_recipe("default", False)
    seconds = trial_seconds(recipe, plan.rungs, plan.n_score, plan.images_per_s[recipe.backbone])
    plan = replace(plan, cap_s=0.3 * 2.25 * seconds, planned_px=64)
    origins = [entry.origin for entry in start_list(space, recipe, (), {}, plan, name="default").entries]
    shrunk = "recipe default at 96 px shown at 64"
    assert origins == ["recipe default", shrunk]
    short = start_list(space, recipe, (), {}, plan, name="default", least_share=0.2)
    assert [entry.origin for entry in short.entries] == ["recipe default", shrunk, "recipe default at 96 px"]


def test_what_was_asked_for_goes_before_the_largest_crop_and_a_probe_s_ranking_behind_it() -> None:
    space, start = space_of("default", True), start_recipe("default", True)
    asked, probed = (Enqueued(origin=name, params={"lr": lr}) for name, lr in (("asked", 1e-3), ("probed", 2e-3)))
    found = start_list(space, start, [asked], {}, plan_for(space), name="default", probed=[probed]).entries
    assert [entry.origin for entry in found] == ["recipe default", "asked", "recipe default at 96 px", "probed"]
    assert [entry.params.get("crop_size") for entry in found] == [64, None, 96, None]


@pytest.mark.parametrize(("crop", "px"), [(32, 64), (64, 64), (96, 96)])
def test_trials_are_planned_for_the_side_of_the_start_and_of_64_px_at_least_where_the_crop_is_searched(
    crop: int, px: int
) -> None:
    space = space_of("default", True)
    fields = start_recipe("default", True).model_copy(update={"crop_size": crop}).model_dump()
    assert planned_side(fields, space) == px
    assert planned_side(fields, space.pinned({"crop_size": crop})) == crop
    assert planned_side({**fields, "input_size": 128}, space) == 128
    smaller = replace(space.parameters["crop_size"], high=80)
    known = replace(space, parameters={**space.parameters, "crop_size": smaller})
    assert planned_side(fields, known) == min(px, 80), "as trial 0 can show it"


def test_a_network_in_place_of_the_recipe_s_own_is_tried_at_the_largest_crop_too() -> None:
    """Weights may be given for others only."""
    space = space_of("default", True)
    left = space.without_choices("backbone", [one for one in space.choices("backbone") if one != "efficientnet_b0"])
    start = start_recipe("default", True).model_copy(update={"backbone": "efficientnet_b0"})

    def listed(start: Recipe, rate: float) -> list[str]:
        plan, on = plan_for(left, rate=rate), "on efficientnet_b0"
        return [one.origin for one in start_list(left, start, (), {}, plan, name="default", on=on).entries]

    both = ["recipe default (on efficientnet_b0)", "recipe default at 96 px (on efficientnet_b0)"]
    assert listed(start, 1000.0) == both
    assert listed(start, 100.0) == both[:1]
    assert listed(start_recipe("default", True), 1000.0) == both[:1], "any network, drawn twice"


@pytest.mark.parametrize(
    ("backbone", "names", "found"),
    [
        ("densenet169.tv_in1k", ("resnet18d", "densenet121"), "densenet121"),
        ("densenet169.tv_in1k", ("densenet121", "densenet169"), "densenet169"),
        ("resnet10t", ("vit_tiny_patch16_224", "resnet18d"), "vit_tiny_patch16_224"),
        ("resnet10t", (), "resnet10t"),
    ],
)
def test_a_recipe_s_network_is_replaced_by_one_of_its_family_else_by_the_first(
    backbone: str, names: tuple[str, ...], found: str
) -> None:
    assert first_backbone(Recipe(backbone=backbone), names) == found


def test_a_pinned_backbone_is_tried_at_the_largest_crop_too() -> None:
    space = space_of("default", False).pinned({"backbone": "resnet18d"})
    start = start_recipe("default", False).model_copy(update={"backbone": "resnet18d"})  # as a new study does
    entries = start_list(space, start, (), {}, plan_for(space), name="default").entries
    assert [(entry.params["crop_size"], entry.params["upscale"]) for entry in entries] == [
        (64, 1.0),
        (96, 0.67),
        (96, 1.0),
    ]


def test_patches_smaller_than_96_px_bound_the_crops_and_the_start() -> None:
    said: list[str] = []
    space, start = space_of("default", False), start_recipe("default", False)
    store = cast(PatchStore, SimpleNamespace(patches=SimpleNamespace(shape=(9, 50, 50, 3))))
    fitted, first = _within_patches(space, start, store, said.append)
    assert fitted.parameters["crop_size"].spread(99) == [32, 48]
    assert first.crop_size == 48
    assert said == ["the patches are 50 px: crops up to 48 px are searched"]
    store.patches.shape = (9, 96, 96, 3)  # type: ignore[misc]
    assert _within_patches(space, start, store, said.append) == (space, start)
    pinned = space.pinned({"crop_size": 96})
    store.patches.shape = (9, 50, 50, 3)  # type: ignore[misc]
    assert _within_patches(pinned, start, store, said.append) == (pinned, start), "what somebody fixed is refused later"
    assert len(said) == 1


def test_what_failed_or_killed_its_worker_is_not_prescribed_again_and_what_was_stopped_is() -> None:
    def row(slot: int, reason: str, origin: str | None = "recipe default") -> FrozenTrial:
        attrs = {"slot": slot, "reason": reason, **({} if origin is None else {"origin": origin})}
        return create_trial(state=TrialState.FAIL, user_attrs=attrs)

    error = f"{ERROR}out of luck"
    assert slots_that_failed([row(0, error)], []) == set(), "an earlier search failed, whose cause may be mended"
    assert slots_that_failed([row(0, error)], [row(0, error)]) == {0}
    assert slots_that_failed([row(0, "interrupted")] * 5, [row(0, "interrupted")]) == set()
    assert slots_that_failed([row(1, LOST)], []) == {1}
    assert slots_that_failed([row(2, error)] * 3, []) == {2}, "whatever search it was in"
    assert slots_that_failed([row(2, error, origin=None)] * 9, []) == set(), "other recipes failed there"
