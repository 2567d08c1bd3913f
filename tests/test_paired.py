"""Gains with intervals over slides, against drawing slide by slide."""

from __future__ import annotations

import numpy as np
import pytest

from pcam_automl.errors import DataError
from pcam_automl.metrics import auc, auc_draws, log_loss, percentile_interval
from pcam_automl.paired import auc_gain, loss_gain


def scorings(n: int = 400, n_slides: int = 20, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Label, a noisy scoring, a less noisy one, slides; every slide has a shift of its own that both scorings share."""
    rng = np.random.default_rng(seed)
    label, group = np.arange(n) % 2, np.arange(n) // 2 % n_slides
    shift = rng.normal(0, 1, n_slides)[group]
    base = label + shift
    noisy, better = (1 / (1 + np.exp(-(base + rng.normal(0, s, n)))) for s in (2.0, 1.0))
    return label, noisy, better, group


def test_gains_are_differences_and_change_sign_with_the_order() -> None:
    label, noisy, better, group = scorings()
    there, back = auc_gain(label, noisy, better, group), auc_gain(label, better, noisy, group)
    assert there.value == pytest.approx(auc(label, better) - auc(label, noisy))
    assert back.value == -there.value
    assert back.interval == pytest.approx((-there.interval[1], -there.interval[0]))  # type: ignore[index]
    assert there.sure == pytest.approx(1 - back.sure)  # type: ignore[operator]
    saved = loss_gain(label, noisy, better, group)
    assert saved.value == pytest.approx(log_loss(label, noisy) - log_loss(label, better))


@pytest.mark.parametrize("gain", [auc_gain, loss_gain])
def test_intervals_agree_with_drawing_slide_by_slide(gain: object) -> None:
    label, noisy, better, group = scorings()
    rng, slides = np.random.default_rng(5), [np.flatnonzero(group == g) for g in range(20)]
    values = []
    for _ in range(600):
        rows = np.concatenate([slides[g] for g in rng.integers(0, 20, 20)])
        one, other = ((auc(label[rows], p[rows]), log_loss(label[rows], p[rows])) for p in (noisy, better))
        values.append(other[0] - one[0] if gain is auc_gain else one[1] - other[1])
    found = gain(label, noisy, better, group)  # type: ignore[operator]
    assert found.interval == pytest.approx(np.quantile(values, [0.025, 0.975]), abs=0.012)
    assert found.sure == pytest.approx((np.array(values) > 0).mean(), abs=0.05)


@pytest.mark.parametrize("n_slides", [2, 3, 4, 10])
@pytest.mark.parametrize("gain", [auc_gain, loss_gain])
def test_equally_good_scorings_are_hardly_ever_told_apart(gain: object, n_slides: int) -> None:
    """Quantiles of the draws, which these intervals were before, exclude the true 0 of few slides far too often."""
    rng, n_wrong, n_wrong_before, n_cases = np.random.default_rng(n_slides), 0, 0, 60
    label, group = np.arange(40 * n_slides) % 2, np.arange(40 * n_slides) // 40
    for _ in range(n_cases):
        own = [
            label * 2.0 + rng.normal(0, 1.0, n_slides)[group] * (1 - 2 * label) for _ in range(2)
        ]  # good on other slides
        one, other = (1 / (1 + np.exp(-(score + rng.normal(0, 1.5, len(label))))) for score in own)
        found = gain(label, one, other, group)  # type: ignore[operator]
        n_wrong += not found.interval[0] <= 0 <= found.interval[1]
        assert (found.sure > 0.975) == (found.interval[0] > 0)
        if gain is auc_gain:
            draws = np.diff(auc_draws(label, np.stack([one, other]), group, n=200), axis=1)
            low, high = percentile_interval(draws)
            n_wrong_before += not low <= 0 <= high
    assert n_wrong / n_cases <= 0.12
    if gain is auc_gain and n_slides <= 4:
        assert n_wrong_before / n_cases >= 0.15


def test_equal_scorings_gain_nothing_for_sure() -> None:
    label, noisy, _, group = scorings()
    for gain in (auc_gain, loss_gain):
        found = gain(label, noisy, noisy, group)
        assert (found.value, found.interval, found.sure) == (0.0, (0.0, 0.0), 0.5)


def test_an_auc_differs_by_at_most_1_whatever_two_slides_leave_open() -> None:
    label, group = np.array([0, 1, 0, 1]), np.array([0, 0, 1, 1])
    found = auc_gain(label, [0.4, 0.6, 0.6, 0.4], [0.1, 0.9, 0.2, 0.8], group)
    assert found.interval is not None
    assert -1.0 <= found.interval[0] < found.value < found.interval[1] <= 1.0
    assert max(map(abs, found.interval)) == 1.0


def test_one_slide_says_nothing_of_others_and_unknown_slides_are_drawn_one_by_one() -> None:
    label, noisy, better, _ = scorings()
    for gain in (auc_gain, loss_gain):
        assert gain(label, noisy, better, np.zeros(400, np.int64)).interval is None
        assert gain(label, noisy, better, np.full(400, -1)).interval is not None
    with pytest.raises(DataError, match=r"groups must be \(400,\)"):
        loss_gain(label, noisy, better, np.zeros(3, np.int64))
