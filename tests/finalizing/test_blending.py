"""Greedy blending: never worse where it selects, never a useless member, used only where it helps on other slides."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pcam_automl.finalizing.blending import LEAST_GAIN, choose_blend, cross_fitted, greedy_weights
from pcam_automl.metrics import auc


def networks(n: int, noises: tuple[float, ...], seed: int = 0, n_slides: int = 30) -> tuple[np.ndarray, ...]:
    """Logits of networks with independent noise, labels, slides."""
    rng = np.random.default_rng(seed)
    label = np.arange(n) % 2
    logits = np.stack([2.0 * label - 1 + rng.normal(0, noise, n) for noise in noises])
    return logits, label.astype(np.int64), np.arange(n) // 2 % n_slides


def slow_greedy(logits: np.ndarray, label: np.ndarray, most: int) -> np.ndarray:
    """The same selection, bag by bag."""
    bag = [max(range(len(logits)), key=lambda k: (auc(label, logits[k]), -k))]
    for _ in range(20):
        now = auc(label, np.mean(logits[bag], axis=0))
        tried = [
            (auc(label, np.mean(logits[[*bag, k]], axis=0)), -k) for k in range(len(logits)) if len({*bag, k}) <= most
        ]
        value, place = max(tried)
        if value <= now + 1e-12:
            break
        bag.append(-place)
    return np.bincount(bag, minlength=len(logits)) / len(bag)


@given(seed=st.integers(0, 500), k=st.integers(1, 4), most=st.integers(1, 4))
def test_greedy_selection_is_that_of_bags_and_never_worse_than_the_best(seed: int, k: int, most: int) -> None:
    logits, label, _ = networks(60, tuple(1.5 + 0.2 * i for i in range(k)), seed)
    weights = greedy_weights(logits, label, most_members=most)
    assert np.allclose(weights, slow_greedy(logits, label, most))
    assert weights.sum() == pytest.approx(1.0)
    assert 1 <= np.count_nonzero(weights) <= most
    assert auc(label, weights @ logits) >= max(auc(label, row) for row in logits) - 1e-9


def test_a_constant_a_copy_and_a_reversed_network_are_never_picked() -> None:
    logits, label, _ = networks(400, (1.0,))
    for useless in (np.zeros(400), logits[0], -logits[0]):
        weights = greedy_weights(np.stack([logits[0], useless]), label, most_members=2)
        assert weights.tolist() == [1.0, 0.0]


def test_independent_networks_are_blended_and_their_gain_is_seen_on_other_slides() -> None:
    logits, label, group = networks(2000, (2.0, 2.0, 2.0))
    blend = choose_blend(logits, label, group, single=0, most_members=3)
    assert blend.used
    assert np.count_nonzero(blend.weights) == 3
    assert blend.gain is not None
    assert blend.gain.value > 0.05
    assert blend.auc_blend == pytest.approx(auc(label, blend.logits))
    assert choose_blend(logits, label, group, single=0, most_members=2).weights.count(0.0) == 1


def test_one_member_at_most_is_the_single_network() -> None:
    logits, label, group = networks(200, (2.0, 1.0))
    blend = choose_blend(logits, label, group, single=1, most_members=1)
    assert (blend.used, blend.weights) == (False, (0.0, 1.0))
    assert np.array_equal(blend.logits, logits[1])


def test_a_gain_of_chance_on_the_slides_that_chose_is_not_believed() -> None:
    """Many noise networks beside a good one: some always seem to help where they are selected."""
    refused = 0
    for seed in range(10):
        logits, label, group = networks(160, (1.0, 9.0, 9.0, 9.0, 9.0, 9.0), seed)
        single = int(np.argmax([auc(label, row) for row in logits]))
        blend = choose_blend(logits, label, group, single=single, most_members=6, seed=seed)
        selected = auc(label, np.array(blend.found) @ logits) - auc(label, logits[single])
        refused += not blend.used
        assert selected >= 0
        if blend.used:
            assert blend.gain is not None
            assert blend.gain.value >= LEAST_GAIN
    assert refused >= 7


def test_cross_fitted_logits_of_a_slide_do_not_depend_on_its_labels() -> None:
    logits, label, group = networks(300, (1.5, 1.5, 1.5), n_slides=10)
    before = cross_fitted(logits, label, group, single=0, most_members=3, seed=0)
    changed = label.copy()
    changed[group == 4] = 1 - changed[group == 4]
    after = cross_fitted(logits, changed, group, single=0, most_members=3, seed=0)
    assert before is not None
    assert after is not None
    assert np.array_equal(before[group == 4], after[group == 4])


def test_one_slide_cannot_judge_a_blend() -> None:
    logits, label, _ = networks(200, (2.0, 2.0))
    blend = choose_blend(logits, label, np.zeros(200, np.int64), single=0, most_members=2)
    assert not blend.used
    assert "too few slides" in blend.why
