"""Batches of scoring where memory is short: the same answers, fewer at once. Random views of a test-time average."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from pcam_automl.augment import augment, augment_spec, draw
from pcam_automl.batches import Patches, ResidentPatches, StreamedPatches
from pcam_automl.counter import key_of
from pcam_automl.models.factory import Normalisation
from pcam_automl.recipe import Recipe
from pcam_automl.training.compute import Compute
from pcam_automl.training.scoring import EVAL_BATCH, LEAST_BATCH, Views, eval_batch, mean_over_views, outputs_of_rows

CPU = torch.device("cpu")


def mean(images: Tensor) -> Tensor:
    return images.float().mean((1, 2, 3))


@pytest.fixture(params=[ResidentPatches, StreamedPatches])
def patches(request: pytest.FixtureRequest) -> Patches:
    pixels = np.random.default_rng(0).integers(0, 256, (700, 4, 4, 3), np.uint8)
    return request.param(torch.from_numpy(pixels), CPU)


@pytest.mark.parametrize("room", [LEAST_BATCH, 100, EVAL_BATCH - 1])
def test_what_does_not_fit_is_judged_in_smaller_batches(patches: Patches, room: int) -> None:
    rows = np.random.default_rng(1).permutation(700)[:600].astype(np.int64)
    told: list[int] = []

    def hungry(images: Tensor) -> Tensor:
        if len(images) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return mean(images)

    found = outputs_of_rows(hungry, patches, rows, px=64, progress=told.append)
    whole = outputs_of_rows(mean, patches, rows, px=64)
    assert found is not None
    assert whole is not None
    np.testing.assert_array_equal(found, whole)
    assert sum(told) == 600
    assert max(told) <= room


def test_larger_inputs_are_judged_fewer_at_once(patches: Patches) -> None:
    assert [eval_batch(px) for px in (32, 64, 96, 128, 512)] == [EVAL_BATCH, EVAL_BATCH, 113, 64, LEAST_BATCH]
    sizes: list[int] = []
    outputs_of_rows(mean, patches, np.arange(300), px=96, progress=sizes.append)
    assert sizes == [113, 113, 74]


def test_a_device_without_room_for_a_few_patches_and_other_faults_are_raised(patches: Patches) -> None:
    for fault in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("shapes cannot be multiplied")):

        def broken(images: Tensor, fault: Exception = fault) -> Tensor:
            raise fault

        with pytest.raises(type(fault), match=str(fault)):
            outputs_of_rows(broken, patches, np.arange(600), px=64)


NORM = Normalisation((0.7, 0.5, 0.6), (0.2, 0.25, 0.3))
RANDOM = Recipe.model_validate({"crop_size": 40, "tta": "random", "tta_views": 3, "augment": 1.0, "seed": 4})


def noise(n: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(2).integers(0, 256, (n, 3, 48, 48), np.uint8))


def test_random_views_show_every_patch_under_the_draws_of_its_view_number() -> None:
    images, views = noise(5), Views(RANDOM, NORM, "random")
    spec, key = augment_spec(RANDOM), key_of(4, "test time")
    found = list(views.of(images))
    assert len(views) == len(found) == 3
    for number, view in enumerate(found):
        draws = draw(spec, key, np.array([number]))
        alone = [augment(images[i : i + 1], draws, spec, NORM.mean, NORM.std, dtype=torch.float32) for i in range(5)]
        torch.testing.assert_close(view, torch.cat(alone), rtol=0.0, atol=1e-5)
    for one, other in itertools.combinations(found, 2):
        assert (one - other).abs().mean() > 0.1


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_the_mean_over_random_views_is_the_same_however_the_batch_is_cut(cut: int) -> None:
    images, views, compute = noise(5), Views(RANDOM, NORM, "random"), Compute("cpu")
    weight = torch.from_numpy(np.random.default_rng(3).normal(size=(3, 40, 40)))

    def weighted(view: Tensor) -> Tensor:
        return (view * weight).mean((1, 2, 3))

    whole = mean_over_views(weighted, images, views, compute)
    torch.testing.assert_close(whole, torch.stack([weighted(view) for view in views.of(images)]).mean(0).float())
    pieces = [mean_over_views(weighted, some, views, compute) for some in (images[:cut], images[cut:])]
    torch.testing.assert_close(torch.cat(pieces), whole)
