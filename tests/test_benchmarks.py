"""The benchmarks run: every side of each, at tiny sizes. Their figures are not judged here."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import pytest
import torch
from easy_set import TINY
from optuna.trial import TrialState

from benchmarks import (
    batches,
    common,
    convolutions,
    filled,
    inference,
    overhead,
    plain,
    roofline,
    settings,
    study_size,
    training,
    workers,
)
from pcam_automl import cpu
from pcam_automl.data.store import PatchStore, open_store
from pcam_automl.errors import PcamError
from pcam_automl.models.factory import build_network
from pcam_automl.models.weights import Weights
from pcam_automl.search.storage import open_storage
from pcam_automl.training.compute import Compute

CPU = torch.device("cpu")
SETTINGS = {"batch": 8, "steps": 2, "lead": 1, "rounds": 1, "workers": 0}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def store(easy_pack: Path) -> PatchStore:
    return open_store(easy_pack)


def test_sides_take_turns_and_the_first_changes() -> None:
    calls: list[str] = []

    def side(name: str) -> common.Side:
        return lambda: calls.append(name) or float(len(calls))

    found = common.in_turn({"a": side("a"), "b": side("b")}, 2)
    assert "".join(calls) == "ab" + "ab" + "ba"
    assert found == {"a": [3.0, 6.0], "b": [4.0, 5.0]}
    assert common.ratios(found["b"], found["a"]) == [4 / 3, 5 / 6]
    assert common.spread([3.0, 1.0, 2.0]) == "2.00 (1.00 to 3.00)"


def test_settings_are_whole_numbers_or_end_with_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PCAM_BENCH_ROUNDS", "7")
    assert settings.setting("ROUNDS", 5) == 7
    monkeypatch.setenv("PCAM_BENCH_ROUNDS", "")
    assert settings.setting("ROUNDS", 5) == 5
    assert settings.numbers("CROPS", "48, 64 96") == [48, 64, 96]
    for wrong in ("abc", "-1", "1.5", " , "):
        monkeypatch.setenv("PCAM_BENCH_ROUNDS", wrong)
        with pytest.raises(SystemExit, match="PCAM_BENCH_ROUNDS must be a whole number"):
            settings.setting("ROUNDS", 5)


def test_a_result_says_when_and_where(tmp_path: Path) -> None:
    settings.write_result(tmp_path / "new" / "one.json", {"rounds": 3})
    kept = json.loads((tmp_path / "new" / "one.json").read_text())
    assert set(kept) == {"date", "machine", "rounds"}
    assert set(kept["machine"]) == {"cpu", "cores", "python", "instructions"}


def test_a_variant_is_named_by_what_is_on() -> None:
    assert common.variant_of(Compute("cpu", "bf16", True, 0.1)) == "bf16 channels_last"
    assert common.variant_of(Compute("cpu")) == "fp32"


def test_batches_of_both_sides(store: PatchStore, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"n_rounds": 1, "n_batches": 4, "n_workers": 0, "backbone": TINY, "crop": 48, "batch": 8}
    found = batches.measure_batches(store, Compute("cpu"), **sizes)
    assert found["ratios"][0] > 0
    assert 0 < found["batch_share"][0] < 1
    batches.report({**found, "network": TINY, "batch": 8})
    assert "share of the batch" in capsys.readouterr().out


def test_the_passes_of_a_layer_are_timed_on_both_sides() -> None:
    found = convolutions.passes((8, 8, 5, 4, 1, 2, 8), torch.bfloat16, 2, 1)
    assert set(found) == {"forward", "input", "weights"}
    assert all(set(times) == {"oneDNN", "route"} and min(times.values()) > 0 for times in found.values())


def test_the_loaders_stain_jitter_without_jitter_changes_nothing() -> None:
    image = torch.rand(3, 8, 8).clamp(min=1 / 255)
    torch.testing.assert_close(batches.StainJitter(0.0)(image), image, atol=1e-5, rtol=0)
    assert (batches.StainJitter(0.5)(image) - image).abs().max() > 1e-3


class Here:
    """A side in this process, in the place of ``common.Apart``: seven more of them would import torch for a minute."""

    def __init__(self, build: Callable[..., common.Side], *words: object) -> None:
        self.side = build(*words)

    def __call__(self) -> float:
        return self.side()

    def close(self) -> None:
        """Nothing to end."""


def countdown(start: int) -> common.Side:
    values = iter(range(start, 0, -1))
    return lambda: float(next(values))


@pytest.mark.slow
def test_a_side_apart_answers_until_it_ends_and_then_says_so() -> None:
    side = common.Apart(countdown, 2)
    assert [side(), side()] == [2.0, 1.0]
    with pytest.raises(RuntimeError, match="the process of a side ended"):
        side()
    side.close()


@pytest.fixture
def _determinism_undone() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_determinism_undone")
def test_a_training_cell_is_kept_and_read_again(
    store: PatchStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "Apart", Here)
    monkeypatch.setattr(training, "VARIANTS_OF", (TINY, 32))
    cell = training.cell_of(TINY, 32, store, CPU, SETTINGS, tmp_path)
    wanted = {common.OURS, training.PLAIN, training.DETERMINISTIC, "ours, bf16 channels_last"}
    assert wanted <= set(cell["images_per_s"])
    again = training.cell_of(TINY, 32, store, CPU, SETTINGS, tmp_path)
    assert again["images_per_s"] == cell["images_per_s"]
    assert json.loads((tmp_path / f"{TINY}-32.json").read_text())["key"]["batch"] == 8
    assert training.row_of(cell).startswith(f"| {TINY} | 32 |")
    assert training.report([cell])[training.PLAIN]["geometric_mean"] == pytest.approx(cell["ratios"][training.PLAIN][0])
    assert "ours, fp32 channels_last" in capsys.readouterr().out


def test_plain_training_moves_the_weights(store: PatchStore) -> None:
    network = build_network(common.recipe_for(TINY, 32, 8), Weights("none"), seed=0)
    before = [p.clone() for p in network.parameters()]
    images = np.array(store.patches[:16])
    transform = plain.training_transform(32, (0.5,) * 3, (0.2,) * 3)
    loader = plain.build_loader(
        plain.ImageDataset(images, store.label[:16], transform), batch_size=8, n_workers=0, n_batches=3
    )
    assert [len(x) for x, _ in loader] == [8, 8, 8]  # more than the images: they come again
    assert plain.plain_training(network, loader, CPU)() > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore")  # of importing fastai
def test_a_fastai_epoch(store: PatchStore) -> None:
    if plain.fastai_version() is None:
        pytest.skip(f"fastai is not installed: {plain.FASTAI_INSTALL}")
    loaders = plain.fastai_loaders(
        np.array(store.patches[:24]),
        store.label[:24],
        32,
        (0.5,) * 3,
        (0.2,) * 3,
        n_batches=2,
        batch_size=8,
        n_workers=0,
        device=CPU,
    )
    assert (
        plain.fastai_training(build_network(common.recipe_for(TINY, 32, 8), Weights("none"), seed=0), loaders, CPU)()
        > 0
    )


def test_the_roofline_counts_a_step() -> None:
    assert roofline.matrix_flops(CPU, side=64, repeats=1) > 0
    assert roofline.copy_bytes_per_s(CPU, n_bytes=1 << 16, repeats=1) > 0
    conv = torch.nn.Conv2d(3, 4, 3, padding=1, bias=False)
    step = roofline.step_of_image(torch.nn.Sequential(conv, torch.nn.ReLU()), 8, Compute("cpu"))
    assert step["flops"] == 2 * 2 * (3 * 4 * 9 * 8 * 8)  # forward, and the weights' gradient; the image needs none
    assert step["bytes"] == 2 * 4 * (3 + 4) * 8 * 8  # float32 input and output, once there and once back
    half = roofline.step_of_image(torch.nn.Sequential(conv, torch.nn.ReLU()), 8, Compute("cpu", "bf16"))
    # Input and output in bf16, and the loss's float32 copy of the output; the weights' copy in bf16 is none of an image's bytes.
    assert half["bytes"] == 2 * (2 * (3 + 4) + 4 * 4) * 8 * 8
    assert roofline.ceilings(step, 2 * step["flops"], 3 * step["bytes"]) == {"by_arithmetic": 2.0, "by_memory": 3.0}


def test_the_roofline_is_reported_as_a_share(capsys: pytest.CaptureFixture[str]) -> None:
    cell = {
        "network": TINY,
        "crop": 32,
        "images_per_s": {common.OURS: [50.0]},
        "step_of_image": {"flops": 2.0, "bytes": 1.0},
    }
    found = training.report_roofline([cell], 400.0, 100.0)
    assert found["cells"][f"{TINY}-32"]["shares"] == {"by_arithmetic": 0.25, "by_memory": 0.5}
    assert "25.0 % of 200" in capsys.readouterr().out


def test_both_inferences_agree(store: PatchStore, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = common.recipe_for(TINY, 32, 8)
    found = inference.measure_network(recipe, store, Compute("cpu"), n_patches=40, n_rounds=1, n_workers=0)
    assert found["centre view"]["largest_difference"] < 1e-5
    assert found["eight views"]["largest_difference"] < 1e-5
    inference.report(recipe, found)
    assert "eight views" in capsys.readouterr().out


@pytest.mark.parametrize("name", [inference.TINY, "cnn_basic"])
def test_the_pack_to_predict_has_its_test_patches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setattr(inference, "N_DIFFERENT", 5)
    pack, bundle = inference.write_test_pack(tmp_path, 12), inference.write_untrained_bundle(tmp_path / "bundle", name)
    monkeypatch.setattr(sys, "argv", ["-c", str(bundle), str(pack)])
    exec(compile(inference.PREDICT, "PREDICT", "exec"), {})
    assert capsys.readouterr().out.split() == ["12"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_the_peak_of_a_process_is_seen() -> None:
    code = "import time; held = bytes(range(256)) * 400_000; time.sleep(2.0); del held; time.sleep(0.1); print('done')"
    peak, said = inference.peak_anonymous_bytes([sys.executable, "-c", code])
    assert 100e6 < peak < 250e6
    assert said.split() == ["done"]
    with pytest.raises(RuntimeError, match="ended with 3"):
        inference.peak_anonymous_bytes([sys.executable, "-c", "raise SystemExit(3)"])


def test_two_workers_are_compared_with_one(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = {1: (10.0, 20.0, 12.0), 2: (8.0, 8.0, 6.0)}
    rounds = [{n: {"wall_s": 30.0, "trials_s": seconds[n][r]} for n in seconds} for r in range(3)]
    workers.report(rounds, 6)
    (one, two) = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert (one[0], one[5], one[-1]) == ("1", "30.0", "1.00x")
    assert (two[0], two[5], two[-1]) == ("2", "45.0", "2.00x")


def test_a_search_is_timed_by_its_parts(
    easy_pack: Path, tmp_path: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = tmp_path / "tiny.yaml"
    space.write_text(
        "base: {batch_size: 16, crop_size: 32}\nparameters:\n  backbone: {choice: [test_resnet]}\n"
        "  lr: {float: [1.0e-4, 1.0e-2], log: true}\n"
    )
    line = overhead.arguments_for(easy_pack, tmp_path, trials=1, views=64, device="cpu", space=str(space))
    found = overhead.timed_search(line)
    parts = {
        name: s for name, s in found["parts_s"].items() if name != overhead.IMPORTS
    }  # they may all be here already
    assert min(parts.values()) > 0
    assert sum(parts.values()) < found["wall_s"]
    assert 0 < overhead.overhead_of(found) < 1
    overhead.report([found], 1)
    assert "ms a trial" in capsys.readouterr().out


def test_nested_stopwatches_do_not_count_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 4.0, 7.0, 10.0])  # outer begins, inner 1 to 3 and 4 to 7, outer ends
    monkeypatch.setattr(overhead, "time", SimpleNamespace(perf_counter=clock.__next__))
    seconds, inner = {"outer": 0.0, "inner": 0.0}, []
    nested = overhead._timed(lambda: None, seconds, "inner", inner)
    overhead._timed(lambda: (nested(), nested()), seconds, "outer", inner)()
    assert seconds == {"outer": 5.0, "inner": 5.0}
    assert not inner


def test_stopwatches_are_taken_off_after_a_fault() -> None:
    from pcam_automl.training.engine import Training

    original = Training.train

    def fail_inside() -> None:
        with overhead.stopwatches():
            assert Training.train is not original
            raise PcamError("enough")

    with pytest.raises(PcamError, match="enough"):
        fail_inside()
    assert Training.train is original


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("side", [study_size.ours, study_size.bare])
def test_both_sides_of_a_growing_study_finish_their_trials(
    side: Callable[[str, str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ours trains a stand-in, which breaks silently when the search asks more of it: it refuses trials that failed."""
    url = f"sqlite:///{tmp_path}/s.db"
    storage = open_storage(url)
    filled.create_study(storage, "s", filled.make_trials(12))
    monkeypatch.setattr(study_size, "N_ROUNDS", 1)
    monkeypatch.setattr(sys, "stdin", io.StringIO("go\n" * 2))
    side(url, "s")
    assert len([float(line) for line in capsys.readouterr().out.splitlines()]) == 2
    made = optuna.load_study(study_name="s", storage=storage).get_trials()[12:]
    assert [trial.state for trial in made] == [TrialState.COMPLETE] * 2
    storage.engine.dispose()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("fpu sse2 avx2", "AVX2"),
        ("avx2 avx512f avx512_bf16 amx_bf16", "AVX512, AMX bf16"),
        ("avx2 avx512f avx512_bf16", "AVX512, bf16"),
        ("fpu", ""),
    ],
)
def test_the_instructions_that_decide_the_speed_are_named(
    flags: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor: 0\nflags\t\t: {flags}\n")
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
    assert cpu.cpu_instructions() == said
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "none")
    assert cpu.cpu_instructions() == ""
