"""GPTQ: quantize a weight column by column, each column's error made good by the columns after it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from dyncomp.graph import Graph
from dyncomp.ops import expert_hidden
from dyncomp.quantized import Quantized, decode, encode, grid, join
from dyncomp.regions import RoutedFFN

_SHRINK = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
_LAZY = 128  # columns whose errors are passed on together
_VALUES = 1 << 26  # weights at once: a vocabulary's take gigabytes in float64


def gptq(weight: Tensor, gram: Tensor, bits: int, block: int, *, symmetric: bool = True, damping: float = 0.01) -> Quantized:
    """Quantize ``weight`` so that its outputs, not its values, change least (Frantar et al., 2210.17323).

    Each block's scale is chosen when its first column is reached, from the columns as they are by then, among shrunken ranges
    by weighted squared error.

    Args:
        weight: [N, K].
        gram: [K, K] sum of x xᵀ over calibration inputs x.
        damping: added to the diagonal, as a fraction of its mean.
    """
    factor = _inverse_factor(gram, damping)
    parts = weight.split(max(1, _VALUES // weight.shape[1]))  # rows do not depend on each other
    whole = join([_gptq_rows(rows, factor, bits, block, symmetric=symmetric) for rows in parts])
    assert whole is not None  # one format
    return whole


def _gptq_rows(weight: Tensor, factor: Tensor, bits: int, block: int, *, symmetric: bool) -> Quantized:
    w = weight.double().clone()
    importance = factor.diagonal().reciprocal().square()
    rows, columns = w.shape
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    scales = torch.empty(rows, columns // block, dtype=torch.float16)
    offsets = None if symmetric else torch.empty(rows, columns // block, dtype=torch.float16)
    for start in range(0, columns, _LAZY):
        end = min(start + _LAZY, columns)
        errors = torch.zeros(rows, end - start, dtype=w.dtype)
        for column in range(start, end):
            index = column // block
            if column % block == 0:
                span = slice(column, column + block)
                scales[:, index], offset = search_grid(w[:, span].float(), importance[span].float(), bits, symmetric=symmetric)
                if offsets is not None and offset is not None:
                    offsets[:, index] = offset
            scale, offset = scales[:, index], None if offsets is None else offsets[:, index]
            code = encode(w[:, column, None].float(), scale, offset, bits)
            codes[:, column] = code[:, 0]
            value = decode(code, scale, offset, bits)[:, 0].double()
            error = (w[:, column] - value) / factor[column, column]
            errors[:, column - start] = error
            w[:, column + 1 : end] -= error[:, None] * factor[column, column + 1 : end]
        w[:, end:] -= errors @ factor[start:end, end:]
    return Quantized(codes, scales, offsets, bits)


def search_grid(blocks: Tensor, importance: Tensor, bits: int, *, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """Scales and offsets of blocks [..., block] with the smallest squared error weighted by ``importance`` [block], over ranges
    from 70 % to 100 % of each block's own."""
    scales, offsets = grid(blocks, bits, symmetric=symmetric)
    best = _error(blocks, scales, offsets, importance, bits)
    for shrink in _SHRINK if bits < 8 else ():
        scale, offset = grid(blocks * shrink, bits, symmetric=symmetric)
        error = _error(blocks, scale, offset, importance, bits)
        better = error < best
        best, scales = torch.where(better, error, best), torch.where(better, scale, scales)
        offsets = None if offsets is None or offset is None else torch.where(better, offset, offsets)
    return scales, offsets


def _error(blocks: Tensor, scales: Tensor, offsets: Tensor | None, importance: Tensor, bits: int) -> Tensor:
    value = decode(encode(blocks, scales, offsets, bits), scales, offsets, bits)
    return ((value - blocks).square() * importance).sum(-1)


def gram_of(blocks: Iterable[Tensor]) -> Tensor:
    """[K, K] sum of x xᵀ over the rows of blocks [n, K]."""
    total: Tensor | None = None
    for x in blocks:
        total = x.T @ x if total is None else total.addmm_(x.T, x)
    assert total is not None
    return total


def gated_hidden(graph: Graph, routed: RoutedFFN, inputs: Sequence[Tensor], gates: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """What the down-projections of experts read, a batch at a time: (hidden activations times gates [E, n, F], which tokens run which
    experts [n, E])."""
    up, bias = graph.tensor(routed.w_up).detach(), None if routed.b_up is None else graph.tensor(routed.b_up).detach()
    for x, gate in zip(inputs, gates, strict=True):
        flat = gate.reshape(-1, routed.experts)
        h = expert_hidden(x.reshape(-1, routed.d_model), up, bias, routed.d_ff // routed.experts, routed.activation) * flat[..., None]
        yield h.transpose(0, 1), flat != 0


def _inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped Gram matrix; inputs that are always 0 do not matter."""
    h = gram.double().clone()
    diagonal = h.diagonal()
    diagonal += damping * diagonal.mean().clamp_min(1e-12)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    return torch.linalg.cholesky(inverse, upper=True)
