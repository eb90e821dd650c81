"""Running a part of a graph: which nodes depend on shapes only, what they are at given sizes, what dominates what.

Masks, position tables and rotary embeddings are recognised by evaluating the nodes that make them, so that no spelling
of them has to be known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dyncomp.errors import GraphError
from dyncomp.graph import Graph

aten = torch.ops.aten

SHAPE_QUERIES = {
    aten.sym_size.int, aten.sym_numel.default, aten.new_ones.default, aten.new_zeros.default, aten.new_full.default,
    aten.zeros_like.default, aten.ones_like.default, aten.full_like.default,
}  # fmt: skip
"""Calls whose result depends on the shape and dtype of their first argument, never on its values."""


_UNDEFINED = {aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default}


class ShapeOnly:
    """The nodes of a graph whose values depend on the input sizes and on constants, never on the inputs' values.

    ``node in shape_only`` asks that; :attr:`varying` are those that change with a size (the others are constants).
    """

    def __init__(self, graph: Graph) -> None:
        self.nodes: set[fx.Node] = set()
        self.varying: set[fx.Node] = set()
        for node in graph.module.graph.nodes:
            if node.op == "get_attr":
                self.nodes.add(node)
            elif node.op == "call_function" and node.target not in _UNDEFINED:
                inputs = node.all_input_nodes
                if node.target in SHAPE_QUERIES:
                    inputs = [n for n in inputs if n is not node.args[0]]
                if all(n in self.nodes for n in inputs):
                    self.nodes.add(node)
                    if node.target in SHAPE_QUERIES or any(n in self.varying for n in inputs):
                        self.varying.add(node)

    def __contains__(self, node: object) -> bool:
        return node in self.nodes


def evaluate(graph: Graph, targets: Sequence[fx.Node], sizes: Mapping[str, int], given: Mapping[fx.Node, Any] | None = None) -> list[Any]:
    """The values of ``targets`` with the dynamic dimensions at ``sizes``, on the CPU.

    Args:
        graph: what the nodes belong to. Constants on the meta device are replaced by random ones of the same shape.
        targets: nodes that depend on ``given`` and on shapes only.
        sizes: size per dimension name, as ``{"batch": 2, "sequence": 5}``.
        given: nodes whose values are supplied; evaluation stops at them.

    Raises:
        GraphError: a target needs an input's value, which was not given.
    """
    values: dict[fx.Node, Any] = dict(given or {})
    with torch.no_grad():
        for node in _needed(targets, values):
            values[node] = _run(graph, node, values, sizes)
    return [values[t] for t in targets]


def symbolic_shape(graph: Graph, node: fx.Node, sizes: Mapping[str, int]) -> list[int]:
    """The node's shape with the dynamic dimensions at ``sizes``; those of other names (what an encoder–decoder writes) are as long as
    the sequence."""
    known = {symbol: sizes.get(name, sizes["sequence"]) for symbol, name in graph.dimension_names().items()}
    result = []
    for size in node.meta["val"].shape:
        if isinstance(size, torch.SymInt):
            expression = size.node.expr
            bound = {s: known[str(s)] for s in expression.free_symbols if str(s) in known}
            value = expression.subs(bound)
            if not value.is_number:
                raise GraphError(f"the shape of {node.name} depends on {value}, which is no input dimension")
            size = int(value)
        result.append(int(size))
    return result


def dominator(node: fx.Node, order: Mapping[fx.Node, int], ignore: ShapeOnly) -> fx.Node | None:
    """The nearest node through which everything flows that ``node`` computes from the inputs' values.

    Args:
        node: where to look back from.
        order: position of each node in the graph.
        ignore: nodes that do not count, since they depend on shapes only.
    """
    frontier = {n for n in _value_inputs(node) if n not in ignore}
    while len(frontier) > 1:
        last = max(frontier, key=order.__getitem__)
        if last.op == "placeholder":
            return None
        frontier.remove(last)
        frontier |= {n for n in _value_inputs(last) if n not in ignore}
    return next(iter(frontier), None)


def _value_inputs(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if not (node.target in SHAPE_QUERIES and n is node.args[0])]


def _needed(targets: Iterable[fx.Node], known: Mapping[fx.Node, Any]) -> list[fx.Node]:
    """Ancestors of the targets that have to be computed, inputs first."""
    found: dict[fx.Node, None] = {}
    stack = [(t, False) for t in targets]
    while stack:
        node, expanded = stack.pop()
        if node in known or node in found:
            continue
        if expanded:
            found[node] = None
            continue
        stack.append((node, True))
        if node.target not in SHAPE_QUERIES:
            stack.extend((n, False) for n in node.all_input_nodes)
        else:
            stack.extend((n, False) for n in node.all_input_nodes if n is not node.args[0])
    return list(found)


def _run(graph: Graph, node: fx.Node, values: dict[fx.Node, Any], sizes: Mapping[str, int]) -> Any:
    if node.op == "get_attr":
        return _constant(graph, node)
    if node.op != "call_function":
        raise GraphError(f"the value of the input {node.name!r} is needed")

    def value_of(n: fx.Node) -> Any:
        if n not in values:  # only a shape is asked of it
            values[n] = torch.empty(symbolic_shape(graph, n, sizes), dtype=n.meta["val"].dtype)
        return values[n]

    args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
    args = tuple(torch.device("cpu") if isinstance(a, torch.device) else a for a in args)
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _constant(graph: Graph, node: fx.Node) -> Tensor:
    value = graph.tensor(node)
    if not value.is_meta:
        return value.detach()
    generator = torch.Generator().manual_seed(len(str(node.target)))
    if value.is_floating_point():
        return torch.rand(value.shape, generator=generator).to(value.dtype)
    return torch.zeros(value.shape, dtype=value.dtype)
