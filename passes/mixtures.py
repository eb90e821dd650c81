"""What passes that rewrite trained mixtures of experts have in common."""

from __future__ import annotations

from dyncomp.passes.layerwise import routing_facts
from torch import Tensor

from dyncomp.errors import RequestError
from dyncomp.graph import Graph
from dyncomp.regions import RoutedFFN, find_regions
from dyncomp.regions.refusal import Refusal

ENOUGH = 64
"""Tokens that must have run an expert before what they say about it is believed."""


def require_mixtures(graph: Graph, who: str, instead: str) -> None:
    """Raises RequestError: the graph has no mixture that its model was trained with; ``instead`` says what dense FFNs need."""
    if not any(r.trained for r in find_regions(graph).routed):
        raise RequestError(f"{who}: the model has no trained mixture of experts", hint=instead)


def find_whole(graph: Graph, who: str, *, merged: bool = True) -> tuple[list[RoutedFFN], list[Refusal]]:
    """The trained mixtures whose experts are whole (and, where ``merged`` is false, have one score each); and refusals of the others."""
    found, refused = list[RoutedFFN](), list[Refusal]()
    for region in (r for r in find_regions(graph).routed if r.trained):
        noted = routing_facts(graph, region.name)
        if "parts" in noted:
            refused.append(Refusal(region.name, who, "its experts were split", f"put {who} before split-experts"))
        elif "merged" in noted and not merged:
            refused.append(Refusal(region.name, who, "its experts were merged", f"put {who} before merge-experts"))
        else:
            found.append(region)
    return found, refused


def use(gates: list[Tensor]) -> Tensor:
    """Sum of each expert's gates over all tokens: [..., E] a batch -> [E]."""
    total: Tensor = sum(g.abs().flatten(0, -2).sum(0, dtype=g.dtype) for g in gates)  # type: ignore[assignment]
    return total


def runs(gates: list[Tensor]) -> Tensor:
    """How many tokens run each expert: [..., E] a batch -> [E] int64."""
    total: Tensor = sum((g != 0).flatten(0, -2).sum(0) for g in gates)  # type: ignore[assignment]
    return total


def replace_experts(graph: Graph, region: RoutedFFN, suffix: str, w_up: Tensor, b_up: Tensor | None, w_down: Tensor) -> None:
    """Let the region's operation read other weights, which get the names of those they stand for and a suffix."""
    for position, name, value in ((2, region.w_up, w_up), (3, region.b_up, b_up), (4, region.w_down, w_down)):
        if name is not None and value is not None:
            graph.add_tensor(f"{name}_{suffix}", value)
            region.node.update_arg(position, graph.read(f"{name}_{suffix}"))
