"""Device, threads, precision and memory layout of a training, chosen by a short measurement. Trains no recipe."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import platform
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import joblib
import torch
from torch import Tensor, nn

from pcam_automl.cpu import cpu_model
from pcam_automl.errors import InputError, PcamError, did_you_mean
from pcam_automl.files import FULL_DISK
from pcam_automl.heap import keep_freed_memory
from pcam_automl.models.convolution import set_routed

Precision = Literal["bf16", "fp16", "fp32"]
_ARCHITECTURE = re.compile(r"(sm|compute)_(\d+)(\d)([af]?)")


@dataclass(frozen=True)
class Probe:
    """How thoroughly the variants are timed.

    Attributes:
        rounds: variants take turns, so that a machine that is briefly busy does not decide.
        turn_s: of steps that a variant takes at its turn, or one step where that is longer: small networks differ by
            less than one step's noise.
        n_variants: of the variants, in the order in which they usually win; None is all.
        largest_batch: images a step at most on a CPU, whose rate depends little on it.
    """

    rounds: int
    turn_s: float
    n_variants: int | None
    largest_batch: int


THOROUGH = Probe(rounds=3, turn_s=0.15, n_variants=None, largest_batch=64)
"""For trainings of minutes: some 3 to 5 s a network on 2 cores."""
QUICK = Probe(rounds=1, turn_s=0.0, n_variants=3, largest_batch=32)
"""For trials of seconds: one step of three variants. The thorough one took a fifth of a search of short trials."""


@dataclass(frozen=True)
class Compute:
    """Where and how a network runs.

    Attributes:
        device: ``cpu``, ``cuda:0``, ...
        precision: autocast type; ``fp32`` is no autocast.
        channels_last: memory layout of weights and images.
        step_s: measured seconds of a training step, None if not measured.
        micro_batch: images that fit into the device's memory at a time; None where a whole batch does.
        compiled: training steps run through ``torch.compile``.
        routed: convolutions take their gradients by the routes of models/convolution.py where those are quicker.
    """

    device: str
    precision: Precision = "fp32"
    channels_last: bool = False
    step_s: float | None = None
    micro_batch: int | None = None
    compiled: bool = False
    routed: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[self.precision]

    def autocast(self) -> torch.autocast:
        return torch.autocast(torch.device(self.device).type, self.dtype, enabled=self.precision != "fp32")

    def place(self, network: nn.Module) -> nn.Module:
        """The network on the device, in the layout; compiled in place, so that its weights keep their names."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        network.to(self.device, memory_format=layout)  # type: ignore[call-overload]
        set_routed(network, self.routed and not self.compiled)  # the compiler knows torch's own gradients
        if self.compiled:
            network.compile(dynamic=False)
        return network

    def layout(self, images: Tensor) -> Tensor:
        """The images in the layout."""
        return images.contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)

    def moved_to(self, device: torch.device) -> Compute:
        """The same on another device, as far as that can: a trial that began on a CPU may go on on a GPU, and the other way round.

        Routes are those of a CPU's library; a precision that the device does not compute in gives way to its usual one; what fits into one
        device's memory, or was compiled for it, says nothing of another kind.
        """
        moved = replace(self, device=str(device), routed=self.routed and device.type == "cpu")
        if not has_precision(device, self.precision):
            moved = replace(moved, precision=fixed_variant(device).precision)
        if device.type != torch.device(self.device).type:
            moved = replace(moved, micro_batch=None, compiled=False, step_s=None)
        return moved

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def choose_device(text: str) -> torch.device:
    """``auto`` is the first CUDA device where there is one, else the CPU.

    Raises:
        InputError: an unknown or absent device, or one that this torch has no kernels for.
    """
    chosen = _named_device(text)
    if chosen.type == "cuda":
        index = chosen.index or 0
        capability, built = torch.cuda.get_device_capability(index), torch.cuda.get_arch_list()
        if not has_kernels(capability, built):
            raise InputError(
                f"--device {text}: torch {torch.__version__} has no kernels for {torch.cuda.get_device_name(index)} (compute capability "
                f"{capability[0]}.{capability[1]}, built for {', '.join(built)}); use --device cpu, or install a torch built for it"
            )
    return chosen


def has_kernels(capability: tuple[int, int], built: Sequence[str]) -> bool:
    """Whether code of one of the architectures runs on a GPU: ``sm_XY`` on the same major version from minor Y on, ``sm_XYa`` on that
    very one, ``compute_XY`` (which the driver compiles) on all later ones. Of other names nothing is known, so they may.
    """
    names = [match for name in built if (match := _ARCHITECTURE.fullmatch(name))]
    for kind, major, minor, suffix in (match.groups() for match in names):
        own = (int(major), int(minor))
        if suffix == "a":
            runs = capability == own
        elif kind == "compute" and not suffix:
            runs = capability >= own
        else:
            runs = capability[0] == own[0] and capability >= own
        if runs:
            return True
    return not names


def _named_device(text: str) -> torch.device:
    if text == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    kind, _, index = text.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise InputError(
            f"--device must be auto, cpu, cuda or cuda:N, got {text!r}{did_you_mean(kind, ['auto', 'cpu', 'cuda'])}"
        )
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"--device {text}: torch {torch.__version__} finds no CUDA device here; use --device cpu or auto"
        )
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {text}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return torch.device("cuda", int(index or 0)) if kind == "cuda" else torch.device("cpu")


def use_cores(n_workers: int = 1) -> int:
    """Let torch use this worker's share of the cores that the process really has; returns the number of threads.

    Counted are the affinity mask and the cgroup's CPU quota (a container of 2 CPUs on a host of 64 has 2).
    ``OMP_NUM_THREADS``, where it is set, is a worker's number of threads.

    Args:
        n_workers: processes that train on this machine side by side. Two of them with two threads each on two cores
            fell from 170 to 14 images/s.
    """
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        return torch.get_num_threads()
    threads = max(1, int(joblib.cpu_count()) // n_workers)
    torch.set_num_threads(threads)
    return threads


def use_device(text: str, *, n_workers: int = 1, deterministic: bool = False) -> torch.device:
    """Choose the device and set what is decided once a process: threads, memory, exact repetition or the fastest kernels.

    Args:
        text: see :func:`choose_device`.
        n_workers: see :func:`use_cores`.
        deterministic: the same seed gives the same weights, bit for bit on a CPU with the same number of threads. On CUDA
            torch warns of each operation that has no such kernel.

    Raises:
        InputError: an unknown or absent device.
    """
    device = choose_device(text)
    use_cores(n_workers)
    if device.type == "cpu":
        keep_freed_memory()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself only with a fixed workspace
        torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs a pass over all that is allocated
    if device.type == "cuda":
        torch.cuda.set_device(device)  # whose abilities are asked for without naming it
        with warnings.catch_warnings():  # torch 2.9 announces another interface, which breaks its own compiler
            warnings.simplefilter("ignore")
            # High: TF32 where float32 is left.
            torch.set_float32_matmul_precision("highest" if deterministic else "high")
    return device


@contextlib.contextmanager
def autotuned(device: torch.device) -> Iterator[None]:
    """Inside, cuDNN times its algorithms for every new shape: seconds that a long training of one shape earns back. A search has a new
    shape in nearly every trial, and goes by cuDNN's own choice.
    """
    if device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        yield
        return
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def is_of(name: str | None, device: torch.device) -> bool:
    """Whether a :func:`device_name` is of such a device, whatever its threads: else what fitted its memory says nothing here. Of an early
    release's checkpoint None is known, and taken for the same.
    """
    return name is None or name.partition(",")[0] == device_name(device).partition(",")[0]


def device_name(device: torch.device) -> str:
    """For people and for the trial's record: ``NVIDIA H100``, ``x86_64 CPU, 2 threads``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


@functools.cache
def cpu_name() -> str:
    """Model and instruction set of the CPU, on which the last bits of a training depend: ``AMD EPYC 9R45, AVX512``."""
    return f"{cpu_model()}, {torch.backends.cpu.get_cpu_capability()}"


def has_precision(device: torch.device, precision: Precision) -> bool:
    """Whether the device computes in this precision itself; a CPU without bf16 emulates it, far slower than float32."""
    if precision == "fp32":
        return True
    if device.type == "cuda":
        return precision == "fp16" or torch.cuda.is_bf16_supported(including_emulation=False)
    if precision != "bf16" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]  # built without: no such operator
        return False
    return torch.cpu._is_avx512_bf16_supported() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _variants(device: torch.device) -> list[Compute]:
    name = str(device)
    if device.type == "cuda":
        precision: Precision = "bf16" if has_precision(device, "bf16") else "fp16"
        return [Compute(name, precision, True), Compute(name, precision, False)]
    variants = [Compute(name, "fp32", True, routed=True), Compute(name, "fp32", True), Compute(name, "fp32", False)]
    if has_precision(device, "bf16"):
        variants = [Compute(name, "bf16", True, routed=True), Compute(name, "bf16", True), *variants]
    return variants


def measure(
    build: Callable[[], nn.Module], px: int, batch_size: int, device: torch.device, probe: Probe | None = None
) -> Compute:
    """The fastest sensible variant for one network, from a few training steps of each on random images.

    On this project's 2-core machines bf16 and channels_last each change the speed by 0.5x to 2x, in either direction.

    Args:
        build: makes the network afresh on the CPU.
        px: side of its input.
        batch_size: images a step.
        device: where it will train.
        probe: how thoroughly; None is ``THOROUGH``.

    Raises:
        torch.OutOfMemoryError: no variant fits at this batch size.
    """
    probe = probe or THOROUGH
    network, times = build(), {variant: float("inf") for variant in _variants(device)[: probe.n_variants]}
    with _rng_kept():
        for round_ in range(probe.rounds):
            # Clearly slower ones are not measured again. After one look that is twice as slow: another process may have run.
            bar_s = min(times.values()) * (2.0 if round_ == 1 else 1.3)
            for variant, best_s in times.items():
                if round_ == 0 or best_s <= bar_s:
                    taken = _step_seconds_if_it_fits(variant, network, px, batch_size, probe.turn_s)
                    times[variant] = min(best_s, taken)
            if not math.isfinite(min(times.values())):
                raise torch.OutOfMemoryError(
                    f"out of memory: no variant of {batch_size} images of {px} px fits on {device}"
                )
    fastest = min(times, key=times.__getitem__)
    return replace(fastest, step_s=times[fastest])


def fixed_variant(device: torch.device) -> Compute:
    """The variant of deterministic runs, where no measurement may decide: the usual winner on this kind of device."""
    return _variants(device)[0]


def measure_fitting(
    build: Callable[[], nn.Module], px: int, batch_size: int, device: torch.device, probe: Probe | None = None
) -> Compute:
    """As :func:`measure`, at the largest halving of the batch that fits into memory; ``step_s`` is for the whole batch.

    Raises:
        torch.OutOfMemoryError: not even two images fit.
    """
    fits = batch_size
    while True:
        try:
            compute = measure(build, px, fits, device, probe)
        except (torch.OutOfMemoryError, RuntimeError) as fault:
            if not is_out_of_memory(fault) or fits <= 2:
                raise
            fits = max(2, fits // 2)
            continue
        if fits == batch_size:
            return compute
        assert compute.step_s is not None
        return replace(compute, step_s=compute.step_s * batch_size / fits, micro_batch=fits)


def measure_compiled(
    build: Callable[[], nn.Module], px: int, batch_size: int, compute: Compute
) -> tuple[float, float] | str | None:
    """Seconds that ``torch.compile`` takes for a training step of this variant, and seconds of a compiled step; or, as
    text, why it cannot be compiled here (no C++ compiler, an operation that is not understood); None where memory or the
    disk was full just now, which says nothing of another time.

    Raises:
        Interrupted: a second signal came meanwhile, whatever the compiler made of it.
        torch.AcceleratorError: the device failed.
    """
    compiled = replace(compute, compiled=True)
    began = time.perf_counter()
    try:
        with _rng_kept():
            network = build()
            _step_seconds(compiled, network, px, batch_size, 0.0)
            ready_s = time.perf_counter() - began
            turns = range(THOROUGH.rounds)
            step_s = min(_step_seconds(compiled, network, px, batch_size, THOROUGH.turn_s) for _ in turns)
    except Exception as fault:  # noqa: BLE001 - a compiler of foreign graphs raises anything; the reason is recorded
        for behind in _chain(fault):  # it wraps what others raise inside it
            if isinstance(behind, PcamError) or has_lost_its_device(behind):
                raise behind from None
            if is_out_of_memory(behind) or (isinstance(behind, OSError) and behind.errno in FULL_DISK):
                return None
        return f"{type(fault).__name__}: {' '.join(str(fault).split())[:200]}"
    finally:
        torch.compiler.reset()
    return ready_s, step_s


def _chain(fault: BaseException) -> Iterator[BaseException]:
    """The fault and what it was raised from or over."""
    at: BaseException | None = fault
    while at is not None:
        yield at
        at = at.__cause__ or at.__context__


_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",  # on Linux; the next words are Windows'
    *("not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"),
    *("CUBLAS_STATUS_NOT_INITIALIZED", "CUDNN_STATUS_NOT_INITIALIZED"),  # their handle found no room on a full card
    *("DEVICE_ALLOCATION_FAILED", "HOST_ALLOCATION_FAILED"),  # cuDNN 9's names
    "unable to find an engine to execute",  # what torch says when no algorithm's workspace fits
)


def is_out_of_memory(fault: BaseException) -> bool:
    """CUDA's out-of-memory error, that of its libraries, or the CPU allocator's (plain RuntimeErrors)."""
    return isinstance(fault, torch.OutOfMemoryError) or any(words in str(fault) for words in _OUT_OF_MEMORY)


def has_lost_its_device(fault: BaseException) -> bool:
    """Whether CUDA answered with an error that stays until the process ends; a full memory does not."""
    return isinstance(fault, torch.AcceleratorError) and not is_out_of_memory(fault)


@torch.inference_mode()
def forward_seconds(build: Callable[[], nn.Module], px: int, batch_size: int, compute: Compute) -> float:
    """Seconds in which a network judges so many images: the quickest of three forward passes after one that does not count."""
    with _rng_kept():
        network = replace(compute, compiled=False, routed=False).place(build()).eval()
        images = compute.layout(torch.randn(batch_size, 3, px, px, device=compute.device))
    taken = []
    for _ in range(4):
        began = time.perf_counter()
        with compute.autocast():
            network(images)
        if compute.device != "cpu":
            torch.cuda.synchronize(compute.device)
        taken.append(time.perf_counter() - began)
    return min(taken[1:])


def available_bytes(device: torch.device) -> int:
    """Of a GPU's memory, what this process has or could have: a training of its own does not count against it."""
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return int(free_bytes) + torch.cuda.memory_reserved(device)


def peak_of_step(build: Callable[[], nn.Module], px: int, batch_size: int, compute: Compute) -> int:
    """Bytes of a GPU's memory that training steps of this variant take at most, weights included."""
    device = torch.device(compute.device)
    torch.cuda.init()  # type: ignore[no-untyped-call]  # the statistics of a device that nothing has used yet cannot be set back
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    with _rng_kept():
        _step_seconds(compute, build(), px, batch_size, 0.0)
    return torch.cuda.max_memory_allocated(device)


@contextlib.contextmanager
def _rng_kept() -> Iterator[None]:
    """The probe's dropout must not move the training's random stream."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _step_seconds_if_it_fits(variant: Compute, network: nn.Module, px: int, batch_size: int, turn_s: float) -> float:
    """:func:`_step_seconds`; infinite where memory is too short for this variant, which says nothing of the others."""
    try:
        return _step_seconds(variant, network, px, batch_size, turn_s)
    except (torch.OutOfMemoryError, RuntimeError) as fault:
        if not is_out_of_memory(fault):
            raise
    # Gradients of a backward pass that was cut off; outside `except` its traceback holds nothing any more.
    network.zero_grad(set_to_none=True)
    if variant.device != "cpu":
        torch.cuda.empty_cache()
    return math.inf


def _step_seconds(variant: Compute, network: nn.Module, px: int, batch_size: int, turn_s: float) -> float:
    """Seconds of the quickest of the training steps of ``turn_s``; the first one, which allocates, is not counted."""
    network = variant.place(network).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    images = variant.layout(torch.randn(batch_size, 3, px, px, device=variant.device))

    def step() -> float:
        began = time.perf_counter()
        with variant.autocast():
            loss = network(images).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if variant.device != "cpu":
            torch.cuda.synchronize(variant.device)
        return time.perf_counter() - began

    step()
    seconds = [step()]
    while sum(seconds) < turn_s:
        seconds.append(step())
    return min(seconds)
