"""Rotary position embedding (Su et al., 2104.09864), recognised by evaluation: rotate-half or interleaved, whole or partial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from dyncomp.graph import Graph
from dyncomp.ops import rotary
from dyncomp.regions.partial import ShapeOnly, dominator, evaluate, symbolic_shape

_SIZES = {"batch": 2, "sequence": 5}


@dataclass(frozen=True, eq=False)
class Rotary:
    """A region that turns pairs of features by an angle that depends on the position only.

    Args:
        source: what is rotated, [B, H, S, D].
        result: the rotated node, same shape.
        rotated: R, the first R of the D features are rotated.
        interleaved: pairs are (0, 1), (2, 3) …; otherwise (0, R/2), (1, R/2 + 1) …
        inputs: the nodes through which the positions come in; they depend on shapes only.
    """

    source: fx.Node
    result: fx.Node
    rotated: int
    interleaved: bool
    inputs: tuple[fx.Node, ...] = field(default=())


def find_rotary(graph: Graph, node: fx.Node, order: Mapping[fx.Node, int], shapes: ShapeOnly) -> Rotary | None:
    """The rotary embedding that ends at ``node`` [B, H, S, D], or before it with only scaling or views between; else None."""
    result: fx.Node | None = node
    for _ in range(6):
        if result is None or result.op != "call_function" or not _is_heads(result):
            return None
        source = dominator(result, order, shapes)
        if source is None:
            return None
        inputs = boundary(result, source, shapes)
        if inputs and _is_heads(source) and source.meta["val"].shape[1:] == result.meta["val"].shape[1:]:
            found = _recognise(graph, source, result, inputs)
            if found is not None:
                return found
        result = source
    return None


def rotary_tables(graph: Graph, region: Rotary, length: int, chunk: int = 512) -> tuple[Tensor, Tensor]:
    """The tables of the region for positions 0 … length - 1: cos, sin [length, R / 2]."""
    tables = evaluate(graph, region.inputs, {"batch": 1, "sequence": length})
    axes = [_sequence_axis(graph, n) for n in region.inputs]
    pieces = []
    for start in range(0, length, chunk):
        size = min(chunk, length - start)
        given = {n: t.narrow(a, start, size) if a is not None else t for n, t, a in zip(region.inputs, tables, axes, strict=True)}
        pieces.append(_read_tables(graph, region, {"batch": 1, "sequence": size}, given))
    return torch.cat([c for c, _ in pieces]), torch.cat([s for _, s in pieces])


def boundary(result: fx.Node, source: fx.Node, shapes: ShapeOnly) -> tuple[fx.Node, ...]:
    """The size-dependent tensors that enter the region between ``source`` and ``result``."""
    found: dict[fx.Node, None] = {}
    seen, stack = {source}, [result]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in shapes:
            if node in shapes.varying and isinstance(node.meta.get("val"), Tensor):
                found[node] = None
            continue
        stack.extend(node.all_input_nodes)
    return tuple(found)


def _is_heads(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() == 4 and isinstance(value.shape[1], int) and isinstance(value.shape[3], int)


def _sequence_axis(graph: Graph, node: fx.Node) -> int | None:
    short, long = (symbolic_shape(graph, node, {"batch": 2, "sequence": s}) for s in (5, 6))
    return next((i for i, (a, b) in enumerate(zip(short, long, strict=True)) if a != b), None)


def _recognise(graph: Graph, source: fx.Node, result: fx.Node, inputs: Sequence[fx.Node]) -> Rotary | None:
    head_dim = int(source.meta["val"].shape[3])
    widths = {int(t.meta["val"].shape[-1]) for t in inputs if t.meta["val"].dim() and isinstance(t.meta["val"].shape[-1], int)}
    candidates = sorted({w for n in widths for w in (n, 2 * n) if w % 2 == 0 and 0 < w <= head_dim})
    x = torch.randn(symbolic_shape(graph, source, _SIZES), generator=torch.Generator().manual_seed(0))
    try:
        (expected,) = evaluate(graph, [result], _SIZES, {source: x})
    except Exception:  # the region cannot be run on its own: it is something else
        return None
    if expected.shape != x.shape:
        return None
    positions = torch.arange(x.shape[2]).expand(x.shape[0], -1)
    for rotated in candidates:
        for interleaved in (False, True):
            region = Rotary(source, result, rotated, interleaved, tuple(inputs))
            cos, sin = _read_tables(graph, region, _SIZES, {})
            if torch.allclose(rotary(x, cos, sin, positions, interleaved), expected, rtol=1e-5, atol=1e-5) and sin.abs().max() > 0:
                return region
    return None


def _read_tables(graph: Graph, region: Rotary, sizes: Mapping[str, int], given: Mapping[fx.Node, Tensor]) -> tuple[Tensor, Tensor]:
    """Read cos and sin off the region: the first feature of each pair at 1, the second at 0 gives (cos, sin)."""
    x = torch.zeros(symbolic_shape(graph, region.source, sizes))
    half = region.rotated // 2
    if region.interleaved:
        x[..., 0 : region.rotated : 2] = 1
    else:
        x[..., :half] = 1
    (y,) = evaluate(graph, [region.result], sizes, {**given, region.source: x})
    turned = y[0, 0, :, : region.rotated]  # [S, R]
    cos, sin = (turned[:, 0::2], turned[:, 1::2]) if region.interleaved else (turned[:, :half], turned[:, half:])
    return cos.contiguous(), sin.contiguous()
