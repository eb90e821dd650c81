"""Decoding without a cache: what every backend falls back to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class Recompute:
    """A :class:`~dyncomp.runtime.session.DecoderSession` that computes the whole sequence at every step.

    Args:
        logits: ids [B, S] int64 -> [B, S, V] float32; causal, so that padding on the right changes nothing before it.
        engine, threads, context_length: see :class:`~dyncomp.runtime.session.DecoderSession`.
    """

    cached = False

    def __init__(self, logits: Callable[[Array], Array], *, engine: str, threads: int, context_length: int = 0) -> None:
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
        logits = self._logits(self._ids)
        return np.asarray(logits[np.arange(len(self._lengths)), self._lengths - 1])
