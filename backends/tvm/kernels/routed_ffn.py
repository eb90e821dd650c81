"""Routed feed-forward experts: only those whose gate is not zero, for one token or many."""

from __future__ import annotations

from typing import Any

from dyncomp.backends.tvm.kernels.functions import FUNCTIONS, is_open
from dyncomp.backends.tvm.kernels.tile import Tile, product
from tvm.script import tirx as T


def routed_ffn(experts: int, neurons: int, depth: int, rows: int, activation: str, *, gated: bool, tile: Tile) -> Any:
    """``y[t] = sum_e gates[t, e] * FFN_e(x[t])``, as ``dyncomp.routed_ffn``.

    (x [M, K], gates [M, E], up [E, panels, K, width], up_bias [E, panels * width], down [E, panels, F', width]) -> y [M, N].
    The rows of a gated ``up`` are interleaved (:func:`~dyncomp.backends.tvm.kernels.tile.interleave`): one tile computes the same
    neurons' gate and up halves. F' is the number of hidden columns that the panels of ``up`` give; those beyond F are zero.

    The tokens of each expert are listed, then computed together: a grouped matrix product whose tiles gather their rows of x. Work
    is dealt out panel by panel, within a panel expert by expert, so threads get equal shares whatever the routing.

    Roofline: decode reads the weights of the active experts once, 4 bytes each: bound by memory, time proportional to the active
    fraction. Prefill does ``2 * tile.rows`` flops for each weight it loads, as the dense layer does, for the active pairs only.

    Args:
        experts: E. neurons: F of each. depth: K. rows: N.
    """
    width, vectors, lanes, high = tile.width, tile.vectors, tile.lanes, tile.rows
    given = width // 2 if gated else width  # hidden columns a panel of `up` gives
    count = -(-neurons // given)
    hidden, outputs = count * given, tile.panels(rows)
    kept = vectors // 2 if gated else vectors
    ragged = rows % width != 0
    act, multiply, parts = FUNCTIONS[activation], product(lanes, tile.unroll), tile.parts

    @T.macro
    def expand(x, gates, up, bias, h, listed, start, e, p, first, high):
        """The hidden activations of some tokens of expert ``e`` for panel ``p``, times the gate."""
        acc = T.alloc_buffer((high, vectors, lanes), "float32", scope="local")
        row = T.alloc_buffer((high,), "int32", scope="local")
        for m in T.unroll(high):
            row[m] = listed[T.min(start[e] + first + m, start[e + 1] - 1)]
            for r in T.unroll(vectors):
                for v in T.vectorized(lanes):
                    acc[m, r, v] = bias[e, p * width + r * lanes + v]
        multiply(acc, lambda m, k: x[row[m], k], lambda k, r, v: up[e, p, k, r * lanes + v], depth, high, vectors)
        for m in T.unroll(high):
            if start[e] + first + m < start[e + 1]:
                for r in T.unroll(kept):
                    for v in T.vectorized(lanes):
                        if gated:
                            h[start[e] + first + m, p * given + r * lanes + v] = act(acc[m, r, v]) * acc[m, r + kept, v] * gates[row[m], e]
                        else:
                            h[start[e] + first + m, p * given + r * lanes + v] = act(acc[m, r, v]) * gates[row[m], e]

    @T.macro
    def contract(h, down, y, listed, start, e, p, first, high, begin, depth):
        """Add what ``depth`` hidden columns of expert ``e`` from ``begin`` on give some of its tokens to panel ``p`` of the result."""
        acc = T.alloc_buffer((high, vectors, lanes), "float32", scope="local")
        for m in T.unroll(high):
            for r in T.unroll(vectors):
                for v in T.vectorized(lanes):
                    acc[m, r, v] = T.float32(0)
        multiply(
            acc,
            lambda m, k: h[T.min(start[e] + first + m, start[e + 1] - 1), begin + k],
            lambda k, r, v: down[e, p, begin + k, r * lanes + v],
            depth,
            high,
            vectors,
        )
        for m in T.unroll(high):
            if start[e] + first + m < start[e + 1]:
                if ragged:
                    for r in T.unroll(vectors):
                        for v in range(lanes):
                            if p * width + r * lanes + v < rows:
                                y[listed[start[e] + first + m], p * width + r * lanes + v] = (
                                    y[listed[start[e] + first + m], p * width + r * lanes + v] + acc[m, r, v]
                                )
                else:
                    for r in T.unroll(vectors):
                        for v in T.vectorized(lanes):
                            y[listed[start[e] + first + m], p * width + r * lanes + v] = (
                                y[listed[start[e] + first + m], p * width + r * lanes + v] + acc[m, r, v]
                            )

    @T.prim_func(s_tir=True, private=True)
    def kernel(x_: T.handle, gates_: T.handle, up_: T.handle, bias_: T.handle, down_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True, "op_pattern": 8, "tirx.is_scheduled": True})
        tokens = T.int64()
        x = T.match_buffer(x_, (tokens, T.int64(depth)), "float32")
        gates = T.match_buffer(gates_, (tokens, T.int64(experts)), "float32")
        up = T.match_buffer(up_, (T.int64(experts), T.int64(count), T.int64(depth), T.int64(width)), "float32")
        bias = T.match_buffer(bias_, (T.int64(experts), T.int64(count * width)), "float32")
        down = T.match_buffer(down_, (T.int64(experts), T.int64(outputs), T.int64(hidden), T.int64(width)), "float32")
        y = T.match_buffer(y_, (tokens, T.int64(rows)), "float32")
        listed = T.alloc_buffer((tokens * experts,), "int32")  # tokens of each active expert, one after the other
        start = T.alloc_buffer((experts + 1,), "int32")
        active = T.alloc_buffer((experts,), "int32")
        count_of = T.alloc_buffer((2,), "int32")  # active experts; (token, expert) pairs so far
        h = T.alloc_buffer((tokens * experts, T.int64(hidden)), "float32")
        count_of[0] = 0
        count_of[1] = 0
        for e in range(experts):
            start[e] = count_of[1]
            for t in range(tokens):
                if is_open(gates[t, e]):
                    listed[count_of[1]] = T.Cast("int32", t)
                    count_of[1] = count_of[1] + 1
            if count_of[1] > start[e]:
                active[count_of[0]] = e
                count_of[0] = count_of[0] + 1
        start[experts] = count_of[1]
        for t in T.parallel(count * count_of[0]):
            if tokens == 1:
                expand(x, gates, up, bias, h, listed, start, active[t % count_of[0]], t // count_of[0], 0, 1)
            else:
                for i in range((start[active[t % count_of[0]] + 1] - start[active[t % count_of[0]]] + high - 1) // high):
                    expand(x, gates, up, bias, h, listed, start, active[t % count_of[0]], t // count_of[0], i * high, high)
        for p in T.parallel(outputs):
            for t in range(tokens):
                for v in range(width):
                    if p * width + v < rows:
                        y[t, p * width + v] = T.float32(0)
            for a in range(count_of[0]):
                if tokens == 1:
                    contract(h, down, y, listed, start, active[a], p, 0, 1, 0, hidden)
                elif parts == 1:
                    for i in range((start[active[a] + 1] - start[active[a]] + high - 1) // high):
                        contract(h, down, y, listed, start, active[a], p, i * high, high, 0, hidden)
                else:
                    for c in range(parts):
                        for i in range((start[active[a] + 1] - start[active[a]] + high - 1) // high):
                            contract(h, down, y, listed, start, active[a], p, i * high, high, c * (hidden // parts), hidden // parts)

    return kernel
