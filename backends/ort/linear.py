"""Linear layers -> MatMul, the weight stored the way the kernel reads it."""

from __future__ import annotations

import torch
from dyncomp.backends.ort import ops
from torch import fx

from dyncomp.graph import Graph

aten = torch.ops.aten


def select_linears(graph: Graph) -> None:
    """``linear(x, W, b)`` -> ``matmul(x, W^T) + b``.

    The transposed weight is a constant of its own, so that nothing is transposed at load. A weight that something else
    reads too (an embedding tied to the vocabulary head) stays one constant, and the product transposes it when packing.
    """
    for node in graph.nodes:
        if node.target is not aten.linear.default:
            continue
        x, weight, bias = (*node.args, None)[:3]
        assert isinstance(weight, fx.Node)
        if weight.op != "get_attr":
            continue
        with graph.inserting(before=node) as b:
            if all(user.target is aten.linear.default for user in weight.users):
                y = b.call(ops.matmul, x, transposed(graph, weight))
            else:
                y = b.call(ops.fused_matmul, x, weight)
            if bias is not None:
                y = b.call(aten.add.Tensor, y, bias)
        node.replace_all_uses_with(y)
        graph.module.graph.erase_node(node)


def transposed(graph: Graph, weight: fx.Node) -> fx.Node:
    """A node that reads the transpose of a constant."""
    name = f"{weight.target}_transposed"
    if not graph.reads(name):
        graph.add_tensor(name, graph.tensor(weight).detach().t().contiguous())
    return graph.read(name)
