"""Recipes from files and from ``--set field=value``. Writes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pcam_automl.configs_folder import shown_name
from pcam_automl.errors import RecipeError, did_you_mean
from pcam_automl.recipe import PINS, Recipe, build_recipe, validation_faults
from pcam_automl.yaml_text import parse_scalar, read_config_text, read_yaml


def load_recipe(path: Path, *, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe file, apply overrides (those of ``--set``), validate.

    Raises:
        RecipeError: the file is missing, unreadable or invalid; all its faults together.
    """
    where, pins = shown_name(path), overrides or {}
    faults: list[str] = []
    fields = read_yaml(read_config_text(path), where, faults)
    if not fields and not faults:
        raise RecipeError(f"{where} is empty; a recipe names at least one field, e.g. backbone: resnet10t")
    try:
        recipe = build_recipe(merge_fields(fields, pins), where=where, pinned=pins)
    except RecipeError as fault:
        raise RecipeError("; ".join([*faults, str(fault)])) from None
    fixed = ["lr"] + ["weight_decay"] * all(stage.weight_decay is not None for stage in recipe.stages)
    idle = [name for name in fixed if name in pins]
    if recipe.stages and "stages" not in pins and idle:
        faults.append(
            f"--set {', '.join(idle)}: the stages of {where} fix their own; set the stages, or --set stages=[] for one training"
        )
    if faults:
        raise RecipeError("; ".join(faults))
    return recipe


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """``["lr=1e-3", "flips=false"]`` to typed values, as YAML would read them; all faults reported together.

    Raises:
        RecipeError: no ``=`` or nothing after it, an unknown field, the same field twice with two values.
    """
    fields: dict[str, Any] = {}
    faults = []
    for text in assignments:
        name, sign, value = text.partition("=")
        name = name.strip()
        if not sign:
            faults.append(f"--set wants field=value, got {text!r}")
            continue
        if name not in Recipe.model_fields:
            faults.append(f"--set {name}: not a field of a recipe{did_you_mean(name, Recipe.model_fields)}")
            continue
        if not value.strip():
            faults.append(f"--set {name}= has no value; write --set {name}=VALUE, or {name}=null for none")
            continue
        parsed = parse_scalar(value)
        if name in fields and fields[name] != parsed:
            faults.append(f"--set {name} given twice, as {fields[name]!r} and {parsed!r}; keep one")
        fields[name] = parsed
    if faults:  # with the values that are wrong, else they would be found only after these are mended
        raise RecipeError("; ".join([*faults, *_value_faults(fields)]))
    return fields


def _value_faults(fields: Mapping[str, Any]) -> list[str]:
    """Faults of the values of ``--set``, each judged alone."""
    try:
        Recipe.model_validate(dict(fields))
    except ValidationError as fault:
        lines = validation_faults(fault, PINS, Recipe.model_fields)
        return [line for line, error in zip(lines, fault.errors(), strict=True) if error["loc"]]
    return []


def merge_fields(fields: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """``overrides`` over ``fields``; naming ``epochs`` drops an inherited ``views`` and the reverse."""
    merged = dict(fields)
    for name, rival in (("epochs", "views"), ("views", "epochs")):
        if overrides.get(name) is not None and rival not in overrides:
            merged.pop(rival, None)
    merged.update(overrides)
    return merged
