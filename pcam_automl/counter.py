"""Counter-based random numbers: Philox4x32-10, keys and permutations. Knows nothing of images.

A draw is a pure function of (key, counter, column), so it does not depend on micro-batch, worker, restart or device
count (Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pcam_automl.files import sha256_of_json

_WORD_MASK = (1 << 32) - 1
_KEY_LIMIT = 1 << 64
_ROUNDS = 10
_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], dtype=np.uint64)  # of counter words 0 and 2
_WEYL = (0x9E3779B9, 0xBB67AE85)  # added to key words 0 and 1 after each round


def philox4x32(counters: NDArray[np.uint32], key: int) -> NDArray[np.uint32]:
    """Philox4x32-10 as in the Random123 library.

    Args:
        counters: (4, ...) words, row 0 the lowest.
        key: in [0, 2**64); its low half is Random123's key word 0.

    Returns:
        random words of the same shape.

    Raises:
        ValueError: ``key`` is out of range.
    """
    if not 0 <= key < _KEY_LIMIT:
        raise ValueError(f"key must be in [0, 2**64), got {key}")
    words = counters.astype(np.uint64)
    shape = (2, *words.shape[1:])
    multipliers = _MULTIPLIERS.reshape(2, *(1,) * (words.ndim - 1))
    schedule = [[(key >> 32 * i) + round_ * _WEYL[i] & _WORD_MASK for i in (0, 1)] for round_ in range(_ROUNDS)]
    round_keys = np.array(schedule, np.uint64).reshape(_ROUNDS, *multipliers.shape)
    # One product holds both 32x32-bit multiplications of a round; buffers are reused: 1.1 us a view at B = 64, n = 20.
    even, odd = np.ascontiguousarray(words[0::2]), np.ascontiguousarray(words[1::2])
    product, high = np.empty(shape, np.uint64), np.empty(shape, np.uint64)
    for keys in round_keys:
        np.multiply(even, multipliers, out=product)
        np.right_shift(product, 32, out=high)
        np.bitwise_xor(high[::-1], odd, out=even)
        np.bitwise_xor(even, keys, out=even)
        np.bitwise_and(product[::-1], _WORD_MASK, out=odd)
    return np.stack([even[0], odd[0], even[1], odd[1]]).astype(np.uint32)


def uniforms(key: int, counters: NDArray[np.integer[Any]], n: int) -> NDArray[np.float32]:
    """``n`` uniform numbers for each counter; row b depends on ``(key, counters[b])`` alone, column j also on j alone.

    Args:
        key: in [0, 2**64), see :func:`key_of`.
        counters: (B,) integers in [0, 2**63), for instance view indices.
        n: columns, at least 0.

    Returns:
        (B, n) float32 in [0, 1), multiples of 2**-24.

    Raises:
        ValueError: a negative counter, not one-dimensional, or a key out of range.
    """
    counters = np.asarray(counters)
    if counters.ndim != 1:
        raise ValueError(f"counters must have one dimension, got shape {counters.shape}")
    if counters.size and int(counters.min()) < 0:
        raise ValueError(f"counters must not be negative, got {int(counters.min())}")
    low = counters.astype(np.uint64)
    n_blocks = -(-n // 4)
    words = np.zeros((4, len(low), n_blocks), np.uint32)
    words[0] = (low & _WORD_MASK).astype(np.uint32)[:, None]
    words[1] = (low >> 32).astype(np.uint32)[:, None]
    words[2] = np.arange(n_blocks, dtype=np.uint32)
    random = philox4x32(words, key)
    rows = random.transpose(1, 2, 0).reshape(len(low), n_blocks * 4)[:, :n]
    return (rows >> 8).astype(np.float32) * np.float32(2**-24)


def key_of(*parts: int | str) -> int:
    """A 64-bit key from the SHA-256 of the parts; ``(1, "2")``, ``("1", 2)`` and ``("12",)`` have different keys.

    Raises:
        TypeError: a part is neither an int nor a str.
    """
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, int | str):
            raise TypeError(f"a part of a key must be an int or a str, got {part!r}")
    return int(sha256_of_json(list(parts))[:16], 16)


def permutation(key: int, n: int) -> NDArray[np.int64]:
    """The permutation of ``range(n)`` that belongs to ``key``: (n,) int64."""
    return np.random.Generator(np.random.Philox(key=key)).permutation(n).astype(np.int64, copy=False)
