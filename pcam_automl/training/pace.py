"""A training that ends by the clock: as many views as fit into its seconds, under the recipe's whole schedule.

The schedule is cut into equal parts. Before each part the speed so far says how many views fit into what is left, and the
part's rates are those of its place in the schedule. So a machine that slows down shortens the training and not its decay.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from pcam_automl.batches import ViewStream
from pcam_automl.training.checkpoint import CheckpointWriter
from pcam_automl.training.engine import ProgressCall, RungResult, Training
from pcam_automl.training.fit import resume, save
from pcam_automl.training.ranks import from_first
from pcam_automl.training.schedule import Rates, rates_at

N_PARTS = 20
LEAST_STEPS = 2
"""Of a part, however little time is left: so that the schedule always ends."""


@dataclass(frozen=True)
class Pace:
    """When a training ends.

    Attributes:
        ends_at: by ``time.monotonic``.
        images_per_s: expected training speed; the first part's views follow from it.
        n_parts: how often the speed is looked at.
        most_views: training images at most, however much time is left.
        saved_every_s: after a part a checkpoint is left if the last one is so old; each costs a fifth of a second of training.
    """

    ends_at: float
    images_per_s: float
    n_parts: int = N_PARTS
    saved_every_s: float = 20.0
    most_views: float = math.inf

    def left_s(self) -> float:
        return self.ends_at - time.monotonic()

    def n_expected(self) -> float:
        """Training images that the time left is enough for."""
        return min(self.most_views, self.images_per_s * max(0.0, self.left_s()))


def fit_paced(
    training: Training,
    train_rows: np.ndarray,
    pace: Pace,
    *,
    checkpoints: Path | None = None,
    note: Callable[[str], None] = lambda text: None,
    stop: Callable[[], None] = lambda: None,
    progress: ProgressCall = lambda n: None,
) -> Iterator[RungResult]:
    """Train part by part, yielding each; nothing is scored. Goes on from the newest checkpoint with what is left of the time.

    Args:
        training: the recipe at its start, its schedule not ``wsd`` (whose decay is a branch of a rung).
        train_rows: (n,) store rows; all are used.
        pace: when to end.
        checkpoints: where a part leaves ``<number>/``, every ``saved_every_s``; None keeps nothing.
        note: told of checkpoints that could not be read.
        stop: called at every step; raises to end early.
        progress: called with the number of views just seen.

    Raises:
        TrainingDiverged: the loss is not finite.
    """
    recipe = training.recipe
    assert recipe.schedule != "wsd"
    planned = recipe.n_views(len(train_rows))
    resumed = resume(training, checkpoints, note, by_clock=True)
    yield from training.results
    rate, writer = pace.images_per_s, CheckpointWriter()
    stream, saved_at = ViewStream(training.key, train_rows, 0), from_first(time.monotonic)
    for part in range(resumed, pace.n_parts):
        began, first = time.perf_counter(), training.views
        n_left = pace.n_parts - part
        most = (pace.most_views - training.views) / n_left
        n_views = from_first(partial(part_views, rate, pace.left_s(), n_left, recipe.batch_size, most))

        def rates_of(view: int, part: int = part, first: int = first, n_views: int = n_views) -> Rates:
            place = (part + (view - first) / n_views) / pace.n_parts
            return rates_at(recipe, int(place * planned), end=planned, horizon=planned)

        steps: list[tuple[float, int]] = []  # the first one: its end and its views

        def seen(n: int, steps: list[tuple[float, int]] = steps) -> None:
            if not steps:
                steps.append((time.perf_counter(), n))
            progress(n)

        done = training.train(stream, first, first + n_views, rates_of, stop, seen)
        seconds = time.perf_counter() - began
        rate = n_views / seconds
        if part == resumed and training.compute.compiled and n_views > steps[0][1]:  # the first step compiled
            rate = (n_views - steps[0][1]) / (began + seconds - steps[0][0])
        lr = rates_of(first + n_views - 1).lr
        result = RungResult(
            part, training.views, len(train_rows), None, None, done.loss, seconds, rate, lr, done.accuracy
        )
        training.results.append(result)
        now = from_first(time.monotonic)
        if checkpoints is not None and now - saved_at >= pace.saved_every_s:
            save(training, checkpoints, part, writer, by_clock=True)
            saved_at = now
        yield result
    writer.flush()


def part_views(images_per_s: float, left_s: float, n_left: int, batch_size: int, most: float = math.inf) -> int:
    """Views of the next part: an equal share of what the time that is left allows, at most ``most``, in whole batches."""
    share = max(0.0, min(most, images_per_s * left_s / n_left))
    return max(LEAST_STEPS, round(share / batch_size)) * batch_size
