"""Operators that write into their inputs become those that make new tensors, where nothing else can see the difference."""

from __future__ import annotations

import operator

import torch
from torch import fx

from dyncomp.graph import Graph

aten = torch.ops.aten
_MAY_ALIAS = {
    aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default, aten.type_as.default, aten.einsum.default,
    aten.broadcast_tensors.default, aten.meshgrid.default, aten.meshgrid.indexing,
}  # fmt: skip
"""Their schemas do not say so."""


def functionalize(graph: Graph) -> list[fx.Node]:
    """``mul_(a, b)`` -> ``mul(a, b)``, and what reads ``a`` afterwards reads the product; returns the calls that stay in place.

    Those overwrite an input or a constant, or a tensor of which a view is read afterwards, or have no other form.
    """
    origin: dict[fx.Node, fx.Node] = {}
    kept = []
    for node in list(graph.module.graph.nodes):
        if node.op == "call_function" and (functional := _functional(node)) is not None and _rewrite(graph, node, functional, origin):
            continue
        if writes(node):
            kept.append(node)
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        origin[node] = origin[source] if source is not None and _is_view(node) else node
    return kept


def writes(node: fx.Node) -> bool:
    """Whether a call changes one of its inputs."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _functional(node: fx.Node) -> torch._ops.OpOverload | None:
    """``mul`` for ``mul_``."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten" or not target._schema.is_mutable:
        return None
    name = target._schema.name.removeprefix("aten::")
    found = getattr(getattr(aten, name[:-1], None), target._overloadname, None) if name.endswith("_") else None
    return found if found is not None and not found._schema.is_mutable and isinstance(node.args[0], fx.Node) else None


def _is_view(node: fx.Node) -> bool:
    """Whether a call may give the memory of its first argument."""
    if node.target is operator.getitem:
        return _is_view(node.args[0])  # type: ignore[arg-type]
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    return node.target in _MAY_ALIAS or any(result.alias_info is not None for result in node.target._schema.returns)


def _rewrite(graph: Graph, node: fx.Node, functional: torch._ops.OpOverload, origin: dict[fx.Node, fx.Node]) -> bool:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if origin[source].op != "call_function" or _is_view(origin[source]):
        return False
    after = {alias: [user for user in alias.users if node < user] for alias, first in origin.items() if first is origin[source]}
    if any(users for alias, users in after.items() if alias is not source):
        return False
    before = node.meta["val"]
    with graph.inserting(before=node) as b:
        result = b.call(functional, *node.args, **node.kwargs)  # type: ignore[arg-type]
        if result.meta["val"].dtype != before.dtype:
            result = b.call(aten.to.dtype, result, before.dtype)
    for user in after[source]:
        user.replace_input_with(source, result)
    node.replace_all_uses_with(result)
    graph.module.graph.erase_node(node)
    origin[result] = result
    return True
