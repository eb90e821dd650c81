"""Linear layers, whatever they were spelled as, and the small vocabulary that all region finders share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

import dyncomp.ops  # noqa: F401  (registers the operators below)
from dyncomp.graph import Graph

aten = torch.ops.aten
_GATED = torch.ops.dyncomp.gated_linear.default
PRODUCTS = (aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default)
"""The spellings of a linear layer whose weight is a matrix and whose features come last."""
LAYERS = (*PRODUCTS, torch.ops.dyncomp.sparse_linear.default, _GATED)
"""These, and the linear layers that leave out inputs or tokens."""


@dataclass(frozen=True)
class Linear:
    """``y = x @ W.T + b``: linear, addmm, mm, matmul, einsum or a 1x1 convolution, with a separate bias add if there is one; or
    ``dyncomp::sparse_linear``, whose small inputs count as zero.

    A ``dyncomp::gated_linear`` counts: it computes just that for the tokens whose gate is open.

    Attributes:
        node: gives ``y``, after the bias add.
        input: ``x``, with the features on ``axis``.
        weight, bias: names of the constants in the graph.
        transposed: the weight is stored ``[in, out]``.
        axis: the feature axis of ``x`` and ``y``: -1, or 1 for a convolution.
        nodes: what a rewrite deletes with it, the matrix product first, ``node`` last.
        thresholds: name of the [in] thresholds that inputs must exceed, or None.
    """

    node: fx.Node
    input: fx.Node
    weight: str
    transposed: bool
    bias: str | None
    in_features: int
    out_features: int
    axis: int
    nodes: tuple[fx.Node, ...]
    thresholds: str | None = None

    def weight_matrix(self, graph: Graph) -> Tensor:
        """The weight as [out, in], in the dtype it has."""
        weight = graph.tensor(self.weight).detach()
        return weight.t() if self.transposed else weight.reshape(self.out_features, self.in_features)

    def bias_vector(self, graph: Graph) -> Tensor | None:
        """The bias as [out], or None."""
        return None if self.bias is None else graph.tensor(self.bias).detach()


# ---- reading nodes -------------------------------------------------------------------------------------------------
_CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default, aten.type_as.default}
NO_OPS = _CASTS | {aten.clone.default, aten.contiguous.default, aten.detach.default, aten.alias.default, aten.dropout.default}
RESHAPES = {
    aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims,
}  # fmt: skip
TRANSPOSES = {aten.transpose.int, aten.permute.default, aten.t.default, aten.numpy_T.default}


def sizes(node: fx.Node) -> tuple[Any, ...] | None:
    """The node's shape, or None if it is no tensor; symbolic sizes as expressions (comparing SymInts would add guards)."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    return tuple(size if isinstance(size, int) else size.node.expr for size in value.shape)


def permutation(node: fx.Node, rank: int) -> list[int]:
    """Output axis -> input axis of a node in :data:`TRANSPOSES`."""
    arguments: tuple[Any, ...] = node.args
    if node.target is aten.permute.default:
        return [axis % rank for axis in arguments[1]]
    order = list(range(rank))
    i, j = (axis % rank for axis in arguments[1:3]) if node.target is aten.transpose.int else (0, rank - 1)
    order[i], order[j] = order[j], order[i]
    return order


def keeps_last_axis(node: fx.Node) -> bool:
    """Whether a node in :data:`RESHAPES` only regroups what is before the last axis."""
    before, after = sizes(node.args[0]), sizes(node)  # type: ignore[arg-type]
    return bool(before) and bool(after) and before[-1] == after[-1]  # type: ignore[index]


def before_reshapes(node: fx.Node) -> list[fx.Node]:
    """The node and, back from it, everything it merely regroups the tokens of or casts: ``[node, …, root]``."""
    chain = [node]
    while node.op == "call_function" and (node.target in NO_OPS or (node.target in RESHAPES and keeps_last_axis(node))):
        node = node.args[0]  # type: ignore[assignment]
        chain.append(node)
    return chain


def constant(graph: Graph, value: Any) -> tuple[str, bool] | None:
    """(name, transposed) of the floating-point constant that ``value`` is, through casts and 2-D transposes; else None."""
    transposed = False
    while isinstance(value, fx.Node):
        if value.op == "get_attr":
            return (str(value.target), transposed) if graph.tensor(value).is_floating_point() else None
        if value.target in TRANSPOSES and len(sizes(value) or ()) == 2:
            transposed ^= permutation(value, 2) == [1, 0]
        elif value.target not in NO_OPS:
            return None
        value = value.args[0]
    return None


def common_path(nodes: Iterable[fx.Node]) -> str:
    """Deepest module path that all the nodes lie under: ``a.b.up``, ``a.b.down`` -> ``a.b``."""
    paths = [str(node.meta.get("path", "")).split(".") for node in nodes]
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


class Names:
    """Hands out unique names: the path where it is free, otherwise the path and the node's name."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def take(self, path: str, node: fx.Node) -> str:
        name = path or node.name
        if name in self._taken:
            name = f"{path}.{node.name}" if path else f"{node.name}_{len(self._taken)}"
        self._taken.add(name)
        return name


# ---- finding linears -----------------------------------------------------------------------------------------------
def find_linears(graph: Graph) -> dict[fx.Node, Linear]:
    """Every linear layer of the graph by the node that gives its result, in graph order."""
    found: dict[fx.Node, Linear] = {}
    for node in graph.module.graph.nodes:
        if node.op == "call_function" and (linear := _product(graph, node)) is not None:
            linear = _with_bias_add(graph, linear)
            found[linear.node] = linear
    return found


def _product(graph: Graph, node: fx.Node) -> Linear | None:
    """The linear layer that this one node computes, or None."""
    target, args = node.target, node.args
    if target is aten.linear.default:
        return _make(graph, node, args[0], args[1], args[2] if len(args) > 2 else None)
    if target is torch.ops.dyncomp.sparse_linear.default:
        linear, thresholds = _make(graph, node, *args[:3]), constant(graph, args[3])
        return None if linear is None or thresholds is None else replace(linear, thresholds=thresholds[0])
    if target is _GATED:
        return _make(graph, node, args[0], args[2], args[3] if len(args) > 3 else None)
    if target is aten.addmm.default and not node.kwargs:
        return _make(graph, node, args[1], args[2], args[0], stored_in_out=True)
    if target in (aten.mm.default, aten.matmul.default):
        return _make(graph, node, args[0], args[1], None, stored_in_out=True)
    if target is aten.einsum.default:
        return _einsum(graph, node)
    if target in _CONVOLUTIONS and _is_pointwise_convolution(node):
        return _make(graph, node, args[0], args[1], args[2] if len(args) > 2 else None, axis=1)
    return None


def _make(graph: Graph, node: fx.Node, x: Any, weight: Any, bias: Any, *, stored_in_out: bool = False, axis: int = -1) -> Linear | None:
    found = constant(graph, weight)
    if found is None or not isinstance(x, fx.Node) or constant(graph, x) is not None:
        return None
    name, transposed = found
    shape, rank = tuple(graph.tensor(name).shape), len(sizes(x) or ())
    if (axis == 1 and len(shape) != rank) or (axis == -1 and len(shape) != 2):
        return None
    bias_name = None
    if bias is not None:
        found_bias = constant(graph, bias)
        if found_bias is None or graph.tensor(found_bias[0]).ndim != 1:
            return None
        bias_name = found_bias[0]
    transposed ^= stored_in_out
    out_features, in_features = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
    return Linear(node, x, name, transposed, bias_name, in_features, out_features, axis, (node,))


def _einsum(graph: Graph, node: fx.Node) -> Linear | None:
    """``"bsd,df->bsf"`` and its spellings: one data operand, one matrix, the contracted letter last in the data."""
    equation, operands = str(node.args[0]).replace(" ", ""), list(node.args[1])  # type: ignore[arg-type]
    if len(operands) != 2 or "->" not in equation or "." in equation:
        return None
    terms, result = equation.split("->")
    data, matrix = terms.split(",")
    if constant(graph, operands[1]) is None:
        operands.reverse()
        data, matrix = matrix, data
    if len(matrix) != 2 or not data or data[:-1] != result[:-1] or {data[-1], result[-1]} != set(matrix) or data[-1] == result[-1]:
        return None
    return _make(graph, node, operands[0], operands[1], None, stored_in_out=matrix == data[-1] + result[-1])


_CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.default, aten.convolution.default}


def _is_pointwise_convolution(node: fx.Node) -> bool:
    """Kernel 1, stride 1, no padding, one group: the same linear layer at every position."""
    general = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
    special = ("stride", "padding", "dilation", "groups")
    options: dict[str, Any] = dict(zip(general if node.target is aten.convolution.default else special, node.args[3:], strict=False))
    kernel = (sizes(node.args[1]) or ())[2:]  # type: ignore[arg-type]

    def every(name: str, wanted: int) -> bool:
        value = options.get(name, wanted)
        return all(v == wanted for v in (value if isinstance(value, (list, tuple)) else [value]))

    plain = every("stride", 1) and every("padding", 0) and options.get("groups", 1) == 1 and not options.get("transposed", False)
    return plain and math.prod(k if isinstance(k, int) else 0 for k in kernel) == 1


def _with_bias_add(graph: Graph, linear: Linear) -> Linear:
    """The linear with the bias that a later node adds to it, if its result goes nowhere else."""
    if linear.bias is not None or linear.axis != -1 or linear.nodes[0].target is _GATED:  # what is added after a gate is no part of it
        return linear
    node, passed = linear.node, []
    while len(node.users) == 1:
        (user,) = node.users
        if user.target in RESHAPES and keeps_last_axis(user):
            passed.append(user)
            node = user
            continue
        if user.target in (aten.add.Tensor, aten.add_.Tensor) and not user.kwargs:
            other = user.args[1] if user.args[0] is node else user.args[0]
            found = constant(graph, other)
            if found is not None and tuple(graph.tensor(found[0]).shape) == (linear.out_features,):
                return replace(linear, node=user, bias=found[0], nodes=(*linear.nodes, *passed, user))
        return linear
    return linear
