"""The loop: interrupted + resumed = uninterrupted, micro-batches, rungs, divergence. On a tiny network and random patches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from easy_set import TINY, easy_patches
from hypothesis import given
from hypothesis import strategies as st

from pcam_automl.batches import ResidentPatches, ViewStream, in_batches
from pcam_automl.errors import Interrupted, TrainingDiverged
from pcam_automl.metrics import auc, log_loss
from pcam_automl.models.factory import build_network, normalisation
from pcam_automl.models.weights import Weights
from pcam_automl.recipe import Recipe
from pcam_automl.training import scoring as scoring_module
from pcam_automl.training.checkpoint import CheckpointWriter
from pcam_automl.training.compute import Compute, Precision, is_out_of_memory
from pcam_automl.training.engine import Rung, RungResult, Training
from pcam_automl.training.fit import best_result, fit, resume, save, stable_views, total_views
from pcam_automl.training.schedule import Rates, rates_at
from pcam_automl.training.scoring import Views, inference_precision
from pcam_automl.training.task import PatchTask, TrainingData

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
    compute = compute or Compute("cpu")
    network = build_network(recipe, Weights("none"), seed=recipe.seed)
    return Training(recipe, network, PatchTask(recipe, data, compute, 99), compute, key=99)


def fitted(training: Training, rungs: tuple[Rung, ...], **options: Any) -> Iterator[RungResult]:
    assert isinstance(training.task, PatchTask)
    data = training.task.data
    return fit(training, data.train_rows, rungs, scored=len(data.score_rows) > 0, **options)


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
    results = list(fitted(training, rungs))
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
    results = list(fitted(whole, RUNGS))
    first = start(recipe, data, compute)
    for result in fitted(first, RUNGS, checkpoints=tmp_path):
        if result.rung == 1:
            break
    second = start(recipe, data, compute)
    resumed = list(fitted(second, RUNGS, checkpoints=tmp_path))
    assert [(r.views, r.auc, r.loss) for r in resumed] == [(r.views, r.auc, r.loss) for r in results]
    assert same(whole, second)
    assert (second.n_steps, second.micro_batches) == (whole.n_steps, whole.micro_batches), "dropped branches count, too"


@pytest.mark.parametrize("stop_at", [1, 5, 9, 13])
def test_one_cycle_killed_at_any_step_ends_in_the_same_weights(
    data: TrainingData, tmp_path: Path, stop_at: int
) -> None:
    recipe, rungs = replace_recipe(schedule="one_cycle"), (Rung(60, 60), Rung(120, 60), Rung(180, 60), Rung(240, 60))
    whole = start(recipe, data)
    list(fitted(whole, rungs))
    calls = 0

    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise Interrupted("enough", 15)

    with pytest.raises(Interrupted):
        list(fitted(start(recipe, data), rungs, checkpoints=tmp_path, keep_final=True, stop=stop))
    again = start(recipe, data)
    list(fitted(again, rungs, checkpoints=tmp_path, keep_final=True))
    assert same(whole, again)


@pytest.mark.parametrize("stop_at", [1, 5, 9, 12, 14])
def test_a_long_stable_phase_killed_at_any_step_ends_in_the_same_weights(
    data: TrainingData, tmp_path: Path, stop_at: int
) -> None:
    rungs, marks = (Rung(240, 60),), (60, 120, 180, 240)  # the decay, from 180 on, has no checkpoint of its own
    whole = start(RECIPE, data)
    (expected,) = fitted(whole, rungs, marks=marks)
    n_stops = 0

    def stop() -> None:
        nonlocal n_stops
        n_stops += 1
        if n_stops == stop_at:
            raise Interrupted("enough", 15)

    with pytest.raises(Interrupted):
        list(fitted(start(RECIPE, data), rungs, marks=marks, checkpoints=tmp_path, stop=stop))
    again, seen = start(RECIPE, data), list[int]()
    (found,) = fitted(again, rungs, marks=marks, checkpoints=tmp_path, progress=seen.append)
    assert (found.views, found.auc) == (expected.views, expected.auc)
    assert same(whole, again)
    assert abs(sum(seen) - 240) < 16, "what a checkpoint brought counts in the bar, to a batch"
    assert seen.count(16) == 15 - {1: 0, 5: 4, 9: 8, 12: 8, 14: 8}[stop_at], "steps"


def test_a_corrupt_checkpoint_is_named_and_the_older_one_used(data: TrainingData, tmp_path: Path) -> None:
    whole, first, second = start(RECIPE, data), start(RECIPE, data), start(RECIPE, data)
    list(fitted(whole, RUNGS))
    for result in fitted(first, RUNGS, checkpoints=tmp_path):
        if result.rung == 1:
            break
    model = tmp_path / "1" / "model.safetensors"
    raw = bytearray(model.read_bytes())
    raw[-1] ^= 1
    model.write_bytes(raw)
    notes: list[str] = []
    list(fitted(second, RUNGS, checkpoints=tmp_path, note=notes.append))
    assert len(notes) == 1
    assert "has changed since it was written" in notes[0]
    assert same(whole, second)


def test_a_checkpoint_of_another_recipe_is_not_used(data: TrainingData, tmp_path: Path) -> None:
    list(fitted(start(RECIPE, data), RUNGS, checkpoints=tmp_path))
    notes: list[str] = []
    results = list(fitted(start(replace_recipe(lr=1e-4), data), RUNGS, checkpoints=tmp_path, note=notes.append))
    assert len(results) == 3
    assert "another recipe" in notes[0]


def test_checkpoints_of_another_training_go_once_there_is_one_of_ours(data: TrainingData, tmp_path: Path) -> None:
    """Of higher numbers, they would outlast every new one, and a second kill would lose everything again."""
    rungs = tuple(Rung(32 * n, 60) for n in range(1, 7))
    list(fitted(start(RECIPE, data), rungs, checkpoints=tmp_path))
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["3", "4"]
    other = RECIPE.model_copy(update={"lr": 1e-3})
    cut = fitted(start(other, data), rungs, checkpoints=tmp_path)
    next(cut)
    assert [folder.name for folder in tmp_path.iterdir()] == ["0"]
    said: list[str] = []
    again = start(other, data)
    list(fitted(again, rungs, checkpoints=tmp_path, note=said.append))
    assert (again.n_resumed, said) == (1, [])


def test_a_release_that_groups_parameters_otherwise_starts_afresh(data: TrainingData, tmp_path: Path) -> None:
    """The moments of one parameter would be those of another, of another shape, which torch does not ask."""
    first, said = start(RECIPE, data), list[str]()
    first.optimizer.param_groups[0]["params"].reverse()
    list(fitted(first, RUNGS, checkpoints=tmp_path))
    assert resume(start(RECIPE, data), tmp_path, said.append) == 0
    assert "groups parameters otherwise" in said[0]


def test_damaged_checkpoints_of_higher_numbers_do_not_outlast_ours(data: TrainingData, tmp_path: Path) -> None:
    for number in (7, 8):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "state.json").write_text("{")
    results = fitted(start(RECIPE, data), RUNGS, checkpoints=tmp_path)
    next(results)
    assert [folder.name for folder in tmp_path.iterdir()] == ["0"]


def test_precision_is_judged_on_rows_of_both_classes_though_they_are_sorted(
    data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring_module, "N_JUDGED", 10)
    training = start(RECIPE, data)
    rows = np.argsort(data.label[:90], kind="stable")
    views, compute = Views(RECIPE, data.normalisation), Compute("cpu", "bf16")
    judged: list[np.ndarray] = []
    real = scoring_module.logits_of_rows
    monkeypatch.setattr(
        scoring_module, "logits_of_rows", lambda n, p, r, *rest: judged.append(r) or real(n, p, r, *rest)
    )
    inference_precision(training.network.eval(), data.patches, rows, data.label, views, compute)
    assert len(judged) == 2
    assert set(data.label[judged[0]]) == {0, 1}


def test_weights_from_elsewhere_are_another_training(data: TrainingData, tmp_path: Path) -> None:
    first = start(RECIPE, data)
    first.weights = "/models/a"
    list(fitted(first, RUNGS, checkpoints=tmp_path))
    again, said = start(RECIPE, data), []
    again.weights = "/models/b"
    assert resume(again, tmp_path, said.append) == 0
    assert "belongs to another recipe, seed, fold, data or weights" in said[0]


def test_what_does_not_fill_a_batch_carries_over(data: TrainingData) -> None:
    """Epochs of 90 patches in batches of 64: 70 steps of them show 4,480 of 6,300 where each is rounded alone."""
    recipe = RECIPE.model_copy(update={"batch_size": 64, "schedule": "one_cycle"})
    training = start(recipe, data)
    rates = Rates(0, 1e-4, 1e-4, 0.0, 1.0)
    stream = ViewStream(training.key, data.train_rows, 0)
    for epoch in range(10):
        training.train(stream, 90 * epoch, 90 * (epoch + 1), lambda view: rates, lambda: None, lambda n: None)
    assert training.n_steps == round(900 / 64)


def test_a_checkpoint_of_other_data_or_rows_is_not_used(data: TrainingData, tmp_path: Path) -> None:
    first, other, notes = start(RECIPE, data), start(RECIPE, data), list[str]()
    first.data_key, other.data_key = "a", "b"
    list(fitted(first, RUNGS, checkpoints=tmp_path))
    list(fitted(other, RUNGS, checkpoints=tmp_path, note=notes.append))
    assert len(notes) == 1
    assert "fold, data or weights; training starts afresh" in notes[0]
    assert same(first, other)  # trained from the beginning, on what here are the same rows


def test_dropping_a_decay_branch_leaves_the_stable_training_untouched(data: TrainingData) -> None:
    """A training scored at three rungs reaches the stable state that one scored only at the end reaches."""
    one, three = start(replace_recipe(dropout=0.0), data), start(replace_recipe(dropout=0.0), data)
    rungs = (Rung(64, 60), Rung(192, 60))
    for result in fitted(three, rungs):
        if result.rung == 0:
            break
    state = three.averaged_state()
    one_rung = replace_recipe(dropout=0.0, schedule="constant", warmup=RECIPE.warmup)
    straight = start(one_rung, data)
    # the same views at the same rates: the stable part of the first rung is 48 views, its warm-up a share of 64
    stream = ViewStream(99, data.train_rows, 0)
    straight.train(
        stream,
        0,
        stable_views(RECIPE, rungs[0]),
        lambda view: rates_at(one_rung, view, end=192, horizon=64),
        lambda: None,
        lambda n: None,
    )
    assert stable_views(RECIPE, rungs[0]) == 48
    assert len(list(fitted(one, rungs))) == 2
    assert set(state) == set(straight.averaged_state())
    resumed = next_stable(data, rungs)
    assert all(torch.equal(resumed[key], tensor) for key, tensor in straight.averaged_state().items())


def test_rungs_that_nobody_scores_have_no_decay_branch_and_end_in_the_same_weights(data: TrainingData) -> None:
    rungs, ended, views = (Rung(64, 60), Rung(192, 60), Rung(320, 60)), [], []
    for scored in (True, False):
        training, seen = start(replace_recipe(dropout=0.2), data), list[int]()
        list(fit(training, data.train_rows, rungs, scored=scored, progress=seen.append))
        ended.append(training)
        views.append(sum(seen))
    assert views == [total_views(RECIPE, rungs), 320]
    assert same(*ended)


def next_stable(data: TrainingData, rungs: tuple[Rung, ...]) -> dict[str, torch.Tensor]:
    """The state after the first rung's branch was dropped: what the generator leaves once it is asked to go on."""
    training = start(replace_recipe(dropout=0.0), data)
    seen: dict[str, torch.Tensor] = {}

    def stop() -> None:
        if training.results and not seen:
            seen.update(training.averaged_state())

    list(fitted(training, rungs, stop=stop))
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


def test_what_fitted_another_device_s_memory_is_not_taken_over(
    data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start(RECIPE, data)
    first.micro_batch = 4
    first.micro_batches.append((0, 4))
    list(zip(range(1), fitted(first, RUNGS, checkpoints=tmp_path), strict=False))
    same_device, other = start(RECIPE, data), start(RECIPE, data)
    resume(same_device, tmp_path, print)
    assert same_device.micro_batch == 4
    monkeypatch.setattr("pcam_automl.training.compute.device_name", lambda device: "a larger one")
    resume(other, tmp_path, print)
    assert other.micro_batch == 16
    assert other.micro_batches == [(0, 16), (0, 4), (other.n_steps, 16)]
    assert other.n_steps == same_device.n_steps > 0


def test_out_of_memory_halves_the_micro_batch_and_goes_on(data: TrainingData, monkeypatch: pytest.MonkeyPatch) -> None:
    training = start(RECIPE, replace(data, score_rows=data.score_rows[:0]))
    forward = training.network.forward

    def small_device(images: torch.Tensor) -> torch.Tensor:
        if len(images) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return forward(images)

    monkeypatch.setattr(training.network, "forward", small_device)
    rungs = (Rung(64, 40),)
    (result,) = fitted(training, rungs)
    assert training.micro_batch == 4
    assert training.micro_batches == [(0, 16), (0, 8), (0, 4)]
    assert result.auc is None
    assert math.isfinite(result.train_loss)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(("limit", "clips"), [(0.05, True), (1e3, False), (0.0, False)])
def test_a_step_moves_the_weights_by_gradients_clipped_by_hand(
    data: TrainingData, limit: float, clips: bool, precision: Precision
) -> None:
    """Plain gradient descent, whose step is as long as its gradient; with a scaler they are clipped behind its scale."""
    compute = Compute("cpu", precision)
    recipe = replace_recipe(optimizer="sgd", beta1=0.0, weight_decay=0.0, dropout=0.0, ema=0.0, clip_norm=limit)
    applied, by_hand = start(recipe, data, compute), start(recipe, data, compute)
    before = [p.detach().clone() for p in applied.network.parameters()]
    for training in (applied, by_hand):
        training.network.train()
        training.use(Rates(0, 0.5, 0.5, 0.0, 1.0))
    applied.step(np.arange(16), np.arange(16))
    by_hand._gradients(np.arange(16), np.arange(16))
    scale = by_hand.scaler.get_scale()
    assert (scale > 1.0) == (precision == "fp16")
    gradients = [p.grad.double() / scale for p in by_hand.network.parameters()]  # type: ignore[union-attr]
    norm = math.sqrt(sum(float((g * g).sum()) for g in gradients))
    assert (0.0 < limit < norm) == clips
    share = limit / norm if clips else 1.0
    steps = [old - p.detach() for old, p in zip(before, applied.network.parameters(), strict=True)]
    for step, gradient in zip(steps, gradients, strict=True):
        torch.testing.assert_close(step.double(), 0.5 * share * gradient, rtol=1e-3, atol=1e-6)
    whole = math.sqrt(sum(float((step.double() ** 2).sum()) for step in steps))
    assert whole == pytest.approx(0.5 * (limit if clips else norm), rel=1e-3)


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
        list(fitted(training, RUNGS))


def test_a_nan_loss_ends_as_diverged(data: TrainingData) -> None:
    training = start(RECIPE, data)
    with torch.no_grad():
        next(training.network.parameters()).fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match="loss became nan"):
        list(fitted(training, RUNGS))


def test_frozen_phase_moves_the_classifier_only(data: TrainingData) -> None:
    recipe = replace_recipe(frozen=1.0, weight_decay=0.0, schedule="one_cycle", ema=0.0)
    training = start(recipe, data)
    before = {key: tensor.clone() for key, tensor in training.network.state_dict().items()}
    list(fitted(training, (Rung(64, 60),)))
    moved = {key for key, tensor in training.network.state_dict().items() if not torch.equal(tensor, before[key])}
    assert moved
    assert all(key.startswith("fc.") for key in moved)


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "rmsprop"])
def test_a_backbone_can_thaw_in_the_middle_of_a_rung(data: TrainingData, optimizer: str) -> None:
    recipe = replace_recipe(frozen=0.5, optimizer=optimizer, lr=1e-3)
    training = start(recipe, data)
    before = training.network.state_dict()["conv1.0.weight"].clone()
    results = list(fitted(training, RUNGS))
    assert len(results) == 3
    assert all(math.isfinite(r.train_loss) for r in results)
    assert not torch.equal(before, training.network.state_dict()["conv1.0.weight"])


def test_dropped_branches_count_in_the_bar_and_only_there() -> None:
    assert total_views(RECIPE, RUNGS) == 192 + 16 + 32
    assert total_views(replace_recipe(schedule="one_cycle"), RUNGS) == 192


def test_bf16_reaches_the_same_quality(data: TrainingData) -> None:
    rungs = (Rung(480, 60),)
    (full,) = fitted(start(RECIPE, data), rungs)
    (half,) = fitted(start(RECIPE, data, Compute("cpu", "bf16", True)), rungs)
    assert full.auc is not None
    assert half.auc == pytest.approx(full.auc, abs=0.05)


STAGES = (
    {"share": 0.5, "lr": 2e-3, "trainable": 0.0},
    {"share": 0.5, "lr": 1e-3, "lr_low": 1e-4, "weight_decay": 0.0},
)


def staged(**changes: object) -> Recipe:
    fields = {**RECIPE.model_dump(), "schedule": "one_cycle", "ema": 0.0, "dropout": 0.0, "stages": STAGES, **changes}
    return Recipe.model_validate(fields)


def test_stages_train_the_head_then_everything(data: TrainingData) -> None:
    training = start(staged(), data)
    before = {key: tensor.clone() for key, tensor in training.network.state_dict().items()}
    seen: list[set[str]] = []
    results = []
    for result in fitted(training, (Rung(60, 60), Rung(120, 60))):
        state = training.network.state_dict()
        seen.append({key for key in state if not torch.equal(state[key], before[key])})
        results.append(result)
    assert seen[0]
    assert all(key.startswith("fc.") for key in seen[0])
    assert len(seen[1]) > len(seen[0])
    assert [r.stage for r in results] == [0, 1]


def test_a_stage_has_its_own_rates_by_depth_and_a_fresh_optimizer(data: TrainingData) -> None:
    training = start(staged(), data)
    recipe = training.recipe
    used: list[tuple[int, Rates]] = []
    for view in (0, 59, 60, 119):
        rates = rates_at(recipe, view, end=120, horizon=120)
        training.use(rates)
        training.step(np.arange(16), np.arange(16))
        used.append((len(training.optimizer.state), rates))
    assert [rates.phase for _, rates in used] == [0, 0, 1, 1]
    assert used[0][0] < used[2][0]  # the head alone, then all
    training.use(Rates(1, 1e-3, 1e-5, 0.0, 1.0))
    by_depth = {group["depth"]: group["lr"] for group in training.optimizer.param_groups}
    assert by_depth == pytest.approx({0.0: 1e-5, 0.5: 1e-4, 1.0: 1e-3})
    assert {group["weight_decay"] for group in training.optimizer.param_groups} == {0.0}


@pytest.mark.parametrize("stop_at", [2, 5, 7, 11])
def test_a_staged_training_killed_at_any_step_ends_in_the_same_weights(
    data: TrainingData, tmp_path: Path, stop_at: int
) -> None:
    recipe, rungs = staged(ema=0.9), (Rung(60, 60), Rung(90, 60), Rung(120, 60), Rung(180, 60))
    whole = start(recipe, data)
    list(fitted(whole, rungs))
    calls = iter(range(1, 10_000))

    def stop() -> None:
        if next(calls) == stop_at:
            raise Interrupted("enough", 15)

    with pytest.raises(Interrupted):
        list(fitted(start(recipe, data), rungs, checkpoints=tmp_path, keep_final=True, stop=stop))
    again = start(recipe, data)
    list(fitted(again, rungs, checkpoints=tmp_path, keep_final=True))
    assert same(whole, again)


def result_with(rung: int, auc: float, loss: float) -> RungResult:
    return RungResult(rung, rung, 1, auc, loss, 0.5, 1.0, 1.0, 1e-3)


def test_patience_keeps_the_best_rung_by_its_monitor() -> None:
    results = [result_with(0, 0.8, 0.3), result_with(1, 0.9, 0.5), result_with(2, 0.9, 0.4)]
    by_loss = replace_recipe(patience=2, monitor="loss", schedule="constant")
    assert best_result(results, by_loss).rung == 0
    assert best_result(results, by_loss.model_copy(update={"monitor": "auc"})).rung == 1  # the earliest of equals
    assert best_result(results, RECIPE).rung == 2


def test_patience_ends_the_training_and_gives_back_the_best_weights(data: TrainingData, tmp_path: Path) -> None:
    # a rate that destroys what was learnt: the first rung stays the best one
    recipe = replace_recipe(patience=2, monitor="auc", schedule="constant", lr=1e-7, ema=0.0, dropout=0.0)
    training, rungs = start(recipe, data), tuple(Rung(16 * n, 60) for n in range(1, 12))
    kept: dict[int, dict[str, torch.Tensor]] = {}
    results = []
    for result in fitted(training, rungs, checkpoints=tmp_path, keep_final=True):
        kept[result.rung] = training.averaged_state()
        results.append(result)
    best = best_result(results, recipe)
    assert len(results) == best.rung + 3
    assert len(results) < len(rungs)
    state = training.averaged_state()
    assert all(torch.equal(state[key], kept[best.rung][key]) for key in state)
    assert training.scores is not None  # of the kept weights, not of the last ones
    assert auc(training.scores.label, training.scores.prob) == best.auc
    assert log_loss(training.scores.label, training.scores.prob) == best.loss
    resumed = start(recipe, data)  # nothing is left to do, and the best weights are found again, and their scores
    assert len(list(fitted(resumed, rungs, checkpoints=tmp_path, keep_final=True))) == len(results)
    assert same(training, resumed)
    assert resumed.scores is not None
    assert np.array_equal(resumed.scores.prob, training.scores.prob)


def test_a_batch_is_never_cut_so_that_one_image_is_left(data: TrainingData) -> None:
    training = start(replace_recipe(batch_size=25), data)
    training.micro_batch = 12  # 25 = 12 + 12 + 1 would leave a batch norm with a single value
    training.step(np.arange(25), np.arange(25))
    for n in range(2, 60):
        for micro_batch in range(2, n + 1):
            training.micro_batch = micro_batch
            sizes = [cut.stop - cut.start for cut in training._cuts(n)]
            assert sum(sizes) == n
            assert max(sizes) <= max(micro_batch, 3)
            assert min(sizes) >= 2


def test_half_precision_with_a_scaler_learns_and_resumes(data: TrainingData, tmp_path: Path) -> None:
    """The path of GPUs without bf16, on a CPU: gradients of small losses would underflow without the scaler."""
    compute, rungs = Compute("cpu", "fp16"), (Rung(128, 60), Rung(320, 60))
    whole = start(replace_recipe(views=None), data, compute)
    assert whole.scaler.is_enabled()
    results = list(fitted(whole, rungs))
    assert results[-1].auc is not None
    assert results[-1].auc > 0.9
    cut = fitted(start(replace_recipe(views=None), data, compute), rungs, checkpoints=tmp_path)
    next(cut)
    next(cut)  # the first rung's checkpoint is written when the second is asked for
    assert (tmp_path / "0" / "scaler.safetensors").is_file()
    again = start(replace_recipe(views=None), data, compute)
    list(fitted(again, rungs, checkpoints=tmp_path))
    assert same(whole, again)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bf16_training_ends_where_float32_does(data: TrainingData, seed: int) -> None:
    """Within 0.02 of AUC on the easy set; each seed shuffles and initialises anew."""
    aucs = []
    for precision in ("fp32", "bf16"):
        training = start(replace_recipe(views=None, seed=seed), data, Compute("cpu", precision))
        *_, last = fitted(training, (Rung(480, 60),))
        assert last.auc is not None
        aucs.append(last.auc)
    assert abs(aucs[0] - aucs[1]) <= 0.02
    assert min(aucs) > 0.95


def test_low_precision_predicts_only_where_the_auc_stays(data: TrainingData) -> None:
    training = start(replace_recipe(views=None), data, Compute("cpu", "bf16"))
    list(fitted(training, (Rung(320, 60),)))
    views = Views(training.recipe, data.normalisation)
    with training.averaged() as network:
        rows = data.score_rows
        assert inference_precision(network, data.patches, rows, data.label, views, training.compute)[0] == "bf16"
        with torch.no_grad():  # logits far from zero, a little apart: bf16 cannot tell them from each other
            named = dict(network.named_parameters())
            named["fc.weight"].mul_(0.01)
            named["fc.bias"].fill_(-200.0)
        precision, moved = inference_precision(network, data.patches, rows, data.label, views, training.compute)
    assert precision == "fp32"
    assert abs(moved) > 1e-4
    assert inference_precision(network, data.patches, rows, data.label, views, Compute("cpu")) == ("fp32", 0.0)


@pytest.mark.slow
def test_a_compiled_training_learns_scores_and_resumes_as_a_plain_one_does(data: TrainingData, tmp_path: Path) -> None:
    rungs, recipe = (Rung(128, 60), Rung(320, 60)), replace_recipe(views=None)
    plain = start(recipe, data)
    list(fitted(plain, rungs))
    compute = Compute("cpu", compiled=True)
    cut = fitted(start(recipe, data, compute), rungs, checkpoints=tmp_path)
    next(cut)
    next(cut)  # the first rung's checkpoint is written when the second is asked for
    again = start(recipe, data, compute)
    results = list(fitted(again, rungs, checkpoints=tmp_path))
    assert results[-1].auc == pytest.approx(plain.results[-1].auc, abs=0.02)
    assert again.averaged_state().keys() == plain.averaged_state().keys()


def test_a_checkpoint_of_a_training_by_the_clock_is_not_gone_on_with_by_epochs(
    data: TrainingData, tmp_path: Path
) -> None:
    """Part 13 of 20 is no 13th epoch: with fewer epochs nothing would be trained any more, with more the schedule would jump."""
    by_clock, notes = start(RECIPE, data), list[str]()
    save(by_clock, tmp_path, 12, by_clock=True)
    assert resume(start(RECIPE, data), tmp_path, notes.append) == 0
    assert "belongs to a training that ended by the clock, this one ends by epochs" in notes[0]
    assert resume(start(RECIPE, data), tmp_path, notes.append, by_clock=True) == 13
    save(by_clock, tmp_path, 13)
    assert resume(start(RECIPE, data), tmp_path, notes.append, by_clock=True) == 0
    assert len(notes) == 2


def test_a_training_goes_on_on_a_device_of_another_precision(data: TrainingData) -> None:
    """A checkpoint of a CPU holds no state of the scaler that fp16 needs."""
    parts, training = start(RECIPE, data).snapshot(), start(RECIPE, data)
    training.scaler = torch.amp.GradScaler("cpu")
    training.restore(parts, views=0, ema_updates=0)
    assert training.scaler.get_scale() == torch.amp.GradScaler("cpu").get_scale()


def test_on_a_gpu_a_checkpoint_is_copied_on_a_stream_of_its_own_behind_what_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The order of the calls; that CUDA keeps it is for `pytest -m gpu`."""
    said: list[str] = []

    class Stream:
        device = torch.device("cuda:1")

        def wait_event(self, event: object) -> None:
            said.append("waits")

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        said.append("enters")
        yield
        said.append("leaves")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: said.append("records")))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(said.append(str(device))))
    writer = CheckpointWriter()
    writer.submit(lambda: said.append("writes"))
    writer.flush()
    assert said == ["records", "waits", "cuda:1", "enters", "writes", "leaves"]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    writer.submit(lambda: said.append("on a CPU"))
    writer.flush()
    assert said[-1] == "on a CPU"
