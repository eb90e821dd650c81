"""Floating-point operations of single nodes: two per multiply-accumulate. Each operation has its formula here."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

import dyncomp.ops  # noqa: F401  (registers the operations counted here)
from dyncomp.graph import Graph
from dyncomp.regions.linear import aten, sizes


class Sizes:
    """Shapes with the dynamic dimensions at given sizes."""

    def __init__(self, graph: Graph, batch: int, sequence: int) -> None:
        self.graph = graph
        names = graph.dimension_names()
        self._values = {symbol: batch if name == "batch" else sequence for symbol, name in names.items()}

    def __call__(self, node: Any) -> tuple[int, ...]:
        return tuple(self._number(size) for size in sizes(node) or ())

    def _number(self, size: Any) -> int:
        if isinstance(size, int):
            return size
        return int(size.subs({symbol: self._values.get(str(symbol), 1) for symbol in size.free_symbols}))

    def tokens(self) -> int:
        spec, node = self.graph.inputs[0], self.graph.placeholders[0]
        shape = self(node)
        if not spec.dtype.is_floating_point:
            return math.prod(shape)
        return math.prod(size for size, dim in zip(shape, spec.shape, strict=True) if isinstance(dim, str))


def _product(node: fx.Node, size: Sizes, left: int = 0) -> float:
    """[…, m, k] @ [k, n]."""
    return 2.0 * math.prod(size(node)) * size(node.args[left])[-1]


def _einsum(node: fx.Node, size: Sizes) -> float:
    """Two per combination of all letters (an ellipsis counts its dimensions)."""
    terms = str(node.args[0]).replace(" ", "").split("->")[0].split(",")
    letters: dict[str, int] = {}
    rest = 1
    for term, operand in zip(terms, node.args[1], strict=True):  # type: ignore[arg-type]
        shape = list(size(operand))
        if "..." in term:
            before, after = term.split("...")
            middle = shape[len(before) : len(shape) - len(after)]
            rest = max(rest, math.prod(middle))
            shape = [*shape[: len(before)], *shape[len(shape) - len(after) :]]
            term = before + after
        letters.update(zip(term, shape, strict=True))
    return 2.0 * math.prod(letters.values()) * rest


def _convolution(node: fx.Node, size: Sizes) -> float:
    weight = size(node.args[1])  # [out, in / groups, kernel…]
    return 2.0 * math.prod(size(node)) * math.prod(weight[1:])


def _attention(node: fx.Node, size: Sizes) -> float:
    """Scores and weighted values: q [B, H, S, D], k [B, Hkv, T, D], v [B, Hkv, T, Dv]."""
    q, k, v = (size(n) for n in node.args[:3])
    return 2.0 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def _cached_attention(node: fx.Node, size: Sizes) -> float:
    """As :func:`_attention`, every query over as many keys as there are new tokens: the cache counted as empty."""
    q, v = size(node.args[0]), size(node.args[2])
    return 2.0 * math.prod(q[:-1]) * q[-2] * (q[-1] + v[-1])


def _routed(node: fx.Node, size: Sizes) -> float:
    """Every expert for every token."""
    x, w_up, w_down = (size(node.args[i]) for i in (0, 2, 4))
    return 2.0 * math.prod(x[:-1]) * (math.prod(w_up) + math.prod(w_down))


FLOPS: dict[Any, Callable[[fx.Node, Sizes], float]] = {
    aten.linear.default: _product,
    aten.mm.default: _product,
    aten.bmm.default: _product,
    aten.matmul.default: _product,
    aten.addmm.default: lambda node, size: _product(node, size, left=1),
    aten.baddbmm.default: lambda node, size: _product(node, size, left=1),
    aten.einsum.default: _einsum,
    aten.conv1d.default: _convolution,
    aten.conv2d.default: _convolution,
    aten.convolution.default: _convolution,
    aten._grouped_mm.default: _product,
    aten.scaled_dot_product_attention.default: _attention,
    torch.ops.dyncomp.cached_attention.default: _cached_attention,
    torch.ops.dyncomp.routed_ffn.default: _routed,
    torch.ops.dyncomp.sparse_linear.default: _product,
    torch.ops.dyncomp.gated_linear.default: _product,
}
