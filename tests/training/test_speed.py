"""The speed book: one measurement a network, compiling where it pays, what fitted into memory."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from easy_set import TINY

from pcam_automl.recipe import Recipe
from pcam_automl.training import speed as speed_module
from pcam_automl.training.compute import Compute, fixed_variant
from pcam_automl.training.speed import SpeedBook

CPU = torch.device("cpu")
RECIPE = Recipe(backbone=TINY, crop_size=32, batch_size=32)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    made: list[str] = []

    def fitting(build: object, px: int, batch: int, device: torch.device, probe: object = None) -> Compute:
        made.append(f"measured {batch} at {px}")
        return Compute(str(device), "bf16", True, step_s=0.5)

    monkeypatch.setattr(speed_module, "measure_fitting", fitting)
    return made


def test_a_network_is_measured_once_whoever_asks(calls: list[str], tmp_path: Path) -> None:
    book = SpeedBook(tmp_path / "speed.json")
    assert not book.knows(RECIPE, CPU)
    assert book.compute_for(RECIPE, CPU) == Compute("cpu", "bf16", True, 0.5)
    assert book.images_per_s(RECIPE, CPU) == 64.0  # half a second for a batch of 32
    other = SpeedBook(tmp_path / "speed.json")
    assert other.knows(RECIPE, CPU)
    assert other.compute_for(RECIPE, CPU).step_s == 0.5
    assert calls == ["measured 32 at 32"]
    other.compute_for(RECIPE.model_copy(update={"crop_size": 48}), CPU)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("found", "views", "compiled"),
    [
        ((60.0, 0.3), 400_000, True),  # 2,500 s gained for 60
        ((2600.0, 0.3), 400_000, False),
        ((60.0, 0.6), 1_000_000, False),
        ("RuntimeError: no compiler", 1_000_000, False),
    ],
)
def test_compiling_must_earn_its_time(
    found: tuple[float, float] | str, views: int, compiled: bool, calls: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    tried: list[int] = []
    monkeypatch.setattr(speed_module, "measure_compiled", lambda build, px, batch, eager: tried.append(batch) or found)
    book = SpeedBook(tmp_path / "speed.json")
    assert book.compute_for(RECIPE, CPU, views=1000) == Compute("cpu", "bf16", True, 0.5)
    assert book.compute_for(RECIPE, CPU, views=200_000) == Compute("cpu", "bf16", True, 0.5)
    assert tried == []  # 16 s of training, and 52 minutes: not even tried
    for _ in range(2):
        chosen = book.compute_for(RECIPE, CPU, views=views)
        assert (chosen.compiled, chosen.step_s) == (compiled, 0.3 if compiled else 0.5)
    assert tried == [32]
    (entry,) = json.loads((tmp_path / "speed.json").read_text()).values()
    assert entry["compiled"] == (
        {"fault": found} if isinstance(found, str) else {"ready_s": found[0], "step_s": found[1]}
    )
    assert not book.compute_for(RECIPE, CPU).compiled  # a search's trials are short


def test_a_compiler_that_only_lacked_memory_is_asked_again(
    calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter((None, (60.0, 0.3)))
    monkeypatch.setattr(speed_module, "measure_compiled", lambda *_: next(answers))
    book = SpeedBook(tmp_path / "speed.json")
    assert [book.compute_for(RECIPE, CPU, views=400_000).compiled for _ in range(2)] == [False, True]


def test_what_is_left_of_a_compiled_training_must_be_worth_compiling_again(calls: list[str], tmp_path: Path) -> None:
    book, compiled = SpeedBook(tmp_path / "speed.json"), Compute("cpu", "bf16", True, 0.32, compiled=True)
    assert book.for_the_rest(RECIPE, CPU, compiled, 370_000) == compiled
    assert book.for_the_rest(RECIPE, CPU, compiled, 350_000) == replace(compiled, compiled=False)
    eager = replace(compiled, compiled=False)
    assert book.for_the_rest(RECIPE, CPU, eager, 370_000) == eager


def test_what_fitted_in_the_end_is_where_the_next_training_begins(calls: list[str], tmp_path: Path) -> None:
    book = SpeedBook(tmp_path / "speed.json")
    book.compute_for(RECIPE, CPU)
    book.note_micro_batch(RECIPE, CPU, 64)
    assert book.compute_for(RECIPE, CPU).micro_batch is None
    book.note_micro_batch(RECIPE, CPU, 16)
    book.note_micro_batch(RECIPE, CPU, 32)  # another worker had more room
    assert SpeedBook(tmp_path / "speed.json").compute_for(RECIPE, CPU).micro_batch == 16


def test_what_fitted_is_kept_where_the_variant_came_from_another_side(calls: list[str], tmp_path: Path) -> None:
    larger, file = RECIPE.model_copy(update={"crop_size": 64}), tmp_path / "speed.json"
    book = SpeedBook(file, quick=True)
    book.compute_for(RECIPE, CPU)
    book.note_micro_batch(larger, CPU, 8)
    for again in (book, SpeedBook(file, quick=True)):
        assert again.knows(larger, CPU)
        assert again.compute_for(larger, CPU) == Compute("cpu", "bf16", True, 2.0, micro_batch=8)
        assert again.images_per_s(larger, CPU) == 16.0, "four times the pixels, as before"
        assert again.compute_for(RECIPE, CPU).micro_batch is None
        between = again.compute_for(RECIPE.model_copy(update={"crop_size": 60}), CPU)
        assert (between.step_s, between.micro_batch) == (pytest.approx(0.5 * (60 / 32) ** 2), None)
    assert calls == ["measured 32 at 32"]
    thorough = SpeedBook(file)
    assert not thorough.knows(larger, CPU)
    assert thorough.compute_for(larger, CPU) == Compute("cpu", "bf16", True, 0.5, micro_batch=8)
    assert calls[1:] == ["measured 32 at 64"]


def test_what_fitted_where_nothing_was_measured_is_kept_until_it_is(calls: list[str], tmp_path: Path) -> None:
    """A trial that goes on here with the variant that another machine measured."""
    book = SpeedBook(tmp_path / "speed.json", quick=True)
    book.note_micro_batch(RECIPE, CPU, 8)
    assert not book.knows(RECIPE, CPU)
    assert book.compute_for(RECIPE, CPU) == Compute("cpu", "bf16", True, 0.5, micro_batch=8)
    assert calls == ["measured 32 at 32"]


def test_another_release_of_timm_or_torch_is_measured_anew_and_old_notes_stay(
    calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "speed.json"
    SpeedBook(file, quick=True).compute_for(RECIPE, CPU)
    ((key, entry),) = json.loads(file.read_text()).items()
    named = f"/{torch.__version__}/timm {version('timm')}/"
    assert named in key
    file.write_text(
        json.dumps({key.replace(named, f"/{torch.__version__}/"): entry})
    )  # as it was before timm was named
    for _ in range(2):
        book = SpeedBook(file, quick=True)
        book.compute_for(RECIPE, CPU)
        book.compute_for(RECIPE.model_copy(update={"crop_size": 64}), CPU)  # nor is another side taken from an old note
    monkeypatch.setattr(speed_module, "versions", lambda: {"timm": "0.0.1"})
    assert not SpeedBook(file, quick=True).knows(RECIPE, CPU)
    SpeedBook(file, quick=True).compute_for(RECIPE, CPU)
    assert calls == ["measured 32 at 32"] * 3
    assert len(json.loads(file.read_text())) == 3


def test_a_deterministic_training_leaves_no_note(calls: list[str], tmp_path: Path) -> None:
    """It runs in float32, which takes more memory than what others measured."""
    file = tmp_path / "speed.json"
    SpeedBook(file).compute_for(RECIPE, CPU)
    SpeedBook(file, deterministic=True).note_micro_batch(RECIPE, CPU, 8)
    assert SpeedBook(file).compute_for(RECIPE, CPU).micro_batch is None


def test_deterministic_runs_measure_nothing(calls: list[str], tmp_path: Path) -> None:
    book = SpeedBook(tmp_path / "speed.json", deterministic=True)
    assert book.compute_for(RECIPE, CPU, views=10**9) == fixed_variant(CPU)
    assert calls == []


def test_a_quick_book_measures_a_network_at_one_side_only(calls: list[str], tmp_path: Path) -> None:
    book = SpeedBook(tmp_path / "speed.json", quick=True)
    assert not book.knows(RECIPE, CPU)
    assert book.compute_for(RECIPE, CPU).step_s == 0.5
    larger = RECIPE.model_copy(update={"crop_size": 64})
    assert book.knows(larger, CPU)
    assert book.compute_for(larger, CPU) == Compute("cpu", "bf16", True, 2.0)  # four times the pixels
    assert book.images_per_s(larger, CPU) == 16.0
    assert calls == ["measured 32 at 32"]
    whole = RECIPE.model_copy(update={"batch_size": 64})
    assert book.compute_for(whole, CPU).step_s == 1.0, "measured with 32 images, told for 64"
    assert calls[1:] == ["measured 32 at 32"]


def test_a_quick_book_measures_a_gpu_at_every_side(
    calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed_module, "device_name", lambda device: "a GPU")
    book, gpu = SpeedBook(tmp_path / "speed.json", quick=True), torch.device("cuda:0")
    book.compute_for(RECIPE, gpu)
    larger = RECIPE.model_copy(update={"crop_size": 64})
    assert not book.knows(larger, gpu)
    assert book.compute_for(larger, gpu).step_s == 0.5, "measured: a step that is mostly launches does not grow"
    assert book.knows(larger, gpu)
    assert len(calls) == 2


def test_a_gpu_judges_as_many_at_once_as_a_prediction_does(
    calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []

    def seconds(build: object, px: int, batch: int, compute: Compute) -> float:
        batches.append(batch)
        if batch > 300:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch / 400.0

    monkeypatch.setattr(speed_module, "forward_seconds", seconds)
    monkeypatch.setattr(speed_module, "device_name", lambda device: "a GPU")
    book = SpeedBook(tmp_path / "speed.json")
    assert book.judged_per_s(RECIPE, torch.device("cuda:0")) == pytest.approx(400.0)
    assert batches == [1024, 512, 256]


def test_a_thorough_book_measures_what_was_measured_quickly(calls: list[str], tmp_path: Path) -> None:
    SpeedBook(tmp_path / "speed.json", quick=True).compute_for(RECIPE, CPU)
    book = SpeedBook(tmp_path / "speed.json")
    assert not book.knows(RECIPE, CPU)
    book.compute_for(RECIPE, CPU)
    book.compute_for(RECIPE, CPU)
    assert len(calls) == 2
    assert SpeedBook(tmp_path / "speed.json", quick=True).knows(RECIPE, CPU)
    assert len(calls) == 2


def test_a_book_puts_no_older_measurement_back_over_a_newer_one(calls: list[str], tmp_path: Path) -> None:
    quick = SpeedBook(tmp_path / "speed.json", quick=True)
    quick.compute_for(RECIPE, CPU)
    SpeedBook(tmp_path / "speed.json").compute_for(RECIPE, CPU)
    quick.compute_for(RECIPE.model_copy(update={"batch_size": 64}), CPU)
    assert SpeedBook(tmp_path / "speed.json").knows(RECIPE, CPU), "measured thoroughly meanwhile"


def test_a_micro_batch_of_a_moment_without_memory_is_looked_at_again(
    calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process held the GPU's memory then."""
    free, gpu = [1_000], torch.device("cuda:0")
    monkeypatch.setattr(speed_module, "available_bytes", lambda device: free[0])
    monkeypatch.setattr(speed_module, "device_name", lambda device: "a GPU")
    book = SpeedBook(tmp_path / "speed.json")
    book.compute_for(RECIPE, gpu)
    book.note_micro_batch(RECIPE, gpu, 8)
    free[0] = 1_100
    assert book.compute_for(RECIPE, gpu).micro_batch == 8
    assert len(calls) == 1
    free[0] = 1_300
    assert book.compute_for(RECIPE, gpu).micro_batch is None
    assert len(calls) == 2
    book.note_micro_batch(RECIPE, gpu, 8)
    larger = RECIPE.model_copy(update={"crop_size": 64})
    assert SpeedBook(tmp_path / "speed.json", quick=True).compute_for(larger, gpu).micro_batch is None


def test_how_quickly_a_network_judges_is_measured_once_in_float32(
    calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[Compute] = []

    def seconds(build: object, px: int, batch: int, compute: Compute) -> float:
        timed.append(compute)
        return batch / 400.0

    monkeypatch.setattr(speed_module, "forward_seconds", seconds)
    for _ in range(2):
        book = SpeedBook(tmp_path / "speed.json")
        assert book.judged_per_s(RECIPE, CPU) == pytest.approx(400.0)
        assert book.compute_for(RECIPE, CPU) == Compute("cpu", "bf16", True, 0.5)
    assert [(one.precision, one.channels_last) for one in timed] == [("fp32", True)]
    assert SpeedBook(tmp_path / "none.json", deterministic=True).judged_per_s(RECIPE, CPU) == pytest.approx(400.0)
    assert not (tmp_path / "none.json").exists()
