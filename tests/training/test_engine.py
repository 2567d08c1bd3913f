"""The loop: interrupted + resumed = uninterrupted, micro-batches, rungs, divergence. On a tiny network and random patches."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from easy_set import TINY, easy_patches
from hypothesis import given
from hypothesis import strategies as st

from pcam_automl.batches import ResidentPatches, ViewStream, in_batches
from pcam_automl.errors import Interrupted, TrainingDiverged
from pcam_automl.models.factory import build_network, normalisation
from pcam_automl.models.weights import Weights
from pcam_automl.recipe import Recipe
from pcam_automl.training.compute import Compute
from pcam_automl.training.engine import Rung, Training, TrainingData, fit, is_out_of_memory, stable_views, total_views

CPU = torch.device("cpu")
RUNGS = (Rung(64, 40), Rung(128, 60), Rung(192, 60))
RECIPE = Recipe(
    backbone=TINY,
    crop_size=32,
    batch_size=16,
    schedule="wsd",
    decay=0.25,
    dropout=0.2,
    lr=2e-3,
    ema=0.9,
    optimizer="adamw",
)


@pytest.fixture(scope="module")
def data() -> TrainingData:
    images, label = easy_patches(90, seed=3)
    rows = np.arange(90)
    return TrainingData(
        ResidentPatches(torch.from_numpy(images), CPU), label, rows[:60], rows[60:], normalisation(TINY)
    )


def start(recipe: Recipe, data: TrainingData, compute: Compute | None = None) -> Training:
    torch.set_num_threads(1)
    return Training(
        recipe, build_network(recipe, Weights("none"), seed=recipe.seed), data, compute or Compute("cpu"), key=99
    )


def same(one: Training, two: Training) -> bool:
    a, b = one.averaged_state(), two.averaged_state()
    return all(torch.equal(a[key], b[key]) for key in a)


@given(cut=st.integers(1, 199), n=st.integers(1, 70), key=st.integers(0, 2**63))
def test_any_cut_of_a_view_stream_gives_the_same_rows(cut: int, n: int, key: int) -> None:
    stream = ViewStream(key, np.arange(n) * 3, first_view=11)
    whole = stream.rows_of(11, 211)
    assert np.array_equal(whole, np.concatenate([stream.rows_of(11, 11 + cut), stream.rows_of(11 + cut, 211)]))
    assert len(whole) == 200
    for epoch in range(200 // n):
        assert sorted(whole[epoch * n : (epoch + 1) * n]) == list(np.arange(n) * 3)


def test_batches_cover_the_rows_in_order() -> None:
    assert np.array_equal(np.concatenate(list(in_batches(np.arange(10), 4))), np.arange(10))


def test_gather_gives_the_stores_pixels() -> None:
    images, _ = easy_patches(5, seed=1)
    batch = ResidentPatches(torch.from_numpy(images), CPU).gather(np.array([3, 1]))
    assert np.array_equal(batch.permute(0, 2, 3, 1).numpy(), images[[3, 1]])


def test_rungs_are_reported_in_order_and_learn(data: TrainingData) -> None:
    training = start(replace_recipe(views=None), data)
    rungs = (Rung(128, 60), Rung(480, 60))
    results = list(fit(training, rungs))
    assert [r.views for r in results] == [128, 480]
    assert results[-1].auc is not None
    assert results[-1].auc > 0.95
    assert results[-1].train_loss < results[0].train_loss
    assert all(r.images_per_s > 0 and r.seconds > 0 for r in results)


def replace_recipe(**changes: object) -> Recipe:
    return RECIPE.model_copy(update=changes)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "rmsprop"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_resumed_from_a_rung_equals_uninterrupted(
    data: TrainingData, tmp_path: Path, optimizer: str, channels_last: bool
) -> None:
    recipe, compute = replace_recipe(optimizer=optimizer), Compute("cpu", channels_last=channels_last)
    whole = start(recipe, data, compute)
    results = list(fit(whole, RUNGS))
    first = start(recipe, data, compute)
    for result in fit(first, RUNGS, checkpoints=tmp_path):
        if result.rung == 1:
            break
    second = start(recipe, data, compute)
    resumed = list(fit(second, RUNGS, checkpoints=tmp_path))
    assert [(r.views, r.auc, r.loss) for r in resumed] == [(r.views, r.auc, r.loss) for r in results]
    assert same(whole, second)


@pytest.mark.parametrize("stop_at", [1, 5, 9, 13])
def test_one_cycle_killed_at_any_step_ends_in_the_same_weights(
    data: TrainingData, tmp_path: Path, stop_at: int
) -> None:
    recipe, rungs = replace_recipe(schedule="one_cycle"), (Rung(60, 60), Rung(120, 60), Rung(180, 60), Rung(240, 60))
    whole = start(recipe, data)
    list(fit(whole, rungs))
    calls = 0

    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise Interrupted("enough", 15)

    with pytest.raises(Interrupted):
        list(fit(start(recipe, data), rungs, checkpoints=tmp_path, keep_final=True, stop=stop))
    again = start(recipe, data)
    list(fit(again, rungs, checkpoints=tmp_path, keep_final=True))
    assert same(whole, again)


def test_a_corrupt_checkpoint_is_named_and_the_older_one_used(data: TrainingData, tmp_path: Path) -> None:
    whole, first, second = start(RECIPE, data), start(RECIPE, data), start(RECIPE, data)
    list(fit(whole, RUNGS))
    for result in fit(first, RUNGS, checkpoints=tmp_path):
        if result.rung == 1:
            break
    model = tmp_path / "1" / "model.safetensors"
    raw = bytearray(model.read_bytes())
    raw[-1] ^= 1
    model.write_bytes(raw)
    notes: list[str] = []
    list(fit(second, RUNGS, checkpoints=tmp_path, note=notes.append))
    assert len(notes) == 1
    assert "has changed since it was written" in notes[0]
    assert same(whole, second)


def test_a_checkpoint_of_another_recipe_is_not_used(data: TrainingData, tmp_path: Path) -> None:
    list(fit(start(RECIPE, data), RUNGS, checkpoints=tmp_path))
    notes: list[str] = []
    results = list(fit(start(replace_recipe(lr=1e-4), data), RUNGS, checkpoints=tmp_path, note=notes.append))
    assert len(results) == 3
    assert "another recipe" in notes[0]


def test_dropping_a_decay_branch_leaves_the_stable_training_untouched(data: TrainingData) -> None:
    """A training scored at three rungs reaches the stable state that one scored only at the end reaches."""
    one, three = start(replace_recipe(dropout=0.0), data), start(replace_recipe(dropout=0.0), data)
    rungs = (Rung(64, 60), Rung(192, 60))
    for result in fit(three, rungs):
        if result.rung == 0:
            break
    state = three.averaged_state()
    one_rung = replace_recipe(dropout=0.0, schedule="constant", warmup=RECIPE.warmup)
    straight = start(one_rung, data)
    # the same views at the same rates: the stable part of the first rung is 48 views, its warm-up a share of 64
    from pcam_automl.training.optim import warm_up

    stream = ViewStream(99, data.train_rows, 0)
    straight.train(
        stream,
        0,
        stable_views(RECIPE, rungs[0]),
        lambda v: warm_up(v, warmup_views=RECIPE.warmup * 64),
        0.0,
        lambda: None,
        lambda n: None,
    )
    assert stable_views(RECIPE, rungs[0]) == 48
    assert len(list(fit(one, rungs))) == 2
    assert set(state) == set(straight.averaged_state())
    resumed = next_stable(data, rungs)
    assert all(torch.equal(resumed[key], tensor) for key, tensor in straight.averaged_state().items())


def next_stable(data: TrainingData, rungs: tuple[Rung, ...]) -> dict[str, torch.Tensor]:
    """The state after the first rung's branch was dropped: what the generator leaves once it is asked to go on."""
    training = start(replace_recipe(dropout=0.0), data)
    seen: dict[str, torch.Tensor] = {}

    def stop() -> None:
        if training.results and not seen:
            seen.update(training.averaged_state())

    list(fit(training, rungs, stop=stop))
    return seen


def test_micro_batches_give_the_same_gradients(data: TrainingData) -> None:
    """Without batch norms' batch statistics the halves add up to the whole."""
    recipe = replace_recipe(backbone="test_vit", dropout=0.0)
    whole, halves = start(recipe, data), start(recipe, data)
    halves.micro_batch = 4
    for training in (whole, halves):
        training.network.train()
        training._gradients(np.arange(16), np.arange(16))
    for a, b in zip(whole.network.parameters(), halves.network.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=2e-3, atol=2e-5)


def test_out_of_memory_halves_the_micro_batch_and_goes_on(data: TrainingData, monkeypatch: pytest.MonkeyPatch) -> None:
    training = start(RECIPE, data)
    forward = training.network.forward

    def small_device(images: torch.Tensor) -> torch.Tensor:
        if len(images) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return forward(images)

    monkeypatch.setattr(training.network, "forward", small_device)
    rungs = (Rung(64, 40),)
    training.data = replace(data, score_rows=data.score_rows[:0])
    (result,) = fit(training, rungs)
    assert training.micro_batch == 4
    assert result.auc is None
    assert math.isfinite(result.train_loss)


def test_what_is_not_memory_is_not_swallowed(data: TrainingData, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_out_of_memory(
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried to allocate")
    )
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    training = start(RECIPE, data)

    def broken(images: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(training.network, "forward", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        list(fit(training, RUNGS))


def test_a_nan_loss_ends_as_diverged(data: TrainingData) -> None:
    training = start(RECIPE, data)
    with torch.no_grad():
        next(training.network.parameters()).fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match="loss became nan"):
        list(fit(training, RUNGS))


def test_frozen_phase_moves_the_classifier_only(data: TrainingData) -> None:
    recipe = replace_recipe(frozen=1.0, weight_decay=0.0, schedule="one_cycle", ema=0.0)
    training = start(recipe, data)
    before = {key: tensor.clone() for key, tensor in training.network.state_dict().items()}
    list(fit(training, (Rung(64, 60),)))
    moved = {key for key, tensor in training.network.state_dict().items() if not torch.equal(tensor, before[key])}
    assert moved
    assert all(key.startswith("fc.") for key in moved)


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "rmsprop"])
def test_a_backbone_can_thaw_in_the_middle_of_a_rung(data: TrainingData, optimizer: str) -> None:
    recipe = replace_recipe(frozen=0.5, optimizer=optimizer, lr=1e-3)
    training = start(recipe, data)
    before = (
        training.network.state_dict()["conv1.weight"].clone()
        if "conv1.weight" in training.network.state_dict()
        else None
    )
    results = list(fit(training, RUNGS))
    assert len(results) == 3
    assert all(math.isfinite(r.train_loss) for r in results)
    assert before is None or not torch.equal(before, training.network.state_dict()["conv1.weight"])


def test_dropped_branches_count_in_the_bar_and_only_there() -> None:
    assert total_views(RECIPE, RUNGS) == 192 + 16 + 32
    assert total_views(replace_recipe(schedule="one_cycle"), RUNGS) == 192


def test_bf16_reaches_the_same_quality(data: TrainingData) -> None:
    rungs = (Rung(480, 60),)
    (full,) = fit(start(RECIPE, data), rungs)
    (half,) = fit(start(RECIPE, data, Compute("cpu", "bf16", True)), rungs)
    assert full.auc is not None
    assert half.auc == pytest.approx(full.auc, abs=0.05)
