"""The order of a training: rung by rung, with decay branches, early ends and checkpoints. Takes its steps through engine.py.

With the ``wsd`` schedule (warm-up, stable, decay) a rung at ``views`` trains at the stable rate up to ``(1 - decay) * views``
and is scored at the end of a decay branch that reaches ``views``; the branch is then dropped and the next rung goes on from
the stable state. Where nothing is scored only the last rung has one. So every rung's score is that of a finished training of its length. With ``one_cycle`` and ``constant``
there is one curve over the last rung's views, and the rungs are the points at which it is scored.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from pcam_automl.batches import ViewStream
from pcam_automl.errors import DataError
from pcam_automl.metrics import worst_domain_auc
from pcam_automl.recipe import Recipe
from pcam_automl.training.checkpoint import (
    CheckpointWriter,
    keep_newest,
    newest_checkpoint,
    numbered_checkpoints,
    optimizer_fits,
    write_checkpoint,
)
from pcam_automl.training.compute import device_name, is_of
from pcam_automl.training.engine import ProgressCall, Rung, RungResult, Segment, Training
from pcam_automl.training.ranks import from_first, ranks
from pcam_automl.training.schedule import Rates, decay_branch, rates_at

Stop = Callable[[], None]


def total_views(recipe: Recipe, rungs: Sequence[Rung]) -> int:
    """Views that all scored rungs take together, decay branches that are dropped included: what a progress bar counts."""
    if recipe.schedule != "wsd":
        return rungs[-1].views
    return rungs[-1].views + sum(rung.views - stable_views(recipe, rung) for rung in rungs[:-1])


def branch_share(recipe: Recipe) -> float:
    """Share of a rung's views in its decay branch; 0 where there is one curve over all rungs."""
    return recipe.decay if recipe.schedule == "wsd" else 0.0


def stable_views(recipe: Recipe, rung: Rung) -> int:
    """Where a rung's decay branch leaves the stable phase."""
    return rung.views - round(branch_share(recipe) * rung.views)


def fit(
    training: Training,
    train_rows: np.ndarray,
    rungs: Sequence[Rung],
    *,
    scored: bool = True,
    checkpoints: Path | None = None,
    keep_final: bool = False,
    marks: Sequence[int] = (),
    writer: CheckpointWriter | None = None,
    written: Callable[[Path], None] | None = None,
    note: Callable[[str], None] = lambda text: None,
    stop: Stop = lambda: None,
    progress: ProgressCall = lambda n: None,
) -> Iterator[RungResult]:
    """Train rung by rung, yielding each result; stop iterating to prune. Goes on from the newest checkpoint.

    Args:
        training: the recipe at its start.
        train_rows: (n,) store rows in nested order; a rung uses a prefix.
        rungs: views and subset sizes, both never falling.
        scored: whether rungs are scored, which takes rows to score on.
        checkpoints: where each rung leaves ``<number>/``; None keeps nothing.
        keep_final: also checkpoint the last rung (finalize); a search needs it only up to the one before.
        marks: views at which the stable phase of a single rung leaves checkpoints, too, ascending.
        writer: writes the checkpoints, which the caller flushes; None writes each before its result is yielded.
        written: told of each checkpoint once it is whole, in the writer's thread if there is one.
        note: told of checkpoints that could not be read.
        stop: called at every step; raises :class:`Interrupted` to end early.
        progress: called with the number of views just seen.

    Raises:
        TrainingDiverged: the loss or the outputs are not finite.
    """
    resumed = resume(training, checkpoints, note)
    yield from training.results
    if (inside := training.views - max((result.views for result in training.results), default=0)) > 0:
        progress(inside)  # of a rung that a mark's checkpoint is in the middle of
    assert not marks or len(rungs) == 1, "marks would take the numbers of rungs"

    def marked(at: int) -> None:
        if checkpoints is not None:
            save(training, checkpoints, -1, writer, written, number=marks.index(at))

    for index in range(resumed, len(rungs)):
        if _is_over(training):
            break
        last = index == len(rungs) - 1
        result, keeps = _rung(training, train_rows, rungs, index, scored, keep_final, (marks, marked), stop, progress)
        training.results.append(result)
        if training.recipe.patience is not None and _is_best(training):
            training.best = (index, training.averaged_state())
        keeps()
        if checkpoints is not None and (not last or keep_final):
            save(training, checkpoints, index, writer, written)
        yield result
    if training.best is not None:
        training.keep(training.best[1])
        if scored and (training.scores is None or training.best[0] != len(training.results) - 1):
            _, training.scores = training.score(stop)  # those of the last rung are not of the kept weights


def _rung(
    training: Training,
    train_rows: np.ndarray,
    rungs: Sequence[Rung],
    index: int,
    scored: bool,
    keep_final: bool,
    marks: tuple[Sequence[int], Callable[[int], None]],
    stop: Stop,
    progress: ProgressCall,
) -> tuple[RungResult, Callable[[], None]]:
    """One rung: stable part, told of at its ``marks``, decay branch, score; and what drops the branch again, to be called after it is
    recorded.
    """
    recipe, rung, began, start = training.recipe, rungs[index], time.perf_counter(), training.views
    wsd, end, last = recipe.schedule == "wsd", rungs[-1].views, index == len(rungs) - 1
    horizon = rungs[0].views if wsd else end  # warm-up and the frozen phase are shares of this
    # A single rung with marks may begin in its middle, with the same stream all the same.
    stream = ViewStream(training.key, train_rows[: rung.subset], 0 if marks[0] else start)
    stable = stable_views(recipe, rung)

    def rates_of(view: int) -> Rates:
        return rates_at(recipe, view, end=end, horizon=horizon)

    def branch_rates(view: int) -> Rates:
        # Of the step: a branch of one or two steps would begin at the full rate, and hardly leave it.
        middle = view + recipe.batch_size / 2 - stable
        return rates_of(view).times(decay_branch(middle / (rung.views - stable)))

    done = Segment(0.0, 0.0, 0.0, 0)
    for at in [*(mark for mark in marks[0] if start < mark < stable), stable]:
        done = done.then(training.train(stream, training.views, at, rates_of, stop, progress))
        if at < stable:
            marks[1](at)
    branches = wsd and (scored or last)  # of a rung that nobody scores it would only be dropped
    kept = training.snapshot() if branches and (not last or keep_final) else None
    ema_updates = training.average.n_updates if training.average else 0
    if branches and stable < rung.views:
        done = done.then(training.train(stream, stable, rung.views, branch_rates, stop, progress))
    result = _result(training, rung, index, done, rates_of(max(stable - 1, 0)), scored, began, stop)

    def drop_branch() -> None:
        if kept is not None and not last:
            training.restore(kept, views=stable, ema_updates=ema_updates)

    return result, drop_branch


def _result(
    training: Training, rung: Rung, index: int, done: Segment, rates: Rates, scored: bool, began: float, stop: Stop
) -> RungResult:
    score, training.scores = training.score(stop) if scored else (None, None)
    return RungResult(
        index,
        rung.views,
        rung.subset,
        score.auc if score else None,
        score.loss if score else None,
        done.loss,
        time.perf_counter() - began,
        done.n_views / done.seconds if done.seconds > 0 else 0.0,
        rates.lr,
        done.accuracy,
        score.accuracy if score else None,
        score.dice if score else None,
        rates.phase,
        _worst_domain_auc(training),
    )


def _worst_domain_auc(training: Training) -> float | None:
    """Of the scores just taken, by the domains of their rows."""
    scores, domain = training.scores, training.task.data.domain
    return (
        None if scores is None or domain is None else worst_domain_auc(scores.label, scores.prob, domain[scores.rows])
    )


def _watched(result: RungResult, monitor: str) -> float:
    """The monitored figure as one that should grow; a training without validation has none and never ends early."""
    value = result.auc if monitor == "auc" else None if result.loss is None else -result.loss
    return float("-inf") if value is None else value


def best_result(results: Sequence[RungResult], recipe: Recipe) -> RungResult:
    """The result whose weights are kept: the last one, or with ``patience`` the best by the recipe's monitor."""
    if recipe.patience is None or results[-1].auc is None:
        return results[-1]
    return max(results, key=lambda result: (_watched(result, recipe.monitor), -result.rung))


def _is_best(training: Training) -> bool:
    return best_result(training.results, training.recipe) is training.results[-1]


def _is_over(training: Training) -> bool:
    """Whether ``patience`` rungs have passed without a better one."""
    patience, results = training.recipe.patience, training.results
    if patience is None or not results or results[-1].auc is None:
        return False
    return len(results) - 1 - best_result(results, training.recipe).rung >= patience


def save(
    training: Training,
    root: Path,
    index: int,
    writer: CheckpointWriter | None = None,
    written: Callable[[Path], None] | None = None,
    *,
    by_clock: bool = False,
    number: int | None = None,
) -> None:
    """Checkpoint ``<root>/<index>``, now or by the writer; the two newest stay. Of several ranks the first writes.

    ``by_clock``: the numbers are parts of a training that ends by the clock (pace.py) and not rungs. ``number``: the folder's name, where
    it is not the rung's, for a checkpoint in the middle of the one after ``index``.
    """
    if not ranks().is_first:
        return
    parts = training.snapshot()
    if training.best is not None:
        parts["best"] = training.best[1]
    state = {
        "rung": index,
        "views": training.views,
        "by_clock": by_clock,
        "phase": training.phase,
        "best": None if training.best is None else training.best[0],
        "key": training.key,
        "data": training.data_key,
        "weights": training.weights,
        "recipe": training.recipe.hash,
        "compute": training.compute.to_json(),
        "device_name": device_name(torch.device(training.compute.device)),
        "micro_batch": training.micro_batch,
        "micro_batches": list(training.micro_batches),
        "n_steps": training.n_steps,
        "ema_updates": training.average.n_updates if training.average else 0,
        "param_groups": [
            {k: v for k, v in g.items() if k != "params" and isinstance(v, (int, float, str, bool, list, tuple))}
            for g in training.optimizer.param_groups
        ],
        "results": [asdict(result) for result in training.results],
    }

    foreign, training.foreign = training.foreign, []
    target = root / str(index if number is None else number)

    def write() -> None:
        write_checkpoint(target, parts=parts, state=state)
        for folder in foreign:  # of another training, and perhaps of higher numbers: they would outlast ours
            if folder.name != target.name:
                shutil.rmtree(folder, ignore_errors=True)
        keep_newest(root, 2)
        if written is not None:
            written(target)

    if writer is None:
        write()
    else:
        writer.submit(write)


def resume(training: Training, root: Path | None, note: Callable[[str], None], *, by_clock: bool = False) -> int:
    """Take over the newest checkpoint of the same recipe, key, data and kind (see :func:`save`); returns how many rungs it has behind it.

    Raises:
        DataError: several ranks see different checkpoints.
    """
    _take_over(training, root, note, by_clock)
    agreed = from_first(lambda: (training.n_resumed, training.views))
    if agreed != (training.n_resumed, training.views):
        raise DataError(
            f"the processes of this training see different checkpoints in {root} (after {agreed[0]} and {training.n_resumed} parts); "
            "put --out on a disk that all of them share"
        )
    return training.n_resumed


def _take_over(training: Training, root: Path | None, note: Callable[[str], None], by_clock: bool) -> None:
    found = newest_checkpoint(root, note=note) if root is not None else None
    if found is None:
        training.foreign = [] if root is None else numbered_checkpoints(root)  # none of them can be read
        return
    folder, parts, state = found
    theirs = (state["recipe"], state["key"], state.get("data"), state.get("weights", training.weights))
    if theirs != (training.recipe.hash, training.key, training.data_key, training.weights):
        # with other rows, weights that saw the validation patches would be gone on from
        training.foreign = numbered_checkpoints(folder.parent)
        note(
            f"{folder} belongs to another recipe, seed, fold, data or weights; training starts afresh, and that one goes with the first "
            "new checkpoint"
        )
        return
    if state.get("by_clock", by_clock) != by_clock:  # its place in the schedule means nothing in the other one
        training.foreign = numbered_checkpoints(folder.parent)
        kinds = ("epochs", "the clock") if by_clock else ("the clock", "epochs")
        note(f"{folder} belongs to a training that ended by {kinds[0]}, this one ends by {kinds[1]}; it starts afresh")
        return
    if not optimizer_fits(training.optimizer, parts["optim"]):
        training.foreign = numbered_checkpoints(folder.parent)
        note(f"{folder} was written by a release that groups parameters otherwise; training starts afresh")
        return
    training.restore(parts, views=state["views"], ema_updates=state["ema_updates"])
    here, training.phase = training.micro_batch, state["phase"]
    training.micro_batch = state["micro_batch"]
    training.n_steps = state.get("n_steps", 0)  # checkpoints of earlier releases have neither
    training.micro_batches = [(step, n) for step, n in state.get("micro_batches", [(0, training.micro_batch)])]
    device = torch.device(training.compute.device)
    if training.micro_batch != here and not is_of(state.get("device_name"), device):
        training.micro_batch = here
        training.micro_batches.append((training.n_steps, here))
    training.best = None if state["best"] is None else (state["best"], parts["best"])
    training.results = [RungResult(**result) for result in state["results"]]
    training.n_resumed = int(state["rung"]) + 1
