"""The recorded table as arrays (see record.py). Reads only."""

from __future__ import annotations

import csv
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pcam_automl.errors import DataError
from pcam_automl.search.space import SearchSpace


@dataclass(frozen=True)
class RungTable:
    """Real results of R recipes at K rungs.

    Attributes:
        params: (R) searched parameters of each recipe.
        steps: (K) views of each rung, ascending.
        values: (R, K) validation AUC; NaN once a training has diverged.
        tested: (R, K) AUC on held-out slides.
        seconds: (R, K) of each rung alone, on one worker.
    """

    params: tuple[dict[str, Any], ...]
    steps: tuple[int, ...]
    values: NDArray[np.float64]
    tested: NDArray[np.float64]
    seconds: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.params)

    @property
    def best(self) -> float:
        """The best validation AUC at the last rung: regret is measured from it."""
        return float(np.nanmax(self.values[:, -1]))


def read_table(path: Path, space: SearchSpace) -> RungTable:
    """Read what record.py wrote.

    Raises:
        DataError: missing, cut off, or recipes with different rungs.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file))
        of_recipe: dict[int, list[dict[str, str]]] = {}
        for line in lines:
            of_recipe.setdefault(int(line["recipe"]), []).append(line)
        blocks = [sorted(block, key=lambda line: int(line["rung"])) for _, block in sorted(of_recipe.items())]
        steps = {tuple(int(line["views"]) for line in block) for block in blocks}
        (only,) = steps
        arrays = {
            name: np.array([[float(line[name] or "nan") for line in block] for block in blocks])
            for name in ("auc", "test_auc", "seconds")
        }
        params = tuple(params_of(block[0], space) for block in blocks)
    except (OSError, KeyError, ValueError) as fault:
        raise DataError(f"{path} is no table of rung results ({type(fault).__name__}: {str(fault)[:100]})") from None
    return RungTable(params, only, arrays["auc"], arrays["test_auc"], arrays["seconds"])


def params_of(line: Mapping[str, str], space: SearchSpace) -> dict[str, Any]:
    """The parameters of a line, as the space has them; those whose condition does not hold are absent."""
    found: dict[str, Any] = {}
    for name, parameter in space.parameters.items():
        text = line[name]
        if text == "":
            continue
        if parameter.kind == "choice":
            found[name] = next(choice for choice in parameter.choices if str(choice) == text)
        else:
            found[name] = int(text) if parameter.kind == "int" else float(text)
    return found


def nearest(table: RungTable, space: SearchSpace, params: Mapping[str, Any], *, without: Collection[int] = ()) -> int:
    """The recipe whose parameters are nearest: each in units of its range (of its logarithm, if so), 1 for another choice.

    Args:
        table: R recipes.
        space: of their parameters.
        params: those to be near to; a dimension that one side has and the other not counts 1.
        without: recipes that are not meant, fewer than R.
    """
    distances = np.zeros(len(table))
    for name, parameter in space.parameters.items():
        own = params.get(name)
        others = [one.get(name) for one in table.params]
        if parameter.kind == "choice":
            distances += np.array([float(other != own) for other in others])
            continue
        place = _places(parameter.low, parameter.high, parameter.log)
        absent = np.array([other is None for other in others])
        if own is None:
            distances += ~absent
            continue
        apart = (place(np.array([own if other is None else other for other in others], float)) - place(own)) ** 2
        distances += np.where(absent, 1.0, apart)
    distances[list(without)] = np.inf
    return int(np.argmin(distances))


def _places(low: float, high: float, log: bool) -> Any:
    ends = np.log([low, high]) if log else np.array([low, high])
    return lambda value: ((np.log(value) if log else value) - ends[0]) / (ends[1] - ends[0])


def planted(qualities: Sequence[float], steps: Sequence[int], noise: Sequence[float], seed: int) -> RungTable:
    """A table with known answers: value = quality + noise of the rung, seconds as the views, recipes of 1x to 3x the cost.

    Args:
        qualities: of each recipe.
        steps: views of each rung.
        noise: standard deviation at each rung.
        seed: of the noise and the costs.
    """
    rng = np.random.default_rng(seed)
    values = np.asarray(qualities)[:, None] + np.asarray(noise) * rng.normal(size=(len(qualities), len(steps)))
    cost = rng.uniform(1.0, 3.0, (len(qualities), 1))
    seconds = cost * np.diff([0, *steps]) / steps[0]
    return RungTable(tuple({} for _ in qualities), tuple(steps), values, values.copy(), seconds)
