"""Weights in few bits: codes, scales and offsets in blocks along the input dimension."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCKS = (32, 64, 128)
_PART = 1 << 24  # weights that are rounded or decoded at once: a vocabulary's take gigabytes


@dataclass(frozen=True)
class Quantized:
    """One weight: ``value[..., n, k] = scales[..., n, b] * codes[..., n, k] + offsets[..., n, b]``, ``b = k // block``.

    Args:
        codes: [..., N, K] uint8, 0 to 2^bits - 1.
        scales: [..., N, K / block] float16.
        offsets: [..., N, K / block] float16; or None: symmetric, the middle code (128 or 8) stands for zero.
        bits: 4 or 8.

    A float offset, where other formats have an integer zero point, also holds what GGUF's Q4_1 holds, exactly.
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None
    bits: int

    @property
    def block(self) -> int:
        """Weights that share a scale."""
        return self.codes.shape[-1] // self.scales.shape[-1]

    @property
    def bytes(self) -> int:
        """Size as stored: codes packed, scales and offsets in two bytes each."""
        return self.codes.numel() * self.bits // 8 + self.scales.numel() * (2 if self.offsets is None else 4)

    @property
    def format(self) -> tuple[int, int, bool]:
        """What kernels distinguish: (bits, block, symmetric)."""
        return self.bits, self.block, self.offsets is None

    def upper(self) -> Quantized:
        """The upper halves of 8-bit codes as a weight in 4 bits; offsets hold what the lower halves come to in the middle."""
        assert self.bits == 8
        scales = self.scales.float()
        start = -128 * scales if self.offsets is None else self.offsets.float()
        return Quantized(self.codes >> 4, (16 * scales).half(), (start + 7.5 * scales).half(), 4)

    @functools.cached_property
    def preview(self) -> Tensor:
        """What :meth:`upper` decodes to, [..., N, K] float32; made once, for it takes longer than a product with it."""
        return self.upper().decode()

    def decode(self) -> Tensor:
        """[..., N, K] float32."""
        value = torch.empty(self.codes.shape)
        for out, codes, scales, offsets in zip(
            *(_rows(t, self.codes) for t in (value, self.codes, self.scales, self.offsets)), strict=True
        ):
            out.copy_(decode(codes.unflatten(-1, (-1, self.block)), scales, offsets, self.bits).flatten(-2))
        return value


def round_to_nearest(weight: Tensor, bits: int, block: int, *, symmetric: bool = True) -> Quantized:
    """Quantize each block by itself.

    Args:
        weight: [..., N, K]; ``block`` must divide K.
        symmetric: the scale covers the largest magnitude; otherwise scale and offset cover the range.
    """
    parts = []
    for rows in _rows(weight, weight):
        blocks = rows.float().unflatten(-1, (-1, block))
        scales, offsets = grid(blocks, bits, symmetric=symmetric)
        parts.append(Quantized(encode(blocks, scales, offsets, bits).flatten(-2), scales, offsets, bits))
    whole, shape = join(parts), weight.shape[:-1]
    assert whole is not None  # one format
    offsets = None if whole.offsets is None else whole.offsets.unflatten(0, shape)
    return Quantized(whole.codes.unflatten(0, shape), whole.scales.unflatten(0, shape), offsets, bits)


def _rows(value: Tensor | None, like: Tensor) -> Iterator[Any]:
    """The rows of ``value`` [..., N, any], as many at once as have :data:`_PART` values in ``like`` [..., N, K]; Nones for None."""
    step = max(1, _PART // like.shape[-1])
    count = -(-like[..., 0].numel() // step)
    return itertools.repeat(None, count) if value is None else iter(value.reshape(-1, value.shape[-1]).split(step))


def grid(blocks: Tensor, bits: int, *, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """(scales [...] float16, offsets [...] float16 or None) for blocks of weights [..., block]."""
    if symmetric and bits == 8:
        return _scale(blocks.abs().amax(-1) / 127), None
    if symmetric:  # the code -8 has no counterpart: let the block's largest magnitude, whatever its sign, have it
        index = blocks.abs().argmax(-1, keepdim=True)
        return _scale(-blocks.gather(-1, index).squeeze(-1) / 8), None
    low, high = blocks.amin(-1), blocks.amax(-1)
    return _scale((high - low) / (2**bits - 1)), low.to(torch.float16)


def encode(blocks: Tensor, scales: Tensor, offsets: Tensor | None, bits: int) -> Tensor:
    """Codes [..., block] uint8 of the nearest values on the grid; scales and offsets are [...]."""
    scale = scales.float()[..., None]
    steps = blocks / scale + 2.0 ** (bits - 1) if offsets is None else (blocks - offsets.float()[..., None]) / scale
    lowest = 1 if offsets is None and bits == 8 else 0  # symmetric int8 has no -128: kernels may negate
    return steps.nan_to_num(0, 0, 0).round().clamp(lowest, 2**bits - 1).to(torch.uint8)


def decode(codes: Tensor, scales: Tensor, offsets: Tensor | None, bits: int) -> Tensor:
    """Values [..., block] float32 of codes [..., block]; scales and offsets are [...]."""
    scale = scales.float()[..., None]
    if offsets is None:
        return (codes.float() - 2.0 ** (bits - 1)) * scale
    return codes.float() * scale + offsets.float()[..., None]


def _scale(values: Tensor) -> Tensor:
    smallest = torch.finfo(torch.float16).tiny
    return torch.where(values.abs() < smallest, torch.where(values == 0, 0.0, smallest), values).to(torch.float16)


def pack_nibbles(codes: Tensor) -> Tensor:
    """[..., K] codes below 16 -> [..., K / 2] uint8, the even ones in the low half."""
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of :func:`pack_nibbles`."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def join(parts: list[Quantized]) -> Quantized | None:
    """The rows of several weights one after the other, or None when their formats differ."""
    if len({p.format for p in parts}) != 1:
        return None
    offsets = None if parts[0].offsets is None else torch.cat([p.offsets for p in parts if p.offsets is not None], -2)
    return Quantized(torch.cat([p.codes for p in parts], -2), torch.cat([p.scales for p in parts], -2), offsets, parts[0].bits)
