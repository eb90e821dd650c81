"""Pointwise functions with CUDA's own exp, erf and tanh."""

from __future__ import annotations

from typing import Any

from dyncomp.backends.tvm.kernels.functions import Function, f32, relu
from tvm.script import tirx as T


def sigmoid(x: Any) -> Any:
    return f32(1) / (f32(1) + T.exp(f32(0) - x))


def gelu(x: Any) -> Any:
    return f32(0.5) * x * (f32(1) + T.erf(x * f32(0.7071067811865476)))


def gelu_tanh(x: Any) -> Any:
    return f32(0.5) * x * (f32(1) + T.tanh(f32(0.7978845608028654) * (x + f32(0.044715) * x * x * x)))


FUNCTIONS: dict[str, Function] = {
    "relu": relu, "gelu": gelu, "gelu_tanh": gelu_tanh, "silu": lambda x: x * sigmoid(x),
    "quick_gelu": lambda x: x * sigmoid(f32(1.702) * x),
    "relu2": lambda x: relu(x) * relu(x), "sigmoid": sigmoid, "tanh": T.tanh, "identity": lambda x: x,
}  # fmt: skip
"""Those of :data:`dyncomp.backends.tvm.kernels.functions.FUNCTIONS`."""
