"""A KV cache shared by sequences that come and go, in ONNX Runtime."""

from __future__ import annotations

from dyncomp.backends.ort.decoder import Binding
from dyncomp.backends.ort.run import OrtModel
from dyncomp.backends.recompute import Array
from dyncomp.backends.slots import CachedSlots

from dyncomp.errors import BackendError


class OrtSlots(CachedSlots):
    """Slots over an :class:`~dyncomp.backends.ort.run.OrtModel` with a KV cache, in the memory of the CPU."""

    engine = "dyncomp-ort"

    def __init__(self, model: OrtModel, *, slots: int, capacity: int) -> None:
        if model.device != "cpu":
            raise BackendError(f"sequences come and go in the memory of the CPU only, and this model runs on {model.device}")
        super().__init__(model, slots=slots, capacity=capacity)

    def _bind(self, ids: Array, past: Array, chosen: Array, caches: list[Array]) -> Binding:
        return Binding(self.model, self.names, ids, past, chosen, caches)
