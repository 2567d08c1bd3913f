"""The loop beside slow references: its steps written out one by one, its scores taken again, its loss in numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from easy_set import TINY, easy_patches
from test_engine import RECIPE, RUNGS, fitted, start

from pcam_automl.augment import centre_view
from pcam_automl.batches import ResidentPatches, ViewStream
from pcam_automl.metrics import auc, log_loss
from pcam_automl.models.factory import build_network, logit_of, normalisation
from pcam_automl.models.layers import classifier_parameters
from pcam_automl.models.weights import Weights
from pcam_automl.training.engine import Rung
from pcam_automl.training.task import TrainingData

CPU = torch.device("cpu")
KEY = 99  # of start()
WARM_UP, DECAY = 0.5, 0.25
Step = tuple[list[int], list[int], float]  # rows, views, learning rate


@pytest.fixture(scope="module")
def data() -> TrainingData:
    images, label = easy_patches(80, seed=5)
    rows = np.random.default_rng(6).permutation(80)
    return TrainingData(
        ResidentPatches(torch.from_numpy(images), CPU), label, rows[:60], rows[60:], normalisation(TINY)
    )


def plain_loop(train_rows: np.ndarray, rungs: tuple[Rung, ...], batch_size: int, peak: float) -> list[Step]:
    """A wsd training, step by step: a linear warm-up over half the first rung, and over the last quarter of each rung a branch of
    1 - sqrt, read in the middle of a step. The rung after it begins where that branch left the stable phase.
    """
    steps, begin = list[Step](), 0
    for rung in rungs:
        stream, leaves = ViewStream(KEY, train_rows[: rung.subset], begin), round((1 - DECAY) * rung.views)
        for first, last in ((begin, leaves), (leaves, rung.views)):
            for number in range(round(last / batch_size) - round(first / batch_size)):
                view = first + number * batch_size
                lr = peak * min(1.0, (view + 1) / (WARM_UP * rungs[0].views))
                if first == leaves:
                    lr *= 1 - math.sqrt((view + batch_size / 2 - leaves) / (rung.views - leaves))
                rows = stream.rows_of(view, view + batch_size)
                steps.append((rows.tolist(), list(range(view, view + batch_size)), lr))
        begin = leaves
    return steps


@pytest.mark.parametrize(
    ("rungs", "marks"),
    [
        (RUNGS, ()),
        ((Rung(60, 40), Rung(120, 60), Rung(180, 60)), ()),  # batches of 16 do not fill them
        ((Rung(256, 60),), (48, 128)),
    ],
    ids=["whole batches", "ragged rungs", "marks"],
)
def test_a_training_takes_the_steps_of_a_plain_loop(
    data: TrainingData, monkeypatch: pytest.MonkeyPatch, rungs: tuple[Rung, ...], marks: tuple[int, ...]
) -> None:
    recipe = RECIPE.model_copy(update={"warmup": WARM_UP, "decay": DECAY})
    training = start(recipe, data)
    taken, announced = list[Step](), list[list[int] | None]()

    def step(rows: np.ndarray, views: np.ndarray, following: np.ndarray | None = None) -> torch.Tensor:
        taken.append((rows.tolist(), views.tolist(), training.optimizer.param_groups[0]["lr"]))
        announced.append(None if following is None else following.tolist())
        return torch.zeros(2)

    monkeypatch.setattr(training, "step", step)
    monkeypatch.setattr(training, "score", lambda stop: (None, None))
    list(fitted(training, rungs, marks=marks))

    expected = plain_loop(data.train_rows, rungs, recipe.batch_size, recipe.lr)
    assert [views for _, views, _ in taken] == [views for _, views, _ in expected]
    assert [rows for rows, _, _ in taken] == [rows for rows, _, _ in expected]
    assert [lr for _, _, lr in taken] == pytest.approx([lr for _, _, lr in expected], rel=1e-12)
    n_parts = 2 * len(rungs) + len(marks)
    assert announced.count(None) == n_parts, "the last step of a part knows none that follows"
    coming = [rows for rows, _, _ in taken[1:]]
    assert all(said is None or said == rows for said, rows in zip(announced, [*coming, list[int]()], strict=True)), (
        "rows that are fetched ahead are those of the next step"
    )


def test_scores_are_of_the_averaged_weights_and_leave_the_live_ones(
    data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = start(RECIPE, data)
    take, by_hand = training.step, {name: tensor.clone() for name, tensor in training.network.state_dict().items()}

    def step(*given: Any) -> torch.Tensor:
        figures, n = take(*given), training.n_steps
        decay = min(RECIPE.ema, (1 + n) / (10 + n))
        for name, tensor in training.network.state_dict().items():
            by_hand[name] = decay * by_hand[name] + (1 - decay) * tensor if tensor.is_floating_point() else tensor
        return figures

    monkeypatch.setattr(training, "step", step)
    (result,) = fitted(training, (Rung(64, 60),))
    live = {name: tensor.clone() for name, tensor in training.network.state_dict().items()}
    averaged = training.averaged_state()
    for name, tensor in averaged.items():
        torch.testing.assert_close(tensor, by_hand[name])
    assert training.scores is not None
    score, scores = training.score()

    def probs_of(state: dict[str, torch.Tensor]) -> np.ndarray:
        network = build_network(RECIPE, Weights("none"), seed=1).eval()
        network.load_state_dict(state)
        norm, images = data.normalisation, data.patches.gather(data.score_rows)
        view = centre_view(images, RECIPE.crop_size, RECIPE.network_px, norm.mean, norm.std, dtype=torch.float32)
        with torch.no_grad():
            return logit_of(network(view)).double().sigmoid().numpy()

    expected, label = probs_of(averaged), data.label[data.score_rows]
    np.testing.assert_allclose(scores.prob, expected, rtol=1e-5)
    assert np.abs(scores.prob - probs_of(live)).max() > 1e-2
    assert score.auc == pytest.approx(auc(label, expected))
    assert score.loss == pytest.approx(log_loss(label, expected), rel=1e-5)
    assert (result.auc, result.loss) == (score.auc, score.loss)
    np.testing.assert_array_equal(training.scores.prob, scores.prob)

    now, kept = training.network.state_dict(), training.averaged_state()
    assert all(torch.equal(now[name], tensor) for name, tensor in live.items())
    assert all(torch.equal(kept[name], tensor) for name, tensor in averaged.items())


@pytest.mark.parametrize(("smoothing", "low", "high"), [(0.0, 0.0, 1.0), (0.2, 0.1, 0.9)])
def test_a_step_returns_the_cross_entropy_against_smoothed_labels(
    data: TrainingData, smoothing: float, low: float, high: float
) -> None:
    training = start(RECIPE.model_copy(update={"label_smoothing": smoothing, "dropout": 0.0}), data)
    rows, views = data.train_rows[:16], np.arange(16)
    training.network.train()
    _, bias = classifier_parameters(training.network)
    with torch.no_grad():
        raw = logit_of(training.network(training.task.batch(rows, views)[0]))
        bias.sub_(raw.median())  # so that both answers are given, though nothing is learnt yet
    logits = (raw - raw.median()).double().numpy()
    loss, share_right = training.step(rows, views).tolist()

    is_one = data.label[rows] == 1
    prob, target = 1 / (1 + np.exp(-logits)), np.where(is_one, high, low)
    assert loss == pytest.approx(-(target * np.log(prob) + (1 - target) * np.log(1 - prob)).mean(), rel=1e-5)
    assert share_right == pytest.approx(((logits > 0) == is_one).mean())
