"""Mixtures of experts that a model was trained with become routed FFNs; what is not understood is named."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from dyncomp.backends.parity import parity
from dyncomp.backends.program import exported_program
from dyncomp.passes import CarveExperts, DropExperts, FitRouter
from helpers import assert_close
from torch import Tensor, nn

from bench.tiny import built, sample, tokens, trace_tiny
from dyncomp.calibrate import Calibration
from dyncomp.cost import count
from dyncomp.deploy import backend_of, lower_artifact
from dyncomp.errors import BackendError, GraphError, RequestError
from dyncomp.functional import writes
from dyncomp.graph import Graph
from dyncomp.pipeline import Context, Pipeline
from dyncomp.regions import find_regions
from dyncomp.serialize import save_graph
from dyncomp.trace import trace

MIXTURES = ["mixtral", "qwen2_moe"]
E, K, D, F = 5, 2, 12, 7


class Handwritten(nn.Module):
    """A mixture in another spelling than transformers': argsort, one-hot counts, index_add, three products, weights [E, in, out]."""

    def __init__(self, weighted: bool = True) -> None:
        import transformers.integrations.moe  # noqa: F401  (registers the product)

        super().__init__()
        self.weighted, self.router = weighted, nn.Linear(D, E)
        generator = torch.Generator().manual_seed(0)
        shapes = {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator) / D**0.5))

    def forward(self, x: Tensor) -> Tensor:
        product = torch.ops.transformers.grouped_mm_fallback
        tokens_ = x.flatten(0, 1)
        weights, ids = self.router(tokens_).sigmoid().topk(K, -1)
        order = ids.flatten().argsort(stable=True)
        ends = nn.functional.one_hot(ids.flatten(), E).sum(0).cumsum(0)
        rows = tokens_[order // K]
        out = product(nn.functional.gelu(product(rows, self.gate, ends)) * product(rows, self.up, ends), self.down, ends)
        if self.weighted:
            out = out * weights.flatten()[order][:, None]
        return torch.zeros_like(tokens_).index_add(0, order // K, out).unflatten(0, x.shape[:2])


def traced(module: nn.Module) -> Graph:
    return trace(module, {"x": torch.randn(2, 3, D)}, {"x": {0: "batch", 1: "sequence"}})


@pytest.mark.parametrize("name", MIXTURES)
def test_a_trained_mixture_is_a_routed_ffn(name: str) -> None:
    module, graph = built(name)[0], trace_tiny(name)
    routed = find_regions(graph).routed
    assert [r.name for r in routed] == ["model.model.layers.0.mlp.experts", "model.model.layers.1.mlp.experts"]
    assert all(r.trained and r.experts == 4 and (r.activation, r.gated) == ("silu", True) for r in routed)
    weights = dict(module.named_parameters())
    assert all(graph.tensor(r.w_up).data_ptr() == weights[f"{r.name}.gate_up_proj"].data_ptr() for r in routed), "not copied"
    assert not [r for r in find_regions(graph).refusals if r.what == "ffn" and "mixture" in r.reason]
    assert not [n for n in graph.nodes if writes(n)], "nothing is left that writes into its inputs"
    experts = sum(r.expert_parameters for r in routed)
    assert count(graph).active_parameters == graph.parameter_count() - experts // 2, "two of four experts run"


def test_another_spelling_is_the_same_mixture() -> None:
    module = Handwritten()
    graph, x = traced(module), torch.randn(3, 11, D)
    (region,) = find_regions(graph).routed
    assert (region.activation, region.gated, region.experts, region.d_ff) == ("gelu", True, E, E * F)
    with torch.no_grad():
        assert_close(graph(x), module(x), rel=1e-5)


def test_what_only_looks_like_a_mixture_is_named(tmp_path: Path) -> None:
    module = Handwritten(weighted=False)
    graph, x = traced(module), torch.randn(3, 11, D)
    assert not find_regions(graph).routed
    (refusal,) = (r for r in find_regions(graph).refusals if r.what == "ffn")
    assert "mixture of 5 experts already" in refusal.reason
    assert "is not the sum of each token's experts by its weights" in refusal.reason
    with torch.no_grad():
        assert_close(graph(x), module(x), rel=1e-6)
    with pytest.raises(GraphError, match="grouped_mm"):
        save_graph(graph, tmp_path / "graph.json", tmp_path / "weights.safetensors")


def test_routers_are_fitted_to_carved_experts_only() -> None:
    graph = trace_tiny("qwen2_moe")
    _, inputs, dims = built("qwen2_moe")
    data = [sample(inputs, dims, {"batch": 2, "sequence": 16}, seed) for seed in range(4)]
    gates = [r.gates for r in find_regions(graph).routed]
    passes = [CarveExperts(experts=4, cluster="random", keep_dense=()), FitRouter(active=0.5)]
    records = Pipeline(passes).run(graph, Context(Calibration(data, "test"), data[0], dense=graph.copy()))
    assert all("shared_expert" in name for name in records[1].result.changed)
    assert [r.gates for r in find_regions(graph).routed if r.trained] == gates
    with pytest.raises(RequestError, match="its 2 FFNs are routed already"):
        CarveExperts(experts=4).precheck(trace_tiny("mixtral"))


def test_the_least_used_experts_are_dropped() -> None:
    graph, module = trace_tiny("mixtral"), copy.deepcopy(built("mixtral")[0])
    ids, used = tokens(4, 32, seed=3), list[Tensor]()
    layers = module.model.model.layers
    hooks = [la.mlp.gate.register_forward_hook(lambda m, a, out: used.append(torch.zeros(len(out[1]), 4).scatter(1, out[2], out[1]).sum(0)))
             for la in layers]  # fmt: skip
    with torch.no_grad():
        module(input_ids=ids)
    for hook in hooks:
        hook.remove()
    result = Pipeline([DropExperts(keep=0.75)]).run(graph, Context(Calibration([{"input_ids": ids}], "test")))[0].result
    assert list(result.facts["kept"].values()) == [sorted(u.topk(3).indices.tolist()) for u in used]
    for layer, kept in zip(layers, result.facts["kept"].values(), strict=True):
        experts, gate = layer.mlp.experts, layer.mlp.gate
        for owner, name in ((gate, "weight"), (experts, "gate_up_proj"), (experts, "down_proj")):
            setattr(owner, name, nn.Parameter(getattr(owner, name).detach()[kept]))
        gate.num_experts = experts.num_experts = 3
    fresh = tokens(3, 11, seed=4)
    with torch.no_grad():
        assert_close(graph(fresh), module(input_ids=fresh), rel=1e-5)
    assert graph.parameter_count() == sum(p.numel() for p in module.parameters())
    with pytest.raises(RequestError, match="no trained mixture"):
        DropExperts().precheck(trace_tiny("llama"))


def test_a_mixture_on_onnx_runtime(tmp_path: Path) -> None:
    """Prompts and steps with a KV cache, in the native kernels."""
    graph = trace_tiny("mixtral")
    graph.info |= {"task": "causal-lm", "context_length": 64}
    ort = backend_of("ort")
    lowered, refused = lower_artifact(graph, tmp_path, backend="ort")
    assert not refused
    entry = parity(lowered, ort.open(tmp_path, threads=1), ort.session, backend="ort", steps=4, attempts=1)
    assert entry["relative_error"] < 1e-4


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        half = x.half() * 2
        half.mul_(x)  # stays half
        seen = x * 2
        part = seen[:, :1]
        return half.float() + x.exp().clamp_(max=1.0) + seen.add_(1) + part  # part sees the addition


def test_what_writes_into_its_input_is_functional_or_named() -> None:
    graph, x = trace(InPlace(), {"x": torch.randn(3, 4)}, {"x": {0: "batch"}}), torch.randn(5, 4)
    assert torch.equal(graph(x), InPlace()(x))
    assert [str(n.target) for n in graph.nodes if writes(n)] == ["aten.add_.Tensor"]
    with pytest.raises(BackendError, match=r"add_.*writes into its input"):
        exported_program(graph)
