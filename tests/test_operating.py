"""Thresholds and the reject curve, against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pcam_automl.errors import DataError
from pcam_automl.metrics import auc
from pcam_automl.operating import (
    COVERAGES,
    SENSITIVITIES,
    YOUDEN,
    Operating,
    choose_thresholds,
    operate,
    operating_points,
    reject_curve,
    sensitivity_rule,
    threshold_text,
)


def drawn(seed: int, n: int, digits: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels of both kinds and probabilities with ties."""
    rng = np.random.default_rng(seed)
    label = rng.permutation(np.arange(n) % 3 == 0).astype(np.int64)
    return label, (0.4 * label + 0.6 * rng.random(n)).round(digits)


def rates(label: np.ndarray, prob: np.ndarray, threshold: float) -> tuple[float, float]:
    called = prob >= threshold
    return float(called[label == 1].mean()), float((~called)[label == 0].mean())


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), n=st.integers(3, 80), digits=st.integers(1, 6))
def test_thresholds_are_the_highest_that_keep_their_promise(seed: int, n: int, digits: int) -> None:
    label, prob = drawn(seed, n, digits)
    chosen = choose_thresholds(label, prob)
    for share in SENSITIVITIES:
        kept = [t for t in np.unique(prob) if rates(label, prob, t)[0] >= share - 1e-9]
        assert chosen[sensitivity_rule(share)] == max(kept)
    best = max(sum(rates(label, prob, t)) for t in np.unique(prob))
    assert sum(rates(label, prob, chosen[YOUDEN])) == pytest.approx(best)
    assert chosen[YOUDEN] == max(t for t in np.unique(prob) if sum(rates(label, prob, t)) >= best - 1e-9)


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), n=st.integers(3, 80))
def test_figures_of_a_threshold_are_those_of_counting(seed: int, n: int) -> None:
    label, prob = drawn(seed, n, 2)
    for point in operating_points(label, prob, {**choose_thresholds(label, prob), "none": 1.0}):
        called = prob >= point.threshold
        assert (point.sensitivity, point.specificity) == pytest.approx(rates(label, prob, point.threshold))
        assert point.called == pytest.approx(called.mean())
        assert point.ppv == (pytest.approx(label[called].mean()) if called.any() else None)
        assert point.npv == (pytest.approx(1 - label[~called].mean()) if not called.all() else None)


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), n=st.integers(3, 80))
def test_rejected_are_the_patches_nearest_to_a_half(seed: int, n: int) -> None:
    label, prob = drawn(seed, n, 3)
    order = sorted(range(n), key=lambda i: -abs(prob[i] - 0.5))
    for point in reject_curve(label, prob):
        kept = order[: point.n]
        assert point.n == max(1, round(point.coverage * n))
        assert point.error == pytest.approx(np.mean([(prob[i] >= 0.5) != label[i] for i in kept]))
        both = len({int(label[i]) for i in kept}) == 2
        assert point.auc == (pytest.approx(auc(label[kept], prob[kept])) if both else None)


def test_of_sure_and_right_probabilities_fewer_errors_are_left_when_the_unsure_are_handed_on() -> None:
    rng = np.random.default_rng(0)
    prob = rng.random(20_000)
    label = (rng.random(20_000) < prob).astype(np.int64)  # calibrated by construction
    errors = [point.error for point in reject_curve(label, prob)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx(0.25, abs=0.02)
    assert errors[-1] < 0.05


def test_coverages_fall_from_all_to_a_tenth() -> None:
    assert (COVERAGES[0], COVERAGES[-1]) == (1.0, 0.1)
    assert list(COVERAGES) == sorted(COVERAGES, reverse=True)


def test_thresholds_chosen_elsewhere_are_kept_and_named() -> None:
    first = operate(*drawn(0, 90, 3), "fold 1")
    second = operate(*drawn(1, 60, 3), "the holdout", first)
    assert second.thresholds == first.thresholds
    assert (first.chosen_on, second.on, second.chosen_on) == ("fold 1", "the holdout", "fold 1")
    assert Operating.from_json(second.to_json()) == second


def test_one_label_has_no_thresholds() -> None:
    with pytest.raises(DataError, match="both labels, got 2 of one"):
        choose_thresholds([1, 1], [0.2, 0.3])
    with pytest.raises(DataError, match="both labels, got 2 of one"):
        operating_points([0, 0], [0.2, 0.3], {"0.5": 0.5})


@given(st.floats(0, 1))
def test_a_printed_threshold_typed_again_misses_no_patch_that_the_exact_one_found(threshold: float) -> None:
    typed = float(threshold_text(threshold))
    assert typed <= threshold
    assert threshold - typed <= max(min(threshold, 1 - threshold) / 1000, 0.0) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("threshold", "shown"),
    [(0.5, "0.500"), (0.0, "0.000"), (0.0003, "0.0003"), (0.9998, "0.9998"), (0.99999996, "0.99999996")],
)
def test_thresholds_are_as_short_as_may_be(threshold: float, shown: str) -> None:
    assert threshold_text(threshold) == shown
