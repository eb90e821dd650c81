"""Graphs for GPUs: only operators that ONNX Runtime's CUDA provider has, in the types that it has them.

Nothing here runs on a GPU: what a graph is made of is checked when it is lowered, and its numbers on the CPU, which has all of it too.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

import torch
from dyncomp.backends.ort import ops
from torch import Tensor, fx

from dyncomp.errors import BackendError
from dyncomp.graph import Graph, TensorSpec

_NAMES = """
    Abs Add And ArgMax Cast Ceil Clip Compress Concat ConstantOfShape Conv Cos CumSum Div Einsum Elu Equal Erf Exp Expand Flatten Floor
    Gather GatherElements GatherND Gelu Gemm Greater GreaterOrEqual HardSigmoid HardSwish Identity If IsInf IsNaN LayerNormalization
    LeakyRelu Less LessOrEqual Log LogSoftmax MatMul Max Min Mod Mul Neg NonZero Not OneHot Or Pad Pow Range Reciprocal ReduceL2 ReduceMax
    ReduceMean ReduceMin ReduceProd ReduceSum Relu Reshape Round ScatterElements ScatterND Selu Shape Sigmoid Sign
    Sin Size Slice Softmax Softplus Split Sqrt Squeeze Sub Sum Tanh Tile TopK Transpose Trilu Unsqueeze Where
    com.microsoft.FastGelu com.microsoft.FusedMatMul com.microsoft.Gelu com.microsoft.GroupQueryAttention com.microsoft.MatMulNBits
    com.microsoft.MoE com.microsoft.QuickGelu com.microsoft.SkipLayerNormalization com.microsoft.SkipSimplifiedLayerNormalization
"""
OPERATORS = frozenset(_NAMES.split())
"""Those of our graphs that CUDAExecutionProvider has in float32 (GroupQueryAttention: in float16), from ONNX Runtime's
``docs/OperatorKernels.md``, a table that is generated from the registered kernels.

QMoE is there too, but for float16 activations and without the mixing weights that exact gates need: quantized experts are decoded and
run in MoE.
"""


def require_supported(operators: Mapping[str, int]) -> None:
    """Raises:
    BackendError: the CUDA provider has no kernel for some of these.
    """
    if missing := sorted(set(operators) - OPERATORS):
        raise BackendError(
            f"ONNX Runtime's CUDA provider has no kernel for {', '.join(missing)}, which this model needs",
            hint="--device cpu exports it for CPUs",
        )


def halve_caches(graph: Graph, node: fx.Node) -> bool:
    """Let the KV cache of a ``dyncomp.cached_attention`` be float16, the only type in which the CUDA provider attends to one; False where
    something else reads it too."""
    caches: Any = node.args[3:5]
    if any(c.op != "placeholder" or len(c.users) != 1 for c in caches):
        return False
    names = [spec.name for spec, given in zip(graph.inputs, graph.placeholders, strict=True) if given in caches]
    for cache in caches:
        cache.meta["val"] = cache.meta["val"].to(torch.float16)
    graph.inputs = tuple(TensorSpec(s.name, torch.float16, s.shape) if s.name in names else s for s in graph.inputs)
    return True


def group_query_attention(
    query: Tensor, key: Tensor | None, value: Tensor | None, key_cache: Tensor, value_cache: Tensor, lengths: Tensor, total: Tensor,
    cos: Tensor | None, sin: Tensor | None, *settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """:func:`dyncomp.backends.ort.ops.group_query_attention` in float16, between float32."""
    halves = [None if t is None else t.to(torch.float16) for t in (query, key, value, cos, sin)]
    operands: Any = halves[:3]
    out, *caches = ops.group_query_attention(*operands, key_cache, value_cache, lengths, total, *halves[3:], *settings)
    return out.to(query.dtype), caches[0], caches[1]


def operators_of(model: Any) -> collections.Counter[str]:
    """How many nodes of each operator an ``onnx_ir.Model`` has, those of branches included."""
    return collections.Counter(f"{n.domain}.{n.op_type}" if n.domain else str(n.op_type) for n in model.graph.all_nodes())
