"""Resident and streamed patches give the same pixels, batch by batch and training by training."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from easy_set import TINY, easy_patches
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pcam_automl import batches as batches_module
from pcam_automl.batches import Patches, ResidentPatches, StreamedPatches
from pcam_automl.models.factory import build_network, normalisation
from pcam_automl.models.weights import Weights
from pcam_automl.recipe import Recipe
from pcam_automl.training.compute import Compute
from pcam_automl.training.engine import Rung, Training
from pcam_automl.training.fit import fit
from pcam_automl.training.task import PatchTask, TrainingData

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.from_numpy(easy_patches(40, seed=5)[0])


@settings(max_examples=30, deadline=None)
@given(
    batches=st.lists(st.lists(st.integers(0, 39), min_size=1, max_size=9), min_size=1, max_size=6),
    announced=st.lists(st.one_of(st.none(), st.integers(0, 5)), min_size=6, max_size=6),
)
def test_streamed_batches_are_the_resident_ones_whatever_was_announced(
    images: Tensor, batches: list[list[int]], announced: list[int | None]
) -> None:
    resident, streamed = ResidentPatches(images, CPU), StreamedPatches(images, CPU)
    kept = []
    for number, rows in enumerate(np.array(batch) for batch in batches):
        if (told := announced[number]) is not None:  # rightly, or of another batch altogether
            streamed.expect(np.array(batches[told % len(batches)]))
        kept.append((streamed.gather(rows), resident.gather(rows)))
    for one, other in kept:  # after all of them: a staging buffer that is filled again must not change an earlier batch
        assert torch.equal(one, other)
        assert one.stride() == other.stride()


def test_what_is_expected_is_fetched_before_it_is_asked_for(images: Tensor) -> None:
    fetched = threading.Event()
    streamed = StreamedPatches(images, CPU)
    whole = streamed._fetch
    streamed._fetch = lambda rows: (whole(rows), fetched.set())[0]  # type: ignore[method-assign, func-returns-value]
    streamed.expect(np.arange(5))
    assert fetched.wait(30)
    assert torch.equal(streamed.gather(np.arange(5)), ResidentPatches(images, CPU).gather(np.arange(5)))


def test_a_fault_while_fetching_reaches_the_one_who_asks(images: Tensor) -> None:
    streamed = StreamedPatches(images, CPU)
    streamed.expect(np.array([40]))
    with pytest.raises((IndexError, RuntimeError), match="index"):
        streamed.gather(np.array([40]))
    assert len(streamed.gather(np.array([1]))) == 1


@pytest.mark.parametrize("micro_batch", [None, 6])
def test_trainings_from_resident_and_streamed_patches_end_in_the_same_weights(micro_batch: int | None) -> None:
    torch.set_num_threads(1)
    pixels, label = easy_patches(60, seed=3)
    recipe = Recipe(backbone=TINY, crop_size=32, batch_size=16, schedule="wsd", decay=0.25, lr=2e-3, ema=0.9)
    compute = Compute("cpu", micro_batch=micro_batch)

    def trained(patches: Patches) -> tuple[dict[str, Tensor], float | None]:
        rows = np.arange(60)
        data = TrainingData(patches, label, rows[:40], rows[40:], normalisation(TINY))
        network = build_network(recipe, Weights("none"), seed=0)
        training = Training(recipe, network, PatchTask(recipe, data, compute, 9), compute, key=9)
        *_, last = fit(training, rows[:40], (Rung(48, 30), Rung(96, 40)))
        return training.averaged_state(), last.auc

    one, two = (
        trained(ResidentPatches(torch.from_numpy(pixels), CPU)),
        trained(StreamedPatches(torch.from_numpy(pixels), CPU)),
    )
    assert one[1] == two[1]
    assert all(torch.equal(one[0][key], two[0][key]) for key in one[0])


def opened(folder: Path, device: torch.device) -> Patches:
    np.save(folder / "patches.npy", easy_patches(40, seed=5)[0])
    return batches_module._open(SimpleNamespace(root=folder), "patches.npy", device)  # type: ignore[arg-type]


def test_a_pack_larger_than_the_memory_is_read_ahead_on_a_cpu_too(
    tmp_path: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(opened(tmp_path, CPU), ResidentPatches)
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(batches_module, "CGROUP_LIMIT", limit)
    limit.write_text("max\n")
    assert isinstance(opened(tmp_path, CPU), ResidentPatches)
    limit.write_text(f"{images.nbytes}\n")
    streamed = opened(tmp_path, CPU)
    assert isinstance(streamed, StreamedPatches)
    assert torch.equal(streamed.gather(np.arange(5)), ResidentPatches(images, CPU).gather(np.arange(5)))


def test_a_gpu_that_another_process_filled_in_the_meantime_gets_its_patches_as_a_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Tensor, device: torch.device) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 10**9))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.Tensor, "to", full)
    monkeypatch.setattr(batches_module, "StreamedPatches", lambda tensor, device: ("streamed", len(tensor), device))
    assert opened(tmp_path, torch.device("cuda:0")) == ("streamed", 40, torch.device("cuda:0"))


def test_faults_in_a_row_leave_the_staging_buffers_whole(images: Tensor) -> None:
    """Memory that is short now and then, hundreds of trials apart, must not end every trial after it."""
    streamed = StreamedPatches(images, CPU)
    for _ in range(3):
        with pytest.raises((IndexError, RuntimeError), match="index"):
            streamed.gather(np.array([40]))
    assert len(streamed._staging) == 2
    assert torch.equal(streamed.gather(np.arange(5)), ResidentPatches(images, CPU).gather(np.arange(5)))
