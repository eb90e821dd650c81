"""A KV cache shared by sequences that come and go, in ONNX Runtime."""

from __future__ import annotations

from dyncomp.backends.ort.decoder import Binding
from dyncomp.backends.recompute import Array
from dyncomp.backends.slots import CachedSlots


class OrtSlots(CachedSlots):
    """Slots over an :class:`~dyncomp.backends.ort.run.OrtModel` with a KV cache."""

    engine = "dyncomp-ort"

    def _bind(self, ids: Array, past: Array, chosen: Array, caches: list[Array]) -> Binding:
        return Binding(self.model, self.names, ids, past, chosen, caches)
