from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import convolve, map_coordinates

from pcam_automl.augment import AugmentSpec, Draws, augment, augment_pair, augment_spec, centre_view, draw, eight_views
from pcam_automl.counter import key_of
from pcam_automl.errors import RecipeError
from pcam_automl.recipe import Recipe, build_recipe

MEAN, STD = (0.7, 0.55, 0.65), (0.24, 0.28, 0.22)
LEVELS = {
    "mean": (0.0, 0.0, 0.0),
    "std": (1 / 255,) * 3,
    "dtype": torch.float32,
}  # no normalisation: levels in [0, 255]
FULL = augment_spec(Recipe(augment=1.0))
KEY = key_of("test_augment")


def patches(n: int, side: int = 96, seed: int = 0) -> torch.Tensor:
    """(n, 3, side, side) uint8 with channels-last strides, as the store's memory is; smooth blobs over noise."""
    rng = np.random.default_rng(seed)
    y, x, _ = np.mgrid[:side, :side, :1] / 15
    smooth = 130 + 60 * np.sin(x + rng.uniform(0, 6, (n, 1, 1, 3))) * np.cos(y + rng.uniform(0, 6, (n, 1, 1, 3)))
    nhwc = np.clip(smooth + rng.integers(-40, 40, (n, side, side, 3)), 0, 255).astype(np.uint8)
    return torch.from_numpy(nhwc).permute(0, 3, 1, 2)


def still(n: int) -> Draws:
    """Draws that change nothing."""
    return draw(AugmentSpec(crop_size=64, out_px=64), KEY, np.arange(n))


def rendered(images: torch.Tensor, draws: Draws, spec: AugmentSpec) -> np.ndarray:
    return augment(images, draws, spec, **LEVELS).numpy()


def geometry_reference(image: np.ndarray, draws: Draws, b: int, crop: int, out_px: int) -> np.ndarray:
    """One view, step by step backwards from the crop to the patch, by scipy. image: (3, S, S)."""
    centres = (np.arange(out_px) + 0.5) * crop / out_px - crop / 2
    x, y = np.meshgrid(centres - draws.shift[b, 0], centres - draws.shift[b, 1])
    x, y = x / draws.zoom[b], y / draws.zoom[b]
    turn = (x + 1j * y) * np.exp(-1j * draws.angle[b])
    x, y = turn.real * (-1) ** draws.flip_x[b], turn.imag * (-1) ** draws.flip_y[b]
    if draws.transpose[b]:
        x, y = y, x
    at = np.stack([y, x]) + (image.shape[-1] - 1) / 2
    return np.stack([map_coordinates(channel.astype(float), at, order=1, mode="reflect") for channel in image])


@pytest.mark.parametrize(("crop", "out_px", "side"), [(64, 64, 96), (96, 96, 96), (32, 32, 96), (48, 72, 64)])
def test_geometry_is_that_of_a_step_by_step_reference(crop: int, out_px: int, side: int) -> None:
    recipe = Recipe(crop_size=crop, input_size=out_px, augment=1, rotation_deg=60, shift_px=12, zoom=0.3)
    spec = replace(augment_spec(recipe), brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0, stain=0.0, blur=0.0)
    images, draws = patches(12, side), draw(spec, KEY, np.arange(12))
    got = rendered(images, draws, spec)
    want = [geometry_reference(images[b].numpy(), draws, b, crop, out_px) for b in range(12)]
    np.testing.assert_allclose(got, np.stack(want), atol=0.02)  # of 255 levels; noise amplifies the grid's rounding


def test_geometry_is_that_of_torchvision_where_the_patch_covers_the_crop() -> None:
    spec = AugmentSpec(crop_size=48, out_px=48, strength=1.0, rotation_deg=25.0, shift_px=9.0, zoom=0.2)
    images = patches(16)
    draws = draw(spec, KEY, np.arange(16))
    draws = replace(draws, zoom=np.maximum(draws.zoom, 1.0))
    for b, got in enumerate(rendered(images, draws, spec)):
        whole = TF.affine(
            images[b].float().contiguous(),
            angle=float(np.rad2deg(draws.angle[b])),
            translate=draws.shift[b].tolist(),
            scale=float(draws.zoom[b]),
            shear=[0.0, 0.0],
            interpolation=TF.InterpolationMode.BILINEAR,
        )
        np.testing.assert_allclose(got, TF.center_crop(whole, [48, 48]).numpy(), atol=0.02)


def all_of_d4() -> Draws:
    bits = np.array([[code >> 2 & 1, code >> 1 & 1, code & 1] for code in range(8)], bool)
    return replace(still(8), transpose=bits[:, 0], flip_y=bits[:, 1], flip_x=bits[:, 2])


def test_flips_and_quarter_turns_are_exact_pixels() -> None:
    images = patches(1).expand(8, -1, -1, -1)
    spec = AugmentSpec(crop_size=48, out_px=48, strength=1.0, flips=True, quarter_turns=True)
    crop = images[0, :, 24:72, 24:72].float()
    want = [crop, crop.flip(-1), crop.flip(-2), crop.flip(-1, -2)]
    want += [
        torch.rot90(crop, 1, (-2, -1)).flip(-2),
        torch.rot90(crop, 3, (-2, -1)),
        torch.rot90(crop, 1, (-2, -1)),
        torch.rot90(crop, 1, (-2, -1)).flip(-1),
    ]
    got = augment(images, all_of_d4(), spec, **LEVELS)
    assert torch.equal(got, torch.stack(want))
    assert len({view.numpy().tobytes() for view in got}) == 8


def test_the_sampled_path_turns_like_the_exact_path() -> None:
    images = patches(8)
    exact = AugmentSpec(crop_size=64, out_px=64, strength=1.0, flips=True, quarter_turns=True)
    sampled = replace(exact, shift_px=1.0)
    assert (exact.moves, sampled.moves) == (False, True)
    np.testing.assert_allclose(rendered(images, all_of_d4(), sampled), rendered(images, all_of_d4(), exact), atol=0.01)


@pytest.mark.parametrize(
    ("flips", "turns", "expected"), [(True, True, 8), (True, False, 4), (False, True, 4), (False, False, 1)]
)
def test_flips_and_turns_are_drawn_equally_often_and_off_when_off(flips: bool, turns: bool, expected: int) -> None:
    spec = augment_spec(Recipe(flips=flips, quarter_turns=turns, augment=0.01))
    draws = draw(spec, KEY, np.arange(4000))
    codes, counts = np.unique(draws.transpose * 4 + draws.flip_y * 2 + draws.flip_x, return_counts=True)
    assert len(codes) == expected
    assert np.abs(counts - 4000 / expected).max() < 5 * np.sqrt(4000 / expected)
    mirrored = draws.transpose ^ draws.flip_x ^ draws.flip_y
    assert mirrored.any() == flips


def test_a_flip_twice_is_identity() -> None:
    images = patches(4)
    spec = AugmentSpec(crop_size=96, out_px=96, strength=1.0, flips=True)
    flip = replace(still(4), flip_x=np.ones(4, bool))
    once = augment(images, flip, spec, **LEVELS).to(torch.uint8)
    assert not torch.equal(once, images)
    assert torch.equal(augment(once, flip, spec, **LEVELS).to(torch.uint8), images)


@given(
    crop=st.integers(16, 48).map(lambda half: 2 * half),
    rotation_deg=st.floats(0, 180),
    shift_px=st.floats(0, 32),
    zoom=st.floats(0, 0.99),
    strength=st.floats(0, 1),
    key=st.integers(0, 2**64 - 1),
)
@settings(max_examples=200, deadline=None)
def test_the_centre_box_stays_wholly_inside_the_crop(
    crop: int, rotation_deg: float, shift_px: float, zoom: float, strength: float, key: int
) -> None:
    spec = augment_spec(
        Recipe(crop_size=crop, augment=strength, rotation_deg=rotation_deg, shift_px=shift_px, zoom=zoom)
    )
    draws = draw(spec, key, np.arange(64))
    corners = np.array([[-16, -16], [-16, 16], [16, -16], [16, 16]]).T  # px about the patch's centre
    mapped = draws.linear() @ corners + draws.shift[:, :, None]
    assert np.abs(mapped).max() <= crop / 2 + 1e-9
    area = np.abs(np.linalg.det(draws.linear()))
    assert area.min() >= 0.25 - 1e-9  # at least half the side: never scaled away
    assert np.abs(draws.shift).max() <= spec.shift_px
    assert np.abs(draws.angle).max() <= np.deg2rad(spec.rotation_deg) + 1e-9
    assert np.abs(draws.zoom - 1).max() <= spec.zoom + 1e-9


def test_crop_32_leaves_nothing_but_turns_and_zooming_out() -> None:
    spec = augment_spec(Recipe(crop_size=32, augment=1.0))
    draws = draw(spec, KEY, np.arange(500))
    assert draws.zoom.max() <= 1.0
    assert draws.zoom.min() < 0.85
    rigid = augment_spec(Recipe(crop_size=32, augment=1.0, zoom=0.0, rotation_deg=180))
    assert not rigid.moves
    draws = draw(rigid, KEY, np.arange(500))
    assert np.abs(draws.angle).max() < 1e-7
    assert np.abs(draws.shift).max() < 1e-5
    assert (draws.zoom == 1.0).all()


def test_a_wide_crop_uses_the_full_ranges() -> None:
    draws = draw(FULL, KEY, np.arange(2000))
    for values, limit in (
        (np.rad2deg(draws.angle), 20),
        (draws.shift[:, 0], 8),
        (draws.zoom - 1, 0.2),
        (draws.brightness - 1, 0.2),
        (draws.contrast - 1, 0.2),
        (draws.saturation - 1, 0.2),
        (draws.hue, 0.04),
        (draws.stain_scale[:, 2] - 1, 0.1),
        (draws.stain_shift[:, 0], 0.01),
        (draws.blur * 2 - 0.5, 0.5),
    ):
        assert -limit <= values.min() < -0.95 * limit
        assert 0.95 * limit < values.max() <= limit


def test_strength_scales_every_magnitude() -> None:
    half, full = augment_spec(Recipe(augment=0.5)), augment_spec(Recipe(augment=1.0))
    for name in ("rotation_deg", "shift_px", "zoom", "brightness", "contrast", "saturation", "hue", "stain", "blur"):
        assert getattr(half, name) == pytest.approx(getattr(full, name) / 2)
        assert getattr(full, name) == getattr(Recipe(), name)


@pytest.mark.parametrize("input_size", [None, 32, 96])
def test_strength_0_is_the_centre_view(input_size: int | None) -> None:
    spec = augment_spec(Recipe(crop_size=64, input_size=input_size, augment=0.0))
    images = patches(5)
    got = augment(images, draw(spec, KEY, np.arange(5)), spec, MEAN, STD, dtype=torch.float32)
    assert torch.equal(got, centre_view(images, 64, spec.out_px, MEAN, STD, dtype=torch.float32))


def test_draws_do_not_depend_on_the_micro_batch() -> None:
    views = np.random.default_rng(0).integers(0, 2**40, 24)
    whole = draw(FULL, KEY, views)
    for rows in (slice(0, 5), slice(5, 6), slice(6, 24)):
        part, cut = draw(FULL, KEY, views[rows]), whole[rows]
        assert len(part) == len(cut) == len(views[rows])
        for name in vars(whole):
            np.testing.assert_array_equal(getattr(part, name), getattr(cut, name))
    assert (draw(FULL, KEY + 1, views).angle != whole.angle).all()


@pytest.mark.parametrize(
    "spec", [FULL, replace(FULL, rotation_deg=0.0, shift_px=0.0, zoom=0.0)], ids=["moved", "exact"]
)
def test_a_view_does_not_depend_on_its_batch_threads_or_memory_format(spec: AugmentSpec) -> None:
    images, draws = patches(9), draw(spec, KEY, np.arange(9))
    whole = augment(images, draws, spec, MEAN, STD, dtype=torch.float32)
    assert torch.equal(whole, augment(images, draws, spec, MEAN, STD, dtype=torch.float32))
    assert torch.equal(whole, augment(images.contiguous(), draws, spec, MEAN, STD, dtype=torch.float32))
    halves = [augment(images[s], draws[s], spec, MEAN, STD, dtype=torch.float32) for s in (slice(0, 4), slice(4, 9))]
    torch.testing.assert_close(torch.cat(halves), whole, atol=1e-6, rtol=1e-6)
    n_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = augment(images, draws, spec, MEAN, STD, dtype=torch.float32)
    finally:
        torch.set_num_threads(n_threads)
    assert torch.equal(alone, whole)


def test_colours_are_those_of_a_step_by_step_reference() -> None:
    spec = AugmentSpec(48, 48, 1.0, brightness=0.3, contrast=0.4, saturation=0.5, hue=0.2)
    images, draws = patches(6, 64), draw(spec, KEY, np.arange(6))
    luma = np.array([0.299, 0.587, 0.114])
    to_yiq = np.array([luma, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    for b, got in enumerate(rendered(images, draws, spec)):
        x = images[b, :, 8:56, 8:56].numpy().transpose(1, 2, 0) / 255  # (c, c, 3)
        x = x * draws.brightness[b]
        grey = (x @ luma).mean()
        x = grey + (x - grey) * draws.contrast[b]
        grey = (x @ luma)[..., None]
        x = grey + (x - grey) * draws.saturation[b]
        y, i, q = np.moveaxis(x @ to_yiq.T, -1, 0)
        chroma = (i + 1j * q) * np.exp(2j * np.pi * draws.hue[b])
        x = np.stack([y, chroma.real, chroma.imag], -1) @ np.linalg.inv(to_yiq).T
        np.testing.assert_allclose(got.transpose(1, 2, 0), np.clip(x, 0, 1) * 255, atol=0.01)


def test_stain_jitter_is_that_of_hed_arithmetic() -> None:
    spec = AugmentSpec(48, 48, 1.0, stain=0.4)
    images, draws = patches(6, 64), draw(spec, KEY, np.arange(6))
    rgb_from_hed = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])  # as in scikit-image
    for b, got in enumerate(rendered(images, draws, spec)):
        x = images[b, :, 8:56, 8:56].numpy().transpose(1, 2, 0)
        hed = -np.log(np.maximum(x, 1) / 255) @ np.linalg.inv(rgb_from_hed)
        hed = hed * draws.stain_scale[b] + draws.stain_shift[b]
        want = np.clip(np.exp(-hed @ rgb_from_hed), 0, 1) * 255
        np.testing.assert_allclose(got.transpose(1, 2, 0), want, atol=0.01)


def test_one_saturated_pixel_does_not_own_the_contrast() -> None:
    spec = AugmentSpec(32, 32, 1.0, contrast=0.5, stain=0.99)
    pink = torch.tensor([246, 155, 241], dtype=torch.uint8)[None, :, None, None].repeat(1, 1, 32, 32)  # eosin alone
    odd = pink.clone()
    odd[0, :, 3, 3] = torch.tensor([0, 255, 0])  # 10 million times white under these factors
    draws = replace(still(1), contrast=np.array([0.5]), stain_scale=np.array([[0.01, 1.99, 0.01]]))
    np.testing.assert_allclose(rendered(odd, draws, spec)[..., 20:], rendered(pink, draws, spec)[..., 20:], atol=1.0)


def test_stain_jitter_moves_white_by_its_shift_only() -> None:
    spec = AugmentSpec(32, 32, 1.0, stain=0.2)
    white = torch.full((30, 3, 32, 32), 255, dtype=torch.uint8)
    got = rendered(white, draw(spec, KEY, np.arange(30)), spec)
    assert got.min() > 255 * np.exp(-0.02 * 3)
    assert got.std() > 0.1


def test_grey_stays_grey_under_saturation_and_hue() -> None:
    spec = AugmentSpec(32, 32, 1.0, saturation=0.9, hue=0.5)
    grey = patches(6, 32)[:, :1].expand(-1, 3, -1, -1)
    np.testing.assert_allclose(rendered(grey, draw(spec, KEY, np.arange(6)), spec), grey.numpy(), atol=0.01)


def test_blur_mixes_the_3x3_binomial() -> None:
    spec = AugmentSpec(32, 32, 1.0, blur=1.0)
    dot = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    dot[:, :, 10, 20] = 160
    got = rendered(dot, replace(still(3), blur=np.array([0.0, 0.5, 1.0])), spec)
    np.testing.assert_array_equal(got[0], dot[0].numpy())
    kernel = np.outer([1, 2, 1], [1, 2, 1]) * 10
    np.testing.assert_allclose(got[2, 1, 9:12, 19:22], kernel, atol=1e-4)
    np.testing.assert_allclose(got[1], (got[0] + got[2]) / 2, atol=1e-4)
    texture = patches(3, 32)
    want = convolve(texture.numpy().astype(float), kernel[None, None] / 160, mode="mirror")
    np.testing.assert_allclose(rendered(texture, replace(still(3), blur=np.ones(3)), spec), want, atol=1e-3)


def test_the_strongest_magnitudes_give_finite_values_in_range() -> None:
    limits = {"zoom": 0.99, "brightness": 0.99, "contrast": 0.99, "saturation": 0.99, "hue": 0.5, "stain": 0.99}
    recipe = build_recipe({"augment": 1, "rotation_deg": 180, "shift_px": 32, "blur": 1, **limits})
    noise = torch.from_numpy(np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (64, 3, 96, 96)))
    spec = augment_spec(recipe)
    got = rendered(noise, draw(spec, KEY, np.arange(64)), spec)
    assert got.min() >= 0
    assert got.max() <= 255
    assert got.std() > 30


def test_corners_hold_tissue_while_the_patch_reaches_them() -> None:
    spec = AugmentSpec(64, 64, 1.0, rotation_deg=45.0)
    ramp = torch.zeros(1, 3, 96, 96, dtype=torch.uint8)
    ramp[:, :, :, :16] = 200  # outside the crop of 64
    turned = replace(still(1), angle=np.array([np.pi / 4]))
    got = rendered(ramp, turned, spec)
    assert got[0, 0, 0, 0] == pytest.approx(200)  # the top left corner shows what lay left of the crop
    assert got[0, 0, -1, 0] == got[0, 0, 0, -1] == 0


def test_centre_view_crops_resizes_and_normalises() -> None:
    images = patches(3)
    got = centre_view(images, 64, 64, MEAN, STD, dtype=torch.float32)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    crop = images[:, :, 16:80, 16:80] / 255
    torch.testing.assert_close(got, (crop - mean) / std, atol=1e-5, rtol=0)
    assert got.is_contiguous()
    large = centre_view(images, 64, 128, MEAN, STD, dtype=torch.float32)
    want = TF.resize(crop.contiguous(), [128, 128], antialias=False)
    torch.testing.assert_close(large, (want - mean) / std, atol=1e-5, rtol=0)
    assert centre_view(images, 32, 32, MEAN, STD, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_eight_views_are_the_dihedral_group() -> None:
    x = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    views = eight_views(x)
    assert isinstance(views, Iterator)
    got = [view.numpy().tobytes() for view in views]
    turns = [torch.rot90(y, k, (-2, -1)) for y in (x, x.flip(-1)) for k in range(4)]
    assert got[0] == x.numpy().tobytes()
    assert sorted(got) == sorted(turn.numpy().tobytes() for turn in turns)
    assert len(set(got)) == 8


def test_bad_input_is_refused() -> None:
    spec = AugmentSpec(crop_size=64, out_px=64)
    with pytest.raises(RecipeError, match="crop_size must be at most the patches' side of 48 px, got 64"):
        augment(patches(2, 48), still(2), spec, **LEVELS)
    with pytest.raises(ValueError, match="one row an image, got 3 for 2"):
        augment(patches(2), still(3), spec, **LEVELS)
    for images in (patches(2).float(), patches(2)[:, :2], patches(2)[:, :, :90], patches(2)[0]):
        with pytest.raises(ValueError, match="uint8, got"):
            centre_view(images, 64, 64, MEAN, STD, dtype=torch.float32)


@pytest.mark.gpu
def test_the_gpu_makes_the_same_views() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    images, draws = patches(16), draw(FULL, KEY, np.arange(16))
    on_gpu = augment(images.cuda(), draws, FULL, **LEVELS).cpu().numpy()
    np.testing.assert_allclose(on_gpu, rendered(images, draws, FULL), atol=0.5)  # TF32 may be on


def dense(**fields: object) -> AugmentSpec:
    quiet = dict.fromkeys(("brightness", "contrast", "saturation", "hue", "stain", "blur"), 0.0)
    return augment_spec(build_recipe({"task": "dense", "backbone": "unet", "tile_size": 32, **quiet, **fields}))


def marked(n: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images whose red channel is 255 times their mask, green the row's number and blue the column's."""
    rng = np.random.default_rng(5)
    mask = np.kron(rng.integers(0, 2, (n, height // 8, width // 8)), np.ones((8, 8))).astype(np.uint8)[:, None]
    y, x = np.broadcast_arrays(*np.ogrid[:height, :width])
    images = np.stack([mask[:, 0] * 255, *(np.broadcast_to(axis, mask[:, 0].shape) for axis in (y, x))], axis=1)
    return torch.from_numpy(images.astype(np.uint8)), torch.from_numpy(mask)


def paired(spec: AugmentSpec, n: int, height: int, width: int, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    images, masks = marked(n, height, width)
    views, of_masks = augment_pair(images, masks, draw(spec, KEY, np.arange(first, first + n)), spec, **LEVELS)
    return views.numpy(), of_masks.numpy()


@pytest.mark.parametrize("shape", [(96, 96), (64, 120), (32, 32)])
def test_masks_follow_their_images_through_any_geometry(shape: tuple[int, int]) -> None:
    images, masks = paired(dense(augment=1, rotation_deg=180, shift_px=20, zoom=0.4), 24, *shape)
    red = images[:, 0] / 255
    assert images.shape == (24, 3, 32, 32)
    assert set(np.unique(masks)) == {0.0, 1.0}
    sure = (red < 0.01) | (red > 0.99)  # elsewhere the image is interpolated across an edge of the mask
    assert sure.mean() > 0.6
    assert np.array_equal(red[sure] > 0.5, masks[sure] > 0.5)
    assert np.abs(red - masks).max() < 0.76  # the nearest of four pixels has a weight of a quarter at least


@pytest.mark.parametrize("fields", [{"augment": 0.0}, {"augment": 1.0, "rotation_deg": 0, "shift_px": 0, "zoom": 0}])
def test_tiles_that_are_only_turned_are_exact_pixels(fields: dict[str, float]) -> None:
    images, masks = paired(dense(**fields), 40, 64, 96)
    assert np.array_equal(images[:, 0], masks * 255)
    whole, _ = marked(40, 64, 96)
    for b in range(40):
        top, left = int(images[b, 1].min()), int(images[b, 2].min())
        crop = whole[b, :, top : top + 32, left : left + 32].numpy()
        choices = [view.numpy() for view in eight_views(torch.from_numpy(crop)[None])]
        assert any(np.array_equal(images[b], choice[0]) for choice in choices[: 8 if fields["augment"] else 1])


def test_tiles_lie_uniformly_over_the_image() -> None:
    images, _ = paired(dense(augment=0.0), 2000, 40, 96)
    top, left = images[:, 1, 0, 0].astype(int), images[:, 2, 0, 0].astype(int)
    assert set(top) == set(range(9))  # every place where 32 px fit into 40
    assert set(left) == set(range(65))
    assert np.bincount(left, minlength=65).max() < 3 * 2000 / 65


def test_a_tile_as_large_as_the_image_is_the_image() -> None:
    images, masks = paired(dense(augment=0.0, tile_size=96), 3, 96, 96)
    whole, truth = marked(3, 96, 96)
    assert np.array_equal(images, whole.numpy())
    assert np.array_equal(masks, truth[:, 0].numpy())


def test_sampled_tiles_lie_where_exact_ones_do() -> None:
    spec = dense(augment=0.0)
    images, masks = marked(12, 64, 96)
    draws = draw(spec, KEY, np.arange(12))
    exact = augment_pair(images, masks, draws, spec, **LEVELS)
    sampled = augment_pair(images, masks, draws, replace(spec, zoom=1e-9), **LEVELS)
    torch.testing.assert_close(sampled[0], exact[0], atol=0.02, rtol=0)
    assert torch.equal(sampled[1], exact[1])


def test_tiles_do_not_depend_on_how_the_batch_is_cut() -> None:
    spec = dense(augment=1)
    images, masks = marked(8, 64, 64)
    draws = draw(spec, KEY, np.arange(8))
    whole = augment_pair(images, masks, draws, spec, **LEVELS)
    tail = augment_pair(images[5:], masks[5:], draws[5:], spec, **LEVELS)
    assert torch.equal(whole[0][5:], tail[0])
    assert torch.equal(whole[1][5:], tail[1])
    again = augment_pair(images, masks, draw(spec, KEY, np.arange(8)), spec, **LEVELS)
    assert torch.equal(whole[0], again[0])


def test_colours_leave_masks_alone() -> None:
    recipe = Recipe(task="dense", backbone="unet", tile_size=32, augment=1, rotation_deg=0, shift_px=0, zoom=0)
    images, masks = marked(8, 64, 64)
    spec = augment_spec(recipe)
    bare = replace(spec, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0, stain=0.0, blur=0.0)
    draws = draw(spec, KEY, np.arange(8))
    coloured = augment_pair(images, masks, draws, spec, **LEVELS)
    plain = augment_pair(images, masks, draws, bare, **LEVELS)
    assert torch.equal(coloured[1], plain[1])
    assert not torch.equal(coloured[0], plain[0])


def test_tiles_larger_than_the_image_and_foreign_masks_are_refused() -> None:
    images, masks = marked(2, 64, 96)
    spec = dense(tile_size=80)
    with pytest.raises(RecipeError, match=r"recipe.tile_size must be at most the patches' side of 64 px, got 80"):
        augment_pair(images, masks, draw(spec, KEY, np.arange(2)), spec, **LEVELS)
    spec = dense()
    with pytest.raises(ValueError, match="masks must be uint8 as large as the images"):
        augment_pair(images, masks[..., :32], draw(spec, KEY, np.arange(2)), spec, **LEVELS)
