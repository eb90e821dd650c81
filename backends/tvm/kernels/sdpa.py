"""Attention without a cache: encoders, and decoders whose cache was refused."""

from __future__ import annotations

from typing import Any

from dyncomp.backends.tvm.kernels.flash import HIDDEN, KEYS, flash
from dyncomp.backends.tvm.kernels.tile import Tile
from tvm.script import tirx as T


def attention(features: int, scale: float, mask: str, tile: Tile) -> Any:
    """``softmax(q k^T * scale + mask) v``: q [B, H, S, D], k and v [B, G, L, D], mask [B, H, S, L] -> [B, H, S, D].

    ``mask`` is ``bool`` (False hides), ``float32`` (added), or ``none`` (then [1, 1, 1, 1] of either is passed). The mask may be one
    for all rows or heads: its first two sizes may be 1. A query that sees no key gets the mean of the values, as in PyTorch's math.

    Roofline: ``2 * tile.rows`` flops for each key loaded, bound by the multipliers from some tens of queries on.
    """
    d, high, attend = features, tile.rows, flash(features, tile)

    def adjust(entry: Any, length: Any) -> Any:
        """``entry(m, key)``: of the mask."""

        def adjusted(score: Any, m: Any, key: Any) -> Any:
            score = score * T.float32(scale)
            if mask == "bool":
                score = T.if_then_else(entry(m, key), score, T.float32(HIDDEN))
            elif mask != "none":
                score = score + entry(m, key)
                score = T.Select(score < T.float32(HIDDEN), T.float32(HIDDEN), score)  # this way round NaN stays NaN
            return T.if_then_else(key < length, score, T.float32(4 * HIDDEN))

        return adjusted

    @T.prim_func(s_tir=True, private=True)
    def kernel(q_: T.handle, k_: T.handle, v_: T.handle, mask_: T.handle, out_: T.handle):
        T.func_attr({"tirx.noalias": True, "op_pattern": 8, "tirx.is_scheduled": True})
        batch = T.int64()
        heads = T.int64()
        groups = T.int64()
        tokens = T.int64()
        length = T.int64()
        mask_batch = T.int64()
        mask_heads = T.int64()
        mask_tokens = T.int64()
        mask_length = T.int64()
        q = T.match_buffer(q_, (batch, heads, tokens, T.int64(d)), "float32")
        k = T.match_buffer(k_, (batch, groups, length, T.int64(d)), "float32")
        v = T.match_buffer(v_, (batch, groups, length, T.int64(d)), "float32")
        seen = T.match_buffer(mask_, (mask_batch, mask_heads, mask_tokens, mask_length), "bool" if mask == "bool" else "float32")
        out = T.match_buffer(out_, (batch, heads, tokens, T.int64(d)), "float32")
        keys = T.alloc_buffer((batch * groups, (length + KEYS - 1) // KEYS, T.int64(d), T.int64(KEYS)), "float32")

        for t in T.parallel(batch * groups):
            for block in range((length + KEYS - 1) // KEYS):
                for i in range(d):
                    for j in range(KEYS):
                        keys[t, block, i, j] = k[t // groups, t % groups, T.min(block * KEYS + j, length - 1), i]
        for t in T.parallel(batch * heads * ((tokens + high - 1) // high)):
            b = t // ((tokens + high - 1) // high) // heads
            h = t // ((tokens + high - 1) // high) % heads
            start = t % ((tokens + high - 1) // high) * high
            g = h // (heads // groups)
            attend(
                lambda m, i: q[b, h, T.min(start + m, tokens - 1), i],
                lambda j, i: k[b, g, j, i],
                lambda block, i, j: keys[b * groups + g, block, i, j],
                lambda j, i: v[b, g, j, i],
                adjust(
                    lambda m, j: seen[
                        T.min(b, mask_batch - 1),
                        T.min(h, mask_heads - 1),
                        T.min(T.min(start + m, tokens - 1), mask_tokens - 1),
                        T.min(j, mask_length - 1),
                    ],
                    length,
                ),
                lambda m: start + m < tokens,
                lambda m, i, value: T.buffer_store(out, value, [b, h, start + m, i]),
                T.int64(0),
                length,
                high,
                False,
            )

    return kernel
