"""Variants, threads and determinism: what is measured, what fits, what repeats."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import joblib
import pytest
import torch
from torch import nn

from pcam_automl.errors import InputError, Interrupted
from pcam_automl.models.convolution import RoutedConv2d
from pcam_automl.training import compute as compute_module
from pcam_automl.training.compute import (
    Compute,
    choose_device,
    fixed_variant,
    has_kernels,
    has_precision,
    is_out_of_memory,
    measure,
    measure_compiled,
    measure_fitting,
    use_cores,
)

CPU = torch.device("cpu")


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1)
    )


def timed_by(seconds: Callable[[Compute, int], float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        compute_module, "_step_seconds", lambda variant, network, px, batch, turn_s: seconds(variant, batch)
    )


def test_the_fastest_variant_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute_module, "_variants", lambda device: [Compute("cpu"), Compute("cpu", "bf16", True)])
    timed_by(lambda variant, batch: 0.1 if variant.channels_last else 0.2, monkeypatch)
    chosen = measure(small, 32, 8, CPU)
    assert (chosen.precision, chosen.channels_last, chosen.step_s) == ("bf16", True, 0.1)


def test_the_largest_halving_that_fits_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(variant: Compute, batch: int) -> float:
        if batch > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 0.01 * batch

    timed_by(seconds, monkeypatch)
    found = measure_fitting(small, 32, 128, CPU)
    assert found.micro_batch == 16
    assert found.step_s == pytest.approx(1.28)  # eight of them make the batch
    timed_by(lambda variant, batch: 0.5, monkeypatch)
    assert measure_fitting(small, 32, 128, CPU).micro_batch is None


def test_a_variant_that_does_not_fit_leaves_the_batch_to_one_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute_module, "_variants", lambda device: [Compute("cpu"), Compute("cpu", "bf16", True)])

    def seconds(variant: Compute, batch: int) -> float:
        if not variant.channels_last:
            raise RuntimeError("GET was unable to find an engine to execute this computation")
        return 0.1

    timed_by(seconds, monkeypatch)
    found = measure_fitting(small, 32, 128, CPU)
    assert (found.channels_last, found.micro_batch) == (True, None)


@pytest.mark.parametrize(
    "words",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "FIND was unable to find an engine to execute this computation",
        "[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes",
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes. Error code 12",
    ],
)
def test_a_full_memory_is_known_by_the_words_of_torch_and_its_libraries(words: str) -> None:
    assert is_out_of_memory(RuntimeError(words))
    assert not is_out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"))


def test_a_full_memory_of_this_machine_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8)  # more than an address space holds
    assert is_out_of_memory(caught.value)


def test_other_errors_of_the_probe_are_not_taken_for_a_full_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(variant: Compute, batch: int) -> float:
        raise RuntimeError("shapes cannot be multiplied")

    timed_by(seconds, monkeypatch)
    with pytest.raises(RuntimeError, match="shapes"):
        measure_fitting(small, 32, 128, CPU)


def test_what_cannot_be_compiled_is_named_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(variant: Compute, batch: int) -> float:
        raise RuntimeError("no C++ compiler\nat all")

    timed_by(seconds, monkeypatch)
    assert measure_compiled(small, 32, 8, Compute("cpu")) == "RuntimeError: no C++ compiler at all"


@pytest.mark.parametrize(
    "behind",
    [
        Interrupted("interrupted by SIGINT", 2),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
)
def test_what_passes_is_not_noted_as_a_fault_of_the_compiler(
    behind: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(variant: Compute, batch: int) -> float:
        raise RuntimeError("backend='inductor' raised") from behind

    timed_by(seconds, monkeypatch)
    if isinstance(behind, Interrupted | torch.AcceleratorError):
        with pytest.raises(type(behind)):
            measure_compiled(small, 32, 8, Compute("cpu"))
    else:
        assert measure_compiled(small, 32, 8, Compute("cpu")) is None


@pytest.mark.slow
def test_compiling_keeps_the_names_of_the_weights_and_the_answers() -> None:
    found = measure_compiled(small, 32, 4, Compute("cpu"))
    assert not isinstance(found, str), found
    assert found[0] > 0 < found[1]
    plain, images = small(), torch.randn(4, 3, 32, 32)
    compiled = Compute("cpu", compiled=True).place(small())
    compiled.load_state_dict(plain.state_dict())
    torch.testing.assert_close(compiled(images), plain(images))


@pytest.mark.parametrize(("cores", "workers", "threads"), [(8, 1, 8), (8, 3, 2), (2, 2, 1), (2, 5, 1)])
def test_workers_share_the_cores(cores: int, workers: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(joblib, "cpu_count", lambda: cores)
    set_to: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    assert use_cores(workers) == threads
    assert set_to == [threads]


def test_fp16_is_the_low_precision_of_a_gpu_without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert fixed_variant(torch.device("cuda:0")).precision == "fp16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert fixed_variant(torch.device("cuda:0")).precision == "bf16"


def test_a_cpu_has_bf16_or_emulates_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert not has_precision(cpu, "bf16")
    assert has_precision(cpu, "fp32")
    assert not has_precision(cpu, "fp16")
    assert fixed_variant(cpu).precision == "fp32"


def test_a_torch_without_onednn_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoOperators:
        def __getattr__(self, name: str) -> object:
            raise AttributeError(f"'_OpNamespace' 'mkldnn' object has no attribute {name!r}")

    monkeypatch.setattr(torch.ops, "mkldnn", NoOperators())
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert not has_precision(torch.device("cpu"), "bf16")
    assert fixed_variant(torch.device("cpu")).precision == "fp32"


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((9, 0), ("sm_80", "sm_90"), True),
        ((8, 9), ("sm_80", "sm_90"), True),
        ((6, 0), ("sm_75", "sm_80", "sm_90"), False),
        ((7, 0), ("sm_75",), False),
        ((9, 0), ("sm_90a",), True),
        ((9, 1), ("sm_90a",), False),
        ((12, 1), ("sm_120",), True),
        ((12, 1), ("sm_100", "compute_100"), True),
        ((10, 3), ("sm_100f",), True),
        ((12, 0), ("sm_100f",), False),
        ((9, 0), ("gfx942",), True),
        ((9, 0), (), True),
    ],
)
def test_a_gpu_runs_what_was_built_for_it_or_before_it(
    capability: tuple[int, int], built: tuple[str, ...], runs: bool
) -> None:
    assert has_kernels(capability, built) is runs


def test_a_gpu_without_kernels_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("is_available", True),
        ("device_count", 1),
        ("get_device_capability", (6, 0)),
        ("get_arch_list", ["sm_75", "sm_90"]),
        ("get_device_name", "Tesla P100"),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    with pytest.raises(
        InputError,
        match=r"no kernels for Tesla P100 \(compute capability 6\.0, built for sm_75, sm_90\); use --device cpu",
    ):
        choose_device("auto")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (9, 0))
    assert choose_device("auto") == torch.device("cuda:0")


def test_deterministic_mode_is_torchs_own() -> None:
    code = (
        "import torch; from pcam_automl.training.compute import use_device;"
        "use_device('cpu', deterministic=True); print(torch.are_deterministic_algorithms_enabled())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_a_variant_that_moves_to_another_device_keeps_what_that_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial that began on a CPU goes on on a GPU: with routes for oneDNN each of its layers failed there."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    cpu = Compute("cpu", "bf16", True, step_s=0.1, micro_batch=8, compiled=True, routed=True)
    assert cpu.moved_to(torch.device("cuda:1")) == Compute("cuda:1", "fp16", True)
    gpu = Compute("cuda:0", "bf16", True, step_s=0.1, micro_batch=8)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert gpu.moved_to(torch.device("cuda:1")) == replace(gpu, device="cuda:1")
    plain = Compute("cpu", "fp32", True, step_s=0.1, routed=True)
    assert plain.moved_to(CPU) == plain
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert gpu.moved_to(CPU) == Compute("cpu", "fp32", True)


@pytest.mark.parametrize(
    "words", ["CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling", "CUDNN_STATUS_ALLOC_FAILED"]
)
def test_a_full_memory_is_known_by_its_words(words: str) -> None:
    assert is_out_of_memory(RuntimeError(f"error: {words}"))
    assert not is_out_of_memory(RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED"))


@pytest.mark.parametrize(
    ("routed", "compiled", "kind"),
    [(True, False, RoutedConv2d), (False, False, nn.Conv2d), (True, True, nn.Conv2d), (False, True, nn.Conv2d)],
)
def test_a_placed_network_has_the_convolutions_of_its_variant(
    routed: bool, compiled: bool, kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever variant it was placed as before; a compiled one knows torch's own gradients alone."""
    asked: list[bool] = []
    monkeypatch.setattr(nn.Module, "compile", lambda network, dynamic: asked.append(dynamic))
    for before in (False, True):
        network = Compute("cpu", routed=before).place(small())
        placed = Compute("cpu", routed=routed, compiled=compiled).place(network)
        assert placed is network
        assert [type(layer) for layer in placed.modules() if isinstance(layer, nn.Conv2d)] == [kind]
    assert asked == ([False, False] if compiled else [])
