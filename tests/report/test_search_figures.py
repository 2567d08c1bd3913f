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


@pytest.mark.parametrize(
    "values",
    [(0.9, 0.96), (0.9, 0.9995), (0.9, 1.0), (0.92, 1.0), (0.94, 1.0), (0.962, 0.965, 0.968), (0.97,), (1.0, 1.0)],
)
@pytest.mark.parametrize("stopped", [(), (0.23,), (0.23, 0.4, 0.5, 0.6, 0.7)])
def test_near_one_the_history_counts_errors_and_loses_no_mark(
    values: tuple[float, ...], stopped: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    import pcam_automl.report.search_figures as module

    drawn: list[Any] = []
    monkeypatch.setattr(module, "picture", lambda figure, *_, **__: drawn.append(figure.axes[0]))
    study = optuna.create_study(direction="maximize")
    for rung, value in enumerate(stopped):  # each at another one
        steps = {100 * (step + 1): value for step in range(rung + 1)}
        study.add_trial(create_trial(state=P, intermediate_values=steps, user_attrs={"lineage": f"p{rung}"}))
    for number, value in enumerate(values):
        study.add_trial(row(C, value, str(number), 10))
    history_figure(study.get_trials(), AUC)
    (axes,) = drawn
    low, high = axes.get_ylim()
    marks = np.concatenate([dots.get_offsets() for dots in axes.collections])
    assert len(marks) == len(values) + len(stopped), "a mark each"
    assert ((marks[:, 1] >= low) & (marks[:, 1] <= high)).all(), "all of them inside"
    heights = axes.transData.transform(marks)[:, 1]
    expected = np.array([*stopped, *values])
    assert np.isfinite(heights).all()
    for one in range(len(marks)):
        for other in range(len(marks)):
            if expected[one] < expected[other]:
                assert heights[one] < heights[other], "higher is better"
    ticks = axes.get_yticks()
    assert len([tick for tick in ticks if low <= tick <= high]) >= 1
    places = axes.transData.transform(np.stack([np.zeros(len(ticks)), ticks], axis=1))[:, 1]
    assert (np.diff(places) > 0).all(), "ticks in their order, none on another"


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
