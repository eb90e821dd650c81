"""A KV cache shared by sequences that come and go: what the backends share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from dyncomp.backends.caches import allocate_caches, cache_names
from dyncomp.backends.decoder import append_in_pieces
from dyncomp.backends.recompute import Array

from dyncomp.errors import BackendError, RequestError


class CachedSlots:
    """A :class:`~dyncomp.runtime.session.Slots` over a lowered model with a KV cache. A backend says how arrays are allocated (``zeros``,
    ``granule``) and how a call is bound to its inputs.

    Args:
        slots: sequences at a time.
        capacity: tokens of each, at most the model's context. Memory: ``slots * capacity`` times the model's bytes a token
            (:attr:`bytes_per_token`), allocated once.

    Raises:
        BackendError: the model has no KV cache.
        RequestError: no slots, or a capacity that the model does not have.
    """

    engine: str
    zeros: Callable[..., Array] = staticmethod(np.zeros)
    granule = 1
    """Memory of a slot is for a multiple of so many tokens."""

    def __init__(self, model: Any, *, slots: int, capacity: int) -> None:
        cache = model.kv_cache
        if cache is None:
            raise BackendError(f"the model in {model.directory} has no KV cache: its sequences cannot share one")
        if model.encoder is not None:
            raise BackendError(f"the model in {model.directory} is an encoder–decoder: its sequences do not join and leave a batch")
        context = int(cache["context_length"])
        if slots < 1 or not 1 < capacity <= context:
            raise RequestError(f"{slots} sequences of {capacity} tokens: at least 1, of 2 to {context} tokens")
        self.model, self.threads, self.slots, self.capacity = model, int(model.threads), slots, capacity
        self.names = cache_names(model)
        self.lengths = self.zeros([slots], np.int64)
        self._allocated = -(-capacity // self.granule) * self.granule
        self._caches = allocate_caches(model, slots, self._allocated, self.zeros)
        self._steps: dict[int, Any] = {}

    @property
    def bytes_per_token(self) -> int:
        return sum(c.nbytes for c in self._caches) // (self.slots * self._allocated)

    def extend(self, slot: int, ids: Array) -> Array:
        """Append tokens [S] to the sequence in ``slot``; returns the logits [V] after the last one."""
        length = int(self.lengths[slot])
        if length + len(ids) > self.capacity:
            raise RequestError(f"{length} tokens and {len(ids)} more exceed the capacity of {self.capacity}")
        caches = [c[slot : slot + 1] for c in self._caches]
        logits = append_in_pieces(lambda i, past, chosen: self._bind(i, past, chosen, caches), ids[None], length, self.zeros)
        self.lengths[slot] += len(ids)
        return np.asarray(logits[0])

    def step(self, ids: Array) -> Array:
        """Append one token to each of the first ``len(ids)`` slots; returns logits [n, V], valid until the next call."""
        count = len(ids)
        if (self.lengths[:count] >= self.capacity).any():
            raise RequestError(f"a sequence fills its capacity of {self.capacity} tokens")
        if count not in self._steps:
            caches, column = [c[:count] for c in self._caches], np.zeros((count, 1), np.int64)
            self._steps[count] = self._bind(column, self.lengths[:count], column.copy(), caches)
        call = self._steps[count]
        call.ids[:, 0] = ids
        logits: Array = call.run()[:, 0]
        self.lengths[:count] += 1
        return logits

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Let ``target`` begin with the first ``tokens`` tokens of ``source``."""
        if source != target:
            for cache in self._caches:
                cache[target, :, :tokens] = cache[source, :, :tokens]
        self.lengths[target] = tokens

    def _bind(self, ids: Array, past: Array, chosen: Array, caches: list[Array]) -> Any:
        """A call that appends ``ids`` [B, S] to what ``caches`` hold: its ``ids`` may be changed, ``run()`` gives the logits [B, P, V] of
        the chosen tokens."""
        raise NotImplementedError
