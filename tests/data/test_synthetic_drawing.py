"""The drawn patches and masks themselves; the set as a whole is in test_synthetic.py."""

from __future__ import annotations

import numpy as np

from pcam_automl.data.synthetic_drawing import PLAIN, TUMOUR_CENTRE, TUMOUR_OUTSIDE, SlideLook, draw_patches

LOOK = SlideLook(
    vectors=np.array([[0.66, 0.92, 0.30], [0.17, 0.62, 0.14]], np.float32),
    white=np.array([0.92, 0.91, 0.94], np.float32),
    blur=0.1,
    noise=0.012,
    cellularity=0.8,
)
KINDS = np.array([PLAIN, TUMOUR_OUTSIDE, TUMOUR_CENTRE] * 3)


def test_the_same_generator_state_draws_the_same_pixels() -> None:
    one, two, other = (draw_patches(np.random.default_rng(seed), LOOK, KINDS) for seed in (4, 4, 5))
    for first, second, third in zip(one, two, other, strict=True):
        assert np.array_equal(first, second)
        assert not np.array_equal(first, third)


def test_masks_hold_tumour_where_the_kind_says() -> None:
    patches, masks = draw_patches(np.random.default_rng(0), LOOK, KINDS)
    assert (patches.shape, masks.shape) == ((9, 96, 96, 3), (9, 96, 96))
    assert set(np.unique(masks)) == {0, 255}
    centre, anywhere = masks[:, 32:64, 32:64].any(axis=(1, 2)), masks.any(axis=(1, 2))
    assert np.array_equal(centre, KINDS == TUMOUR_CENTRE)
    assert np.array_equal(anywhere, KINDS != PLAIN)


def test_without_stain_there_is_only_the_white_point() -> None:
    bare = SlideLook(np.zeros((2, 3), np.float32), np.full(3, 0.8, np.float32), blur=0.1, noise=0.0, cellularity=0.8)
    patches, _ = draw_patches(np.random.default_rng(0), bare, KINDS)
    assert (patches == 204).all()
