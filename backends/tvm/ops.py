"""The kernels as PyTorch operators, so that a graph that calls them can be exported; they compute nothing.

``dyncomp.backends.tvm.importer`` turns each into a call of its kernel in :mod:`dyncomp.backends.tvm.kernels`, or, for quantized weights, of
an operator in :mod:`dyncomp.backends.native`, where they are described.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dyncomp.ops import SCALE_BYTES


def _export_only(function: Callable[..., Any]) -> Any:
    operation = torch.library.custom_op(f"dyncomp_tvm::tvm_{function.__name__}", function, mutates_args=())
    operation.register_fake(function)
    return operation._opoverload


@_export_only
def linear(x: Tensor, weight: Tensor, bias: Tensor, rows: int) -> Tensor:
    """``x W^T + bias``: x [..., K], weight [panels, K, width], bias [panels * width] -> [..., rows]."""
    return x.new_empty(*x.shape[:-1], rows)


@_export_only
def gated_linear(x: Tensor, gates: Tensor, weight: Tensor, bias: Tensor, rows: int) -> Tensor:
    """``dyncomp.gated_linear`` on packed weights: x [..., K], gates [..., 1] -> [..., rows]."""
    return x.new_empty(*x.shape[:-1], rows)


@_export_only
def norm(x: Tensor, scale: Tensor, shift: Tensor, epsilon: float, centered: bool) -> Tensor:
    """LayerNorm (centered) or RMSNorm over the last dimension: [..., d] -> [..., d]."""
    return torch.empty_like(x)


@_export_only
def routed_ffn(
    x: Tensor, gates: Tensor, up: Tensor, bias: Tensor, down: Tensor, neurons: int, rows: int, activation: str, gated: bool
) -> Tensor:
    """``dyncomp.routed_ffn`` on packed weights: x [..., K], gates [..., E] -> [..., rows]; ``neurons``: of each expert."""
    return x.new_empty(*x.shape[:-1], rows)


@_export_only
def cached_attention(
    query: Tensor, key: Tensor | None, value: Tensor | None, key_cache: Tensor, value_cache: Tensor, past_length: Tensor,
    cos: Tensor | None, sin: Tensor | None, heads: int, scale: float, window: int, softcap: float, interleaved: bool,
    present: Tensor | None = None, bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Causal attention over a KV cache that is updated in place.

    Args:
        query: [B, S, H * D], or query, key and value side by side, [B, S, (H + 2 Hkv) D]: then key and value are None.
        key, value: [B, S, Hkv * D]. key_cache, value_cache: [B, Hkv, C, D]. past_length: [B].
        cos, sin: [P, R / 2], the rotary embedding to apply; or None.
        bias: [H, P], added to the score of a key that lies 0, 1 … positions back; or None.

    Returns:
        [B, S, H * D] and the caches.
    """
    return _attended(query, key_cache, value_cache, heads)


@_export_only
def native_attention(
    query: Tensor, key: Tensor | None, value: Tensor | None, key_cache: Tensor, value_cache: Tensor, past_length: Tensor,
    cos: Tensor | None, sin: Tensor | None, heads: int, scale: float, window: int, softcap: float, interleaved: bool,
    present: Tensor | None = None, bias: Tensor | None = None, gates: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """:func:`cached_attention` by the native operator: with a bias as :func:`~dyncomp.backends.attention.reaching_back` makes it, gates
    [B, S, 1], 0 for queries that nothing reads (they give zeros), and also over caches in int8, uint8 [B, Hkv, C, D + 4]."""
    return _attended(query, key_cache, value_cache, heads)


def _attended(query: Tensor, key_cache: Tensor, value_cache: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    features = key_cache.shape[3] - (SCALE_BYTES if key_cache.dtype == torch.uint8 else 0)
    return query.new_empty(*query.shape[:2], heads * features), torch.empty_like(key_cache), torch.empty_like(value_cache)


@_export_only
def native(operator: str, inputs: Sequence[Tensor | None], attributes: str, leading: int, width: int) -> Tensor:
    """One of the native operators; the first ``leading`` dimensions of its first input -> [..., width].

    Args:
        attributes: ``attributes_text``, `` rows=576 columns=1536 …``.
    """
    first = inputs[0]
    assert first is not None
    return first.new_empty(*first.shape[:leading], width, dtype=torch.float32)


def attributes_text(attributes: Mapping[str, float]) -> str:
    """Attributes as the packed functions take them."""
    return "".join(f" {name}={value if isinstance(value, float) else int(value)}" for name, value in attributes.items())


OPPOSITES: dict[Any, int] = {}
"""No operator gives gates and one less those."""


def _native(operator: str, inputs: Sequence[Tensor | None], attributes: Mapping[str, float], width: int) -> Tensor:
    first = inputs[0]
    assert first is not None
    result: Tensor = native(operator, list(inputs), attributes_text(attributes), first.dim() - (operator != "quantized_embedding"), width)
    return result


def quantized_linear(
    x: Tensor, codes: Tensor, scales: Tensor, offsets: Tensor | None, bias: Tensor | None, rows: int, columns: int, bits: int, block: int,
    terms: int, lower: Tensor | None = None, margin: float = 0.0, gates: Tensor | None = None, gated: int = 0,
    stand_in: Sequence[Tensor | None] = (), format_of_it: tuple[tuple[str, int], ...] = (),
) -> Tensor:  # fmt: skip
    """[..., K] -> [..., N]; gates [..., 1], of the first ``gated`` outputs where that is not 0; ``stand_in``: of the linear expert for
    tokens whose gate is 0, its x, codes, scales and offsets, bias, and again codes, scales and offsets."""
    attributes = {"rows": rows, "columns": columns, "bits": bits, "block": block, "terms": terms, "margin": float(margin), "gated": gated}
    inputs = [x, codes, scales, offsets, bias, lower, gates, *stand_in]
    return _native("quantized_linear", inputs, attributes | dict(format_of_it), rows)


def quantized_embedding(
    ids: Tensor, codes: Tensor, scales: Tensor, offsets: Tensor | None, rows: int, columns: int, bits: int, block: int,
    lower: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Rows of a quantized table: [...] -> [..., K]."""
    attributes = {"rows": rows, "columns": columns, "bits": bits, "block": block}
    return _native("quantized_embedding", [ids, codes, scales, offsets, lower], attributes, columns)


def quantized_ffn(
    x: Tensor, gates: Tensor | None, up: Sequence[Tensor | None], up_bias: Tensor | None, down: Sequence[Tensor | None],
    router: Sequence[Tensor | None], down_bias: Tensor | None, attributes: tuple[tuple[str, int], ...], base: Tensor | None = None,
    stand_in: Sequence[Tensor | None] = (), format_of_it: tuple[tuple[str, int], ...] = (),
) -> Tensor:  # fmt: skip
    """``dyncomp.routed_ffn`` with the router inside: [..., d] -> [..., d_out]. ``up``, ``down``: codes, scales, offsets; ``base``
    [..., d_out]: what the result is added to; ``stand_in``: :func:`quantized_linear`."""
    values = dict(attributes) | dict(format_of_it)
    return _native("quantized_ffn", [x, gates, *up, up_bias, *down, *router, down_bias, base, *stand_in], values, values["rows"])


def sparse_linear(
    x: Tensor, thresholds: Tensor, codes: Tensor, scales: Tensor, offsets: Tensor | None, bias: Tensor | None, rows: int, columns: int,
    bits: int, block: int, activation: int,
) -> Tensor:  # fmt: skip
    """``dyncomp.sparse_linear`` on weights packed input by input: [..., K] -> [..., N], or [..., N / 2] with an ``activation``."""
    attributes = {"rows": rows, "columns": columns, "bits": bits, "block": block, "activation": activation}
    return _native("sparse_linear", [x, thresholds, codes, scales, offsets, bias], attributes, rows if activation < 0 else rows // 2)
