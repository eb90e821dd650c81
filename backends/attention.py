"""Cached attention in the form that attention operators take: [B, S, H * D], rotary embedding inside, query, key and value side by side."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
from dyncomp.backends.native import unavailable_reason
from torch import Tensor, fx

from dyncomp.errors import BackendError
from dyncomp.graph import Builder, Graph
from dyncomp.ops import cached_attention, gated_linear, rotary, sparse_linear
from dyncomp.quantized import join
from dyncomp.regions.attention import ROUNDED
from dyncomp.regions.partial import ShapeOnly, evaluate, symbolic_shape

aten = torch.ops.aten
CACHED, ROTARY = cached_attention._opoverload, rotary._opoverload
_SPARSE, _GATED = sparse_linear._opoverload, gated_linear._opoverload
MAX_HEAD_DIM = 256
"""Of the native operator."""
_SIZES = {"batch": 2, "sequence": 3, "capacity": 5}


def flatten_attention(
    graph: Graph, node: fx.Node, shapes: ShapeOnly, attend: Callable[..., Any], progress: tuple[fx.Node, ...] = (), *, pairs: int = 1
) -> None:
    """Replace one ``dyncomp.cached_attention``.

    before:  q = rotary(transpose(view(linear(x, Wq)))); k = …; v = …; cached_attention(q, k, v, …) -> transpose -> view
    after:   attend(linear(x, [Wq; Wk; Wv]), None, None, key_cache, value_cache, *progress, cos, sin, heads, scale, window, softcap,
             interleaved) -> (out, caches);  with ``present`` and ``bias`` as the last arguments where there are any

    What does not fit stays outside: a rotary embedding of its own, or separate query, key and value.

    Args:
        progress: how many entries the caches have, as ``attend`` takes it; by default ``past_length``.
        pairs: the rotary embedding goes inside if the pairs it turns are a multiple of this; 0: it stays outside.
    """
    arguments: tuple[Any, ...] = (*node.args, *(0.0, None, None)[len(node.args) - 8 :])
    query, key, value, key_cache, value_cache, past, scale, window, softcap, *optional = arguments
    while optional and optional[-1] is None:
        optional.pop()
    heads, head_dim = (int(query.meta["val"].shape[i]) for i in (1, 3))
    with graph.inserting(before=node) as b:
        turned = query if query.target is ROTARY else None, key if key.target is ROTARY else None
        inside = _same_rotary(*turned, past, pairs)
        heads_first = [n.args[0] if inside and n.target is ROTARY else n for n in (query, key, value)]
        operands: list[Any] = [_flat(graph, b, n, shapes) for n in heads_first]
        packed = _packed(graph, b, operands, shapes)
        tables = turned[0].args[1:3] if inside and turned[0] is not None else (None, None)
        interleaved = bool(inside and turned[0] is not None and turned[0].args[4])
        if packed is not None:
            operands = [packed, None, None]
        result = b.call(
            attend, *operands, key_cache, value_cache, *(progress or (past,)), *tables, heads, scale, window, softcap, interleaved,
            *optional,
        )  # fmt: skip
        flat, *caches = (b.call(operator.getitem, result, i) for i in range(3))
    for user in list(node.users):
        index = int(user.args[1])  # type: ignore[arg-type]
        if index == 0:
            _replace_output(graph, user, flat, heads, head_dim)
        else:
            user.replace_all_uses_with(caches[index - 1])


def _same_rotary(query: fx.Node | None, key: fx.Node | None, past: Any, multiple: int) -> bool:
    """Whether both are rotated by the same tables, R / 2 a multiple of this, at positions past_length + 0, 1, 2 …"""
    if query is None or key is None or query.args[1:] != key.args[1:]:
        return False
    cos, positions = query.args[1], query.args[3]
    assert isinstance(cos, fx.Node)
    assert isinstance(positions, fx.Node)
    if not multiple or cos.meta["val"].shape[1] % multiple or positions.target is not aten.add.Tensor:
        return False
    column, steps = positions.args[:2]
    return (
        isinstance(column, fx.Node) and column.target is aten.unsqueeze.default and column.args[0] is past
        and isinstance(steps, fx.Node) and steps.target is aten.arange.default
    )  # fmt: skip


def _flat(graph: Graph, b: Builder, node: fx.Node, shapes: ShapeOnly) -> fx.Node:
    """``node`` [B, H, S, D] as [B, S, H * D]: what it was made from, if that is only another view of it."""
    heads, head_dim = (int(node.meta["val"].shape[i]) for i in (1, 3))
    current = node
    for _ in range(4):
        inputs = [n for n in current.all_input_nodes if n not in shapes]
        if len(inputs) != 1 or current.op != "call_function" or current.target is operator.getitem:
            break
        current = inputs[0]
        value = current.meta.get("val")
        if not isinstance(value, Tensor) or value.dim() != 3 or value.shape[2] != heads * head_dim:
            continue
        x = torch.randn(symbolic_shape(graph, current, _SIZES))
        (y,) = evaluate(graph, [node], _SIZES, {current: x})
        if y.dim() == 4 and torch.equal(y.transpose(1, 2).flatten(2), x):
            return current
        break
    return b.call(aten.flatten.using_ints, b.call(aten.transpose.int, node, 1, 2), 2)


def _packed(graph: Graph, b: Builder, operands: list[fx.Node], shapes: ShapeOnly) -> fx.Node | None:
    """One node that holds query, key and value side by side, or None."""
    if len(set(operands)) != 3:
        return None
    if all(n.target in (aten.linear.default, _SPARSE) for n in operands):
        return fused_linear(graph, b, operands)
    if operands[0].target is _GATED:
        return _gated_queries(graph, b, *operands)
    sources = {_single_source(n, shapes) for n in operands}
    source = sources.pop()
    if sources or source is None or source.meta["val"].dim() != 3:
        return None
    x = torch.randn(symbolic_shape(graph, source, _SIZES))
    parts = evaluate(graph, operands, _SIZES, {source: x})
    return source if torch.equal(torch.cat(parts, -1), x) else None


def _gated_queries(graph: Graph, b: Builder, query: fx.Node, key: fx.Node, value: fx.Node) -> fx.Node | None:
    """gated_linear(x, gates, Wq), linear(x, Wk), linear(x, Wv) -> gated_queries(x, gates, [Wq; Wk; Wv]), of weights that are quantized:
    their kernel takes the gates."""
    x, gates, *weights = query.args
    rows = int(query.meta["val"].shape[-1])
    if rows % 16 or any(len(n.users) > 1 for n in (query, key, value)):
        return None
    linears = [b.call(aten.linear.default, x, *weights), key, value]
    if any(n.target is not aten.linear.default or str(n.args[1].target) not in graph.quantized for n in linears):  # type: ignore[union-attr]
        return None
    fused = fused_linear(graph, b, linears)
    return None if fused is None else b.call(gated_queries, x, gates, *fused.args[1:], rows)


def gated_queries(x: Tensor, gates: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """A linear layer whose first ``rows`` outputs are those of ``dyncomp::gated_linear``: [B, S, d], [B, S, 1] -> [B, S, N]."""
    y = torch.nn.functional.linear(x, weight, bias)
    return torch.cat([y[..., :rows] * gates, y[..., rows:]], -1)


def _single_source(node: fx.Node, shapes: ShapeOnly) -> fx.Node | None:
    for _ in range(3):
        if node.target not in (operator.getitem, aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default):
            break
        node = node.args[0]  # type: ignore[assignment]
    return node if isinstance(node.meta.get("val"), Tensor) else None


def has_absent_tokens(node: fx.Node) -> bool:
    """Whether a ``dyncomp.cached_attention`` is told which tokens are not attended to."""
    return len(node.args) > 9 and node.args[9] is not None


def has_coded_cache(node: fx.Node) -> bool:
    """Whether a ``dyncomp.cached_attention`` keeps keys and values in int8."""
    return bool(node.args[3].meta["val"].dtype == torch.uint8)  # type: ignore[union-attr]


def require_cached(graph: Graph) -> None:
    """Refuse keys and values that are rounded for a cache which the graph does not have.

    Raises:
        BackendError: names the first.
    """
    for node in graph.nodes:
        if node.target is ROUNDED:
            raise BackendError(
                f"{node.meta.get('path') or node.name}: its keys and values are in int8 (quantize-cache), and the model has no KV cache",
                hint="convert without --kv-cache",
            )


def has_bias(node: fx.Node) -> bool:
    """Whether a ``dyncomp.cached_attention`` adds something to its scores."""
    return len(node.args) > 10 and node.args[10] is not None


def heads_of(node: fx.Node, multiple: int, most: int | None = None) -> bool:
    """Whether a ``dyncomp.cached_attention`` has keys and values of one size that is a multiple of this."""
    key, value = (node.args[i].meta["val"].shape[3] for i in (1, 2))  # type: ignore[union-attr]
    return bool(key == value and key % multiple == 0 and (most is None or key <= most))


def fits_native(node: fx.Node) -> bool:
    """Whether the native operator of :mod:`dyncomp.backends.native` computes a ``dyncomp.cached_attention``."""
    return heads_of(node, 16, MAX_HEAD_DIM)


def require_native(node: fx.Node, native: bool) -> None:
    """Refuse keys and values in int8 that no kernel attends to.

    Raises:
        BackendError: there are no native kernels, or none for heads of this size.
    """
    reason = None
    if not native:
        reason = f"only dyncomp's own kernels read it, and {unavailable_reason() or 'this lowering leaves them out'}"
    elif not fits_native(node):
        key, value = (int(node.args[i].meta["val"].shape[3]) for i in (1, 2))  # type: ignore[union-attr]
        reason = f"keys of {key} and values of {value} features have none: one multiple of 16 up to {MAX_HEAD_DIM} is needed"
    if reason is not None:
        where = node.meta.get("path") or node.name
        raise BackendError(f"{where}: a KV cache in int8: {reason}", hint="convert without --kv-cache")


def turn_bias(graph: Graph, node: fx.Node) -> None:
    """Give a ``dyncomp.cached_attention`` the constant that it adds by distance as the native operator reads it."""
    if not has_bias(node):
        return
    bias = node.args[10]
    assert isinstance(bias, fx.Node)
    name = f"{bias.target}_reaching_back"
    if not graph.reads(name):
        graph.add_tensor(name, reaching_back(graph.tensor(bias)), trainable=False)
    node.update_arg(10, graph.read(name))


def reaching_back(bias: Tensor) -> Tensor:
    """What attention adds by distance [H, P], the farthest first and then as many zeros as the kernel reads keys at once: [H, P + 64]."""
    return torch.nn.functional.pad(bias.flip(1), (0, 64)).contiguous()


def skip_closed(node: fx.Node, gated: Collection[Any]) -> None:
    """Give a native attention the gates under which alone its output is read: what nothing reads need not be computed.

    Args:
        node: a call with the result's parts as its users.
        gated: operators of x and gates that read nothing of x where a gate is 0.
    """
    (out,) = (n for n in node.users if n.args[1] == 0)
    readers = {u.args[1] if u.target in gated and u.args[0] is out else None for u in out.users}
    if len(readers) == 1 and (gates := readers.pop()) is not None:
        node.kwargs = {"gates": gates}


def fused_linear(graph: Graph, b: Builder, linears: list[fx.Node]) -> fx.Node | None:
    """linear(x, Wq), linear(x, Wk), linear(x, Wv) -> linear(x, [Wq; Wk; Wv]); the same for sparse ones with the same thresholds."""
    if len({(n.target, n.args[3:]) for n in linears}) != 1:
        return None
    target: Any = linears[0].target
    arguments = [(*n.args, None)[:3] for n in linears]
    x = arguments[0][0]
    weights: list[Any] = [a[1] for a in arguments]
    biases = [a[2] for a in arguments]
    constant = all(isinstance(w, fx.Node) and w.op == "get_attr" for w in weights)
    if any(a[0] is not x for a in arguments) or not constant or len({bias is None for bias in biases}) != 1:
        return None
    formats = {q.format if (q := graph.quantized.get(str(w.target))) is not None else None for w in weights}
    if len(formats) != 1:
        return None

    def joined(nodes: list[Any]) -> fx.Node:
        name = f"{nodes[0].target}_qkv"
        codes = [graph.quantized[str(n.target)] for n in nodes if str(n.target) in graph.quantized]
        graph.add_tensor(name, torch.cat([graph.tensor(n).detach() for n in nodes]))
        if codes and (together := join(codes)) is not None:
            graph.quantized[name] = together
        active = graph.info.get("active_inputs", {})
        if noted := [active[str(n.target)] for n in nodes if str(n.target) in active]:
            graph.info["active_inputs"] = active | {name: max(noted)}
        return graph.read(name)

    return b.call(target, x, joined(weights), joined(biases) if biases[0] is not None else None, *linears[0].args[3:])


def _replace_output(graph: Graph, out: fx.Node, flat: fx.Node, heads: int, head_dim: int) -> None:
    """Let the users of ``out`` [B, H, S, D] read ``flat`` [B, S, H * D], where a chain of views makes just that of it."""
    current = out
    for _ in range(4):
        if len(current.users) != 1:
            break
        current = next(iter(current.users))
        if not isinstance(value := current.meta.get("val"), Tensor):
            break
        if value.dim() == 3 and value.shape[2] == heads * head_dim:
            x = torch.randn(symbolic_shape(graph, out, _SIZES))
            try:
                (y,) = evaluate(graph, [current], _SIZES, {out: x})
            except Exception:  # the chain needs something else too
                break
            if torch.equal(y, x.transpose(1, 2).flatten(2)):
                current.replace_all_uses_with(flat)
                return
            break
    with graph.inserting(before=out) as b:
        heads_first = b.call(aten.transpose.int, b.call(aten.unflatten.int, flat, 2, [heads, head_dim]), 1, 2)
    out.replace_all_uses_with(heads_first)


def rotate_plainly(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """``dyncomp.rotary`` in ATen."""
    half = cos.shape[1]
    c, s = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    turned, kept = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = turned.unflatten(-1, (half, 2)).unbind(-1)
        return torch.cat([torch.stack([a * c - b * s, b * c + a * s], -1).flatten(-2), kept], -1)
    a, b = turned[..., :half], turned[..., half:]
    return torch.cat([a * c - b * s, b * c + a * s, kept], -1)
