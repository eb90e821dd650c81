"""Run a lowered model."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dyncomp.backends.artifact import Array, as_array, first_line, read_config
from dyncomp.backends.ort.lower import MODEL, SCHEMA
from dyncomp.backends.ort.native import library
from dyncomp.backends.ort.providers import require_providers
from torch import Tensor

from dyncomp.errors import BackendError, RequestError
from dyncomp.hardware import default_threads

_EXPORT = "export the bundle again: dyncomp export --backend ort"


class OrtModel:
    """An ONNX Runtime session over what :func:`dyncomp.backends.ort.lower.lower` wrote.

    Args:
        directory: holds ``model.onnx``, its data and ``config.json``.
        threads: intra-op threads; by default the cores this process may use.
        providers: execution providers by short or full name, best first; by default the CPU.
        pin: bind each thread to a core of its own, for measurements.
        profile: a path prefix: ONNX Runtime then writes a profile when :meth:`end_profiling` is called.

    Raises:
        ProviderError: a provider is not in this ONNX Runtime.
        ModelError: the directory has no lowered model, or a damaged one.
        BackendError: ONNX Runtime cannot run the model.
    """

    def __init__(
        self, directory: str | Path, *, threads: int | None = None, providers: Sequence[str] | None = None, pin: bool = False,
        profile: str | Path | None = None,
    ) -> None:  # fmt: skip
        wanted = require_providers(providers)
        import onnxruntime as ort

        self.directory, self.threads = Path(directory), threads or default_threads()
        self.device = "cuda" if {"CUDAExecutionProvider", "TensorrtExecutionProvider"} & set(wanted) else "cpu"
        """Where a KV cache is kept."""
        self.config = read_config(self.directory, SCHEMA, again=_EXPORT, older="convert the model again")
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        # Threads spin for work within a run only. By default they go on for tens of milliseconds after it: two models that take turns, a
        # draft and what verifies it, were half as fast as one alone on two cores; one alone loses nothing by it.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if pin and self.threads > 1:  # the calling thread is the first; cores are counted from 1
            options.add_session_config_entry("session.intra_op_thread_affinities", ";".join(str(i + 2) for i in range(self.threads - 1)))
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        if self.config.get("kernels") == "dyncomp":
            options.register_custom_ops_library(str(library()))
        try:
            self.session = ort.InferenceSession(str(self.directory / MODEL), options, providers=wanted)
        except Exception as error:
            raise BackendError(f"ONNX Runtime cannot load {self.directory / MODEL}: {first_line(error)}") from error
        self.inputs: tuple[str, ...] = tuple(i["name"] for i in self.config["inputs"])
        self.outputs: tuple[str, ...] = tuple(self.config["outputs"])
        self.encoder: OrtModel | None = None
        """What runs once before this model, the decoder of an encoder–decoder; its outputs are inputs of this one."""
        if "encoder" in self.config:
            self.encoder = OrtModel(self.directory / self.config["encoder"], threads=threads, providers=providers, pin=pin)

    @property
    def kv_cache(self) -> dict[str, Any] | None:
        """Layout of the KV cache (``context_length``, ``layers`` …), or None when the model has none."""
        return self.config.get("kv_cache")

    @property
    def precision(self) -> str:
        """``fp32``, ``int8`` or ``int4``: of the weights."""
        return str(self.config.get("precision", "fp32"))

    def run(self, **inputs: Array | Tensor) -> dict[str, Array]:
        """All outputs by name.

        Raises:
            RequestError: an input is missing, unknown, or has the wrong rank or dtype.
        """
        if set(inputs) != set(self.inputs):
            raise RequestError(f"the model takes the inputs {list(self.inputs)}, got {sorted(inputs)}")
        feeds = {s["name"]: as_array(inputs[s["name"]], s) for s in self.config["inputs"]}
        try:
            return dict(zip(self.outputs, self.session.run(list(self.outputs), feeds), strict=True))
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed: {first_line(error)}") from error

    def placement(self) -> dict[str, dict[str, int]]:
        """Execution provider -> operator -> number of nodes it was given, an encoder's included."""
        found: dict[str, dict[str, int]] = self.encoder.placement() if self.encoder is not None else {}
        for part in self.session.get_provider_graph_assignment_info():
            counts = collections.Counter(f"{n.domain}.{n.op_type}" if n.domain else n.op_type for n in part.get_nodes())
            known = found.setdefault(part.ep_name, {})
            for name, count in sorted(counts.items()):
                known[name] = known.get(name, 0) + count
        return found

    def end_profiling(self) -> Path:
        """Stop profiling; returns the file that was written."""
        return Path(self.session.end_profiling())
