"""What only a CUDA device can show. Skipped with a word where there is none; not run yet (docs/performance.md)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from easy_set import TINY, easy_patches
from torch import Tensor

from pcam_automl.batches import Patches, ResidentPatches, StreamedPatches
from pcam_automl.interrupt import stop_signal
from pcam_automl.models.factory import build_network, normalisation
from pcam_automl.models.weights import Weights
from pcam_automl.recipe import Recipe
from pcam_automl.search.create import create_or_open_study
from pcam_automl.search.placement import shared_packs
from pcam_automl.search.processes import WorkerTask, run_workers
from pcam_automl.search.study import Asked
from pcam_automl.search.turns import Limits
from pcam_automl.training.checkpoint import CheckpointWriter, read_checkpoint
from pcam_automl.training.compute import Compute, fixed_variant, has_precision, peak_of_step
from pcam_automl.training.engine import Rung, Training
from pcam_automl.training.fit import fit, save
from pcam_automl.training.scoring import outputs_of_rows
from pcam_automl.training.task import PatchTask, TrainingData

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]  # of CUDA builds' own
RECIPE = Recipe(backbone=TINY, crop_size=32, batch_size=16, schedule="wsd", decay=0.25, lr=2e-3, ema=0.9)
RUNGS = (Rung(160, 60), Rung(480, 60))


@pytest.fixture
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda:0")


def start(patches: Patches, label: np.ndarray, compute: Compute) -> Training:
    rows = np.arange(90)
    data = TrainingData(patches, label, rows[:60], rows[60:], normalisation(TINY))
    network = build_network(RECIPE, Weights("none"), seed=0)
    return Training(RECIPE, network, PatchTask(RECIPE, data, compute, 9), compute, key=9)


def patches_on(device: torch.device) -> tuple[ResidentPatches, np.ndarray]:
    pixels, label = easy_patches(90, seed=3)
    return ResidentPatches(torch.from_numpy(pixels).to(device), device), label


def test_streamed_batches_are_the_resident_ones(gpu: torch.device) -> None:
    pixels = torch.from_numpy(easy_patches(90, seed=3)[0])
    resident, streamed = ResidentPatches(pixels.to(gpu), gpu), StreamedPatches(pixels, gpu)
    rng, kept = np.random.default_rng(0), list[tuple[Tensor, Tensor]]()
    batches = [rng.integers(0, 90, 32) for _ in range(20)]
    streamed.expect(batches[0])
    for number, rows in enumerate(batches):
        batch = streamed.gather(rows)
        if number + 1 < len(batches):
            streamed.expect(batches[number + 1])
        kept.append((batch, resident.gather(rows)))
    assert all(torch.equal(one, other) for one, other in kept)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_every_precision_learns_and_goes_on_from_its_checkpoint(
    gpu: torch.device, tmp_path: Path, precision: str
) -> None:
    if not has_precision(gpu, precision):  # type: ignore[arg-type]
        pytest.skip(f"no {precision} on this device")
    patches, label = patches_on(gpu)
    compute = Compute(str(gpu), precision, True)  # type: ignore[arg-type]
    results = list(fit(start(patches, label, compute), np.arange(60), RUNGS))
    assert results[-1].auc is not None
    assert results[-1].auc > 0.9
    cut = fit(start(patches, label, compute), np.arange(60), RUNGS, checkpoints=tmp_path)
    next(cut)
    next(cut)
    again = list(fit(start(patches, label, compute), np.arange(60), RUNGS, checkpoints=tmp_path))
    assert [one.views for one in again] == [one.views for one in results]
    assert again[-1].auc is not None
    assert again[-1].auc > 0.9


def test_a_training_that_began_on_a_cpu_goes_on(gpu: torch.device, tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    compute = Compute("cpu", "fp32", True, routed=True)
    cut = fit(start(*patches_on(cpu), compute), np.arange(60), RUNGS, checkpoints=tmp_path)
    next(cut)
    next(cut)
    again = start(*patches_on(gpu), compute.moved_to(gpu))
    results = list(fit(again, np.arange(60), RUNGS, checkpoints=tmp_path))
    assert again.n_resumed == 1
    assert results[-1].auc is not None
    assert results[-1].auc > 0.9


def test_the_memory_of_a_step_is_measured_before_anything_has_used_the_device(gpu: torch.device) -> None:
    def build() -> torch.nn.Module:
        return build_network(RECIPE, Weights("none"), seed=0)

    small, large = (peak_of_step(build, 96, n, fixed_variant(gpu)) for n in (16, 256))
    assert 0 < small < large


@pytest.fixture
def little_memory(gpu: torch.device) -> Iterator[None]:
    """Half a GB above what is held."""
    total = torch.cuda.get_device_properties(gpu).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(gpu) + 2**29) / total, gpu)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0, gpu)


def test_a_step_that_does_not_fit_is_cut_into_micro_batches(gpu: torch.device, little_memory: None) -> None:
    patches, label = patches_on(gpu)
    rows = np.arange(90)
    recipe = RECIPE.model_copy(
        update={"backbone": "resnet10t", "crop_size": 96, "batch_size": 512, "views": 1024}
    )  # its weights take 0.1 GB
    compute = Compute(str(gpu), "fp32", True)
    data = TrainingData(patches, label, rows[:60], rows[60:], normalisation(TINY))
    network = build_network(recipe, Weights("none"), seed=0)
    training = Training(recipe, network, PatchTask(recipe, data, compute, 9), compute, key=9)
    shown = np.arange(512)
    training.step(shown % 60, shown)
    assert 2 <= training.micro_batch < 512


def test_scoring_that_does_not_fit_takes_fewer_patches_at_once(gpu: torch.device, little_memory: None) -> None:
    seen: list[int] = []

    def hungry(images: Tensor) -> Tensor:
        seen.append(len(images))
        return torch.zeros(len(images), 2**20, device=gpu).sum(dim=1)  # 4 MiB each

    patches, _ = patches_on(gpu)
    assert outputs_of_rows(hungry, patches, np.arange(1024) % 90, px=64) is not None
    assert min(seen) < max(seen)


def test_two_workers_train_on_one_copy_of_the_pack_and_give_it_back(
    gpu: torch.device, easy_pack: Path, tmp_path: Path
) -> None:
    pins = {"backbone": TINY, "crop_size": 32, "batch_size": 16}
    asked = Asked(data=easy_pack, weights="none", views=96, pins=pins, device="cuda:0", n_workers=2)
    opened = create_or_open_study("many", f"sqlite:///{tmp_path}/s.db", asked, say=lambda text: None)
    task = WorkerTask("many", opened.url, Asked(data=easy_pack), Limits(4), 2)
    packs = shared_packs(opened.store, ["cuda:0", "cuda:0"])
    assert list(packs) == ["cuda:0"]
    held = torch.cuda.memory_allocated(gpu)
    with stop_signal("") as stop, stop.deferred():
        run_workers(task, ["cuda:0", "cuda:0"], stop=stop, heard=lambda event: None, packs=packs)
    assert sum(trial.state.is_finished() for trial in opened.study.get_trials()) == 4
    n_bytes = packs["cuda:0"].nbytes
    packs.clear()
    torch.cuda.ipc_collect()
    assert torch.cuda.memory_allocated(gpu) <= held - n_bytes


def test_a_checkpoint_that_is_written_beside_the_training_holds_the_state_it_was_handed(
    gpu: torch.device, tmp_path: Path
) -> None:
    training = start(*patches_on(gpu), Compute(str(gpu), "fp32", True))
    writer = CheckpointWriter()
    training.step(np.arange(16), np.arange(16))
    before = {name: tensor.cpu().clone() for name, tensor in training.network.state_dict().items()}
    save(training, tmp_path, 0, writer)
    for number in range(1, 20):  # meanwhile the weights move on
        training.step(np.arange(16), np.arange(16 * number, 16 * number + 16))
    writer.flush()
    parts, _ = read_checkpoint(tmp_path / "0")
    assert all(torch.equal(parts["model"][name], tensor) for name, tensor in before.items())
