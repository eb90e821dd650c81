"""Mixtures of experts that a model was trained with and :mod:`~dyncomp.regions.mixture` does not understand: named, with the reason."""

from __future__ import annotations

from torch import fx

from dyncomp.graph import Graph, op_name
from dyncomp.regions.hidden import LEAVE_DENSE
from dyncomp.regions.linear import NO_OPS, TRANSPOSES
from dyncomp.regions.mixture import find_mixtures
from dyncomp.regions.refusal import Refusal

_PRODUCTS = ("bmm", "matmul", "einsum", "baddbmm", "grouped_mm")


def find_trained_experts(graph: Graph) -> list[Refusal]:
    """One refusal per mixture: two or more products with weights of [experts, …, …] in one module."""
    reasons = find_mixtures(graph)[1]
    mixtures: dict[str, list[tuple[fx.Node, int]]] = {}
    for node in graph.module.graph.nodes:
        if node.op == "call_function" and any(name in op_name(node) for name in _PRODUCTS):
            for operand in node.all_input_nodes:
                if (experts := _matrices(graph, operand)) is not None:
                    mixtures.setdefault(str(node.meta.get("path", "")), []).append((node, experts))
    return [
        Refusal(where or node.name, "ffn", _reason(node, experts, reasons.get(node)), LEAVE_DENSE)
        for where, ((node, experts), *more) in mixtures.items()
        if more
    ]


def _reason(node: fx.Node, experts: int, why: str | None) -> str:
    more = "" if why is None else f", of a kind that is not understood: {why}"
    return f"it is a mixture of {experts} experts already ({op_name(node)}){more}"


def _matrices(graph: Graph, node: fx.Node) -> int | None:
    """How many matrices the constant of [experts, in, out] holds that ``node`` is; else None."""
    while node.op == "call_function" and (node.target in TRANSPOSES or node.target in NO_OPS):
        node = node.args[0]  # type: ignore[assignment]
    if node.op != "get_attr":
        return None
    tensor = graph.tensor(node)
    return tensor.shape[0] if tensor.ndim == 3 and tensor.is_floating_point() else None
