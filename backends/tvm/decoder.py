"""Token-by-token decoding with the KV cache updated in place."""

from __future__ import annotations

from typing import Any

import numpy as np
from dyncomp.backends.caches import cache_names
from dyncomp.backends.decoder import CHUNK, CachedDecoder, session_for
from dyncomp.backends.recompute import Array, Recompute
from dyncomp.backends.tvm.run import TvmModel, aligned_copy, aligned_zeros


class TvmDecoder(CachedDecoder):
    """Decoding over a :class:`TvmModel`."""

    engine = "dyncomp-tvm"
    zeros = staticmethod(aligned_zeros)

    def _read(self, ids: Array, lengths: Array) -> Array:
        logits = np.zeros((len(ids), 0), np.float32)
        for start in range(0, ids.shape[1], CHUNK):
            piece = ids[:, start : start + CHUNK]
            last = np.clip(lengths - 1 - start, 0, piece.shape[1] - 1)
            found = self._bind(piece, self._past, last[:, None]).run()[:, 0]
            ends = (lengths > start) & (lengths <= start + piece.shape[1])
            logits = np.where(ends[:, None], found, logits) if logits.size else np.array(found)
            self._past += piece.shape[1]
        return logits

    def _bind(self, ids: Array, past: Array, chosen: Array) -> Call:
        return Call(self.model, ids, past, chosen, dict(zip(cache_names(self.model), self._caches, strict=True)) | self._encoded)


class Call:
    """Inputs bound once; :meth:`run` may be called again after changing the arrays.

    Args:
        ids: [B, S], copied. past: [B], aligned, tokens each row has. chosen: [B, P], whose logits are wanted.
        state: by name, aligned: caches [B, Hkv, C, D], into which the new keys and values are written, and what the encoder gave.
    """

    def __init__(self, model: TvmModel, ids: Array, past: Array, chosen: Array, state: dict[str, Array]) -> None:
        self.model, self.ids = model, aligned_copy(ids)
        named = {"input_ids": self.ids, "past_length": past, "chosen": aligned_copy(np.asarray(chosen, np.int64))} | state
        self._pick = None if "chosen" in model.inputs else (np.arange(len(chosen))[:, None], np.array(chosen))
        self._inputs: list[Any] = [model.bind(named[n]) for n in model.inputs]

    def run(self) -> Array:
        """[B, P, V]: the logits after the chosen tokens, valid until the next run."""
        self._logits = self.model.call(self._inputs)[0]
        logits = np.from_dlpack(self._logits)
        return logits if self._pick is None else logits[self._pick]


def decoder_for(model: TvmModel) -> TvmDecoder | Recompute:
    """A session for the model: with its KV cache when it has one, else computing the whole sequence at every step."""
    return session_for(model, TvmDecoder)
