"""Linear layer over panels of packed weights, any number of tokens."""

from __future__ import annotations

from typing import Any

from dyncomp.backends.tvm.kernels.tile import Tile, product
from tvm.script import tirx as T


def linear(rows: int, depth: int, tile: Tile) -> Any:
    """``y = x W^T + b``: x [M, K], w [panels, K, width], b [panels * width] -> y [M, N]; M is dynamic and may be 0.

    Roofline: at M = 1 the weights are read once, 4 N K bytes, so memory bandwidth bounds it (half a flop a byte). A tile of ``rows``
    tokens does ``2 * rows`` flops for each weight it loads; from about M = 64 on the multipliers bound it, each panel (K * width
    floats) staying in the second-level cache while the tokens pass.

    Args:
        rows: N. depth: K.
    """
    n, k, width, vectors, lanes, high = rows, depth, tile.width, tile.vectors, tile.lanes, tile.rows
    count = tile.panels(n)
    ragged = n % width != 0
    parts, split = tile.parts, tile.split
    multiply = product(lanes, tile.unroll)

    def share(tokens: Any) -> Any:
        """Tiles of tokens that one thread takes at a time."""
        return ((tokens + high - 1) // high + split - 1) // split

    def first_of(tokens: Any, p: Any) -> Any:
        return 0 if split == 1 else p % split * share(tokens)

    def tiles_of(tokens: Any, p: Any) -> Any:
        tiles = (tokens + high - 1) // high
        return tiles if split == 1 else T.max(T.min(share(tokens), tiles - first_of(tokens, p)), 0)

    @T.macro
    def block(x, w, b, y, p, first, tokens, high, begin, depth, fresh):
        """What ``depth`` inputs from ``begin`` on give some tokens; added to y unless ``fresh``."""
        acc = T.alloc_buffer((high, vectors, lanes), "float32", scope="local")
        for m in T.unroll(high):
            for r in T.unroll(vectors):
                if fresh:
                    for v in T.vectorized(lanes):
                        acc[m, r, v] = b[p * width + r * lanes + v]
                elif not ragged:
                    for v in T.vectorized(lanes):
                        acc[m, r, v] = y[T.min(first + m, tokens - 1), p * width + r * lanes + v]
                else:
                    for v in range(lanes):
                        acc[m, r, v] = y[T.min(first + m, tokens - 1), T.min(p * width + r * lanes + v, n - 1)]
        multiply(
            acc,
            lambda m, k: x[T.min(first + m, tokens - 1), begin + k],
            lambda k, r, v: w[p, begin + k, r * lanes + v],
            depth,
            high,
            vectors,
        )
        for m in T.unroll(high):
            if first + m < tokens:
                if ragged:
                    for r in T.unroll(vectors):
                        for v in range(lanes):
                            if p * width + r * lanes + v < n:
                                y[first + m, p * width + r * lanes + v] = acc[m, r, v]
                else:
                    for r in T.unroll(vectors):
                        for v in T.vectorized(lanes):
                            y[first + m, p * width + r * lanes + v] = acc[m, r, v]

    @T.prim_func(s_tir=True, private=True)
    def kernel(x_: T.handle, w_: T.handle, b_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True, "op_pattern": 8, "tirx.is_scheduled": True})
        tokens = T.int64()
        x = T.match_buffer(x_, (tokens, T.int64(k)), "float32")
        w = T.match_buffer(w_, (T.int64(count), T.int64(k), T.int64(width)), "float32")
        b = T.match_buffer(b_, (T.int64(count * width),), "float32")
        y = T.match_buffer(y_, (tokens, T.int64(n)), "float32")
        if tokens == 1:
            for p in T.parallel(count):
                block(x, w, b, y, p, T.int64(0), tokens, 1, 0, k, True)
        else:
            for p in T.parallel(count * split):
                for i in range(tiles_of(tokens, p)):
                    block(x, w, b, y, p // split, (first_of(tokens, p) + i) * high, tokens, high, 0, k // parts, True)
                if parts > 1:
                    for c in range(parts - 1):
                        for i in range(tiles_of(tokens, p)):
                            block(
                                x, w, b, y, p // split, (first_of(tokens, p) + i) * high, tokens, high, (c + 1) * (k // parts), k // parts,
                                False,
                            )  # fmt: skip

    return kernel
