"""Activation sparsity: the pass, and what everything else makes of the graphs it leaves."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import dyncomp.passes  # noqa: F401  (registers the passes)
import pytest
import torch
from dyncomp.backends.native import sparse
from dyncomp.backends.native.build import available
from helpers import assert_close, relative_error
from torch import Tensor

from bench.tiny import built, sample, trace_tiny
from dyncomp.calibrate import Calibration
from dyncomp.cost import count
from dyncomp.errors import RequestError
from dyncomp.evidence import calibrated_share, static_baseline
from dyncomp.graph import Graph
from dyncomp.hardware import detect
from dyncomp.interpret import sparse_nodes
from dyncomp.pipeline import Context, PassResult, Pipeline, parse_passes
from dyncomp.regions import find_regions
from dyncomp.serialize import load_graph, save_graph

MODELS = ("llama", "bert", "gpt2", "phi3")


def inputs_of(name: str, seed: int) -> dict[str, Tensor]:
    _, inputs, dims = built(name)
    return sample(inputs, dims, {"batch": 2, "sequence": 24}, seed)


def context(name: str) -> Context:
    return Context(Calibration([inputs_of(name, s) for s in range(6)], "tiny"))


def sparsified(name: str, spec: str, graph: Graph | None = None) -> tuple[Graph, PassResult]:
    graph = trace_tiny(name) if graph is None else graph
    graph.info["task"] = "encoder" if name == "bert" else "causal-lm"
    return graph, Pipeline(parse_passes(spec)).run(graph, context(name))[0].result


def measured(graph: Graph, name: str) -> float:
    """Mean fraction of inputs above their thresholds on other tokens, by weights read."""
    total = kept = 0.0
    batch = inputs_of(name, 99)

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            nonlocal total, kept
            if n in nodes:
                x, weight, _, thresholds = self.fetch_args_kwargs_from_env(n)[0]
                total += weight.numel()
                kept += weight.numel() * float((x.abs() > thresholds).float().mean())
            return super().run_node(n)

    nodes = set(sparse_nodes(graph))
    with torch.no_grad():
        Watch(graph.module).run(*[batch[s.name] for s in graph.inputs])
    return kept / total


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "spec",
    ["sparsify{active=60% score=fisher budgets=global}", "sparsify{active=60% where=ffn score=wina}", "sparsify{active=60% budgets=block}"],
)
def test_the_asked_for_fraction_of_inputs_counts(name: str, spec: str) -> None:
    dense = trace_tiny(name)
    graph, result = sparsified(name, spec)
    assert result.facts["calibrated"] == pytest.approx(0.6, abs=0.02)
    assert measured(graph, name) == pytest.approx(0.6, abs=0.06)
    ups = 3 if name == "llama" else 2
    layers = len(find_regions(dense).ffns)
    assert len(sparse_nodes(graph)) == len(result.changed) >= layers * ups * (2 if "ffn" not in spec else 1)
    inputs = inputs_of(name, 99)
    with torch.no_grad():
        assert 1e-4 < relative_error(graph(**inputs), dense(**inputs)) < 1.0


def test_all_inputs_active_is_the_dense_model() -> None:
    graph, _ = sparsified("llama", "sparsify{active=100%}")
    inputs = inputs_of("llama", 1)
    with torch.no_grad():
        assert_close(graph(**inputs), trace_tiny("llama")(**inputs), rel=1e-5)


def test_sensitive_inputs_are_kept() -> None:
    """Columns of the weights scaled down leave inputs that nothing depends on: these are what is left out."""
    dense = trace_tiny("llama")
    ffn = find_regions(dense).ffns[0]
    weight = dense.tensor(ffn.down.weight).detach().clone()
    weight[:, ::2] *= 1e-3
    dense.add_tensor(ffn.down.weight, weight)
    for score in ("fisher", "wina"):
        graph, _ = sparsified("llama", f"sparsify{{active=50% where=ffn budgets=uniform score={score}}}", dense.copy())
        node = next(n for n in sparse_nodes(graph) if n.args[1].target == ffn.down.weight)
        thresholds = graph.tensor(node.args[3])
        assert float(thresholds[::2].median()) > 30 * float(thresholds[1::2].median())


def test_a_block_leaves_out_what_changes_its_output_least() -> None:
    """Of an FFN whose hidden neurons matter little beside their number, these go first; the whole keeps what was asked for."""
    dense = trace_tiny("llama")
    ffn = find_regions(dense).ffns[0]
    weight = dense.tensor(ffn.down.weight).detach().clone()
    weight[:, ::2] *= 1e-3
    dense.add_tensor(ffn.down.weight, weight)
    _, result = sparsified("llama", "sparsify{active=70% where=ffn score=wina budgets=block}", dense)
    found = result.facts["active_inputs"]
    assert found[ffn.down.weight] < 0.5 < 0.75 < found[ffn.ups[0].weight]
    assert result.facts["calibrated"] == pytest.approx(0.7, abs=0.02)


def test_layers_that_read_the_same_share_their_thresholds() -> None:
    graph, _ = sparsified("llama", "sparsify")
    by_input: dict[object, set[object]] = {}
    for node in sparse_nodes(graph):
        by_input.setdefault(node.args[0], set()).add(node.args[3])
    assert all(len(thresholds) == 1 for thresholds in by_input.values())
    assert len(by_input) == 4 * len(find_regions(trace_tiny("llama")).ffns)


@pytest.mark.parametrize(
    "spec", ["sparsify{active=0}", "sparsify{where=head}", "sparsify{score=x}", "sparsify{budgets=x}", "sparsify{windows=0}"]
)
def test_options_out_of_range_are_refused(spec: str) -> None:
    with pytest.raises(RequestError):
        parse_passes(spec)


# ---- what the rest makes of it --------------------------------------------------------------------------------------
def test_regions_see_a_sparse_ffn_and_rewrite_none() -> None:
    dense = find_regions(trace_tiny("llama"))
    graph, _ = sparsified("llama", "sparsify{where=ffn}")
    regions = find_regions(graph)
    assert [f.name for f in regions.sparse_ffns] == [f.name for f in dense.ffns]
    assert regions.ffns == []
    assert {r.remedy for r in regions.refusals if r.what == "ffn"} == {"run the pass before sparsify"}
    assert len(regions.attentions) == len(dense.attentions)
    assert len(regions.blocks) == len(dense.blocks)
    with pytest.raises(RequestError, match="small inputs"):
        regions.require_ffns()


def test_costs_count_the_inputs_that_count() -> None:
    graph, _ = sparsified("llama", "sparsify{where=ffn active=50%}")
    dense, full = count(trace_tiny("llama")), count(graph)
    assert full.flops_per_token == dense.flops_per_token
    half = count(graph, active={str(n.args[1].target): 0.5 for n in sparse_nodes(graph)})
    ffn = sum(r.flops_per_token for r in dense.by_region.values() if r.kind == "ffn")
    assert half.flops_per_token == pytest.approx(dense.flops_per_token - ffn / 2)
    weights = sum(graph.tensor(n.args[1]).numel() for n in sparse_nodes(graph))
    assert half.active_parameters == dense.parameters - weights // 2


def test_the_static_baseline_reads_as_many_ffn_weights() -> None:
    graph, _ = sparsified("llama", "sparsify{active=50% where=ffn}")
    assert calibrated_share(graph) == pytest.approx(0.5, abs=0.02)
    dense = trace_tiny("llama")
    static = static_baseline(dense, graph, (), context("llama"))
    widths = [sum(f.d_ff for f in find_regions(g).ffns) for g in (static, dense)]
    assert widths[0] / widths[1] == pytest.approx(calibrated_share(graph), abs=0.03)


def test_stored_and_read_again_it_gives_the_same(tmp_path: Path) -> None:
    graph, _ = sparsified("llama", "sparsify{active=60%}, quantize")
    save_graph(graph, tmp_path / "g.json", tmp_path / "g.safetensors")
    again = load_graph(tmp_path / "g.json", tmp_path / "g.safetensors")
    inputs = inputs_of("llama", 1)
    with torch.no_grad():
        assert_close(again(**inputs), graph(**inputs), rel=0)
    assert again.info["active_inputs"] == graph.info["active_inputs"]


@pytest.mark.parametrize("quantize", ["", ", quantize", ", quantize{bits=4 symmetric=no method=gptq}"])
def test_with_a_cache_it_gives_the_same(quantize: str) -> None:
    graph, _ = sparsified("llama", f"sparsify{{active=60%}}{quantize}")
    assert all(str(n.args[1].target) in graph.quantized for n in sparse_nodes(graph)) == bool(quantize)
    before = sparse_nodes(graph)
    (record,) = Pipeline(parse_passes("add-kv-cache{context-length=64}")).run(graph, Context())
    assert not record.result.refused
    assert len(sparse_nodes(graph)) == len(before)
    assert all(float(graph.tensor(n.args[3]).max()) > 0 for n in sparse_nodes(graph))  # put back after the comparison without them


@pytest.mark.parametrize(("vector", "bits", "gathers"), [("avx512_vnni", 4, True), ("avx2", 4, False), ("avx2", 8, False)])
def test_half_of_the_inputs_are_gathered_where_that_is_faster(
    monkeypatch: pytest.MonkeyPatch, vector: str, bits: int, gathers: bool
) -> None:
    monkeypatch.setattr(sparse, "detect", lambda: dataclasses.replace(detect(), vector=(vector,)))
    assert (sparse.gather_below.__wrapped__(bits) >= 0.5) == gathers


@pytest.mark.parametrize("native", [pytest.param(True, marks=pytest.mark.skipif(not available(), reason="no compiler")), False])
@pytest.mark.parametrize(
    "spec", ["sparsify{active=60%}, quantize", "sparsify{active=95%}, quantize{bits=4}", "sparsify{where=ffn active=60%}"]
)
def test_lowered_to_onnx_it_gives_the_same(tmp_path: Path, spec: str, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(sparse, "gather_below", lambda bits: 0.85)  # on every machine
    import json

    from dyncomp.backends.ort.lower import lower
    from dyncomp.backends.ort.parity import parity
    from dyncomp.backends.ort.run import OrtModel

    graph, _ = sparsified("llama", spec)
    layers = len(find_regions(trace_tiny("llama")).ffns)
    Pipeline(parse_passes("add-kv-cache{context-length=64}")).run(graph, Context())
    operators = lower(graph, tmp_path / "a", native=native).operators
    gathers = native and "95%" not in spec and "quantize" in spec
    assert operators.get("dyncomp.SparseLinear", 0) == (6 * layers if gathers else 0)  # q, k, v, out; gate and up; down
    facts = json.loads((tmp_path / "a" / "config.json").read_text())["sparse_linear"]
    assert facts["layers"] == len(sparse_nodes(graph))
    assert facts["gathering_operators"] == operators.get("dyncomp.SparseLinear", 0)
    model = OrtModel(tmp_path / "a", threads=1)
    good = 1e-4 if "quantize" not in spec else 2e-2
    assert parity(graph, model, prompt_tokens=6, steps=4, good=good)["relative_error"] <= good
