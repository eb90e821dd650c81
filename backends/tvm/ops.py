"""The kernels as PyTorch operators, so that a graph that calls them can be exported; they compute nothing.

``dyncomp.backends.tvm.importer`` turns each into a call of its kernel in :mod:`dyncomp.backends.tvm.kernels`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _export_only(function: Callable[..., Any]) -> Any:
    operation = torch.library.custom_op(f"dyncomp_tvm::tvm_{function.__name__}", function, mutates_args=())
    operation.register_fake(function)
    return operation._opoverload


@_export_only
def linear(x: Tensor, weight: Tensor, bias: Tensor, rows: int) -> Tensor:
    """``x W^T + bias``: x [..., K], weight [panels, K, width], bias [panels * width] -> [..., rows]."""
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
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Causal attention over a KV cache that is updated in place.

    Args:
        query: [B, S, H * D], or query, key and value side by side, [B, S, (H + 2 Hkv) D]: then key and value are None.
        key, value: [B, S, Hkv * D]. key_cache, value_cache: [B, Hkv, C, D]. past_length: [B].
        cos, sin: [P, R / 2], the rotary embedding to apply; or None.

    Returns:
        [B, S, H * D] and the caches.
    """
    out = query.new_empty(*query.shape[:2], heads * key_cache.shape[3])
    return out, torch.empty_like(key_cache), torch.empty_like(value_cache)
