"""Cached attention -> one operator, ours or GroupQueryAttention, with the rotary embedding inside and query, key and value side by side."""

from __future__ import annotations

import operator
from typing import Any

import torch
from dyncomp.backends.ort import ops
from torch import Tensor, fx

from dyncomp.graph import Builder, Graph
from dyncomp.ops import cached_attention, rotary
from dyncomp.quantized import join
from dyncomp.regions.partial import ShapeOnly, evaluate, symbolic_shape

aten = torch.ops.aten
_CACHED, _ROTARY = cached_attention._opoverload, rotary._opoverload
_SIZES = {"batch": 2, "sequence": 3, "capacity": 5}
_MAX_HEAD_DIM = 256  # of the native operator


def select_attention(graph: Graph, *, native: bool) -> None:
    """Lower every ``dyncomp.cached_attention`` and what is left of ``dyncomp.rotary``.

    before:  q = rotary(transpose(view(linear(x, Wq)))); k = …; v = …; cached_attention(q, k, v, …) -> transpose -> view
    after:   group_query_attention(linear(x, [Wq; Wk; Wv]), …), or the native operator where it fits
    """
    shapes = ShapeOnly(graph)
    lengths: tuple[fx.Node, fx.Node] | None = None
    for node in graph.nodes:
        if node.target is not _CACHED:
            continue
        if native and _fits(node, 16, _MAX_HEAD_DIM):
            _select_one(graph, node, shapes, None)
        elif _fits(node, 8):
            lengths = lengths or _lengths(graph, node)
            _select_one(graph, node, shapes, lengths)
        else:
            node.target = attend_plainly
    graph.clean()
    for node in graph.nodes:
        if node.target is _ROTARY:
            node.target = rotate_plainly


def _fits(node: fx.Node, multiple: int, most: int | None = None) -> bool:
    """Both operators need a head size that is a multiple of something, the same for keys and values."""
    key, value = (node.args[i].meta["val"].shape[3] for i in (3, 4))  # type: ignore[union-attr]
    return bool(key == value and key % multiple == 0 and (most is None or key <= most))


def _lengths(graph: Graph, node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """(entries of each row after this step - 1, the largest + 1), shared by all layers."""
    past = node.args[5]
    assert isinstance(past, fx.Node)
    anchor = next(n for n in graph.nodes if n.op not in ("get_attr", "placeholder"))
    with graph.inserting(before=anchor) as b:
        size = b.call(aten.sym_size.int, graph.placeholders[0], 1)
        after = b.call(aten.add.Tensor, past, size)
        lengths = b.call(aten._to_copy.default, b.call(aten.sub.Tensor, after, 1), dtype=torch.int32)
        total = b.call(aten._to_copy.default, b.call(aten.amax.default, after, [0]), dtype=torch.int32)
    return lengths, total


def _select_one(graph: Graph, node: fx.Node, shapes: ShapeOnly, lengths: tuple[fx.Node, fx.Node] | None) -> None:
    """With ``lengths`` GroupQueryAttention, without the native operator."""
    arguments: tuple[Any, ...] = (*node.args, 0.0)
    query, key, value, key_cache, value_cache, past, scale, window, softcap = arguments[:9]
    heads, head_dim = (int(query.meta["val"].shape[i]) for i in (1, 3))
    with graph.inserting(before=node) as b:
        turned = query if query.target is _ROTARY else None, key if key.target is _ROTARY else None
        inside = head_dim % 16 == 0 and _same_rotary(*turned, past, 8 if lengths else 1)
        heads_first = [n.args[0] if inside and n.target is _ROTARY else n for n in (query, key, value)]
        operands: list[Any] = [_flat(graph, b, n, shapes) for n in heads_first]
        packed = _packed(graph, b, operands, shapes)
        tables = turned[0].args[1:3] if inside and turned[0] is not None else (None, None)
        interleaved = bool(inside and turned[0] is not None and turned[0].args[4])
        if packed is not None:
            operands = [packed, None, None]
        attend, progress = (ops.group_query_attention, lengths) if lengths else (ops.cached_attention, (past,))
        result = b.call(attend, *operands, key_cache, value_cache, *progress, *tables, heads, scale, window, softcap, interleaved)
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
    if cos.meta["val"].shape[1] % multiple or positions.target is not aten.add.Tensor:
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
    if all(n.target is aten.linear.default for n in operands):
        return _fused_linear(graph, b, operands)
    sources = {_single_source(n, shapes) for n in operands}
    source = sources.pop()
    if sources or source is None or source.meta["val"].dim() != 3:
        return None
    x = torch.randn(symbolic_shape(graph, source, _SIZES))
    parts = evaluate(graph, operands, _SIZES, {source: x})
    return source if torch.equal(torch.cat(parts, -1), x) else None


def _single_source(node: fx.Node, shapes: ShapeOnly) -> fx.Node | None:
    for _ in range(3):
        if node.target not in (operator.getitem, aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default):
            break
        node = node.args[0]  # type: ignore[assignment]
    return node if isinstance(node.meta.get("val"), Tensor) else None


def _fused_linear(graph: Graph, b: Builder, linears: list[fx.Node]) -> fx.Node | None:
    """linear(x, Wq), linear(x, Wk), linear(x, Wv) -> linear(x, [Wq; Wk; Wv])."""
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
        return graph.read(name)

    return b.call(aten.linear.default, x, joined(weights), joined(biases) if biases[0] is not None else None)


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


def attend_plainly(
    q: Tensor, k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, past_length: Tensor, scale: float, window: int,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``dyncomp.cached_attention`` in ATen, over the whole capacity: for head sizes GroupQueryAttention does not take."""
    batch, heads, length, _ = q.shape
    kv_heads, capacity = key_cache.shape[1], key_cache.shape[2]
    positions = past_length[:, None] + torch.arange(length)  # [B, S]
    slot = positions[:, None, :, None]
    key_cache = key_cache.scatter(2, slot.expand(-1, kv_heads, -1, k.shape[3]), k)
    value_cache = value_cache.scatter(2, slot.expand(-1, kv_heads, -1, v.shape[3]), v)
    entry = torch.arange(capacity)
    visible = entry <= positions[..., None]  # [B, S, C]
    if window:
        visible = visible & (entry > positions[..., None] - window)
    grouped = q.reshape(batch, kv_heads, heads // kv_heads * length, q.shape[3])  # heads of a group, one after the other
    scores = (grouped @ key_cache.transpose(2, 3)).reshape(batch, heads, length, capacity) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.where(visible[:, None], scores, -1e30).softmax(-1)
    out = weights.reshape(batch, kv_heads, heads // kv_heads * length, capacity) @ value_cache
    return out.reshape(batch, heads, length, v.shape[3]), key_cache, value_cache
