"""Pointwise functions that stay in vector registers: a call of the C library's would be made for each number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

Function = Callable[[Any], Any]


def f32(value: float) -> Any:
    return T.float32(value)


def is_open(gate: Any) -> Any:
    """Whether a float32 gate is not 0; one that is NaN is open (TVM's ``!=`` is false for it, and its result would be a silent 0)."""
    return T.bitwise_and(T.reinterpret("int32", gate), T.int32(0x7FFFFFFF)) != 0


def exp(x: Any) -> Any:
    """e^x for float32, relative error below 3e-7 on [-87, 88]; clamped outside, NaN stays NaN.

    2^n * 2^f with n the nearest integer to x / ln 2 and a polynomial (minimax, degree 6) for 2^f on [-1/2, 1/2].
    """
    clamped = T.Select(x > f32(88.0), f32(88.0), T.Select(x < f32(-87.3), f32(-87.3), x))  # min and max would lose NaN
    t = clamped * f32(1.4426950408889634)
    n = T.floor(t + f32(0.5))
    f = t - n
    p = f32(1.5353362e-4)
    for coefficient in (1.3398874e-3, 9.6184373e-3, 5.5503324e-2, 2.4022648e-1, 6.9314720e-1, 1.0):
        p = p * f + f32(coefficient)
    return T.reinterpret("float32", T.shift_left(T.Cast("int32", n) + 127, 23)) * p


def sigmoid(x: Any) -> Any:
    return f32(1) / (f32(1) + exp(f32(0) - x))


def silu(x: Any) -> Any:
    return x / (f32(1) + exp(f32(0) - x))


def tanh(x: Any) -> Any:
    """Absolute error below 5e-7."""
    return f32(1) - f32(2) / (exp(x * f32(2)) + f32(1))


def erf(x: Any) -> Any:
    """Abramowitz and Stegun 7.1.26: absolute error below 5e-7 (1.5e-7 in exact arithmetic)."""
    a = T.Select(x < f32(0), f32(0) - x, x)
    t = f32(1) / (f32(1) + f32(0.3275911) * a)
    p = f32(1.061405429)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        p = p * t + f32(coefficient)
    y = f32(1) - p * t * exp(f32(0) - a * a)
    return T.Select(x < f32(0), f32(0) - y, y)


def gelu(x: Any) -> Any:
    return f32(0.5) * x * (f32(1) + erf(x * f32(0.7071067811865476)))


def gelu_tanh(x: Any) -> Any:
    return f32(0.5) * x * (f32(1) + tanh(f32(0.7978845608028654) * (x + f32(0.044715) * x * x * x)))


def relu(x: Any) -> Any:
    return T.Select(x < f32(0), f32(0), x)  # this way round NaN stays NaN


FUNCTIONS: dict[str, Function] = {
    "relu": relu, "gelu": gelu, "gelu_tanh": gelu_tanh, "silu": silu, "quick_gelu": lambda x: x * sigmoid(f32(1.702) * x),
    "relu2": lambda x: relu(x) * relu(x), "sigmoid": sigmoid, "tanh": tanh, "identity": lambda x: x,
}  # fmt: skip
"""Of :data:`dyncomp.activations.ACTIVATIONS`, those that a routed FFN may have here."""
