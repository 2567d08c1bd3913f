from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import FrozenTrial, TrialState, create_trial

from pcam_automl.search.lineages import current_rows, lineages_of, not_superseded
from pcam_automl.search.promotion import (
    by_promise,
    paused_of,
    promotable,
    rung_ratio,
    seconds_to_next_rung,
    to_give_up,
)

STEPS = (100, 300, 900)


def row(
    number: int, lineage: str, values: dict[int, float], state: TrialState = TrialState.PRUNED, **attrs: object
) -> FrozenTrial:
    value = 0.5 if state in (TrialState.PRUNED, TrialState.COMPLETE) else None
    trial = create_trial(state=state, value=value, intermediate_values=values, user_attrs={"lineage": lineage, **attrs})
    trial.number = number
    return trial


def test_a_thaw_that_ended_by_an_error_leaves_its_lineage_paused_once() -> None:
    def failed(number: int, reason: str) -> FrozenTrial:
        return row(number, "a", {}, TrialState.FAIL, reason=reason, thawed_from=0)

    paused, error = row(0, "a", {100: 0.6}), "error: RuntimeError: CUDA error"
    (one,) = paused_of(lineages_of([paused, failed(1, error)]), STEPS)
    assert (one.rung, one.value) == (0, 0.6)
    assert paused_of(lineages_of([paused, failed(1, error), failed(2, error)]), STEPS) == []
    for reason in ("worker lost", "interrupted"):  # its slot is open, or it was given up
        assert paused_of(lineages_of([paused, failed(1, reason)]), STEPS) == []
    going = row(1, "a", {}, TrialState.RUNNING, thawed_from=0)
    assert paused_of(lineages_of([paused, going]), STEPS) == []
    further = row(2, "a", {100: 0.6, 300: 0.7})
    assert paused_of(lineages_of([paused, failed(1, error), further, failed(3, error)]), STEPS)[0].rung == 1


def test_a_lineage_is_one_recipe_whatever_rows_it_took() -> None:
    rows = [
        row(0, "0", {100: 0.6}),
        row(1, "1", {}, TrialState.FAIL),
        row(2, "1", {100: 0.5}),
        row(3, "0", {100: 0.6, 300: 0.7}, thawed_from=0),
    ]
    first, second = lineages_of(rows)
    assert first.values == {100: 0.6, 300: 0.7}
    assert (first.last.number, second.last.number) == (3, 2)
    assert first.attr("thawed_from") == 0
    assert [trial.number for trial in current_rows(rows)] == [2, 3]
    assert [trial.number for trial in not_superseded(rows)] == [1, 2, 3]  # the failed one stays


def test_only_rows_that_stopped_before_the_last_rung_are_paused() -> None:
    rows = [
        row(0, "a", {100: 0.6}),
        row(1, "b", {100: 0.6, 300: 0.7, 900: 0.8}, TrialState.COMPLETE),
        row(2, "c", {100: 0.6}, TrialState.RUNNING),
        row(3, "d", {100: 0.6}, TrialState.FAIL),
        row(4, "e", {}),
        row(5, "f", {100: math.nan}),
        row(6, "g", {100: 0.4}, reason="diverged: the loss became nan"),
        row(7, "h", {100: 0.4, 300: 0.5}),
    ]
    assert [(one.lineage.name, one.rung) for one in paused_of(lineages_of(rows), STEPS)] == [("a", 0), ("h", 1)]


def test_a_lineage_is_promoted_once_it_is_among_the_best_third_of_its_rung() -> None:
    rows = [row(number, str(number), {100: value}) for number, value in enumerate((0.5, 0.9, 0.7, 0.6, 0.8))]
    lineages = lineages_of(rows)
    assert [one.lineage.name for one in promotable(paused_of(lineages, STEPS), lineages, STEPS)] == ["1"]
    lineages = lineages_of([*rows, row(5, "5", {100: 0.1})])  # of six the best two
    assert [one.lineage.name for one in promotable(paused_of(lineages, STEPS), lineages, STEPS)] == ["1", "4"]
    smallest = promotable(paused_of(lineages, STEPS), lineages, STEPS, sign=-1.0)
    assert [one.lineage.name for one in smallest] == ["5", "0"]


def test_a_lineage_that_was_promoted_keeps_its_place_at_the_rung_below() -> None:
    rows = [row(n, str(n), {100: value}) for n, value in enumerate((0.9, 0.8, 0.7, 0.6))]
    rows.append(row(4, "0", {100: 0.9, 300: 0.95}))
    lineages = lineages_of(rows)
    assert (
        promotable(paused_of(lineages, STEPS), lineages, STEPS) == []
    )  # of four at the first rung one, and that is "0"


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(2, 5))
def test_never_more_than_the_eta_th_part_is_promotable_without_ties(values: list[float], eta: int) -> None:
    distinct = sorted(set(values))
    lineages = lineages_of([row(n, str(n), {100: value}) for n, value in enumerate(distinct)])
    found = promotable(paused_of(lineages, STEPS), lineages, STEPS, eta=eta)
    assert [one.value for one in found] == distinct[::-1][: len(distinct) // eta]


def test_the_furthest_goes_first_then_the_best() -> None:
    rows = [row(0, "a", {100: 0.9}), row(1, "b", {100: 0.5, 300: 0.6}), row(2, "c", {100: 0.95})]
    assert [one.lineage.name for one in by_promise(paused_of(lineages_of(rows), STEPS))] == ["b", "c", "a"]


def test_a_rung_trains_again_what_the_decay_branch_before_it_had() -> None:
    assert rung_ratio(STEPS, 0, 0.2) == pytest.approx((300 - 80) / 100)
    assert rung_ratio(STEPS, 1, 0.2) == pytest.approx((900 - 240) / (300 - 80))
    assert rung_ratio(STEPS, 0, 0.0) == pytest.approx(2.0)
    (one,) = paused_of(lineages_of([row(0, "a", {100: 0.9}, rungs=[{"seconds": 2.0}])]), STEPS)
    assert seconds_to_next_rung(one, STEPS, 0.2) == pytest.approx(4.4)
    (unknown,) = paused_of(lineages_of([row(0, "a", {100: 0.9})]), STEPS)
    assert seconds_to_next_rung(unknown, STEPS, 0.2) == math.inf


def test_the_least_promising_checkpoints_go_first_and_only_as_many_as_must() -> None:
    rows = [row(n, str(n), {100: value}) for n, value in enumerate((0.5, 0.9, 0.7))]
    rows.append(row(3, "3", {100: 0.1}, TrialState.RUNNING))
    held = [(str(n), 10) for n in range(4)] + [("left behind", 10)]
    lineages = lineages_of(rows)
    assert to_give_up(held, lineages, STEPS, quota_bytes=50) == []
    assert to_give_up(held, lineages, STEPS, quota_bytes=49) == ["left behind"]
    assert to_give_up(held, lineages, STEPS, quota_bytes=25) == ["left behind", "0", "2"]
    assert to_give_up(held, lineages, STEPS, quota_bytes=0) == ["left behind", "0", "2", "1"]  # never a running one's
    assert to_give_up(held, lineages, STEPS, quota_bytes=0, keep=("1",)) == ["left behind", "0", "2"]
