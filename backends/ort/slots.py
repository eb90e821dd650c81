"""A KV cache shared by sequences that come and go."""

from __future__ import annotations

import numpy as np
from dyncomp.backends.decoder import allocate_caches, cache_names
from dyncomp.backends.ort.decoder import Binding, append_in_pieces
from dyncomp.backends.ort.run import OrtModel
from dyncomp.backends.recompute import Array

from dyncomp.errors import BackendError, RequestError


class OrtSlots:
    """A :class:`~dyncomp.runtime.session.Slots` over an :class:`OrtModel` with a KV cache.

    Args:
        slots: sequences at a time.
        capacity: tokens of each, at most the model's context. Memory: ``slots * capacity`` times the model's bytes a token
            (:attr:`bytes_per_token`), allocated once.

    Raises:
        BackendError: the model has no KV cache, or is on a GPU.
        RequestError: no slots, or a capacity that the model does not have.
    """

    engine = "dyncomp-ort"

    def __init__(self, model: OrtModel, *, slots: int, capacity: int) -> None:
        cache = model.kv_cache
        if cache is None:
            raise BackendError(f"the model in {model.directory} has no KV cache: its sequences cannot share one")
        if model.encoder is not None:
            raise BackendError(f"the model in {model.directory} is an encoder–decoder: its sequences do not join and leave a batch")
        if model.device != "cpu":
            raise BackendError(f"sequences come and go in the memory of the CPU only, and this model runs on {model.device}")
        context = int(cache["context_length"])
        if slots < 1 or not 1 < capacity <= context:
            raise RequestError(f"{slots} sequences of {capacity} tokens: at least 1, of 2 to {context} tokens")
        self.model, self.threads, self.slots, self.capacity = model, model.threads, slots, capacity
        self.names = cache_names(model)
        self.lengths = np.zeros(slots, np.int64)
        self._caches = allocate_caches(model, slots, capacity)
        self._steps: dict[int, Binding] = {}

    @property
    def bytes_per_token(self) -> int:
        return sum(c.nbytes for c in self._caches) // (self.slots * self.capacity)

    def extend(self, slot: int, ids: Array) -> Array:
        """Append tokens [S] to the sequence in ``slot``; returns the logits [V] after the last one."""
        if self.lengths[slot] + len(ids) > self.capacity:
            raise RequestError(f"{self.lengths[slot]} tokens and {len(ids)} more exceed the capacity of {self.capacity}")
        caches = [c[slot : slot + 1] for c in self._caches]
        logits = append_in_pieces(self.model, self.names, ids[None], int(self.lengths[slot]), caches)
        self.lengths[slot] += len(ids)
        return logits[0]

    def step(self, ids: Array) -> Array:
        """Append one token to each of the first ``len(ids)`` slots; returns logits [n, V], valid until the next call."""
        count = len(ids)
        if (self.lengths[:count] >= self.capacity).any():
            raise RequestError(f"a sequence fills its capacity of {self.capacity} tokens")
        if count not in self._steps:
            caches = [c[:count] for c in self._caches]
            self._steps[count] = Binding(
                self.model, self.names, np.zeros((count, 1), np.int64), self.lengths[:count], np.zeros((count, 1), np.int64), caches
            )
        binding = self._steps[count]
        binding.ids[:, 0] = ids
        logits = binding.run()[:, 0]
        self.lengths[:count] += 1
        return logits

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Let ``target`` begin with the first ``tokens`` tokens of ``source``."""
        if source != target:
            for cache in self._caches:
                cache[target, :, :tokens] = cache[source, :, :tokens]
        self.lengths[target] = tokens
