"""ONNX Runtime's own operators as functions on tensors.

Each traces to one ONNX node (``torch.onnx.ops.symbolic``). They compute zeros in PyTorch: a graph that calls them is for
export only. ``com.microsoft`` operators are described in ONNX Runtime's ``docs/ContribOperators.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from dyncomp.backends.ort.native import DOMAIN
from torch import Tensor
from torch.onnx import ops

from dyncomp.ops import SCALE_BYTES

MICROSOFT = "com.microsoft"


def _one(op: str, inputs: Sequence[Tensor | None], attributes: dict[str, Any], like: Tensor, shape: Sequence[Any]) -> Tensor:
    return ops.symbolic(op, list(inputs), attributes, dtype=like.dtype, shape=list(shape), version=1)


def simplified_layer_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm over the last dimension: [..., d] -> [..., d]."""
    attributes = {"axis": -1, "epsilon": float(epsilon), "stash_type": 1}
    return _one("SimplifiedLayerNormalization", [x, weight], attributes, x, x.shape)


def skip_simplified_layer_norm(x: Tensor, skip: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(RMSNorm(x + skip), x + skip): [B, S, d] each."""
    result = ops.symbolic_multi_out(
        f"{MICROSOFT}::SkipSimplifiedLayerNormalization",
        [x, skip, weight],
        {"epsilon": float(epsilon)},
        dtypes=[x.dtype, torch.float32, torch.float32, x.dtype],
        shapes=[list(x.shape), [1], [1], list(x.shape)],
        version=1,
    )
    return result[0], result[3]


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight``: [..., d], [d, N] -> [..., N]. Spares the export the many cases of ``aten.matmul``."""
    return _one("MatMul", [x, weight], {}, x, [*x.shape[:-1], weight.shape[1]])


def fused_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` with the weight as the model stores it: [..., d], [N, d] -> [..., N]."""
    return _one(f"{MICROSOFT}::FusedMatMul", [x, weight], {"transB": 1, "alpha": 1.0}, x, [*x.shape[:-1], weight.shape[0]])


def group_query_attention(
    query: Tensor, key: Tensor | None, value: Tensor | None, key_cache: Tensor, value_cache: Tensor, lengths: Tensor, total: Tensor,
    cos: Tensor | None, sin: Tensor | None, heads: int, scale: float, window: int, softcap: float, interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Causal attention over a KV cache.

    Args:
        query: [B, S, H * D], or query, key and value side by side, [B, S, (H + 2 Hkv) D]: then key and value are None.
        key, value: [B, S, Hkv * D].
        key_cache, value_cache: [B, Hkv, C, D]; bound to the same memory as the outputs they are updated in place.
        lengths: [B] int32, number of valid entries after this step, minus one.
        total: [] int32, the largest of them plus one.
        cos, sin: [P, R / 2], the rotary embedding is applied inside; or None.

    Returns:
        [B, S, H * D] and the caches.
    """
    head_dim, kv_heads = key_cache.shape[3], key_cache.shape[1]
    attributes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": int(kv_heads), "scale": float(scale)}
    if cos is not None:
        attributes |= {"do_rotary": 1, "rotary_interleaved": int(interleaved)}
    if window:
        attributes["local_window_size"] = window
    if softcap:
        attributes["softcap"] = float(softcap)
    result = ops.symbolic_multi_out(
        f"{MICROSOFT}::GroupQueryAttention",
        [query, key, value, key_cache, value_cache, lengths, total, *([cos, sin] if cos is not None else [])],
        attributes,
        dtypes=[query.dtype] * 3,
        shapes=[[*query.shape[:2], heads * head_dim], list(key_cache.shape), list(value_cache.shape)],
        version=1,
    )
    return result[0], result[1], result[2]


def cached_attention(
    query: Tensor, key: Tensor | None, value: Tensor | None, key_cache: Tensor, value_cache: Tensor, past_length: Tensor,
    cos: Tensor | None, sin: Tensor | None, heads: int, scale: float, window: int, softcap: float, interleaved: bool,
    present: Tensor | None = None, bias: Tensor | None = None, gates: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dyncomp's kernel: as :func:`group_query_attention`, with past_length [B] int64, the valid entries before this step, present
    [B, 1, C, 1], 0 for entries that are not attended to, a bias as :func:`~dyncomp.backends.attention.reaching_back` makes it, and gates
    [B, S, 1], 0 for queries that nothing reads: they give zeros. Over caches in int8, uint8 [B, Hkv, C, D + 4], it is another operator."""
    coded = key_cache.dtype == torch.uint8
    attributes: dict[str, Any] = {
        "heads": heads, "kv_heads": int(key_cache.shape[1]), "interleaved": int(interleaved), "window": window, "scale": float(scale),
        "softcap": float(softcap),
    }  # fmt: skip
    head_dim = key_cache.shape[3] - (SCALE_BYTES if coded else 0)
    result = ops.symbolic_multi_out(
        f"{DOMAIN}::{'QuantizedCachedAttention' if coded else 'CachedAttention'}",
        [query, key, value, key_cache, value_cache, past_length, cos, sin, present, bias, gates],
        attributes,
        dtypes=[query.dtype, key_cache.dtype, value_cache.dtype],
        shapes=[[*query.shape[:2], heads * head_dim], list(key_cache.shape), list(value_cache.shape)],
        version=1,
    )
    return result[0], result[1], result[2]


def mixture_of_experts(
    x: Tensor, logits: Tensor, w_up: Tensor, b_up: Tensor | None, w_down: Tensor, k: int, attributes: dict[str, Any]
) -> Tensor:
    """The ``MoE`` operator: ``sum over the k likeliest experts of softmax(logits)[e] * FFN_e(x)``; experts of probability 0 cost nothing.

    Args:
        x: [T, d] or [B, S, d]. logits: [B * S, E]. w_up: [E, F or 2F, d]. b_up: [E, F or 2F] or None. w_down: [E, d, F].
        attributes: the activation.
    """
    return _one(f"{MICROSOFT}::MoE", [x, logits, w_up, b_up, w_down], {"k": k, "normalize_routing_weights": 0, **attributes}, x, x.shape)


def quantized_mixture_of_experts(
    x: Tensor, gates: Tensor, up: Sequence[Tensor], b_up: Tensor | None, down: Sequence[Tensor], k: int, attributes: dict[str, Any]
) -> Tensor:
    """The ``QMoE`` operator with the mixing weights given: ``sum over the k largest gates of gates[e] * FFN_e(x)``.

    Symmetric weights only. ``accuracy_level`` 4, as of :func:`matmul_nbits`.

    Args:
        x: [T, d] or [B, S, d]. gates: [B * S, E], not negative: the operator drops those that are, and says nothing.
        up: codes [E, F or 2F, d * bits / 8] and scales [E, F or 2F, d / block]. b_up: [E, F or 2F] or None.
        down: codes [E, d, F * bits / 8] and scales [E, d, F / block].
        attributes: the activation, ``expert_weight_bits`` and ``block_size``.
    """
    inputs = [x, gates, *up, b_up, *down, None, None, None, None, None, None, None, gates]
    return _one(f"{MICROSOFT}::QMoE", inputs, {"k": k, "normalize_routing_weights": 0, "accuracy_level": 4, **attributes}, x, x.shape)


def experts(x: Tensor, gates: Tensor, weights: Sequence[Tensor], activation: str, gated: bool, biased: bool, d_out: int) -> Tensor:
    """A stand-in that :mod:`dyncomp.backends.ort.experts` expands into one branch for each expert: [T, d], [T, E] -> [T, d_out].

    Args:
        weights: for each expert up [d, F or 2F], then its bias [F or 2F] when ``biased``, then down [F, d_out].
    """
    attributes = {"activation": activation, "gated": int(gated), "biased": int(biased)}
    return _one("dyncomp::RoutedFFN", [x, gates, *weights], attributes, x, [x.shape[0], d_out])


def take_rows(x: Tensor, gates: Tensor) -> Tensor:
    """A mark for :mod:`dyncomp.backends.ort.gated`: the tokens of x [B, S, d] whose gate [B, S, 1] is not 0.

    There may be fewer rows than the [B * S, d] it says: nothing but what treats rows alike may follow until they are put back.
    """
    return _one("dyncomp::TakeRows", [x, gates], {}, x, [x.shape[0] * x.shape[1], x.shape[2]])


def put_rows(y: Tensor, gates: Tensor, binary: bool) -> Tensor:
    """The other mark: those rows times their gates at their places, zeros elsewhere, [B, S, d_out]. ``binary``: gates are 0 or 1."""
    attributes = {"binary": int(binary), "width": int(y.shape[1])}
    return _one("dyncomp::PutRows", [y, gates], attributes, y, [*gates.shape[:2], y.shape[1]])


def merge_rows(opened: Tensor, closed: Tensor, gates: Tensor, others: Tensor) -> Tensor:
    """Both kinds of rows at their places, [B, S, d]: ``opened`` where gates [B, S, 1] are 1, ``closed`` where others = 1 - gates are."""
    return _one("dyncomp::MergeRows", [opened, closed, gates, others], {"width": int(opened.shape[1])}, opened,
                [*gates.shape[:2], opened.shape[1]])  # fmt: skip


def matmul_nbits(x: Tensor, codes: Tensor, scales: Tensor, rows: int, columns: int, bits: int, block: int) -> Tensor:
    """``x @ W.T`` by ONNX Runtime's own kernel: [..., K] -> [..., N]. codes [N, K / block, block * bits / 8], scales [N * K / block].

    Symmetric weights only (float zero points make it twenty times slower). ``accuracy_level`` 4: it may compute in int8.
    """
    attributes = {"N": rows, "K": columns, "bits": bits, "block_size": block, "accuracy_level": 4}
    return _one(f"{MICROSOFT}::MatMulNBits", [x, codes, scales], attributes, x, [*x.shape[:-1], rows])


def quantized_linear(
    x: Tensor, codes: Tensor, scales: Tensor, offsets: Tensor | None, bias: Tensor | None, rows: int, columns: int, bits: int, block: int,
    terms: int, lower: Tensor | None = None, margin: float = 0.0, gates: Tensor | None = None, gated: int = 0,
    stand_in: Sequence[Tensor | None] = (), format_of_it: tuple[tuple[str, int], ...] = (),
) -> Tensor:  # fmt: skip
    """dyncomp's kernel (:mod:`dyncomp.backends.native`): [..., K] -> [..., N]. ``terms``: see
    :func:`dyncomp.interpret.round_activations`; ``lower``, ``margin``: :func:`dyncomp.interpret.screened`; ``gates`` [..., 1]:
    ``dyncomp::gated_linear``, of the first ``gated`` outputs where that is not 0; ``stand_in``: :func:`quantized_ffn`."""
    attributes = {"rows": rows, "columns": columns, "bits": bits, "block": block, "terms": terms, "margin": float(margin), "gated": gated}
    inputs = [x, codes, scales, offsets, bias, lower, gates, *stand_in]
    return _one(f"{DOMAIN}::QuantizedLinear", inputs, attributes | dict(format_of_it), x, [*x.shape[:-1], rows])


def token_gates(x: Tensor, weight: Tensor, bias: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
    """``threshold_gates(linear(x, weight, bias) + first)`` and one less that, [..., 1] each: x [..., K], weight [1, K], bias [1], first
    [S, 1] or [B, S, 1]."""
    inputs, shape = [x, weight, bias, first], [*x.shape[:-1], 1]
    attributes: dict[str, Any] = {"columns": int(weight.shape[1])}
    result = ops.symbolic_multi_out(f"{DOMAIN}::TokenGates", inputs, attributes, dtypes=[x.dtype] * 2, shapes=[shape] * 2, version=1)
    return result[0], result[1]


def norm_gates(
    a: Tensor, b: Tensor, scale: Tensor, epsilon: float, weight: Tensor, bias: Tensor, first: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of x = RMSNorm(a + b): gates as of :func:`token_gates`, x and a + b, [..., K] each, and one less the gates."""
    column: list[Any] = [*a.shape[:-1], 1]
    shapes = [column, list(a.shape), list(a.shape), column]
    attributes: dict[str, Any] = {"columns": int(weight.shape[1]), "epsilon": float(epsilon)}
    result = ops.symbolic_multi_out(
        f"{DOMAIN}::NormGates", [a, b, scale, weight, bias, first], attributes, dtypes=[a.dtype] * 4, shapes=shapes, version=1
    )
    return result[0], result[1], result[2], result[3]


OPPOSITES = {token_gates: 1, norm_gates: 3}
"""Where one less the gates, the first result, is among the results; the ONNX node lacks it when nothing reads it."""


def sparse_linear(
    x: Tensor, thresholds: Tensor, codes: Tensor, scales: Tensor, offsets: Tensor | None, bias: Tensor | None, rows: int, columns: int,
    bits: int, block: int, activation: int,
) -> Tensor:  # fmt: skip
    """``dyncomp.sparse_linear`` on weights packed input by input: [..., K] -> [..., N]; or, with an ``activation`` (-1: none), of the
    first half of the rows, times the second half: [..., N / 2]."""
    attributes = {"rows": rows, "columns": columns, "bits": bits, "block": block, "activation": activation}
    outputs = rows if activation < 0 else rows // 2
    return _one(f"{DOMAIN}::SparseLinear", [x, thresholds, codes, scales, offsets, bias], attributes, x, [*x.shape[:-1], outputs])


def quantized_embedding(
    ids: Tensor, codes: Tensor, scales: Tensor, offsets: Tensor | None, rows: int, columns: int, bits: int, block: int,
    lower: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Rows of a quantized table: [...] -> [..., K]."""
    attributes = {"rows": rows, "columns": columns, "bits": bits, "block": block}
    like = torch.empty(0, dtype=torch.float32)
    return _one(f"{DOMAIN}::QuantizedEmbedding", [ids, codes, scales, offsets, lower], attributes, like, [*ids.shape, columns])


def quantized_ffn(
    x: Tensor, gates: Tensor | None, up: Sequence[Tensor | None], up_bias: Tensor | None, down: Sequence[Tensor | None],
    router: Sequence[Tensor | None], down_bias: Tensor | None, attributes: tuple[tuple[str, int], ...], base: Tensor | None = None,
    stand_in: Sequence[Tensor | None] = (), format_of_it: tuple[tuple[str, int], ...] = (),
) -> Tensor:  # fmt: skip
    """``dyncomp.routed_ffn`` on packed weights.

    Args:
        gates: [..., E]; or None: ``router`` (weight [E, d] and bias [E]) opens the experts whose score is positive, or the ``k`` best
            where that attribute is not 0, and without one every gate is 1.
        up, down: codes, scales, offsets.
        base: [..., d_out], what the result is added to.
        stand_in: of the linear expert for tokens whose gate is 0, its x, ``up``, ``up_bias`` and ``down``; ``format_of_it``: attributes.
    """
    values = dict(attributes) | dict(format_of_it)
    inputs = [x, gates, *up, up_bias, *down, *router, down_bias, base, *stand_in]
    return _one(f"{DOMAIN}::QuantizedFFN", inputs, values, x, [*x.shape[:-1], values["rows"]])


def float_ffn(
    x: Tensor, gates: Tensor | None, up: Tensor, up_bias: Tensor | None, down: Tensor, router: Sequence[Tensor | None],
    down_bias: Tensor | None, attributes: tuple[tuple[str, int], ...], base: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As :func:`quantized_ffn`, on float32 weights in tiles (:func:`~dyncomp.backends.native.pack.pack_floats`)."""
    values = dict(attributes)
    return _one(f"{DOMAIN}::FloatFFN", [x, gates, up, up_bias, down, *router, down_bias, base], values, x, [*x.shape[:-1], values["rows"]])
