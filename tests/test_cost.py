"""Parameters and operations per token, against counts by hand."""

from __future__ import annotations

import pytest
from helpers import route

from bench.tiny import ARCHITECTURES, FFN, HEADS, HIDDEN, LAYERS, VOCAB, trace_tiny
from dyncomp.cost import count
from dyncomp.errors import RequestError
from dyncomp.regions import find_regions

d, f, v, layers = HIDDEN, FFN, VOCAB, LAYERS
KV = HIDDEN * 2 // HEADS  # features of the two key (and value) heads


def test_llama_by_hand():
    s = 100
    layer = 2 * d * d + 2 * d * KV + 3 * d * f  # q, o; k, v; gate, up, down
    cost = count(trace_tiny("llama"), batch=3, sequence=s)
    assert cost.parameters == cost.active_parameters == 2 * v * d + layers * (layer + 2 * d) + d
    assert cost.flops_per_token == 2 * (layers * layer + v * d) + layers * 4 * s * d
    assert cost.by_region["head"].flops_per_token == 2 * v * d
    assert cost.by_region["model.model.layers.1.mlp"].parameters == 3 * d * f
    assert cost.by_region["model.model.layers.0.self_attn"].flops_per_token == 2 * (2 * d * d + 2 * d * KV) + 4 * s * d
    assert cost.by_region["other"].flops_per_token == 0


def test_bert_by_hand():
    s = 50
    layer = 4 * d * d + 2 * d * f  # q, k, v, o; up, down
    biases_and_norms = 4 * d + (f + d) + 2 * 2 * d
    cost = count(trace_tiny("bert"), sequence=s)
    assert cost.parameters == (v + 64 + 2) * d + 2 * d + layers * (layer + biases_and_norms)
    assert cost.flops_per_token == 2 * layers * layer + layers * 4 * s * d


def test_eager_attention_by_hand():
    s = 20
    cost = count(trace_tiny("nanogpt"), sequence=s)
    assert cost.flops_per_token == 2 * layers * (4 * d * d + 2 * d * f) + layers * 4 * s * d + 2 * v * d
    assert cost.by_region["c.1"].flops_per_token == 2 * 2 * d * f
    attention = next(r for r in cost.by_region.values() if r.kind == "attention")  # same module path as its FFN
    assert attention.flops_per_token == 2 * 4 * d * d + 4 * s * d


def test_tied_head_is_one_weight_and_one_product():
    cost = count(trace_tiny("gpt2"), sequence=10)
    assert cost.parameters == (v + 64) * d + layers * (4 * d * d + 4 * d + 2 * d * f + f + d + 4 * d) + 2 * d
    assert cost.by_region["head"].parameters == v * d
    assert cost.by_region["head"].flops_per_token == 2 * v * d


def test_weights_under_two_names_count_once():
    graph = trace_tiny("gpt2")
    before = count(graph)
    head = find_regions(graph).head
    assert head is not None
    graph.add_tensor("alias.weight", graph.tensor(head.weight))
    head.node.update_arg(1, graph.read("alias.weight"))
    assert count(graph).parameters == before.parameters == graph.parameter_count()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_regions_sum_up(name: str):
    graph = trace_tiny(name)
    cost = count(graph)
    assert cost.parameters == sum(r.parameters for r in cost.by_region.values()) == graph.parameter_count()
    assert cost.flops_per_token == round(sum(r.flops_per_token for r in cost.by_region.values()))
    assert cost.flops_per_token > 0
    for ffn in find_regions(graph).ffns:
        assert cost.by_region[ffn.name].flops_per_token % ffn.flops_per_token == 0  # a multiple, per image or clip


def test_routed_ffns_cost_what_they_use():
    graph = trace_tiny("llama")
    dense = count(graph, sequence=16)
    first = find_regions(graph).ffns[0]
    route(graph, first, experts=4)
    graph.clean()
    everything = count(graph, sequence=16)
    assert (everything.parameters, everything.flops_per_token) == (dense.parameters, dense.flops_per_token)
    quarter = count(graph, sequence=16, active={first.name: 0.25})
    assert quarter.parameters == dense.parameters
    assert quarter.active_parameters == dense.parameters - 3 * d * f * 3 // 4
    assert quarter.flops_per_token == dense.flops_per_token - 2 * 3 * d * f * 3 // 4
    assert quarter.by_region[first.name].kind == "routed"


def test_unknown_names_and_fractions_are_refused():
    with pytest.raises(RequestError, match="no routed FFN is called 'nobody'"):
        count(trace_tiny("llama"), active={"nobody": 0.5})
    graph = trace_tiny("llama")
    ffn = find_regions(graph).ffns[0]
    route(graph, ffn, experts=4)
    with pytest.raises(RequestError, match="between 0 and 1"):
        count(graph, active={ffn.name: 1.5})
