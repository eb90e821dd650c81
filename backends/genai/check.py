"""Decoding from a folder for onnxruntime-genai: by that program, or, where it is not installed, by ONNX Runtime fed in the same way."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
from dyncomp.backends.artifact import first_line
from dyncomp.backends.genai.write import CONFIG
from dyncomp.backends.parity import parity
from dyncomp.backends.recompute import Array

from dyncomp.errors import BackendError
from dyncomp.graph import Graph
from dyncomp.hardware import default_threads


def compare(graph: Graph, folder: Path, *, good: float) -> dict[str, Any]:
    """Hold the folder against the graph (with a KV cache) that it was made from; see :func:`dyncomp.backends.parity.parity`."""
    installed = importlib.util.find_spec("onnxruntime_genai") is not None
    model = GenaiModel(folder, graph.precision) if installed else FedModel(folder, graph.precision)
    found = parity(graph, model, lambda opened: opened.session(), backend="genai", good=good)
    name = "onnxruntime-genai" if installed else "ONNX Runtime, fed as by onnxruntime-genai"
    return {"class": name} | {key: found[key] for key in ("relative_error", "typical_error", "greedy_tokens_equal") if key in found}


class GenaiModel:
    """The folder, opened by onnxruntime-genai."""

    def __init__(self, folder: Path, precision: str = "fp32") -> None:
        import onnxruntime_genai

        self.library, self.precision, self.folder = onnxruntime_genai, precision, folder
        self.model = self._call(onnxruntime_genai.Model, str(folder))

    def session(self) -> GenaiSession:
        return GenaiSession(self)

    def _call(self, function: Any, *args: Any) -> Any:
        try:
            return function(*args)
        except Exception as error:
            raise BackendError(f"onnxruntime-genai does not run {self.folder}: {first_line(error)}") from error


class GenaiSession:
    """A :class:`~dyncomp.runtime.session.DecoderSession`: one generator a row, for tokens can be given to a generator alone only."""

    engine, cached = "onnxruntime-genai", True

    def __init__(self, model: GenaiModel) -> None:
        self._model, self.threads = model, default_threads()
        self.context_length = json.loads((model.folder / CONFIG).read_text())["model"]["context_length"]
        self.reset()

    def reset(self) -> None:
        self._rows: list[Any] = []

    def prefill(self, ids: Array, lengths: Array, room: int) -> Array:
        library, self._rows = self._model.library, []
        for length in lengths:
            parameters = library.GeneratorParams(self._model.model)
            parameters.set_search_options(max_length=int(length) + room, batch_size=1)
            self._rows.append(self._model._call(library.Generator, self._model.model, parameters))
        return self._append([row[:length] for row, length in zip(ids, lengths, strict=True)])

    def step(self, ids: Array) -> Array:
        return self._append([ids[row : row + 1] for row in range(len(ids))])

    def _append(self, tokens: list[Array]) -> Array:
        for generator, new in zip(self._rows, tokens, strict=True):
            self._model._call(generator.append_tokens, new.astype(np.int32)[None])
        return np.stack([self._model._call(generator.get_logits).reshape(-1) for generator in self._rows])


class FedModel:
    """The folder, opened by ONNX Runtime as its configuration says."""

    def __init__(self, folder: Path, precision: str = "fp32") -> None:
        import onnxruntime

        self.config, self.precision = json.loads((folder / CONFIG).read_text())["model"], precision
        decoder, options = self.config["decoder"], onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if kernels := decoder["session_options"].get("custom_ops_library"):
            options.register_custom_ops_library(str(folder / kernels))
        try:
            self.onnx = onnxruntime.InferenceSession(str(folder / decoder["filename"]), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise BackendError(f"ONNX Runtime cannot load {folder / decoder['filename']}: {first_line(error)}") from error
        self.past, self.present = (
            [names[f"{what}_{kind}_names"] % i for i in range(decoder["num_hidden_layers"]) for kind in ("key", "value")]
            for what, names in (("past", decoder["inputs"]), ("present", decoder["outputs"]))
        )

    def session(self) -> FedSession:
        return FedSession(self)


class FedSession:
    """A :class:`~dyncomp.runtime.session.DecoderSession` that feeds what onnxruntime-genai does: tokens, a mask of all tokens by now, with
    zeros where the prompt was padded, and caches with room for all that may follow."""

    engine, cached = "onnxruntime", True

    def __init__(self, model: FedModel) -> None:
        self._model, self.threads, self.context_length = model, default_threads(), int(model.config["context_length"])
        self.reset()

    def reset(self) -> None:
        self._mask, self._caches = np.zeros((0, 0), np.int64), list[Array]()

    def prefill(self, ids: Array, lengths: Array, room: int) -> Array:
        batch, length = ids.shape
        self._mask = (np.arange(length) < np.asarray(lengths)[:, None]).astype(np.int64)
        shapes = {i.name: i.shape for i in self._model.onnx.get_inputs()}
        self._caches = [np.zeros((batch, shapes[n][1], length + room, shapes[n][3]), np.float32) for n in self._model.past]
        return self._run(np.asarray(ids, np.int64))

    def step(self, ids: Array) -> Array:
        self._mask = np.pad(self._mask, ((0, 0), (0, 1)), constant_values=1)
        return self._run(np.asarray(ids, np.int64)[:, None])

    def _run(self, ids: Array) -> Array:
        inputs, outputs = (self._model.config["decoder"][key] for key in ("inputs", "outputs"))
        feeds = {inputs["input_ids"]: ids, inputs["attention_mask"]: self._mask, **dict(zip(self._model.past, self._caches, strict=True))}
        logits, *self._caches = self._model.onnx.run([outputs["logits"], *self._model.present], feeds)
        return np.asarray(logits[:, 0])
