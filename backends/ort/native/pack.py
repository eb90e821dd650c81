"""The layout the kernels read.

A matrix [N, K] is quantized along K in blocks: ``value = scale[n, b] * code + offset[n, b]``; without offsets
``scale[n, b] * (code - middle)``, the middle being 8 for 4 bits and 128 for 8 bits. Its rows are cut into tiles of 16 (the last one
filled with rows of scale 0), its columns into blocks of 32:

* 8 bits: 512 bytes a tile and block: 8 groups of [16 rows x 4 columns];
* 4 bits: 256 bytes: 4 groups of 64 bytes, the low halves [16 rows x 4 columns], the high halves the next 4 columns;
* scales and offsets: [tiles, K / block, 16].

A matrix of floats is stored as tiles of 16 rows too: [tiles, K, 16].
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
TILE, BLOCK = 16, 32


def pack_codes(codes: Array, bits: int) -> Array:
    """uint8 [..., N, K] -> uint8 [..., tiles, K / 32, 64 * bits].

    Raises:
        ValueError: ``bits`` is not 4 or 8, K is no multiple of 32, or a code does not fit.
    """
    _check(bits, codes.shape[-1])
    if bits == 4 and codes.size and int(codes.max()) > 15:
        raise ValueError(f"4-bit codes go up to 15, here up to {int(codes.max())}")
    *lead, _, columns = codes.shape
    tiles = _tiles(codes).reshape(*lead, -1, TILE, columns // BLOCK, BLOCK // 4, 4)  # [..., tile, row, block, group, column]
    groups = np.moveaxis(tiles, -4, -2)  # [..., tile, block, group, row, column]
    if bits == 4:
        groups = groups[..., 0::2, :, :] | (groups[..., 1::2, :, :] << 4)
    return np.ascontiguousarray(groups).reshape(*groups.shape[:-3], -1)


def unpack_codes(packed: Array, rows: int, bits: int) -> Array:
    """The inverse of :func:`pack_codes`: uint8 [..., tiles, K / 32, 64 * bits] -> uint8 [..., rows, K]."""
    groups = packed.reshape(*packed.shape[:-1], -1, TILE, 4)
    if bits == 4:
        groups = np.stack([groups & 15, groups >> 4], axis=-3).reshape(*packed.shape[:-1], BLOCK // 4, TILE, 4)
    tiles = np.moveaxis(groups, -2, -4)  # [..., tile, row, block, group, column]
    *lead, count, _, blocks, _, _ = tiles.shape
    return np.ascontiguousarray(tiles).reshape(*lead, count * TILE, blocks * BLOCK)[..., :rows, :]


def pack_scales(scales: Array) -> Array:
    """Scales or offsets: [..., N, K / block] -> float16 [..., tiles, K / block, 16].

    Raises:
        ValueError: a scale or offset is not finite as float16.
    """
    with np.errstate(over="ignore"):
        half = scales.astype(np.float16)
    if not np.isfinite(half).all():
        raise ValueError("a scale or offset is not finite as float16: scale the weights down")
    return _columns(half)


def pack_floats(weights: Array) -> Array:
    """Weights that are not quantized: float32 [..., N, K] -> [..., tiles, K, 16]."""
    return _columns(weights)


def _check(bits: int, columns: int) -> None:
    if bits not in (4, 8):
        raise ValueError(f"bits is {bits}; it should be 4 or 8")
    if columns % BLOCK:
        raise ValueError(f"{columns} columns are no multiple of {BLOCK}")


def _tiles(rows: Array) -> Array:
    """[..., N, C] -> [..., tiles, 16, C], filled with zeros."""
    *lead, count, columns = rows.shape
    if missing := -count % TILE:
        rows = np.concatenate([rows, np.zeros((*lead, missing, columns), rows.dtype)], axis=-2)
    return rows.reshape(*lead, -1, TILE, columns)


def _columns(values: Array) -> Array:
    return np.ascontiguousarray(np.swapaxes(_tiles(values), -1, -2))
