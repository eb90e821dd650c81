"""What a graph takes as tokens."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from dyncomp.graph import Graph

aten = torch.ops.aten
_SAME_VALUES = {aten.reshape.default, aten.view.default, aten.unsqueeze.default, aten.to.dtype}


def vocabulary_size(graph: Graph, default: int = 2) -> int:
    """Rows of the smallest embedding that the first input indexes; ``default`` when it indexes none."""
    ids = graph.placeholders[0]
    sizes, stack = [], [ids]
    while stack:
        for user in stack.pop().users:
            if user.target in _SAME_VALUES:
                stack.append(user)
            elif user.target is aten.embedding.default and isinstance(user.args[0], fx.Node) and user.args[0].op == "get_attr":
                sizes.append(int(graph.tensor(user.args[0]).shape[0]))
    return min(sizes, default=default)


def random_inputs(graph: Graph, sizes: dict[str, int], seed: int = 0) -> dict[str, Tensor]:
    """Inputs to try a graph on: tokens below the vocabulary size, masks with the end of the first row hidden, else random numbers."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary, made = vocabulary_size(graph), {}
    for index, spec in enumerate(graph.inputs):
        shape = [sizes[d] if isinstance(d, str) else d for d in spec.shape]
        if spec.name.endswith("mask"):
            made[spec.name] = torch.ones(shape, dtype=spec.dtype)
            if len(shape) == 2 and shape[1] > 1:
                made[spec.name][0, -1] = 0
        elif spec.dtype.is_floating_point:
            made[spec.name] = torch.randn(shape, generator=generator, dtype=spec.dtype)
        else:
            made[spec.name] = torch.randint(0, vocabulary if index == 0 else 1, shape, generator=generator, dtype=spec.dtype)
    return made
