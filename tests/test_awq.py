"""Scales that make rounding cost less, and change nothing else."""

from __future__ import annotations

import dyncomp.passes  # noqa: F401  (registers the passes)
import pytest
import torch
from dyncomp.passes.quantize import PRECISIONS
from helpers import assert_close
from test_passes import context
from torch import Tensor

from bench.tiny import built, sample, trace_tiny
from dyncomp.calibrate import Calibration
from dyncomp.errors import RequestError
from dyncomp.graph import Graph
from dyncomp.interpret import sparse_nodes
from dyncomp.ops import expert_hidden, keep_large
from dyncomp.pipeline import Context, PassResult, Pipeline, parse_passes
from dyncomp.quantized import round_to_nearest
from dyncomp.regions import find_linears, find_regions
from dyncomp.regions.norm import fuse_rms_norms
from dyncomp.sweep import Sweep
from dyncomp.trace import trace

EXPERTS = "carve-experts{experts=2 keep-dense=}, fit-router{active=0.75}, refit-down"


def inputs_of(name: str, seed: int) -> dict[str, Tensor]:
    _, inputs, dims = built(name)
    return sample(inputs, dims, {"batch": 2, "sequence": 24}, seed)


def run(spec: str, name: str, graph: Graph) -> PassResult:
    ctx = Context(Calibration([inputs_of(name, s) for s in range(4)], "tiny"))
    return Pipeline(parse_passes(spec)).run(graph, ctx)[-1].result


def with_large_inputs(graph: Graph) -> Graph:
    """Norms give a few large features, and up-projections too: the kind that trained models have. The model is another one then."""
    for node in [n for n in graph.nodes if n.op == "get_attr" and ("norm.weight" in str(n.target) or "up_proj" in str(n.target))]:
        value = graph.tensor(node).detach().clone()
        value[::8] *= 30
        graph.add_tensor(str(node.target), value)
    return graph


def routed(name: str = "llama", passes: str = EXPERTS) -> Graph:
    """With experts that have large inputs."""
    graph = with_large_inputs(trace_tiny(name).copy())
    if passes:
        Pipeline(parse_passes(passes)).run(graph, context(name, graph.copy()))
    return graph


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma2", "opt", "qwen2", "mixtral"])
def test_the_model_computes_what_it_did(name: str) -> None:
    """RMSNorms spelled in primitives, some with 1 + weight, layer norms and their biases, biased and fused projections, experts."""
    dense, graph = with_large_inputs(trace_tiny(name).copy()), with_large_inputs(trace_tiny(name).copy())
    result = run("awq{}", name, graph)
    assert len(result.changed) >= 2 * len(find_regions(dense).ffns)
    inputs = inputs_of(name, 99)
    with torch.no_grad():
        assert_close(graph(**inputs), dense(**inputs), rel=1e-4)
    for linear in find_linears(graph).values():
        if linear.weight in result.changed:
            assert not torch.equal(graph.tensor(linear.weight), dense.tensor(linear.weight))


@pytest.mark.parametrize("passes", [EXPERTS, "sparsify{active=0.7 budgets=uniform}", "skip-depth{active=0.75}"])
def test_gates_and_thresholds_choose_what_they_chose(passes: str) -> None:
    """Scales are powers of two: not even a near tie is decided otherwise."""
    before = routed(passes=passes)
    after = before.copy()
    result = run("awq{}", "llama", after)
    regions = find_regions(after)
    wanted = {w for r in regions.routed if r.d_ff > 8 for w in (r.w_up, r.w_down)}
    wanted |= {str(n.args[1].target) for n in sparse_nodes(after) if "down" in str(n.args[1])}
    assert not wanted or wanted & {*result.changed}, "some have a best exponent that is not 0; which, rounding to bfloat16 may decide"
    inputs = inputs_of("llama", 99)
    with torch.no_grad():
        assert_close(after(**inputs), before(**inputs), rel=1e-6)
    for old, new in zip(find_regions(before).routed, regions.routed, strict=True):
        gates = [Sweep(g, [inputs]).advance(r.gates)[0] for g, r in ((before, old), (after, new))]
        assert torch.equal(*gates)
    for old, new in zip(sparse_nodes(before), sparse_nodes(after), strict=True):
        kept = []
        for graph, node in ((before, old), (after, new)):
            kept.append(keep_large(Sweep(graph, [inputs]).advance(node.args[0])[0], graph.tensor(node.args[3])) != 0)
        assert torch.equal(*kept)


def test_norms_are_fused_to_the_bit() -> None:
    """Gemma's weight is no constant of the graph; it is found by running the norm."""

    class OnePlus(torch.nn.Module):
        weight = torch.nn.Parameter(torch.randn(576, generator=torch.Generator().manual_seed(0)))

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)

    x = torch.randn(2, 3, 576, generator=torch.Generator().manual_seed(1))
    graph = trace(OnePlus(), {"x": x}, {"x": {0: "batch", 1: "sequence"}})
    expected = graph(x)
    assert fuse_rms_norms(graph)
    assert torch.equal(graph(x), expected)


def rounding_errors(graph: Graph, name: str = "llama") -> dict[str, float]:
    """What rounding to 4 bits changes the outputs of each FFN's up-projections, and of its down-projection, by, on held-out inputs;
    relative. Experts: over all that run."""
    sweep = Sweep(graph, [inputs_of(name, 90 + s) for s in range(4)])
    regions, errors = find_regions(graph), {}

    def error(x: Tensor, *weights: Tensor) -> float:
        """x [..., n, K], weights [..., N, K]"""
        weight = torch.cat(weights, -2)
        change = round_to_nearest(weight, 4, 32).decode() - weight
        return float((x @ change.transpose(-1, -2)).norm() / (x @ weight.transpose(-1, -2)).norm())

    for ffn in regions.ffns:
        for linears in (ffn.ups, (ffn.down,)):
            x = torch.cat([v.flatten(0, -2) for v in sweep.advance(linears[0].input)])
            errors[linears[0].weight] = error(x, *(linear.weight_matrix(graph) for linear in linears))
    for r in regions.routed:
        gates = torch.cat([g.flatten(0, -2) for g in sweep.advance(r.gates)])
        x = torch.cat([v.flatten(0, -2) for v in sweep.values(r.input)])
        up, down = (graph.tensor(w).detach() for w in (r.w_up, r.w_down))
        hidden = expert_hidden(x, up, None, down.shape[2], r.activation)
        errors[r.w_up] = error(x * gates.T[..., None], up)
        errors[r.w_down] = error((hidden * gates[..., None]).transpose(0, 1), down)
    return errors


@pytest.mark.parametrize(("name", "passes"), [("llama", ""), ("llama", EXPERTS), ("mixtral", "")])
def test_rounding_costs_less_where_inputs_differ_in_size(name: str, passes: str) -> None:
    """Layer by layer: of dense FFNs, carved experts and trained ones, up- and down-projections."""
    plain = routed(name, passes)
    scaled = plain.copy()
    run("awq{}", name, scaled)
    with torch.no_grad():
        before, after = rounding_errors(plain, name), rounding_errors(scaled, name)
    ratios = [after[w] / before[w] for w in before]
    assert len(ratios) == 4
    assert max(ratios) < 0.98
    assert sum(ratios) / len(ratios) < 0.85


def test_experts_that_hardly_run_are_left_alone_and_named() -> None:
    graph = routed()
    for r in find_regions(graph).routed:
        bias = next(str(n.args[2].target) for n in r.router if n.target is torch.ops.aten.linear.default)
        graph.add_tensor(bias, torch.tensor([1e6, -1e6]))  # the second never
    before = graph.copy()
    result = run("awq{}", "llama", graph)
    assert [line.split(" expert ")[1] for line in result.facts["rarely_used"]] == ["1: 0 tokens"] * 2
    for r in find_regions(graph).routed:
        (exponents,) = (e for name, e in result.facts["exponents"].items() if name == r.w_down)
        assert exponents[0] > 0 == exponents[1]
        up, rows = graph.tensor(r.w_down), before.tensor(r.w_down)
        assert not torch.equal(up[0], rows[0])
        assert torch.equal(up[1], rows[1])


def test_a_router_that_does_more_than_multiply_is_named() -> None:
    graph = routed(passes=EXPERTS.replace("0.75}", "0.75 router=mlp rank=4}"))
    result = run("awq{}", "llama", graph)
    refused = [r.reason for r in result.refused if "post_attention_layernorm" in r.where]
    assert refused == ["cat reads it too"] * 2
    for r in find_regions(graph).routed:
        assert r.w_up not in result.changed
        assert r.w_down in result.changed


def test_tied_weights_stay_tied() -> None:
    graph = with_large_inputs(trace_tiny("llama").copy())
    (table,) = [str(n.args[0].target) for n in graph.nodes if n.target is torch.ops.aten.embedding.default]  # type: ignore[union-attr]
    head = find_regions(graph).head
    assert head is not None
    graph.add_alias(head.weight, table)
    result = run("awq{}", "llama", graph)
    assert head.weight not in result.changed
    assert graph.tensor(head.weight).data_ptr() == graph.tensor(table).data_ptr()
    assert [head.weight in r.reason for r in result.refused] == [True]


def test_where_nothing_can_be_scaled_the_refusals_say_why_and_int4_goes_on() -> None:
    """After BERT's norms the residual stream itself goes on, and GELU is not to be scaled."""
    graph = trace_tiny("bert").copy()
    awq, quantized = Pipeline(PRECISIONS["int4"]).run(graph, context("bert", graph))
    assert not awq.result.changed
    assert {r.reason for r in awq.result.refused} == {
        "add.Tensor reads it too",
        "what gelu gives is not scaled by scaling what it is given",
    }
    assert quantized.result.changed
    assert graph.precision == "int4"


def test_quantized_weights_are_left_alone() -> None:
    graph = with_large_inputs(trace_tiny("llama").copy())
    run("quantize{}", "llama", graph)
    result = run("awq{}", "llama", graph)
    assert not result.changed
    assert all("in few bits already" in r.reason for r in result.refused)
    assert {linear.weight for linear in find_linears(graph).values()} <= set(graph.quantized)


def test_weights_that_4_bits_hold_stay_as_they_are() -> None:
    """A model that came in 4 bits: any scale would only lose."""
    graph = with_large_inputs(trace_tiny("llama").copy())
    for linear in find_linears(graph).values():
        graph.add_tensor(linear.weight, round_to_nearest(graph.tensor(linear.weight).detach(), 4, 32, symmetric=False).decode())
    result = run("awq{symmetric=false}", "llama", graph)
    assert not result.changed
    assert not any(result.facts["exponents"].values())


@pytest.mark.parametrize("spec", ["awq{bits=3}", "awq{block=48}"])
def test_bad_options(spec: str) -> None:
    with pytest.raises(RequestError):
        parse_passes(spec)
