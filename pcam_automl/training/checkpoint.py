"""A training's whole state as a folder of safetensors and JSON. Never unpickles; knows no schedule.

One folder holds ``model``, ``ema`` and ``optim`` safetensors and ``state.json`` (views, keys, parameter groups, memory
format, results so far and the XXH3-128 of every other file). It is filled aside and renamed as a whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pcam_automl.errors import BundleError
from pcam_automl.files import folder_written_whole, write_json

FORMAT = "pcam-automl checkpoint 2"


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as ``<parameter number>.<name>`` -> tensor."""
    state = optimizer.state_dict()["state"]
    return {
        f"{number}.{name}": torch.as_tensor(value)
        for number, slots in state.items()
        for name, value in slots.items()
        if value is not None
    }


def optimizer_fits(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> bool:
    """Whether :func:`optimizer_tensors` of another process are of this optimizer's parameters, in their order: a release may group them
    otherwise, and torch asks for no shape.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for key, tensor in tensors.items():
        number = int(key.partition(".")[0])
        if number >= len(parameters) or (tensor.ndim > 0 and tensor.shape != parameters[number].shape):
            return False
    return True


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Take over what :func:`optimizer_tensors` gave; moments get the layout of their parameter."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = tensor
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, moments in state.items():
        like = parameters[index]
        for name, tensor in moments.items():
            if tensor.shape == like.shape:
                moments[name] = torch.empty_like(like).copy_(tensor)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # safetensors refuses channels_last and shared storage: every tensor is stored contiguous, on the CPU, on its own.
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def write_checkpoint(folder: Path, *, parts: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    """Write the parts (``model``, ``ema``, ``optim``) and the state, whole or not at all.

    Raises:
        DataError: the disk is full or the folder is read-only.
    """
    with folder_written_whole(folder) as partial:
        sums = {}
        for name, tensors in parts.items():
            file = partial / f"{name}.safetensors"
            written = save(_contiguous(tensors))
            file.write_bytes(written)  # save_file hides the operating system's error
            # Against damage, not forgery: 0.1 s a GB, where SHA-256 took 0.6 s of the file read back.
            sums[file.name] = xxhash.xxh3_128_hexdigest(written)
        write_json(partial / "state.json", {"format": FORMAT, "xxh3_128": sums, **state})


def _beside_training(write: Callable[[], None]) -> Callable[[], None]:
    """``write`` on a stream of its own, behind what the GPU was asked for so far: on the training's stream each of some 400 tensors would
    wait for the steps that were asked for since. Not run yet: no GPU was at hand.
    """
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return write
    ready, stream = torch.cuda.Event(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    ready.record()

    def aside() -> None:
        stream.wait_event(ready)
        # The device named: this thread's own is the first one, and leaving a stream of another would open a context there.
        with torch.cuda.device(stream.device), torch.cuda.stream(stream):
            write()

    return aside


class CheckpointWriter:
    """Writes while the training goes on, one checkpoint at a time, in the order in which they were handed over.

    Of a trial of seconds the writing took a fifteenth, most of it waiting for the disk. What is handed over must not
    change any more (:meth:`~pcam_automl.training.engine.Training.snapshot` copies).
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._pending: Future[None] | None = None

    def submit(self, write: Callable[[], None]) -> None:
        """Hand over; waits for the checkpoint before it.

        Raises:
            WriteError: of the checkpoint before it, see :func:`write_checkpoint`.
        """
        self.flush()
        self._pending = self._thread.submit(_beside_training(write))

    def then(self, call: Callable[[], None]) -> None:
        """Do it once what was handed over is on the disk; waits for nothing. It is left undone where that could not be written."""
        before = self._pending

        def behind() -> None:
            if before is not None:
                before.result()  # done: there is one thread
            call()

        self._pending = self._thread.submit(behind)

    def check(self) -> None:
        """Raise what the last checkpoint ended in, if it has ended; waits for nothing.

        Raises:
            WriteError: see :func:`write_checkpoint`.
        """
        if self._pending is not None and self._pending.done():
            self.flush()

    def flush(self) -> None:
        """Wait until everything is on the disk.

        Raises:
            DataError: see :func:`write_checkpoint`.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def read_checkpoint(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Parts and state, checksums verified.

    Raises:
        BundleError: a file is missing, changed, or of another format.
    """
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise BundleError(f"{folder} is not a checkpoint of this version ({FORMAT})")
        parts = {}
        for name, expected in state["xxh3_128"].items():
            file = folder / Path(name).name
            held = file.read_bytes()
            if xxhash.xxh3_128_hexdigest(held) != expected:
                raise BundleError(f"{file} has changed since it was written (its checksum differs)")
            parts[file.stem] = load(held)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as fault:
        raise BundleError(
            f"{folder} is not a complete checkpoint ({type(fault).__name__}: {str(fault)[:100]})"
        ) from None
    return parts, state


def newest_checkpoint(
    root: Path, *, note: Any = None
) -> tuple[Path, dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """The newest readable checkpoint ``<root>/<number>``; unreadable ones are reported through ``note`` and passed over."""
    numbered = sorted((int(f.name), f) for f in root.iterdir() if f.name.isdigit()) if root.is_dir() else []
    for _, folder in reversed(numbered):
        try:
            return (folder, *read_checkpoint(folder))
        except BundleError as fault:
            if note is not None:
                note(f"{fault}; the checkpoint before it is used")
    return None


def numbered_checkpoints(root: Path) -> list[Path]:
    """All ``<root>/<number>``, whosever they are."""
    return [folder for folder in root.iterdir() if folder.name.isdigit()] if root.is_dir() else []


def keep_newest(root: Path, n: int) -> None:
    """Remove all but the ``n`` highest-numbered checkpoints. Another thread or process may do the same: what is gone is gone."""
    numbered = sorted((int(f.name), f) for f in root.iterdir() if f.name.isdigit())
    for _, folder in numbered[:-n]:
        shutil.rmtree(folder, ignore_errors=True)
