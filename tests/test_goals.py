"""Objectives: what they read of a rung, and which way is better."""

from __future__ import annotations

import pytest

from pcam_automl.errors import InputError
from pcam_automl.goals import goal_of
from pcam_automl.training.engine import RungResult

RESULT = RungResult(0, 10, 10, 0.9, 0.3, 0.5, 1.0, 10.0, 1e-3, worst_domain_auc=0.8)


@pytest.mark.parametrize(
    ("name", "value", "direction", "best"),
    [
        ("auc", 0.9, "maximize", 3.0),
        ("worst_domain_auc", 0.8, "maximize", 3.0),
        ("log_loss", 0.3, "minimize", 1.0),
    ],
)
def test_an_objective_reads_its_figure_and_knows_its_direction(
    name: str, value: float, direction: str, best: float
) -> None:
    goal = goal_of(name)
    assert (goal.value_of(RESULT), goal.direction, goal.best([1.0, 3.0, 2.0])) == (value, direction, best)
    assert max([1.0, 3.0, 2.0], key=lambda v: goal.sign * v) == best


def test_an_unknown_objective_is_refused_with_a_suggestion() -> None:
    with pytest.raises(InputError, match=r"--objective must be one of .* got 'logloss' \(did you mean log_loss\?\)"):
        goal_of("logloss")
