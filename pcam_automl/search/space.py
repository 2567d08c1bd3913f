"""Search spaces: YAML to dimensions, a trial to a Recipe and back. Runs no trials."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import yaml
from optuna.trial import BaseTrial
from pydantic import BaseModel, ValidationError

from pcam_automl.configs_folder import find_config
from pcam_automl.errors import RecipeError, did_you_mean, first_few
from pcam_automl.files import sha256_of_json
from pcam_automl.recipe import PINS, Recipe, build_recipe, validation_faults
from pcam_automl.recipe_files import merge_fields
from pcam_automl.search.dimension import (
    FIELDS,
    UPSCALE,
    Parameter,
    ParameterFile,
    build_parameter,
    check_conditions,
    checked_value,
    is_number,
    read_parameter,
    scaled_side,
)
from pcam_automl.yaml_text import read_config_text, read_yaml

BackboneFault = Callable[[str], str | None]
"""Says what is wrong with a backbone's name, None for a good one."""
_KEYS = ("base", "parameters")


@dataclass(frozen=True)
class SearchSpace:
    """What a study varies (``parameters``, by name, in the order of suggestion) and what it fixes (``base``)."""

    base: Mapping[str, Any]
    parameters: Mapping[str, Parameter]

    @property
    def hash(self) -> str:
        """SHA-256 over the fixed fields and the parameters in their order."""
        return sha256_of_json([self._base_file(), [[name, p.to_file()] for name, p in self.parameters.items()]])

    def to_yaml(self) -> str:
        """YAML that :func:`parse_space` reads back to an equal space."""
        parameters = {name: parameter.to_file() for name, parameter in self.parameters.items()}
        return yaml.safe_dump({"base": self._base_file(), "parameters": parameters}, sort_keys=False)

    def _base_file(self) -> dict[str, Any]:
        return {name: _plain(value) for name, value in self.base.items()}

    def choices(self, field: str) -> tuple[Any, ...]:
        """The values a choice can take; of a fixed field its one value; empty for a range or an unnamed field."""
        if field in self.parameters:
            return self.parameters[field].choices
        return (self.base[field],) if field in self.base else ()

    def pinned(self, pins: Mapping[str, Any]) -> SearchSpace:
        """The space with these fields fixed and no longer searched. A pinned ``input_size`` ends ``upscale``, too.

        Raises:
            RecipeError: unknown fields or values out of range, all reported together.
        """
        faults: list[str] = []
        fixed = {name: checked_value(name, value, PINS, faults) for name, value in pins.items()}
        _raise(faults)
        gone = set(fixed)
        gone |= {UPSCALE} if "input_size" in fixed else set()
        gone |= {"input_size"} if UPSCALE in fixed else set()
        for name, rival in (("epochs", "views"), ("views", "epochs")):
            gone |= {rival} if fixed.get(name) is not None and rival not in fixed else set()
        base = {name: value for name, value in merge_fields(self.base, fixed).items() if name not in gone - set(fixed)}
        space = SearchSpace(base, {name: p for name, p in self.parameters.items() if name not in gone})
        _raise(_contradictions(space, PINS))
        return space

    def without_choices(self, field: str, names: Collection[str]) -> SearchSpace:
        """The space without these values of a choice (backbones whose weights are missing, say).

        Raises:
            RecipeError: none would be left, or the field is fixed to one of them.
        """
        if field in self.base and self.base[field] in names:
            raise RecipeError(
                f"{field} is fixed to {self.base[field]!r}, which cannot be used here; choose another one"
            )
        parameters = {}
        for name, parameter in self.parameters.items():
            if name == field:
                left = tuple(choice for choice in parameter.choices if choice not in names)
                if not left:
                    raise RecipeError(
                        f"no {field} is left in the space; none of {first_few(parameter.choices)} can be used here"
                    )
                parameters[name] = replace(parameter, choices=left)
                continue
            when = tuple(
                (n, tuple(v for v in allowed if n != field or v not in names)) for n, allowed in parameter.when
            )
            if all(allowed for _, allowed in when):  # else its condition can never hold again
                parameters[name] = replace(parameter, when=when)
        return SearchSpace(self.base, parameters)

    def capped(self, field: str, most: int) -> SearchSpace:
        """The space with no number above ``most`` for one of its dimensions (crops larger than the patches, say).

        Raises:
            RecipeError: none would be left.
        """
        parameter = self.parameters.get(field)
        if parameter is None:
            return self
        if parameter.kind == "choice":
            return self.without_choices(field, [one for one in parameter.choices if is_number(one) and one > most])
        if parameter.high <= most:
            return self
        if parameter.low > most:
            raise RecipeError(f"{field} in the space begins at {parameter.low:g}, and the patches allow {most} at most")
        step = parameter.step or 1.0
        high = parameter.low + (most - parameter.low) // step * step
        return SearchSpace(self.base, {**self.parameters, field: replace(parameter, high=high)})

    def suggest(
        self, trial: BaseTrial, defaults: Mapping[str, Any], smallest_input: Callable[[str], int] | None = None
    ) -> Recipe:
        """Ask the trial for every active dimension and build its recipe.

        Args:
            trial: receives one ``suggest_*`` a dimension, in the space's order.
            defaults: recipe fields for what the space neither fixes nor varies, and for dimensions whose condition
                does not hold.
            smallest_input: the smallest input side in px of a backbone; a smaller input is raised to it, made even.

        Raises:
            RecipeError: defaults, fixed fields and suggestions contradict each other.
        """
        fields = merge_fields(defaults, self.base)
        for parameter in self.parameters.values():
            if parameter.active(_with_recipe_defaults(fields)):
                fields = merge_fields(fields, {parameter.name: parameter.suggest(trial)})
        return self._recipe(fields, smallest_input)

    def _recipe(self, fields: dict[str, Any], smallest_input: Callable[[str], int] | None) -> Recipe:
        upscale = fields.pop(UPSCALE, None)
        if upscale is not None:
            crop_size = _with_recipe_defaults(fields)["crop_size"]
            input_size = scaled_side(crop_size, upscale)
            fields["input_size"] = None if input_size == crop_size else input_size
        recipe = build_recipe(fields, where="trial")
        if smallest_input is None or recipe.task == "dense":
            return recipe
        raised = _raised(recipe.network_px, smallest_input(recipe.backbone))
        if raised == recipe.network_px:
            return recipe
        size = None if raised == recipe.crop_size else raised
        return build_recipe({**fields, "input_size": size}, where="trial")

    def is_whole(self, recipe: Recipe) -> bool:
        """Whether :meth:`params_of` the recipe leaves the sampler nothing to fill in."""
        params = self.params_of(recipe)
        fields = {**recipe.model_dump(), **self.base, **params}
        return all(name in params for name, parameter in self.parameters.items() if parameter.active(fields))

    def params_of(self, recipe: Recipe, smallest_input: Callable[[str], int] | None = None) -> dict[str, Any]:
        """The trial parameters that reproduce a recipe as nearly as the space allows.

        A value outside a range is moved to its nearest end or step, a number that is no choice to the nearest one; a
        name that is no choice is left out, for the sampler to fill.

        Args:
            recipe: of this space or any other.
            smallest_input: as :meth:`suggest` has it: of several scales the one whose input, raised, is nearest.
        """
        fields = recipe.model_dump()
        fields[UPSCALE] = recipe.network_px / recipe.crop_size
        fields |= self.base
        params: dict[str, Any] = {}
        for parameter in self.parameters.values():
            if not parameter.active(fields):
                continue
            if parameter.name == UPSCALE:  # of the crop that the space could give
                fields[UPSCALE] = recipe.network_px / fields["crop_size"]
                least_px = 0 if smallest_input is None or recipe.task == "dense" else smallest_input(fields["backbone"])
                value = _nearest_scale(parameter, fields["crop_size"], recipe.network_px, least_px)
            else:
                value = parameter.nearest(fields[parameter.name])
            if value is not None or (parameter.kind == "choice" and None in parameter.choices):
                params[parameter.name] = fields[parameter.name] = value
        return params


def _nearest_scale(scale: Parameter, crop_size: int, network_px: int, least_px: int) -> Any:
    """The scale at which the crop, raised to the smallest input, is shown nearest to ``network_px``."""
    if scale.kind != "choice":
        return scale.nearest(network_px / crop_size)

    def distance(choice: float) -> tuple[float, float]:
        shown = _raised(scaled_side(crop_size, choice), least_px)
        return abs(shown - network_px), abs(choice - network_px / crop_size)

    return min(filter(is_number, scale.choices), key=distance)


def _raised(px: int, least_px: int) -> int:
    """An input side in px, raised to the smallest that a backbone takes, made even."""
    return px if px >= least_px else least_px + least_px % 2


def in_one_stage(recipe: Recipe) -> Recipe:
    """A recipe with stages as a space without them can take it: the last one's rates, in which all layers train, and the stages of the
    head alone as the frozen share. Any other as it is.
    """
    if not recipe.stages:
        return recipe
    last = recipe.phases[-1]
    frozen = sum(stage.share for stage in recipe.stages if stage.trainable == 0.0)
    decay = recipe.weight_decay if last.weight_decay is None else last.weight_decay
    return recipe.model_copy(update={"stages": (), "lr": last.lr, "weight_decay": decay, "frozen": frozen})


def load_space(
    name_or_path: str, *, pins: Mapping[str, Any] | None = None, backbone_fault: BackboneFault | None = None
) -> SearchSpace:
    """Read a shipped space by name, or a YAML file, and fix the pinned fields.

    Args:
        name_or_path: as :func:`find_config` takes it; messages name the file by it.
        pins: fields fixed by ``--set``.
        backbone_fault: judges every backbone that the file names, see :func:`parse_space`.

    Raises:
        RecipeError: no such file, or faults in it, all reported together.
    """
    path = find_config("space", name_or_path)
    return parse_space(read_config_text(path), name_or_path, backbone_fault=backbone_fault).pinned(pins or {})


def parse_space(text: str, where: str, *, backbone_fault: BackboneFault | None = None) -> SearchSpace:
    """A space from its YAML text.

    Args:
        text: a mapping with ``parameters`` and, optionally, ``base``.
        where: what to call the text in messages.
        backbone_fault: judges every backbone that is named (timm's list takes a second to import, so that it is
            given only where a search starts); None leaves the names unjudged.

    Raises:
        RecipeError: every fault of the text in one message.
    """
    faults: list[str] = []
    raw = read_yaml(text, where, faults)
    unknown = [key for key in raw if key not in _KEYS]
    faults += [f"{where}.{key} is not a known key{did_you_mean(key, _KEYS)}" for key in unknown]
    sections = {}
    for key in _KEYS:
        value = raw.get(key)
        if value is not None and not (isinstance(value, dict) and all(isinstance(name, str) for name in value)):
            faults.append(f"{where}.{key} must be a mapping of recipe fields, got {value!r}")
        sections[key] = value if isinstance(value, dict) else {}
    if "parameters" not in raw and not any("'parameters'" in did_you_mean(key, _KEYS) for key in unknown):
        faults.append(f"{where}.parameters is required")
    base_raw = {str(name): value for name, value in sections["base"].items()}
    base = {name: checked_value(name, value, f"{where}.base", faults) for name, value in base_raw.items()}
    files = {str(name): read_parameter(str(name), v, where, faults) for name, v in sections["parameters"].items()}
    built: dict[str, Parameter | None] = {}
    waiting = dict(files)
    for name, file in files.items():
        if name in base:
            faults.append(f"{where}: {name} is both in base and in parameters; keep one")
        key = f"{where}.parameters.{name}"
        built[name] = None if file is None else build_parameter(name, file, key, faults)
        del waiting[name]
        if file is not None:
            check_conditions(name, file, waiting, built, f"{key}.when", faults)
    space = SearchSpace(base, {name: parameter for name, parameter in built.items() if parameter is not None})
    faults += _contradictions(space, where)
    if backbone_fault is not None:
        named = _named_backbones(base, files, where)
        faults += [f"{key} {fault}" for key, name in named if (fault := backbone_fault(name)) is not None]
    _raise(faults)
    return space


def _named_backbones(
    base: Mapping[str, Any], files: Mapping[str, ParameterFile | None], where: str
) -> list[tuple[str, str]]:
    """(key, name) of every backbone in a file: fixed, a choice, or in a condition on a backbone that is no choice."""
    found = [(f"{where}.base.backbone", base.get("backbone"))]
    own = files.get("backbone")
    found += [(f"{where}.parameters.backbone.choice", name) for name in (own.choice if own else None) or ()]
    for parameter, file in files.items():
        allowed = None if file is None or "backbone" in files else file.when.get("backbone")
        names = allowed if isinstance(allowed, list) else [allowed]
        found += [(f"{where}.parameters.{parameter}.when.backbone", name) for name in names]
    return [(key, name) for key, name in found if isinstance(name, str) and name]


def _raise(faults: list[str]) -> None:
    if faults:
        raise RecipeError("; ".join(dict.fromkeys(faults)))


def _contradictions(space: SearchSpace, where: str) -> list[str]:
    """Faults between fields that only their largest values show (warmup + decay, epochs and views)."""
    sized = [name for name in ("input_size", UPSCALE) if name in space.parameters or space.base.get(name) is not None]
    faults = [f"{where}: {' and '.join(sized)} exclude each other; keep one"] if len(sized) == 2 else []
    for pair in (("warmup", "decay"), ("epochs", "views")):
        corner = {name: value for name in pair if (value := _largest(space, name)) is not None}
        wrong: list[str] = []  # a value that is wrong alone is reported under its own key
        for name, value in corner.items():
            checked_value(name, value, where, wrong)
        if not wrong:
            try:
                Recipe.model_validate(corner)
            except ValidationError as fault:
                faults += validation_faults(fault, where, FIELDS)
    return faults


def _largest(space: SearchSpace, name: str) -> Any:
    """The largest value that the space gives a field; None where it names none."""
    if name not in space.parameters:
        return space.base.get(name)
    p = space.parameters[name]
    return max(filter(is_number, p.choices), default=None) if p.kind == "choice" else max(p.low, p.high)


def _with_recipe_defaults(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {**{name: info.default for name, info in Recipe.model_fields.items()}, UPSCALE: 1.0, **fields}


def _plain(value: Any) -> Any:
    """As YAML holds it: tuples as lists, stages as mappings."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
