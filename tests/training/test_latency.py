"""The median of a few forward passes, and a network that is left as it was."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from pcam_automl.training.compute import Compute
from pcam_automl.training.latency import LEAST_TIMED, MOST_TIMED, latency_ms


class Counted(nn.Module):
    """Counts its passes and remembers in which mode and on what they ran."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.seen: list[tuple[bool, tuple[int, ...]]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append((self.training, tuple(x.shape)))
        out: torch.Tensor = self.norm(x).mean((1, 2, 3))
        return out


def test_latency_is_the_median_of_the_passes_behind_the_warm_up() -> None:
    times = [9.0, 9.0, 0.050, 0.050, 0.080]  # two to warm up, then the least number of passes: over the limit
    ticks = iter(itertools.chain.from_iterable((10.0 * n, 10.0 * n + t) for n, t in enumerate(times)))
    network = Counted()
    assert latency_ms(network, 8, Compute("cpu"), clock=lambda: next(ticks)) == pytest.approx(50.0)
    assert network.seen == [(False, (1, 3, 8, 8))] * (2 + LEAST_TIMED)


def test_a_quick_network_is_timed_a_bounded_number_of_times() -> None:
    network = Counted()
    latency_ms(network, 8, Compute("cpu"), clock=lambda: 0.0)
    assert len(network.seen) == 2 + MOST_TIMED


def test_modes_statistics_and_random_numbers_stay_as_they_were() -> None:
    network = Counted().train()
    network.norm.eval()  # as a frozen layer is
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    torch.manual_seed(3)
    latency_ms(network, 8, Compute("cpu", "bf16", channels_last=True))
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))
    assert network.training
    assert not network.norm.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
