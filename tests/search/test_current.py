from __future__ import annotations

from typing import Any

import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from pcam_automl.search.current import CurrentStudy, superseded
from pcam_automl.search.sampler import build_sampler

SPACE: dict[str, BaseDistribution] = {
    "lr": FloatDistribution(1e-4, 1e-2, log=True),
    "optimizer": CategoricalDistribution(["adamw", "sgd"]),
}


def row(number: int, lineage: str | None, state: TrialState, value: float = 0.5) -> FrozenTrial:
    params: dict[str, Any] = {"lr": 1e-4 * (1 + number % 90), "optimizer": ("adamw", "sgd")[number % 2]}
    trial = create_trial(
        state=state,
        value=value if state == TrialState.COMPLETE else None,
        params=params,
        distributions=SPACE,
        intermediate_values={1: value},
        user_attrs={} if lineage is None else {"lineage": lineage},
    )
    trial.number = number
    return trial


def study_of(rows: list[FrozenTrial]) -> optuna.Study:
    study = optuna.create_study(direction="maximize")
    study.add_trials(rows)
    return study


def proposal(study: optuna.Study, name: str, number: int) -> dict[str, Any]:
    """What the sampler proposes for trial ``number``, whatever number the study would give it."""
    sampler = build_sampler(name, 5)
    trial = create_trial(state=TrialState.RUNNING)
    trial.number, trial._trial_id = number, study.ask()._trial_id
    sampler.before_trial(study, trial)
    space = sampler.infer_relative_search_space(study, trial)
    found = sampler.sample_relative(study, trial, space)
    return found | {n: sampler.sample_independent(study, trial, n, SPACE[n]) for n in SPACE if n not in found}


@pytest.mark.parametrize("name", ["tpe", "gp"])
def test_proposal_with_a_superseded_row_is_the_proposal_without_it(name: str) -> None:
    rows = [row(i, f"{i}", TrialState.COMPLETE, 0.5 + 0.01 * (i * 7 % 20)) for i in range(16)]
    paused = row(16, "16", TrialState.PRUNED, 0.9)
    thawed = in_another_state(paused, state=TrialState.COMPLETE, value=0.95)
    without, with_it = study_of([*rows, thawed]), study_of([*rows, paused, thawed])
    assert proposal(without, name, 40) == proposal(with_it, name, 40)
    both_counted = study_of([*rows, row(16, "other", TrialState.COMPLETE, 0.9), thawed])
    assert proposal(without, name, 40) != proposal(both_counted, name, 40)  # so that equality says something


def in_another_state(trial: FrozenTrial, **changes: Any) -> FrozenTrial:
    """The same parameters and lineage in another state."""
    return create_trial(
        params=trial.params,
        distributions=trial.distributions,
        user_attrs=trial.user_attrs,
        intermediate_values=trial.intermediate_values,
        **changes,
    )


@pytest.mark.parametrize(
    ("states", "hidden"),
    [
        (["PRUNED", "COMPLETE"], {0}),  # thawed and finished
        (["PRUNED", "RUNNING"], {1}),  # while the thaw runs, what is known stands
        (["PRUNED", "FAIL"], {1}),  # a thaw that was interrupted
        (["FAIL", "RUNNING"], {0}),  # a retry
        (["FAIL", "FAIL"], {0}),
        (["PRUNED", "PRUNED", "FAIL", "COMPLETE"], {0, 1, 2}),
        (["COMPLETE"], set()),
    ],
)
def test_newest_finished_row_stands_for_a_lineage_else_the_newest(states: list[str], hidden: set[int]) -> None:
    rows = [row(number, "a", TrialState[state]) for number, state in enumerate(states)]
    alone = [row(len(rows) + i, None, TrialState.COMPLETE) for i in range(3)]
    assert superseded([*rows, *alone]) == hidden


def test_view_hides_the_rows_from_both_readers_and_passes_the_rest_on() -> None:
    study = study_of([row(0, "a", TrialState.PRUNED), row(1, "a", TrialState.COMPLETE), row(2, "b", TrialState.PRUNED)])
    view = CurrentStudy(study)
    assert [trial.number for trial in view.get_trials()] == [1, 2]
    assert [trial.number for trial in view._get_trials(states=(TrialState.PRUNED,), use_cache=True)] == [2]
    assert view.direction == study.direction
    assert view._study_id == study._study_id


def test_a_view_is_of_one_moment_and_the_next_one_shows_what_was_added() -> None:
    study = study_of([row(0, "a", TrialState.PRUNED), row(1, "a", TrialState.COMPLETE)])
    view = CurrentStudy(study)
    view.get_trials()
    study.add_trial(row(2, "b", TrialState.COMPLETE))
    assert [trial.number for trial in view.get_trials()] == [1]
    assert [trial.number for trial in CurrentStudy(study).get_trials()] == [1, 2]
