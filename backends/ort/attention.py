"""Cached attention -> one operator, ours or GroupQueryAttention, with the rotary embedding inside and query, key and value side by side."""

from __future__ import annotations

from typing import Any

import torch
from dyncomp.backends.attention import (
    CACHED,
    ROTARY,
    fits_native,
    flatten_attention,
    has_absent_tokens,
    has_bias,
    has_coded_cache,
    heads_of,
    require_cached,
    require_native,
    rotate_plainly,
    skip_closed,
    turn_bias,
)
from dyncomp.backends.ort import cuda, ops
from torch import Tensor, fx

from dyncomp.graph import Graph
from dyncomp.ops import append_cache, gated_linear, key_mask, key_mask_reference, sequence_scores, sequence_scores_reference
from dyncomp.regions.partial import ShapeOnly

aten = torch.ops.aten
_GATED = {gated_linear._opoverload, ops.take_rows}


def select_attention(graph: Graph, *, native: bool, on_gpu: bool = False) -> None:
    """Lower every ``dyncomp.cached_attention``, and the operations around attention that are plain ATen.

    before:  q = rotary(transpose(view(linear(x, Wq)))); k = …; v = …; cached_attention(q, k, v, …) -> transpose -> view
    after:   group_query_attention(linear(x, [Wq; Wk; Wv]), …), or the native operator where it fits
    """
    require_cached(graph)
    shapes = ShapeOnly(graph)
    lengths: tuple[fx.Node, fx.Node] | None = None
    for node in graph.nodes:
        if node.target is not CACHED:
            continue
        if has_coded_cache(node):
            require_native(node, native)
        if native and fits_native(node):
            turn_bias(graph, node)
            flatten_attention(graph, node, shapes, ops.cached_attention)
        elif heads_of(node, 8) and not has_absent_tokens(node) and not has_bias(node) and (not on_gpu or cuda.halve_caches(graph, node)):
            lengths = lengths or _lengths(graph, node)
            attend = cuda.group_query_attention if on_gpu else ops.group_query_attention
            flatten_attention(graph, node, shapes, attend, lengths, pairs=8 if heads_of(node, 16) else 0)
        else:
            node.target = attend_plainly
    graph.clean()
    for node in graph.nodes:
        if node.target is ops.cached_attention:
            skip_closed(node, _GATED)
        node.target = _PLAIN.get(node.target, node.target)


def _lengths(graph: Graph, node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """(entries of each row after this step - 1, the largest + 1), shared by all layers."""
    past = node.args[5]
    assert isinstance(past, fx.Node)
    with graph.inserting(before=node, path="") as b:
        size = b.call(aten.sym_size.int, graph.placeholders[0], 1)
        after = b.call(aten.add.Tensor, past, size)
        lengths = b.call(aten._to_copy.default, b.call(aten.sub.Tensor, after, 1), dtype=torch.int32)
        total = b.call(aten._to_copy.default, b.call(aten.amax.default, after, [0]), dtype=torch.int32)
    return lengths, total


def append_plainly(cache: Tensor, new: Tensor, past_length: Tensor) -> Tensor:
    """``dyncomp.append_cache`` in ATen."""
    slot = (past_length[:, None] + torch.arange(new.shape[2]))[:, None, :, None]
    return cache.scatter(2, slot.expand(-1, new.shape[1], -1, new.shape[3]), new)


def attend_plainly(
    q: Tensor, k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, past_length: Tensor, scale: float, window: int,
    softcap: float = 0.0, present: Tensor | None = None, bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``dyncomp.cached_attention`` in ATen, over the whole capacity: for head sizes, absent tokens or biases that GroupQueryAttention has
    not. (A new token that is absent gets what the others give it: nothing reads it.)"""
    batch, heads, length, _ = q.shape
    kv_heads, capacity = key_cache.shape[1], key_cache.shape[2]
    positions = past_length[:, None] + torch.arange(length)  # [B, S]
    key_cache, value_cache = append_plainly(key_cache, k, past_length), append_plainly(value_cache, v, past_length)
    entry = torch.arange(capacity)
    visible = entry <= positions[..., None]  # [B, S, C]
    if window:
        visible = visible & (entry > positions[..., None] - window)
    if present is not None:
        visible = visible & (present[:, :, :, 0] != 0)
    grouped = q.reshape(batch, kv_heads, heads // kv_heads * length, q.shape[3])  # heads of a group, one after the other
    scores = (grouped @ key_cache.transpose(2, 3)).reshape(batch, heads, length, capacity) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        distance = (positions[..., None] - entry).clamp_min(0)  # [B, S, C]
        scores = scores + bias[:, distance].transpose(0, 1)
    weights = torch.where(visible[:, None], scores, -1e30).softmax(-1)
    out = weights.reshape(batch, kv_heads, heads // kv_heads * length, capacity) @ value_cache
    return out.reshape(batch, heads, length, v.shape[3]), key_cache, value_cache


_PLAIN: dict[Any, Any] = {
    ROTARY: rotate_plainly, append_cache._opoverload: append_plainly, key_mask._opoverload: key_mask_reference,
    sequence_scores._opoverload: sequence_scores_reference,
}  # fmt: skip
