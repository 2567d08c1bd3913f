"""What the report counts: recipes that were tried, however many rows they took."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState, create_trial

from pcam_automl.goals import AUC
from pcam_automl.report.search_figures import _best_table, _facts, _positions, history_figure
from pcam_automl.report.tradeoff_figure import front_table
from pcam_automl.search.lineages import seconds_of_lineages
from pcam_automl.search.pareto import tradeoff_of

C, P, F = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL


def row(state: TrialState, value: float | None, lineage: str, seconds: float, **attrs: Any) -> Any:
    reported = {} if value is None else {100: value}
    attrs |= {"lineage": lineage, "seconds": seconds, "recipe": "{}"}
    held = value if state is C else None
    return create_trial(state=state, value=held, intermediate_values=reported, user_attrs=attrs)


@pytest.fixture
def study() -> optuna.Study:
    """One recipe paused, thawed, paused, thawed and complete; one stopped early; one interrupted and complete."""
    study = optuna.create_study(direction="maximize")
    study.add_trial(row(P, 0.7, "0", 10))
    study.add_trial(row(P, 0.6, "1", 10))
    study.add_trial(row(P, 0.8, "0", 20, thawed_from=0))
    study.add_trial(row(F, None, "3", 5))
    study.add_trial(row(C, 0.85, "3", 30))
    study.add_trial(row(C, 0.9, "0", 40, thawed_from=2))
    return study


def test_a_thawed_recipe_counts_once_and_took_all_its_seconds(study: optuna.Study) -> None:
    trials = study.get_trials()
    complete = [trial for trial in trials if trial.state is C]
    assert seconds_of_lineages(trials) == {"0": 70.0, "1": 10.0, "3": 35.0}
    facts = {text: value for value, text in _facts(trials, complete, AUC).facts}
    assert (facts["complete trials"], facts["stopped early"]) == ("2", "1")
    table = _best_table(complete, "crop_size", AUC, seconds_of_lineages(trials))
    assert [(cells[0], cells[-1]) for cells in table.rows] == [("5", "70"), ("4", "35")]


def test_the_history_draws_no_cross_for_what_went_on(study: optuna.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    import pcam_automl.report.search_figures as module

    drawn: list[Any] = []
    monkeypatch.setattr(module, "picture", lambda figure, *_, **__: drawn.append(figure.axes[0]))
    history_figure(study.get_trials(), AUC)
    crosses = next(dots for dots in drawn[0].collections if str(dots.get_label()).startswith("stopped at rung 1"))
    assert crosses.get_offsets().tolist() == [[1.0, 0.6]]
    line = drawn[0].lines[-1]
    assert line.get_xdata()[-1] == 5
    assert drawn[0].get_yscale() == "linear"


@pytest.mark.parametrize("best", [0.96, 0.9995, 1.0])
def test_near_one_the_history_counts_errors_and_loses_no_dot(best: float, monkeypatch: pytest.MonkeyPatch) -> None:
    import pcam_automl.report.search_figures as module

    drawn: list[Any] = []
    monkeypatch.setattr(module, "picture", lambda figure, *_, **__: drawn.append(figure.axes[0]))
    study = optuna.create_study(direction="maximize")
    for number, (state, value) in enumerate(((P, 0.23), (C, 0.9), (C, best))):
        study.add_trial(row(state, value, str(number), 10))
    history_figure(study.get_trials(), AUC)
    (axes,) = drawn
    assert axes.get_yscale() == "function"
    low, high = axes.get_ylim()
    assert low < 0.23
    drawn_at = max(dots.get_offsets()[:, 1].max() for dots in axes.collections)
    assert drawn_at == pytest.approx(best, abs=0.04 if best == 1.0 else 1e-9)
    assert 0.9 < drawn_at < high
    heights = [axes.transData.transform((0, value))[1] for value in (low, 0.23, 0.9, drawn_at, high)]
    assert heights == sorted(heights), "higher is better"
    assert all(np.isfinite(heights))
    assert len(axes.get_yticks()) >= 3


def test_choices_that_are_numbers_stand_in_their_order_on_the_axis() -> None:
    space = {"batch_size": CategoricalDistribution([32, 64, 128, 256])}
    trials = [
        create_trial(state=C, value=0.9, params={"batch_size": size}, distributions=space) for size in (128, 32, 64)
    ]
    heights, ticks = _positions(trials, "batch_size")
    assert heights.tolist() == [1.0, 0.0, 0.5]
    assert ticks == [(0.0, "32"), (0.5, "64"), (1.0, "128")]


def test_the_front_names_a_backbone_that_the_space_fixes() -> None:
    attrs = {"latency_ms": 2.0, "device": "cpu", "recipe": json.dumps({"backbone": "resnet18"})}
    trial = create_trial(state=C, value=0.9, user_attrs=attrs)
    table = front_table(tradeoff_of([trial], AUC), AUC)
    assert table.rows[0][1] == "resnet18"
