"""Scales that make rounding cost less, and change nothing else."""

from __future__ import annotations

import dyncomp.passes  # noqa: F401  (registers the passes)
import pytest
import torch
from helpers import assert_close
from torch import Tensor

from bench.tiny import built, sample, trace_tiny
from dyncomp.calibrate import Calibration
from dyncomp.errors import PassError, RequestError
from dyncomp.graph import Graph
from dyncomp.pipeline import Context, PassResult, Pipeline, parse_passes
from dyncomp.quantized import round_to_nearest
from dyncomp.regions import find_linears, find_regions
from dyncomp.sweep import Sweep


def inputs_of(name: str, seed: int) -> dict[str, Tensor]:
    _, inputs, dims = built(name)
    return sample(inputs, dims, {"batch": 2, "sequence": 24}, seed)


def run(spec: str, name: str, graph: Graph) -> PassResult:
    context = Context(Calibration([inputs_of(name, s) for s in range(4)], "tiny"))
    return Pipeline(parse_passes(spec)).run(graph, context)[0].result


def with_large_inputs(graph: Graph) -> Graph:
    """Norms give a few large features: the kind that trained models have."""
    for ffn in find_regions(graph).ffns:
        (weight,) = [str(n.target) for n in ffn.input.all_input_nodes if n.op == "get_attr"]
        value = graph.tensor(weight).detach().clone()
        value[::8] *= 30
        graph.add_tensor(weight, value)
    return graph


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma2", "opt", "qwen2"])
def test_the_model_computes_what_it_did(name: str) -> None:
    """RMSNorms spelled in primitives, some with 1 + weight, layer norms and their biases, biased and fused projections."""
    dense, graph = trace_tiny(name), trace_tiny(name).copy()
    result = run("awq{}", name, graph)
    assert len(result.changed) >= 2 * len(find_regions(dense).ffns)
    assert any(result.facts["exponents"].values())
    inputs = inputs_of(name, 99)
    with torch.no_grad():
        assert_close(graph(**inputs), dense(**inputs), rel=1e-5)
        for linear in find_linears(graph).values():
            if linear.weight in result.changed and result.facts["exponents"].get(linear.weight):
                assert not torch.equal(graph.tensor(linear.weight), dense.tensor(linear.weight))


def rounding_errors(graph: Graph, weights: list[str]) -> list[float]:
    """What rounding to 4 bits changes each of these layers' outputs by, on held-out inputs; relative."""
    sweep = Sweep(graph, [inputs_of("llama", 90 + s) for s in range(4)])
    linears, errors = find_linears(graph), {}
    for linear in (value for value in linears.values() if value.weight in weights):
        x, weight = torch.cat([v.flatten(0, -2) for v in sweep.advance(linear.input)]), linear.weight_matrix(graph)
        change = round_to_nearest(weight, 4, 32).decode() - weight
        errors[linear.weight] = float((x @ change.T).norm() / (x @ weight.T).norm())
    return [errors[w] for w in weights]


def test_rounding_costs_less_where_inputs_differ_in_size() -> None:
    dense = with_large_inputs(trace_tiny("llama").copy())
    scaled = dense.copy()
    run("awq{}", "llama", scaled)
    large = [linear.weight for ffn in find_regions(dense).ffns for linear in ffn.ups]
    with torch.no_grad():
        before, after = rounding_errors(dense, large), rounding_errors(scaled, large)
    assert all(a < 0.9 * b for a, b in zip(after, before, strict=True)), (before, after)


def test_tied_weights_stay_tied() -> None:
    graph = trace_tiny("llama").copy()
    (table,) = [str(n.args[0].target) for n in graph.nodes if n.target is torch.ops.aten.embedding.default]  # type: ignore[union-attr]
    head = find_regions(graph).head
    assert head is not None
    graph.add_alias(head.weight, table)
    result = run("awq{}", "llama", graph)
    assert head.weight not in result.changed
    assert graph.tensor(head.weight).data_ptr() == graph.tensor(table).data_ptr()


def test_a_stream_that_others_read_is_not_scaled() -> None:
    """After BERT's norms the residual stream itself goes on, and GELU is not to be scaled."""
    with pytest.raises(RequestError, match="no linear layer"):
        run("awq{}", "bert", trace_tiny("bert").copy())


def test_quantized_weights_are_left_alone() -> None:
    graph = trace_tiny("llama").copy()
    run("quantize{}", "llama", graph)
    with pytest.raises((RequestError, PassError), match="no linear layer"):
        run("awq{}", "llama", graph)


@pytest.mark.parametrize("spec", ["awq{bits=3}", "awq{block=48}"])
def test_bad_options(spec: str) -> None:
    with pytest.raises(RequestError):
        parse_passes(spec)
