"""RMSNorm -> SimplifiedLayerNormalization; a residual addition before it is fused in."""

from __future__ import annotations

import operator
from typing import Any

import torch
from dyncomp.backends.ort import ops
from torch import Tensor, fx

from dyncomp.graph import Graph

aten = torch.ops.aten


def select_norms(graph: Graph, *, on_gpu: bool = False) -> None:
    """before: s = add(a, b); n = rms_norm(s)      after: n, s = skip_simplified_layer_norm(a, b)

    For GPUs a norm alone is plain operations: ONNX Runtime puts its operator into ONNX's own domain, where ``onnx.checker`` finds none.
    """
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
        elif on_gpu:
            with graph.inserting(before=node) as b:
                node.replace_all_uses_with(b.call(norm_plainly, x, weight, eps))
        else:
            with graph.inserting(before=node) as b:
                node.replace_all_uses_with(b.call(ops.simplified_layer_norm, x, weight, eps))
        graph.module.graph.erase_node(node)


def join_token_gates(graph: Graph) -> None:
    """A norm of a sum, and gates of tokens by what it gives -> one operator.

    before:  n, s = skip_simplified_layer_norm(a, b); gates, closed = token_gates(n, …)
    after:   gates, n, s, closed = norm_gates(a, b, …)
    """
    for node in graph.nodes:
        if node.target is not ops.token_gates:
            continue
        x: Any = node.args[0]
        pair = x.args[0] if x.target is operator.getitem and x.args[1] == 0 else x
        if pair.target is not ops.skip_simplified_layer_norm or any(reader < node for result in pair.users for reader in result.users):
            continue
        with graph.inserting(before=node) as b:
            made = b.call(ops.norm_gates, *pair.args, *node.args[1:])
            results = [b.call(operator.getitem, made, i) for i in range(4)]
        for users, places in ((node.users, (0, 3)), (pair.users, (1, 2))):
            for user in list(users):
                user.replace_all_uses_with(results[places[user.args[1]]])
    graph.clean()


def norm_plainly(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm over the last dimension: [..., d] -> [..., d]."""
    return x / torch.sqrt(torch.mean(torch.pow(x, 2.0), -1, keepdim=True) + epsilon) * weight


def _is_residual_sum(node: fx.Node) -> bool:
    if node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2:
        return False
    values = [a.meta.get("val") if isinstance(a, fx.Node) else None for a in node.args]
    return all(isinstance(v, Tensor) and v.dim() == 3 and str(v.shape) == str(node.meta["val"].shape) for v in values)
