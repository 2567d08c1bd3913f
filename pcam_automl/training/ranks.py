"""One training by several processes (`torchrun`): who does what, and how their gradients meet. Starts no process.

Each rank trains on its share of every batch; gradients are summed, so a step is the one that a single process would take with
micro-batches of a rank's size. Batch statistics are those of a rank's share ("ghost batches"); running statistics are averaged
where a segment of the training ends. Ranks trust each other: they are one program of one user.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pcam_automl.errors import InputError, PcamError
from pcam_automl.training.compute import choose_device

T = TypeVar("T")
MEETING, PATIENCE = datetime.timedelta(minutes=30), datetime.timedelta(days=1)
"""How long ranks wait for each other at the start and within a step; and while the first one confirms trials or packs."""
_by_itself: list[bool] = []  # not empty while the first rank does what the others wait for: trainings, too, are its own
_waiting: list[Any] = []  # of the second kind: gloo, whatever the gradients go by


@dataclass(frozen=True)
class Ranks:
    """A process among those of one training."""

    rank: int = 0
    n: int = 1

    @property
    def is_first(self) -> bool:
        """The one that reads, decides and writes."""
        return self.rank == 0

    def share_of(self, n_images: int) -> slice:
        """The rank's part of a batch; parts differ by one image at most."""
        return slice(n_images * self.rank // self.n, n_images * (self.rank + 1) // self.n)


def ranks() -> Ranks:
    """The place of this process; alone where there is no process group."""
    if _by_itself or not (dist.is_available() and dist.is_initialized()):
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size())


def launched_size() -> int:
    """Processes that `torchrun` started for this job; 1 without it, whatever else has set WORLD_SIZE."""
    return int(os.environ.get("WORLD_SIZE", "1")) if dist.is_available() and dist.is_torchelastic_launched() else 1


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Join the process group of `torchrun`, if it started this process; gives the device of this rank.

    Raises:
        InputError: ``--device cuda:N`` for several processes.
    """
    if launched_size() == 1:
        yield device
        return
    if device not in ("auto", "cuda", "cpu"):
        raise InputError(f"--device {device}: under torchrun every process has a GPU of its own; use auto, cuda or cpu")
    gpu = choose_device(device).type == "cuda"
    own = str(choose_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")) if gpu else "cpu"
    if gpu:
        torch.cuda.set_device(own)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=MEETING)
    _waiting.append(dist.new_group(backend="gloo", timeout=PATIENCE))
    try:
        yield own
    finally:
        _leave()


def part() -> Ranks:
    """All have trained: the groups are dissolved by all at once, and the first goes on as a single process.

    Returns:
        This process's place until now.
    """
    here = ranks()
    if here.n > 1:
        dist.barrier(_waiting[0])
        _leave()
    return here


def _leave() -> None:
    _waiting.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def _alone() -> Iterator[None]:
    _by_itself.append(True)
    try:
        yield
    finally:
        _by_itself.pop()


def from_first(decide: Callable[[], T]) -> T:
    """What the first rank finds, for all; the others do not look themselves. A fault of this package is raised by all."""
    here = ranks()
    if here.n == 1:
        return decide()
    box: list[Any] = [None, None]
    if here.is_first:
        try:
            with _alone():
                box = [decide(), None]
        except PcamError as fault:
            box = [None, fault]
    dist.broadcast_object_list(box, src=0, group=_waiting[0], device=torch.device("cpu"))
    if box[1] is not None:
        raise box[1]
    found: T = box[0]
    return found


def first_before_others(do: Callable[[], T]) -> T:
    """Done by every rank, by the first one before the rest: what it packs or measures, they find."""
    here = ranks()
    if here.n == 1:
        return do()
    if here.is_first:
        with _alone():
            found = do()
        dist.barrier(_waiting[0])
        return found
    dist.barrier(_waiting[0])
    return do()


def any_over_ranks(flag: bool) -> bool:
    """Whether it is set on any rank; all of them must ask."""
    here = ranks()
    if here.n == 1:
        return flag
    flags = torch.tensor([float(flag)])
    dist.all_reduce(flags, group=_waiting[0])
    return bool(flags.item())


def sum_over_ranks(tensors: Iterable[Tensor]) -> None:
    """Sum each tensor over the ranks, in place, in one message for each type."""
    if ranks().n == 1:
        return
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_type.setdefault(tensor.dtype, []).append(tensor)
    for group in by_type.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        dist.all_reduce(flat)
        first = 0
        for tensor in group:
            tensor.copy_(flat[first : first + tensor.numel()].view_as(tensor))
            first += tensor.numel()


def mean_over_ranks(tensors: Iterable[Tensor]) -> None:
    """Average each tensor over the ranks, in place."""
    here, held = ranks(), list(tensors)
    if here.n > 1:
        sum_over_ranks(held)
        for tensor in held:
            tensor.div_(here.n)
