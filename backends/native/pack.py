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
    return _columns(_half(scales))


def _half(scales: Array) -> Array:
    with np.errstate(over="ignore"):
        half = scales.astype(np.float16)
    if not np.isfinite(half).all():
        raise ValueError("a scale or offset is not finite as float16: scale the weights down")
    return half


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


def pack_lower(codes: Array, scales: Array) -> Array:
    """The lower halves of 8-bit codes by rows: uint8 [N, K], float16 [N, K / block] -> uint8 [N, K / 2 + 2 K / block].

    First the codes, the byte i of a block of 32 holding the column i and, in its upper half, the column 16 + i; then the scales.
    """
    halves = (codes & 15).reshape(len(codes), -1, 2, BLOCK // 2)
    packed = (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(len(codes), -1)
    return np.ascontiguousarray(np.concatenate([packed, np.ascontiguousarray(_half(scales)).view(np.uint8)], axis=1))


def pack_inputs(codes: Array, bits: int) -> Array:
    """For products that skip inputs: uint8 [N, K] -> uint8 [K, bits * N / 8], N filled up to a multiple of 64 with zeros.

    An input's codes for 64 rows are 64 bytes, in the order in which interleaving the bytes of four inputs leaves the rows in order: the
    byte 16 a + 4 b + i holds the row 16 b + 4 a + i. In 4 bits, 64 bytes hold 128 rows, the lower halves the first 64; where the rows end
    with 64, 32 bytes hold these, the byte 16 a + 4 b + i the rows 8 b + 4 a + i and, in the upper half, 32 more.

    Raises:
        ValueError: as :func:`pack_codes`.
    """
    _check(bits, codes.shape[-1])
    rows = _fill_rows(codes).T
    if bits == 8:
        return _interleaved(rows, 4)
    whole = rows.shape[1] // 128 * 128
    parts = rows[:, :whole].reshape(len(rows), -1, 2, 64)
    packed = [_interleaved(np.ascontiguousarray(parts[:, :, half]).reshape(len(rows), -1), 4) << (4 * half) for half in (0, 1)]
    result = packed[0] | packed[1]
    if whole < rows.shape[1]:
        last = [_interleaved(rows[:, at : at + 32], 2) << (at - whole) // 8 for at in (whole, whole + 32)]
        result = np.concatenate([result, last[0] | last[1]], axis=1)
    return np.ascontiguousarray(result)


def pack_input_scales(scales: Array) -> Array:
    """Scales or offsets for :func:`pack_inputs`: [N, K / block] -> float16 [K / block, N], N filled up to a multiple of 64.

    Raises:
        ValueError: as :func:`pack_scales`.
    """
    return np.ascontiguousarray(_fill_rows(_half(scales)).T)


def _fill_rows(rows: Array) -> Array:
    return np.concatenate([rows, np.zeros((-len(rows) % 64, rows.shape[1]), rows.dtype)])


def _interleaved(rows: Array, pieces: int) -> Array:
    """[K, N] -> [K, N]: of each 16 * pieces rows, [4, pieces, 4] -> [pieces, 4, 4]."""
    parts = rows.reshape(len(rows), -1, 4, pieces, 4)
    return np.ascontiguousarray(parts.swapaxes(2, 3)).reshape(rows.shape)
