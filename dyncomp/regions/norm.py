"""Root-mean-square norms spelled in primitives, recognised by evaluating them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from dyncomp.errors import GraphError
from dyncomp.graph import Graph
from dyncomp.regions.partial import ShapeOnly, evaluate, symbolic_shape

aten = torch.ops.aten
_SIZES = {"batch": 2, "sequence": 3, "capacity": 4}


@dataclass(frozen=True, eq=False)
class RMSNorm:
    """``output = input / sqrt(mean(input^2) + epsilon) * scale`` over the last dimension (Zhang and Sennrich, 1910.07467).

    Args:
        scale: [d], whatever the graph computes it from: ``weight``, ``1 + weight`` …
    """

    input: fx.Node
    output: fx.Node
    epsilon: float
    scale: Tensor


def find_rms_norms(graph: Graph) -> list[RMSNorm]:
    """All RMSNorms that are not one node yet, in graph order; none when the weights are on the meta device."""
    if any(t.is_meta for t in graph.constants().values()):
        return []
    shapes = ShapeOnly(graph)
    means = [n for n in graph.nodes if n.op == "call_function" and n.target is aten.mean.dim and n not in shapes and n.users]
    return [norm for mean in means if (norm := _recognise(graph, mean, shapes)) is not None]


def fuse_rms_norms(graph: Graph, *, fold: bool = True) -> list[str]:
    """Replace each by an ``rms_norm`` node; returns where they were.

    Args:
        fold: where the scale is computed from a weight (``1 + weight``), make it a constant; else these are left, for the weight may
            change.
    """
    changed = []
    for norm in find_rms_norms(graph):
        weight = _weight(graph, norm)
        if weight is None and not bool((norm.scale == 1).all()):
            if not fold:
                continue
            name = f"norms.{norm.output.name}"
            graph.add_tensor(name, norm.scale.clone())
            weight = graph.read(name)
        with graph.inserting(before=norm.output) as b:
            fused = b.call(aten.rms_norm.default, norm.input, list(norm.scale.shape), weight, norm.epsilon)
        norm.output.replace_all_uses_with(fused)
        changed.append(norm.output.meta.get("path") or norm.output.name)
    graph.clean()
    return changed


def _recognise(graph: Graph, mean: fx.Node, shapes: ShapeOnly) -> RMSNorm | None:
    square = mean.args[0]
    if not isinstance(square, fx.Node) or square.target not in (aten.pow.Tensor_Scalar, aten.mul.Tensor, aten.square.default):
        return None
    x = square.args[0]
    if not isinstance(x, fx.Node) or not isinstance(x.meta.get("val"), Tensor) or not isinstance(x.meta["val"].shape[-1], int):
        return None
    chain = list(_chain(mean, x, shapes))
    literals = [float(a) for n in chain for a in n.args if isinstance(a, float | int) and 0 < a < 1e-2]
    features = int(x.meta["val"].shape[-1])
    for result in reversed(chain):
        if str(result.meta["val"].shape) != str(x.meta["val"].shape) or result.meta["val"].dtype != x.meta["val"].dtype:
            continue
        try:
            # small enough for epsilon to matter; and so large that it does not, which shows the scale, exactly where that is a power of two
            sample = torch.randn(symbolic_shape(graph, x, _SIZES), generator=torch.Generator().manual_seed(0)) * 1e-2
            (actual,) = evaluate(graph, [result], _SIZES, {x: sample})
            (large,) = evaluate(graph, [result], _SIZES, {x: torch.full_like(sample, 2.0**20)})
        except (GraphError, RuntimeError):
            return None
        scale = large.reshape(-1, features)[0]
        for epsilon in [*literals, 0.0]:
            expected = F.rms_norm(sample, [features], scale, epsilon)
            if torch.allclose(actual, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max())):
                return RMSNorm(x, result, epsilon, scale)
    return None


def _chain(mean: fx.Node, x: fx.Node, shapes: ShapeOnly) -> Iterator[fx.Node]:
    """The nodes after ``mean`` that depend on nothing but ``x`` and constants, as long as there is one way on."""
    node = mean
    for _ in range(10):
        if len(node.users) != 1:
            return
        node = next(iter(node.users))
        casts = node.target in (aten.to.dtype, aten._to_copy.default)
        if node.op != "call_function" or not (casts or torch.Tag.pointwise in getattr(node.target, "tags", ())):
            return
        others = [n for n in node.all_input_nodes if n not in shapes]
        if len(others) > 2 or (len(others) == 2 and x not in others):
            return
        yield node


def _weight(graph: Graph, norm: RMSNorm) -> fx.Node | None:
    """A node that reads the scale, one of the model's own parameters; None where none is equal, or the scale is 1."""
    if bool((norm.scale == 1).all()):
        return None
    for node in _constants_above(norm.output):
        value = graph.tensor(node)
        if value.shape == norm.scale.shape and torch.allclose(value, norm.scale, rtol=1e-6, atol=0):
            return node
    return None


def _constants_above(node: fx.Node) -> Iterator[fx.Node]:
    for _ in range(4):
        yield from (n for n in node.all_input_nodes if n.op == "get_attr")
        node = next((n for n in node.all_input_nodes if n.op == "call_function"), node)
