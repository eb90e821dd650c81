"""Decoding with the graph itself, in PyTorch: the reference that other backends are held to."""

from __future__ import annotations

import numpy as np
import torch
from dyncomp.backends.decoder import require_encoded
from dyncomp.backends.recompute import Array, Recompute
from dyncomp.passes.split_encoder import encode

from dyncomp.errors import RequestError
from dyncomp.graph import Graph


class TorchDecoder:
    """A :class:`~dyncomp.runtime.session.DecoderSession` over a graph with a KV cache."""

    engine, cached = "dyncomp-torch", True

    def __init__(self, graph: Graph) -> None:
        self.graph, self.threads = graph, torch.get_num_threads()
        self.context_length = int(graph.info["kv_cache"]["context_length"])
        self.reads = () if graph.encoder is None else tuple(s.name for s in graph.encoder.inputs)
        self._chosen = any(s.name == "chosen" for s in graph.inputs)
        self._specs = [s for s in graph.inputs if "_cache_" in s.name]
        self._encoded: dict[str, torch.Tensor] = {}
        self.reset()

    def encode(self, **inputs: Array) -> None:
        if self.graph.encoder is None:
            raise RequestError("the model has no encoder")
        with torch.no_grad():
            self._encoded = encode(self.graph, {name: torch.as_tensor(value) for name, value in inputs.items()})

    def reset(self) -> None:
        self._past, self._caches = torch.zeros(0, dtype=torch.int64), list[torch.Tensor]()

    def prefill(self, ids: Array, lengths: Array, room: int) -> Array:
        batch, length = ids.shape
        require_encoded(self.graph.encoder, len(next(iter(self._encoded.values()), ())), batch)
        sizes = {"batch": batch, "capacity": length + room}
        self._past = torch.zeros(batch, dtype=torch.int64)
        self._caches = [torch.zeros([sizes.get(d, 0) if isinstance(d, str) else d for d in s.shape], dtype=s.dtype) for s in self._specs]
        return self._run(torch.as_tensor(ids), torch.as_tensor(lengths))

    def step(self, ids: Array) -> Array:
        return self._run(torch.as_tensor(ids).reshape(-1, 1), torch.ones(len(self._past), dtype=torch.int64))

    def _run(self, ids: torch.Tensor, lengths: torch.Tensor) -> Array:
        chosen = {"chosen": lengths[:, None] - 1} if self._chosen else {}
        caches = {s.name: cache for s, cache in zip(self._specs, self._caches, strict=True)}
        with torch.no_grad():
            logits, *self._caches = self.graph(input_ids=ids, past_length=self._past, **chosen, **caches, **self._encoded)
        self._past = self._past + lengths
        picked = logits[:, 0] if self._chosen else logits[torch.arange(len(ids)), lengths - 1]
        return np.asarray(picked.float().numpy())


def decoder_for(graph: Graph) -> TorchDecoder | Recompute:
    """A session for the graph: with its KV cache when it has one, else computing the whole sequence at every step."""
    if "kv_cache" in graph.info:
        return TorchDecoder(graph)

    def logits(ids: Array) -> Array:
        with torch.no_grad():
            return np.asarray(graph(torch.as_tensor(ids)).float().numpy())

    context = int(graph.info.get("context_length") or 0)
    return Recompute(logits, engine="dyncomp-torch", threads=torch.get_num_threads(), context_length=context)
