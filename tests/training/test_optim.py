"""Schedules against torch's own, the weight average against its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pcam_automl.models.factory import build_network
from pcam_automl.models.weights import Weights
from pcam_automl.recipe import Recipe
from pcam_automl.training.optim import FusedAdamW, FusedSGD, WeightAverage, build_optimizer, set_rates
from pcam_automl.training.schedule import Rates, decay_branch, one_cycle, rates_at, warm_up


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


def test_a_tensor_under_several_names_is_averaged_and_swapped_once() -> None:
    """As timm's coat_* register their position encodings again in every block."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 2)
            self.again = self.first

    network = Twice()
    average = WeightAverage(network, decay=0.5)
    with torch.no_grad():
        network.first.weight.add_(1.0)
    average.update()
    raw, state = network.first.weight.detach().clone(), average.state()
    assert set(state) == set(network.state_dict())
    assert torch.equal(state["first.weight"], state["again.weight"])
    assert state["first.weight"].data_ptr() != state["again.weight"].data_ptr(), "or no checkpoint could hold both"
    averaged = state["first.weight"].clone()
    average.swap()
    assert torch.equal(network.again.weight, averaged)
    average.swap()
    assert torch.equal(network.first.weight, raw)
    other = WeightAverage(Twice(), decay=0.5)
    other.load(state, 1)
    assert torch.equal(other.state()["again.weight"], averaged)


@pytest.mark.parametrize(
    ("name", "spared"),
    [("vit_tiny_patch16_224", ("pos_embed", "cls_token")), ("keras_cnn_1", ("slope",))],
)
def test_what_a_network_spares_from_decay_is_spared(name: str, spared: tuple[str, ...]) -> None:
    recipe = Recipe(backbone=name, crop_size=64, cnn_activation="prelu" if name.startswith("keras") else None)
    network = build_network(recipe, Weights("none"), seed=0)
    groups = build_optimizer(network, recipe).param_groups
    decays = {id(p): group["decays"] for group in groups for p in group["params"]}
    found = [decays[id(p)] for key, p in network.named_parameters() if key.rpartition(".")[2] in spared]
    assert len(found) >= len(spared)
    assert not any(found)
    assert any(decays.values())


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
    set_rates(optimizer, Rates(0, 0.5, 0.5, 0.2, 1.0))
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.2, 0.0}


def stepped(network: nn.Module, optimizer: torch.optim.Optimizer, rates: tuple[tuple[float, float], ...]) -> None:
    """A step on seeded images for each (learning rate, weight decay), set by hand."""
    generator = torch.Generator().manual_seed(3)
    for lr, weight_decay in rates:
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = lr, weight_decay if group["weight_decay"] > 0 else 0.0
        images = torch.randn(8, 3, 9, 9, generator=generator)
        optimizer.zero_grad()
        nn.functional.softplus(network(images)).mean().backward()
        optimizer.step()


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(196, 1))


def by_loop(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Torch's optimizer that goes through the tensors one by one, with what is not decayed picked by hand."""
    matrices, rest = ([p for p in network.parameters() if (p.ndim > 1) == many] for many in (True, False))
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    plain = {"lr": recipe.lr, "foreach": False}
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=recipe.beta1, nesterov=True, fused=False, **plain)
    if recipe.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, alpha=recipe.beta2, momentum=recipe.beta1, eps=recipe.eps, **plain)
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[recipe.optimizer]
    return kind(groups, betas=(recipe.beta1, recipe.beta2), eps=recipe.eps, fused=False, **plain)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["plain", "channels_last"])
@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "rmsprop"])
def test_fused_and_foreach_steps_are_those_of_torchs_loop_over_single_tensors(
    name: str, layout: torch.memory_format
) -> None:
    """Within 1e-6 (2e-8 measured) of steps that move weights by 0.04 to 0.2; with one other setting they are 1e-4 and more apart."""
    recipe = Recipe(optimizer=name, lr=0.01, weight_decay=0.3, beta1=0.8, beta2=0.9, eps=1e-6)
    rates = ((0.01, 0.3), (0.02, 0.3), (0.01, 0.1), (0.005, 0.1), (0.001, 0.3))

    def apart(other: Recipe) -> float:
        ours, slow = tiny().to(memory_format=layout), tiny()  # type: ignore[call-overload]
        stepped(ours, build_optimizer(ours, recipe), rates)
        stepped(slow, by_loop(slow, other), rates)
        pairs = zip(ours.state_dict().values(), slow.state_dict().values(), strict=True)
        return max(float((a - b).abs().max()) for a, b in pairs)

    assert apart(recipe) < 1e-6
    others = {"beta1": 0.81, "weight_decay": 0.0} | ({} if name == "sgd" else {"beta2": 0.95, "eps": 1e-3})
    for field, value in others.items():
        assert apart(recipe.model_copy(update={field: value})) > 1e-4, field


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fused_sgd_begins_its_momentum_with_zeros_also_where_parameters_thaw(momentum: float) -> None:
    ours, slow = (tiny() for _ in range(2))
    plain = {"lr": 0.1, "momentum": momentum, "nesterov": momentum > 0, "weight_decay": 0.1}
    optimizers = FusedSGD(ours.parameters(), fused=True, **plain), torch.optim.SGD(slow.parameters(), **plain)
    for step in range(4):
        images = torch.randn(6, 3, 9, 9, generator=torch.Generator().manual_seed(step))
        for network, optimizer in zip((ours, slow), optimizers, strict=True):
            network[0].requires_grad_(step >= 2)
            optimizer.zero_grad()
            network(images).square().mean().backward()
            optimizer.step()
    for a, b in zip(ours.state_dict().values(), slow.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_gradient_in_another_layout_than_its_parameter_is_not_mixed_up() -> None:
    """torch's own fused kernel for the CPU does (2.15), without a word."""
    kernel, gradient = torch.randn(4, 3, 3, 3), torch.randn(4, 3, 3, 3)
    ours, slow = (nn.Parameter(kernel.clone().contiguous(memory_format=torch.channels_last)) for _ in range(2))
    optimizers = FusedAdamW([ours], lr=0.1, fused=True), torch.optim.AdamW([slow], lr=0.1, fused=False)
    for parameter, optimizer in zip((ours, slow), optimizers, strict=True):
        for _ in range(3):
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, slow)


def test_each_stage_has_a_whole_cycle_and_the_last_holds_beyond_the_end() -> None:
    stages = ({"share": 0.25, "lr": 1.0}, {"share": 0.75, "lr": 0.5, "lr_low": 0.05})
    recipe = Recipe.model_validate({"schedule": "one_cycle", "warmup": 0.5, "stages": stages})
    rates = [rates_at(recipe, view, end=1000, horizon=1000) for view in range(1000)]
    assert [r.phase for r in rates] == [0] * 250 + [1] * 750
    assert max(r.lr for r in rates[:250]) == pytest.approx(1.0)
    assert max(r.lr for r in rates[250:]) == pytest.approx(0.5)
    assert all(r.lr_low == pytest.approx(r.lr / 10) for r in rates[250:])
    assert rates_at(recipe, 1005, end=1000, horizon=1000).phase == 1


def test_the_frozen_phase_is_a_share_of_the_horizon() -> None:
    recipe = Recipe(frozen=0.5, schedule="wsd", trainable=0.3)
    assert [rates_at(recipe, v, end=900, horizon=100).trainable for v in (0, 49, 50, 800)] == [0.0, 0.0, 0.3, 0.3]


def test_weight_average_is_torchs_where_the_warm_start_is_over() -> None:
    """With decay 0.1 the warm start's (1 + t) / (10 + t) is above it from the first step."""
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    ours = WeightAverage(network, 0.1)
    theirs = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.1), use_buffers=True)
    theirs.update_parameters(network)  # torch's first update is a copy
    for seed in range(5):
        with torch.no_grad():
            for tensor in network.state_dict(keep_vars=True).values():
                if tensor.is_floating_point():
                    tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)))
        ours.update()
        theirs.update_parameters(network)
    expected = theirs.module.state_dict()
    for name, tensor in ours.state().items():
        torch.testing.assert_close(tensor, expected[name])
