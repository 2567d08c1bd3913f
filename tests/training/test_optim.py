"""Schedules against torch's own, the weight average against its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pcam_automl.recipe import Recipe
from pcam_automl.training.optim import WeightAverage, build_optimizer, decay_branch, one_cycle, set_lr, warm_up


def test_one_cycle_is_torchs_at_every_step() -> None:
    n, warmup = 50, 0.3
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    torchs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=1.0,
        total_steps=n + 1,
        pct_start=(warmup * n + 1) / (n + 1),
        div_factor=25,
        final_div_factor=400,
    )
    for step in range(n + 1):
        assert one_cycle(step / n, warmup=warmup) == pytest.approx(torchs.get_last_lr()[0], abs=1e-6)
        if step < n:
            optimizer.step()
            torchs.step()


@given(st.floats(0, 1), st.floats(0, 1))
def test_shares_of_the_peak_stay_in_range(progress: float, warmup: float) -> None:
    assert 0 <= one_cycle(progress, warmup=warmup) <= 1 + 1e-9
    assert 0 <= decay_branch(progress) <= 1
    assert 0 < warm_up(int(progress * 100), warmup_views=warmup * 100) <= 1


def test_decay_branch_ends_at_zero_and_falls() -> None:
    shares = [decay_branch(p / 10) for p in range(11)]
    assert shares[0] == 1
    assert shares[-1] == 0
    assert shares == sorted(shares, reverse=True)


def test_weight_average_follows_its_definition() -> None:
    network = nn.Linear(2, 1)
    average = WeightAverage(network, 0.9)
    expected = network.weight.detach().clone()
    for step in range(1, 30):
        with torch.no_grad():
            network.weight += 1.0
        average.update()
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * network.weight.detach()
    torch.testing.assert_close(average.state()["weight"], expected)


def test_swapping_twice_changes_nothing() -> None:
    network = nn.BatchNorm2d(3)
    average = WeightAverage(network, 0.5)
    with torch.no_grad():
        network.weight += 2
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    average.swap()
    assert not torch.equal(network.weight, before["weight"])
    average.swap()
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "rmsprop"])
def test_biases_and_norms_are_not_decayed(name: str) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = build_optimizer(network, Recipe(optimizer=name, weight_decay=0.1))
    by_decay = {group["weight_decay"]: len(group["params"]) for group in optimizer.param_groups}
    assert by_decay == {0.1: 1, 0.0: 3}
    set_lr(optimizer, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}
