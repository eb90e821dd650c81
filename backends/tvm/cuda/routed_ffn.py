"""Routed feed-forward experts on a GPU: one token reads the active experts' weights alone, a prompt is sorted by expert."""

from __future__ import annotations

from typing import Any

from dyncomp.backends.tvm.cuda.dot import ALL, DEPTH, THREADS, TILE, WARP, tile_product, warp_dot, warp_sum
from dyncomp.backends.tvm.cuda.functions import FUNCTIONS
from tvm.script import tirx as T

WARPS = 8
"""Neurons of a block when few tokens are computed."""
FEW = 8
"""Tokens up to which each is computed by itself."""
GROUP = 8
"""Experts whose results are held before they are added up."""


def routed_ffn(experts: int, neurons: int, depth: int, rows: int, activation: str, *, gated: bool) -> Any:
    """``y[t] = sum_e gates[t, e] * FFN_e(x[t])``, as ``dyncomp.routed_ffn``.

    (x [M, K], gates [M, E], up [E, F or 2F, K], up_bias [E, F or 2F], down [E, N, F]) -> y [M, N], weights as ``nn.Linear`` keeps them.
    M is dynamic and may be 0.

    Few tokens: a warp computes a neuron, eight warps a block; blocks of an expert whose gate is 0 end at once, so that only active
    experts are read. Then a warp computes an output, over the active experts. Roofline: memory, 4 bytes for 2 flops; every load is 16
    bytes a thread and neighbouring.

    More: the tokens of each expert are listed in order, one warp an expert. A block computes a tile of 64 listed tokens by 64 neurons
    (:func:`~dyncomp.backends.tvm.cuda.dot.tile_product`); blocks beyond an expert's tokens end at once. The down-projections of eight
    experts at a time are held and added up in their order: sums do not depend on the order in which blocks run, as atomic additions
    would. Roofline: from some hundred tokens an expert on the multipliers (of fp32; tensor cores are not used).

    Args:
        experts: E. neurons: F of each. depth: K. rows: N.
    """
    halves = 2 if gated else 1
    act, group = FUNCTIONS[activation], min(experts, GROUP)
    up_dot, down_dot = warp_dot(depth), warp_dot(neurons)
    up_product, down_product = tile_product(depth, halves), tile_product(neurons, 1)
    large = T.int64

    @T.macro
    def few_up(x, gates, up, bias, h, tokens):
        for t in T.thread_binding(tokens, thread="blockIdx.z"):
            for e in T.thread_binding(experts, thread="blockIdx.y"):
                for b in T.thread_binding((neurons + WARPS - 1) // WARPS, thread="blockIdx.x"):
                    for ty in T.thread_binding(WARPS, thread="threadIdx.y"):
                        for tx in T.thread_binding(WARP, thread="threadIdx.x"):
                            acc = T.alloc_buffer((halves,), "float32", scope="local")
                            if T.And(gates[t, e] != T.float32(0), b * WARPS + ty < neurons):
                                for r in T.unroll(halves):
                                    acc[r] = T.float32(0)
                                    up_dot(acc, r, lambda k: x[t, k], lambda k: up[large(e), r * neurons + b * WARPS + ty, k], tx)
                                    warp_sum(acc, r)
                                    acc[r] = acc[r] + bias[e, r * neurons + b * WARPS + ty]
                                if tx == 0:
                                    if gated:
                                        h[e, t, b * WARPS + ty] = act(acc[0]) * acc[1] * gates[t, e]
                                    else:
                                        h[e, t, b * WARPS + ty] = act(acc[0]) * gates[t, e]

    @T.macro
    def few_down(gates, down, h, y, tokens):
        for t in T.thread_binding(tokens, thread="blockIdx.y"):
            for b in T.thread_binding((rows + WARPS - 1) // WARPS, thread="blockIdx.x"):
                for ty in T.thread_binding(WARPS, thread="threadIdx.y"):
                    for tx in T.thread_binding(WARP, thread="threadIdx.x"):
                        acc = T.alloc_buffer((1,), "float32", scope="local")
                        if b * WARPS + ty < rows:
                            acc[0] = T.float32(0)
                            for e in range(experts):
                                if gates[t, e] != T.float32(0):
                                    down_dot(acc, 0, lambda k: h[e, t, k], lambda k: down[large(e), b * WARPS + ty, k], tx)
                            warp_sum(acc, 0)
                            if tx == 0:
                                y[t, b * WARPS + ty] = acc[0]

    @T.macro
    def sort(gates, listed, place, count, tokens):
        """``listed[e, :count[e]]``: the tokens of expert e in order; ``place[e, t]``: where token t is there, or -1."""
        for e in T.thread_binding(experts, thread="blockIdx.x"):
            for tx in T.thread_binding(WARP, thread="threadIdx.x"):
                before = T.alloc_buffer((4,), "int32", scope="local")  # listed so far; flag; sum of flags up to mine; a neighbour's
                before[0] = 0
                for i in range((tokens + WARP - 1) // WARP):
                    before[1] = 0
                    if i * WARP + tx < tokens:
                        if gates[i * WARP + tx, e] != T.float32(0):
                            before[1] = 1
                    before[2] = before[1]
                    for s in T.unroll(5):
                        before[3] = T.tvm_warp_shuffle_up(T.uint32(ALL), before[2], T.shift_left(1, s), WARP, WARP)
                        if tx >= T.shift_left(1, s):
                            before[2] = before[2] + before[3]
                    if i * WARP + tx < tokens:
                        if before[1] == 1:
                            listed[e, before[0] + before[2] - 1] = T.Cast("int32", i * WARP + tx)
                            place[e, i * WARP + tx] = T.Cast("int64", before[0] + before[2] - 1)
                        else:
                            place[e, i * WARP + tx] = T.int64(-1)
                    before[0] = before[0] + T.tvm_warp_shuffle(T.uint32(ALL), before[2], WARP - 1, WARP, WARP)
                if tx == 0:
                    count[e] = T.Cast("int64", before[0])

    @T.macro
    def many_up(x, gates, up, bias, h, listed, count, tokens):
        for e in T.thread_binding(experts, thread="blockIdx.z"):
            for bm in T.thread_binding((tokens + TILE - 1) // TILE, thread="blockIdx.y"):
                for bn in T.thread_binding((neurons + TILE - 1) // TILE, thread="blockIdx.x"):
                    for ty in T.thread_binding(THREADS, thread="threadIdx.y"):
                        for tx in T.thread_binding(THREADS, thread="threadIdx.x"):
                            acc = T.alloc_buffer((halves, 4, 4), "float32", scope="local")
                            if bm * TILE < count[e]:
                                for r in T.unroll(halves):
                                    for m in T.unroll(4):
                                        for n in T.unroll(4):
                                            acc[r, m, n] = bias[e, r * neurons + T.min(bn * TILE + tx * 4 + n, neurons - 1)]
                                up_product(
                                    acc,
                                    lambda m, k: x[listed[e, T.min(bm * TILE + m, count[e] - 1)], k],
                                    lambda r, n, k: up[large(e), r * neurons + T.min(bn * TILE + n, neurons - 1), k],
                                    ty, tx, (depth + DEPTH - 1) // DEPTH,
                                )  # fmt: skip
                                for m in T.unroll(4):
                                    if bm * TILE + ty * 4 + m < count[e]:
                                        for n in T.unroll(4):
                                            if bn * TILE + tx * 4 + n < neurons:
                                                if gated:
                                                    h[e, bm * TILE + ty * 4 + m, bn * TILE + tx * 4 + n] = (
                                                        act(acc[0, m, n]) * acc[halves - 1, m, n]
                                                        * gates[listed[e, bm * TILE + ty * 4 + m], e]
                                                    )  # fmt: skip
                                                else:
                                                    h[e, bm * TILE + ty * 4 + m, bn * TILE + tx * 4 + n] = (
                                                        act(acc[0, m, n]) * gates[listed[e, bm * TILE + ty * 4 + m], e]
                                                    )

    @T.macro
    def many_down(down, h, held, count, first, tokens):
        for g in T.thread_binding(group, thread="blockIdx.z"):
            for bm in T.thread_binding((tokens + TILE - 1) // TILE, thread="blockIdx.y"):
                for bn in T.thread_binding((rows + TILE - 1) // TILE, thread="blockIdx.x"):
                    for ty in T.thread_binding(THREADS, thread="threadIdx.y"):
                        for tx in T.thread_binding(THREADS, thread="threadIdx.x"):
                            acc = T.alloc_buffer((1, 4, 4), "float32", scope="local")
                            if first + g < experts:
                                if bm * TILE < count[first + g]:
                                    for m in T.unroll(4):
                                        for n in T.unroll(4):
                                            acc[0, m, n] = T.float32(0)
                                    down_product(
                                        acc,
                                        lambda m, k: h[first + g, T.min(bm * TILE + m, count[first + g] - 1), k],
                                        lambda r, n, k: down[large(first + g), T.min(bn * TILE + n, rows - 1), k],
                                        ty, tx, (neurons + DEPTH - 1) // DEPTH,
                                    )  # fmt: skip
                                    for m in T.unroll(4):
                                        if bm * TILE + ty * 4 + m < count[first + g]:
                                            for n in T.unroll(4):
                                                if bn * TILE + tx * 4 + n < rows:
                                                    held[g, bm * TILE + ty * 4 + m, bn * TILE + tx * 4 + n] = acc[0, m, n]

    @T.macro
    def combine(held, place, y, first, tokens):
        for t in T.thread_binding(tokens, thread="blockIdx.x"):
            for b in T.thread_binding((rows + 255) // 256, thread="blockIdx.y"):
                for tx in T.thread_binding(256, thread="threadIdx.x"):
                    total = T.alloc_buffer((1,), "float32", scope="local")
                    if b * 256 + tx < rows:
                        total[0] = T.float32(0)
                        if first > 0:
                            total[0] = y[t, b * 256 + tx]
                        for g in range(group):
                            if first + g < experts:
                                if place[first + g, t] >= T.int64(0):
                                    total[0] = total[0] + held[g, place[first + g, t], b * 256 + tx]
                        y[t, b * 256 + tx] = total[0]

    @T.prim_func(s_tir=True, private=True)
    def kernel(x_: T.handle, gates_: T.handle, up_: T.handle, bias_: T.handle, down_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True, "op_pattern": 8, "tirx.is_scheduled": True})
        tokens = T.int64()
        x = T.match_buffer(x_, (tokens, T.int64(depth)), "float32")
        gates = T.match_buffer(gates_, (tokens, T.int64(experts)), "float32")
        up = T.match_buffer(up_, (T.int64(experts), T.int64(halves * neurons), T.int64(depth)), "float32")
        bias = T.match_buffer(bias_, (T.int64(experts), T.int64(halves * neurons)), "float32")
        down = T.match_buffer(down_, (T.int64(experts), T.int64(rows), T.int64(neurons)), "float32")
        y = T.match_buffer(y_, (tokens, T.int64(rows)), "float32")
        h = T.alloc_buffer((T.int64(experts), tokens, T.int64(neurons)), "float32")
        listed = T.alloc_buffer((T.int64(experts), tokens), "int32")
        place = T.alloc_buffer((T.int64(experts), tokens), "int64")
        count = T.alloc_buffer((T.int64(experts),), "int64")
        held = T.alloc_buffer((T.int64(group), tokens, T.int64(rows)), "float32")
        if T.And(tokens > 0, tokens <= FEW):
            few_up(x, gates, up, bias, h, tokens)
            few_down(gates, down, h, y, tokens)
        if tokens > FEW:
            sort(gates, listed, place, count, tokens)
            many_up(x, gates, up, bias, h, listed, count, tokens)
            for part in range((experts + group - 1) // group):
                many_down(down, h, held, count, part * group, tokens)
                combine(held, place, y, part * group, tokens)

    return kernel
