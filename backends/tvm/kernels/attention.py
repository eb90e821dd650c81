"""Causal attention over a KV cache, for prefill and decode, with the rotary embedding inside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dyncomp.backends.tvm.kernels.flash import HIDDEN, KEYS, flash
from dyncomp.backends.tvm.kernels.functions import tanh
from dyncomp.backends.tvm.kernels.tile import Tile
from tvm.script import tirx as T

_SERIAL = 8  # tokens below which the other threads are not woken for the rotary embedding


@dataclass(frozen=True)
class Attention:
    """Args:
    heads, kv_heads, head_dim: query heads H, key heads G (H a multiple of G), features of a head D.
    scale, window, softcap: as of ``dyncomp.cached_attention``.
    half: R / 2 of the rotary embedding, 0 for none; ``interleaved``: its pairs are neighbours.
    packed: query, key and value lie side by side in one tensor [B, S, (H + 2 G) D].
    biased: something is added to the scores by head and distance.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int = 0
    softcap: float = 0.0
    half: int = 0
    interleaved: bool = False
    packed: bool = False
    biased: bool = False


def cached_attention(a: Attention, tile: Tile) -> Any:
    """(q, k, v, past [B], cos, sin, bias [H, P], key_cache, value_cache [B, G, C, D] -> caches with the new entries, out [B, S, H * D]).

    Blocks of 64 keys with a running maximum and sum (Dao et al., 2205.14135), so scores are never stored: for each tile of queries,
    scores, exponentials and weighted values of a block stay in registers and the first-level cache.

    Roofline: decode reads each key and value once a query head, 8 C D bytes for 4 C D flops: bound by (cache) memory. Prefill does
    ``2 * tile.rows`` flops for each key it loads; the keys are transposed once for all tiles.
    """
    heads, groups, d, half = a.heads, a.kv_heads, a.head_dim, a.half
    high, shared, attend = tile.rows, a.heads // a.kv_heads, flash(d, tile)
    width = (heads + 2 * groups if a.packed else heads) * d
    kv_width = width if a.packed else groups * d
    key_at, value_at = (heads * d, (heads + groups) * d) if a.packed else (0, 0)
    table = max(half, 1)
    scale, softcap, window, interleaved = a.scale, a.softcap, a.window, a.interleaved
    lanes = next(n for n in (tile.lanes, 8, 4, 2, 1) if n <= tile.lanes and half % n == 0)
    by_vectors = lanes > 1 and not interleaved  # pairs of vectors, else of numbers

    def angle(i: Any) -> Any:
        return i // 2 if interleaved else T.if_then_else(i < half, i, i - half)

    def partner(i: Any) -> Any:
        if interleaved:
            return T.if_then_else(i % 2 == 0, i + 1, i - 1)
        return T.if_then_else(i < half, i + half, i - half)

    def first(i: Any) -> Any:
        return i % 2 == 0 if interleaved else i < half

    @T.macro
    def rotate(target, source, cos, sin, position):
        """target(i, value) stores feature i of source(i) turned to its position."""
        for i in range(0 if by_vectors else 2 * half):
            target(
                i,
                source(i) * cos[position, angle(i)]
                + T.if_then_else(first(i), T.float32(0) - source(partner(i)), source(partner(i))) * sin[position, angle(i)],
            )
        for i in range(half // lanes if by_vectors else 0):
            near = T.alloc_buffer((lanes,), "float32", scope="local")
            far = T.alloc_buffer((lanes,), "float32", scope="local")
            for n in T.vectorized(lanes):
                near[n] = source(i * lanes + n)
                far[n] = source(half + i * lanes + n)
            for n in T.vectorized(lanes):
                target(i * lanes + n, near[n] * cos[position, i * lanes + n] - far[n] * sin[position, i * lanes + n])
                target(half + i * lanes + n, far[n] * cos[position, i * lanes + n] + near[n] * sin[position, i * lanes + n])
        for i in range(d - 2 * half):
            target(2 * half + i, source(2 * half + i))

    @T.macro
    def enter(q, k, v, cos, sin, past, key_cache, value_cache, turned, b, s):
        """Rotate the queries of a token into ``turned``, its keys into the cache; copy its values."""
        for h in range(heads):
            rotate(lambda i, value: T.buffer_store(turned, value, [b, s, h, i]), lambda i: q[b, s, h * d + i], cos, sin, past[b] + s)
        for g in range(groups):
            rotate(
                lambda i, value: T.buffer_store(key_cache, value, [b, g, past[b] + s, i]),
                lambda i: k[b, s, key_at + g * d + i],
                cos,
                sin,
                past[b] + s,
            )
            for i in range(d):
                value_cache[b, g, past[b] + s, i] = v[b, s, value_at + g * d + i]

    def adjust(position: Any, bias: Any, h: Any) -> Any:
        def adjusted(score: Any, _m: Any, key: Any) -> Any:
            score = score * T.float32(scale)
            if softcap:
                score = T.float32(softcap) * tanh(score / T.float32(softcap))
            if a.biased:
                score = score + bias[h, T.max(position(_m) - key, T.int64(0))]
            seen = T.And(key <= position(_m), key > position(_m) - window) if window else key <= position(_m)
            return T.if_then_else(seen, score, T.float32(HIDDEN))

        return adjusted

    def first_block(position: Any) -> Any:
        return T.max(position - window + 1, T.int64(0)) // KEYS if window else T.int64(0)

    @T.macro
    def run(turned, keys, key_cache, value_cache, bias, past, out, b, h, start, tokens, high, direct):
        """The queries start … start + high - 1 of one head."""
        attend(
            lambda m, i: turned[b, T.min(start + m, tokens - 1), h, i],
            lambda j, i: key_cache[b, h // shared, j, i],
            lambda block, i, j: keys[b, h // shared, block, i, j],
            lambda j, i: value_cache[b, h // shared, j, i],
            adjust(lambda m: past[b] + T.min(start + m, tokens - 1), bias, h),
            lambda m: start + m < tokens,
            lambda m, i, value: T.buffer_store(out, value, [b, start + m, h * d + i]),
            first_block(past[b] + start),
            T.min(past[b] + start + high, past[b] + tokens),
            high,
            direct,
        )

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        q_: T.handle, k_: T.handle, v_: T.handle, past_: T.handle, cos_: T.handle, sin_: T.handle, bias_: T.handle,
        key_: T.handle, value_: T.handle, out_: T.handle,
    ):  # fmt: skip
        T.func_attr({"tirx.noalias": False, "op_pattern": 8, "tirx.is_scheduled": True})
        batch = T.int64()
        tokens = T.int64()
        capacity = T.int64()
        positions = T.int64()
        distances = T.int64()
        q = T.match_buffer(q_, (batch, tokens, T.int64(width)), "float32")
        k = T.match_buffer(k_, (batch, tokens, T.int64(kv_width)), "float32")
        v = T.match_buffer(v_, (batch, tokens, T.int64(kv_width)), "float32")
        past = T.match_buffer(past_, (batch,), "int64")
        cos = T.match_buffer(cos_, (positions, T.int64(table)), "float32")
        sin = T.match_buffer(sin_, (positions, T.int64(table)), "float32")
        bias = T.match_buffer(bias_, (T.int64(heads), distances), "float32")
        key_cache = T.match_buffer(key_, (batch, T.int64(groups), capacity, T.int64(d)), "float32")
        value_cache = T.match_buffer(value_, (batch, T.int64(groups), capacity, T.int64(d)), "float32")
        out = T.match_buffer(out_, (batch, tokens, T.int64(heads * d)), "float32")
        turned = T.alloc_buffer((batch, tokens, T.int64(heads), T.int64(d)), "float32")
        if batch * tokens < _SERIAL:
            for t in range(batch * tokens):
                enter(q, k, v, cos, sin, past, key_cache, value_cache, turned, t // tokens, t % tokens)
        else:
            for t in T.parallel(batch * tokens):
                enter(q, k, v, cos, sin, past, key_cache, value_cache, turned, t // tokens, t % tokens)
        if tokens == 1:
            for t in T.parallel(batch * heads):
                run(turned, turned, key_cache, value_cache, bias, past, out, t // heads, t % heads, T.int64(0), tokens, 1, True)
        else:
            keys = T.alloc_buffer((batch, T.int64(groups), (capacity + KEYS - 1) // KEYS, T.int64(d), T.int64(KEYS)), "float32")
            for t in T.parallel(batch * groups):
                for block in range((past[t // groups] + tokens + KEYS - 1) // KEYS):
                    for i in range(d):
                        for j in range(KEYS):
                            keys[t // groups, t % groups, block, i, j] = key_cache[
                                t // groups, t % groups, T.min(block * KEYS + j, past[t // groups] + tokens - 1), i]  # fmt: skip
            for t in T.parallel(batch * ((tokens + high - 1) // high) * heads):
                run(
                    turned, keys, key_cache, value_cache, bias, past, out, t // (((tokens + high - 1) // high) * heads), t % heads,
                    t // heads % ((tokens + high - 1) // high) * high, tokens, high, False,
                )  # fmt: skip

    return kernel
