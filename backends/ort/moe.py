"""Routed FFNs -> the MoE or QMoE operator with exact gates, or one conditional branch for each expert."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from dyncomp.backends.ort import ops
from torch import Tensor, fx

from dyncomp.graph import Graph
from dyncomp.ops import routed_ffn, threshold_gates, topk_gates
from dyncomp.quantized import Quantized, pack_nibbles

aten = torch.ops.aten
_ROUTED, _THRESHOLD, _TOPK = routed_ffn._opoverload, threshold_gates._opoverload, topk_gates._opoverload

# (activation, gated) -> attributes of MoE. Its "gelu" is the tanh form; a gated FFN has gate and up rows interleaved.
_OPERATOR: dict[tuple[str, bool], dict[str, Any]] = {
    ("relu", False): {"activation_type": "relu"},
    ("gelu_tanh", False): {"activation_type": "gelu"},
    ("silu", False): {"activation_type": "silu"},
    ("identity", False): {"activation_type": "identity"},
    ("silu", True): {"activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0},
    ("quick_gelu", True): {"activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.702, "activation_beta": 0.0},
}
_AT_LEAST_ZERO = {
    _THRESHOLD, _TOPK, aten.sigmoid.default, aten.softmax.int, aten._softmax.default, aten.relu.default, aten.abs.default,
    aten.zeros_like.default, aten.ones_like.default,
}  # fmt: skip
_NEVER = -200.0  # a logit whose probability underflows to 0 beside any other


def select_quantized_moe(graph: Graph) -> None:
    """Lower every ``dyncomp.routed_ffn`` on quantized weights that QMoE can compute."""
    for node in graph.nodes:
        if node.target is _ROUTED and (attributes := _attributes(node)) is not None:
            _select_quantized(graph, node, attributes)
    graph.clean()


def select_moe(graph: Graph) -> None:
    """Lower every ``dyncomp.routed_ffn`` that is left, and the gates."""
    for node in graph.nodes:
        if node.target is _ROUTED:
            if (attributes := _attributes(node)) is not None:
                _select_operator(graph, node, attributes)
            else:
                _select_branches(graph, node)
    for node in graph.nodes:
        if node.target is _THRESHOLD:
            node.target = threshold_plainly
        elif node.target is _TOPK:
            node.target = topk_plainly


def _attributes(node: fx.Node) -> dict[str, Any] | None:
    """Of MoE or QMoE; None where those cannot compute it."""
    _, gates, w_up, _, w_down, activation = node.args
    square = w_down.meta["val"].shape[1] == w_up.meta["val"].shape[2]  # type: ignore[union-attr]
    assert isinstance(gates, fx.Node)
    return _OPERATOR.get((str(activation), _gated(node))) if square and non_negative(gates) else None


def _gated(node: fx.Node) -> bool:
    _, _, w_up, _, w_down, _ = node.args
    return bool(w_up.meta["val"].shape[1] != w_down.meta["val"].shape[2])  # type: ignore[union-attr]


def non_negative(node: fx.Node) -> bool:
    """Whether a node's values can be seen to be at least 0: logarithms of gates are taken."""
    if node.target in _AT_LEAST_ZERO:
        return True
    if node.target in (aten.mul.Tensor, aten.add.Tensor, aten.div.Tensor, aten.maximum.default):
        return all(a >= 0 if isinstance(a, (int, float)) else isinstance(a, fx.Node) and non_negative(a) for a in node.args)
    if node.target is aten.scatter.src:
        return all(isinstance(a, fx.Node) and non_negative(a) for a in (node.args[0], node.args[3]))
    if node.target is operator.getitem and node.args[0].target is aten.topk.default and node.args[1] == 0:  # type: ignore[union-attr]
        return non_negative(node.args[0].args[0])  # type: ignore[union-attr, arg-type]
    if node.target is aten.cat.default:
        return all(isinstance(a, fx.Node) and non_negative(a) for a in node.args[0])  # type: ignore[union-attr]
    if node.target in (
        aten.reshape.default,
        aten.view.default,
        aten.expand.default,
        aten.unsqueeze.default,
        aten.to.dtype,
        aten.gather.default,
        aten.sum.dim_IntList,
    ):
        return isinstance(node.args[0], fx.Node) and non_negative(node.args[0])
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == torch.bool


def _select_quantized(graph: Graph, node: fx.Node, attributes: dict[str, Any]) -> None:
    """Lower to QMoE, where the weights are in a format that it takes."""
    x, gates, w_up, b_up, w_down, _ = node.args
    up, down = (graph.quantized.get(str(w.target)) for w in (w_up, w_down))  # type: ignore[union-attr]
    if up is None or down is None or up.format != down.format or up.offsets is not None:
        return
    assert isinstance(gates, fx.Node)
    gated = _gated(node)
    if gated and b_up is not None:
        b_up = _interleaved(graph, b_up)  # type: ignore[arg-type]
    parts = _stored(graph, str(w_up.target), up, gated=gated), _stored(graph, str(w_down.target), down, gated=False)  # type: ignore[union-attr]
    settings = {"expert_weight_bits": up.bits, "block_size": up.block, **attributes}
    k = int(gates.args[1]) if gates.target is _TOPK else int(gates.meta["val"].shape[-1])  # type: ignore[arg-type]
    with graph.inserting(before=node) as b:
        y = b.call(routed_by_weights, x, gates, parts[0], b_up, parts[1], k, tuple(settings.items()))
    node.replace_all_uses_with(y)
    graph.module.graph.erase_node(node)


def _stored(graph: Graph, name: str, value: Quantized, *, gated: bool) -> tuple[fx.Node, fx.Node]:
    """Codes and scales of the experts' weights [E, N, K] as QMoE wants them."""
    codes, scales = value.codes, value.scales.float()
    if gated:
        codes, scales = _alternating(codes), _alternating(scales)
    names = f"{name}_codes", f"{name}_scales"
    graph.add_tensor(names[0], pack_nibbles(codes) if value.bits == 4 else codes, trainable=False)
    graph.add_tensor(names[1], scales, trainable=False)
    return graph.read(names[0]), graph.read(names[1])


def _select_operator(graph: Graph, node: fx.Node, attributes: dict[str, Any]) -> None:
    x, gates, w_up, b_up, w_down, _ = node.args
    assert isinstance(gates, fx.Node)
    assert isinstance(w_down, fx.Node)
    experts = int(gates.meta["val"].shape[-1])
    if _gated(node):
        w_up, b_up = (_interleaved(graph, w) if w is not None else None for w in (w_up, b_up))  # type: ignore[arg-type]
    graph.add_tensor("never", torch.tensor([False]), trainable=False)
    settings = (x, w_up, b_up, graph.read("never"), tuple(attributes.items()))
    with graph.inserting(before=node) as b:
        if gates.target is _TOPK:
            k = int(gates.args[1])  # type: ignore[arg-type]
            y = b.call(routed_by_topk, gates.args[0], k, _scaled(graph, w_down, k), *settings)
        else:
            floor = f"moe_floor_{experts}"
            graph.add_tensor(floor, torch.tensor([_NEVER] + [float("-inf")] * (experts - 1)), trainable=False)
            if gates.target is _THRESHOLD:
                y = b.call(routed_by_threshold, gates.args[0], graph.read(floor), w_down, *settings)
            else:
                y = b.call(routed_by_gates, gates, graph.read(floor), w_down, *settings)
    node.replace_all_uses_with(y)
    graph.module.graph.erase_node(node)


Attributes = tuple[tuple[str, Any], ...]


def routed_by_weights(
    x: Tensor, gates: Tensor, up: Sequence[Tensor], b_up: Tensor | None, down: Sequence[Tensor], k: int, attributes: Attributes
) -> Tensor:
    """For any gates that are not negative, over quantized weights."""
    return ops.quantized_mixture_of_experts(x, gates.reshape(-1, gates.shape[-1]), up, b_up, down, k, dict(attributes))


# In the functions below softmax(log g) = g / sum(g): the operator's result times the sum of the gates is exact for any
# gates, and experts with g = 0 are skipped. The floor lets a token without experts run only the first, whose result is
# then multiplied by 0: with every logit at minus infinity the operator would run them all.
def routed_by_gates(
    gates: Tensor, floor: Tensor, w_down: Tensor, x: Tensor, w_up: Tensor, b_up: Tensor | None, never: Tensor, attributes: Attributes
) -> Tensor:
    """For any gates that are not negative."""
    logits = torch.maximum(torch.log(gates), floor)
    return _operator(x, logits, w_up, b_up, w_down, never, gates.shape[-1], attributes) * gates.sum(-1, keepdim=True)


def routed_by_threshold(
    scores: Tensor, floor: Tensor, w_down: Tensor, x: Tensor, w_up: Tensor, b_up: Tensor | None, never: Tensor, attributes: Attributes
) -> Tensor:
    """For gates that are 1 where the score is positive, 0 elsewhere; spelled with few nodes, each costs as much as some arithmetic."""
    active = scores > 0
    logits = torch.where(active, 0.0, floor)
    return _operator(x, logits, w_up, b_up, w_down, never, scores.shape[-1], attributes) * active.to(x.dtype).sum(-1, keepdim=True)


def routed_by_topk(
    scores: Tensor, k: int, w_down: Tensor, x: Tensor, w_up: Tensor, b_up: Tensor | None, never: Tensor, attributes: Attributes
) -> Tensor:
    """For gates that are 1 for the k best scores; their sum k is in the down-projection already."""
    return _operator(x, torch.log(topk_plainly(scores, k)), w_up, b_up, w_down, never, k, attributes)


def _operator(
    x: Tensor, logits: Tensor, w_up: Tensor, b_up: Tensor | None, w_down: Tensor, never: Tensor, k: int, attributes: Attributes
) -> Tensor:
    y = ops.mixture_of_experts(x, logits.reshape(-1, logits.shape[-1]), w_up, b_up, w_down, k, dict(attributes))
    # Up to ONNX Runtime 1.31 the operator is wrong when its result is given the memory of its input: keep x alive beyond it.
    return torch.where(never, x, y)


def _scaled(graph: Graph, weight: fx.Node, factor: int) -> fx.Node:
    name = f"{weight.target}_times_{factor}"
    graph.add_tensor(name, graph.tensor(weight).detach() * factor)
    return graph.read(name)


def _interleaved(graph: Graph, weight: fx.Node) -> fx.Node:
    """[E, 2F, …] with the gate rows first -> gate and up rows in turn."""
    name = f"{weight.target}_interleaved"
    graph.add_tensor(name, _alternating(graph.tensor(weight).detach()))
    return graph.read(name)


def _alternating(rows: Tensor) -> Tensor:
    return rows.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2).contiguous()


def _select_branches(graph: Graph, node: fx.Node) -> None:
    x, gates, w_up, b_up, w_down, activation = node.args
    up, down = (graph.tensor(w).detach() for w in (w_up, w_down))  # type: ignore[arg-type]
    bias = graph.tensor(b_up).detach() if b_up is not None else None  # type: ignore[arg-type]
    weights = []
    for e in range(up.shape[0]):
        parts = [(w_up, "up", up[e].t()), *([(b_up, "up", bias[e])] if bias is not None else []), (w_down, "down", down[e].t())]
        for source, _, value in parts:
            name = f"{source.target}_{e}"  # type: ignore[union-attr]
            graph.add_tensor(name, value.contiguous())
            weights.append(graph.read(name))
    with graph.inserting(before=node) as b:
        y = b.call(routed_branches, x, gates, weights, activation, _gated(node), bias is not None, int(down.shape[1]))
    node.replace_all_uses_with(y)
    graph.module.graph.erase_node(node)


def routed_branches(x: Tensor, gates: Tensor, weights: list[Tensor], activation: str, gated: bool, biased: bool, d_out: int) -> Tensor:
    tokens, flat = x.reshape(-1, x.shape[-1]), gates.reshape(-1, gates.shape[-1])
    y = ops.experts(tokens, flat, weights, activation, gated, biased, d_out)
    return y.reshape(*x.shape[:-1], d_out)


def threshold_plainly(scores: Tensor) -> Tensor:
    return (scores > 0).to(scores.dtype)


def topk_plainly(scores: Tensor, k: int) -> Tensor:
    return torch.nn.functional.one_hot(scores.topk(k, dim=-1).indices, scores.shape[-1]).sum(-2).to(scores.dtype)
