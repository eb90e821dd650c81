"""What a router family gives, and how it gets into the graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from dyncomp.passes.layerwise import ExpertView, Layer
from torch import Tensor, fx

from dyncomp.graph import Builder, Graph
from dyncomp.sweep import reduced_products

aten = torch.ops.aten
ALWAYS = 1e4
"""Bias of a shared expert: above every score."""


Read = Callable[[str], fx.Node]
"""Name of a router's tensor -> the node that reads it."""
Emit = Callable[[Builder, fx.Node, Read], fx.Node]
"""(builder, x, read) -> features [.., n], nodes of the graph."""


@dataclass(frozen=True)
class RouterOptions:
    """What the families may be told (see :class:`dyncomp.passes.FitRouter`)."""

    target: str = "energy"
    ridge: float = 1e-2
    rank: int = 32
    seed: int = 0
    bias: bool = True


@dataclass(frozen=True)
class Scores:
    """A fitted router: ``scores[.., e]`` rises with how much a token needs expert e.

    Args:
        features: tensors of the part before the last product, by name.
        emit: makes the features that are multiplied with ``weight``.
        weight: [E, n]; None: the features are the scores, n = E.
        bias: [E].
    """

    bias: Tensor
    weight: Tensor | None = None
    features: dict[str, Tensor] | None = None
    emit: Emit | None = None


@dataclass(frozen=True)
class Biased:
    """Gates that a bias helps to choose without being a part of the scores.

    Args:
        gates: (scores [..., E], bias [E]) -> [..., E], those of shared experts included.
    """

    gates: Callable[[Tensor, Tensor], Tensor]


def install(graph: Graph, view: ExpertView, scores: Scores, *, gates: str | Callable[[Tensor], Tensor] | Biased, k: int = 1) -> None:
    """Put a router before the gates of a region, in place of the one it has.

    before:  scores = linear(x, W, b);       gates = dyncomp.threshold_gates(scores)
    after:   scores = linear(f(x), W', b');  gates = dyncomp.threshold_gates(scores)     # the threshold is part of b'
             ``relative``: gates = dyncomp.threshold_gates(scores - max(scores) + t)     # D2DMoE, 2310.04361
             ``topk``:     gates = dyncomp.topk_gates(scores, k)
             ``Biased``:   scores = linear(x, W');  gates = the nodes of ``gates(scores, b')``
             others:       gates = cat(1 for shared experts, the nodes of ``gates(scores of the other experts)``)
    """
    shared, prefix = view.shared, f"{view.name}.router"
    weight, bias = scores.weight, scores.bias.clone()
    if weight is not None:
        weight = weight.contiguous().clone()
        weight[shared] = 0
    always = 1.0 if weight is not None and gates == "threshold" else ALWAYS
    count = int(shared.sum())
    bias[shared] = always

    def read(name: str, value: Tensor) -> fx.Node:
        graph.add_tensor(f"{prefix}.{name}", value)
        node = graph.read(f"{prefix}.{name}")
        node.meta["val"] = graph.tensor(node)  # the router before it may have had one of another shape by this name
        return node

    with graph.inserting(before=view.gates, path=view.gates.meta.get("path")) as b:
        y = view.region.input
        if scores.emit is not None:
            nodes = {name: read(name, value) for name, value in (scores.features or {}).items()}
            y = scores.emit(b, y, nodes.__getitem__)
        own = "offset" if gates == "relative" else "bias"  # the threshold is then a bias of its own
        if isinstance(gates, Biased):
            assert weight is not None
            y = b.call(aten.linear.default, y, read("weight", weight))
        elif weight is not None:
            y = b.call(aten.linear.default, y, read("weight", weight), read(own, bias))
        else:
            y = b.call(aten.add.Tensor, y, read(own, bias))
        if gates == "relative":
            routed = b.call(aten.slice.Tensor, y, -1, count, view.experts)
            y = b.call(aten.sub.Tensor, y, b.call(aten.amax.default, routed, [-1], True))
            y = b.call(aten.add.Tensor, y, read("bias", torch.where(shared, 2 * ALWAYS, 0.0)))
        if isinstance(gates, Biased):
            y = b.inline(gates.gates, y, read("bias", torch.where(shared, 0.0, scores.bias)))
        elif callable(gates):
            opened = b.inline(gates, b.call(aten.slice.Tensor, y, -1, count, view.experts) if count else y)
            if count:
                ones = b.call(aten.ones_like.default, b.call(aten.slice.Tensor, y, -1, 0, count))
                opened = b.call(aten.cat.default, [ones, opened], -1)
            y = opened
        elif gates == "topk":
            y = b.call(torch.ops.dyncomp.topk_gates.default, y, k)
        else:
            y = b.call(torch.ops.dyncomp.threshold_gates.default, y)
    view.gates.replace_all_uses_with(y)
    for node in reversed(view.region.router):  # what is left would still be run, on weights that are no longer its own
        if not node.users:
            graph.module.graph.erase_node(node)


def energies(layer: Layer) -> list[Tensor]:
    """||W_down[e] h_e||² of every expert, [n, E] a batch."""
    gram = layer.view.w_down.transpose(1, 2) @ layer.view.w_down  # [E, F, F]: ||W h||² = hᵀ (WᵀW) h, cheaper than W h when F < d
    found = []
    for hidden in layer.hidden():
        h = hidden.transpose(0, 1)  # [E, n, F]
        with reduced_products():
            projected = h @ gram
        found.append((projected * h).sum(-1, dtype=torch.float32).clamp_min(0).T)
    return found


def targets(layer: Layer, kind: str) -> list[Tensor]:
    """What a regression aims at, [n, E] a batch: ``energy`` (its logarithm) or ``norm`` of each expert's output.

    The logarithm has a floor, by the token in the middle: where attention sinks are made, the first position's energy is a million times
    that of others, and so is the mean.
    """
    energy = energies(layer)
    floor = 1e-3 * torch.cat([e.mean(1) for e in energy]).median()
    return [(e + floor).log() if kind == "energy" else e.sqrt() for e in energy]
