"""One interface to whatever computes the next token's logits."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, Any]


class DecoderSession(Protocol):
    """A batch of sequences that grows token by token.

    Attributes:
        engine: what computes, for reports: ``dyncomp-ort``, ``dyncomp-torch``.
        cached: whether past keys and values are kept; else every step computes the whole sequence again.
        threads: how many it uses.
        context_length: the most tokens a sequence can have; 0 when there is no limit known.
    """

    engine: str
    cached: bool
    threads: int
    context_length: int

    def prefill(self, ids: Array, lengths: Array, room: int) -> Array:
        """Begin new sequences.

        Args:
            ids: [B, S] int64, padded on the right.
            lengths: [B] real tokens of each row, at least 1.
            room: how many tokens may follow.

        Returns:
            [B, V] float32, the logits after each row's last token.
        """

    def step(self, ids: Array) -> Array:
        """Append one token to each sequence: ids [B] -> logits [B, V] float32 (valid until the next call)."""

    def reset(self) -> None:
        """Forget the sequences."""


class Recompute:
    """A session over a model without a cache: the whole sequence is computed at every step.

    Args:
        logits: ids [B, S] int64 -> [B, S, V] float32; causal, so that padding on the right changes nothing before it.
        engine, threads, context_length: see :class:`DecoderSession`.
    """

    cached = False

    def __init__(self, logits: Any, *, engine: str, threads: int, context_length: int = 0) -> None:
        self.engine, self.threads, self.context_length = engine, threads, context_length
        self._logits = logits
        self.reset()

    def prefill(self, ids: Array, lengths: Array, room: int) -> Array:
        self._ids, self._lengths = np.array(ids, dtype=np.int64), np.array(lengths, dtype=np.int64)
        return self._last()

    def step(self, ids: Array) -> Array:
        if self._lengths.max() == self._ids.shape[1]:
            self._ids = np.pad(self._ids, ((0, 0), (0, 1)))
        self._ids[np.arange(len(self._lengths)), self._lengths] = ids
        self._lengths += 1
        return self._last()

    def reset(self) -> None:
        self._ids, self._lengths = np.zeros((0, 0), np.int64), np.zeros(0, np.int64)

    def _last(self) -> Array:
        logits = np.asarray(self._logits(self._ids))
        return logits[np.arange(len(self._lengths)), self._lengths - 1]
