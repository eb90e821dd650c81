"""Causal attention over a KV cache on a GPU, the rotary embedding and the update of the cache inside."""

from __future__ import annotations

from typing import Any

from dyncomp.backends.tvm.cuda.dot import WARP, warp_sum
from dyncomp.backends.tvm.kernels.attention import Attention
from dyncomp.backends.tvm.kernels.flash import HIDDEN
from tvm.script import tirx as T

WARPS = 4
"""That share the keys of one query."""
ROTATE = 128


def cached_attention(a: Attention) -> Any:
    """(q, k, v, past [B], cos, sin, bias [H, P], key_cache, value_cache [B, G, C, D] -> caches with the new entries, out [B, S, H * D]).

    First every token's queries and keys are rotated, the keys and values written to the caches in place, a block a token. Then a block
    computes one query of one head: each of four warps goes over every fourth key with a running maximum and sum (Dao et al., 2205.14135),
    a feature a thread, so that neighbouring threads read neighbouring numbers; the four are merged in shared memory.

    Roofline: decode reads each key and value once a query head, 8 C D bytes for 4 C D flops: memory (grouped heads share a cache line
    through the second-level cache). A prompt reads its keys once a query, through the second-level cache: bound by that, not by the
    multipliers, which tiles of queries would use better.
    """
    heads, groups, d, half = a.heads, a.kv_heads, a.head_dim, a.half
    shared = heads // groups
    width = (heads + 2 * groups if a.packed else heads) * d
    kv_width = width if a.packed else groups * d
    key_at, value_at = (heads * d, (heads + groups) * d) if a.packed else (0, 0)
    table, parts = max(half, 1), -(-d // WARP)
    scale, softcap, window, interleaved, biased = a.scale, a.softcap, a.window, a.interleaved, a.biased

    def angle(i: Any) -> Any:
        return i // 2 if interleaved else i % half

    def partner(i: Any) -> Any:
        return i + 1 - i % 2 * 2 if interleaved else T.if_then_else(i < half, i + half, i - half)

    def first(i: Any) -> Any:
        return i % 2 == 0 if interleaved else i < half

    @T.macro
    def turn(turned, source, cos, sin, position, i):
        """``turned[0]``: feature i of a head, turned to its position."""
        turned[0] = source(i)
        if half > 0:
            if i < 2 * half:
                turned[1] = source(partner(i)) * sin[position, angle(i)]
                turned[0] = turned[0] * cos[position, angle(i)] + T.if_then_else(first(i), T.float32(0) - turned[1], turned[1])

    @T.macro
    def update(q, k, v, past, cos, sin, key_cache, value_cache, queries, batch, tokens):
        for s in T.thread_binding(tokens, thread="blockIdx.x"):
            for b in T.thread_binding(batch, thread="blockIdx.y"):
                for tx in T.thread_binding(ROTATE, thread="threadIdx.x"):
                    turned = T.alloc_buffer((2,), "float32", scope="local")
                    for n in range((heads * d + ROTATE - 1) // ROTATE):
                        if n * ROTATE + tx < heads * d:
                            turn(turned, lambda i: q[b, s, (n * ROTATE + tx) // d * d + i], cos, sin, past[b] + s, (n * ROTATE + tx) % d)
                            queries[b, s, n * ROTATE + tx] = turned[0]
                    for n in range((groups * d + ROTATE - 1) // ROTATE):
                        if n * ROTATE + tx < groups * d:
                            turn(
                                turned, lambda i: k[b, s, key_at + (n * ROTATE + tx) // d * d + i], cos, sin, past[b] + s,
                                (n * ROTATE + tx) % d,
                            )  # fmt: skip
                            key_cache[b, (n * ROTATE + tx) // d, past[b] + s, (n * ROTATE + tx) % d] = turned[0]
                            value_cache[b, (n * ROTATE + tx) // d, past[b] + s, (n * ROTATE + tx) % d] = v[
                                b, s, value_at + n * ROTATE + tx]  # fmt: skip

    def begin(position: Any) -> Any:
        return T.max(position - window + 1, T.int64(0)) if window else T.int64(0)

    @T.macro
    def attend(queries, bias, past, key_cache, value_cache, out, batch, tokens):
        for s in T.thread_binding(tokens, thread="blockIdx.x"):
            for h in T.thread_binding(heads, thread="blockIdx.y"):
                for b in T.thread_binding(batch, thread="blockIdx.z"):
                    for ty in T.thread_binding(WARPS, thread="threadIdx.y"):
                        for tx in T.thread_binding(WARP, thread="threadIdx.x"):
                            query = T.alloc_buffer((parts,), "float32", scope="local")
                            o = T.alloc_buffer((parts,), "float32", scope="local")
                            run = T.alloc_buffer((5,), "float32", scope="local")  # score; maximum; sum; new maximum; a factor
                            best = T.alloc_buffer((WARPS,), "float32", scope="shared")
                            total = T.alloc_buffer((WARPS,), "float32", scope="shared")
                            values = T.alloc_buffer((WARPS, parts * WARP), "float32", scope="shared")
                            for r in T.unroll(parts):
                                o[r] = T.float32(0)
                                query[r] = T.float32(0)
                                if r * WARP + tx < d:
                                    query[r] = queries[b, s, h * d + r * WARP + tx]
                            run[1] = T.float32(HIDDEN)
                            run[2] = T.float32(0)
                            for n in range((past[b] + s + 1 - begin(past[b] + s) + WARPS - 1) // WARPS):
                                if begin(past[b] + s) + n * WARPS + ty <= past[b] + s:
                                    run[0] = T.float32(0)
                                    for r in T.unroll(parts):
                                        if r * WARP + tx < d:
                                            run[0] = run[0] + query[r] * key_cache[
                                                b, h // shared, begin(past[b] + s) + n * WARPS + ty, r * WARP + tx]  # fmt: skip
                                    warp_sum(run, 0)
                                    run[0] = run[0] * T.float32(scale)
                                    if softcap > 0:
                                        run[0] = T.float32(softcap) * T.tanh(run[0] / T.float32(softcap))
                                    if biased:
                                        run[0] = run[0] + bias[h, past[b] + s - (begin(past[b] + s) + n * WARPS + ty)]
                                    run[3] = T.if_then_else(run[0] <= run[1], run[1], run[0])  # NaN wins
                                    run[4] = T.exp(run[1] - run[3])
                                    run[0] = T.exp(run[0] - run[3])
                                    run[1] = run[3]
                                    run[2] = run[2] * run[4] + run[0]
                                    for r in T.unroll(parts):
                                        if r * WARP + tx < d:
                                            o[r] = o[r] * run[4] + run[0] * value_cache[
                                                b, h // shared, begin(past[b] + s) + n * WARPS + ty, r * WARP + tx]  # fmt: skip
                            best[ty] = run[1]
                            total[ty] = run[2]
                            for r in T.unroll(parts):
                                values[ty, r * WARP + tx] = o[r]
                            T.evaluate(T.tvm_storage_sync("shared"))
                            run[3] = best[0]
                            for w in T.unroll(WARPS - 1):
                                run[3] = T.if_then_else(best[w + 1] <= run[3], run[3], best[w + 1])
                            for n in range((d + WARPS * WARP - 1) // (WARPS * WARP)):
                                if (n * WARPS + ty) * WARP + tx < d:
                                    run[0] = T.float32(0)
                                    run[2] = T.float32(0)
                                    for w in T.unroll(WARPS):
                                        run[4] = T.exp(best[w] - run[3])
                                        run[0] = run[0] + values[w, (n * WARPS + ty) * WARP + tx] * run[4]
                                        run[2] = run[2] + total[w] * run[4]
                                    out[b, s, h * d + (n * WARPS + ty) * WARP + tx] = run[0] / run[2]

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
        queries = T.alloc_buffer((batch, tokens, T.int64(heads * d)), "float32")
        if batch * tokens > 0:
            update(q, k, v, past, cos, sin, key_cache, value_cache, queries, batch, tokens)
            attend(queries, bias, past, key_cache, value_cache, out, batch, tokens)

    return kernel
