"""Naming an activation by what it does: the hidden layer is run on random numbers and compared with the known functions.

No spelling has to be known: a GELU written out, a fused and interleaved gate, a squared ReLU all look alike here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from dyncomp.activations import ACTIVATIONS
from dyncomp.graph import Graph
from dyncomp.regions.hidden import SLICES, SPLITS
from dyncomp.regions.linear import NO_OPS, RESHAPES, TRANSPOSES, Linear, aten

Halves = Callable[[Tensor], tuple[Tensor, Tensor]]

LAYOUTS: dict[str, Halves] = {
    "gate|up": lambda h: (h[..., : h.shape[-1] // 2], h[..., h.shape[-1] // 2 :]),
    "up|gate": lambda h: (h[..., h.shape[-1] // 2 :], h[..., : h.shape[-1] // 2]),
    "gate,up interleaved": lambda h: (h[..., 0::2], h[..., 1::2]),
    "up,gate interleaved": lambda h: (h[..., 1::2], h[..., 0::2]),
}
"""Layouts of a fused up-projection: features -> (those through the activation, those it is multiplied with)."""


@dataclass(frozen=True)
class Activation:
    """What a hidden layer computes: its up-projections with the one under the activation first."""

    name: str
    gated: bool
    layout: str
    ups: tuple[Linear, ...]


class CannotEvaluate(Exception):
    """The hidden layer needs a value that is not there (a constant on the meta device, a graph input)."""


def recognise(graph: Graph, ups: list[Linear], down: Linear) -> Activation | None:
    """The activation between ``ups`` and ``down``, or None if it is not one we know.

    Raises:
        CannotEvaluate: the hidden layer cannot be run.
    """
    rows = max(1, 2048 // down.in_features)
    generator = torch.Generator().manual_seed(0)
    values = {up.node: _probe_values(rows, up.out_features, generator) for up in ups}
    result = _evaluate(graph, down.input, dict(values))
    if not isinstance(result, Tensor) or result.shape != (rows, down.in_features):
        return None

    def matches(candidate: Tensor) -> bool:
        return candidate.shape == result.shape and torch.allclose(candidate, result, rtol=1e-5, atol=1e-6)

    if len(ups) == 1:
        h = values[ups[0].node]
        for name, function in ACTIVATIONS.items():
            if matches(function(h)):
                return Activation(name, False, "plain", (ups[0],))
        if h.shape[-1] == 2 * result.shape[-1]:
            for layout, halves in LAYOUTS.items():
                gate, up = halves(h)
                for name, function in ACTIVATIONS.items():
                    if matches(function(gate) * up):
                        return Activation(name, True, layout, (ups[0],))
    if len(ups) == 2 and ups[0].out_features == ups[1].out_features:
        for first, second in (ups, ups[::-1]):
            for name, function in ACTIVATIONS.items():
                if matches(function(values[first.node]) * values[second.node]):
                    return Activation(name, True, "separate", (first, second))
    return None


def _probe_values(rows: int, features: int, generator: torch.Generator) -> Tensor:
    """[rows, features] float64: mostly where activations bend, some far out, where clipped ones differ."""
    values = torch.randn(rows, features, generator=generator, dtype=torch.float64) * 2.5
    values[:, ::8] *= 6
    return values


def _evaluate(graph: Graph, target: fx.Node, known: dict[fx.Node, Any]) -> Any:
    """The value of ``target`` on features-last [rows, features] tensors: what only moves tokens about does nothing here."""

    def value(argument: Any) -> Any:
        if not isinstance(argument, fx.Node):
            return argument
        if argument not in known:
            known[argument] = compute(argument)
        return known[argument]

    def compute(node: fx.Node) -> Any:
        op, args = node.target, node.args
        if node.op == "get_attr":
            tensor = graph.tensor(node).detach()
            if tensor.is_meta:
                raise CannotEvaluate(f"the constant {node.target!r} has no value here")
            return tensor
        if node.op != "call_function":
            raise CannotEvaluate(f"it reads {node.name!r}")
        if op in NO_OPS or op in RESHAPES or op in TRANSPOSES:
            return value(args[0])
        if op is operator.getitem:
            return value(args[0])[args[1]]
        if op in SPLITS:
            return op(value(args[0]), args[1], -1)
        if op in SLICES:
            return op(value(args[0]), -1, *args[2:])
        if op is aten.glu.default:
            return op(value(args[0]), -1)
        return op(*fx.map_arg(args, value), **fx.map_arg(node.kwargs, value))  # type: ignore[operator]

    try:
        return value(target)
    except CannotEvaluate:
        raise
    except Exception as error:
        raise CannotEvaluate(f"running it failed: {error}") from error
