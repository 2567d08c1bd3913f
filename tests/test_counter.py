from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pcam_automl.counter import key_of, permutation, philox4x32, uniforms

KEYS = st.integers(0, 2**64 - 1)


# The known-answer vectors of the Random123 library (kat_vectors, philox4x32 10).
@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers(counter: str, key: str, answer: str) -> None:
    words = np.array([int(word, 16) for word in counter.split()], np.uint32)[:, None]
    low, high = (int(word, 16) for word in key.split())
    assert [f"{word:08x}" for word in philox4x32(words, high << 32 | low)[:, 0]] == answer.split()


def test_uniforms_are_the_words_of_the_counter_and_the_block() -> None:
    key, counter = 0x299F31D0A4093822, 5 << 32 | 7
    words = np.array([[7, 7], [5, 5], [0, 1], [0, 0]], np.uint32)
    expected = (philox4x32(words, key).T.reshape(-1)[:7] >> 8) / 2**24
    assert uniforms(key, np.array([counter]), 7)[0].tolist() == expected.tolist()


@given(key=KEYS, counters=st.lists(st.integers(0, 2**63 - 1), max_size=12), n=st.integers(0, 9), cut=st.integers(0, 12))
def test_a_row_depends_on_its_own_counter_alone(key: int, counters: list[int], n: int, cut: int) -> None:
    views = np.array(counters, np.int64)
    whole = uniforms(key, views, n)
    assert whole.shape == (len(views), n)
    assert whole.dtype == np.float32
    np.testing.assert_array_equal(whole, np.concatenate([uniforms(key, views[:cut], n), uniforms(key, views[cut:], n)]))
    np.testing.assert_array_equal(whole, uniforms(key, views[::-1], n)[::-1])
    np.testing.assert_array_equal(whole, uniforms(key, views, n + 3)[:, :n])


def test_uniforms_are_uniform_and_uncorrelated() -> None:
    draws = uniforms(key_of("uniformity"), np.arange(20_000), 20)
    assert draws.min() >= 0.0
    assert draws.max() < 1.0
    counts = np.stack([np.histogram(column, 32, (0, 1))[0] for column in draws.T])
    chi2 = ((counts - 625) ** 2 / 625).sum(1)  # 31 degrees of freedom: 31 +- 7.9
    assert (chi2 < 70).all()
    correlation = np.corrcoef(draws.T) - np.eye(20)
    assert np.abs(correlation).max() < 0.04  # 5.6 standard errors
    assert abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.04


def test_neighbouring_keys_and_views_differ() -> None:
    views = np.arange(100)
    assert not np.isin(uniforms(1, views, 4), uniforms(2, views, 4)).any()
    assert len(np.unique(uniforms(1, views, 4))) == 400


@pytest.mark.parametrize("counters", [np.array([3, -1]), np.zeros((2, 2), int)])
def test_bad_counters_are_refused(counters: np.ndarray) -> None:
    with pytest.raises(ValueError, match="counters must"):
        uniforms(0, counters, 4)


@pytest.mark.parametrize("key", [-1, 2**64])
def test_a_key_out_of_range_is_refused(key: int) -> None:
    with pytest.raises(ValueError, match=r"key must be in \[0, 2\*\*64\)"):
        uniforms(key, np.arange(2), 4)


def test_keys_tell_their_parts_apart() -> None:
    keys = {key_of(*parts) for parts in [(), (1,), ("1",), (1, 2), (12,), ("1", "2"), ("12",), ('1","2',), (-1,)]}
    assert len(keys) == 9
    assert all(0 <= key < 2**64 for key in keys)
    assert key_of(7, "a") == int.from_bytes(hashlib.sha256(b'[7,"a"]').digest()[:8], "big")
    for part in (1.0, True, None):
        with pytest.raises(TypeError, match="an int or a str"):
            key_of(1, part)  # type: ignore[arg-type]


@given(key=KEYS, n=st.integers(0, 300))
def test_a_permutation_is_one_and_repeats(key: int, n: int) -> None:
    order = permutation(key, n)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(n))
    np.testing.assert_array_equal(order, permutation(key, n))


def test_permutations_differ_between_keys() -> None:
    assert len({tuple(permutation(key, 20)) for key in range(50)}) == 50
