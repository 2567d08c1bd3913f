"""The training loop: a recipe on a store's rows, rung by rung. Knows no study, no trial, no command line.

Legend: B images a step, S patch side (96), px network side. A *view* is one training image shown to the network; view
``v`` of a lineage always shows the same patch under the same augmentation, whatever the micro-batch, worker or restart.

With the ``wsd`` schedule (warm-up, stable, decay) a rung at ``views`` trains at the stable rate up to ``(1 - decay) * views``
and is scored at the end of a decay branch that reaches ``views``; the branch is then dropped and the next rung goes on from
the stable state. So every rung's score is that of a finished training of its length. With ``one_cycle`` and ``constant``
there is one curve over the last rung's views, and the rungs are the points at which it is scored.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcam_automl.augment import augment, augment_spec, draw
from pcam_automl.batches import Patches, ViewStream
from pcam_automl.counter import key_of
from pcam_automl.errors import TrainingDiverged
from pcam_automl.metrics import auc, log_loss
from pcam_automl.models.factory import Normalisation, classifier_parameters
from pcam_automl.recipe import Recipe
from pcam_automl.training.checkpoint import (
    keep_newest,
    newest_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    write_checkpoint,
)
from pcam_automl.training.compute import Compute
from pcam_automl.training.optim import WeightAverage, build_optimizer, decay_branch, one_cycle, set_lr, warm_up
from pcam_automl.training.scoring import logits_of_rows, probs_of_logits

STEPS_BETWEEN_CHECKS = 50  # reading the loss syncs with the device
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
    """What is known after a rung. Seconds are wall clock; ``images_per_s`` counts training steps only."""

    rung: int
    views: int
    subset: int
    auc: float | None
    loss: float | None
    train_loss: float
    seconds: float
    images_per_s: float
    lr: float


@dataclass(frozen=True)
class TrainingData:
    """What a training reads.

    Attributes:
        patches: uint8 batches by store row.
        label: (N,) 0/1 for every store row that is trained or scored on.
        train_rows: (n,) store rows in nested order; a rung uses a prefix.
        score_rows: (m,) store rows that a rung is scored on; empty for a training without validation.
        normalisation: channel means and deviations for the network.
    """

    patches: Patches
    label: np.ndarray
    train_rows: np.ndarray
    score_rows: np.ndarray
    normalisation: Normalisation


class Training:
    """One recipe in training: network, optimizer, weight average and how many views they have seen."""

    def __init__(self, recipe: Recipe, network: nn.Module, data: TrainingData, compute: Compute, *, key: int) -> None:
        self.recipe, self.data, self.compute, self.key = recipe, data, compute, key
        self.network = compute.place(network)
        self.optimizer = build_optimizer(self.network, recipe)
        self.average = WeightAverage(self.network, recipe.ema) if recipe.ema > 0 else None
        self.views = 0
        self.micro_batch = recipe.batch_size
        self.results: list[RungResult] = []
        self._spec = augment_spec(recipe)
        self._label = torch.from_numpy(data.label.astype(np.float32)).to(compute.device)
        self._head = {id(p) for p in classifier_parameters(self.network)}
        self._frozen: bool | None = None

    # -- the loop ------------------------------------------------------------------------------------------------

    def train(
        self,
        stream: ViewStream,
        first: int,
        last: int,
        lr_share: Callable[[int], float],
        frozen_until: float,
        stop: Callable[[], None],
        progress: ProgressCall,
    ) -> tuple[float, float]:
        """Steps over the views [first, last), each of exactly ``batch_size``; returns (mean loss, seconds)."""
        batch_size = self.recipe.batch_size
        n_steps = max(1, round((last - first) / batch_size)) if last > first else 0
        torch.manual_seed(key_of(self.key, "dropout", first) >> 1)  # a resumed segment drops the same units
        began = time.perf_counter()
        total = torch.zeros((), device=self.compute.device)
        for step in range(n_steps):
            stop()
            view = first + step * batch_size
            self._freeze(view < frozen_until)
            set_lr(self.optimizer, self.recipe.lr * lr_share(view))
            rows = stream.rows_of(view, view + batch_size)
            total += self._step(rows, np.arange(view, view + batch_size))
            if step % STEPS_BETWEEN_CHECKS == 0 or step == n_steps - 1:
                check_finite(total)
            progress(batch_size)
        self.views = last
        return float(total) / max(n_steps, 1), time.perf_counter() - began

    def _step(self, rows: np.ndarray, views: np.ndarray) -> Tensor:
        """One optimizer step; halves the micro-batch and repeats when the device's memory does not suffice."""
        while True:
            try:
                loss = self._gradients(rows, views)
                break
            except (torch.OutOfMemoryError, RuntimeError) as fault:
                if not is_out_of_memory(fault) or self.micro_batch <= 2:
                    raise
                self.optimizer.zero_grad(set_to_none=True)
                self.micro_batch = max(2, self.micro_batch // 2)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if self.recipe.clip_norm > 0:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update()
        return loss

    def _gradients(self, rows: np.ndarray, views: np.ndarray) -> Tensor:
        """Forward and backward over the micro-batches; returns the mean loss, still on the device."""
        total = torch.zeros((), device=self.compute.device)
        smoothing, data = self.recipe.label_smoothing, self.data
        for cut in range(0, len(rows), self.micro_batch):
            part, part_views = rows[cut : cut + self.micro_batch], views[cut : cut + self.micro_batch]
            images = augment(  # (b, 3, S, S) uint8 -> (b, 3, px, px) float
                data.patches.gather(part),
                draw(self._spec, self.key, part_views),
                self._spec,
                data.normalisation.mean,
                data.normalisation.std,
                dtype=torch.float32,
            )
            target = self._label[torch.from_numpy(part).to(self._label.device)]
            target = target * (1.0 - smoothing) + 0.5 * smoothing
            with self.compute.autocast():
                logits = self.network(self.compute.layout(images)).squeeze(1)  # (b, 1) -> (b,)
            loss = F.binary_cross_entropy_with_logits(logits.float(), target, reduction="sum") / len(rows)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def _freeze(self, frozen: bool) -> None:
        """Train the classifier alone, its backbone in evaluation mode, or everything."""
        if self._frozen == frozen:
            return
        self._frozen = frozen
        for parameter in self.network.parameters():
            parameter.requires_grad_(not frozen or id(parameter) in self._head)
        self.network.train(not frozen)

    # -- scoring ---------------------------------------------------------------------------------------------------

    def logits(self, rows: np.ndarray, *, stop: Callable[[], None] = lambda: None) -> np.ndarray:
        """Logits (n,) of store rows by the averaged weights, centre view."""
        self.network.eval()
        self._frozen = None
        if self.average is not None:
            self.average.swap()
        try:
            return logits_of_rows(
                self.network,
                self.data.patches,
                rows,
                crop_size=self.recipe.crop_size,
                out_px=self.recipe.network_px,
                normalisation=self.data.normalisation,
                compute=self.compute,
                stop=stop,
            )
        finally:
            if self.average is not None:
                self.average.swap()

    def score(self, stop: Callable[[], None]) -> tuple[float | None, float | None]:
        """(AUC, log-loss) on the scoring rows, (None, None) where there are none."""
        rows = self.data.score_rows
        if not len(rows):
            return None, None
        logits = self.logits(rows, stop=stop)
        if not np.isfinite(logits).all():
            raise TrainingDiverged("the network's outputs on the validation patches are not finite")
        probs = probs_of_logits(logits)
        label = self.data.label[rows]
        return auc(label, probs), log_loss(label, probs)

    # -- state -------------------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, dict[str, Tensor]]:
        """Copies of every tensor that a step changes."""
        parts = {"model": self.network.state_dict(), "optim": optimizer_tensors(self.optimizer)}
        if self.average is not None:
            parts["ema"] = self.average.state()
        return {name: {k: t.detach().clone() for k, t in tensors.items()} for name, tensors in parts.items()}

    def restore(self, parts: dict[str, dict[str, Tensor]], *, views: int, ema_updates: int) -> None:
        """Go back to a snapshot."""
        self.network.load_state_dict(parts["model"])
        restore_optimizer(self.optimizer, parts["optim"])
        if self.average is not None:
            self.average.load(parts["ema"], ema_updates)
        self.views = views

    def averaged_state(self) -> dict[str, Tensor]:
        """The weights to keep: averaged where there is an average, with the network's integer buffers."""
        state = dict(self.network.state_dict())
        if self.average is not None:
            state.update(self.average.state())
        return {name: tensor.detach().clone() for name, tensor in state.items()}


def check_finite(loss: Tensor) -> None:
    """Raise TrainingDiverged for a loss that is NaN or infinite."""
    if not bool(torch.isfinite(loss)):
        raise TrainingDiverged(f"the training loss became {float(loss)}")


def is_out_of_memory(fault: BaseException) -> bool:
    """CUDA's out-of-memory error, or the CPU allocator's (a plain RuntimeError)."""
    return (
        isinstance(fault, torch.OutOfMemoryError) or "not enough memory" in str(fault) or "out of memory" in str(fault)
    )


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory so far: of the device for CUDA, of this process for the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def total_views(recipe: Recipe, rungs: Sequence[Rung]) -> int:
    """Views that all rungs take together, decay branches that are dropped included: what a progress bar counts."""
    if recipe.schedule != "wsd":
        return rungs[-1].views
    return rungs[-1].views + sum(rung.views - stable_views(recipe, rung) for rung in rungs[:-1])


def stable_views(recipe: Recipe, rung: Rung) -> int:
    """Where a rung's decay branch leaves the stable phase."""
    return rung.views - round(recipe.decay * rung.views) if recipe.schedule == "wsd" else rung.views


def fit(
    training: Training,
    rungs: Sequence[Rung],
    *,
    checkpoints: Path | None = None,
    keep_final: bool = False,
    note: Callable[[str], None] = lambda text: None,
    stop: Callable[[], None] = lambda: None,
    progress: ProgressCall = lambda n: None,
) -> Iterator[RungResult]:
    """Train rung by rung, yielding each result; stop iterating to prune. Goes on from the newest checkpoint.

    Args:
        training: the recipe at its start.
        rungs: views and subset sizes, both never falling.
        checkpoints: where each rung leaves ``<number>/``; None keeps nothing.
        keep_final: also checkpoint the last rung (finalize); a search needs it only up to the one before.
        note: told of checkpoints that could not be read.
        stop: called at every step; raises :class:`Interrupted` to end early.
        progress: called with the number of views just seen.

    Raises:
        TrainingDiverged: the loss or the outputs are not finite.
    """
    recipe, wsd, end = training.recipe, training.recipe.schedule == "wsd", rungs[-1].views
    horizon = rungs[0].views if wsd else end  # warm-up and the frozen phase are shares of this
    resumed = resume(training, checkpoints, note)
    yield from training.results
    for index in range(resumed, len(rungs)):
        rung, began, start = rungs[index], time.perf_counter(), training.views
        stream = ViewStream(training.key, training.data.train_rows[: rung.subset], start)
        stable = stable_views(recipe, rung)

        def lr_share(view: int) -> float:
            if recipe.schedule == "one_cycle":
                return one_cycle(view / end, warmup=recipe.warmup)
            return warm_up(view, warmup_views=recipe.warmup * horizon)

        def branch_share(view: int, stable: int = stable, rung: Rung = rung) -> float:
            return lr_share(view) * decay_branch((view - stable) / (rung.views - stable))

        frozen_until = recipe.frozen * horizon
        loss, seconds = training.train(stream, start, stable, lr_share, frozen_until, stop, progress)
        n_views, last = stable - start, index == len(rungs) - 1
        kept = training.snapshot() if wsd and (not last or keep_final) else None
        ema_updates = training.average.n_updates if training.average else 0
        lr = recipe.lr * lr_share(max(stable - 1, 0))
        if wsd and stable < rung.views:
            branch_loss, branch_s = training.train(
                stream, stable, rung.views, branch_share, frozen_until, stop, progress
            )
            loss, seconds, n_views = branch_loss, seconds + branch_s, rung.views - start
        score, score_loss = training.score(stop)
        result = RungResult(
            index,
            rung.views,
            rung.subset,
            score,
            score_loss,
            loss,
            time.perf_counter() - began,
            n_views / seconds if seconds > 0 else 0.0,
            lr,
        )
        training.results.append(result)
        if kept is not None and not last:
            training.restore(kept, views=stable, ema_updates=ema_updates)
        if checkpoints is not None and (not last or keep_final):
            save(training, checkpoints, index)
        yield result


def save(training: Training, root: Path, index: int) -> None:
    """Checkpoint ``<root>/<index>``; the two newest stay."""
    parts = training.snapshot()
    if training.average is None:
        parts.pop("ema", None)
    write_checkpoint(
        root / str(index),
        parts=parts,
        state={
            "rung": index,
            "views": training.views,
            "key": training.key,
            "recipe": training.recipe.hash,
            "compute": training.compute.to_json(),
            "micro_batch": training.micro_batch,
            "ema_updates": training.average.n_updates if training.average else 0,
            "param_groups": [
                {k: v for k, v in g.items() if k != "params" and isinstance(v, (int, float, str, bool, list, tuple))}
                for g in training.optimizer.param_groups
            ],
            "results": [asdict(result) for result in training.results],
        },
    )
    keep_newest(root, 2)


def resume(training: Training, root: Path | None, note: Callable[[str], None]) -> int:
    """Take over the newest checkpoint of the same recipe and key; returns the number of rungs that it has behind it."""
    found = newest_checkpoint(root, note=note) if root is not None else None
    if found is None:
        return 0
    folder, parts, state = found
    if (state["recipe"], state["key"]) != (training.recipe.hash, training.key):
        note(f"{folder} belongs to another recipe or seed; training starts afresh")
        return 0
    training.restore(parts, views=state["views"], ema_updates=state["ema_updates"])
    training.micro_batch = state["micro_batch"]
    training.results = [RungResult(**result) for result in state["results"]]
    return int(state["rung"]) + 1
