"""The hidden layer of an FFN: walking back from a down-projection through per-feature arithmetic to the up-projections."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from dyncomp.graph import Graph, op_name
from dyncomp.regions.linear import NO_OPS, RESHAPES, TRANSPOSES, Linear, aten, constant, keeps_last_axis, permutation, sizes

SPLITS = {
    aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.tensor_split.sections,
    aten.unsafe_chunk.default, aten.unsafe_split.Tensor,
}  # fmt: skip
SLICES = {aten.slice.Tensor, aten.narrow.default}
_UNTAGGED_POINTWISE = {aten.hardswish.default, aten.square.default, aten.prelu.default}
_AFFINE = {
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.neg.default, aten.add.Scalar, aten.mul.Scalar,
    aten.where.self, aten.masked_fill.Scalar, aten.rsub.Scalar,
}  # fmt: skip
_NORMS = {aten.layer_norm.default, aten.rms_norm.default, aten.group_norm.default, aten.batch_norm.default, aten.native_layer_norm.default}
_CROSSED = _NORMS | RESHAPES | {aten.conv1d.default, aten.conv2d.default, aten.convolution.default, aten.cat.default, aten.pad.default}
_BUDGET = 96  # nodes; a GELU written out has 8, a gated one with casts and views 20
_SEARCH = 16  # nodes more after a problem: a norm written out has 6


@dataclass
class Hidden:
    """What lies between a down-projection and the linear layers before it.

    Attributes:
        axes: each node of the hidden layer and its feature axis.
        ups: the linear layers where the walk ended.
        nonlinear: an activation function was crossed.
        problems: (reason, remedy) of everything that keeps it from being an FFN.
    """

    axes: dict[fx.Node, int] = field(default_factory=dict)
    ups: list[Linear] = field(default_factory=list)
    nonlinear: bool = False
    problems: list[tuple[str, str]] = field(default_factory=list)


LEAVE_DENSE = "nothing to do: it stays as it is"


def is_pointwise(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and (torch.Tag.pointwise in target.tags or target in _UNTAGGED_POINTWISE)


def walk_back(graph: Graph, linears: Mapping[fx.Node, Linear], down: Linear) -> Hidden:
    """Follow the input of ``down`` back to linear layers, through operations that treat every token and feature alike.

    After a problem the walk goes on for a little, to see whether there is an FFN to speak of.
    """
    hidden = Hidden()
    budget = _BUDGET
    steps: list[tuple[fx.Node, int | None]] = [(down.input, down.axis % len(sizes(down.input) or (0,)))]
    seen: set[fx.Node] = set()
    while steps:
        node, axis = steps.pop()
        if node in seen:
            if axis is not None and hidden.axes.get(node, axis) != axis:
                hidden.problems.append(("its features change places inside it", LEAVE_DENSE))
            continue
        seen.add(node)
        if hidden.problems:
            budget = min(budget, len(seen) + _SEARCH)
        if len(seen) > budget:
            hidden.problems.append(("the computation between its linear layers is too long to be an activation", LEAVE_DENSE))
            break
        if node in linears:
            up = linears[node]
            hidden.ups.append(up)
            if axis is not None and up.axis % len(sizes(node) or (0,)) != axis:
                hidden.problems.append(("its linear layers work on different axes", LEAVE_DENSE))
        else:
            steps += _step(graph, hidden, node, axis)
    return hidden


def _step(graph: Graph, hidden: Hidden, node: fx.Node, axis: int | None) -> list[tuple[fx.Node, int | None]]:
    """Where the walk goes from ``node``; records the node, or what is wrong with it."""
    problems, target, args = hidden.problems, node.target, node.args
    if node.op != "call_function":
        problems.append((f"part of its hidden activations comes from {node.name!r}, not from a linear layer", LEAVE_DENSE))
        return []
    if axis is None:
        return _search_on(hidden, node)
    shape = sizes(node)
    source = args[0] if args and isinstance(args[0], fx.Node) else None
    if target is operator.getitem and source is not None and source.target in SPLITS:
        return _through_split(hidden, node, source, axis)
    if source is not None and target in NO_OPS:
        hidden.axes[node] = axis
        return [(source, axis)]
    if source is not None and target in TRANSPOSES:
        order = permutation(node, len(shape or ()))
        hidden.axes[node] = axis
        others = [a for i, a in enumerate(order) if i != axis]
        if others != sorted(others):
            problems.append(("its tokens change places inside it", LEAVE_DENSE))
        return [(source, order[axis])]
    if source is not None and target in RESHAPES and axis == len(shape or ()) - 1 and keeps_last_axis(node):
        hidden.axes[node] = axis
        return [(source, len(sizes(source) or ()) - 1)]
    if source is not None and (target in SLICES or target is aten.glu.default):
        return _through_slice(hidden, node, source, axis)
    if is_pointwise(target):
        return _through_pointwise(graph, hidden, node, axis)
    return _search_on(hidden, node)


def _through_split(hidden: Hidden, node: fx.Node, split: fx.Node, axis: int) -> list[tuple[fx.Node, int | None]]:
    source: fx.Node = split.args[0]  # type: ignore[assignment]
    dim = split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)
    if dim % len(sizes(source) or (0,)) != axis:  # type: ignore[operator]
        hidden.problems.append(("its tokens are split into groups inside it", LEAVE_DENSE))
    hidden.axes[node] = hidden.axes[split] = axis
    return [(source, axis)]


def _through_slice(hidden: Hidden, node: fx.Node, source: fx.Node, axis: int) -> list[tuple[fx.Node, int | None]]:
    default = -1 if node.target is aten.glu.default else 0
    dim = node.args[1] if len(node.args) > 1 else default
    if dim % len(sizes(source) or (0,)) != axis:  # type: ignore[operator]
        hidden.problems.append(("it uses only some of the tokens", LEAVE_DENSE))
    hidden.axes[node] = axis
    return [(source, axis)]


def _through_pointwise(graph: Graph, hidden: Hidden, node: fx.Node, axis: int) -> list[tuple[fx.Node, int | None]]:
    hidden.axes[node] = axis
    hidden.nonlinear |= node.target not in _AFFINE
    steps: list[tuple[fx.Node, int | None]] = []
    for operand in node.all_input_nodes:
        shape = sizes(operand)
        if shape is None and operand.op != "get_attr":
            hidden.problems.append(("its activation depends on the input's size", LEAVE_DENSE))
        elif (values := _constant_size(graph, operand)) is not None:
            if values != 1:
                reason = f"its activation has a parameter of {values} values"
                hidden.problems.append((reason, "fold it into the weights, or leave the FFN dense"))
        elif shape == ():
            continue  # a scalar that something computes: the probe finds out whether it is a constant
        elif shape == sizes(node):
            steps.append((operand, axis))
        else:
            reason = f"its hidden activations are combined with the result of {op_name(operand)}, which has another shape"
            hidden.problems.append((reason, "leave the FFN dense"))
            if shape and shape[-1] == (sizes(node) or (0,))[-1]:  # not a factor per token, which would lead into a norm
                steps.append((operand, None))
    return steps


def _constant_size(graph: Graph, node: fx.Node) -> int | None:
    """The number of values of the constant that ``node`` is, or None."""
    found = constant(graph, node)
    if found is None and node.op != "get_attr":
        return None
    return graph.tensor(found[0] if found is not None else node).numel()


def _search_on(hidden: Hidden, node: fx.Node) -> list[tuple[fx.Node, int | None]]:
    """Past something an FFN cannot contain: is there a linear layer behind it at all?"""
    name = op_name(node)
    if node.target in _NORMS:
        reason = f"its hidden activations are normalised together ({name})"
    elif node.target in _CROSSED:
        reason = f"{name} mixes tokens or features of its hidden activations"
    elif is_pointwise(node.target) or node.target in NO_OPS or node.target in TRANSPOSES:
        hidden.nonlinear |= node.target not in _AFFINE and is_pointwise(node.target)
        source = node.args[0] if node.args else None
        return [(source, None)] if isinstance(source, fx.Node) else []
    else:
        hidden.problems.append((f"part of its hidden activations comes from {name}, not from a linear layer", LEAVE_DENSE))
        return []
    hidden.problems.append((reason, "leave the FFN dense: the sum over experts would not equal it"))
    first = node.args[0]
    sources = first if isinstance(first, (list, tuple)) else [first]
    return [(s, None) for s in sources if isinstance(s, fx.Node) and isinstance(s.meta.get("val"), Tensor)]
