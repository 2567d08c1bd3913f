"""Several processes on one training against one process with micro-batches ("ghost batches") of a rank's size."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from easy_set import TINY, easy_patches
from warm_processes import warm_context

from pcam_automl.batches import ResidentPatches
from pcam_automl.errors import InputError, Interrupted, RecipeError
from pcam_automl.models.factory import build_network, normalisation
from pcam_automl.models.weights import Weights
from pcam_automl.recipe import Recipe
from pcam_automl.train import check_ranks
from pcam_automl.training import ranks as ranks_module
from pcam_automl.training.compute import Compute
from pcam_automl.training.engine import Rung, Training
from pcam_automl.training.fit import fit
from pcam_automl.training.ranks import Ranks, from_first, joined, mean_over_ranks, ranks, sum_over_ranks
from pcam_automl.training.task import PatchTask, TrainingData

N_RANKS, BATCH = 2, 16
RECIPE = Recipe(
    backbone=TINY, crop_size=32, batch_size=BATCH, schedule="one_cycle", dropout=0.0, lr=2e-3, ema=0.9, optimizer="adamw", clip_norm=1.0
)  # fmt: skip
RUNGS = tuple(Rung(48 * n, 48) for n in range(1, 6))
PLACES = ("in scoring", "in a step")
"""Where a signal reaches one rank: both end at the first step of the second epoch, the fourth in all."""


def trained(compute: Compute, checkpoints: Path | None = None, stop: Callable[[], None] = lambda: None) -> Training:
    torch.set_num_threads(1)
    images, label = easy_patches(60, seed=3)
    patches = ResidentPatches(torch.from_numpy(images), torch.device("cpu"))
    data = TrainingData(patches, label, np.arange(48), np.arange(48, 60), normalisation(TINY))
    network = build_network(RECIPE, Weights("none"), seed=0)
    training = Training(RECIPE, network, PatchTask(RECIPE, data, compute, 99), compute, key=99)
    list(fit(training, data.train_rows, RUNGS, checkpoints=checkpoints, keep_final=True, stop=stop))
    return training


def digest(training: Training) -> dict[str, Any]:
    state = training.averaged_state()
    return {
        "losses": [result.train_loss for result in training.results],
        "accuracies": [result.train_accuracy for result in training.results],
        "auc": training.results[-1].auc,
        "weights": {
            name: tensor.flatten()[:8].tolist() for name, tensor in state.items() if tensor.is_floating_point()
        },
    }


def stopped(place: str, rank: int, checkpoints: Path) -> str:
    """A training that the second rank hears a signal in: what it ended in, and after how many steps."""
    calls, signalled, score = 0, False, PatchTask.score

    def stop() -> None:
        nonlocal calls, signalled
        calls += 1
        signalled = signalled or (place, rank, calls) == ("in a step", 1, 4)
        if signalled:  # and stays so
            raise Interrupted("enough", 15)

    def scoring(self: PatchTask, network: Any, stop: Any) -> Any:
        nonlocal signalled
        signalled = signalled or (place, rank) == ("in scoring", 1)
        return score(self, network, stop)

    try:
        with mock.patch.object(PatchTask, "score", scoring):
            trained(Compute("cpu"), checkpoints, stop)
    except Interrupted as fault:
        return f"{fault} {fault.exit_code} {calls}"
    return "not interrupted"


def as_rank(rank: int, port: int, folder: Path) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(N_RANKS),
        TORCHELASTIC_RUN_ID="test",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    with joined("auto") as device:
        assert device == "cpu"
        assert (ranks().rank, ranks().n) == (rank, N_RANKS)
        told = from_first(lambda: {"rank": ranks().rank, "n": ranks().n})
        tensors = [torch.full((3,), float(rank + 1)), torch.full((2, 2), rank + 1), torch.full((1,), 1.0)]
        sum_over_ranks(tensors)
        mean = torch.tensor([float(rank)])
        mean_over_ranks([mean])
        found = digest(trained(Compute("cpu"), folder / "checkpoints"))
        for place in PLACES:
            found[place] = stopped(place, rank, folder / place)
            found[f"resumed {place}"] = digest(trained(Compute("cpu"), folder / place))["losses"]
        found |= {"told": told, "sums": [tensor.flatten().tolist() for tensor in tensors], "mean": mean.item()}
    (folder / f"{rank}.json").write_text(json.dumps(found))


def test_two_processes_on_one_training(tmp_path: Path) -> None:
    folder = tmp_path
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    workers = [warm_context().Process(target=as_rank, args=(rank, port, folder)) for rank in range(N_RANKS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0] * N_RANKS
    checkpoints = {f"checkpoints/{entry.name}" for entry in (folder / "checkpoints").iterdir()}
    assert checkpoints == {"checkpoints/3", "checkpoints/4"}, "the first rank's, the two newest"
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(N_RANKS)]
    what_the_first_finds_all_have(found)
    the_ranks_end_in_the_same_weights(found)
    two_ranks_have_the_loss_curve_of_one_process_with_ghost_batches(found)
    a_signal_to_one_rank_ends_all_at_the_same_step_and_they_go_on_together(found)


def what_the_first_finds_all_have(found: list[dict[str, Any]]) -> None:
    assert [one["told"] for one in found] == [{"rank": 0, "n": 1}] * N_RANKS, "it decides by itself, trainings included"
    assert [one["sums"] for one in found] == [[[3.0] * 3, [3] * 4, [2.0]]] * N_RANKS
    assert [one["mean"] for one in found] == [0.5] * N_RANKS


def the_ranks_end_in_the_same_weights(found: list[dict[str, Any]]) -> None:
    assert found[0]["weights"] == found[1]["weights"]
    assert found[0]["losses"] == found[1]["losses"]


def two_ranks_have_the_loss_curve_of_one_process_with_ghost_batches(found: list[dict[str, Any]]) -> None:
    ghosts = digest(trained(Compute("cpu", micro_batch=BATCH // N_RANKS)))
    np.testing.assert_allclose(found[0]["losses"], ghosts["losses"], atol=1e-3)
    np.testing.assert_allclose(found[0]["accuracies"], ghosts["accuracies"], atol=1e-6)
    whole = digest(trained(Compute("cpu")))
    assert np.abs(np.subtract(whole["losses"], ghosts["losses"])).max() > 1e-3, "the batch statistics matter"


def a_signal_to_one_rank_ends_all_at_the_same_step_and_they_go_on_together(found: list[dict[str, Any]]) -> None:
    for place in PLACES:
        assert found[0][place] == "another process of this training was interrupted 143 4"
        assert found[1][place] == "enough 143 4"
        assert found[0][f"resumed {place}"] == found[0]["losses"] == found[1][f"resumed {place}"]


def test_parts_of_a_batch_make_the_whole() -> None:
    for n_ranks in (1, 2, 3, 7):
        for n in (7, 16, 33):
            parts = [range(n)[Ranks(rank, n_ranks).share_of(n)] for rank in range(n_ranks)]
            assert [i for part in parts for i in part] == list(range(n))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_alone_nothing_is_asked_of_others() -> None:
    tensor = torch.ones(2)
    mean_over_ranks([tensor])
    assert tensor.tolist() == [1.0, 1.0]
    assert from_first(lambda: "here") == "here"
    with joined("cpu") as device:
        assert device == "cpu"


def test_a_device_of_ones_own_or_too_small_a_batch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ranks_module.launched_size() == 1, "another launcher's: not ours to join"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    with pytest.raises(InputError, match="under torchrun every process has a GPU of its own"), joined("cuda:1"):
        pass
    monkeypatch.setattr("pcam_automl.train.ranks", lambda: Ranks(0, 9))
    with pytest.raises(RecipeError, match="at least two images for each of 9 processes, got 16"):
        check_ranks(RECIPE)
    assert ranks_module.launched_size() == 2
