"""A library of operators for ONNX Runtime on quantized weights: compiled on first use, registered with a session's options.

Domain ``dyncomp``; [..] are any leading dimensions, ``?`` marks optional inputs, attributes are integers:

``QuantizedLinear(x f32 [.., K], codes, scales, offsets?, bias f32 [N]?) -> f32 [.., N]``
    with ``rows`` (N), ``columns`` (K), ``bits`` (4 or 8), ``block`` (32, 64 or 128; divides K).
``QuantizedFFN(x f32 [.., d], gates f32 [.., E]?, up_codes, up_scales, up_offsets?, up_bias f32 [E, F or 2F]?, down_codes, down_scales,
down_offsets?, router f32 [E, d]?, router_bias f32 [E]?, down_bias f32 [d_out]?) -> f32 [.., d_out]``
    the sum over the experts of ``gate * FFN_e(x)``, like ``dyncomp::routed_ffn``; an expert whose gate is 0 costs nothing. Without
    gates ``router`` opens the experts whose score is positive, and without a router every gate is 1. With ``experts`` (E), ``columns``
    (d), ``neurons`` (F, a multiple of the block), ``rows`` (d_out), ``gated``, ``activation`` (:data:`ACTIVATION_CODES`), ``bits``,
    ``block``.
``QuantizedEmbedding(ids i64 [..], codes, scales, offsets?) -> f32 [.., K]``
    rows of a matrix in the layout of ``QuantizedLinear``, with the same attributes.

:mod:`~dyncomp.backends.ort.native.pack` makes codes (uint8), scales and offsets (float16) from matrices.
"""

from __future__ import annotations

from dyncomp.backends.ort.native.build import available, library, unavailable_reason
from dyncomp.backends.ort.native.pack import pack_codes, pack_scales, unpack_codes

DOMAIN = "dyncomp"

ACTIVATION_CODES: dict[str, int] = {
    "identity": 0, "relu": 1, "silu": 2, "gelu": 3, "gelu_tanh": 4, "quick_gelu": 5, "relu2": 6, "sigmoid": 7, "tanh": 8, "mish": 9,
    "elu": 10, "softplus": 11, "hardswish": 12, "leaky_relu": 13, "selu": 14,
}  # fmt: skip
"""The attribute ``activation`` for each name in :data:`dyncomp.activations.ACTIVATIONS`."""

__all__ = [
    "ACTIVATION_CODES", "DOMAIN", "available", "library", "pack_codes", "pack_scales", "unavailable_reason", "unpack_codes",
]  # fmt: skip
