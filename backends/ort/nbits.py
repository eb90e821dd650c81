"""Quantized weights -> ONNX Runtime's MatMulNBits, where the native kernels cannot be built."""

from __future__ import annotations

import torch
from dyncomp.backends.native.select import quantized_nodes
from dyncomp.backends.ort import ops
from torch import fx

from dyncomp.graph import Graph
from dyncomp.quantized import Quantized, pack_nibbles

aten = torch.ops.aten


def select_matmul_nbits(graph: Graph) -> None:
    """Linear layers with symmetric weights. ONNX Runtime has no fast kernel for others, nor for embeddings: it computes with the
    decoded weight."""
    for node, name in quantized_nodes(graph):
        value = graph.quantized[name]
        if value.offsets is not None or node.target is aten.embedding.default:
            continue
        x, _, bias = (*node.args, None)[:3]
        with graph.inserting(before=node) as b:
            y = b.call(ops.matmul_nbits, x, *_blocks(graph, name, value), *value.codes.shape, value.bits, value.block)
            y = b.call(aten.add.Tensor, y, bias) if bias is not None else y
        node.replace_all_uses_with(y)
        graph.module.graph.erase_node(node)


def _blocks(graph: Graph, name: str, value: Quantized) -> tuple[fx.Node, fx.Node]:
    """Codes and scales of a symmetric weight as MatMulNBits wants them."""
    codes, scales, rows = f"{name}_codes", f"{name}_scales", value.codes.shape[0]
    if not graph.reads(codes):
        stored = pack_nibbles(value.codes) if value.bits == 4 else value.codes
        graph.add_tensor(codes, stored.reshape(rows, value.scales.shape[1], -1).contiguous(), trainable=False)
        graph.add_tensor(scales, value.scales.float().flatten(), trainable=False)
    return graph.read(codes), graph.read(scales)
