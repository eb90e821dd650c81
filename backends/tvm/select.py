"""Rewrite a graph so that it calls our kernels, on weights laid out for them."""

from __future__ import annotations

from typing import Any

import torch
from dyncomp.backends.attention import (
    CACHED,
    ROTARY,
    fits_native,
    flatten_attention,
    has_absent_tokens,
    has_coded_cache,
    require_cached,
    require_native,
    rotate_plainly,
    skip_closed,
    turn_bias,
)
from dyncomp.backends.native.select import join_stand_ins, select_quantized_ffns, select_quantized_linears
from dyncomp.backends.native.sparse import select_sparse_ffns, select_sparse_linears
from dyncomp.backends.tvm import ops
from dyncomp.backends.tvm.kernels.functions import FUNCTIONS as ACTIVATIONS
from dyncomp.backends.tvm.kernels.tile import Tile, pack, pack_experts, pad_rows
from dyncomp.backends.tvm.patches import select_patches
from dyncomp.backends.tvm.shapes import FFNShape, LinearShape, Tiles
from torch import fx

from dyncomp.errors import BackendError
from dyncomp.graph import Graph
from dyncomp.ops import gated_linear
from dyncomp.regions.norm import fuse_rms_norms
from dyncomp.regions.partial import ShapeOnly
from dyncomp.regions.routed import find_routed

aten = torch.ops.aten
GATED = gated_linear._opoverload


def select(graph: Graph, tiles: Tiles) -> Graph:
    """A copy of ``graph`` that calls the operators of :mod:`dyncomp.backends.tvm.ops`; for export only."""
    graph, native = graph.copy(), takes_native(graph)
    fuse_rms_norms(graph)
    if any("val" not in n.meta for n in graph.nodes if n.op != "output"):
        graph.infer_shapes()
    select_sparse_ffns(graph, ops)
    select_quantized_ffns(graph, ops)
    select_attention(graph, native=native)
    select_positions(graph)
    select_norms(graph)
    select_patches(graph)
    select_experts(graph, tiles)
    select_sparse_linears(graph, ops)
    select_quantized_linears(graph, ops, gated=True)
    join_stand_ins(graph, ops)
    select_linears(graph, tiles)
    select_gated(graph, tiles.default)
    graph.clean()
    require_no_quantized(graph)
    return graph


def require_no_quantized(graph: Graph) -> None:
    """Refuse what would compute with the decoded floats of a quantized weight.

    Raises:
        BackendError: names the first.
    """
    for node in graph.nodes:
        if node.op == "get_attr" and str(node.target) in graph.quantized:
            user = next(iter(node.users))
            where = user.meta.get("path") or user.name
            raise BackendError(f"{where}: {user.target} has no kernel for quantized weights ({node.target})", hint="use --backend ort")


def select_attention(graph: Graph, *, native: bool) -> None:
    """Every ``dyncomp.cached_attention``: by the native operator where an artifact has the native library anyway, whose kernel for prompts
    is the faster one; else by a kernel of TVM's own."""
    require_cached(graph)
    shapes = ShapeOnly(graph)
    for node in graph.nodes:
        if node.target is not CACHED:
            continue
        key, value = (int(node.args[i].meta["val"].shape[3]) for i in (3, 4))  # type: ignore[union-attr]
        where = node.meta.get("path") or node.name
        if has_coded_cache(node):
            require_native(node, native)
        if key != value:
            raise BackendError(
                f"{where}: attention with keys of {key} and values of {value} features has no TVM kernel", hint="use --backend ort"
            )
        if has_absent_tokens(node):
            raise BackendError(
                f"{where}: attention from which tokens are absent has no TVM kernel", hint="use --backend ort, or kv=compute"
            )
        if native and fits_native(node):
            turn_bias(graph, node)
            flatten_attention(graph, node, shapes, ops.native_attention)
        else:
            flatten_attention(graph, node, shapes, ops.cached_attention)
    graph.clean()
    for node in graph.nodes:
        if node.target is ops.native_attention:
            skip_closed(node, {GATED})
        elif node.target is ROTARY:
            node.target = rotate_plainly


def takes_native(graph: Graph) -> bool:
    """Whether something in the graph has native kernels alone: weights in few bits, or a KV cache in int8."""
    return bool(graph.quantized) or any(n.target is CACHED and has_coded_cache(n) for n in graph.nodes)


def select_positions(graph: Graph) -> None:
    """Constant positions counted from the end become positions from the start: TVM would read what lies before the tensor."""
    for node in graph.nodes:
        arguments: list[Any] = list(node.args)
        if node.target is aten.select.int and arguments[2] < 0:
            arguments[2] += _size(node, arguments[1])
        elif node.target is aten.index.Tensor:
            indices = list(arguments[1])
            for axis, index in enumerate(indices):
                if index is not None and index.op == "get_attr" and bool((graph.tensor(index) < 0).any()):
                    size, value = _size(node, axis), graph.tensor(index)
                    indices[axis] = _derived(graph, f"{index.target}_of_{size}", lambda v=value, n=size: v % n)
            arguments[1] = indices
        else:
            continue
        node.args = tuple(arguments)


def _size(node: fx.Node, axis: int) -> int:
    """Of the tensor that ``node`` takes something from."""
    size = node.args[0].meta["val"].shape[axis]  # type: ignore[union-attr]
    if not isinstance(size, int):
        where = node.meta.get("path") or node.name
        raise BackendError(f"{where}: TVM cannot count from the end of a dimension whose size varies", hint="use --backend ort")
    return size


def select_norms(graph: Graph) -> None:
    """``rms_norm`` and ``layer_norm`` over the last dimension."""
    for node in graph.nodes:
        if node.target is aten.rms_norm.default:
            x, shape, scale, epsilon, shift, centered = (*_padded(node, 4), None, False)
        elif node.target is aten.layer_norm.default:
            x, shape, scale, shift, epsilon, centered = (*_padded(node, 5), True)
        else:
            continue
        if len(shape) != 1 or x.meta["val"].dtype != torch.float32:
            continue
        if epsilon is None:
            epsilon = 1e-5 if centered else torch.finfo(torch.float32).eps
        with graph.inserting(before=node) as b:
            scale = scale if scale is not None else _filled(graph, 1.0, shape[0])
            shift = shift if shift is not None else _filled(graph, 0.0, shape[0])
            made = b.call(ops.norm, x, scale, shift, float(epsilon), centered)
        node.replace_all_uses_with(made)
        graph.module.graph.erase_node(node)


def select_experts(graph: Graph, tiles: Tiles) -> None:
    """``dyncomp.routed_ffn`` on constant weights."""
    for routed in find_routed(graph):
        if routed.activation not in ACTIVATIONS:
            what = f"experts with the activation {routed.activation!r} have no TVM kernel"
            raise BackendError(f"{routed.name}: {what} (there are {', '.join(ACTIVATIONS)})", hint="use --backend ort")
        w_up, w_down = graph.tensor(routed.w_up).detach(), graph.tensor(routed.w_down).detach()
        b_up = None if routed.b_up is None else graph.tensor(routed.b_up).detach()
        names = [f"{routed.w_up}_panels", f"{routed.w_up}_bias_panels", f"{routed.w_down}_panels"]
        neurons, rest = routed.d_ff // routed.experts, (routed.d_out, routed.activation, routed.gated)
        tile = tiles.of(FFNShape(routed.experts, neurons, w_up.shape[-1], *rest))
        for name, value in zip(names, pack_experts(w_up, b_up, w_down, tile), strict=True):
            graph.add_tensor(name, value)
        operands = (routed.input, routed.gates, *(graph.read(n) for n in names))
        with graph.inserting(before=routed.node) as b:
            made = b.call(ops.routed_ffn, *operands, neurons, *rest)
        routed.node.replace_all_uses_with(made)
        graph.module.graph.erase_node(routed.node)


def select_linears(graph: Graph, tiles: Tiles) -> None:
    """``linear(x, W, b)`` on a constant float32 weight."""
    for node in graph.nodes:
        if node.target is not aten.linear.default:
            continue
        x, weight, bias = _padded(node, 3)
        if not isinstance(weight, fx.Node) or weight.op != "get_attr" or weight.meta["val"].dtype != torch.float32:
            continue
        rows, depth = (int(size) for size in graph.tensor(weight).shape)
        tile = tiles.of(LinearShape(rows, depth))
        with graph.inserting(before=node) as b:
            packed = _derived(graph, f"{weight.target}.panels", lambda w=weight, t=tile: pack(graph.tensor(w).detach(), t))
            if bias is None:
                padded = _filled(graph, 0.0, tile.panels(rows) * tile.width)
            else:
                name = f"{bias.target}.panels{tile.width}"
                padded = _derived(graph, name, lambda v=bias, t=tile: pad_rows(graph.tensor(v).detach(), t))
            made = b.call(ops.linear, x, packed, padded, rows)
        node.replace_all_uses_with(made)
        graph.module.graph.erase_node(node)


def select_gated(graph: Graph, tile: Tile) -> None:
    """``dyncomp.gated_linear`` on a constant weight that is not quantized (those are the native operators')."""
    for node in graph.nodes:
        if node.target is not GATED:
            continue
        x, gates, weight, bias = _padded(node, 4)
        if not isinstance(weight, fx.Node) or weight.op != "get_attr" or str(weight.target) in graph.quantized:
            continue
        value = graph.tensor(weight).detach()
        shift = torch.zeros(len(value)) if bias is None else graph.tensor(bias).detach()
        with graph.inserting(before=node) as b:
            packed = _derived(graph, f"{weight.target}_gated_panels", lambda v=value: pack(v, tile))
            padded = _derived(graph, f"{weight.target}_gated_bias_panels", lambda v=shift: pad_rows(v, tile))
            made = b.call(ops.gated_linear, x, gates, packed, padded, len(value))
        node.replace_all_uses_with(made)
        graph.module.graph.erase_node(node)


def _padded(node: fx.Node, count: int) -> list[Any]:
    """The first positional arguments, None for those left out."""
    return [*node.args, *[None] * count][:count]


def _filled(graph: Graph, value: float, size: int) -> fx.Node:
    return _derived(graph, f"filled.{value:.0f}_{size}", lambda: torch.full((size,), value))


def _derived(graph: Graph, name: str, make: Any) -> fx.Node:
    """A node that reads the constant ``name``, made when it does not exist."""
    name = name.replace(".panels", "_panels")
    if not graph.reads(name):
        graph.add_tensor(name, make())
    return graph.read(name)
