from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from pcam_automl import metrics
from pcam_automl.errors import DataError
from pcam_automl.intervals import auc_bounds
from pcam_automl.metrics import (
    LEAST_OF_A_LABEL,
    Confusion,
    accuracy,
    accuracy_of,
    auc,
    auc_draws,
    auc_interval,
    confusion,
    dice,
    dice_of,
    domain_aucs,
    log_loss,
    percentile_interval,
    worst_domain_auc,
)

few_levels = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0])  # ties are common
scored = st.lists(st.tuples(st.integers(0, 1), few_levels), min_size=2, max_size=40).filter(
    lambda pairs: len({label for label, _ in pairs}) == 2
)


def pair_counting(label: np.ndarray, prob: np.ndarray, weight: np.ndarray | None = None) -> float:
    weight = np.ones(len(label)) if weight is None else weight
    won = total = 0.0
    for i, j in product(np.flatnonzero(label == 1), np.flatnonzero(label == 0)):
        pair = weight[i] * weight[j]
        won += pair * (1.0 if prob[i] > prob[j] else 0.5 if prob[i] == prob[j] else 0.0)
        total += pair
    return won / total


@given(scored)
def test_auc_equals_pair_counting_and_sklearn(pairs: list[tuple[int, float]]) -> None:
    label, prob = map(np.array, zip(*pairs, strict=True))
    assert auc(label, prob) == pytest.approx(pair_counting(label, prob), abs=1e-12)
    assert auc(label, prob) == pytest.approx(sklearn_metrics.roc_auc_score(label, prob), abs=1e-12)


@given(scored)
def test_auc_turns_round_with_the_scores_and_ignores_their_scale(pairs: list[tuple[int, float]]) -> None:
    label, prob = map(np.array, zip(*pairs, strict=True))
    assert auc(label, -prob) == pytest.approx(1 - auc(label, prob))
    assert auc(label, prob * 8 - 3) == pytest.approx(auc(label, prob))


def test_auc_of_constant_scores_is_a_half() -> None:
    assert auc([0, 1, 1], [0.3, 0.3, 0.3]) == 0.5


@pytest.mark.parametrize(
    ("label", "prob", "message"),
    [
        ([1, 1], [0.1, 0.2], "both labels, got 2 patches of label 1"),
        ([0, 1], [0.1, np.nan], "1 of 2 probabilities are not finite"),
        ([0, 1], [0.1, np.inf], "not finite"),
        ([0, 2], [0.1, 0.2], "must be 0 or 1, got 2"),
        ([0, 1], [0.1], r"equal length, got \(2,\) and \(1,\)"),
        ([[0], [1]], [[0.1], [0.2]], "equal length"),
        ([], [], "at least one patch"),
    ],
)
def test_auc_refuses(label: list[int], prob: list[float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        auc(label, prob)
    with pytest.raises(DataError, match=message):
        auc_interval(label, prob)


@given(scored, few_levels)
def test_log_loss_accuracy_and_confusion_agree_with_sklearn(pairs: list[tuple[int, float]], threshold: float) -> None:
    label, prob = map(np.array, zip(*pairs, strict=True))
    clipped = prob.clip(1e-7, 1 - 1e-7)
    assert log_loss(label, prob) == pytest.approx(sklearn_metrics.log_loss(label, clipped))
    called = (prob >= threshold).astype(int)
    assert accuracy(label, prob, threshold) == pytest.approx(sklearn_metrics.accuracy_score(label, called))
    expected = sklearn_metrics.confusion_matrix(label, called, labels=[0, 1]).ravel()
    assert confusion(label, prob, threshold) == tuple(expected)


def test_a_certain_error_keeps_the_log_loss_finite() -> None:
    assert 15 < log_loss([1], [0.0]) < 17


def test_probability_equal_to_the_threshold_counts_as_tumour() -> None:
    assert confusion([0, 1], [0.5, 0.5], 0.5) == (0, 1, 0, 1)


@pytest.mark.parametrize("metric", [log_loss, accuracy, confusion])
def test_scores_that_are_no_probabilities_are_refused(metric: object) -> None:
    with pytest.raises(DataError, match=r"must be in \[0, 1\], got -1 to 0.5"):
        metric([0, 1], [-1.0, 0.5])  # type: ignore[operator]


def test_threshold_outside_0_to_1_is_refused() -> None:
    with pytest.raises(DataError, match="threshold must be in"):
        accuracy([0, 1], [0.1, 0.2], 50)


def slides(n_slides: int, n_each: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, scores and slides; each slide shifts the scores of its positives."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(n_slides), n_each)
    label = rng.integers(0, 2, n_slides * n_each)
    prob = rng.normal(size=len(group)) + label * (1 + rng.normal(size=n_slides)[group])
    return label, prob, group


def test_interval_is_deterministic_ordered_and_holds_the_auc() -> None:
    label, prob, group = slides(12, 30, 0)
    low, high = auc_interval(label, prob, group, seed=3)
    assert (low, high) == auc_interval(label, prob, group, seed=3)
    assert 0 <= low < auc(label, prob) < high <= 1


def test_interval_over_slides_is_wider_than_over_patches() -> None:
    label, prob, group = slides(8, 100, 1)
    over_slides, over_patches = auc_interval(label, prob, group), auc_interval(label, prob)
    assert over_slides[1] - over_slides[0] > 1.5 * (over_patches[1] - over_patches[0])


def test_draws_follow_a_plain_bootstrap_of_repeated_slides() -> None:
    label, prob, group = slides(6, 8, 2)
    prob = prob.round(1)  # ties
    rng = np.random.default_rng(0)
    values = []
    for _ in range(1500):
        weight = np.bincount(rng.integers(0, 6, 6), minlength=6)[group]
        values.append(sklearn_metrics.roc_auc_score(label, prob, sample_weight=weight))
    drawn = percentile_interval(auc_draws(label, prob[None], group, n=4000)[:, 0])
    np.testing.assert_allclose(drawn, np.quantile(values, [0.025, 0.975]), atol=0.02)


def test_unknown_slides_count_patch_by_patch() -> None:
    label, prob, _ = slides(6, 20, 3)
    assert auc_interval(label, prob, np.full(120, -1)) == auc_interval(label, prob)


def test_names_of_slides_do_not_matter() -> None:
    label, prob, group = slides(6, 20, 4)
    assert auc_interval(label, prob, group * 1000 + 7) == auc_interval(label, prob, group)


def test_one_slide_has_no_narrower_interval_than_0_to_1() -> None:
    assert auc_interval([0, 1, 0, 1], [0.1, 0.9, 0.2, 0.8], [5, 5, 5, 5]) == (0.0, 1.0)


@settings(max_examples=30)
@given(scored, st.integers(1, 30))
def test_interval_stays_in_0_to_1_even_if_draws_lack_a_label(pairs: list[tuple[int, float]], n: int) -> None:
    label, prob = map(np.array, zip(*pairs, strict=True))
    low, high = auc_interval(label, prob, n=n)
    assert 0 <= low <= high <= 1


def test_interval_refuses_names_as_groups_and_no_draws() -> None:
    with pytest.raises(DataError, match=r"groups must be \(2,\) integer codes"):
        auc_interval([0, 1], [0.1, 0.2], ["a", "b"])
    with pytest.raises(DataError, match="draws must be at least 1, got 0"):
        auc_interval([0, 1], [0.1, 0.2], n=0)


@given(scored)
def test_dice_is_the_f1_score_of_the_calls(pairs: list[tuple[int, float]]) -> None:
    label, prob = np.array([a for a, _ in pairs]), np.array([b for _, b in pairs])
    assert dice(label, prob, 0.5) == pytest.approx(sklearn_metrics.f1_score(label, prob >= 0.5, zero_division=1.0))


def test_dice_without_tumour_is_one_only_if_none_is_called() -> None:
    assert dice([0, 0], [0.1, 0.2]) == 1.0
    assert dice([0, 0], [0.1, 0.9]) == 0.0
    assert dice_of(Confusion(true_negative=5, false_positive=1, false_negative=2, true_positive=3)) == 6 / 9


def test_accuracy_of_counts_needs_some() -> None:
    assert accuracy_of(Confusion(5, 1, 2, 2)) == 0.7
    with pytest.raises(DataError, match="at least one patch or pixel"):
        accuracy_of(Confusion(0, 0, 0, 0))


@pytest.mark.parametrize("most_paired", [0, 500], ids=["through the patches", "by pairs of slides"])
def test_paired_draws_are_aucs_of_repeated_slides(most_paired: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_MOST_PAIRED_GROUPS", most_paired)
    label, prob, group = slides(5, 7, 6)
    probs = np.stack([prob.round(1), (prob - label).round(1)])  # ties
    drawn = auc_draws(label, probs, group, n=20, seed=9)
    assert drawn.shape == (20, 2)
    for row, members in zip(drawn, np.random.default_rng(9).integers(0, 5, (20, 5)), strict=True):
        patches = np.concatenate([np.flatnonzero(group == member) for member in members])
        want = [pair_counting(label[patches], own[patches]) for own in probs]
        np.testing.assert_allclose(row, want, atol=1e-12)
    n_positive = int(label.sum())
    bounds = auc_bounds(
        drawn[:, 0],
        metrics.auc(label, probs[0]),
        n_slides=5,
        n_positive=n_positive,
        n_negative=len(label) - n_positive,
    )
    assert auc_interval(label, probs[0], group, n=20, seed=9) == bounds


def test_draws_do_not_depend_on_how_many_are_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    label, prob, group = slides(9, 10, 7)
    whole = auc_draws(label, prob[None], group, n=50)
    monkeypatch.setattr(metrics, "_BLOCK_ROWS", 30)
    np.testing.assert_array_equal(auc_draws(label, prob[None], group, n=50), whole)


def test_draws_of_one_label_are_no_number_and_bad_shapes_are_refused() -> None:
    drawn = auc_draws([0, 1], [[0.1, 0.9]], [0, 1], n=40)
    assert set(drawn[~np.isnan(drawn)]) == {1.0}
    assert np.isnan(drawn).any()
    assert percentile_interval([np.nan], otherwise=(0.0, 1.0)) == (0.0, 1.0)
    with pytest.raises(DataError, match=r"must be \(M, N\), got \(2,\)"):
        auc_draws([0, 1], [0.1, 0.9])


@given(st.integers(0, 2**32 - 1))
def test_worst_domain_auc_is_the_least_of_the_domains_that_can_be_scored(seed: int) -> None:
    rng = np.random.default_rng(seed)
    domain, label, prob = rng.integers(-1, 4, 80), rng.integers(0, 2, 80), rng.random(80)
    label[domain == 3] = 1  # one label only
    expected = [
        sklearn_metrics.roc_auc_score(label[own], prob[own])
        for code in range(4)
        if (own := domain == code).any() and min((label[own] == one).sum() for one in (0, 1)) >= LEAST_OF_A_LABEL
    ]
    found = worst_domain_auc(label, prob, domain)
    if len(expected) < 2:
        assert found is None
    else:
        assert found == pytest.approx(min(expected))
    assert len(domain_aucs(label, prob, domain)) == len(expected)


def test_domains_must_be_codes_of_the_patches() -> None:
    with pytest.raises(DataError, match=r"domains must be \(2,\) integer codes, got \(3,\)"):
        worst_domain_auc([0, 1], [0.1, 0.9], [0, 0, 1])
