"""What the matrix kernels share: panels of packed weights, and the register tile that runs over one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from dyncomp.backends.tvm.machine import Machine
from torch import Tensor
from tvm.script import tirx as T


@dataclass(frozen=True)
class Tile:
    """The shape of the innermost product: ``rows`` tokens by ``vectors * lanes`` outputs are held in registers.

    Args:
        lanes: floats in a vector register.
        vectors: vectors side by side; ``width = vectors * lanes`` outputs make a panel, the unit in which weights are stored.
        rows: tokens at a time; ``rows * vectors`` sums, a panel's row of weights and an input must fit the registers.
        unroll: steps along the depth that are written out one after the other.
        parts: of the depth, worked through one after the other for all tokens, so that a part of a panel stays in the cache. It divides
            the depth.
        split: parts of the tokens that go to threads of their own; 1 deals out whole panels.
    """

    lanes: int = 16
    vectors: int = 4
    rows: int = 6
    unroll: int = 1
    parts: int = 1
    split: int = 1

    @classmethod
    def of(cls, machine: Machine) -> Tile:
        """What a machine's registers ask for, without tuning."""
        return cls(machine.lanes, machine.vectors, machine.rows)

    @property
    def width(self) -> int:
        return self.lanes * self.vectors

    def panels(self, rows: int) -> int:
        """Panels that hold this many rows of a weight; the last one may be padded with zeros."""
        return -(-rows // self.width)


def pack(weight: Tensor, tile: Tile) -> Tensor:
    """[..., N, K] as ``nn.Linear`` keeps it -> [..., panels, K, width]: what one tile reads is one stream."""
    *lead, n, k = weight.shape
    count = tile.panels(n)
    padded = torch.nn.functional.pad(weight, (0, 0, 0, count * tile.width - n))
    return padded.reshape(*lead, count, tile.width, k).transpose(-1, -2).contiguous()


def pad_rows(vector: Tensor, tile: Tile) -> Tensor:
    """A bias [..., N] with zeros for the rows that :func:`pack` pads."""
    return torch.nn.functional.pad(vector, (0, tile.panels(vector.shape[-1]) * tile.width - vector.shape[-1]))


def interleave(gate: Tensor, up: Tensor, tile: Tile) -> Tensor:
    """The rows of a gated layer so ordered that a panel holds ``width / 2`` neurons' gate rows, then their up rows.

    [..., F, K] each -> [..., 2 F', K]; F is padded with zeros to F', a multiple of ``width / 2``.
    """
    half = tile.width // 2
    missing = -gate.shape[-2] % half
    parts = [torch.nn.functional.pad(w, (0, 0, 0, missing)).unflatten(-2, (-1, half)) for w in (gate, up)]
    return torch.stack(parts, -3).flatten(-4, -2)


def pack_experts(w_up: Tensor, b_up: Tensor | None, w_down: Tensor, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
    """The weights of ``dyncomp.routed_ffn`` as the kernel reads them: up and its bias (zeros for None), down.

    w_up [E, F or 2F, d] -> [E, panels, d, width]; w_down [E, d_out, F] -> [E, panels, F', width], F' as many as the panels of up give.
    """
    neurons = w_down.shape[2]
    bias = torch.zeros(w_up.shape[:2]) if b_up is None else b_up
    given = tile.width
    if w_up.shape[1] == 2 * neurons:
        given = tile.width // 2
        w_up = interleave(w_up[:, :neurons], w_up[:, neurons:], tile)
        bias = interleave(bias[:, :neurons, None], bias[:, neurons:, None], tile).squeeze(-1)
    down = torch.nn.functional.pad(w_down, (0, -neurons % given))
    return pack(w_up, tile), pad_rows(bias, tile), pack(down, tile)


def product(lanes: int, unroll: int = 1) -> Any:
    """The macro ``product(acc, x, w, depth, rows, vectors)``: ``acc[m, r, :] += x(m, k) * w(k, r, :)`` over k < depth.

    ``x(m, k)`` and ``w(k, r, lane)`` are functions that give an expression; ``acc`` is a local buffer [rows, vectors, lanes].
    """

    @T.macro
    def step(acc, x, w, k, rows, vectors):
        for m in T.unroll(rows):
            for r in T.unroll(vectors):
                for v in T.vectorized(lanes):
                    acc[m, r, v] = acc[m, r, v] + x(m, k) * w(k, r, v)

    @T.macro
    def macro(acc, x, w, depth, rows, vectors):
        if unroll == 1:
            for k in range(depth):
                step(acc, x, w, k, rows, vectors)
        else:
            for k in range(depth // unroll):
                for u in T.unroll(unroll):
                    step(acc, x, w, k * unroll + u, rows, vectors)
            for k in range(depth % unroll):
                step(acc, x, w, depth // unroll * unroll + k, rows, vectors)

    return macro
