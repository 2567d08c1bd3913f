"""How unlike two parameter sets are, and a choice of unlike ones. Pure functions; reads no study."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pcam_automl.search.dimension import Parameter, is_number

Params = Mapping[str, Any]


def distance(one: Params, other: Params, parameters: Mapping[str, Parameter]) -> float:
    """Gower's distance of two parameter sets, in [0, 1]: the mean over the dimensions of the share of the range between them.

    A choice counts 0 or 1, a range on its own scale (``log``). A dimension that only one of them has counts 1; one that
    neither has says nothing and is left out. Source: Gower, "A general coefficient of similarity", Biometrics 1971.
    """
    named = [name for name in parameters if name in one or name in other]
    parts = [
        _apart(one[name], other[name], parameters[name]) if name in one and name in other else 1.0 for name in named
    ]
    return sum(parts) / len(parts) if parts else 0.0


def pick_diverse(params: Sequence[Params], parameters: Mapping[str, Parameter], k: int) -> list[int]:
    """Up to ``k`` indices: the first (the best one), then always the one farthest from its nearest chosen one.

    Equal sets are chosen once. Of equally far ones the earlier (better) is taken.

    Args:
        params: parameter sets, the best first.
        parameters: the dimensions that they are compared in.
        k: at least 0.
    """
    if not params or k < 1:
        return []
    chosen = [0]
    nearest = [distance(params[0], one, parameters) for one in params]
    while len(chosen) < k:
        farthest = max(range(len(params)), key=lambda index: (nearest[index], -index))
        if nearest[farthest] == 0.0:
            break
        chosen.append(farthest)
        nearest = [
            min(before, distance(params[farthest], one, parameters))
            for before, one in zip(nearest, params, strict=True)
        ]
    return chosen


def _apart(one: Any, other: Any, parameter: Parameter) -> float:
    """In [0, 1]: 0 for equal values, 1 for the two ends of a range or two choices."""
    if one == other:
        return 0.0
    if parameter.kind == "choice" or not (is_number(one) and is_number(other)) or parameter.low == parameter.high:
        return 1.0
    scale = math.log if parameter.log else float
    span = scale(parameter.high) - scale(parameter.low)
    return min(1.0, abs(scale(one) - scale(other)) / span)
