"""One recipe in training: its network, optimizer and weight average, and the steps that move them. Knows no rungs' order
(see fit.py), no study, no trial, no command line.

Legend: B images a step, S patch side (96), px network side. A *view* is one training image shown to the network; view
``v`` of a lineage always shows the same patch under the same augmentation, whatever the micro-batch, worker or restart.
"""

from __future__ import annotations

import itertools
import math
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcam_automl.batches import ViewStream
from pcam_automl.counter import key_of
from pcam_automl.errors import Interrupted, TrainingDiverged
from pcam_automl.models.factory import logit_of
from pcam_automl.models.layers import set_trainable
from pcam_automl.recipe import Recipe
from pcam_automl.scores import Scores
from pcam_automl.training.checkpoint import optimizer_tensors, restore_optimizer
from pcam_automl.training.compute import Compute, is_out_of_memory
from pcam_automl.training.optim import WeightAverage, build_optimizer, set_rates
from pcam_automl.training.ranks import any_over_ranks, mean_over_ranks, ranks, sum_over_ranks
from pcam_automl.training.schedule import Rates
from pcam_automl.training.task import Score, Task

STEPS_BETWEEN_CHECKS = 50  # reading the loss syncs with the device
_SCALER_KEYS = ("scale", "_growth_tracker")  # what a GradScaler learns
ProgressCall = Callable[[int], None]


@dataclass(frozen=True)
class Rung:
    """A point at which a training is scored.

    Attributes:
        views: training images seen when it is reached.
        subset: how many patches of the nested order they are drawn from.
    """

    views: int
    subset: int


@dataclass(frozen=True)
class RungResult:
    """What is known after a rung. Seconds are wall clock; ``images_per_s`` counts training steps only.

    ``auc``, ``loss``, ``accuracy`` and ``dice`` are of the scoring rows, None where there are none; of a dense task they
    count pixels; ``worst_domain_auc`` is None, too, where fewer than two domains can be scored. ``train_loss`` and ``train_accuracy`` are means over the rung's augmented views.
    """

    rung: int
    views: int
    subset: int
    auc: float | None
    loss: float | None
    train_loss: float
    seconds: float
    images_per_s: float
    lr: float
    train_accuracy: float | None = None
    accuracy: float | None = None
    dice: float | None = None
    stage: int = 0
    worst_domain_auc: float | None = None


@dataclass(frozen=True)
class Segment:
    """What some steps gave: mean loss and accuracy over their views, and their seconds."""

    loss: float
    accuracy: float
    seconds: float
    n_views: int

    def then(self, other: Segment) -> Segment:
        """Both together; the figures are the later one's, which has the better weights."""
        shown = other if other.n_views else self
        return Segment(shown.loss, shown.accuracy, self.seconds + other.seconds, self.n_views + other.n_views)


class Training:
    """One recipe in training: network, optimizer, weight average and how many views they have seen."""

    def __init__(
        self, recipe: Recipe, network: nn.Module, task: Task, compute: Compute, *, key: int, data_key: str = ""
    ) -> None:
        self.recipe, self.task, self.compute, self.key = recipe, task, compute, key
        self.data_key = data_key  # of the data and rows; a checkpoint of others is not gone on from
        self.weights = "none"  # where it started from; nor one of other weights
        self.foreign: list[Path] = []  # checkpoints of another training in its place, to go once it has one of its own
        self.network = compute.place(network)
        self.optimizer = build_optimizer(self.network, recipe)
        self.average = WeightAverage(self.network, recipe.ema) if recipe.ema > 0 else None
        self.views, self.phase = 0, 0
        self.micro_batch = min(recipe.batch_size, compute.micro_batch or recipe.batch_size)
        self.n_steps = 0  # taken so far, those of dropped decay branches included
        self.micro_batches = [(0, self.micro_batch)]  # (step, images at a time) from that step on
        self.given_micro_batches: dict[
            int, int
        ] = {}  # step to images at a time, where a replay knows when memory was short
        self.scaler = torch.amp.GradScaler(torch.device(compute.device).type, enabled=compute.precision == "fp16")
        self.results: list[RungResult] = []
        self.n_resumed = 0  # of the results, those that a checkpoint brought
        self.best: tuple[int, dict[str, Tensor]] | None = None
        self.scores: Scores | None = None  # what the last score was of
        self._trainable: float | None = None

    # -- the loop ------------------------------------------------------------------------------------------------

    def train(
        self,
        stream: ViewStream,
        first: int,
        last: int,
        rates_of: Callable[[int], Rates],
        stop: Callable[[], None],
        progress: ProgressCall,
    ) -> Segment:
        """Steps over the views [first, last), each of exactly ``batch_size``; what does not fill one carries over to the next call."""
        batch_size = self.recipe.batch_size
        n_steps = max(1, round(last / batch_size) - round(first / batch_size)) if last > first else 0
        seed = key_of(self.key, "dropout", first)  # a resumed segment drops the same units, each rank others
        torch.manual_seed((seed if ranks().is_first else key_of(seed, "rank", ranks().rank)) >> 1)
        began = time.perf_counter()
        total = torch.zeros(2, device=self.compute.device)  # loss, accuracy: read once
        following = stream.rows_of(first, first + batch_size) if n_steps else None
        pending: Interrupted | None = None
        for step in range(n_steps):
            pending = self._asked_to_stop(stop) or pending
            view = first + step * batch_size
            self.use(rates_of(view))
            rows, after = following, view + batch_size
            assert rows is not None
            following = stream.rows_of(after, after + batch_size) if step < n_steps - 1 else None
            mine = ranks().share_of(batch_size)
            coming = following if following is None else following[mine]
            total += self.step(rows[mine], np.arange(view, after)[mine], coming)
            if step % STEPS_BETWEEN_CHECKS == 0 or step == n_steps - 1:
                check_finite(total[0])
                if any_over_ranks(pending is not None):  # a signal reaches ranks at different steps; all end at one
                    raise pending or Interrupted("another process of this training was interrupted", signal.SIGTERM)
            progress(batch_size)
        self.views = last
        self._settle_buffers()
        loss, right = (total / max(n_steps, 1)).tolist()
        return Segment(loss, right, time.perf_counter() - began, last - first)

    def _asked_to_stop(self, stop: Callable[[], None]) -> Interrupted | None:
        """Alone the interruption is raised at once; one of several ranks keeps it until all of them ask each other."""
        try:
            stop()
        except Interrupted as fault:
            if ranks().n == 1:
                raise
            return fault
        return None

    def use(self, rates: Rates) -> None:
        """Set rates and trainable layers for the next step; a new stage begins with a fresh optimizer (fastai's way)."""
        if rates.phase != self.phase:
            self.phase = rates.phase
            self.optimizer.state.clear()
        if rates.trainable != self._trainable:
            self._trainable = rates.trainable
            set_trainable(self.network, rates.trainable)
        set_rates(self.optimizer, rates)

    def step(self, rows: np.ndarray, views: np.ndarray, following: np.ndarray | None = None) -> Tensor:
        """One optimizer step, (loss, accuracy) still on the device; halves the micro-batch and repeats when memory is short.

        Args:
            rows: (B,) store rows.
            views: (B,) their view numbers.
            following: rows of the next step, if it is known, to be fetched meanwhile.
        """
        self.micro_batch = self.given_micro_batches.get(self.n_steps, self.micro_batch)
        while True:
            try:
                figures = self._gradients(rows, views, following)
                break
            except (torch.OutOfMemoryError, RuntimeError) as fault:
                if not is_out_of_memory(fault) or self.micro_batch <= 2:
                    raise
                self.optimizer.zero_grad(set_to_none=True)
                self.micro_batch = max(2, self.micro_batch // 2)
                self.micro_batches.append((self.n_steps, self.micro_batch))
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if self.recipe.clip_norm > 0:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.clip_norm)  # on the device, nothing is read
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update()
        self.n_steps += 1
        return figures

    def _gradients(self, rows: np.ndarray, views: np.ndarray, following: np.ndarray | None = None) -> Tensor:
        """Forward and backward over the micro-batches; returns mean loss and accuracy, (2,) on the device."""
        total, alone = torch.zeros(2, device=self.compute.device), ranks().n == 1
        smoothing = self.recipe.label_smoothing
        cuts = self._cuts(len(rows))
        coming = [*(rows[cut] for cut in cuts[1:]), following if following is None else following[cuts[0]]]
        for cut, next_rows in zip(cuts, coming, strict=True):
            images, target = self.task.batch(rows[cut], views[cut])  # (b, 3, px, px), (b, ...)
            if next_rows is not None:
                self.task.expect(next_rows)
            share = len(images) / (len(rows) if alone else self.recipe.batch_size)
            with self.compute.autocast():
                logits = logit_of(self.network(self.compute.layout(images))).float()  # the target's shape
            smooth = target * (1.0 - smoothing) + 0.5 * smoothing
            loss = F.binary_cross_entropy_with_logits(logits, smooth) * share
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            right = ((logits > 0) == (target > 0.5)).float().mean()
            total += torch.stack((loss.detach(), right * share))
        if not alone:
            gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
            sum_over_ranks([total, *gradients])
        return total

    def _settle_buffers(self) -> None:
        """Ranks see other halves of each batch: their running statistics are averaged, those of the weight average, too."""
        if ranks().n == 1:
            return
        names = {name for name, buffer in self.network.named_buffers() if buffer.is_floating_point()}
        averaged = self.average.state() if self.average is not None else {}
        mean_over_ranks(
            [*(buffer for name, buffer in self.network.named_buffers() if name in names)]
            + [tensor for name, tensor in averaged.items() if name in names]
        )

    def _cuts(self, n: int) -> list[slice]:
        """Micro-batches of n images, of equal size to one image: a rest of a single one would have no batch statistics."""
        n_cuts = max(1, min(math.ceil(n / self.micro_batch), n // 2))
        ends = [n * number // n_cuts for number in range(n_cuts + 1)]
        return [slice(first, last) for first, last in itertools.pairwise(ends)]

    # -- scoring ---------------------------------------------------------------------------------------------------

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The network in evaluation mode with the averaged weights; the live ones come back at the end."""
        self.network.eval()
        self._trainable = None
        if self.average is not None:
            self.average.swap()
        try:
            with torch.compiler.set_stance("force_eager" if self.compute.compiled else "default"):
                yield self.network  # a compiled one would be compiled anew for other batches
        finally:
            if self.average is not None:
                self.average.swap()

    def score(self, stop: Callable[[], None] = lambda: None) -> tuple[Score, Scores]:
        """Figures of the averaged weights on the scoring rows, and what they are of.

        One of several ranks does not ask to stop meanwhile: not all of them score at every place, and alone it would leave the
        others waiting. A signal is heard at the next step.
        """
        with self.averaged() as network:
            return self.task.score(network, stop if ranks().n == 1 else lambda: None)

    # -- state -------------------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, dict[str, Tensor]]:
        """Copies of every tensor that a step changes."""
        parts = {"model": self.network.state_dict(), "optim": optimizer_tensors(self.optimizer)}
        if self.average is not None:
            parts["ema"] = self.average.state()
        if self.scaler.is_enabled():
            state = self.scaler.state_dict()
            parts["scaler"] = {key: torch.tensor(float(state[key])) for key in _SCALER_KEYS}
        return {name: {k: t.detach().clone() for k, t in tensors.items()} for name, tensors in parts.items()}

    def restore(self, parts: dict[str, dict[str, Tensor]], *, views: int, ema_updates: int) -> None:
        """Go back to a snapshot."""
        self.network.load_state_dict(parts["model"])
        restore_optimizer(self.optimizer, parts["optim"])
        if self.average is not None:
            self.average.load(parts["ema"], ema_updates)
        if self.scaler.is_enabled() and "scaler" in parts:  # else it went on from another precision
            held = {
                "scale": float(parts["scaler"]["scale"]),
                "_growth_tracker": int(parts["scaler"]["_growth_tracker"]),
            }
            self.scaler.load_state_dict({**self.scaler.state_dict(), **held})
        self.views = views

    def averaged_state(self) -> dict[str, Tensor]:
        """The weights to keep: averaged where there is an average, with the network's integer buffers."""
        state = dict(self.network.state_dict())
        if self.average is not None:
            state.update(self.average.state())
        return {name: tensor.detach().clone() for name, tensor in state.items()}

    def keep(self, state: dict[str, Tensor]) -> None:
        """Make these the weights to keep, live and averaged."""
        self.network.load_state_dict(state)
        if self.average is not None:
            self.average.load(state, self.average.n_updates)


def check_finite(loss: Tensor) -> None:
    """Raise TrainingDiverged for a loss that is NaN or infinite."""
    if not bool(torch.isfinite(loss)):
        raise TrainingDiverged(f"the training loss became {float(loss)}")


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory so far: of the device for CUDA, of this process for the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
