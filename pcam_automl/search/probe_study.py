"""The probe of a new study: which backbones and views it judges within its seconds, and what the study keeps of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pcam_automl.batches import Patches, open_patches
from pcam_automl.data.store import PatchStore
from pcam_automl.errors import DataError, RecipeError
from pcam_automl.models.factory import smallest_input
from pcam_automl.models.weights import Weights
from pcam_automl.recipe import Recipe, build_recipe
from pcam_automl.recipe_files import merge_fields
from pcam_automl.search.dimension import UPSCALE, Parameter
from pcam_automl.search.feature_probe import N_SCORE, N_TRAIN, check_probed, probe_result
from pcam_automl.search.plan import EVAL_SPEEDUP, Plan
from pcam_automl.search.probe_decisions import ProbeResult, hopeless_backbones, ranked_starts
from pcam_automl.search.space import SearchSpace
from pcam_automl.training.compute import fixed_variant
from pcam_automl.training.start import Rows

MODES = ("auto", "on", "off")
LIMIT_S = 20.0
"""Of a whole probe: what half a typical trial takes."""
N_FOLLOWED = 2
"""Backbones whose other views are judged, too."""
_MOST_VALUES = 5  # of a dimension: the ends and what lies evenly between
_FIT_S = 0.5  # of the regression and the interval, beside the features

Say = Callable[[str], None]


class _OutOfTime(Exception):
    """A cell ran into the limit; its result is dropped."""


@dataclass(frozen=True)
class Cell:
    """A backbone and a way to show it a patch."""

    backbone: str
    crop_size: int
    upscale: float

    def recipe(self, fields: Mapping[str, Any]) -> Recipe:
        """The recipe whose features are probed; the input is raised to what the backbone needs."""
        least = smallest_input(self.backbone)
        px = fields["input_size"] if fields.get("input_size") else 2 * round(self.crop_size * self.upscale / 2)
        sized = {"crop_size": self.crop_size, "input_size": max(int(px), least + least % 2)}
        return build_recipe({**fields, "backbone": self.backbone, **sized}, where="probe")


def check_mode(mode: str, weights: Weights, *, deterministic: bool) -> bool:
    """Whether a probe is wanted and may be made: ``auto`` is yes with pretrained weights in a study that measures.

    Raises:
        RecipeError: an unknown mode; ``on`` without pretrained weights, or in a deterministic study, where no measured
            second may decide which cells are probed.
    """
    if mode not in MODES:
        raise RecipeError(f"--probe must be one of {', '.join(MODES)}, got {mode!r}")
    if mode == "on" and not weights.pretrained:
        raise RecipeError(
            f"--probe on needs pretrained weights, got --weights {weights}: random features rank nothing; "
            "give --weights hub or a folder, or --probe auto"
        )
    if mode == "on" and deterministic:
        raise RecipeError(
            "--probe on and --deterministic exclude each other: what is probed follows from measured speed"
        )
    return mode != "off" and weights.pretrained and not deterministic


def probe_study(
    space: SearchSpace,
    start: Recipe,
    plan: Plan,
    *,
    store: PatchStore,
    rows: Rows,
    weights: Weights,
    device: torch.device,
    say: Say,
    seconds: float = LIMIT_S,
    keep: Sequence[str] = (),
) -> tuple[SearchSpace, dict[str, Any] | None]:
    """Probe, leave out what is hopeless, and say with what to begin.

    Args:
        space: backbones, ``crop_size`` and ``upscale`` are judged as far as it varies them.
        start: the recipe of trial 0; its backbone always stays.
        plan: speeds, by which cells are chosen to fit.
        store: the pack.
        rows: training and validation rows of the search.
        weights: pretrained.
        device: where the trials run.
        say: told what was found, a line each.
        seconds: limit of the whole probe.
        keep: backbones that stay, too: whole trainings have spoken for them.

    Returns:
        The space without hopeless backbones, and the record for ``settings.plan["probe"]``: ``results``, ``skipped``,
        ``dropped``, ``starts`` (parameter sets, best first), ``seconds``. None as the record where there is nothing to rank.
    """
    fields = merge_fields(start.model_dump(), {name: v for name, v in space.base.items() if name != UPSCALE})
    if fields["task"] != "patch" or not fields["pretrained"]:
        return space, None
    first, views = reference_cells(space, start, fields), views_of(space, fields)
    if len(first) * len(views) < 2:
        return space, None
    began = time.perf_counter()
    ranking = _Ranking(fields, plan, store, rows, weights, device, began + seconds)
    for cell in first:
        ranking.add(cell)
    for cell in following_cells(ranking.results, views):
        ranking.add(cell)
    dropped = hopeless_backbones(ranking.results, keep=(start.backbone, *keep))
    if dropped:
        space = space.without_choices("backbone", list(dropped))
    left = [one for one in ranking.results if one.backbone not in dropped]
    record = {
        "n_train": min(N_TRAIN, len(rows.train)),
        "n_valid": min(N_SCORE, len(rows.score)),
        "seconds": round(time.perf_counter() - began, 2),
        "limit_s": seconds,
        "results": [asdict(one) for one in ranking.results],
        "skipped": ranking.skipped,
        "dropped": dropped,
        "starts": ranked_starts(left, space.params_of(start), varied=space.parameters),
    }
    _tell(record, ranking.results, say)
    return space, record


def _tell(record: Mapping[str, Any], results: Sequence[ProbeResult], say: Say) -> None:
    best = sorted(results, key=lambda one: -one.auc)[:3]
    shown = ", ".join(f"{one.backbone} crop {one.crop_size} at {one.input_px} px {one.auc:.4f}" for one in best)
    say(f"probe of frozen features, {record['seconds']:.0f} s, {len(results)} cells: {shown or 'none fits the limit'}")
    for name, why in record["dropped"].items():
        say(f"  left out: {name}, {why}")


def values_of(parameter: Parameter | None, fixed: float) -> list[float]:
    """The values of a dimension that a probe tries: all of a choice, at most five of a range; or the fixed one."""
    return [fixed] if parameter is None else [float(value) for value in parameter.spread(_MOST_VALUES)]


def views_of(space: SearchSpace, fields: Mapping[str, Any]) -> list[tuple[int, float]]:
    """(crop_size, upscale) of every view that the space gives a patch, none shrunk if it can be helped: frozen features are of
    objects that are larger than a patch's.
    """
    crops = values_of(space.parameters.get("crop_size"), fields["crop_size"])
    fixed = float(space.base.get(UPSCALE, 1.0))
    upscales = values_of(space.parameters.get(UPSCALE), fixed) if not fields.get("input_size") else [1.0]
    upscales = [scale for scale in upscales if scale >= 1.0] or upscales
    return [(2 * round(crop / 2), upscale) for crop in crops for upscale in upscales]


def reference_cells(space: SearchSpace, start: Recipe, fields: Mapping[str, Any]) -> list[Cell]:
    """Every backbone at the view of the known-good recipe, that recipe's own backbone first."""
    views = views_of(space, fields)
    scale = start.network_px / start.crop_size
    view = min(views, key=lambda one: _unlike(one, (start.crop_size, scale)))
    names = list(space.choices("backbone")) or [str(fields["backbone"])]
    return [Cell(name, *view) for name in sorted(names, key=lambda name: name != start.backbone)]


def following_cells(results: Sequence[ProbeResult], views: Sequence[tuple[int, float]]) -> list[Cell]:
    """The other views of the best backbones, each time the view that is least like those before it."""
    ranked = sorted(results, key=lambda one: -one.auc)[:N_FOLLOWED]
    if not ranked:
        return []
    done = [(ranked[0].crop_size, ranked[0].upscale)]
    left = [view for view in views if view not in done]
    while left:
        done.append(max(left, key=lambda view: min(_unlike(view, other) for other in done)))
        left.remove(done[-1])
    return [Cell(one.backbone, *view) for view in done[1:] for one in ranked]


def _unlike(one: tuple[int, float], other: tuple[int, float]) -> float:
    """Distance of two views: of the crop, and of what the network sees, in octaves."""
    return abs(math.log2(one[0] / other[0])) + abs(math.log2(one[0] * one[1] / other[0] / other[1]))


class _Ranking:
    """Results as they come, and the clock that says what still fits."""

    def __init__(
        self,
        fields: Mapping[str, Any],
        plan: Plan,
        store: PatchStore,
        rows: Rows,
        weights: Weights,
        device: torch.device,
        until: float,
    ) -> None:
        self.fields, self.plan, self.store, self.rows = fields, plan, store, rows
        self.weights, self.device, self.until = weights, device, until
        self.patches: Patches = open_patches(store, device)
        self.results: list[ProbeResult] = []
        self.skipped: dict[str, str] = {}
        self._slower = 1.0  # measured over expected seconds of the cell before
        self._seen: set[tuple[str, int, int]] = set()

    def add(self, cell: Cell) -> None:
        """Probe the cell if it has not been, exists, and is expected to fit."""
        recipe = cell.recipe(self.fields)
        key = (cell.backbone, recipe.crop_size, recipe.network_px)
        if cell.backbone in self.plan.dropped or key in self._seen:
            return
        self._seen.add(key)
        expected = self._expected(recipe)
        if time.perf_counter() + expected * self._slower > self.until:
            self._skip(recipe, f"about {expected * self._slower:.0f} s more do not fit")
            return
        try:
            check_probed(recipe, self.weights)
            result = probe_result(
                self.store,
                self.rows,
                recipe,
                self.weights,
                self.device,
                upscale=cell.upscale,
                patches=self.patches,
                compute=fixed_variant(self.device),
                stop=self._check_time,
            )
        except _OutOfTime:
            self._skip(recipe, "it ran into the limit")
        except (RecipeError, DataError) as fault:  # patches of one label, say: the search may do without a probe
            self._skip(recipe, str(fault))
        else:
            self._slower = result.seconds / expected
            self.results.append(result)

    def _skip(self, recipe: Recipe, why: str) -> None:
        self.skipped[f"{recipe.backbone} crop {recipe.crop_size} at {recipe.network_px} px"] = why

    def _check_time(self) -> None:
        if time.perf_counter() > self.until:
            raise _OutOfTime("the probe's limit")

    def _expected(self, recipe: Recipe) -> float:
        """Seconds by the plan's speed of the backbone, which falls with the area that the network sees."""
        n = min(N_TRAIN, len(self.rows.train)) + min(N_SCORE, len(self.rows.score))
        area = (recipe.network_px / self.plan.planned_px) ** 2
        return _FIT_S + n * area / (EVAL_SPEEDUP * self.plan.images_per_s[recipe.backbone])
