"""The graph for a GPU: our kernels where experts and caches are, plain Relax operators, which DLight schedules, everywhere else."""

from __future__ import annotations

from typing import Any, cast

import torch
from dyncomp.backends.tvm import ops
from dyncomp.backends.tvm.cuda.attention import cached_attention
from dyncomp.backends.tvm.cuda.functions import FUNCTIONS
from dyncomp.backends.tvm.cuda.routed_ffn import routed_ffn
from dyncomp.backends.tvm.importer import Converters, arguments, value_of
from dyncomp.backends.tvm.kernels.attention import Attention
from dyncomp.backends.tvm.kernels.tile import Tile
from dyncomp.backends.tvm.select import require_no_quantized, select_attention, select_norms, select_positions
from dyncomp.backends.tvm.shapes import FFNShape, Tiles
from torch import fx
from tvm import relax

from dyncomp.errors import BackendError
from dyncomp.graph import Graph
from dyncomp.regions.norm import fuse_rms_norms
from dyncomp.regions.routed import find_routed


def select(graph: Graph) -> Graph:
    """A copy of ``graph`` that calls the operators that have kernels here, on weights as they are; for export only.

    Raises:
        BackendError: weights are quantized, or an activation has no form here.
    """
    if graph.quantized:
        name = next(iter(graph.quantized))
        raise BackendError(f"quantized weights ({name}) have no kernels for GPUs", hint="export a model that is not quantized")
    graph = graph.copy()
    fuse_rms_norms(graph)
    if any("val" not in n.meta for n in graph.nodes if n.op != "output"):
        graph.infer_shapes()
    select_attention(graph, native=False)
    select_positions(graph)
    select_norms(graph)
    for routed in find_routed(graph):
        if routed.activation not in FUNCTIONS:
            raise BackendError(f"{routed.name}: experts with the activation {routed.activation!r} have no kernel for GPUs")
        bias = routed.b_up
        if bias is None:
            graph.add_tensor(bias := f"{routed.w_up}_no_bias", torch.zeros(graph.tensor(routed.w_up).shape[:2]))
        operands = (routed.input, routed.gates, graph.read(routed.w_up), graph.read(bias), graph.read(routed.w_down))
        rest = (routed.d_ff // routed.experts, routed.d_out, routed.activation, routed.gated)
        with graph.inserting(before=routed.node) as b:
            made = b.call(ops.routed_ffn, *operands, *rest)
        routed.node.replace_all_uses_with(made)
        graph.module.graph.erase_node(routed.node)
    graph.clean()
    require_no_quantized(graph)
    return graph


class GpuConverters(Converters):
    """Linear layers, norms and attention without a cache stay Relax's own operators."""

    functions = FUNCTIONS

    def __init__(self) -> None:
        super().__init__(Tiles(Tile()))

    def norm(self, node: fx.Node, importer: Any) -> Any:
        x, scale, shift = arguments(node, importer)[:3]
        epsilon, centered = cast(float, node.args[3]), cast(bool, node.args[4])
        if centered:
            return importer.block_builder.emit(relax.op.nn.layer_norm(x, scale, shift, axes=-1, epsilon=epsilon))
        return importer.block_builder.emit(relax.op.nn.rms_norm(x, scale, axes=-1, epsilon=epsilon))

    def routed_ffn_kernel(self, shape: FFNShape) -> Any:
        return routed_ffn(shape.experts, shape.neurons, shape.depth, shape.rows, shape.activation, gated=shape.gated)

    def attention_kernel(self, what: Attention) -> Any:
        return cached_attention(what)

    def attention(self, node: fx.Node, importer: Any) -> Any:
        """Softmax of a product, times the values."""
        emit = importer.block_builder.emit
        q, k, v, mask, dropout, causal = [*arguments(node, importer), *[None] * 3][:6]
        if isinstance(given := node.kwargs.get("attn_mask"), fx.Node):
            mask = value_of(given, importer)
        if causal or node.kwargs.get("is_causal") or dropout or node.kwargs.get("dropout_p") or len(q.ty.shape) != 4:
            raise BackendError(f"{node.name}: this form of scaled_dot_product_attention has no kernel for GPUs")
        if (shared := int(q.ty.shape[1]) // int(k.ty.shape[1])) > 1:
            k, v = (emit(relax.op.repeat(t, shared, axis=1)) for t in (k, v))
        scale = cast(float | None, node.kwargs.get("scale")) or int(q.ty.shape[3]) ** -0.5
        scores = emit(relax.op.matmul(q, emit(relax.op.permute_dims(k, [0, 1, 3, 2]))))
        scores = emit(relax.op.multiply(scores, relax.const(scale, "float32")))
        if mask is not None and str(mask.ty.dtype) == "bool":
            scores = emit(relax.op.where(mask, scores, relax.const(float("-inf"), "float32")))
        elif mask is not None:
            scores = emit(relax.op.add(scores, mask))
        return emit(relax.op.matmul(emit(relax.op.nn.softmax(scores, axis=-1)), v))
