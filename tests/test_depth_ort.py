"""Tokens that skip, in ONNX Runtime: the same numbers as the graph, and nothing computed for what is skipped."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dyncomp.backends.caches import cache_names
from dyncomp.backends.native import available
from dyncomp.backends.ort.decoder import decoder_for
from dyncomp.backends.ort.lower import lower
from dyncomp.backends.ort.parity import parity
from dyncomp.backends.ort.run import OrtModel
from dyncomp.backends.parity import error_of
from dyncomp.backends.parity import parity as compare
from dyncomp.backends.torch.decoder import TorchDecoder
from dyncomp.passes import AddKVCache, CarveExperts, FitRouter, Quantize, SkipDepth
from dyncomp.passes.depth_gates import insert_gates
from dyncomp.passes.skip_depth import find_units
from helpers import assert_close
from test_depth import context, gated
from test_sparsify import sparsified

import bench.tiny
from bench.tiny import built, sample, trace_tiny
from dyncomp.graph import Graph
from dyncomp.interpret import float_activations
from dyncomp.pipeline import Context, Pipeline
from dyncomp.regions.depth import find_skips
from dyncomp.serialize import load_graph, save_graph
from dyncomp.trace import trace


def cached(graph: Graph) -> Graph:
    assert AddKVCache(logits="chosen").run(graph, Context()).changed
    return graph


NATIVE = pytest.param(True, marks=pytest.mark.skipif(not available(), reason="needs a C++ compiler"))


@pytest.mark.parametrize("native", [False, NATIVE])
def test_skipping_in_onnx_runtime(native: bool, tmp_path: Path) -> None:
    """Prefill of rows of different lengths and decoding, through branches, or operators that take the gates themselves."""
    graph = gated("llama", "block", closed=True)
    save_graph(graph, tmp_path / "graph.json", tmp_path / "graph.safetensors")
    graph = load_graph(tmp_path / "graph.json", tmp_path / "graph.safetensors")
    lowered = lower(cached(graph), tmp_path / "ort", native=native)
    if native:  # FFNs and the stand-ins of attentions and FFNs; float queries and outputs have no operator with gates
        assert (lowered.operators["dyncomp.FloatFFN"], lowered.operators["If"]) == (2 * 3, 2 * 2)
    else:
        assert lowered.operators["If"] == 2 * 3  # queries; then the rest of the layer, and the stand-ins
    model = OrtModel(tmp_path / "ort", threads=1)
    assert parity(graph, model, prompt_tokens=12, steps=16)["relative_error"] <= 1e-4


def wide() -> Graph:
    """Heads of 16 features, which the native attention takes."""
    module, inputs, dims = bench.tiny._decoder("wide", "Llama", bench.tiny.SILU, head_dim=16).build()
    return trace(module, inputs, dims, info={"name": "wide"})


@pytest.mark.skipif(not available(), reason="needs a C++ compiler")
def test_absent_tokens_in_the_native_attention(tmp_path: Path) -> None:
    """The projections of queries, keys and values in one branch, the mark of absence kept beside the cache; a sequence decided at once."""
    graph = cached(gated(wide(), "block", closed=True, kv="absent", first=5))
    lowered = lower(graph, tmp_path)
    assert lowered.operators["If"] == 2 * 2
    assert lowered.operators["dyncomp.CachedAttention"] == 2
    assert parity(graph, OrtModel(tmp_path, threads=1), prompt_tokens=12, steps=16)["relative_error"] <= 1e-4


@pytest.mark.skipif(not available(), reason="needs a C++ compiler")
def test_caches_hold_the_tokens_that_are_present_alone(tmp_path: Path) -> None:
    """Side by side, after a prompt, steps and a step back; and what is computed from them is what the whole sequence gives."""
    graph = cached(gated(wide(), "block", closed=True, kv="absent"))
    lower(graph, tmp_path)
    decoder: Any = decoder_for(OrtModel(tmp_path, threads=1))
    ids = np.random.default_rng(0).integers(0, 60, (1, 40))
    decoder.prefill(ids[:, :30], np.array([30]), 10)
    decoder.extend(ids[0, 30:35])
    decoder.rewind(3)
    logits = [decoder.step(ids[:, at]) for at in range(32, 40)][-1]
    caches = dict(zip(cache_names(decoder.model), decoder._caches, strict=True))
    for layer in (0, 1):
        present = int((caches[f"present_cache_{layer}"][0, 0, :40] != 0).sum())
        assert 0 < present < 35
        for kind in ("key", "value"):
            written = (caches[f"{kind}_cache_{layer}"][0] != 0).any(-1)
            assert written[:, :present].all()
            assert not written[:, present + 3 :].any()  # three may be left from before the step back
    again = decoder_for(decoder.model)
    assert_close(torch.from_numpy(logits), torch.from_numpy(again.prefill(ids, np.array([40]), 0)), rel=1e-5)


@pytest.mark.parametrize("kv", ["share", "absent"])
def test_keys_and_values_of_tokens_that_skip_without_native_kernels(kv: str, tmp_path: Path) -> None:
    graph = cached(gated("llama", "attention", closed=True, kv=kv, rank=0))
    lowered = lower(graph, tmp_path, native=False)
    assert lowered.operators.get("com.microsoft.GroupQueryAttention", 0) == (2 if kv == "share" else 0)
    assert parity(graph, OrtModel(tmp_path, threads=1), prompt_tokens=12, steps=16)["relative_error"] <= 1e-4


def test_an_encoder_whose_tokens_are_absent(tmp_path: Path) -> None:
    graph = gated("bert", "block", closed=True, kv="absent", first=5)
    lower(graph, tmp_path, native=False)
    _, names, dims = built("bert")
    inputs = sample(names, dims, {"batch": 2, "sequence": 13}, seed=2)
    (given,) = OrtModel(tmp_path, threads=1).run(**{k: v.numpy() for k, v in inputs.items()}).values()
    assert_close(torch.from_numpy(given), graph(**inputs), rel=1e-4)


def test_nothing_is_computed_for_a_token_that_skips(tmp_path: Path) -> None:
    """Counted in a profile: with every gate closed, no matrix product of a gated operation runs; with some open in a batch, those tokens
    alone are multiplied."""
    counts = {}
    for closed in (False, True):
        graph = trace_tiny("llama")
        units, _ = find_units(graph, "block")
        for unit in [insert_gates(graph, u, 0) for u in units]:
            graph.add_tensor(unit.bias, torch.tensor([-1.0 if closed else 1.0]))
        graph.clean()
        graph.info |= {"task": "causal-lm", "context_length": 64}
        lower(cached(graph), tmp_path / str(closed), native=False)
        model = OrtModel(tmp_path / str(closed), threads=1, profile=tmp_path / f"profile-{closed}")
        caches = {n: np.zeros((1, 2, 8, 8), np.float32) for n in model.inputs if "_cache_" in n}
        model.run(input_ids=np.array([[5]]), past_length=np.array([3]), chosen=np.array([[0]]), **caches)
        counts[closed] = len(products(model))
    assert counts[False] - counts[True] == 2 * 5  # queries, output projection, and three of the FFN, in each of two layers
    model = OrtModel(tmp_path / "True", threads=1, profile=tmp_path / "profile-batch")
    caches = {n: np.zeros((4, 2, 8, 8), np.float32) for n in model.inputs if "_cache_" in n}
    model.run(input_ids=np.full((4, 1), 5), past_length=np.array([0, 3, 0, 5]), chosen=np.zeros((4, 1), np.int64), **caches)
    rows = products(model)  # the tokens at position 0 do not skip
    assert rows.count(2) == 2 * 5
    assert rows.count(4) == counts[True]


def products(model: OrtModel) -> list[int]:
    """How many tokens each matrix product of a profiled run took."""
    events = [e for e in json.loads(model.end_profiling().read_text()) if e.get("name", "").endswith("_kernel_time")]
    calls = [e["args"] for e in events if e.get("args", {}).get("op_name") in ("MatMul", "FusedMatMul", "Gemm")]
    return [math.prod(next(iter(c["input_type_shape"][0].values()))[:-1]) for c in calls]


@pytest.mark.skipif(not available(), reason="needs a C++ compiler")
@pytest.mark.parametrize("what", ["attention", "block"])
def test_quantized_layers_that_tokens_skip_need_no_branches(what: str, tmp_path: Path) -> None:
    """As many operators as dense layers have, the stand-ins in them: prefill of rows of different lengths, and decoding."""
    graph = cached(gated(trace_wider(), what, closed=True, rank=32))
    Quantize(bits=8).run(graph, Context())
    lowered = lower(graph, tmp_path, native=True)
    assert "If" not in lowered.operators
    assert (lowered.operators["dyncomp.TokenGates"], lowered.operators["dyncomp.NormGates"]) == (1, 1)  # the first norm is of no sum
    assert lowered.operators["dyncomp.QuantizedLinear"] == 2 * 2 + 1  # queries, keys and values side by side, and the output; the head
    assert lowered.operators["dyncomp.QuantizedFFN"] == 2
    assert lowered.operators["Add"] == 1  # of the positions
    assert lowered.operators["GatherND"] == 1  # what keeps the first token, for all layers
    assert all(len(node.input) == 11 for node in nodes(tmp_path, "CachedAttention"))  # it has the gates
    assert [attribute(node, "gated") for node in nodes(tmp_path, "QuantizedLinear")] == [128, 0, 128, 0, 0]
    assert parity(graph, OrtModel(tmp_path, threads=1), prompt_tokens=12, steps=16, good=1e-2)["relative_error"] <= 2e-2


@pytest.mark.parametrize("make", [lambda: gated("llama", "block", closed=True), lambda: sparsified("llama", "sparsify{active=75%}")[0]])
def test_a_token_that_skips_in_one_program_alone_is_no_defect(make: Callable[[], Graph]) -> None:
    """In few bits: a score, or an input of a sparse layer, within rounding of its threshold. A wrong program is wrong about more."""
    graph = make()
    Pipeline([Quantize(), AddKVCache(context_length=64, logits="chosen")]).run(graph, Context())

    class Otherwise(TorchDecoder):
        every, steps, factor = 20, 0, -1.0

        def step(self, ids: Any) -> Any:
            self.steps += 1
            return super().step(ids) * (1 if self.steps % self.every else self.factor)

    class Wrong(Otherwise):
        every = 4

    class NotANumber(Otherwise):
        factor = math.nan

    model = SimpleNamespace(precision="int8")
    entry = compare(graph, model, lambda _: Otherwise(graph), backend="ort", prompt_tokens=8, steps=39)
    assert entry["relative_error"] > 0.5
    assert error_of(entry) == entry["typical_error"] < 1e-6
    assert entry["greedy_tokens_equal"] == pytest.approx(38 / 39), "the last step's token is not used"
    for wrong in (Wrong, NotANumber):
        assert error_of(compare(graph, model, lambda _, wrong=wrong: wrong(graph), backend="ort", prompt_tokens=8, steps=39)) > 0.5
    graph = gated("llama", "block", closed=True)
    Pipeline([AddKVCache(logits="chosen")]).run(graph, Context())
    entry = compare(graph, model, lambda _: Otherwise(graph), backend="ort", prompt_tokens=8, steps=20)
    assert error_of(entry) == entry["relative_error"] > 0.5, "floats are not rounded"


@pytest.mark.skipif(not available(), reason="needs a C++ compiler")
@pytest.mark.parametrize("kv", ["compute", "share", "absent"])
def test_quantized_layers_in_4_bits_whatever_later_tokens_see(kv: str, tmp_path: Path) -> None:
    graph = cached(gated(trace_wider(), "block", closed=True, rank=32, kv=kv))
    Quantize(bits=4).run(graph, Context())
    lowered = lower(graph, tmp_path, native=True)
    assert "If" not in lowered.operators
    assert lowered.operators["dyncomp.QuantizedLinear"] == (7 if kv == "share" else 5)
    assert parity(graph, OrtModel(tmp_path, threads=1), prompt_tokens=12, steps=16, good=1e-3)["relative_error"] <= 2e-2


def nodes(folder: Path, operator: str) -> list[Any]:
    model = pytest.importorskip("onnx").load(str(folder / "model.onnx"), load_external_data=False)
    return [node for node in model.graph.node if node.op_type == operator]


def attribute(node: Any, name: str) -> int:
    return next(int(a.i) for a in node.attribute if a.name == name)


def trace_wider() -> Graph:
    """Weights that divide into blocks of 32."""
    module, inputs, dims = bench.tiny._decoder("wider", "Llama", bench.tiny.SILU, hidden_size=64, head_dim=32, intermediate_size=96).build()
    return trace(module, inputs, dims, info={"name": "wider"})


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
