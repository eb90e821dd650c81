"""Quantized weights -> dyncomp's native kernels, or ONNX Runtime's MatMulNBits where those cannot be built."""

from __future__ import annotations

from typing import Any

import torch
from dyncomp.backends.ort import ops
from dyncomp.backends.ort.native import ACTIVATION_CODES, pack_codes, pack_scales
from dyncomp.backends.ort.routed import ffn_attributes, inner_router
from torch import Tensor, fx

from dyncomp.graph import Builder, Graph
from dyncomp.interpret import activation_terms
from dyncomp.quantized import Quantized, join, pack_nibbles
from dyncomp.regions import FFN, RoutedFFN, find_ffns, find_routed, replace_ffn

aten = torch.ops.aten
_ROWS = 16  # the native layout's tiles


def select_quantized_ffns(graph: Graph) -> None:
    """FFNs whose weights are all quantized alike -> one native operator, gates and activation inside."""
    for ffn in find_ffns(graph)[0]:
        parts = _dense_parts(graph, ffn)
        if parts is not None:
            _select_dense(graph, ffn, *parts)
    for routed in find_routed(graph):
        _select_routed(graph, routed)
    graph.clean()


def select_quantized_linears(graph: Graph, *, native: bool) -> None:
    """Quantized linear layers and embeddings."""
    for node in graph.nodes:
        weight = node.args[1] if node.target is aten.linear.default else node.args[0] if node.target is aten.embedding.default else None
        if not isinstance(weight, fx.Node) or weight.op != "get_attr" or str(weight.target) not in graph.quantized:
            continue
        name = str(weight.target)
        value = graph.quantized[name]
        rows, columns = value.codes.shape
        if not native and (value.offsets is not None or node.target is aten.embedding.default):
            continue  # ONNX Runtime has no fast kernel for these: it computes with the decoded weight
        settings = (rows, columns, value.bits, value.block)
        with graph.inserting(before=node) as b:
            if node.target is aten.embedding.default:
                y = b.call(ops.quantized_embedding, node.args[1], *_packed(graph, name, value), *settings)
            else:
                x, _, bias = (*node.args, None)[:3]
                if native:
                    y = b.call(ops.quantized_linear, x, *_packed(graph, name, value), bias, *settings, activation_terms(graph, name))
                else:
                    y = b.call(ops.matmul_nbits, x, *_blocks(graph, name, value), *settings)
                    y = b.call(aten.add.Tensor, y, bias) if bias is not None else y
        node.replace_all_uses_with(y)
        graph.module.graph.erase_node(node)


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


def _select_dense(graph: Graph, ffn: FFN, up: Quantized, down: Quantized) -> None:
    weights = ffn.weights(graph)
    attributes = (*ffn_attributes(1, ffn.d_model, ffn.d_ff, ffn.d_out, ffn.gated, ffn.activation), *_format(up))
    bias = _constant(graph, f"{ffn.name}.up_bias", weights.b_up)
    b_down = _constant(graph, f"{ffn.name}.down_bias", weights.b_down)
    packed = _packed(graph, f"{ffn.name}.up", up), _packed(graph, f"{ffn.name}.down", down)

    def build(b: Builder, x: fx.Node) -> fx.Node:
        return b.call(ops.quantized_ffn, x, None, packed[0], bias, packed[1], (None, None), b_down, attributes)

    replace_ffn(graph, ffn, build)


def _select_routed(graph: Graph, routed: RoutedFFN) -> None:
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
    with graph.inserting(before=routed.output, path=routed.name) as b:
        y = b.call(ops.quantized_ffn, routed.input, gates, packed[0], up_bias, packed[1], router, down_bias, attributes)
    routed.output.replace_all_uses_with(y)


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


def _blocks(graph: Graph, name: str, value: Quantized) -> tuple[fx.Node, fx.Node]:
    """Codes and scales of a symmetric weight as MatMulNBits wants them."""
    codes, scales, rows = f"{name}_codes", f"{name}_scales", value.codes.shape[0]
    if not graph.reads(codes):
        stored = pack_nibbles(value.codes) if value.bits == 4 else value.codes
        graph.add_tensor(codes, stored.reshape(rows, value.scales.shape[1], -1).contiguous(), trainable=False)
        graph.add_tensor(scales, value.scales.float().flatten(), trainable=False)
    return graph.read(codes), graph.read(scales)


def _constant(graph: Graph, name: str, value: Tensor | None) -> Any:
    if value is None:
        return None
    graph.add_tensor(name, value, trainable=False)
    return graph.read(name)
