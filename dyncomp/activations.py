"""The activation functions an FFN can have, by name. Regions are recognised, and backends lowered, through this table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "identity": lambda x: x,
    "mish": F.mish,
    "elu": F.elu,
    "softplus": F.softplus,
    "hardswish": F.hardswish,
    "leaky_relu": F.leaky_relu,
    "selu": F.selu,
}


def emit_activation(call: Callable[..., Any], name: str, x: Any) -> Any:
    """Emit the activation ``name`` on the node ``x`` as ATen calls; ``call(op, *args, **kwargs)`` makes a node."""
    if name == "identity":
        return x
    if name == "quick_gelu":
        return call(aten.mul.Tensor, x, call(aten.sigmoid.default, call(aten.mul.Tensor, x, 1.702)))
    if name == "relu2":
        return call(aten.square.default, call(aten.relu.default, x))
    if name == "gelu_tanh":
        return call(aten.gelu.default, x, approximate="tanh")
    return call(getattr(aten, name).default, x)
