"""Optimizers, parameter groups and the weight average. Runs no step and knows no schedule (see schedule.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pcam_automl.models.cnn import ElementPReLU
from pcam_automl.models.layers import depth_groups
from pcam_automl.recipe import Recipe
from pcam_automl.training.schedule import Rates


class FusedAdam(torch.optim.Adam):
    """``torch.optim.Adam``, fused, whose kernel sees tensors in the order in which their numbers lie in memory.

    torch's fused kernel for the CPU copies gradients with channels last to the default layout at every step (a third of its
    time for resnet18), and mistakes one order for the other where a gradient has not its parameter's layout (torch
    2.15). An update knows no neighbours: it may see a kernel as (D, k, k, C) as well as (D, C, k, k).
    """

    def _init_group(self, group: Any, params: list[Tensor], grads: list[Tensor], *others: Any) -> bool:
        has_complex = super()._init_group(group, params, grads, *others)  # type: ignore[no-untyped-call]
        for number, param in enumerate(params):
            if param.device.type != "cpu" or param.ndim != 4 or param.is_contiguous():
                continue
            if not param.is_contiguous(memory_format=torch.channels_last):
                continue
            grads[number] = grads[number].contiguous(memory_format=torch.channels_last)
            for tensors in (params, grads, *others):
                if tensors and tensors[number].shape == param.shape:
                    tensors[number] = tensors[number].permute(0, 2, 3, 1)
                    # Moments begin, and are restored, in their parameter's layout; the kernel would mix up another one.
                    assert tensors[number].is_contiguous(), f"parameter {number}: a moment in another layout"
        return bool(has_complex)


class FusedAdamW(FusedAdam, torch.optim.AdamW):
    """``torch.optim.AdamW``, likewise."""


class FusedSGD(torch.optim.SGD):
    """``torch.optim.SGD``, fused, whose momentum begins as zeros, which is the same where nothing is dampened.

    torch's own begins with the first gradient, which its fused kernel does not know for parameters that thaw after others.
    """

    def _init_group(self, group: Any, params: list[Tensor], grads: list[Tensor], buffers: list[Tensor | None]) -> bool:
        for param in group["params"]:
            if param.grad is not None and group["momentum"] != 0 and self.state[param].get("momentum_buffer") is None:
                self.state[param]["momentum_buffer"] = torch.zeros_like(param)
        return bool(super()._init_group(group, params, grads, buffers))  # type: ignore[no-untyped-call]


def build_optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer; matrices and kernels have weight decay, biases and norms have none, nor has what a network spares itself.

    Each group carries ``depth`` in [0, 1] (first layers to head) and ``decays``, which :func:`set_rates` reads. Groups
    by depth exist only where the recipe has discriminative rates, so that other trainings keep two large groups.
    """
    layered = any(phase.lr_low is not None for phase in recipe.phases)
    parts = depth_groups(network) if layered else [list(network.parameters())]
    groups, spared = [], _without_decay(network)
    for number, part in enumerate(parts):
        depth = number / (len(parts) - 1) if len(parts) > 1 else 1.0
        for decays in (True, False):
            if members := [p for p in part if (p.ndim > 1 and id(p) not in spared) == decays]:
                decay = recipe.weight_decay if decays else 0.0
                groups.append({"params": members, "weight_decay": decay, "depth": depth, "decays": decays})
    betas = (recipe.beta1, recipe.beta2)
    if recipe.optimizer == "adamw":
        return FusedAdamW(groups, lr=recipe.lr, betas=betas, eps=recipe.eps, fused=True)
    if recipe.optimizer == "adam":
        return FusedAdam(groups, lr=recipe.lr, betas=betas, eps=recipe.eps, fused=True)
    if recipe.optimizer == "sgd":
        # On a GPU fused: with float16 the others ask the device in every step whether the scale was too large.
        on_gpu = any(param.is_cuda for param in network.parameters())
        kind, how = (FusedSGD, {"fused": True}) if on_gpu else (torch.optim.SGD, {"foreach": True})
        return kind(groups, lr=recipe.lr, momentum=recipe.beta1, nesterov=recipe.beta1 > 0, **how)
    return torch.optim.RMSprop(
        groups, lr=recipe.lr, alpha=recipe.beta2, momentum=recipe.beta1, eps=recipe.eps, foreach=True
    )


def _without_decay(network: nn.Module) -> set[int]:
    """Ids of parameters of several dimensions that are no weights: position embeddings and tokens, by timm's word, and PReLU's slopes."""
    found = {id(module.slope) for module in network.modules() if isinstance(module, ElementPReLU)}
    for part in (network, getattr(network, "backbone", None)):
        if isinstance(part, nn.Module) and callable(named := getattr(part, "no_weight_decay", None)):
            parameters = dict(part.named_parameters())
            found |= {id(parameters[name]) for name in named() if name in parameters}
    return found


def set_rates(optimizer: torch.optim.Optimizer, rates: Rates) -> None:
    """Learning rates by depth, geometric between the first layers and the head, and the weight decay."""
    for group in optimizer.param_groups:
        group["lr"] = rates.lr * (rates.lr_low / rates.lr) ** (1.0 - group["depth"]) if rates.lr > 0 else 0.0
        group["weight_decay"] = rates.weight_decay if group["decays"] else 0.0


class WeightAverage:
    """Exponential moving average of a network's float weights and buffers, with a warm start.

    The decay after step t is ``min(decay, (1 + t) / (10 + t))``, so that short trainings are not dominated by
    their initial weights (TensorFlow's ExponentialMovingAverage with num_updates).
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.n_updates = 0
        # A tensor under several names (timm's coat_* register layers again in each block) is averaged and swapped once.
        self._live: list[Tensor] = []
        self._of_name: dict[str, int] = {}
        places: dict[int, int] = {}
        for name, tensor in network.state_dict(keep_vars=True).items():
            if tensor.is_floating_point():
                if id(tensor) not in places:
                    places[id(tensor)] = len(self._live)
                    self._live.append(tensor)
                self._of_name[name] = places[id(tensor)]
        self._average = [t.detach().clone() for t in self._live]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the network's present weights."""
        self.n_updates += 1
        decay = min(self.decay, (1 + self.n_updates) / (10 + self.n_updates))
        torch._foreach_lerp_(self._average, [t.detach() for t in self._live], 1.0 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the network's weights and the average; call it twice to undo."""
        for live, average in zip(self._live, self._average, strict=True):
            held = live.detach().clone()
            live.copy_(average)
            average.copy_(held)

    def state(self) -> dict[str, Tensor]:
        """Name to averaged tensor; of a tensor with several names the others have copies."""
        found: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, place in self._of_name.items():
            found[name] = self._average[place].clone() if place in seen else self._average[place]
            seen.add(place)
        return found

    @torch.no_grad()
    def load(self, state: dict[str, Tensor], n_updates: int) -> None:
        """Take over what :meth:`state` gave."""
        for name, place in self._of_name.items():
            self._average[place].copy_(state[name])
        self.n_updates = n_updates
