"""Attention of a few queries over blocks of keys, with a running maximum and sum (Dao et al., 2205.14135): scores are never stored."""

from __future__ import annotations

import operator
from typing import Any

from dyncomp.backends.tvm.kernels.functions import exp
from dyncomp.backends.tvm.kernels.tile import Tile, product
from tvm.script import tirx as T

HIDDEN = -1e30
KEYS = 64
"""Keys of a block."""


def flash(features: int, tile: Tile) -> Any:
    """The macro ``attend(query, key, panel, value, adjust, keep, store, begin, end, high, direct)``.

    For ``high`` queries of one head it goes over the blocks ``begin`` … of keys below ``end``. All but the last three are functions:

    * ``query(m, i)``, ``value(j, i)``: feature i of query m, of value j; ``keep(m)``: whether query m exists;
    * ``key(j, i)``: of key j, used when ``direct`` (one query); else ``panel(block, i, j)``: of key j of a block, neighbours in j;
    * ``adjust(score, m, j)``: the score scaled, and :data:`HIDDEN` where query m does not see key j (j may be beyond ``end``);
    * ``store(m, i, value)`` keeps feature i of the result.
    """
    d, wide, high_vectors = features, tile.lanes, KEYS // tile.lanes
    lanes = next(n for n in (tile.lanes, 8, 4, 2, 1) if n <= tile.lanes and d % n == 0)
    parts = d // lanes
    at_once = next(n for n in (tile.vectors, 3, 2, 1) if n <= tile.vectors and parts % n == 0)  # vectors of the output at a time
    scores_of, values_of = product(wide), product(lanes)

    def across(function: Any, vector: Any) -> Any:
        """A vector's elements as one number, by halves: as few steps one after the other as can be."""
        parts = [vector[n] for n in range(vector.shape[0].value)]
        while len(parts) > 1:
            parts = [function(a, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
        return parts[0]

    @T.macro
    def attend(query, key, panel, value, adjust, keep, store, begin, end, high, direct):
        o = T.alloc_buffer((high, parts, lanes), "float32", scope="local")
        p = T.alloc_buffer((high, KEYS), "float32", scope="local")
        best = T.alloc_buffer((high,), "float32", scope="local")
        total = T.alloc_buffer((high,), "float32", scope="local")
        top = T.alloc_buffer((2,), "float32", scope="local")
        lane = T.alloc_buffer((wide,), "float32", scope="local")
        for m in T.unroll(high):
            best[m] = T.float32(HIDDEN)
            total[m] = T.float32(0)
            for r in T.unroll(parts):
                for n in T.vectorized(lanes):
                    o[m, r, n] = T.float32(0)
        for ahead in range((end + KEYS - 1) // KEYS - begin):
            block = begin + ahead
            if direct:
                for j in range(T.min(T.int64(KEYS), end - block * KEYS)):
                    part = T.alloc_buffer((lanes,), "float32", scope="local")
                    for n in T.vectorized(lanes):
                        part[n] = T.float32(0)
                    for r in T.unroll(parts):
                        for n in T.vectorized(lanes):
                            part[n] = part[n] + query(0, r * lanes + n) * key(block * KEYS + j, r * lanes + n)
                    p[0, j] = across(operator.add, part)
            else:
                acc = T.alloc_buffer((high, high_vectors, wide), "float32", scope="local")
                for m in T.unroll(high):
                    for r in T.unroll(high_vectors):
                        for n in T.vectorized(wide):
                            acc[m, r, n] = T.float32(0)
                scores_of(acc, query, lambda i, r, n: panel(block, i, r * wide + n), d, high, high_vectors)
                for m in T.unroll(high):
                    for r in T.unroll(high_vectors):
                        for n in T.vectorized(wide):
                            p[m, r * wide + n] = acc[m, r, n]
            for m in range(high):
                for j in T.vectorized(KEYS):
                    p[m, j] = adjust(p[m, j], m, block * KEYS + j)
                for n in T.vectorized(wide):
                    lane[n] = best[m]
                for r in T.unroll(high_vectors):
                    for n in T.vectorized(wide):
                        lane[n] = T.max(lane[n], p[m, r * wide + n])  # may lose NaN: its exponential is one
                top[0] = across(T.max, lane)
                top[1] = exp(best[m] - top[0])
                best[m] = top[0]
                for n in T.vectorized(wide):
                    lane[n] = T.float32(0)
                for r in T.unroll(high_vectors):
                    for n in T.vectorized(wide):
                        p[m, r * wide + n] = exp(p[m, r * wide + n] - top[0])
                        lane[n] = lane[n] + p[m, r * wide + n]
                total[m] = total[m] * top[1] + across(operator.add, lane)
                for r in range(parts):
                    for n in T.vectorized(lanes):
                        o[m, r, n] = o[m, r, n] * top[1]
            for c in range(parts // at_once):
                sums = T.alloc_buffer((high, at_once, lanes), "float32", scope="local")
                for m in T.unroll(high):
                    for r in T.unroll(at_once):
                        for n in T.vectorized(lanes):
                            sums[m, r, n] = o[m, c * at_once + r, n]
                values_of(
                    sums,
                    lambda m, j: p[m, j],
                    lambda j, r, n: value(block * KEYS + j, (c * at_once + r) * lanes + n),
                    T.min(T.int64(KEYS), end - block * KEYS),
                    high,
                    at_once,
                )
                for m in T.unroll(high):
                    for r in T.unroll(at_once):
                        for n in T.vectorized(lanes):
                            o[m, c * at_once + r, n] = sums[m, r, n]
        for m in T.unroll(high):
            if keep(m):
                for r in range(parts):
                    for n in T.vectorized(lanes):
                        store(m, r * lanes + n, o[m, r, n] / total[m])

    return attend
