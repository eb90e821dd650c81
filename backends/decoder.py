"""Token-by-token decoding over a lowered model whose KV cache is updated in place: what the backends share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from dyncomp.backends.caches import allocate_caches
from dyncomp.backends.recompute import Array, Recompute

from dyncomp.errors import BackendError, RequestError

CHUNK = 512  # longest piece of a prompt computed at once: bounds the memory for activations and attention scores


class CachedDecoder:
    """A :class:`~dyncomp.runtime.session.ExtendableSession` over a lowered model with a KV cache, allocated once.

    Of an encoder–decoder it is the decoder, and ``model.encoder`` another model whose outputs are inputs of this one.
    A backend says how arrays are allocated (``zeros``), how a call is bound to its inputs, and how a prompt is read.
    """

    engine: str
    cached = True
    zeros: Callable[..., Array] = staticmethod(np.zeros)

    def __init__(self, model: Any) -> None:
        cache = model.kv_cache
        if cache is None:
            raise BackendError(
                f"the model in {model.directory} has no KV cache", hint="decoder_for() then computes the whole sequence again"
            )
        self.model, self.threads = model, int(model.threads)
        self.context_length = int(cache["context_length"])
        self.reads: tuple[str, ...] = () if model.encoder is None else tuple(model.encoder.inputs)
        self._caches: list[Any] = []
        self._encoded: dict[str, Array] = {}
        self.reset()

    def encode(self, **inputs: Array) -> None:
        """See :class:`~dyncomp.runtime.session.Seq2SeqSession`."""
        if self.model.encoder is None:
            raise RequestError(f"the model in {self.model.directory} has no encoder")
        self._encoded = {name: self._held(value) for name, value in self.model.encoder.run(**inputs).items()}
        self.reset()

    def reset(self) -> None:
        self._past = self.zeros([0], np.int64)
        self._calls: dict[int, Any] = {}

    def prefill(self, ids: Array, lengths: Array, room: int) -> Array:
        ids, lengths = np.ascontiguousarray(ids, np.int64), np.asarray(lengths, np.int64)
        batch, length = ids.shape
        require_encoded(self.model.encoder, len(next(iter(self._encoded.values()), ())), batch)
        capacity = length + room
        if self.context_length and capacity > self.context_length:
            raise RequestError(f"{length} tokens and room for {room} more exceed the model's context of {self.context_length}")
        self._reserve(batch, capacity)
        self.reset()
        self._past = self.zeros([batch], np.int64)
        logits = self._read(ids, lengths)
        self._past[:] = lengths
        return logits

    def step(self, ids: Array) -> Array:
        call = self._call(len(self._past), 1)
        call.ids[:, 0] = ids
        logits: Array = call.run()[:, 0]
        self._past += 1
        return logits

    def extend(self, ids: Array) -> Array:
        if len(self._past) != 1:
            raise RequestError(f"a batch of {len(self._past)} sequences grows by one token at a time")
        call = self._call(1, len(ids))
        call.ids[0] = ids
        logits: Array = call.run()[0]
        self._past += len(ids)
        return logits

    def rewind(self, tokens: int) -> None:
        self._past -= tokens

    def _held(self, array: Array) -> Array:
        """A copy in memory that the backend can read."""
        copy = self.zeros(array.shape, array.dtype)
        copy[...] = array
        return copy

    def _read(self, ids: Array, lengths: Array) -> Array:
        """Put a prompt [B, S] into the empty caches; the logits [B, V] after each row's last token. May change ``_past``."""
        raise NotImplementedError

    def _bind(self, ids: Array, past: Array, chosen: Array) -> Any:
        """A call that appends ``ids`` [B, S]: its ``ids`` may be changed, ``run()`` gives the logits [B, P, V] of the chosen tokens."""
        raise NotImplementedError

    def _call(self, batch: int, count: int) -> Any:
        """The call that appends ``count`` tokens and gives the logits of each; kept for the next time."""
        if count not in self._calls:
            every = np.tile(np.arange(count), (batch, 1))
            self._calls[count] = self._bind(np.zeros((batch, count), np.int64), self._past, every)
        return self._calls[count]

    def _reserve(self, batch: int, capacity: int) -> None:
        """Make sure that there are caches for this many rows and tokens; existing ones are used again when they fit."""
        if self._caches and self._caches[0].shape[0] == batch and self._caches[0].shape[2] >= capacity:
            return
        if self.context_length:
            capacity = min(self.context_length, -(-capacity // 64) * 64)
        self._caches = []  # free before allocating
        self._caches = self._allocate(batch, capacity)

    def _allocate(self, batch: int, capacity: int) -> list[Any]:
        """Empty caches, each of which says its ``shape``."""
        return allocate_caches(self.model, batch, capacity, self.zeros)


def append_in_pieces(bind: Callable[[Array, Array, Array], Any], ids: Array, past: int, zeros: Callable[..., Array] = np.zeros) -> Array:
    """Append ids [1, S] to a sequence of ``past`` tokens, :data:`CHUNK` at a time; the logits [1, V] after the last one.

    Args:
        bind: (ids, past [1], chosen [1, 1]) -> a call, whose ``run()`` gives the logits [1, 1, V].
    """
    logits, reached = np.zeros((1, 0), np.float32), zeros([1], np.int64)
    for start in range(0, ids.shape[1], CHUNK):
        piece = np.ascontiguousarray(ids[:, start : start + CHUNK], np.int64)
        reached[0] = past + start
        logits = bind(piece, reached, np.array([[piece.shape[1] - 1]])).run()[:, 0]
    return logits


def require_encoded(encoder: Any, encoded: int, batch: int) -> None:
    """Raises:
    RequestError: there is an encoder, and it has not been run on as many rows as there are sequences.
    """
    if encoder is not None and encoded != batch:
        found = f"{batch} sequences are to be written, and the encoder has read {encoded} inputs"
        raise RequestError(found if encoded else "the encoder has read nothing", hint="call encode() first, with a row for each sequence")


D = TypeVar("D", bound=CachedDecoder)


def session_for(model: Any, decoder: type[D]) -> D | Recompute:
    """A session for the model: with its KV cache when it has one, else computing the whole sequence at every step."""
    if model.kv_cache is not None:
        return decoder(model)
    if model.inputs != ("input_ids",):
        raise BackendError(
            f"the model takes {list(model.inputs)}: it is no decoder over input_ids",
            hint=f"call {type(model).__name__}.run() with its inputs",
        )
    return Recompute(
        lambda ids: model.run(input_ids=ids)[model.outputs[0]], engine=decoder.engine, threads=model.threads,
        context_length=int(model.config.get("context_length") or 0),
    )  # fmt: skip
