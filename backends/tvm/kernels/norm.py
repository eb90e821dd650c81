"""RMSNorm and LayerNorm over the last dimension."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

_ENOUGH = 16  # rows for which waking the other threads pays


def norm(features: int, epsilon: float, *, centered: bool, lanes: int) -> Any:
    """``y = (x - mean) / sqrt(var + epsilon) * scale + shift`` (LayerNorm), or without the mean (RMSNorm).

    x [M, d], scale [d], shift [d] -> y [M, d]. Roofline: a row is read from memory once and twice more from the first-level cache;
    4 flops a byte, bound by memory where the row was not just written.
    """
    d = features
    width = lanes if d % lanes == 0 else 1
    steps = d // width

    @T.macro
    def row(x, scale, shift, y, m):
        total = T.alloc_buffer((width,), "float32", scope="local")
        s = T.alloc_buffer((2,), "float32", scope="local")  # mean, then 1 / deviation
        s[0] = T.float32(0)
        if centered:
            for v in T.vectorized(width):
                total[v] = T.float32(0)
            for i in range(steps):
                for v in T.vectorized(width):
                    total[v] = total[v] + x[m, i * width + v]
            for v in T.unroll(width):
                s[0] = s[0] + total[v]
            s[0] = s[0] / T.float32(d)
        for v in T.vectorized(width):
            total[v] = T.float32(0)
        for i in range(steps):
            for v in T.vectorized(width):
                total[v] = total[v] + (x[m, i * width + v] - s[0]) * (x[m, i * width + v] - s[0])
        s[1] = T.float32(0)
        for v in T.unroll(width):
            s[1] = s[1] + total[v]
        s[1] = T.float32(1) / T.sqrt(s[1] / T.float32(d) + T.float32(epsilon))
        for i in range(steps):
            for v in T.vectorized(width):
                y[m, i * width + v] = (x[m, i * width + v] - s[0]) * s[1] * scale[i * width + v] + shift[i * width + v]

    @T.prim_func(s_tir=True, private=True)
    def kernel(x_: T.handle, scale_: T.handle, shift_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True, "op_pattern": 8, "tirx.is_scheduled": True})
        tokens = T.int64()
        x = T.match_buffer(x_, (tokens, T.int64(d)), "float32")
        scale = T.match_buffer(scale_, (T.int64(d),), "float32")
        shift = T.match_buffer(shift_, (T.int64(d),), "float32")
        y = T.match_buffer(y_, (tokens, T.int64(d)), "float32")
        if tokens < _ENOUGH:
            for m in range(tokens):
                row(x, scale, shift, y, m)
        else:
            for m in T.parallel(tokens):
                row(x, scale, shift, y, m)

    return kernel
