"""Batches of scoring where memory is short: the same answers, fewer at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pcam_automl.batches import Patches, ResidentPatches, StreamedPatches
from pcam_automl.training.scoring import EVAL_BATCH, LEAST_BATCH, outputs_of_rows

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

    found = outputs_of_rows(hungry, patches, rows, progress=told.append)
    whole = outputs_of_rows(mean, patches, rows)
    assert found is not None
    assert whole is not None
    np.testing.assert_array_equal(found, whole)
    assert sum(told) == 600
    assert max(told) <= room


def test_a_device_without_room_for_a_few_patches_and_other_faults_are_raised(patches: Patches) -> None:
    for fault in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("shapes cannot be multiplied")):

        def broken(images: Tensor, fault: Exception = fault) -> Tensor:
            raise fault

        with pytest.raises(type(fault), match=str(fault)):
            outputs_of_rows(broken, patches, np.arange(600))
