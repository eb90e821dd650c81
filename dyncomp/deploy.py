"""From a converted graph to something that runs: lowering, parity, speed beside the dense model."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from dyncomp.backends.ort.decoder import decoder_for
from dyncomp.backends.ort.lower import lower
from dyncomp.backends.ort.parity import parity
from dyncomp.backends.ort.run import OrtModel
from dyncomp.bundle import Bundle
from dyncomp.errors import PassError, RequestError
from dyncomp.graph import Graph
from dyncomp.passes import AddKVCache
from dyncomp.pipeline import Context, Progress, no_progress
from dyncomp.regions.refusal import Refusal
from dyncomp.runtime.bench import Variant, bench
from dyncomp.runtime.session import DecoderSession


def cache_folder() -> Path:
    """Where artifacts that can be made again are kept: ``DYNCOMP_CACHE``, else the user's cache folder."""
    if folder := os.environ.get("DYNCOMP_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dyncomp"


def with_cache(graph: Graph) -> tuple[Graph, list[Refusal]]:
    """A copy of a decoder's graph that keeps a KV cache and computes the last token's logits; other graphs as they are.

    What ``add-kv-cache`` refuses is returned: such a model runs without a cache.
    """
    if graph.info.get("task") != "causal-lm":
        return graph, []
    cached = graph.copy()
    result = AddKVCache(logits="last").run(cached, Context())
    return cached, result.refused


def lower_ort(graph: Graph, folder: Path, progress: Progress = no_progress) -> tuple[Graph, list[Refusal]]:
    """Lower a graph for ONNX Runtime; returns the graph that was lowered and what was refused on the way."""
    lowered, refused = with_cache(graph)
    folder.mkdir(parents=True, exist_ok=True)
    lower(lowered, folder, progress=progress)
    return lowered, refused


def dense_ort(graph: Graph, fingerprint: str, progress: Progress = no_progress) -> Path:
    """The dense model's artifact for comparisons, made once per model and kept in the cache folder."""
    from dyncomp import __version__

    folder = cache_folder() / "dense-ort" / f"{fingerprint[:24]}-{__version__}"
    if not (folder / "done").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
        shutil.rmtree(part, ignore_errors=True)
        lower_ort(graph, part, progress)
        (part / "done").touch()
        os.replace(part, folder)
    return folder


def check_parity(lowered: Graph, folder: Path, *, threads: int | None = None) -> dict[str, Any]:
    """Hold the artifact against its graph; the result belongs into the report.

    Raises:
        PassError: they differ by more than 1e-4 (relative): the artifact must not be used.
    """
    entry = parity(lowered, OrtModel(folder, threads=threads))
    if not entry["relative_error"] <= 1e-4:
        raise PassError(
            f"the ONNX Runtime artifact differs from the PyTorch graph by {entry['relative_error']:.1e} (relative); allowed 1e-4",
            hint="this is a defect: please report the model and the recipe",
        )
    return entry


def measure(
    dense: Path, converted: Path, *, task: str, threads: int | None = None, prefill_tokens: int = 512, batch: int = 1
) -> list[dict[str, Any]]:
    """Speed of both artifacts, interleaved in this process; entries as in a report's ``bench``."""
    models = {"dense": OrtModel(dense, threads=threads), "converted": OrtModel(converted, threads=threads)}
    if task != "causal-lm":
        return _measure_encoders(models, tokens=min(prefill_tokens, 128), batch=batch)
    sessions = {name: decoder_for(model) for name, model in models.items()}
    context = min(s.context_length or 1 << 30 for s in sessions.values())
    tokens = max(1, min(prefill_tokens, context - 1))
    decode = max(8, min(96, (context - 64) // 2))
    variants = [Variant(session, name) for name, session in sessions.items()]
    vocabulary = int(models["dense"].session.get_outputs()[0].shape[-1])
    start = min(64, tokens, context // 4)
    return bench(variants, prompt_tokens=tokens, context=start, decode_tokens=decode, batch=batch, vocabulary=min(vocabulary, 1000))


def _measure_encoders(models: dict[str, OrtModel], *, tokens: int, batch: int, rounds: int = 15) -> list[dict[str, Any]]:
    ids = np.random.default_rng(0).integers(100, 1000, (batch, tokens))
    known = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 2):
        for name, model in models.items():
            start = time.perf_counter()
            model.run(**{i: known[i] for i in model.inputs})
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    return [
        {
            "engine": "dyncomp-ort", "variant": name, "precision": "fp32", "threads": models[name].threads, "batch": batch,
            "decode_tokens_per_s": None, "prefill_tokens_per_s": batch * tokens / statistics.median(times), "prefill_tokens": tokens,
        }
        for name, times in seconds.items()
    ]  # fmt: skip


def open_session(opened: Bundle, backend: str, *, threads: int | None = None) -> DecoderSession:
    """What generates text from a bundle.

    Raises:
        RequestError: the bundle's model does not generate text.
        BundleError: it has no artifact for the backend.
    """
    if opened.manifest.source.task != "causal-lm":
        raise RequestError(
            f"{opened.path} holds {opened.manifest.source.task} model: it does not generate text", hint="evaluate and bench work on it"
        )
    if backend == "ort":
        return decoder_for(OrtModel(opened.artifact("ort"), threads=threads))
    import torch

    from dyncomp.backends.torch.decoder import decoder_for as torch_decoder_for

    if threads is not None:
        torch.set_num_threads(threads)
    return torch_decoder_for(with_cache(opened.graph())[0])
