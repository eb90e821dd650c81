"""Token-by-token decoding with the KV cache updated in place."""

from __future__ import annotations

from typing import Any

import numpy as np
from dyncomp.backends.recompute import Array, Recompute
from dyncomp.backends.tvm.run import TvmModel, aligned_copy, aligned_zeros

from dyncomp.errors import BackendError, RequestError

CHUNK = 512  # longest piece of a prompt computed at once: bounds the memory for activations


class TvmDecoder:
    """A :class:`~dyncomp.runtime.session.ExtendableSession` over a :class:`TvmModel` with a KV cache, allocated once."""

    engine, cached = "dyncomp-tvm", True

    def __init__(self, model: TvmModel) -> None:
        cache = model.kv_cache
        if cache is None:
            raise BackendError(
                f"the model in {model.directory} has no KV cache", hint="decoder_for() then computes the whole sequence again"
            )
        self.model, self.threads = model, model.threads
        self.context_length = int(cache["context_length"])
        self._caches: list[Array] = []
        self.reset()

    def reset(self) -> None:
        self._past = aligned_zeros([0], np.int64)
        self._calls: dict[int, Call] = {}

    def prefill(self, ids: Array, lengths: Array, room: int) -> Array:
        ids, lengths = np.ascontiguousarray(ids, np.int64), np.asarray(lengths, np.int64)
        batch, length = ids.shape
        capacity = length + room
        if self.context_length and capacity > self.context_length:
            raise RequestError(f"{length} tokens and room for {room} more exceed the model's context of {self.context_length}")
        self._reserve(batch, capacity)
        self.reset()
        self._past = aligned_zeros([batch], np.int64)
        logits = np.zeros((batch, 0), np.float32)
        for start in range(0, length, CHUNK):
            piece = ids[:, start : start + CHUNK]
            last = np.clip(lengths - 1 - start, 0, piece.shape[1] - 1)
            call = Call(self.model, piece, self._past, last[:, None], self._caches)
            found = call.run()[:, 0]
            ends = (lengths > start) & (lengths <= start + piece.shape[1])
            logits = np.where(ends[:, None], found, logits) if logits.size else np.array(found)
            self._past += piece.shape[1]
        self._past[:] = lengths
        return logits

    def step(self, ids: Array) -> Array:
        call = self._call(len(self._past), 1)
        call.ids[:, 0] = ids
        logits = call.run()[:, 0]
        self._past += 1
        return logits

    def extend(self, ids: Array) -> Array:
        if len(self._past) != 1:
            raise RequestError(f"a batch of {len(self._past)} sequences grows by one token at a time")
        call = self._call(1, len(ids))
        call.ids[0] = ids
        logits = call.run()[0]
        self._past += len(ids)
        return logits

    def rewind(self, tokens: int) -> None:
        self._past -= tokens

    def _call(self, batch: int, count: int) -> Call:
        """The call that appends ``count`` tokens and gives the logits of each; kept for the next time."""
        if count not in self._calls:
            every = np.tile(np.arange(count), (batch, 1))
            self._calls[count] = Call(self.model, np.zeros((batch, count), np.int64), self._past, every, self._caches)
        return self._calls[count]

    def _reserve(self, batch: int, capacity: int) -> None:
        """Make sure that there are caches for this many rows and tokens; existing ones are used again when they fit."""
        if self._caches and self._caches[0].shape[0] == batch and self._caches[0].shape[2] >= capacity:
            return
        if self.context_length:
            capacity = min(self.context_length, -(-capacity // 64) * 64)
        self._caches = []  # free before allocating
        self._caches = allocate_caches(self.model, batch, capacity)


def allocate_caches(model: TvmModel, batch: int, capacity: int) -> list[Array]:
    """[batch, Hkv, capacity, D] of zeros for each cache."""
    sizes = {"batch": batch, "capacity": capacity}
    specs = [i for i in model.config["inputs"] if i["name"] not in ("input_ids", "past_length", "chosen")]
    return [aligned_zeros([sizes.get(d, d) for d in s["shape"]], np.float32) for s in specs]


class Call:
    """Inputs bound once; :meth:`run` may be called again after changing the arrays.

    Args:
        ids: [B, S], copied. past: [B], aligned, tokens each row has. chosen: [B, P], whose logits are wanted.
        caches: [B, Hkv, C, D] each, aligned; the new keys and values are written into them.
    """

    def __init__(self, model: TvmModel, ids: Array, past: Array, chosen: Array, caches: list[Array]) -> None:
        self.model, self.ids = model, aligned_copy(ids)
        named = {"input_ids": self.ids, "past_length": past, "chosen": aligned_copy(np.asarray(chosen, np.int64))}
        self._pick = None if "chosen" in model.inputs else (np.arange(len(chosen))[:, None], np.array(chosen))
        first = [named[n] for n in model.inputs if n in named]
        self._inputs: list[Any] = [model.bind(a) for a in (*first, *caches)]

    def run(self) -> Array:
        """[B, P, V]: the logits after the chosen tokens, valid until the next run."""
        self._logits = self.model.call(self._inputs)[0]
        logits = np.from_dlpack(self._logits)
        return logits if self._pick is None else logits[self._pick]


def decoder_for(model: TvmModel) -> TvmDecoder | Recompute:
    """A session for the model: with its KV cache when it has one, else computing the whole sequence at every step."""
    if model.kv_cache is not None:
        return TvmDecoder(model)
    if model.inputs != ("input_ids",):
        raise BackendError(
            f"the model takes {list(model.inputs)}: it is no decoder over input_ids", hint="call TvmModel.run() with its inputs"
        )
    return Recompute(
        lambda ids: model.run(input_ids=ids)[model.outputs[0]], engine="dyncomp-tvm", threads=model.threads,
        context_length=int(model.config.get("context_length") or 0),
    )  # fmt: skip
