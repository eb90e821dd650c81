"""Name the root-mean-square norms of a graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from dyncomp.errors import GraphError
from dyncomp.graph import Graph
from dyncomp.pipeline import Context, Pass, PassResult
from dyncomp.regions.partial import ShapeOnly, evaluate, symbolic_shape

aten = torch.ops.aten
_SIZES = {"batch": 2, "sequence": 3}


@dataclass(frozen=True)
class FuseNorm(Pass):
    """Every RMSNorm (Zhang and Sennrich, 1910.07467) spelled in primitives becomes one ``rms_norm`` node.

    before:  mul(weight, mul(x, rsqrt(add(mean(pow(x, 2), -1), eps))))
    after:   rms_norm(x, [d], weight, eps)

    The region is recognised by evaluating it, so ``(1 + weight)`` (Gemma), norms without a weight, and any spelling of the
    square and the root are the same to it.
    """

    name = "fuse-norm"
    tolerance = 1e-5

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        shapes, changed = ShapeOnly(graph), []
        if any(t.is_meta for t in graph.constants().values()):
            return PassResult()  # without values a scale cannot be read off
        for mean in graph.nodes:
            if mean.op != "call_function" or mean.target is not aten.mean.dim or mean in shapes or not mean.users:
                continue
            if (norm := _recognise(graph, mean, shapes)) is None:
                continue
            x, result, eps, scale = norm
            weight = _weight(graph, result, scale)
            with graph.inserting(before=result) as b:
                fused = b.call(aten.rms_norm.default, x, list(scale.shape), weight, eps)
            result.replace_all_uses_with(fused)
            changed.append(result.meta.get("path") or result.name)
        graph.clean()
        return PassResult(changed=changed)


def _recognise(graph: Graph, mean: fx.Node, shapes: ShapeOnly) -> tuple[fx.Node, fx.Node, float, Tensor] | None:
    """(input, result, epsilon, scale [d]) of the RMSNorm around a mean, or None."""
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
            sample = torch.randn(symbolic_shape(graph, x, _SIZES), generator=torch.Generator().manual_seed(0)) * 1e-2
            (actual,) = evaluate(graph, [result], _SIZES, {x: sample})
            (huge,) = evaluate(graph, [result], _SIZES, {x: torch.full_like(sample, 1e6)})
        except (GraphError, RuntimeError):
            return None
        scale = huge.reshape(-1, features)[0]
        for eps in [*literals, 0.0]:
            expected = F.rms_norm(sample, [features], scale, eps)
            if torch.allclose(actual, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max())):
                return x, result, eps, scale
    return None


def _chain(mean: fx.Node, x: fx.Node, shapes: ShapeOnly) -> Iterator[fx.Node]:
    """The nodes after ``mean`` that depend on nothing but ``x`` and constants, as long as there is one way on."""
    node = mean
    for _ in range(10):
        if len(node.users) != 1:
            return
        node = next(iter(node.users))
        others = [n for n in node.all_input_nodes if n not in shapes]
        if node.op != "call_function" or torch.Tag.pointwise not in getattr(node.target, "tags", ()) or len(others) > 2:
            if node.target not in (aten.to.dtype, aten._to_copy.default):
                return
        if len(others) == 2 and x not in others:
            return
        yield node


def _weight(graph: Graph, result: fx.Node, scale: Tensor) -> fx.Node | None:
    """A node that reads the scale: the model's own parameter when it is equal, none when the scale is 1."""
    if bool((scale == 1).all()):
        return None
    for node in _constants_above(result):
        value = graph.tensor(node)
        if value.shape == scale.shape and not value.is_meta and torch.allclose(value, scale, rtol=1e-6, atol=0):
            return node
    stem = f"norms.{result.name}"
    graph.add_tensor(stem, scale.clone())
    return graph.read(stem)


def _constants_above(node: fx.Node) -> Iterator[fx.Node]:
    for _ in range(4):
        yield from (n for n in node.all_input_nodes if n.op == "get_attr")
        node = next((n for n in node.all_input_nodes if n.op == "call_function"), node)
