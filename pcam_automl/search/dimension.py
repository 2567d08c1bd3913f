"""One dimension of a search space: its range or choices, its conditions, and every rule on how a file writes it.

Knows no trial's history and no file names.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from optuna.trial import BaseTrial
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pcam_automl.errors import did_you_mean, first_few
from pcam_automl.recipe import CENTRE_PX, Recipe, key_of, validation_faults

UPSCALE = "upscale"
"""A dimension that is no recipe field, see :func:`scaled_side`; below 1 the crop is shrunk."""
_UPSCALE_MIN, _UPSCALE_MAX = 0.33, 4.0  # of 96 px the recipe's smallest and largest input
_GRID_CHECKED = 4096  # so many values of an integer range are checked one by one
_KINDS = ("choice", "int", "float")
FIELDS = [*Recipe.model_fields, UPSCALE]

Conditions = tuple[tuple[str, tuple[Any, ...]], ...]


class ParameterFile(BaseModel):
    """One parameter as it stands in the file."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)

    choice: list[Any] | None = None
    int_range: tuple[int, int] | None = Field(None, alias="int")
    float_range: tuple[float, float] | None = Field(None, alias="float")
    step: float | None = Field(None, gt=0)
    log: bool = False
    when: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class Parameter:
    """One dimension: a choice of values or a range, both ends included; ``when``: allowed values of other fields."""

    name: str
    kind: Literal["choice", "int", "float"]
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    log: bool = False
    when: Conditions = ()

    def active(self, fields: Mapping[str, Any]) -> bool:
        """Whether every condition holds for the recipe as far as it is known."""
        return all(fields.get(name) in allowed for name, allowed in self.when)

    def suggest(self, trial: BaseTrial) -> Any:
        """The trial's value for this dimension."""
        if self.kind == "choice":
            return trial.suggest_categorical(self.name, self.choices)
        if self.kind == "int":
            step = 1 if self.log else int(self.step or 1)
            return trial.suggest_int(self.name, int(self.low), int(self.high), step=step, log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, step=self.step, log=self.log)

    def nearest(self, value: Any) -> Any:
        """The value of this dimension nearest to ``value``; None if a choice has nothing like it."""
        if self.kind == "choice":
            if value in self.choices:
                return self.choices[self.choices.index(value)]
            numbers = [choice for choice in self.choices if is_number(choice)]
            return min(numbers, key=lambda choice: abs(choice - value)) if numbers and is_number(value) else None
        if not is_number(value):
            return None
        inside = min(max(float(value), self.low), self.high)
        step = self.step or (1.0 if self.kind == "int" else None)
        if step is not None:
            inside = self.low + round((inside - self.low) / step) * step
        return int(inside) if self.kind == "int" else min(float(f"{inside:.12g}") if self.step else inside, self.high)

    def smallest(self) -> Any:
        """The least number that it can take; None where None is among its choices, or no number."""
        if self.kind != "choice":
            return int(self.low) if self.kind == "int" else self.low
        return None if None in self.choices else min(filter(is_number, self.choices), default=None)

    def spread(self, most: int) -> list[Any]:
        """All values of a choice, or at most so many of a range at equal distances, its ends among them, ascending."""
        if self.kind == "choice":
            return list(self.choices)
        steps = [self.low + (self.high - self.low) * k / (most - 1) for k in range(most)]
        return sorted({self.nearest(value) for value in steps})

    def contains(self, value: Any) -> bool:
        """Whether the dimension can take exactly this value."""
        nearest = self.nearest(value)
        return nearest is not None and (nearest == value or (is_number(value) and math.isclose(nearest, value)))

    def to_file(self) -> dict[str, Any]:
        """The parameter as YAML's plain values."""
        number = int if self.kind == "int" else float
        ends = list(self.choices) if self.kind == "choice" else [number(self.low), number(self.high)]
        out: dict[str, Any] = {self.kind: ends}
        if self.step is not None:
            out["step"] = number(self.step)
        if self.log:
            out["log"] = True
        if self.when:
            out["when"] = {name: list(allowed) for name, allowed in self.when}
        return out


def read_parameter(name: str, value: Any, where: str, faults: list[str]) -> ParameterFile | None:
    """The parameter as far as it can be read, its faults noted; None where it is no mapping.

    Keys at fault are left out of what is returned, so that the rest is checked, too, and reported with them.
    """
    where = f"{where}.parameters.{name}"
    if name not in FIELDS:
        faults.append(f"{where} is not a recipe field{did_you_mean(name, FIELDS)}")
    if not isinstance(value, dict):
        faults.append(f"{where} must be a mapping such as {{choice: [...]}} or {{float: [low, high]}}, got {value!r}")
        return None
    keys = [field.alias or key for key, field in ParameterFile.model_fields.items()]
    given = [key for key in _KINDS if value.get(key) is not None]
    try:
        file = ParameterFile.model_validate(value)
    except ValidationError as fault:
        faults.extend(validation_faults(fault, where, keys))
        wrong = {error["loc"][0] for error in fault.errors()}
        file = ParameterFile.model_validate(
            {key: item for key, item in value.items() if key in keys and key not in wrong}
        )
        if not given:  # very likely the misspelt key that was just reported
            return file
    if len(given) != 1:
        faults.append(f"{where} must have exactly one of choice, int and float, got {', '.join(given) or 'none'}")
    return file


def build_parameter(name: str, file: ParameterFile, where: str, faults: list[str]) -> Parameter | None:
    """The checked parameter; where it has faults they are noted and the result is not to be used.

    None where nothing says what it ranges over. Of several kinds given each is checked, and one returned.
    """
    when = tuple(
        (other, tuple(allowed) if isinstance(allowed, list) else (allowed,)) for other, allowed in file.when.items()
    )
    parameter: Parameter | None = None
    if file.int_range is not None:
        parameter = Parameter(name, "int", (), *file.int_range, step=file.step, log=file.log, when=when)
        _check_range(parameter, f"{where}.int", faults)
    if file.float_range is not None:
        parameter = Parameter(name, "float", (), *file.float_range, step=file.step, log=file.log, when=when)
        _check_range(parameter, f"{where}.float", faults)
    if file.choice is not None:
        parameter = _choice(name, file, file.choice, where, faults, when, alone=parameter is None)
    return parameter


def _check_range(parameter: Parameter, where: str, faults: list[str]) -> None:
    name, kind, low, high = parameter.name, parameter.kind, parameter.low, parameter.high
    takes_kind = name not in FIELDS or _accepts(name) in (kind, "float")
    if not takes_kind:
        remedy = "use int" if _accepts(name) == "int" else "use choice"
        faults.append(f"{where}: {name} takes no {kind} range; {remedy}")
    if low > high:
        faults.append(f"{where} is upside down: [{low}, {high}] (did you mean [{high}, {low}]?)")
        parameter = replace(parameter, low=high, high=low)
    if parameter.log and parameter.low <= 0:
        faults.append(f"{where} must start above 0 with log: true, got {parameter.low}")
    if parameter.step is not None:
        _check_step(parameter, where, faults)
    if takes_kind and name in FIELDS:
        _check_values(parameter, where, faults)


def _choice(
    name: str, file: ParameterFile, choice: list[Any], where: str, faults: list[str], when: Conditions, *, alone: bool
) -> Parameter:
    if alone and (file.step is not None or file.log):
        faults.append(f"{where}: step and log belong to a range, not to a choice")
    if not choice:
        faults.append(f"{where}.choice is empty; name at least one value")
    values = tuple(choice)
    if name in FIELDS:
        values = tuple(checked_value(name, value, where, faults, shown=f"{where}.choice") for value in choice)
    twice = [value for i, value in enumerate(values) if value in values[:i]]
    if twice:
        faults.append(f"{where}.choice names {first_few([repr(value) for value in twice])} twice; keep one")
    if any(isinstance(value, tuple) for value in values):
        faults.append(f"{where}: lists cannot be searched; fix {name} in base")
    return Parameter(name, "choice", values, when=when)


def _check_step(parameter: Parameter, where: str, faults: list[str]) -> None:
    step = parameter.step
    assert step is not None
    if parameter.log:
        faults.append(f"{where}: step and log exclude each other; keep one")
    if parameter.kind == "int" and step != int(step):
        faults.append(f"{where}: step of an int range must be whole, got {step}")
        return
    n_steps = (parameter.high - parameter.low) / step
    if not math.isclose(n_steps, round(n_steps), abs_tol=1e-9):
        end = parameter.low + math.floor(n_steps) * step
        faults.append(
            f"{where}: step {step:g} does not divide [{parameter.low:g}, {parameter.high:g}] "
            f"(did you mean [{parameter.low:g}, {end:g}]?)"
        )


def _check_values(parameter: Parameter, where: str, faults: list[str]) -> None:
    """Both ends and, of an integer range, every value between against the recipe's own rules.

    Of the values between only the first fault is noted, and none where an end has one.
    """

    def wrong(value: float) -> bool:
        n_before = len(faults)
        checked_value(parameter.name, value, where, faults, shown=where)
        if len(faults) > n_before and "must be even" in faults[-1]:
            faults[-1] += "; give an even start and an even step"
        return len(faults) > n_before

    if parameter.kind == "float":
        for end in dict.fromkeys((parameter.low, parameter.high)):
            wrong(end)
        return
    low, high = int(parameter.low), int(parameter.high)
    n_wrong_ends = sum(wrong(end) for end in dict.fromkeys((low, high)))
    if not n_wrong_ends:
        any(wrong(value) for value in range(low, high + 1, max(1, int(parameter.step or 1)))[:_GRID_CHECKED])


def check_conditions(
    own: str,
    file: ParameterFile,
    waiting: Collection[str],
    earlier: Mapping[str, Parameter | None],
    where: str,
    faults: list[str],
) -> None:
    """Note the faults of a ``when``.

    Args:
        own: the parameter it belongs to.
        file: that parameter as read.
        waiting: the parameters that come later in the file.
        earlier: those above; None where one could not be built, so that nothing can be said of its values.
        where: the key of the ``when``.
        faults: receives them.
    """
    for name, given in file.when.items():
        allowed = tuple(given) if isinstance(given, list) else (given,)
        if name == own:
            faults.append(f"{where}: {name} cannot depend on itself")
        elif name not in FIELDS:
            faults.append(f"{where}: {name} is neither a parameter nor a recipe field{did_you_mean(name, FIELDS)}")
        elif name in waiting:
            faults.append(f"{where}: {name} comes later (or depends on {own}); move {name} above it")
        elif not allowed:
            faults.append(f"{where}.{name} names no value")
        elif name in earlier:
            if (other := earlier[name]) is not None:
                _check_allowed(other, allowed, f"{where}.{name}", faults)
        else:
            for value in allowed:
                checked_value(name, value, where, faults)


def _check_allowed(other: Parameter, allowed: tuple[Any, ...], where: str, faults: list[str]) -> None:
    if other.kind == "float" and other.step is None:
        faults.append(
            f"{where}: {other.name} is a float range, which never equals a value; make it a choice or add a step"
        )
        return
    for value in allowed:
        if not other.contains(value):
            names = [str(choice) for choice in other.choices]
            known = f"one of {', '.join(names)}" if names else f"in [{other.low:g}, {other.high:g}]"
            faults.append(f"{where} can only be {known}, got {value!r}{did_you_mean(str(value), names)}")


def checked_value(name: str, value: Any, where: str, faults: list[str], shown: str | None = None) -> Any:
    """``value`` as the recipe would hold it; a fault is noted under ``shown`` (by default ``where.name``)."""
    own_key = key_of(where, name)
    shown = shown or own_key
    if name == UPSCALE:
        if not is_number(value) or not _UPSCALE_MIN <= value <= _UPSCALE_MAX:
            faults.append(f"{shown} must be in [{_UPSCALE_MIN:g}, {_UPSCALE_MAX:g}], got {value!r}")
            return value
        return float(value)
    try:  # rules between two fields are checked once for the whole space
        return getattr(Recipe.model_validate({name: value, **_companions(name, value)}), name)
    except ValidationError as fault:
        faults.extend(line.replace(own_key, shown, 1) for line in validation_faults(fault, where, FIELDS))
        return value


def _companions(name: str, value: Any) -> dict[str, Any]:
    """Fields without which ``value`` alone would break a rule between two fields."""
    if name == "task":
        return {"tile_size": 32} if value == "dense" else {}
    if name == "lr_low":
        return {"lr": value}
    fixed: dict[str, dict[str, Any]] = {
        "warmup": {"decay": 0.0},
        "decay": {"warmup": 0.0},
        "tile_size": {"task": "dense"},
        "decoder": {"task": "dense", "tile_size": 32},
        "patience": {"schedule": "constant"},
        "hidden": {"head": "mlp"},
    }
    return fixed.get(name, {})


def _accepts(name: str) -> Literal["int", "float", "other"]:
    """What numbers a recipe field holds."""
    if name == UPSCALE:
        return "float"
    annotation: Any = Recipe.model_fields[name].annotation
    union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    members = [typing.get_origin(m) or m for m in (typing.get_args(annotation) if union else (annotation,))]
    plain = {typing.get_args(m)[0] if typing.get_origin(m) is typing.Annotated else m for m in members}
    return "float" if float in plain else "int" if int in plain else "other"


def scaled_side(crop_size: int, upscale: float) -> int:
    """The input side in px that a scale of the crop gives: even, at least 32."""
    return max(2 * round(crop_size * upscale / 2), CENTRE_PX)


def is_number(value: Any) -> bool:
    """An int or a float; ``True`` is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)
