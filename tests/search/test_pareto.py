"""The front against brute force, the knee against its definition, which trials count."""

from __future__ import annotations

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import FrozenTrial, TrialState

from pcam_automl.errors import StudyError
from pcam_automl.goals import AUC, goal_of
from pcam_automl.search.pareto import PARAMETERS, knee_of, pareto_front, pick_knee, tradeoff_of

few_levels = st.integers(0, 6)  # so that equal values, equal costs and equal points are common
points = st.lists(st.tuples(few_levels, few_levels), max_size=25)


def arrays(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([v for v, _ in pairs], np.float64), np.array([c for _, c in pairs], np.float64)


def dominated(i: int, gain: np.ndarray, cost: np.ndarray) -> bool:
    return any(
        gain[j] >= gain[i] and cost[j] <= cost[i] and (gain[j] > gain[i] or cost[j] < cost[i]) for j in range(len(gain))
    )


@given(points, st.booleans())
def test_front_is_what_comparing_every_pair_leaves(pairs: list[tuple[int, int]], maximize: bool) -> None:
    values, costs = arrays(pairs)
    gain = values if maximize else -values
    expected = {i for i in range(len(pairs)) if not dominated(i, gain, costs)}
    front = pareto_front(values, costs, maximize=maximize)
    assert set(front.tolist()) == expected
    assert len(front) == len(expected)
    assert (np.diff(costs[front]) >= 0).all()
    assert (np.diff(gain[front]) >= 0).all()


@given(points, st.booleans(), st.floats(0.1, 50), st.floats(0.1, 50))
def test_knee_is_the_front_point_farthest_from_the_chord_in_any_unit(
    pairs: list[tuple[int, int]], maximize: bool, value_unit: float, cost_unit: float
) -> None:
    values, costs = arrays(pairs)
    knee = knee_of(values, costs, maximize=maximize)
    if not pairs:
        assert knee is None
        return
    assert knee is not None
    front = pareto_front(values, costs, maximize=maximize)
    assert knee in front
    scaled = knee_of(values * value_unit, costs * cost_unit, maximize=maximize)
    assert scaled is not None
    assert (values[scaled], costs[scaled]) == (values[knee], costs[knee])
    first, last = front[0], front[-1]
    span = abs(values[last] - values[first]), costs[last] - costs[first]
    if min(span) == 0:
        return
    # distance from the chord between (0, 0) and (1, 1), by the cross product
    x, y = (costs[front] - costs[first]) / span[1], np.abs(values[front] - values[first]) / span[0]
    distance = (y - x) / np.sqrt(2)
    own = distance[front.tolist().index(knee)]
    assert own == pytest.approx(max(distance.max(), 0.0))


def test_knee_of_a_bent_front_is_its_bend_and_of_a_straight_one_its_best() -> None:
    values, costs = np.array([0.90, 0.97, 0.98, 0.985, 0.5]), np.array([1.0, 2.0, 10.0, 40.0, 60.0])
    assert knee_of(values, costs, maximize=True) == 1
    assert knee_of(-values, costs, maximize=False) == 1
    assert knee_of(np.array([0.1, 0.2, 0.3]), np.array([1.0, 2.0, 3.0]), maximize=True) == 2


def trial(number: int, value: float | None, state: TrialState = TrialState.COMPLETE, **attrs: object) -> FrozenTrial:
    made = optuna.create_trial(state=state, value=value, user_attrs={"device": "cpu", **attrs})
    made.number = number
    return made


def test_trials_that_are_not_complete_not_timed_or_of_another_device_do_not_count() -> None:
    trials = [
        trial(0, 0.9, latency_ms=1.0),
        trial(1, 0.95, latency_ms=2.0),
        trial(2, 0.99, latency_ms=0.1, device="cuda:0"),
        trial(3, 0.99),
        trial(4, 0.99, TrialState.PRUNED, latency_ms=0.1),
    ]
    found = tradeoff_of(trials, AUC)
    assert [t.number for t in found.trials] == [0, 1]
    assert (found.device, found.n_left_out) == ("cpu", 2)
    assert found.front.tolist() == [0, 1]


def test_latencies_of_two_models_of_cpu_do_not_compare() -> None:
    cores = "x86_64 CPU, 2 threads"
    trials = [
        trial(0, 0.90, latency_ms=9.0, device=cores, cpu="slow model"),
        trial(1, 0.95, latency_ms=2.0, device=cores, cpu="quick model"),
        trial(2, 0.92, latency_ms=8.0, device=cores, cpu="slow model"),
    ]
    found = tradeoff_of(trials, AUC)
    assert [t.number for t in found.trials] == [0, 2]
    assert (found.device, found.n_left_out) == (f"{cores}, slow model", 1)


def test_a_lineage_counts_once_with_its_last_row() -> None:
    trials = [
        trial(0, 0.99, latency_ms=1.0, lineage="0"),
        trial(1, 0.9, latency_ms=1.0, lineage="0", thawed_from=0),
        trial(2, 0.95, latency_ms=1.0, lineage="2"),
    ]
    assert [t.number for t in tradeoff_of(trials, AUC).trials] == [1, 2]


def test_parameters_compare_across_devices() -> None:
    trials = [trial(0, 0.9, n_parameters=10), trial(1, 0.8, n_parameters=5, device="cuda:0")]
    found = tradeoff_of(trials, AUC, PARAMETERS)
    assert (found.front.tolist(), found.device) == ([1, 0], None)


def test_the_knee_is_picked_with_what_it_gives_up() -> None:
    trials = [trial(n, v, latency_ms=c) for n, (v, c) in enumerate([(0.5, 1.0), (0.12, 2.0), (0.10, 40.0)])]
    picked = pick_knee(trials, goal_of("log_loss"))
    assert picked.trial.number == 1
    assert "2.00 ms a patch instead of 40.00, for 0.0200 less quality (log-loss 0.1200)" in picked.why
    assert pick_knee(trials[:1], AUC).trial.number == 0


def test_without_latencies_there_is_no_knee_to_pick() -> None:
    with pytest.raises(StudyError, match="--pick knee needs complete trials with a measured latency_ms"):
        pick_knee([trial(0, 0.9)], AUC)
