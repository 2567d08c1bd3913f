"""Intervals of an AUC: they hold the true one about as often as they say, and have a width where nothing was misranked."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as scipy_t

from benchmarks.intervals import coverage
from pcam_automl.intervals import auc_bounds, score_interval, student_t
from pcam_automl.metrics import auc_interval
from pcam_automl.paired import auc_gain
from pcam_automl.search.ranking import rank

FEW_SLIDES = ((4, 50, 3.0, 0.7, 1.0), (10, 30, 3.0, 0.7, 1.0), (10, 30, 5.0, 0.5, 1.0))
FEW_OF_A_LABEL = ((20, 30, 3.0, 1.0, 0.1), (20, 30, 3.0, 1.0, 0.25))
"""Two and five of twenty slides hold label 1; as if twenty did, the interval would hold the true AUC in two thirds of the draws."""


@pytest.mark.parametrize("case", [*FEW_SLIDES, *FEW_OF_A_LABEL, (36, 8, 2.0, 1.0, 1.0)])
def test_the_true_auc_lies_inside_about_as_often_as_promised(case: tuple[int, int, float, float, float]) -> None:
    _, ours, quantiles = coverage(case, 100, n_draws=300)
    assert ours >= 0.87
    assert case not in (*FEW_SLIDES, *FEW_OF_A_LABEL) or ours > quantiles + 0.05


def test_patches_ranked_without_a_fault_leave_something_open() -> None:
    label = np.arange(200) % 2
    low, high = auc_interval(label, label.astype(float), np.arange(200) // 5)
    assert high == 1.0
    assert 0.95 < low < 0.99
    few = auc_interval(label[:20], label[:20].astype(float), np.arange(20) // 5)
    assert few[0] < low


@given(area=st.floats(0.0, 1.0), positive=st.integers(1, 500), negative=st.integers(1, 500))
def test_the_score_interval_holds_its_auc_and_mirrors(area: float, positive: int, negative: int) -> None:
    low, high = score_interval(area, positive, negative)
    assert 0.0 <= low <= area + 1e-9
    assert area - 1e-9 <= high <= 1.0
    mirrored = score_interval(1 - area, negative, positive)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-6)


def test_newcombes_bounds_are_those_of_their_definition() -> None:
    """At the bound, the measured AUC lies 1.96 of Hanley's and McNeil's standard errors off."""
    low, high = score_interval(0.9, 40, 60)
    for bound in (low, high):
        more = (40 + 60) / 2 - 1
        variance = bound * (1 - bound) * (1 + more * ((1 - bound) / (2 - bound) + bound / (1 + bound))) / (40 * 60)
        assert abs(0.9 - bound) / variance**0.5 == pytest.approx(1.96, abs=1e-3)


@pytest.mark.parametrize("freedom", [1, 5, 29, 30, 31, 100, 5000])
def test_the_quantile_of_students_t_is_scipys(freedom: int) -> None:
    assert student_t(freedom) == pytest.approx(scipy_t.ppf(0.975, freedom), abs=1e-5)


@given(n_slides=st.integers(0, 5), area=st.floats(0.5, 1.0))
def test_one_slide_or_no_draw_leaves_everything_open(n_slides: int, area: float) -> None:
    draws = np.full(10, area) if n_slides < 2 else np.full(10, np.nan)
    assert auc_bounds(draws, area, n_slides=n_slides, n_positive=5, n_negative=5) == (0.0, 1.0)


@pytest.mark.parametrize("lone", [0, 1])
def test_a_label_that_lies_in_one_slide_leaves_everything_open(lone: int) -> None:
    """However many slides hold the other one: every draw has the very same patches of it, or none, so the draws hardly differ."""
    label, rng = np.arange(200) % 2, np.random.default_rng(0)
    slide = np.where(label == lone, 0, 1 + np.arange(200) % 9)
    prob = label + rng.normal(size=200)
    assert auc_interval(label, prob, slide) == (0.0, 1.0)
    assert auc_gain(label, prob, prob + label, slide).interval is None
    (best, _) = rank(
        label, np.stack([prob, prob + label]), slide, numbers=[0, 1], values=[0.6, 0.9], images_per_s=[1.0, 1.0]
    )
    assert (best.number, np.isnan(best.interval).all()) == (1, True)
    spread = np.arange(200) // 2 % 10
    assert auc_interval(label, prob, spread)[0] > 0.0
