"""Does an image encoder put a token of its own before the patches?"""

from __future__ import annotations

import torch
from torch import fx

from dyncomp.graph import Graph

aten = torch.ops.aten


def has_class_token(graph: Graph) -> bool:
    """Whether the first of a sequence's tokens is the same for every input before attention mixes them: a class token.

    It is where tokens are joined and the first of the parts comes from constants alone, the next from the input.
    """
    reads: dict[fx.Node, bool] = {}
    for node in graph.module.graph.nodes:  # in order: whether a node's value depends on what the input holds, not just on its size
        reads[node] = node.op == "placeholder" or (node.target is not aten.sym_size.int and any(reads[i] for i in node.all_input_nodes))
        if node.target is aten.cat.default and len(node.args) > 1 and node.args[1] in (1, -2):
            first, *rest = node.args[0]
            if not reads[first] and any(reads[n] for n in rest) and first.meta["val"].dim() == 3:
                return True
    return False
