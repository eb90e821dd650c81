"""What the kernels share: sums over a warp, dot products that a warp computes, and a tile of a matrix product that a block computes."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

WARP = 32
ALL = 0xFFFFFFFF
TILE, DEPTH = 64, 16
"""A block's tile of a product: 64 rows by 64 columns, 16 of the depth in shared memory at a time."""
THREADS = 16  # by as many: 4 x 4 sums each
ROW = TILE + 4  # floats of a row of a tile: columns in different banks of shared memory, rows aligned for loads of four


def lanes_of(depth: int) -> int:
    """Floats that a thread loads at once: 4 where every row begins at a multiple of 16 bytes."""
    return 4 if depth % 4 == 0 else 1


@T.macro
def warp_sum(buffer, index):
    """``buffer[index]`` of every thread becomes its sum over the warp."""
    for s in T.unroll(5):
        buffer[index] = buffer[index] + T.tvm_warp_shuffle_xor(T.uint32(ALL), buffer[index], T.shift_left(1, s), WARP, WARP)


def warp_dot(depth: int) -> Any:
    """The macro ``dot(acc, index, x, w, lane)``: adds the part of thread ``lane`` of ``sum_k x(k) * w(k)`` to ``acc[index]``.

    Neighbouring threads read neighbouring numbers, four at a time: a warp reads 512 bytes of a row of weights with one instruction.
    """
    lanes = lanes_of(depth)
    step = WARP * lanes
    steps, rest = depth // step, depth % step

    @T.macro
    def dot(acc, index, x, w, lane):
        xs = T.alloc_buffer((lanes,), "float32", scope="local")
        ws = T.alloc_buffer((lanes,), "float32", scope="local")
        for i in range(steps):
            for v in T.vectorized(lanes):
                xs[v] = x(i * step + lane * lanes + v)
            for v in T.vectorized(lanes):
                ws[v] = w(i * step + lane * lanes + v)
            for v in T.unroll(lanes):
                acc[index] = acc[index] + xs[v] * ws[v]
        if rest > 0:
            if lane * lanes < rest:
                for v in T.vectorized(lanes):
                    xs[v] = x(steps * step + lane * lanes + v)
                for v in T.vectorized(lanes):
                    ws[v] = w(steps * step + lane * lanes + v)
                for v in T.unroll(lanes):
                    acc[index] = acc[index] + xs[v] * ws[v]

    return dot


def tile_product(depth: int, weights: int) -> Any:
    """The macro ``product(acc, x, ws, ty, tx, steps)``: a block's tile of ``x W^T``, for one W or for two that share x.

    ``x(m, k)`` is row m of the tile, ``ws`` a list of functions ``w(n, k)``; they must give something for every m, n < TILE.
    ``acc`` [weights, 4, 4] is local: thread (ty, tx) sums rows ``ty * 4`` … and columns ``tx * 4`` …. ``steps``: 0, or the number of
    steps along the depth (``T.ceildiv(depth, DEPTH)``), the same in the whole block.

    Both tiles go through shared memory, depth first, so that a thread reads its four rows and its four columns with one load each:
    16 (32 with two W) multiply-adds for 2 (3) loads.
    """
    lanes = lanes_of(depth)
    per_row = DEPTH // 4

    @T.macro
    def load(tile, source, at, row, column, k):
        """Four neighbours in the depth of one row, transposed into the tile."""
        part = T.alloc_buffer((4,), "float32", scope="local")
        for v in T.unroll(4):
            part[v] = T.float32(0)
        if lanes == 4:
            if k + column < depth:
                for v in T.vectorized(4):
                    part[v] = source(row, k + column + v)
        else:
            for v in T.unroll(4):
                if k + column + v < depth:
                    part[v] = source(row, k + column + v)
        for v in T.unroll(4):
            tile[(at * DEPTH + column + v) * ROW + row] = part[v]

    @T.macro
    def product(acc, x, w, ty, tx, steps):
        xs = T.alloc_buffer((DEPTH * ROW,), "float32", scope="shared")
        ws = T.alloc_buffer((weights * DEPTH * ROW,), "float32", scope="shared")
        a = T.alloc_buffer((4,), "float32", scope="local")
        b = T.alloc_buffer((4,), "float32", scope="local")
        for i in range(steps):
            load(xs, x, 0, (ty * THREADS + tx) // per_row, (ty * THREADS + tx) % per_row * 4, i * DEPTH)
            for r in T.unroll(weights):
                load(ws, lambda n, k: w(r, n, k), r, (ty * THREADS + tx) // per_row, (ty * THREADS + tx) % per_row * 4, i * DEPTH)
            T.evaluate(T.tvm_storage_sync("shared"))
            for k in range(DEPTH):
                for v in T.vectorized(4):
                    a[v] = xs[k * ROW + ty * 4 + v]
                for r in T.unroll(weights):
                    for v in T.vectorized(4):
                        b[v] = ws[(r * DEPTH + k) * ROW + tx * 4 + v]
                    for m in T.unroll(4):
                        for n in T.unroll(4):
                            acc[r, m, n] = acc[r, m, n] + a[m] * b[n]
            T.evaluate(T.tvm_storage_sync("shared"))

    return product
