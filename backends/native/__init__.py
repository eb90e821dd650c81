"""Operators on quantized weights, experts and for attention, in C++: what :mod:`dyncomp.backends.ort.native` makes known to ONNX Runtime
and :mod:`dyncomp.backends.tvm.native` to TVM. Compiled on first use.

[..] are any leading dimensions, ``?`` marks optional inputs, attributes are integers where nothing else is said:

``QuantizedLinear(x f32 [.., K], codes, scales, offsets?, bias f32 [N]?, lower?, gates f32 [.., 1]?, stand-in?) ->
f32 [.., N]``
    with ``rows`` (N), ``columns`` (K), ``bits`` (4 or 8), ``block`` (32, 64 or 128; divides K), ``terms`` (of the rounded inputs, 1 or 2).
    With ``lower`` (``pack_lower``) the codes, in 4 bits with offsets, are the upper halves of 8: the lower ones are read for the rows whose
    product comes within the float ``margin`` of the token's largest (:func:`dyncomp.interpret.screened`). With ``gates`` it is
    ``dyncomp::gated_linear``: a token whose gate is 0 costs nothing; where ``gated`` is not 0, in that many first rows, a multiple of 16,
    and the others are computed for every token. The stand-in, for tokens whose gate is 0, is a linear expert on an input of its own, in
    eight inputs ``standin_x f32 [.., d], up_codes, up_scales, up_offsets?, up_bias f32 [F]?, down_codes, down_scales, down_offsets?``, with
    ``standin_columns`` (d), ``standin_neurons`` (F), ``standin_bits``, ``standin_block``.
``SparseLinear(x f32 [.., K], thresholds f32 [K], codes, scales, offsets?, bias f32 [N]?) -> f32 [.., N]``
    with the first four of these attributes, and ``activation``: ``dyncomp::sparse_linear``; or, where that is not -1, the activation of
    the first half of the rows times the second half, [.., N / 2]. Weights are stored input by input (``pack_inputs``): for one token
    those of inputs that count as zero are not read; several tokens are computed densely.
``QuantizedFFN(x f32 [.., d], gates f32 [.., E]?, up_codes, up_scales, up_offsets?, up_bias f32 [E, F or 2F]?, down_codes, down_scales,
down_offsets?, router f32 [E, d]?, router_bias f32 [E]?, down_bias f32 [d_out]?, base f32 [.., d_out]?, stand-in?) ->
f32 [.., d_out]``
    ``base`` and the sum over the experts of ``gate * FFN_e(x)``, as ``dyncomp::routed_ffn``: an expert whose gate is 0 costs nothing.
    Without gates ``router`` opens the experts whose score is positive, or with ``k`` > 0 the k of the highest scores (the earlier of equal
    ones; a NaN is the highest), and without a router every gate is 1. With ``experts`` (E), ``columns`` (d), ``neurons`` (F, a multiple of
    the block), ``rows`` (d_out), ``gated``, ``activation`` (:data:`ACTIVATION_CODES`), ``bits``, ``block``, and ``k`` (0 when absent).
    The stand-in is that of ``QuantizedLinear``, for one expert and its gates.
``FloatFFN(x f32 [.., d], gates f32 [.., E]?, up f32, up_bias f32 [E, F or 2F]?, down f32, router f32 [E, d]?, router_bias f32 [E]?,
down_bias f32 [d_out]?, base f32 [.., d_out]?) -> f32 [.., d_out]``
    the same with float weights and any F: up [E, 1 or 2, F / 16, d, 16], down [E, d_out / 16, F, 16], both rounded up.
``QuantizedEmbedding(ids i64 [..], codes, scales, offsets?, lower?) -> f32 [.., K]``
    rows of a matrix in the layout of ``QuantizedLinear``, with its first four attributes.
``TokenGates(x f32 [.., K], weight f32 [1, K], bias f32 [1], first f32?) -> f32 [.., 1], f32 [.., 1]?``
    with ``columns`` (K): 1 where ``x . weight + bias + first`` is positive, else 0; and one less that. ``first`` has as many elements as
    there are tokens, or as a sequence has.
``NormGates(a f32 [.., K], b f32 [.., K], scale f32 [K], weight f32 [1, K], bias f32 [1], first f32?) -> f32 [.., 1], f32 [.., K],
f32 [.., K], f32 [.., 1]?``
    with ``columns`` (K) and the float ``epsilon``: what ``TokenGates`` gives of the RMSNorm of ``a + b``, and before the last that norm
    and the sum.
``CachedAttention(query f32, key f32?, value f32?, key_cache f32, value_cache f32, past_length i64 [B], cos f32 [P, R / 2]?, sin f32?,
present f32 [B, 1, C, 1]?, bias f32 [H, P + 64]?, gates f32 [B, S, 1]?) -> f32 [B, S, H * D], key_cache f32, value_cache f32``
    ``dyncomp::cached_attention`` with ``dyncomp::rotary`` inside. query is [B, S, H * D], key and value are [B, S, Hkv * D]; or query is
    all three side by side. Caches [B, Hkv, C, D] that are bound to the outputs' memory are updated in place. With ``heads`` (H),
    ``kv_heads`` (Hkv), ``interleaved``, ``window`` (0: all) and the floats ``scale`` and ``softcap`` (0: none). D is a multiple of 16, at
    most 256. A query whose gate is 0 is not computed, and gives zeros.
``QuantizedCachedAttention(…)``
    the same with caches in int8, u8 [B, Hkv, C, D + 4]: each entry is D codes (int8) and their scale (float32, the largest magnitude
    / 127). New entries are rounded before they are attended to, as all others are.

:mod:`~dyncomp.backends.native.pack` makes codes (uint8), scales and offsets (float16) from matrices.
"""

from __future__ import annotations

from dyncomp.backends.native.build import available, unavailable_reason
from dyncomp.backends.native.pack import pack_codes, pack_floats, pack_input_scales, pack_inputs, pack_lower, pack_scales, unpack_codes

ACTIVATION_CODES: dict[str, int] = {
    "identity": 0, "relu": 1, "silu": 2, "gelu": 3, "gelu_tanh": 4, "quick_gelu": 5, "relu2": 6, "sigmoid": 7, "tanh": 8, "mish": 9,
    "elu": 10, "softplus": 11, "hardswish": 12, "leaky_relu": 13, "selu": 14,
}  # fmt: skip
"""The attribute ``activation`` for each name in :data:`dyncomp.activations.ACTIVATIONS`."""

__all__ = [
    "ACTIVATION_CODES", "available", "pack_codes", "pack_floats", "pack_input_scales", "pack_inputs", "pack_lower", "pack_scales",
    "unavailable_reason", "unpack_codes",
]  # fmt: skip
