"""The section on the network: its layers, their output shapes and parameters. Trains nothing and reads no weights' values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from pcam_automl.explain import output_shapes
from pcam_automl.models.factory import build_network
from pcam_automl.models.layers import set_trainable
from pcam_automl.models.weights import Weights
from pcam_automl.report.blocks import Block, Facts, Section, Table, Text, left_out
from pcam_automl.report.content import ReportContent

MOST_ROWS = 40


@dataclass(frozen=True)
class LayerRow:
    """A layer, or a group of layers.

    Attributes:
        name: dotted, as in the network.
        kind: its class, with the number of layers inside where there are several.
        shape: of its output without the batch; empty where it returns no tensor or never runs.
        n_parameters: inside it, buffers left out.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    n_parameters: int


def network_section(content: ReportContent) -> Section:
    """The summary table; a sentence where no network is known."""
    recipe, title = content.trained, "The network"
    if recipe is None:
        return Section("network", title, (left_out("there is no recipe and no model, so no network is known."),))
    network = build_network(recipe.model_copy(update={"pretrained": False}), Weights("none"), seed=0)
    rows = layer_rows(network, recipe.network_px)
    total = sum(p.numel() for p in network.parameters())
    buffers = sum(b.numel() for b in network.buffers())
    facts = [(f"{total:,}", "parameters")]
    for number, phase in enumerate(recipe.phases, 1):
        when = f" in stage {number}" if len(recipe.phases) > 1 else ""
        facts.append((f"{_n_trainable(network, phase.trainable):,}", f"of them trainable{when}"))
    facts.append((f"{recipe.network_px}×{recipe.network_px}", "px go in"))
    cells = [(row.name, row.kind, "×".join(map(str, row.shape)) or "–", f"{row.n_parameters:,}") for row in rows]
    cells.append(("all", "", "", f"{total:,}"))
    goal = "the one number that says how likely tumour is"
    if recipe.task == "dense":
        goal = "the map that says how likely tumour is at each pixel"
    blocks: list[Block] = [
        Text(
            f"{recipe.backbone}: {_start(recipe.pretrained)}. Beside its parameters it keeps {buffers:,} running statistics."
        ),
        Facts(tuple(facts)),
        Table(
            ("layer", "kind", "output", "parameters"),
            tuple(cells),
            f"From the picture (top) to {goal} (bottom). Output: channels × height × width in cells. The fewer cells, the larger "
            "the part of the picture that each one sums up.",
            n_left=3,
        ),
    ]
    return Section("network", title, tuple(blocks))


def _n_trainable(network: nn.Module, share: float) -> int:
    """Parameters that train when the last ``share`` of the backbone does, as the training itself sets it."""
    set_trainable(network, share)
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def _start(pretrained: bool) -> str:
    return "trained on from weights learned on other pictures" if pretrained else "trained from random weights"


def layer_rows(network: nn.Module, px: int, most: int = MOST_ROWS) -> list[LayerRow]:
    """At most ``most`` rows in the order of execution, all opened to the same depth.

    The shapes come from a run on torch's meta device, which computes no values; the network itself is moved there.

    Args:
        network: takes (B, 3, px, px).
        px: side of its input.
        most: rows, however deep; the network's direct children are always shown.
    """
    shapes = output_shapes(network.to("meta").eval(), torch.empty(1, 3, px, px, device="meta"))
    nodes = _opened([("", network)])
    while len(deeper := _opened(nodes)) <= most and deeper != nodes:
        nodes = deeper
    order = {name: number for number, name in enumerate(shapes)}
    rows = [LayerRow(name, _kind(module), shapes.get(name, ())[1:], _n_parameters(module)) for name, module in nodes]
    rows = sorted((r for r in rows if r.name in order), key=lambda r: order[r.name]) + [
        r for r in rows if r.name not in order and r.n_parameters
    ]
    loose = sum(p.numel() for p in network.parameters()) - sum(row.n_parameters for row in rows)
    return [*rows, LayerRow("(others)", "tokens, positions, scales", (), loose)] if loose else rows


def _opened(nodes: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Every node replaced by its children, where it has any and they hold all of its parameters; no identities."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in nodes:
        children = [(f"{name}.{inner}".lstrip("."), child) for inner, child in module.named_children()]
        whole = name != "" and any(True for _ in module.parameters(recurse=False))
        found += [(name, module)] if whole or not children else children
    return [(name, module) for name, module in found if not isinstance(module, nn.Identity)]


def _n_leaves(module: nn.Module) -> int:
    return sum(1 for inner in module.modules() if next(inner.children(), None) is None)


def _n_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _kind(module: nn.Module) -> str:
    n = _n_leaves(module)
    return type(module).__name__ if n == 1 else f"{type(module).__name__} of {n}"
