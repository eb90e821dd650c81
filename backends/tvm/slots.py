"""A KV cache shared by sequences that come and go, in TVM."""

from __future__ import annotations

from dyncomp.backends.recompute import Array
from dyncomp.backends.slots import CachedSlots
from dyncomp.backends.tvm.decoder import Call
from dyncomp.backends.tvm.layout import ALIGNMENT
from dyncomp.backends.tvm.run import aligned_zeros


class TvmSlots(CachedSlots):
    """Slots over a :class:`~dyncomp.backends.tvm.run.TvmModel` with a KV cache."""

    engine = "dyncomp-tvm"
    zeros = staticmethod(aligned_zeros)
    granule = ALIGNMENT // 4  # so many floats: the part of a slot begins where TVM can read

    def _bind(self, ids: Array, past: Array, chosen: Array, caches: list[Array]) -> Call:
        return Call(self.model, ids, past, chosen, dict(zip(self.names, caches, strict=True)))
