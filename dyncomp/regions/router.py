"""The router of a routed FFN, where it is one linear layer and the same number of experts for every token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from dyncomp.graph import Graph
from dyncomp.regions.linear import NO_OPS, RESHAPES, aten, constant
from dyncomp.regions.routed import RoutedFFN
from dyncomp.regions.weighting import Weighting, find_weighting


@dataclass(frozen=True)
class TopK:
    """Gates of 1 for the ``shared`` first experts; for the ``k`` of the others that score highest, ``scores = x Wᵀ + b``, gates by
    ``weighting``.

    Attributes:
        weight: [E - shared, d]. bias: [E - shared], or None where it changes no gate. Beside a sigmoid it is no part of the scores: it is
            added to the sigmoids, where experts are chosen.
    """

    weight: Tensor
    bias: Tensor | None
    k: int
    shared: int
    weighting: Weighting


def find_topk(graph: Graph, region: RoutedFFN) -> TopK | str:
    """The router of a region, or why it is none of this kind."""
    gates = region.gates
    if gates.target is torch.ops.dyncomp.threshold_gates.default:
        return "how many experts run depends on the token (threshold gates)"
    scores = find_scores(graph, region)
    if scores is None:
        return f"its gates are not the k highest scores, but come from {gates.name}"
    if scores.target is not aten.linear.default or _source(scores.args[0]) is not _source(region.input):
        return "its scores are not one linear layer of the FFN's input"
    found = [constant(graph, argument) for argument in scores.args[1:]]
    if None in found:
        return "its router's weights are computed"
    weight, *rest = (graph.tensor(name).detach() for name, _ in found)  # type: ignore[misc]
    bias = rest[0] if rest else torch.zeros(len(weight))
    # Shared experts score the same for every token, and more than any other can: see fit-router.
    always = ~weight.any(1) & (bias >= 1e3)
    shared = int(always.sum())
    if shared and not bool(always[:shared].all()):
        return "its shared experts are not the first ones"
    after = _added_later(graph, region, scores)
    unread = int((~weight.any(1)).long().cumprod(0).sum())  # `upcycle` does not score its shared experts
    tried: tuple[Weighting, int] | str = ""
    for shared in (unread, 0) if not shared and 0 < unread < len(weight) else (shared,):  # noqa: B020
        tried = find_weighting(graph, gates, scores, shared, None if after is None else after[shared:])
        if not isinstance(tried, str):
            break
    if isinstance(tried, str):
        return tried
    weighting, k = tried
    if weighting.function == "sigmoid" and rest and bool(rest[0].any()):
        return "its scores have a bias before the sigmoid"
    bias = (bias if after is None else after)[shared:]
    return TopK(weight[shared:], None if bool((bias == bias[0]).all()) else bias, k, shared, weighting)


def _added_later(graph: Graph, region: RoutedFFN, scores: fx.Node) -> Tensor | None:
    """What is added where experts are chosen, after the scores: [E] or None."""
    name = selection_bias(graph, region, scores)
    if name is None or any(isinstance(a, fx.Node) and str(a.target) == name for a in scores.args):
        return None
    return graph.tensor(name).detach()


def find_scores(graph: Graph, region: RoutedFFN) -> fx.Node | None:
    """What a router gives each expert before gates are made of it, [..., E]: what threshold or top-k gates read, else the last linear layer
    or sum with a bias that has one output an expert; None without a router."""
    if region.gates.target in _GATES and isinstance(region.gates.args[0], fx.Node) and region.gates.args[0].target in _SCORES:
        return region.gates.args[0]
    found = [n for n in region.router if n.target is aten.linear.default and n.meta["val"].shape[-1] == region.experts]
    return found[-1] if found else None


def selection_bias(graph: Graph, region: RoutedFFN, scores: fx.Node) -> str | None:
    """Name of the bias [E] that changes which experts run and no expert's weight, or None."""
    added = [constant(graph, n.args[1]) for n in region.router if n.target is aten.add.Tensor and scores < n]
    found = [name for entry in added if entry is not None for name in [entry[0]] if graph.tensor(name).shape == (region.experts,)]
    if found:
        return found[-1]
    binary = [n for n in region.router if n.target in _GATES]
    bias = scores.args[2] if binary and scores.target is aten.linear.default and len(scores.args) == 3 else None
    return str(bias.target) if isinstance(bias, fx.Node) else None


_GATES = (torch.ops.dyncomp.threshold_gates.default, torch.ops.dyncomp.topk_gates.default)
_SCORES = (aten.linear.default, aten.add.Tensor)


def _source(node: object) -> object:
    while isinstance(node, fx.Node) and node.target in NO_OPS | RESHAPES:
        node = node.args[0]
    return node
