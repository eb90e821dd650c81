"""Token-by-token decoding with the KV cache updated in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from dyncomp.backends.caches import cache_names
from dyncomp.backends.decoder import CHUNK, CachedDecoder, append_in_pieces, session_for
from dyncomp.backends.ort.run import OrtModel
from dyncomp.backends.recompute import Array, Recompute

_NOTHING: Mapping[str, Array] = {}


@dataclass(frozen=True)
class DeviceArray:
    """A cache in the memory of a device. ``value``: an ``OrtValue``."""

    value: Any
    shape: tuple[int, ...]


class OrtDecoder(CachedDecoder):
    """Decoding over an :class:`OrtModel`: the cache is bound as both the past and the new one, so a step neither allocates nor copies it.

    On a GPU the cache stays there; tokens go in and logits come out by copies.
    """

    engine = "dyncomp-ort"

    def __init__(self, model: OrtModel) -> None:
        super().__init__(model)
        self._names = cache_names(model)

    def _allocate(self, batch: int, capacity: int) -> list[Any]:
        caches = super()._allocate(batch, capacity)
        if self.model.device == "cpu":
            return caches
        from onnxruntime import OrtValue

        return [DeviceArray(OrtValue.ortvalue_from_numpy(c, self.model.device, 0), c.shape) for c in caches]

    def _read(self, ids: Array, lengths: Array) -> Array:
        if ids.shape[1] <= CHUNK or self.model.device != "cpu":
            return self._bind(ids, self._past, lengths[:, None] - 1).run()[:, 0]
        # GroupQueryAttention continues a sequence by more than one token only in a batch of one.
        rows = range(len(ids))
        return np.concatenate([self._read_row(ids[row : row + 1, : lengths[row]], row) for row in rows])

    def _read_row(self, ids: Array, row: int) -> Array:
        encoded = {name: value[row : row + 1] for name, value in self._encoded.items()}
        caches = [c[row : row + 1] for c in self._caches]
        return append_in_pieces(lambda i, past, chosen: Binding(self.model, self._names, i, past, chosen, caches, encoded), ids, 0)

    def _bind(self, ids: Array, past: Array, chosen: Array) -> Binding:
        return Binding(self.model, self._names, ids, past, chosen, self._caches, self._encoded)


class Binding:
    """Inputs and outputs tied to memory once; :meth:`run` may be called again after changing the arrays.

    Args:
        names: of the caches, inputs that become the outputs ``new_…`` in the same memory.
        ids: [B, S]. past: [B], tokens each row has. chosen: [B, P], whose logits are wanted.
        caches: [B, Hkv, C, D] each, contiguous, or a :class:`DeviceArray`.
        encoded: what the encoder gave, [B, …] each, by name.
    """

    def __init__(
        self, model: OrtModel, names: list[str], ids: Array, past: Array, chosen: Array, caches: list[Any],
        encoded: Mapping[str, Array] = _NOTHING,
    ) -> None:  # fmt: skip
        from onnxruntime import OrtValue, RunOptions

        session, takes_chosen = model.session, "chosen" in model.inputs
        self.ids, self._session, self._options = ids, session._sess, RunOptions()
        self._pick = None if takes_chosen else (np.arange(len(chosen))[:, None], np.array(chosen))
        self._binding: Any = session.io_binding()
        self._output = model.outputs[0]
        self._binding.bind_output(self._output, "cpu")  # bound first, so that it is the first of get_outputs()
        # On the CPU these share the arrays' memory.
        self._keep = [a.value if isinstance(a, DeviceArray) else OrtValue.ortvalue_from_numpy(a) for a in caches]
        self._copied: list[tuple[str, Any]] = []  # inputs that a GPU reads as they were when they were bound
        named: list[tuple[str, Array]] = [("input_ids", ids), ("past_length", past), *encoded.items()]
        if takes_chosen:
            named.append(("chosen", np.ascontiguousarray(chosen, np.int64)))
        for name, array in named:
            self._keep.append(value := OrtValue.ortvalue_from_numpy(array))
            self._binding.bind_ortvalue_input(name, value)
            if model.device != "cpu" and name not in encoded:
                self._copied.append((name, value))
        for name, value in zip(names, self._keep, strict=False):
            self._binding.bind_ortvalue_input(name, value)
            self._binding.bind_ortvalue_output(f"new_{name}", value)
        self._logits: Array | None = None

    def run(self) -> Array:
        """[B, P, V]: the logits after the chosen tokens."""
        for name, value in self._copied:
            self._binding.bind_ortvalue_input(name, value)
        self._session.run_with_iobinding(self._binding._iobinding, self._options)
        if self._logits is None:  # the first run shows the shape: from now on the same memory is written
            first = self._binding.get_outputs()[0].numpy()
            from onnxruntime import OrtValue

            self._logits = np.ascontiguousarray(first)
            self._keep.append(value := OrtValue.ortvalue_from_numpy(self._logits))
            self._binding.bind_ortvalue_output(self._output, value)
        return self._logits if self._pick is None else self._logits[self._pick]


def decoder_for(model: OrtModel) -> OrtDecoder | Recompute:
    """A session for the model: with its KV cache when it has one, else computing the whole sequence at every step."""
    return session_for(model, OrtDecoder)
