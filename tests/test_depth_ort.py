"""Tokens that skip, in ONNX Runtime: the same numbers as the graph, and nothing computed for what is skipped."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from dyncomp.backends.ort.lower import lower
from dyncomp.backends.ort.parity import parity
from dyncomp.backends.ort.run import OrtModel
from dyncomp.passes import AddKVCache, CarveExperts, FitRouter, Quantize, SkipDepth
from dyncomp.passes.depth_gates import insert_gates
from dyncomp.passes.skip_depth import find_units
from test_depth import context, gated

from bench.tiny import trace_tiny
from dyncomp.graph import Graph
from dyncomp.interpret import float_activations
from dyncomp.pipeline import Context, Pipeline
from dyncomp.regions.depth import find_skips
from dyncomp.serialize import load_graph, save_graph


def cached(graph: Graph) -> Graph:
    assert AddKVCache(logits="chosen").run(graph, Context()).changed
    return graph


def test_skipping_in_onnx_runtime(tmp_path: Path) -> None:
    """Prefill of rows of different lengths and decoding, through one branch for each gated operation."""
    graph = gated("llama", "block", closed=True)
    save_graph(graph, tmp_path / "graph.json", tmp_path / "graph.safetensors")
    graph = load_graph(tmp_path / "graph.json", tmp_path / "graph.safetensors")
    lowered = lower(cached(graph), tmp_path / "ort")
    assert lowered.operators["If"] == 2 * 3  # queries; then the rest of the layer, and the stand-ins
    model = OrtModel(tmp_path / "ort", threads=1)
    assert parity(graph, model, prompt_tokens=12, steps=16)["relative_error"] <= 1e-4


def test_nothing_is_computed_for_a_token_that_skips(tmp_path: Path) -> None:
    """Counted in a profile: with every gate closed, no matrix product of a gated operation runs."""
    counts = {}
    for closed in (False, True):
        graph = trace_tiny("llama")
        units, _ = find_units(graph, "block")
        for unit in [insert_gates(graph, u, 0) for u in units]:
            graph.add_tensor(unit.bias, torch.tensor([-1.0 if closed else 1.0]))
        graph.clean()
        graph.info |= {"task": "causal-lm", "context_length": 64}
        lower(cached(graph), tmp_path / str(closed))
        model = OrtModel(tmp_path / str(closed), threads=1, profile=tmp_path / f"profile-{closed}")
        caches = {n: np.zeros((1, 2, 8, 8), np.float32) for n in model.inputs if "_cache_" in n}
        model.run(input_ids=np.array([[5]]), past_length=np.array([3]), chosen=np.array([[0]]), **caches)
        events = json.loads(model.end_profiling().read_text())
        counts[closed] = sum(e.get("args", {}).get("op_name") in ("MatMul", "FusedMatMul", "Gemm") for e in events
                             if e.get("name", "").endswith("_kernel_time"))  # fmt: skip
    assert counts[False] - counts[True] == 2 * 5  # queries, output projection, and three of the FFN, in each of two layers


def test_experts_skipping_and_quantized_weights_together(tmp_path: Path) -> None:
    graph = trace_tiny("llama")
    graph.info |= {"task": "causal-lm", "context_length": 64}
    ctx = context("llama", graph, batches=12)
    passes = [CarveExperts(experts=2, cluster="random", keep_dense=()), FitRouter(active=0.75),
              SkipDepth(what="block", active=0.75, blocks="all", rank=32), Quantize(bits=8)]  # fmt: skip
    Pipeline(passes).run(graph, ctx)
    assert len(find_skips(graph)) == 2
    routers = {s.scores.args[1].target for s in find_skips(graph)}  # type: ignore[union-attr]
    assert not routers & set(graph.quantized)
    lower(cached(graph), tmp_path)
    with float_activations(graph):
        rounded = graph.copy()
    assert parity(rounded, OrtModel(tmp_path, threads=1), prompt_tokens=12, steps=8, good=2e-2)["relative_error"] <= 0.1
