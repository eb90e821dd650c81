"""``quantize-cache``: keys and values in int8, in the graph, in ONNX Runtime, and through everything that reads or copies a cache."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from dyncomp.backends.decoder import CHUNK
from dyncomp.backends.genai.write import configuration
from dyncomp.backends.native import available
from dyncomp.backends.ort.decoder import OrtDecoder
from dyncomp.backends.ort.lower import lower
from dyncomp.backends.ort.parity import parity
from dyncomp.backends.ort.run import OrtModel
from dyncomp.backends.ort.slots import OrtSlots
from dyncomp.passes import AddKVCache, Quantize, QuantizeCache
from dyncomp.passes.quantize_cache import keep_floats
from helpers import assert_close, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batching import Modulo
from test_depth import gated
from test_kv_cache import empty_caches

import bench.tiny
from bench.tiny import tokens, trace_tiny
from dyncomp.errors import BackendError, RequestError
from dyncomp.graph import Graph
from dyncomp.interpret import float_activations
from dyncomp.ops import decode_entries, encode_entries
from dyncomp.pipeline import Context, parse_passes
from dyncomp.recipe import load_recipe
from dyncomp.regions.attention import ROUNDED, find_attentions
from dyncomp.runtime.batching import Batcher
from dyncomp.runtime.generate import Generator
from dyncomp.runtime.sampling import Sampling
from dyncomp.runtime.speculate import Speculation
from dyncomp.serialize import load_graph, save_graph
from dyncomp.trace import trace

CONTEXT = 96
FAMILIES = {
    "llama": ("Llama", bench.tiny.SILU, {"head_dim": 16}),
    "gemma3": ("Gemma3", bench.tiny.GEGLU | bench.tiny.TIED, {"config": "Gemma3TextConfig", "head_dim": 32, "sliding_window": 4}),
    "bloom": ("Bloom", bench.tiny.GELU_TANH | bench.tiny.TIED, {"n_layer": 2, "num_attention_heads": 2}),  # a bias by distance
}
needs_compiler = pytest.mark.skipif(not available(), reason="no C++ compiler here")


@functools.cache
def _traced(name: str) -> Graph:
    family, expect, options = FAMILIES[name]
    module, inputs, dims = bench.tiny._decoder(name, family, expect, **options).build()
    return trace(module, inputs, dims, info={"name": name, "task": "causal-lm", "context_length": CONTEXT})


def wide(name: str = "llama") -> Graph:
    """Two key heads of at least 16 features under four query heads."""
    return _traced(name).copy()


def coded(graph: Graph) -> Graph:
    graph = graph.copy()
    assert QuantizeCache().run(graph, Context()).changed
    return graph


def cached(graph: Graph, logits: str = "chosen") -> Graph:
    graph = graph.copy()
    result = AddKVCache(context_length=CONTEXT, logits=logits).run(graph, Context())
    assert not result.refused, result.refused
    return graph


# ---- entries -------------------------------------------------------------------------------------------------------
@given(st.integers(0, 99), st.integers(1, 40), st.sampled_from([1e-30, 1e-3, 1.0, 1e30]))
@settings(max_examples=30, deadline=None)
def test_an_entry_is_its_codes_and_their_scale(seed: int, features: int, size: float) -> None:
    x = torch.randn(2, 3, features, generator=torch.Generator().manual_seed(seed)) * size
    entries = encode_entries(x)
    assert entries.shape == (2, 3, features + 4)
    peak = x.abs().amax(-1, keepdim=True)
    again = decode_entries(entries)
    assert bool(((again - x).abs() <= peak / 253).all())
    assert torch.equal(encode_entries(again)[..., :features], entries[..., :features])


def test_zeros_stay_zero_and_what_is_no_number_shows() -> None:
    x = torch.stack([torch.zeros(16), torch.full((16,), 1e-40), torch.ones(16), torch.ones(16)])
    x[2, 3], x[3, 5] = float("inf"), float("nan")
    again = decode_entries(encode_entries(x))
    assert torch.equal(again[:2], torch.zeros(2, 16))
    assert bool(again[2:].isnan().all())


# ---- the graph -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3"])
def test_the_graph_rounds_what_its_cache_holds(name: str) -> None:
    before, ids = trace_tiny(name), tokens(3, 20)
    after = coded(before)
    graph, lengths = cached(after), torch.tensor([8, 3, 5])
    padded = torch.where(torch.arange(8) < lengths[:, None], ids[:, :8], 1)
    with torch.no_grad():
        expected = after(ids)
        assert relative_error(expected, before(ids)) > 1e-4, "something is rounded"
        caches = empty_caches(graph, 3, 20)
        assert {c.dtype for c in caches} == {torch.uint8}
        logits, *caches = graph(padded, torch.zeros(3, dtype=torch.int64), lengths[:, None] - 1, *caches)
        assert_close(logits[:, 0], expected[torch.arange(3), lengths - 1], rel=1e-5)
        for size in (1, 1, 6):
            steps = torch.stack([ids[row, n : n + size] for row, n in enumerate(lengths.tolist())])
            logits, *caches = graph(steps, lengths, torch.full((3, 1), size - 1), *caches)
            lengths = lengths + size
            assert_close(logits[:, 0], expected[torch.arange(3), lengths - 1], rel=1e-5)


def test_facts_and_regions_of_a_rounded_graph(tmp_path: Path) -> None:
    before = trace_tiny("llama")
    graph = before.copy()
    result = QuantizeCache().run(graph, Context())
    assert result.facts == {"bits": 8, "bytes_per_token_before": 256, "bytes_per_token": 96}
    assert len(result.changed) == 2
    assert not QuantizeCache().run(graph, Context()).changed, "what is rounded is not rounded again"
    for old, new in zip(find_attentions(before)[0], find_attentions(graph)[0], strict=True):
        assert (new.mask, new.scale, new.kv_heads, new.head_dim) == (old.mask, old.scale, old.kv_heads, old.head_dim)
        assert all(r is not None for r in new.rotary)
    assert cached(graph).info["kv_cache"]["bytes_per_token"] == 96
    save_graph(graph, tmp_path / "g.json", tmp_path / "g.safetensors")
    again, ids = load_graph(tmp_path / "g.json", tmp_path / "g.safetensors"), tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(again(ids), graph(ids))
        with float_activations(again):
            assert torch.equal(again(ids), before(ids))
        assert torch.equal(again(ids), graph(ids)), "it rounds again"
    assert keep_floats(again)
    assert not any(n.target is ROUNDED for n in again.nodes)
    assert torch.equal(again(ids), before(ids))
    assert "bits" not in cached(again).info["kv_cache"]


def test_a_recipe_and_the_option_say_the_same() -> None:
    passes = load_recipe("dense").resolve(quantize="int8", kv_cache="int8")
    assert passes == [Quantize(), QuantizeCache()] == parse_passes("quantize, quantize-cache")
    assert load_recipe("dense").resolve(kv_cache="int8") == [QuantizeCache()]


def cached_in_int8(name: str, weights: str) -> Graph:
    graph = wide(name)
    if weights == "int8":
        Quantize().run(graph, Context())
    return cached(coded(graph))


# ---- ONNX Runtime --------------------------------------------------------------------------------------------------
@needs_compiler
@pytest.mark.parametrize(("name", "weights"), [("llama", "int8"), ("gemma3", "fp32"), ("bloom", "fp32")])
def test_parity_in_onnx_runtime(name: str, weights: str, tmp_path: Path) -> None:
    graph = cached_in_int8(name, weights)
    operators = lower(graph, tmp_path).operators
    assert operators["dyncomp.QuantizedCachedAttention"] == 2
    assert "dyncomp.CachedAttention" not in operators
    entry = parity(graph, OrtModel(tmp_path, threads=2), good=1e-4 if weights == "fp32" else 2e-2)  # a padded batch, then steps
    assert entry["relative_error"] <= (1e-4 if weights == "fp32" else 2e-2)


@needs_compiler
def test_beside_tokens_that_skip(tmp_path: Path) -> None:
    graph = cached(coded(gated(wide(), "block", closed=True, kv="absent")))
    assert lower(graph, tmp_path).operators["dyncomp.QuantizedCachedAttention"] == 2
    assert parity(graph, OrtModel(tmp_path, threads=1), prompt_tokens=12, steps=16)["relative_error"] <= 1e-4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> OrtModel:
    folder = tmp_path_factory.mktemp("coded")
    lower(cached(coded(wide())), folder)
    return OrtModel(folder, threads=1)


@needs_compiler
def test_slots_prefixes_speculation_and_the_example(model: OrtModel) -> None:
    prompts = ["a first prompt, somewhat long", "b", "a first prompt, somewhat else", "the fourth"]
    sampling = Sampling(max_tokens=10)
    expected = [Generator(OrtDecoder(model), Modulo()).generate([p], sampling)[0] for p in prompts]
    slots = OrtSlots(model, slots=3, capacity=64)
    assert slots.bytes_per_token == model.config["kv_cache"]["bytes_per_token"] == 160
    assert Batcher(slots, Modulo()).complete(prompts, sampling) == expected
    assert Generator(OrtDecoder(model), Modulo()).generate(prompts, sampling) == expected
    speculation = Speculation(OrtDecoder(model))
    (again,) = Generator(speculation, Modulo()).generate(["again and again and again and"], Sampling(max_tokens=48))
    (plain,) = Generator(OrtDecoder(model), Modulo()).generate(["again and again and again and"], Sampling(max_tokens=48))
    assert again.tokens == plain.tokens
    assert speculation.report.guessed > 0
    spec = importlib.util.spec_from_file_location("alone", Path(__file__).parent.parent / "examples" / "onnxruntime_only.py")
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(alone := importlib.util.module_from_spec(spec))
    ids = Modulo()(prompts[0])["input_ids"]
    assert tuple(alone.generate(str(model.directory), ids, 10)) == expected[0].tokens


@needs_compiler
def test_a_copied_prefix_is_continued(model: OrtModel) -> None:
    ids = torch.randint(0, 60, (40,), generator=torch.Generator().manual_seed(0)).numpy()
    slots = OrtSlots(model, slots=2, capacity=48)
    whole = slots.extend(0, ids)
    slots.copy(0, 1, 30)
    assert np.allclose(slots.extend(1, ids[30:]), whole, atol=1e-4 * np.abs(whole).max())
    assert ids.size < CHUNK


# ---- TVM -----------------------------------------------------------------------------------------------------------
@needs_compiler
@pytest.mark.parametrize(("name", "weights"), [("llama", "int8"), ("llama", "fp32"), ("gemma3", "fp32"), ("bloom", "fp32")])
def test_parity_in_tvm(name: str, weights: str, tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    from dyncomp.backends.parity import parity as parity_of
    from dyncomp.backends.tvm.decoder import decoder_for
    from dyncomp.backends.tvm.lower import lower as lower_to_tvm
    from dyncomp.backends.tvm.run import TvmModel
    from dyncomp.backends.tvm.slots import TvmSlots

    graph = cached_in_int8(name, weights)
    kernels = lower_to_tvm(graph, tmp_path).kernels
    assert kernels["dyncomp_quantized_cached_attention"] == 2
    assert not any(kernel.startswith("cached_attention") for kernel in kernels)
    model, limit = TvmModel(tmp_path, threads=2), 1e-4 if weights == "fp32" else 2e-2
    entry = parity_of(graph, model, decoder_for, backend="tvm", good=limit)  # a padded batch, then steps
    assert entry["relative_error"] <= limit
    prompts, sampling = ["a first prompt, somewhat long", "b", "a first prompt, somewhat else"], Sampling(max_tokens=10)
    expected = [Generator(decoder_for(model), Modulo()).generate([p], sampling)[0].tokens for p in prompts]
    together = Batcher(TvmSlots(model, slots=2, capacity=64), Modulo()).complete(prompts, sampling)
    assert [c.tokens for c in together] == expected


# ---- refusals ------------------------------------------------------------------------------------------------------
def test_what_cannot_keep_such_a_cache_says_so(tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    from dyncomp.backends.tvm.select import select_attention as tvm_attention

    graph = cached(coded(trace_tiny("llama")))
    with pytest.raises(BackendError, match="self_attn: a KV cache in int8: only dyncomp's own kernels read it"):
        tvm_attention(graph.copy(), native=False)
    with pytest.raises(BackendError, match="a KV cache in int8: only dyncomp's own kernels read it"):
        lower(graph, tmp_path, native=False)
    with pytest.raises(BackendError, match="onnxruntime-genai allocates one in float"):
        configuration(graph, Modulo())
    with pytest.raises(BackendError, match="has no KV cache"):
        lower(coded(trace_tiny("llama")), tmp_path)
    with pytest.raises(RequestError, match="no attention of the model keeps keys and values"):
        QuantizeCache().run(trace_tiny("bert"), Context())


@needs_compiler
def test_attentions_without_a_kernel_are_named(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="keys of 8 and values of 8 features have none: one multiple of 16"):
        lower(cached(coded(trace_tiny("llama"))), tmp_path)


@needs_compiler
def test_a_bias_by_distance_is_in_the_kernel(tmp_path: Path) -> None:
    graph = cached(wide("bloom"))
    operators = lower(graph, tmp_path).operators
    assert operators["dyncomp.CachedAttention"] == 2
    assert "Softmax" not in operators
    assert parity(graph, OrtModel(tmp_path, threads=2))["relative_error"] <= 1e-5
