"""Quantized weights -> the native operators, on weights packed for them; the same for each backend that has them.

``ops`` is the backend's module of operators: functions ``quantized_linear``, ``quantized_embedding`` and ``quantized_ffn``.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from dyncomp.backends.attention import gated_queries
from dyncomp.backends.native import ACTIVATION_CODES, pack_codes, pack_lower, pack_scales
from torch import Tensor, fx

from dyncomp.graph import Builder, Graph
from dyncomp.interpret import activation_terms, screen_margin
from dyncomp.ops import gated_linear, threshold_gates, topk_gates
from dyncomp.quantized import Quantized, join
from dyncomp.regions import FFN, RoutedFFN, find_ffns, find_routed, replace_ffn

aten = torch.ops.aten
_THRESHOLD, _TOPK, _GATED = threshold_gates._opoverload, topk_gates._opoverload, gated_linear._opoverload
_WEIGHT: dict[Any, int] = {aten.linear.default: 1, aten.embedding.default: 0, _GATED: 2, gated_queries: 2}  # where the weight is
_ROWS = 16  # the native layout's tiles


def select_quantized_ffns(graph: Graph, ops: Any) -> None:
    """FFNs whose weights are all quantized alike -> one native operator, gates and activation inside."""
    for ffn in find_ffns(graph)[0]:
        parts = _dense_parts(graph, ffn)
        if parts is not None:
            _select_dense(graph, ffn, *parts, ops)
    for routed in find_routed(graph):
        _select_routed(graph, routed, ops)
    graph.clean()


def select_quantized_linears(graph: Graph, ops: Any, *, gated: bool = False) -> None:
    """Quantized linear layers and embeddings; with ``gated`` also those of tokens whose gate is open, which the operator gathers."""
    for node, name in quantized_nodes(graph, gated=gated):
        value = graph.quantized[name]
        margin = screen_margin(graph, name)
        lower = None if margin is None else _lower(graph, name, value)
        value = value if margin is None else value.upper()
        settings = (*value.codes.shape, value.bits, value.block)
        with graph.inserting(before=node) as b:
            if node.target is aten.embedding.default:
                y = b.call(ops.quantized_embedding, node.args[1], *_packed(graph, name, value), *settings, lower)
            else:
                position = _WEIGHT[node.target]
                x, *gates = node.args[:position]
                bias, *rows = node.args[position + 1 :] or (None,)
                settings = (*settings, activation_terms(graph, name), lower, margin or 0.0, *gates, *rows)
                y = b.call(ops.quantized_linear, x, *_packed(graph, name, value), bias, *settings)
        node.replace_all_uses_with(y)
        graph.module.graph.erase_node(node)


def quantized_nodes(graph: Graph, *, gated: bool = False) -> Iterator[tuple[fx.Node, str]]:
    """Linear layers and embeddings with a quantized weight, and its name; with ``gated`` also ``dyncomp.gated_linear``."""
    for node in graph.nodes:
        known = node.target in _WEIGHT and (gated or node.target is not _GATED)
        weight = node.args[_WEIGHT[node.target]] if known else None
        if isinstance(weight, fx.Node) and weight.op == "get_attr" and str(weight.target) in graph.quantized:
            yield node, str(weight.target)


def join_stand_ins(graph: Graph, ops: Any) -> None:
    """A linear expert for the tokens that skip a quantized layer becomes a part of that layer's operator: a call less for each token.

    before:  quantized_linear(x, …, gates) + quantized_ffn(z, 1 - gates, …), or quantized_ffn(x, gates, …) + quantized_ffn(z, 1 - gates, …)
    after:   quantized_linear(x, …, gates, stand_in=(z, …)), or quantized_ffn(x, gates, …, stand_in=(z, …))
    """
    for node in graph.nodes:
        base: Any = node.args[8] if node.target is ops.quantized_ffn and len(node.args) == 9 else None
        if base is None or set(base.users) != {node}:
            continue
        pairs: list[tuple[Any, Any]] = [(base, node), (node, base)]
        found = next((p for p in pairs if _stands_in_for(*p, ops)), None)
        if found is None:
            continue
        layer, other = found
        x, _, up, up_bias, down, _, _, attributes, *_ = other.args
        arguments = list(layer.args)
        if layer.target is ops.quantized_linear:
            arguments.append(0)  # under gates are all its outputs
        else:
            arguments[8:] = [next((b for b in (*layer.args[8:], *other.args[8:]) if b is not base), None)]
        settings = tuple((f"standin_{k}", v) for k, v in attributes if k in ("columns", "neurons", "bits", "block"))
        with graph.inserting(before=node) as b:
            y = b.call(layer.target, *arguments, (x, *up, up_bias, *down), settings)
        node.replace_all_uses_with(y)
    graph.clean()


def _stands_in_for(layer: Any, other: Any, ops: Any) -> bool:
    """Whether ``other`` is a linear expert under gates opposite to those of ``layer``, a linear layer or an FFN of one expert in which
    nothing stands in yet."""
    if other.target is not ops.quantized_ffn or other.args[5] != (None, None) or other.args[6] is not None:
        return False
    of = dict(other.args[7])
    if (of["experts"], of["gated"], of["activation"]) != (1, 0, ACTIVATION_CODES["identity"]):
        return False
    if layer.target is ops.quantized_linear:
        return len(layer.args) == 13 and _is_opposite(layer.args[12], other.args[1], ops)
    known = layer.target is ops.quantized_ffn and len(layer.args) <= 9 and dict(layer.args[7])["experts"] == 1
    return known and _is_opposite(layer.args[1], other.args[1], ops)


def _is_opposite(gates: Any, other: Any, ops: Any) -> bool:
    """Whether ``other`` is seen to be ``1 - gates``."""
    if not isinstance(gates, fx.Node) or not isinstance(other, fx.Node):
        return False
    if other.target is aten.rsub.Scalar:
        return other.args == (gates, 1)
    if other.target is not operator.getitem or gates.target is not operator.getitem or gates.args[1] != 0:
        return False
    made: Any = gates.args[0]
    return other.args == (made, ops.OPPOSITES.get(made.target))


# ---- FFNs ----------------------------------------------------------------------------------------------------------
def _dense_parts(graph: Graph, ffn: FFN) -> tuple[Quantized, Quantized] | None:
    """(up, down) of a dense FFN, when the native operator can compute it."""
    names = [linear.weight for linear in (*ffn.ups, ffn.down)]
    if any(n not in graph.quantized for n in names) or ffn.layout not in ("plain", "separate", "gate|up") or ffn.input_axis != -1:
        return None
    up, down = join([graph.quantized[n] for n in names[:-1]]), graph.quantized[names[-1]]
    return (up, down) if up is not None and _fits(up, down, ffn.d_ff, ffn.activation) else None


def _fits(up: Quantized, down: Quantized, neurons: int, activation: str) -> bool:
    return up.format == down.format and neurons % up.block == 0 and neurons % _ROWS == 0 and activation in ACTIVATION_CODES


def _format(weight: Quantized) -> tuple[tuple[str, int], ...]:
    return ("bits", weight.bits), ("block", weight.block)


def _select_dense(graph: Graph, ffn: FFN, up: Quantized, down: Quantized, ops: Any) -> None:
    weights = ffn.weights(graph)
    attributes = (*ffn_attributes(1, ffn.d_model, ffn.d_ff, ffn.d_out, ffn.gated, ffn.activation), *_format(up))
    bias = _constant(graph, f"{ffn.name}.up_bias", weights.b_up)
    b_down = _constant(graph, f"{ffn.name}.down_bias", weights.b_down)
    packed = _packed(graph, f"{ffn.name}.up", up), _packed(graph, f"{ffn.name}.down", down)

    def build(b: Builder, x: fx.Node) -> fx.Node:
        return b.call(ops.quantized_ffn, x, None, packed[0], bias, packed[1], (None, None), b_down, attributes)

    replace_ffn(graph, ffn, build)


def _select_routed(graph: Graph, routed: RoutedFFN, ops: Any) -> None:
    if routed.w_up not in graph.quantized or routed.w_down not in graph.quantized:
        return
    up, down = graph.quantized[routed.w_up], graph.quantized[routed.w_down]
    experts, d_out, neurons = down.codes.shape
    if not _fits(up, down, neurons, routed.activation):
        return
    packed = _packed(graph, routed.w_up, up), _packed(graph, routed.w_down, down)
    up_bias = graph.read(routed.b_up) if routed.b_up is not None else None
    down_bias = graph.read(routed.b_down) if routed.b_down is not None else None
    router, k = inner_router(routed)
    gates = routed.gates if router == (None, None) else None
    attributes = (*ffn_attributes(experts, routed.d_model, neurons, d_out, routed.gated, routed.activation, k), *_format(up))
    total, base = with_base(routed)
    with graph.inserting(before=total, path=routed.name) as b:
        y = b.call(ops.quantized_ffn, routed.input, gates, packed[0], up_bias, packed[1], router, down_bias, attributes, *base)
    total.replace_all_uses_with(y)


def with_base(routed: RoutedFFN) -> tuple[fx.Node, list[fx.Node]]:
    """(its sum with what stands beside it, [the latter]), where that alone reads it and is then added to the residual stream; or (its
    output, [])."""
    total = next(iter(routed.output.users), None)
    if total is None or len(routed.output.users) > 1 or not _is_sum(total) or len(total.users) > 1 or not all(map(_is_sum, total.users)):
        return routed.output, []
    return total, [a for a in total.args if a is not routed.output]  # type: ignore[misc]


def _is_sum(node: fx.Node) -> bool:
    """Of two different tensors of one shape."""
    if node.target is not aten.add.Tensor or node.kwargs or len(node.all_input_nodes) != 2:
        return False
    return len({str(n.meta["val"].shape) for n in (node, *node.all_input_nodes)}) == 1


def inner_router(routed: RoutedFFN) -> tuple[tuple[fx.Node | None, fx.Node | None], int]:
    """Weight and bias of a linear router for the operator to compute, or Nones; and how many experts it opens, 0 for those of
    positive scores."""
    scores = routed.gates.args[0] if routed.gates.target in (_THRESHOLD, _TOPK) else None
    if not isinstance(scores, fx.Node) or scores.target is not aten.linear.default or len(scores.args) != 3:
        return (None, None), 0
    x, weight, bias = scores.args
    if x is not routed.input or not all(isinstance(n, fx.Node) and n.op == "get_attr" for n in (weight, bias)):
        return (None, None), 0
    k = int(routed.gates.args[1]) if routed.gates.target is _TOPK else 0  # type: ignore[arg-type]
    return (weight, bias), k  # type: ignore[return-value]


def ffn_attributes(
    experts: int, columns: int, neurons: int, rows: int, gated: bool, activation: str, k: int = 0
) -> tuple[tuple[str, int], ...]:
    """Those that the native operators on experts share."""
    return tuple({
        "experts": experts, "columns": columns, "neurons": neurons, "rows": rows, "gated": int(gated),
        "activation": ACTIVATION_CODES[activation], "k": k,
    }.items())  # fmt: skip


# ---- constants -----------------------------------------------------------------------------------------------------
def _packed(graph: Graph, name: str, value: Quantized) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """Codes, scales and offsets in the native layout, as constants; made once for weights that several nodes read."""
    codes, scales = f"{name}_codes", f"{name}_scales"
    offsets = f"{name}_offsets" if value.offsets is not None else None
    if not graph.reads(codes):
        graph.add_tensor(codes, torch.from_numpy(pack_codes(value.codes.numpy(), value.bits)), trainable=False)
        graph.add_tensor(scales, torch.from_numpy(pack_scales(value.scales.numpy())), trainable=False)
        if offsets is not None and value.offsets is not None:
            graph.add_tensor(offsets, torch.from_numpy(pack_scales(value.offsets.numpy())), trainable=False)
    return graph.read(codes), graph.read(scales), graph.read(offsets) if offsets is not None else None


def _lower(graph: Graph, name: str, value: Quantized) -> fx.Node:
    """The lower halves of 8-bit codes."""
    if not graph.reads(f"{name}_lower"):
        graph.add_tensor(f"{name}_lower", torch.from_numpy(pack_lower(value.codes.numpy(), value.scales.numpy())), trainable=False)
    return graph.read(f"{name}_lower")


def _constant(graph: Graph, name: str, value: Tensor | None) -> Any:
    if value is None:
        return None
    graph.add_tensor(name, value, trainable=False)
    return graph.read(name)
