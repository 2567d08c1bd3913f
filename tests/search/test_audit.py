"""Fidelity audit: planted studies, tau and its correction against slow references, regret, advice, who runs through."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from optuna.trial import TrialState, create_trial
from planted_study import STEPS, pruned_by_thirds, rung_values, settings_of, study_with, trials_of
from scipy.stats import kendalltau, pearsonr

from pcam_automl.config import StudySettings
from pcam_automl.search import worker as worker_module
from pcam_automl.search.audit import (
    AUDIT_MOST,
    LEAST_LINEAGES,
    MOST_PAIRED,
    Audit,
    audit_study,
    audit_trials,
    first_rung_advice,
    judge,
    misleading_steps,
    regret_of_pruning,
    runs_through,
    share_of_spread,
    tau_draws,
    unrestricted_tau,
)
from pcam_automl.search.audit_text import advice
from pcam_automl.search.pruner import SuccessiveHalving

PLAN = tuple((step, step) for step in STEPS)
FAITHFUL, NOISE_FIRST, NOISE = (0.2, 0.1, 0.0), (9.0, 0.2, 0.0), (9.0, 9.0, 9.0)


def audit_of(n: int, noise: tuple[float, ...], *, pruned: bool = False, seed: int = 0) -> Audit:
    values = rung_values(n, noise, seed=seed)
    return audit_trials(trials_of(pruned_by_thirds(values) if pruned else values), STEPS)


def test_a_first_rung_of_noise_misleads_and_the_second_holds() -> None:
    audit = audit_of(40, NOISE_FIRST, seed=2)
    first, second = audit.rungs
    assert (first.verdict, second.verdict) == ("misleads", "holds")
    assert first.n_pairs == first.n_at == audit.n_lineages == 40
    assert first.regret is not None
    assert first.regret > 0
    assert second.regret == 0
    assert audit.misleading == (first,)
    assert misleading_steps(audit) == {first.step}
    assert first_rung_advice(audit, PLAN) == PLAN[1:]


def test_a_later_rung_that_misleads_is_named_though_the_first_may_stay() -> None:
    late = audit_of(40, (0.05, 9.0, 0.0), seed=2)
    late = replace(late, rungs=(replace(late.rungs[0], verdict="unclear"), replace(late.rungs[1], verdict="misleads")))
    assert misleading_steps(late) == {late.rungs[1].step}
    assert first_rung_advice(late, PLAN) is None
    said = {name: advice(late, planned(name)) for name in ("asha", "median", "none")}
    assert said["asha"] == "the first rung may stay; the search ends nothing at rung 2 while that misleads"
    assert said["median"].startswith("the first rung may stay; --pruner median goes on ending trials at rung 2")
    assert said["none"] == "the first rung may stay; nothing is pruned here, at rung 2 either"
    assert advice(audit_of(40, FAITHFUL), planned("asha")) == "nothing speaks for other rungs so far"


def test_advice_names_the_option_that_follows_it() -> None:
    assert advice(audit_of(40, NOISE_FIRST, seed=2), planned("asha")) == (
        "a larger first rung: 300 -> 900 views instead of 100 -> 300 -> 900; a new --study with --rungs 2 has it"
    )
    assert advice(audit_of(60, NOISE), planned("asha")).endswith(
        "600 -> 900 views instead of 100 -> 300 -> 900; a new --study with --rungs 1 prunes nothing"
    )


def planned(pruner: str) -> StudySettings:
    return cast(StudySettings, SimpleNamespace(rungs=PLAN, pruner=pruner))


def test_faithful_rungs_hold_and_the_plan_stays() -> None:
    audit = audit_of(40, FAITHFUL)
    assert [rung.verdict for rung in audit.rungs] == ["holds", "holds"]
    assert first_rung_advice(audit, PLAN) is None


def test_survivors_of_pruning_are_judged_with_the_selection_corrected() -> None:
    values = rung_values(240, (1.0, 0.3, 0.0))
    whole = kendalltau(values[:, 0], values[:, 1]).statistic
    first = audit_trials(trials_of(pruned_by_thirds(values)), STEPS).rungs[0]
    assert (first.n_at, first.n_pairs) == (240, 80)
    assert 0.4 < first.share_of_spread < 0.65
    assert first.tau is not None
    assert first.tau_of_all is not None
    assert first.tau < first.tau_of_all
    assert abs(first.tau_of_all - whole) < abs(first.tau - whole)
    assert first.verdict == "holds"
    assert audit_of(240, NOISE_FIRST, pruned=True).rungs[0].verdict == "misleads"


def test_few_survivors_are_unclear_and_their_regret_is_unknown() -> None:
    audit = audit_of(12, FAITHFUL, pruned=True)
    assert [rung.verdict for rung in audit.rungs] == ["unclear", "unclear"]
    assert f"4 of at least {LEAST_LINEAGES}" in audit.rungs[0].why
    assert audit.rungs[0].regret is None
    assert first_rung_advice(audit, PLAN) is None


def test_a_lineage_with_two_rows_is_counted_once() -> None:
    trials = trials_of(rung_values(20, NOISE_FIRST))
    plain = audit_trials(trials, STEPS)
    rows = [
        create_trial(state=TrialState.PRUNED, intermediate_values={100: -5.0}, user_attrs={"lineage": str(number)})
        for number in range(20)
    ]  # an earlier row of each, which reported something else before it was thawed
    for number, row in enumerate([*rows, *trials]):
        row.number = number
    assert audit_trials([*rows, *trials], STEPS) == plain


def test_values_that_are_not_finite_and_minimised_studies() -> None:
    values = rung_values(30, FAITHFUL)
    up, down = audit_trials(trials_of(values), STEPS), audit_trials(trials_of(-values), STEPS, maximise=False)
    assert up == down
    trials = trials_of(values)
    trials[0].intermediate_values[100] = math.nan
    trials[1].intermediate_values[100] = math.inf
    assert audit_trials(trials, STEPS).rungs[0].n_at == 28


def test_a_study_is_audited_at_its_own_rungs() -> None:
    study = study_with(trials_of(rung_values(30, FAITHFUL)))
    audit = audit_study(study, settings_of())
    assert [(rung.step, rung.next_step) for rung in audit.rungs] == [(100, 300), (300, 900)]
    assert audit.n_lineages == 30
    assert audit.to_json()["rungs"][0]["verdict"] == "holds"


@pytest.mark.parametrize("decimals", [0, 1, 6])
def test_tau_is_scipys_and_its_draws_are_those_of_repeated_members(decimals: int) -> None:
    values = rung_values(15, (1.0, 1.0, 0.0), seed=decimals).round(decimals)  # few decimals: many ties
    x, y = values[:, 0], values[:, 1]
    tau, drawn = tau_draws(x, y, n_draws=40, seed=3)
    assert tau == pytest.approx(kendalltau(x, y).statistic)
    counts = np.random.default_rng(3).multinomial(15, np.full(15, 1 / 15), 40)
    slow = [kendalltau(np.repeat(x, count), np.repeat(y, count)).statistic for count in counts]
    np.testing.assert_allclose(drawn, slow, atol=1e-12)


def test_equal_values_have_no_tau() -> None:
    tau, drawn = tau_draws(np.ones(10), np.arange(10.0), n_draws=5)
    assert tau is None
    assert np.isnan(drawn).all()
    assert judge(10, None, (math.nan, math.nan))[0] == "unclear"


def test_of_many_lineages_a_draw_is_compared() -> None:
    values = rung_values(3 * MOST_PAIRED, (1.0, 1.0, 0.0))
    tau, _ = tau_draws(values[:, 0], values[:, 1], n_draws=2)
    assert tau == pytest.approx(kendalltau(values[:, 0], values[:, 1]).statistic, abs=0.05)


@pytest.mark.parametrize("noise", [0.3, 1.0, 3.0])
def test_the_correction_recovers_the_tau_of_all_from_the_best_third(noise: float) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=6000)
    y = x + noise * rng.normal(size=6000)
    best = x >= np.quantile(x, 2 / 3)
    whole, among_best = kendalltau(x, y).statistic, kendalltau(x[best], y[best]).statistic
    found = unrestricted_tau(among_best, share_of_spread(x, best))
    assert found == pytest.approx(whole, abs=0.035)
    assert abs(found - whole) < abs(among_best - whole) / 3
    assert math.sin(math.pi * whole / 2) == pytest.approx(pearsonr(x, y).statistic, abs=0.02)  # the scale it works on


def test_nothing_is_corrected_where_nothing_was_selected() -> None:
    values = np.arange(20.0)
    assert share_of_spread(values, np.ones(20, bool)) == 1.0
    assert unrestricted_tau(0.37, 1.0) == 0.37
    assert unrestricted_tau(-0.2, 0.5) == pytest.approx(-unrestricted_tau(0.2, 0.5))


def test_regret_is_what_the_dropped_ones_that_ran_through_had_more() -> None:
    here = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, np.nan])
    final = np.array([0.91, np.nan, np.nan, 0.95, np.nan, 0.3, 0.99])
    assert regret_of_pruning(here, final) == (pytest.approx(0.04), 2)  # kept: the first two
    final[3] = 0.5
    assert regret_of_pruning(here, final) == (0.0, 2)
    final[[3, 5]] = np.nan
    assert regret_of_pruning(here, final) == (None, 0)
    assert regret_of_pruning(np.full(3, np.nan), final[:3]) == (None, 0)


def test_advice_drops_leading_rungs_that_mislead_and_keeps_something_to_prune_at() -> None:
    noise = audit_of(60, NOISE)
    assert [rung.verdict for rung in noise.rungs] == ["misleads", "misleads"]
    assert first_rung_advice(noise, PLAN) == ((600, 600), PLAN[-1])
    late = audit_of(60, (0.1, 9.0, 9.0))
    assert late.rungs[1].verdict == "misleads"
    halves = ((100, 80), (180, 90))
    two = audit_trials(trials_of(rung_values(40, NOISE_FIRST)), STEPS)
    two = Audit(two.rungs[:1], two.n_lineages)
    assert first_rung_advice(two, halves) == halves[1:]  # twice 100 is no rung below 180
    assert first_rung_advice(two, ((100, 80), (300, 90))) == ((200, 90), (300, 90))
    with pytest.raises(ValueError, match=r"the audit is of rungs at \[100, 300\] views"):
        first_rung_advice(late, PLAN[1:])


def test_few_lineages_run_through_and_by_their_names_alone() -> None:
    names = [str(number) for number in range(600)]
    through = [name for place, name in enumerate(names) if runs_through(name, names[:place], seed=4)]
    assert len(through) == AUDIT_MOST
    assert all(runs_through(name, reversed(names[: int(name) + 1]), seed=4) for name in through)  # its own retry, too
    others = [name for place, name in enumerate(names) if runs_through(name, names[:place], seed=5)]
    assert others != through
    share = np.mean([runs_through(name, seed=4) for name in names])
    assert share == pytest.approx(1 / 12, abs=0.035)


def test_the_audit_is_looked_at_whenever_ten_rows_are_new_whoever_made_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of several workers sees every third number of rows or so, and a new one begins at any."""
    looks: list[int] = []

    monkeypatch.setattr(worker_module, "audit_trials", lambda trials, *_, **__: looks.append(len(trials)))
    monkeypatch.setattr(worker_module, "misleading_steps", lambda audit: frozenset())
    pruner = SuccessiveHalving([1, 3, 9])
    study: Any = SimpleNamespace(pruner=pruner)
    settings = SimpleNamespace(goal=SimpleNamespace(maximize=True), seed=0)
    objective: Any = SimpleNamespace(opened=SimpleNamespace(settings=settings))
    for n in (0, 4, 9, 13, 16, 19, 22, 25, 31):
        worker_module._heed_audit(objective, study, [None] * n)  # type: ignore[list-item]
    assert looks == [13, 22, 31]
