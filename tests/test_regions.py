"""Regions are found by dataflow, with the right shapes, on every architecture; and FFNs can be replaced."""

from __future__ import annotations

import time
from collections import Counter
from itertools import pairwise

import pytest
import torch
from helpers import assert_close, route

from bench.tiny import ARCHITECTURES, FFN, HIDDEN, TOKENS, VOCAB, TokenModel, built, sample, tokens, trace_tiny
from dyncomp.errors import GraphError, RequestError
from dyncomp.regions import find_carved, find_ffns, find_regions, find_routed, replace_ffn
from dyncomp.trace import trace

aten = torch.ops.aten
WITH_FFN = [name for name, tiny in ARCHITECTURES.items() if tiny.ffns]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_found(name: str):
    expected, graph = ARCHITECTURES[name], trace_tiny(name)
    regions = find_regions(graph)
    assert len(regions.ffns) == expected.ffns
    for ffn in regions.ffns:
        assert (ffn.activation, ffn.gated, ffn.layout) == (expected.activation, expected.gated, expected.layout)
        assert (ffn.down.bias is not None) == expected.bias
        assert ffn.shared_weights == expected.shared
        assert ffn.d_model == ffn.d_out == HIDDEN
        assert ffn.d_ff == expected.d_ff
        assert ffn.output in ffn.interior
        assert ffn.input not in ffn.interior
    assert len({ffn.name for ffn in regions.ffns}) == len(regions.ffns)
    assert len(regions.attentions) == expected.attentions
    assert dict(Counter(block.kind for block in regions.blocks)) == dict(expected.blocks)
    assert (regions.head is not None) == expected.vocab
    if regions.head is not None:
        assert (regions.head.tied, regions.head.vocab) == (expected.tied, VOCAB)


@pytest.mark.parametrize("name", WITH_FFN)
def test_routing_to_every_expert_changes_nothing(name: str):
    module, inputs, dims = built(name)
    graph = trace_tiny(name)
    ffns = find_regions(graph).ffns
    for ffn in ffns:
        route(graph, ffn, experts=4)
    graph.clean()
    regions = find_regions(graph)
    assert regions.ffns == []
    assert [r.name for r in find_carved(graph)] == [f.name for f in ffns]
    assert Counter(b.kind for b in regions.blocks) == Counter(ARCHITECTURES[name].blocks), "blocks are found around routed FFNs too"
    other = sample(inputs, dims, {"batch": 3, "sequence": 11})
    with torch.no_grad():
        assert_close(graph(**other), module(**other), rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "squeezebert"])
def test_routing_to_no_expert_changes_something(name: str):
    """The test above would pass if nothing were replaced, or if the FFNs did not matter."""
    module, inputs, _ = built(name)
    graph = trace_tiny(name)
    for ffn in find_regions(graph).ffns:
        route(graph, ffn, experts=4, gate=0.0)
    graph.clean()
    with torch.no_grad():
        assert (graph(**inputs) - module(**inputs)).abs().max() > 0.01


def test_a_routed_ffn_is_described():
    graph = trace_tiny("bert")
    ffn = find_regions(graph).ffns[1]
    route(graph, ffn, experts=8)
    graph.clean()
    (routed,) = find_routed(graph)
    assert (routed.name, routed.experts, routed.d_ff, routed.d_model, routed.d_out) == (ffn.name, 8, FFN, HIDDEN, HIDDEN)
    assert (routed.activation, routed.gated, routed.input) == ("gelu", False, ffn.input)
    assert routed.b_up is not None
    assert routed.b_down is not None
    assert routed.output.target is aten.add.Tensor
    assert routed.router[-1] is routed.gates
    assert len(routed.router) == 4  # sum, expand, mul, add: all of it, and nothing of the model
    assert routed.parameters == ffn.parameters
    assert routed.flops_per_token == ffn.flops_per_token


def test_weights_are_normalised():
    """Conv1D keeps [in, out], Phi-3 fuses gate and up: all come back as [F or 2F, d] and [d, F]."""
    for name, rows in (("gpt2", FFN), ("phi3", 2 * FFN), ("llama", 2 * FFN), ("squeezebert", FFN)):
        graph = trace_tiny(name)
        ffn = find_regions(graph).ffns[0]
        weights = ffn.weights(graph)
        assert weights.w_up.shape == (rows, HIDDEN)
        assert weights.w_down.shape == (HIDDEN, FFN)
        assert weights.w_up.is_contiguous()
        assert (weights.b_up is not None) == (weights.b_down is not None) == ARCHITECTURES[name].bias
        count = sum(t.numel() for t in (weights.w_up, weights.b_up, weights.w_down, weights.b_down) if t is not None)
        assert count == ffn.parameters


@pytest.mark.parametrize("name", ["llama", "bert", "olmo2", "gpt2", "whisper_encoder", "gptj", "falcon", "gpt_neox"])
def test_blocks_chain_the_residual_stream(name: str):
    blocks = find_regions(trace_tiny(name)).blocks
    parallel = "parallel" in ARCHITECTURES[name].blocks
    assert [b.kind for b in blocks] == (["parallel"] * 2 if parallel else ["attention", "ffn"] * 2)
    for block, following in pairwise(blocks):
        if name == "bert":  # post-norm: the stream is normalised after each add
            assert following.input.args[0] is block.output
        else:
            assert following.input is block.output
    assert all(len(b.regions) == (2 if parallel else 1) for b in blocks)
    assert len({b.name for b in blocks}) == len(blocks)


def test_the_head_is_found_behind_a_softcap():
    head = find_regions(trace_tiny("gemma2")).head
    assert head is not None
    assert head.node is not trace_tiny("gemma2").output_nodes[0]


def test_a_model_without_ffn_is_told_so():
    with pytest.raises(RequestError, match="the model has no FFN: no linear layer, activation and linear layer in a row"):
        find_regions(trace_tiny("convnet")).require_ffns()
    with pytest.raises(RequestError) as error:
        find_regions(trace_tiny("mamba")).require_ffns()
    assert "2 look like one and were refused" in str(error.value)
    where, why = "model.backbone.layers.0.mixer and 1 more", "combined with the result of unsqueeze, which has another shape"
    assert f"{where}: its hidden activations are {why}" in str(error.value)
    assert error.value.exit_code == 2


def test_a_routed_model_is_told_so():
    graph = trace_tiny("opt")
    for ffn in find_regions(graph).ffns:
        route(graph, ffn, experts=2)
    graph.clean()
    with pytest.raises(RequestError, match="its 2 FFNs are routed already"):
        find_regions(graph).require_ffns()


def test_a_replacement_of_another_shape_is_refused():
    graph = trace_tiny("llama")
    ffn = find_regions(graph).ffns[0]
    with pytest.raises(GraphError, match=r"the replacement of model\.model\.layers\.0\.mlp has the shape"):
        replace_ffn(graph, ffn, lambda builder, x: builder.call(aten.slice.Tensor, x, -1, 0, 8))


@pytest.mark.slow
def test_llama_70b_without_weights():
    """Tracing and discovery of 70 B parameters: nothing is allocated; prints how long it took (two minutes at most, on one core)."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        max_position_embeddings=8192, use_cache=False,
    )  # fmt: skip
    start = time.process_time()
    with torch.device("meta"):
        module = TokenModel(transformers.LlamaForCausalLM(config).eval(), "logits")
    graph = trace(module, {"input_ids": tokens(2, 7).to("meta")}, TOKENS)
    traced = time.process_time()
    regions = find_regions(graph)
    found = time.process_time()
    print(f"traced in {traced - start:.1f} s, regions in {found - traced:.1f} s of CPU time")
    assert 70.5e9 < graph.parameter_count() < 70.6e9
    assert all(t.is_meta for t in graph.constants().values() if t.numel() > 1_000_000)
    assert len(regions.ffns) == len(regions.attentions) == 80
    assert {f.activation for f in regions.ffns} == {"silu"}
    assert regions.ffns[0].parameters == 3 * 8192 * 28672
    assert len(regions.blocks) == 160
    assert regions.head is not None
    assert not regions.refusals


def test_discovery_on_bfloat16():
    module, inputs, dims = ARCHITECTURES["llama"].build()
    graph = trace(module.to(torch.bfloat16), inputs, dims)
    ffns, _ = find_ffns(graph)
    assert [f.activation for f in ffns] == ["silu", "silu"]
    assert ffns[0].weights(graph).w_up.dtype == torch.float32
