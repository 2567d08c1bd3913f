"""Which layers of a network train, and which belong to its head. Builds no network and no optimizer.

A *layer* is a module with parameters of its own (a convolution, a batch norm); layers count in the order in which the
network defines them. The head is what ``get_classifier()`` names; every other layer is the backbone's.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

Parameters = list[nn.Parameter]


@dataclass(frozen=True)
class _Plan:
    """What :func:`set_trainable` last did: the share, and a module it left in evaluation mode (None: none)."""

    share: float
    witness: weakref.ref[nn.Module] | None


_plans: weakref.WeakKeyDictionary[nn.Module, _Plan] = weakref.WeakKeyDictionary()


def head_modules(network: nn.Module) -> tuple[nn.Module, ...]:
    """The classifier, or the classifiers where a network has several."""
    found = network.get_classifier()  # type: ignore[operator]
    return tuple(found) if isinstance(found, tuple | list) else (found,)


def classifier_parameters(network: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of the head: what trains while the backbone is frozen."""
    for module in head_modules(network):
        yield from module.parameters()


def backbone_layers(network: nn.Module) -> list[nn.Module]:
    """The backbone's layers, first to last."""
    head = {id(module) for part in head_modules(network) for module in part.modules()}
    return [m for m in network.modules() if id(m) not in head and _has_parameters(m)]


def trainable_layers(network: nn.Module, share: float) -> list[nn.Module]:
    """The last ``share`` in [0, 1] of the backbone's layers, rounded up."""
    layers = backbone_layers(network)
    n_trainable = math.ceil(share * len(layers) - 1e-9)
    return layers[len(layers) - n_trainable :]


def set_trainable(network: nn.Module, share: float) -> None:
    """Put the network into training mode with only its head and the last ``share`` of its backbone trainable.

    The rest neither gets gradients nor leaves evaluation mode, so that its batch norms keep their statistics. Called again
    with nothing changed it returns at once; after ``network.eval()`` or ``network.train()`` it does its work again.

    Args:
        network: on any device.
        share: in [0, 1] of the backbone's layers; 0 is the head alone, 1 everything.
    """
    plan = _plans.get(network)
    if plan is not None and plan.share == share and network.training and _still_frozen(plan):
        return
    trainable = {id(layer) for layer in trainable_layers(network, share)}
    trainable |= {id(module) for part in head_modules(network) for module in part.modules()}
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(id(module) in trainable)
    for parameter in classifier_parameters(network):  # shared with a frozen layer: still the head's
        parameter.requires_grad_(True)
    if share < 1.0:
        _set_modes(network, trainable)
    else:
        network.train()
    frozen = next((module for module in network.modules() if not module.training), None)
    _plans[network] = _Plan(share, None if frozen is None else weakref.ref(frozen))


def _still_frozen(plan: _Plan) -> bool:
    if plan.witness is None:
        return True
    module = plan.witness()
    return module is not None and not module.training


def _set_modes(network: nn.Module, trainable: set[int]) -> None:
    """Training mode for trainable layers, for what contains them, and for layers without parameters behind the first."""
    begun = False

    def visit(module: nn.Module) -> bool:
        nonlocal begun
        own = id(module) in trainable
        begun |= own
        children = list(module.children())
        inner = [visit(child) for child in children]
        module.training = own or any(inner) or (begun and not children and not _has_parameters(module))
        return module.training

    visit(network)


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def depth_groups(network: nn.Module) -> tuple[Parameters, Parameters, Parameters]:
    """Parameters of the first half of the backbone's layers, of its second half, and of the head; each exactly once."""
    layers = backbone_layers(network)
    half = len(layers) // 2
    seen: set[int] = set()

    def of(modules: list[nn.Module], recurse: bool) -> Parameters:
        found = [p for module in modules for p in module.parameters(recurse=recurse) if id(p) not in seen]
        unique = list({id(p): p for p in found}.values())
        seen.update(id(p) for p in unique)
        return unique

    head = of(list(head_modules(network)), True)  # first: a parameter shared with the backbone is the head's
    return of(layers[:half], False), of(layers[half:], False), head
