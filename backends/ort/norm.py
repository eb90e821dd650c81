"""RMSNorm -> SimplifiedLayerNormalization; a residual addition before it is fused in."""

from __future__ import annotations

import operator

import torch
from dyncomp.backends.ort import ops
from torch import Tensor, fx

from dyncomp.graph import Graph

aten = torch.ops.aten


def select_norms(graph: Graph) -> None:
    """before: s = add(a, b); n = rms_norm(s)      after: n, s = skip_simplified_layer_norm(a, b)"""
    for node in graph.nodes:
        if node.target is not aten.rms_norm.default:
            continue
        x, shape, weight, eps = (*node.args, None, None)[:4]
        assert isinstance(x, fx.Node)
        assert isinstance(shape, list)
        if len(shape) != 1:
            continue
        if weight is None:
            name = f"ones_{shape[0]}"
            graph.add_tensor(name, torch.ones(shape[0]), trainable=False)
            weight = graph.read(name)
        if eps is None:
            eps = torch.finfo(x.meta["val"].dtype).eps
        if _is_residual_sum(x):
            with graph.inserting(before=x) as b:
                pair = b.call(ops.skip_simplified_layer_norm, *x.args, weight, eps)
                normed, total = b.call(operator.getitem, pair, 0), b.call(operator.getitem, pair, 1)
            x.replace_all_uses_with(total)
            node.replace_all_uses_with(normed)
        else:
            with graph.inserting(before=node) as b:
                node.replace_all_uses_with(b.call(ops.simplified_layer_norm, x, weight, eps))
        graph.module.graph.erase_node(node)


def _is_residual_sum(node: fx.Node) -> bool:
    if node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2:
        return False
    values = [a.meta.get("val") if isinstance(a, fx.Node) else None for a in node.args]
    return all(isinstance(v, Tensor) and v.dim() == 3 and str(v.shape) == str(node.meta["val"].shape) for v in values)
