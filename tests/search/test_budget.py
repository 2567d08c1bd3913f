from __future__ import annotations

import json
import re
import time
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import TrialState, create_trial

import pcam_automl.search.budget as budget_module
from pcam_automl.errors import OutOfTime
from pcam_automl.search.budget import (
    BESIDE_STEPS,
    BRANCHES,
    CONFIRM_SHARE,
    FEW,
    FINAL_SHARE,
    FIRST_SHARE,
    N_SHORT,
    ROW_S,
    SHORT_SHARE,
    BudgetClock,
    ShortSearch,
    bracket_cost,
    budget_of,
    final_seconds,
    n_test_views,
    plan_budget,
    set_budget,
    short_search,
    too_late,
    too_many_to_predict,
    typical_trial_s,
    was_short,
)
from pcam_automl.search.ledger import (
    RUN_KEY,
    Interval,
    Ledger,
    Parts,
    added_by,
    intervals_of,
    spent_parts,
    spent_s,
    union_seconds,
)
from pcam_automl.search.worker import _plan_anew


@given(st.floats(10, 1e6), st.floats(0, 60), st.floats(0, 0.6))
def test_the_parts_of_a_budget_make_the_whole(total_s: float, used_s: float, predicted: float) -> None:
    plan = plan_budget(total_s, used_s=used_s, predict_s=predicted * total_s)
    assert plan.final_s >= plan.predict_s == predicted * total_s
    assert plan.search_s + plan.confirm_s + plan.final_s == pytest.approx(total_s)
    assert plan.trial_s > 0
    assert plan.n_started >= 1


def test_longer_trials_are_fewer() -> None:
    plan = plan_budget(360.0, used_s=20.0)
    assert plan.free_s == pytest.approx(0.3 * 360.0 - 20.0)
    assert plan.whole_s == plan.trial_s
    longer = plan.with_trial(1.5 * plan.trial_s)
    assert (longer.trial_s, longer.whole_s) == (plan.trial_s, 1.5 * plan.trial_s)
    assert longer.n_started < plan.n_started
    assert plan.with_trial(10 * plan.free_s).n_started == 1
    mixed = plan.with_trial(plan.trial_s, mean_s=1.5 * plan.trial_s)
    assert mixed.whole_s == plan.trial_s
    assert longer.n_started <= mixed.n_started < plan.n_started
    assert plan.with_trial(plan.trial_s, mean_s=plan.trial_s) == plan


@given(st.floats(60, 1e5), st.floats(0, 40), st.floats(1, 1e4))
def test_a_search_of_few_trials_from_scratch_is_cut_down_for_the_final_training(
    total_s: float, used_s: float, whole_s: float
) -> None:
    whole = plan_budget(total_s, used_s=used_s)
    plan = plan_budget(total_s, used_s=used_s, may_be_short=True)
    assert plan.short == (whole.n_started < FEW)
    if not plan.short:
        assert plan == whole
        return
    for n in (1, N_SHORT):
        plan = plan_budget(total_s, used_s=used_s, may_be_short=True).with_trial(whole_s, n_short=n)
        assert plan.search_s + plan.final_s == pytest.approx(total_s)
        assert (plan.n_started, plan.confirm_s) == (n, 0.0)
        wanted_s = min(SHORT_SHARE * total_s, whole_s + (n - 1) * plan.cap_s)
        assert plan.search_s - used_s >= wanted_s - 1e-6 or plan.search_s == pytest.approx(total_s)
        assert plan.search_s - used_s <= wanted_s + n * ROW_S + 1e-6


def test_a_final_training_that_has_enough_leaves_the_search_its_time() -> None:
    assert plan_budget(60.0, used_s=0.0, may_be_short=True).short
    assert not plan_budget(60.0, used_s=0.0, images_per_s=1e5, n_final=100, may_be_short=True).short


def test_a_short_search_keeps_its_end_and_only_for_its_own_budget() -> None:
    plan = plan_budget(180.0, used_s=12.0, may_be_short=True).with_trial(10.0)
    short = short_search(asdict(plan), 180.0)
    assert short == ShortSearch(N_SHORT, pytest.approx(12.0 + SHORT_SHARE * 180.0))
    assert short.seconds > plan.search_s + 1.0, "a first trial slower than planned leaves the second its turn"
    assert short_search(asdict(plan), 360.0) is None
    assert short_search(asdict(plan), None) is None
    assert short_search(asdict(plan_budget(180.0, used_s=12.0)), 180.0) is None
    assert short_search(None, 180.0) is None
    clock = BudgetClock(180.0, 0.0, time.monotonic(), 1000, short=short)
    clock.learn(create_trial(state=TrialState.COMPLETE, value=0.9, user_attrs={"images_per_s": 10_000.0}))
    assert clock.left_s() == pytest.approx(short.seconds, abs=1.0)
    assert clock.left_for_rungs_s() > clock.left_s()
    whole = BudgetClock(180.0, 0.0, time.monotonic(), 1000)
    assert whole.left_for_rungs_s() == pytest.approx(whole.left_s(), abs=1.0)


def test_a_short_search_has_one_rung_and_ends_in_time_unless_start_up_was_slow() -> None:
    for used_s, n_rungs in ((12.0, 1), (80.0, 1), (84.0, 3), (120.0, 3)):
        plan = plan_budget(180.0, used_s=used_s, may_be_short=True).with_trial(10.0)
        assert plan.n_rungs == n_rungs
        short = short_search(asdict(plan), 180.0)
        assert short is not None
        assert plan.search_s <= short.seconds <= max(plan.search_s, FIRST_SHARE * 180.0)
    assert plan_budget(180.0, used_s=12.0).n_rungs == 3
    early = {key: value for key, value in asdict(plan).items() if key != "used_s"}
    assert short_search(early, 180.0) == ShortSearch(N_SHORT, plan.search_s), "kept by a study of before"


def test_a_short_search_was_one_until_its_budget_is_raised_or_trials_are_added() -> None:
    planned = asdict(plan_budget(180.0, used_s=12.0, may_be_short=True))
    study = optuna.create_study()
    assert not was_short(study, planned), "without a budget"
    set_budget(study, 180.0)
    for number in range(N_SHORT):
        assert was_short(study, planned)
        study.add_trial(create_trial(state=TrialState.COMPLETE, value=0.9, user_attrs={"lineage": str(number)}))
    assert was_short(study, planned)
    assert not was_short(study, asdict(plan_budget(180.0, used_s=12.0)))
    assert not was_short(study, None)
    study.add_trial(create_trial(state=TrialState.COMPLETE, value=0.9, user_attrs={"lineage": "more"}))
    assert not was_short(study, planned)


def test_trials_that_are_asked_for_are_planned_with() -> None:
    by_time = plan_budget(7200.0, used_s=20.0)
    assert by_time.n_started > 20
    five = plan_budget(7200.0, used_s=20.0, n_trials=5)
    assert five.n_started == 5
    assert five.trial_s == pytest.approx(five.free_s / (BESIDE_STEPS * (3 + 2 * bracket_cost(3)[0] / 9)))
    assert five.trial_s > 1.3 * by_time.trial_s
    assert five.with_trial(five.trial_s).n_started == 5
    one = plan_budget(1000.0, used_s=20.0, n_trials=1)
    assert (one.n_started, one.trial_s) == (1, pytest.approx(one.free_s / BESIDE_STEPS))
    assert plan_budget(7200.0, used_s=20.0, n_trials=1000) == replace(by_time, n_trials=1000)
    side_by_side = plan_budget(7200.0, used_s=20.0, n_trials=10, n_workers=2)
    assert (side_by_side.n_started, side_by_side.trial_s) == (10, five.trial_s)
    short, two = (plan_budget(180.0, used_s=12.0, may_be_short=True, n_trials=n).with_trial(10.0) for n in (1, 2))
    assert (short.short, short.n_started) == (True, N_SHORT), "a second one may be asked for later"
    assert short.search_s < two.search_s


@pytest.mark.parametrize("n_rungs", [1, 2, 3, 4])
@pytest.mark.parametrize("n_trials", [1, 2, 3, 5, 10, 20])
def test_as_many_trials_fit_as_are_asked_for(n_rungs: int, n_trials: int) -> None:
    """A whole trial takes half as long again as its steps, two run through, and the last begins only while a whole one would fit."""
    plan = plan_budget(7200.0, used_s=20.0, n_trials=n_trials, n_rungs=n_rungs)
    whole_s, cost = BESIDE_STEPS * plan.trial_s, bracket_cost(n_rungs)[0] / 9
    spent_s, begun = 0.0, 0
    while begun < n_trials and plan.free_s - spent_s >= 0.999 * whole_s:
        spent_s += whole_s * (1.0 if begun < 2 else cost)
        begun += 1
    assert begun >= min(n_trials, 10), "or as many as there is time for"


def test_a_bracket_costs_what_its_rungs_do() -> None:
    assert bracket_cost(1) == (9.0, 9.0)
    assert bracket_cost(2) == (pytest.approx(BRANCHES * (9 / 3 + 3 * 2 / 3)), 12.0)
    assert bracket_cost(3) == (pytest.approx(BRANCHES * (1 + 2 / 3 + 2 / 3)), 13.0)
    with_two, with_three = (plan_budget(7200.0, used_s=20.0, n_rungs=n) for n in (2, 3))
    assert with_two.n_rungs == 2
    assert with_two.trial_s < with_three.trial_s, "each of so many costs more of a whole one"
    assert plan_budget(7200.0, used_s=20.0, n_rungs=4).trial_s == with_three.trial_s, (
        "the first two are whole ones all the same"
    )


def test_what_the_prediction_needs_is_not_the_first_trial_s() -> None:
    """It may take 40 % of a budget; a first trial until 70 % of the whole would leave it 30."""
    began = time.monotonic()
    clock = BudgetClock(100.0, spent_s=0.6 * FIRST_SHARE * 100 - 2, began=began, n_final=0, predict_s=40.0)
    assert not clock.is_over_for_first
    late = BudgetClock(100.0, spent_s=0.6 * FIRST_SHARE * 100 + 2, began=began, n_final=0, predict_s=40.0)
    assert late.is_over_for_first
    assert too_late(100.0, 41.0, 40.0) is None
    assert too_late(100.0, 43.0, 40.0) is not None
    assert too_late(100.0, 43.0) is None


def test_of_the_search_s_part_the_used_share_grows_from_nothing_to_all() -> None:
    shares = [
        BudgetClock(100.0, spent_s=spent, began=time.monotonic(), n_final=0).used_share() for spent in (0.0, 15.0, 30.0)
    ]
    assert shares == pytest.approx([0.0, 0.5, 1.0], abs=0.02)


def test_a_longer_budget_has_longer_trials_up_to_ten_minutes() -> None:
    trials = [plan_budget(60.0 * minutes, used_s=20.0).trial_s for minutes in (3, 6, 15, 60, 6000)]
    assert trials == sorted(trials)
    assert trials[-1] == 600.0


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), max_size=8))
def test_overlapping_intervals_count_once(pairs: list[tuple[int, int]]) -> None:
    seconds = {second for began, n in pairs for second in range(began, began + n)}
    assert union_seconds(Interval("search", began, n) for began, n in pairs) == len(seconds)


def test_of_a_search_that_finalized_at_its_end_both_parts_are_said() -> None:
    chained = [Interval("finalize", 0.0, 100.0), Interval("search", 0.0, 30.0), Interval("finalize", 200.0, 5.0)]
    assert added_by(chained) == [("search", 30.0), ("finalize", 70.0), ("finalize", 5.0)]


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), max_size=8))
def test_the_parts_make_the_whole(pairs: list[tuple[int, int]]) -> None:
    intervals = [Interval("search", began, n) for began, n in pairs]
    assert sum(seconds for _, seconds in added_by(intervals)) == union_seconds(intervals)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20), st.booleans(), st.floats(0, 1)), max_size=8))
def test_search_confirmations_and_final_training_make_what_is_spent(
    runs: list[tuple[int, int, bool, float]],
) -> None:
    intervals = [
        Interval("finalize" if final else "worker", began, n, share * n if final else 0.0)
        for began, n, final, share in runs
    ]
    parts = spent_parts(intervals)
    assert min(asdict(parts).values()) >= 0.0
    assert sum(asdict(parts).values()) == pytest.approx(union_seconds(intervals))
    if not any(final for _, _, final, _ in runs):
        assert (parts.confirm_s, parts.final_s) == (0.0, 0.0)


def test_of_two_finalizes_the_confirmations_are_told_from_the_training() -> None:
    runs = [
        Interval("search", 0, 30),
        Interval("finalize", 0, 50, 15),  # after that search, in one process; cut off while it confirmed
        Interval("finalize", 90, 25, 5),
    ]
    assert spent_parts(runs) == Parts(30.0, 20.0, 25.0)


def test_a_ledger_tells_its_confirmations_apart_and_an_early_entry_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    study, now = optuna.create_study(), [100.0]
    monkeypatch.setattr(budget_module.time, "monotonic", lambda: now[0])

    def noted() -> tuple[float, float]:
        ledger.note()
        (entry,) = intervals_of(study)
        return entry.seconds, entry.confirm_s

    ledger = Ledger(study, "finalize", since=97.0)
    ledger.confirmed()  # none was trained
    assert noted() == (3.0, 0.0)
    ledger.confirming(2.0)
    now[0] = 104.0
    assert noted() == (7.0, 5.0)
    ledger.confirming(6.0)  # the next one
    now[0] = 105.0
    ledger.confirmed()
    now[0] = 120.0
    assert noted() == (23.0, 6.0)
    study.set_user_attr(f"{RUN_KEY}early", json.dumps({"command": "finalize", "began": 0.0, "seconds": 4.0}))
    assert intervals_of(study)[0] == Interval("finalize", 0.0, 4.0, 0.0)


def test_the_parts_that_are_shown_are_those_that_were_planned() -> None:
    for rate, n_final in ((None, 0), (500.0, 1000), (10_000.0, 1000)):
        plan = plan_budget(600.0, used_s=20.0, images_per_s=rate, n_final=n_final)
        parts = BudgetClock(600.0, 0.0, time.monotonic(), n_final, rate).parts
        assert parts == Parts(pytest.approx(plan.search_s), plan.confirm_s, pytest.approx(plan.final_s))
    short = short_search(asdict(plan_budget(180.0, used_s=12.0, may_be_short=True)), 180.0)
    assert short is not None
    parts = BudgetClock(180.0, 0.0, time.monotonic(), 1000, short=short).parts
    assert parts == Parts(pytest.approx(short.seconds), 0.0, pytest.approx(180.0 - short.seconds))


def test_every_command_notes_what_it_spends() -> None:
    study = optuna.create_study()
    assert spent_s(study) == 0.0
    ledger = Ledger(study, "search")
    ledger.note()
    ledger.note()  # the same interval, longer
    (interval,) = intervals_of(study)
    assert interval.command == "search"
    assert interval.seconds == pytest.approx(ledger.seconds, abs=1.0)
    assert abs(interval.began + interval.seconds - time.time()) < 1.0
    Ledger(study, "finalize").note()  # of the same process, side by side
    assert spent_s(study) == pytest.approx(interval.seconds, abs=1.0)


def test_a_budget_can_be_given_and_raised() -> None:
    study = optuna.create_study()
    assert budget_of(study) is None
    set_budget(study, 60.0)
    set_budget(study, 90.0)
    assert budget_of(study) == 90.0


def test_a_search_says_when_its_end_moves() -> None:
    said: list[str] = []
    objective: Any = SimpleNamespace(watch=SimpleNamespace(note=said.append), number=7)
    clock = BudgetClock(100.0, spent_s=10.0, began=time.monotonic(), n_final=1000)
    _plan_anew(objective, clock, None)
    assert said == [], "nothing is known yet"
    quick = create_trial(state=TrialState.COMPLETE, value=0.9, user_attrs={"images_per_s": 10_000.0})
    _plan_anew(objective, replace(clock), quick)
    assert said == [], "another worker's trial, which says it"
    objective.number = quick.number
    _plan_anew(objective, clock, quick)
    _plan_anew(objective, clock, quick)
    assert len(said) == 1
    assert said[0].startswith(
        "planned anew for the network of trial -1: finalize needs 17 s instead of 70, so the search has 53 s more"
    )


def test_the_search_keeps_the_rest_of_the_budget_and_no_more_than_it_needs() -> None:
    clock = BudgetClock(100.0, spent_s=10.0, began=time.monotonic(), n_final=1000)
    assert clock.left_s() == pytest.approx(100 - 10 - 100 * (CONFIRM_SHARE + FINAL_SHARE), abs=1.0)
    quick = create_trial(state=TrialState.COMPLETE, value=0.9, user_attrs={"images_per_s": 10_000.0})
    clock.learn(quick)  # sixty epochs of 1,000 patches take it 7.2 s with a margin
    assert clock.left_s() == pytest.approx(100 - 10 - 100 * CONFIRM_SHARE - 7.2, abs=1.0)
    clock.learn(create_trial(state=TrialState.COMPLETE, value=0.9, user_attrs={"images_per_s": 1.0}))
    assert clock.left_s() == pytest.approx(100 - 10 - 100 * (CONFIRM_SHARE + FINAL_SHARE), abs=1.0)
    clock.check()


def test_a_rung_may_run_over_the_end_by_a_little_only() -> None:
    search_s = 100 * (1 - CONFIRM_SHARE - FINAL_SHARE)
    BudgetClock(100.0, spent_s=search_s + 3, began=time.monotonic(), n_final=0).check()
    clock = BudgetClock(100.0, spent_s=search_s + 6, began=time.monotonic(), n_final=0)
    with pytest.raises(OutOfTime, match="used up"):
        clock.check()


def test_the_first_trial_may_take_of_what_the_final_training_would_have() -> None:
    """Start-up alone may use up the search's part of a short budget; without a trial there is nothing to finalize."""
    clock = BudgetClock(100.0, spent_s=100 * FIRST_SHARE - 2, began=time.monotonic(), n_final=0)
    assert clock.is_over
    assert not clock.is_over_for_first
    clock.check(first=True)
    clock = BudgetClock(100.0, spent_s=100 * FIRST_SHARE + 2, began=time.monotonic(), n_final=0)
    assert clock.is_over_for_first
    with pytest.raises(OutOfTime):
        clock.check(first=True)


def test_the_final_training_has_its_share_until_a_speed_is_known() -> None:
    assert final_seconds(100.0, None, 5000) == 100 * FINAL_SHARE
    assert plan_budget(100.0, used_s=0.0).final_s == 100 * FINAL_SHARE
    quick = plan_budget(100.0, used_s=0.0, images_per_s=10_000.0, n_final=1000)
    assert quick.final_s == pytest.approx(7.2)
    assert quick.search_s == pytest.approx(100 - 7.2 - 100 * CONFIRM_SHARE)


def test_a_whole_trial_is_estimated_from_the_median_first_rung() -> None:
    assert typical_trial_s([], [2.2, 3.0], 9.0) == 9.0
    assert typical_trial_s([1.0, 50.0, 2.0], [2.2, 3.0], 9.0) == pytest.approx(2.0 * (1 + 2.2 + 6.6))


@pytest.mark.parametrize("short", [False, True])
def test_what_the_prediction_takes_is_no_part_of_the_search_s_nor_of_the_training_s(short: bool) -> None:
    """57,458 test patches take minutes on a laptop: without their time in the plan a budget of six ended with an untrained network."""
    options = {"used_s": 20.0, "images_per_s": 300.0, "n_final": 10**6, "may_be_short": short}
    plain, large = plan_budget(600.0 if short else 6000.0, **options), None  # type: ignore[arg-type]
    large = plan_budget(plain.total_s + 300.0, **options, predict_s=300.0)  # type: ignore[arg-type]
    assert (plain.short, large.short) == (short, short)
    for part in ("search_s", "confirm_s", "trial_s", "free_s"):
        assert getattr(large, part) == pytest.approx(getattr(plain, part))
    assert large.final_s == pytest.approx(plain.final_s + 300.0)
    held = None if not short else short_search(asdict(large), large.total_s)
    clock = BudgetClock(large.total_s, 0.0, time.monotonic(), 10**6, 300.0, held, predict_s=300.0)
    if not short:
        assert clock.parts == Parts(
            pytest.approx(large.search_s), pytest.approx(large.confirm_s), pytest.approx(large.final_s)
        )
    assert clock.parts.final_s > 300.0 + 0.2 * plain.total_s


def test_views_are_given_up_before_the_training_is() -> None:
    assert n_test_views(600.0, 29.9, 8) == 8
    assert n_test_views(600.0, 30.1, 8) == 1
    assert too_many_to_predict(600.0, 360.0, 57_458) is None
    said = too_many_to_predict(600.0, 361.0, 57_458)
    assert said is not None
    assert "--budget 600s: predicting 57,458 patches in one view each takes about 361 s" in said
    (minutes,) = map(int, re.findall(r"give --budget (\d+)m", said))
    assert too_many_to_predict(60.0 * minutes, 361.0, 57_458) is None


def test_workers_side_by_side_start_more_trials() -> None:
    one, four = (plan_budget(300.0, used_s=10.0, may_be_short=True, n_workers=n) for n in (1, 4))
    assert (one.short, four.short) == (True, False)
    wide = plan_budget(3000.0, used_s=10.0)
    many = plan_budget(3000.0, used_s=10.0, n_workers=8)
    assert many.n_started == 8 * wide.n_started
    assert many.with_trial(20.0, mean_s=30.0).n_started == 8 * wide.with_trial(20.0, mean_s=30.0).n_started
