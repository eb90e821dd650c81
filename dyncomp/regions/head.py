"""The vocabulary head: the linear layer at the end whose rows are the tokens of the embedding at the start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from dyncomp.graph import Graph
from dyncomp.regions.hidden import SLICES, is_pointwise
from dyncomp.regions.linear import NO_OPS, RESHAPES, TRANSPOSES, Linear, aten, constant


@dataclass(frozen=True)
class Head:
    """Logits over a vocabulary.

    Attributes:
        linear: ``logits = hidden @ weight.T (+ bias)``, before a softcap if there is one.
        tied: the weight is the embedding's.
        vocab: its rows.
    """

    linear: Linear
    tied: bool
    vocab: int

    @property
    def node(self) -> fx.Node:
        return self.linear.node

    @property
    def input(self) -> fx.Node:
        return self.linear.input

    @property
    def weight(self) -> str:
        return self.linear.weight


def find_head(graph: Graph, linears: Mapping[fx.Node, Linear]) -> Head | None:
    """The last linear layer before an output, if it is as tall as an embedding table that tokens are looked up in; or None."""
    tables = {name for node in graph.module.graph.nodes if (name := _table(graph, node)) is not None}
    heights = {graph.tensor(name).shape[0] for name in tables}
    for output in graph.output_nodes:
        linear = _last_linear(output, linears)
        if linear is not None and (linear.weight in tables or linear.out_features in heights):
            return Head(linear, linear.weight in tables, linear.out_features)
    return None


def _table(graph: Graph, node: fx.Node) -> str | None:
    """The embedding table that ``node`` looks graph inputs up in, or None."""
    if node.target is not aten.embedding.default:
        return None
    index = node.args[1]
    while isinstance(index, fx.Node) and index.op == "call_function" and index.target in NO_OPS | RESHAPES:
        index = index.args[0]
    found = constant(graph, node.args[0])
    return found[0] if found is not None and isinstance(index, fx.Node) and index.op == "placeholder" else None


def _last_linear(node: fx.Node, linears: Mapping[fx.Node, Linear]) -> Linear | None:
    """Back from an output, past what acts on each logit alone (softcap, scale, cast, slice), to a linear layer."""
    while isinstance(node, fx.Node) and node not in linears:
        if node.op != "call_function" or not (is_pointwise(node.target) or node.target in NO_OPS | RESHAPES | TRANSPOSES | SLICES):
            return None
        sources = [n for n in node.all_input_nodes if n.op != "get_attr"]
        if len(sources) != 1:
            return None
        node = sources[0]
    return linears.get(node)
