"""Optimizers, parameter groups, learning-rate schedules and the weight average. Runs no step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pcam_automl.recipe import Recipe

ONE_CYCLE_START = 1 / 25
ONE_CYCLE_END = 1e-4
"""Smith & Topin 2018 as torch's OneCycleLR has it: start at lr / 25, end at lr / 25 / 1e4; here the end is lr * 1e-4."""


def build_optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer in two groups: matrices and kernels with weight decay, biases and norms without."""
    decayed = [p for p in network.parameters() if p.ndim > 1]
    plain = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    betas = (recipe.beta1, recipe.beta2)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr, betas=betas, eps=recipe.eps, fused=True)
    if recipe.optimizer == "adam":
        return torch.optim.Adam(groups, lr=recipe.lr, betas=betas, eps=recipe.eps, fused=True)
    if recipe.optimizer == "sgd":
        # foreach, not fused: fused SGD fails when parameters thaw after others have momentum ("expected Tensor as element 0")
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.beta1, nesterov=recipe.beta1 > 0, foreach=True)
    return torch.optim.RMSprop(
        groups, lr=recipe.lr, alpha=recipe.beta2, momentum=recipe.beta1, eps=recipe.eps, foreach=True
    )


def one_cycle(progress: float, *, warmup: float) -> float:
    """Share of the peak learning rate at ``progress`` in [0, 1]: cosine up for ``warmup``, cosine down after."""
    if progress < warmup:
        low, high, at = ONE_CYCLE_START, 1.0, progress / warmup
    else:
        low, high, at = 1.0, ONE_CYCLE_END, (progress - warmup) / max(1.0 - warmup, 1e-12)
    return high + (low - high) * (1.0 + math.cos(math.pi * min(at, 1.0))) / 2.0


def warm_up(views: int, *, warmup_views: float) -> float:
    """Share of the peak learning rate in a linear warm-up that lasts ``warmup_views``; 1 after it."""
    return min(1.0, (views + 1) / warmup_views) if warmup_views > 1 else 1.0


def decay_branch(progress: float) -> float:
    """Share of the peak at ``progress`` in [0, 1] of a decay: 1 - sqrt (Haegele et al. 2024, better than linear)."""
    return max(0.0, 1.0 - math.sqrt(min(progress, 1.0)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """One learning rate for every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


class WeightAverage:
    """Exponential moving average of a network's float weights and buffers, with a warm start.

    The decay after step t is ``min(decay, (1 + t) / (10 + t))``, so that short trainings are not dominated by
    their initial weights (TensorFlow's ExponentialMovingAverage with num_updates).
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.n_updates = 0
        self._live = [t for t in network.state_dict(keep_vars=True).values() if t.is_floating_point()]
        self._average = [t.detach().clone() for t in self._live]
        self._names = [name for name, t in network.state_dict().items() if t.is_floating_point()]

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
        """Name to averaged tensor."""
        return dict(zip(self._names, self._average, strict=True))

    @torch.no_grad()
    def load(self, state: dict[str, Tensor], n_updates: int) -> None:
        """Take over what :meth:`state` gave."""
        for name, average in zip(self._names, self._average, strict=True):
            average.copy_(state[name])
        self.n_updates = n_updates
