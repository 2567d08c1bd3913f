from __future__ import annotations

import itertools
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pcam_automl.recipe import Recipe
from pcam_automl.training import pace as pace_module
from pcam_automl.training.engine import Segment
from pcam_automl.training.pace import Pace, fit_paced, part_views


class Clock:
    """A clock that only the training moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Fake:
    """A training whose step takes what ``seconds_per_view`` says, and which notes the rates it was given."""

    def __init__(self, clock: Clock, seconds_per_view: Any, compiled: bool = False) -> None:
        self.compute = SimpleNamespace(compiled=compiled)
        self.recipe = Recipe(epochs=10, batch_size=10)
        self.key, self.data_key, self.views, self.n_resumed = 1, "", 0, 0
        self.results: list[Any] = []
        self.clock, self.seconds_per_view = clock, seconds_per_view
        self.rates: list[float] = []

    def train(self, stream: Any, first: int, last: int, rates_of: Any, stop: Any, progress: Any) -> Segment:
        for view in range(first, last, 10):
            self.rates.append(rates_of(view).lr)
            self.clock.now += 10 * self.seconds_per_view(self.clock.now)
            progress(10)
        self.views = last
        return Segment(0.5, 0.5, 1.0, last - first)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(pace_module, "time", SimpleNamespace(monotonic=clock, perf_counter=clock))
    return clock


@pytest.mark.parametrize(
    "seconds_per_view",
    [
        lambda now: 0.01,
        lambda now: 0.002,  # five times as fast as was thought
        lambda now: 0.05,  # five times slower
        lambda now: 0.01 if now < 50 else 0.03,  # slows down half way
    ],
)
def test_a_paced_training_ends_on_time_whatever_the_speed(clock: Clock, seconds_per_view: Any) -> None:
    fake = Fake(clock, seconds_per_view)
    results = list(fit_paced(fake, np.arange(200), Pace(100.0, images_per_s=100.0)))  # type: ignore[arg-type]
    assert clock.now == pytest.approx(100.0, rel=0.10 if seconds_per_view(0) == 0.05 else 0.03)
    assert len(results) == 20
    assert [result.views for result in results][-1] == fake.views


def test_what_compiling_took_is_no_speed_of_the_steps_after_it(clock: Clock) -> None:
    fake = Fake(clock, lambda now: 3.0 if now == 0 else 0.01, compiled=True)  # half a minute for the first step
    results = list(fit_paced(fake, np.arange(200), Pace(100.0, images_per_s=100.0)))  # type: ignore[arg-type]
    assert clock.now == pytest.approx(100.0, rel=0.03)
    views = [after.views - before.views for before, after in itertools.pairwise(results)]
    assert max(views) - min(views) <= 20, "all later parts are of one length"


def test_a_paced_training_sees_no_more_than_its_most_views_also_after_a_pause(clock: Clock) -> None:
    fake = Fake(clock, lambda now: 0.01)
    assert Pace(100.0, 100.0, most_views=500).n_expected() == 500
    list(fit_paced(fake, np.arange(200), Pace(1e6, images_per_s=100.0, most_views=4000)))  # type: ignore[arg-type]
    assert fake.views == pytest.approx(4000, abs=100)
    assert part_views(100.0, 1e6, 2, 10, most=50.0) == 50
    assert part_views(100.0, 1e6, 2, 10, most=-5.0) == 20, "the schedule ends in a few steps"


def test_a_paced_training_runs_through_the_whole_schedule(clock: Clock) -> None:
    fake = Fake(clock, lambda now: 0.01 if now < 50 else 0.03)
    list(fit_paced(fake, np.arange(200), Pace(100.0, images_per_s=100.0)))  # type: ignore[arg-type]
    peak = fake.recipe.lr
    assert max(fake.rates) == pytest.approx(peak, rel=0.01)
    assert fake.rates[0] < peak / 20
    assert fake.rates[-1] < peak / 100
    top = fake.rates.index(max(fake.rates))
    assert fake.rates[:top] == sorted(fake.rates[:top])  # up, then down, without a jump back
    assert fake.rates[top:] == sorted(fake.rates[top:], reverse=True)


def test_without_time_the_schedule_still_ends_in_a_few_steps(clock: Clock) -> None:
    fake = Fake(clock, lambda now: 0.01)
    list(fit_paced(fake, np.arange(200), Pace(0.0, images_per_s=100.0, n_parts=5)))  # type: ignore[arg-type]
    assert fake.views == 5 * 2 * 10


@pytest.mark.parametrize(("saved_every_s", "expected"), [(19.0, [3, 7, 11, 15, 19]), (0.0, list(range(20)))])
def test_checkpoints_are_left_after_so_many_seconds(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved_every_s: float, expected: list[int]
) -> None:
    saved: list[int] = []
    monkeypatch.setattr(pace_module, "save", lambda training, root, part, writer, *, by_clock: saved.append(part))
    fake, pace = Fake(clock, lambda now: 0.01), Pace(100.0, 100.0, saved_every_s=saved_every_s)
    list(fit_paced(fake, np.arange(200), pace, checkpoints=tmp_path))  # type: ignore[arg-type]
    assert saved == expected


@given(st.floats(0, 1e5), st.floats(-10, 1e5), st.integers(1, 50), st.integers(1, 512))
def test_a_part_is_whole_batches_and_at_least_two(rate: float, left_s: float, n_left: int, batch: int) -> None:
    views = part_views(rate, left_s, n_left, batch)
    assert views % batch == 0
    assert views >= 2 * batch
    assert views <= max(2 * batch, rate * max(left_s, 0) / n_left + batch)


def test_time_left_counts_down() -> None:
    assert Pace(time.monotonic() + 10.0, 1.0).left_s() == pytest.approx(10.0, abs=0.5)
