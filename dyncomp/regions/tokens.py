"""What a graph takes as tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from dyncomp.graph import Graph

aten = torch.ops.aten
_SAME_VALUES = {aten.reshape.default, aten.view.default, aten.unsqueeze.default, aten.to.dtype}


def token_input(graph: Graph) -> int | None:
    """Which input has the tokens that are written: int64 [batch, sequence], where the output begins with the same two dimensions; None when
    none has, or more than one."""
    shape = graph.shape(graph.output_nodes[0])
    found = [i for i, s in enumerate(graph.inputs) if s.dtype == torch.int64 and len(s.shape) == 2 and s.shape == (shape or ())[:2]]
    return found[0] if len(found) == 1 and all(isinstance(d, str) for d in graph.inputs[found[0]].shape) else None


def written_tokens(graph: Graph, inputs: Mapping[str, Tensor]) -> Tensor:
    """[batch, sequence]: the tokens that the logits of a graph are about, the next one each; of an encoder–decoder those of the decoder."""
    return inputs[graph.inputs[token_input(graph) or 0].name]


def vocabulary_size(graph: Graph, default: int = 2, index: int = 0) -> int:
    """Rows of the smallest embedding that the input number ``index`` indexes; ``default`` when it indexes none."""
    sizes, stack = [], [graph.placeholders[index]]
    while stack:
        for user in stack.pop().users:
            if user.target in _SAME_VALUES:
                stack.append(user)
            elif user.target is aten.embedding.default and isinstance(user.args[0], fx.Node) and user.args[0].op == "get_attr":
                sizes.append(int(graph.tensor(user.args[0]).shape[0]))
    return min(sizes, default=default)


def random_inputs(graph: Graph, sizes: dict[str, int], seed: int = 0) -> dict[str, Tensor]:
    """Inputs to try a graph on: tokens below the vocabulary size, masks with the end of the first row hidden, else random numbers."""
    generator, made = torch.Generator().manual_seed(seed), {}
    for index, spec in enumerate(graph.inputs):
        shape = [sizes[d] if isinstance(d, str) else d for d in spec.shape]
        if spec.name.endswith("mask"):
            made[spec.name] = torch.ones(shape, dtype=spec.dtype)
            if len(shape) == 2 and shape[1] > 1:
                made[spec.name][0, -1] = 0
        elif spec.dtype.is_floating_point:
            made[spec.name] = torch.randn(shape, generator=generator, dtype=spec.dtype)
        else:
            below = vocabulary_size(graph, default=2 if index == 0 else 1, index=index)
            made[spec.name] = torch.randint(0, below, shape, generator=generator, dtype=spec.dtype)
    return made
