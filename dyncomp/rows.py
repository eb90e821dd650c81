"""What graphs run on, by rows: of one tensor, or of two for models that hear and write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ABSENT = -1
"""Stands where a pair has no token."""


@dataclass(frozen=True, eq=False)
class SpeechRows:
    """Recordings, and what is written for each.

    Args:
        features: [n, ...] as the encoder takes them: log-mel features ``[n, mel bins, frames]``.
        written: int64 [n, longest], :data:`ABSENT` after a text's end.
    """

    features: Tensor
    written: Tensor

    def __len__(self) -> int:
        return len(self.written)

    def __getitem__(self, chosen: slice | Sequence[int]) -> SpeechRows:
        return SpeechRows(self.features[chosen], self.written[chosen])


Rows = Tensor | SpeechRows
"""``[n, ...]`` the main input: token ids ``[n, length]``, pixels ``[n, channels, height, width]``; pairs of texts are
``[n, 2, length]``, what is read and what is written, :data:`ABSENT` after an end."""


def tensors_of(rows: Rows) -> list[Tensor]:
    """All there is in rows, to be hashed."""
    return [rows.features, rows.written] if isinstance(rows, SpeechRows) else [rows]


def is_pairs(rows: Rows) -> bool:
    """Whether each row is something that is read, or heard, and what is written for it."""
    return isinstance(rows, SpeechRows) or (rows.dim() == 3 and not rows.is_floating_point())


def written_of(pairs: Rows) -> Tensor:
    """int64 [n, longest]: what is written, :data:`ABSENT` after an end."""
    return pairs.written if isinstance(pairs, SpeechRows) else pairs[:, 1]


def read_of(rows: Rows) -> Tensor:
    """[n, ...]: what is read, heard or seen, of rows of the same lengths."""
    if isinstance(rows, SpeechRows):
        return rows.features
    return rows[:, 0, : int((rows[0, 0] != ABSENT).sum())] if is_pairs(rows) else rows


def written_lengths(pairs: Rows) -> Tensor:
    """[n]: tokens that are written."""
    return (written_of(pairs) != ABSENT).sum(-1)


def row_lengths(rows: Rows) -> Tensor:
    """[n]: tokens that figures are about: of pairs those that are written."""
    return written_lengths(rows) if is_pairs(rows) else torch.full((len(rows),), read_of(rows).shape[1])


def shortened(rows: Rows, tokens: int) -> Rows:
    """Rows with at most so many tokens on each side; images and recordings stay whole."""
    if isinstance(rows, SpeechRows):
        return SpeechRows(rows.features, rows.written[:, :tokens])
    return rows if rows.is_floating_point() else rows[..., :tokens]


def split_rows(rows: Rows, size: int) -> list[Rows]:
    """At most ``size`` rows at a time, in order; of pairs, only neighbours of the same lengths."""
    ends = _changes(rows) if is_pairs(rows) else [len(rows)]
    found: list[Rows] = []
    start = 0
    for end in ends:
        found += [rows[at : min(at + size, end)] for at in range(start, end, size)]
        start = end
    return found


def _changes(pairs: Rows) -> list[int]:
    """Where rows of the same lengths end."""
    lengths = written_lengths(pairs)[:, None] if isinstance(pairs, SpeechRows) else (pairs != ABSENT).sum(-1)
    _, counts = lengths.unique_consecutive(dim=0, return_counts=True)
    return counts.cumsum(0).tolist()
