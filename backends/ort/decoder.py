"""Token-by-token decoding with the KV cache updated in place."""

from __future__ import annotations

from typing import Any

import numpy as np
from dyncomp.backends.ort.run import OrtModel
from dyncomp.backends.recompute import Array, Recompute

from dyncomp.errors import BackendError, RequestError

CHUNK = 512  # longest piece of a prompt computed at once: bounds the memory for attention scores


class OrtDecoder:
    """A :class:`~dyncomp.runtime.session.DecoderSession` over an :class:`OrtModel` with a KV cache.

    The cache is allocated once and bound as both the past and the new cache, so a step neither allocates nor copies.
    """

    engine, cached = "dyncomp-ort", True

    def __init__(self, model: OrtModel) -> None:
        cache = model.kv_cache
        if cache is None:
            raise BackendError(
                f"the model in {model.directory} has no KV cache", hint="decoder_for() then computes the whole sequence again"
            )
        self.model, self.threads = model, model.threads
        self.context_length = int(cache["context_length"])
        self._names = cache_names(model)
        self._caches: list[Array] = []
        self.reset()

    def reset(self) -> None:
        self._past = np.zeros(0, np.int64)
        self._decode: Binding | None = None
        self._extend: dict[int, Binding] = {}

    def prefill(self, ids: Array, lengths: Array, room: int) -> Array:
        ids, lengths = np.ascontiguousarray(ids, np.int64), np.asarray(lengths, np.int64)
        batch, length = ids.shape
        capacity = length + room
        if self.context_length and capacity > self.context_length:
            raise RequestError(f"{length} tokens and room for {room} more exceed the model's context of {self.context_length}")
        self._reserve(batch, capacity)
        self.reset()
        self._past = lengths.copy()
        if length <= CHUNK:
            return self._bind(ids, np.zeros(batch, np.int64), lengths - 1).run()[:, 0]
        # GroupQueryAttention continues a sequence by more than one token only in a batch of one.
        return np.concatenate([self._prefill_row(ids[row : row + 1, : lengths[row]], row) for row in range(batch)])

    def _prefill_row(self, ids: Array, row: int) -> Array:
        return append_in_pieces(self.model, self._names, ids, 0, [c[row : row + 1] for c in self._caches])

    def step(self, ids: Array) -> Array:
        if self._decode is None:
            batch = len(self._past)
            self._decode = self._bind(np.zeros((batch, 1), np.int64), self._past, np.zeros(batch, np.int64))
        self._decode.ids[:, 0] = ids
        logits = self._decode.run()[:, 0]
        self._past += 1
        return logits

    def _bind(self, ids: Array, past: Array, last: Array) -> Binding:
        return Binding(self.model, self._names, ids, past, last[:, None], self._caches)

    def extend(self, ids: Array) -> Array:
        if len(self._past) != 1:
            raise RequestError(f"a batch of {len(self._past)} sequences grows by one token at a time")
        count = len(ids)
        if count not in self._extend:
            ids_, every = np.zeros((1, count), np.int64), np.arange(count)[None]
            self._extend[count] = Binding(self.model, self._names, ids_, self._past, every, self._caches)
        self._extend[count].ids[0] = ids
        logits = self._extend[count].run()[0]
        self._past += count
        return logits

    def rewind(self, tokens: int) -> None:
        self._past -= tokens

    def _reserve(self, batch: int, capacity: int) -> None:
        """Make sure that there are caches for this many rows and tokens; existing ones are used again when they fit."""
        if self._caches and self._caches[0].shape[0] == batch and self._caches[0].shape[2] >= capacity:
            return
        if self.context_length:
            capacity = min(self.context_length, -(-capacity // 64) * 64)
        self._caches = []  # free before allocating
        self._caches = allocate_caches(self.model, batch, capacity)


def cache_names(model: OrtModel) -> list[str]:
    """The inputs that are KV caches."""
    return [n for n in model.inputs if n not in ("input_ids", "past_length", "chosen")]


def allocate_caches(model: OrtModel, batch: int, capacity: int) -> list[Array]:
    """[batch, Hkv, capacity, D] of zeros for each of :func:`cache_names`."""
    sizes, names = {"batch": batch, "capacity": capacity}, cache_names(model)
    shapes = [i["shape"] for i in model.config["inputs"] if i["name"] in names]
    return [np.zeros([sizes.get(d, d) for d in shape], np.float32) for shape in shapes]


def append_in_pieces(model: OrtModel, names: list[str], ids: Array, past: int, caches: list[Array]) -> Array:
    """Append ids [1, S] to the sequence of ``past`` tokens in ``caches`` (a batch of one); the logits [1, V] after the last one."""
    logits = np.zeros((1, 0), np.float32)
    for start in range(0, ids.shape[1], CHUNK):
        chunk = np.ascontiguousarray(ids[:, start : start + CHUNK], np.int64)
        last = np.array([[chunk.shape[1] - 1]])
        logits = Binding(model, names, chunk, np.array([past + start]), last, caches).run()[:, 0]
    return logits


class Binding:
    """Inputs and outputs tied to memory once; :meth:`run` may be called again after changing the arrays.

    Args:
        names: of the caches, inputs that become the outputs ``new_…`` in the same memory.
        ids: [B, S]. past: [B], tokens each row has. chosen: [B, P], whose logits are wanted.
        caches: [B, Hkv, C, D] each, contiguous.
    """

    def __init__(self, model: OrtModel, names: list[str], ids: Array, past: Array, chosen: Array, caches: list[Array]) -> None:
        from onnxruntime import OrtValue, RunOptions

        session, takes_chosen = model.session, "chosen" in model.inputs
        self.ids, self._session, self._options = ids, session._sess, RunOptions()
        self._pick = None if takes_chosen else (np.arange(len(chosen))[:, None], np.array(chosen))
        self._binding: Any = session.io_binding()
        self._output = model.outputs[0]
        self._binding.bind_output(self._output, "cpu")  # bound first, so that it is the first of get_outputs()
        self._keep = [OrtValue.ortvalue_from_numpy(a) for a in caches]  # on the CPU these share the arrays' memory
        named: list[tuple[str, Array]] = [("input_ids", ids), ("past_length", past)]
        if takes_chosen:
            named.append(("chosen", np.ascontiguousarray(chosen, np.int64)))
        for name, array in named:
            self._keep.append(value := OrtValue.ortvalue_from_numpy(array))
            self._binding.bind_ortvalue_input(name, value)
        for name, value in zip(names, self._keep, strict=False):
            self._binding.bind_ortvalue_input(name, value)
            self._binding.bind_ortvalue_output(f"new_{name}", value)
        self._logits: Array | None = None

    def run(self) -> Array:
        """[B, P, V]: the logits after the chosen tokens."""
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
    if model.kv_cache is not None:
        return OrtDecoder(model)
    if model.inputs != ("input_ids",):
        raise BackendError(
            f"the model takes {list(model.inputs)}: it is no decoder over input_ids", hint="call OrtModel.run() with its inputs"
        )
    return Recompute(
        lambda ids: model.run(input_ids=ids)[model.outputs[0]], engine="dyncomp-ort", threads=model.threads,
        context_length=int(model.config.get("context_length") or 0),
    )  # fmt: skip
