"""Linear layer for the tokens whose gate is open; nothing is computed for the others."""

from __future__ import annotations

from typing import Any

from dyncomp.backends.tvm.kernels.functions import is_open
from dyncomp.backends.tvm.kernels.tile import Tile, product
from tvm.script import tirx as T


def gated_linear(rows: int, depth: int, tile: Tile) -> Any:
    """``y[t] = gates[t] * (W x[t] + b)``, as ``dyncomp.gated_linear``.

    x [M, K], gates [M, 1], w [panels, K, width], b [panels * width] -> y [M, N]; M is dynamic and may be 0.

    The tokens whose gate is not 0 are listed first, and tiles gather their rows of x: one token that skips reads no weight, a prompt
    computes its open tokens as a shorter prompt. Roofline: that of the linear layer, times the fraction of open gates.

    Args:
        rows: N. depth: K.
    """
    n, width, vectors, lanes, high = rows, tile.width, tile.vectors, tile.lanes, tile.rows
    count = tile.panels(n)
    multiply = product(lanes, tile.unroll)

    @T.macro
    def block(x, gates, w, b, y, listed, p, first, end, high):
        """The listed tokens ``first`` … of those before ``end``, for panel ``p``."""
        acc = T.alloc_buffer((high, vectors, lanes), "float32", scope="local")
        row = T.alloc_buffer((high,), "int32", scope="local")
        for m in T.unroll(high):
            row[m] = listed[T.min(first + m, end - 1)]
            for r in T.unroll(vectors):
                for v in T.vectorized(lanes):
                    acc[m, r, v] = b[p * width + r * lanes + v]
        multiply(acc, lambda m, k: x[row[m], k], lambda k, r, v: w[p, k, r * lanes + v], depth, high, vectors)
        for m in T.unroll(high):
            if first + m < end:
                for r in T.unroll(vectors):
                    for v in range(lanes):
                        if p * width + r * lanes + v < n:
                            y[row[m], p * width + r * lanes + v] = acc[m, r, v] * gates[row[m], 0]

    @T.prim_func(s_tir=True, private=True)
    def kernel(x_: T.handle, gates_: T.handle, w_: T.handle, b_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True, "op_pattern": 8, "tirx.is_scheduled": True})
        tokens = T.int64()
        x = T.match_buffer(x_, (tokens, T.int64(depth)), "float32")
        gates = T.match_buffer(gates_, (tokens, T.int64(1)), "float32")
        w = T.match_buffer(w_, (T.int64(count), T.int64(depth), T.int64(width)), "float32")
        b = T.match_buffer(b_, (T.int64(count * width),), "float32")
        y = T.match_buffer(y_, (tokens, T.int64(n)), "float32")
        listed = T.alloc_buffer((tokens,), "int32")
        open_ = T.alloc_buffer((1,), "int32")
        open_[0] = 0
        for t in range(tokens):
            if is_open(gates[t, 0]):
                listed[open_[0]] = T.Cast("int32", t)
                open_[0] = open_[0] + 1
            else:
                for i in range(n):
                    y[t, i] = T.float32(0)
        if open_[0] > 0:
            for p in T.parallel(count):
                if tokens == 1:
                    block(x, gates, w, b, y, listed, p, 0, open_[0], 1)
                else:
                    for i in range((open_[0] + high - 1) // high):
                        block(x, gates, w, b, y, listed, p, i * high, open_[0], high)

    return kernel
