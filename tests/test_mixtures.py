"""Mixtures of experts that a model was trained with become routed FFNs; what is not understood is named."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from dyncomp.backends.parity import parity
from dyncomp.backends.program import exported_program
from dyncomp.passes import CarveExperts, DropExperts, FitRouter, MergeExperts, Quantize, SplitExperts
from helpers import assert_close
from torch import Tensor, nn

from bench.tiny import built, sample, tokens, trace_tiny
from dyncomp.calibrate import Calibration
from dyncomp.cost import count
from dyncomp.deploy import backend_of, lower_artifact
from dyncomp.errors import BackendError, GraphError, RequestError
from dyncomp.functional import writes
from dyncomp.graph import Graph
from dyncomp.pipeline import Context, Pipeline, parse_passes
from dyncomp.quantized import round_to_nearest
from dyncomp.regions import find_regions
from dyncomp.serialize import save_graph
from dyncomp.sweep import Sweep
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


def calibrated(name: str, sequences: int = 32) -> tuple[Graph, Context]:
    """A tiny mixture, and a context with tokens to fit its passes to."""
    graph = trace_tiny(name)
    data = [{"input_ids": tokens(8, 32, seed=s)} for s in range(sequences // 8)]
    return graph, Context(Calibration(data, "test"), data[0], dense=graph.copy())


def gates_of(graph: Graph, seed: int) -> list[Tensor]:
    sweep = Sweep(graph, [{"input_ids": tokens(64, 32, seed=seed)}])
    return [sweep.advance(r.gates)[0] for r in find_regions(graph).routed if r.trained]


def by_use(graph: Graph, name: str, ctx: Context) -> list[int]:
    """The experts of a mixture, those with the largest sum of gates first."""
    (region,) = (r for r in find_regions(graph).routed if r.name == name)
    gates = Sweep(graph, ctx.need_calibration("test").batches).advance(region.gates)
    return torch.cat(gates).sum(0).argsort(descending=True).tolist()


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_split_into_parts_are_the_mixture_they_were(name: str) -> None:
    graph, ctx = calibrated(name)
    dense, fresh = graph.copy(), tokens(3, 11, seed=9)
    Pipeline([SplitExperts(parts=2, shared=0, active=1.0)]).run(graph, ctx)
    assert_close(graph(fresh), dense(fresh), rel=1e-5)
    for split, whole in zip(gates_of(graph, 7), gates_of(dense, 7), strict=True):
        assert_close(split, whole.repeat(1, 2), rel=1e-5)  # each part has its expert's gate
    assert count(graph).active_parameters - count(dense).active_parameters == sum(
        graph.tensor(f"{r.name}.parts.{n}").numel() for r in find_regions(graph).routed if r.trained for n in ("weight", "bias")
    )


@pytest.mark.parametrize("shared", [0, 1])
def test_split_experts_run_the_share_asked_for(shared: int) -> None:
    graph, ctx = calibrated("mixtral", 64)
    whole = gates_of(graph, 100)[0]
    result = Pipeline([SplitExperts(parts=4, shared=shared, active=0.6)]).run(graph, ctx)[0].result
    assert result.facts["rarely_used"] == []
    for gates in gates_of(graph, 100):
        assert float((gates != 0).float().mean()) == pytest.approx(0.6 * 2 / 4, abs=0.02)
    parts = gates_of(graph, 100)[0].unflatten(1, (4, 4))  # [n, parts, experts]
    assert bool(((parts == 0) | (parts == whole[:, None])).all()), "the gates are the trained router's"
    assert bool((parts[:, :shared] == whole[:, None]).all()), "what is shared runs for every token of its expert"


def test_experts_that_few_tokens_ran_stay_open_and_are_named() -> None:
    graph, ctx = calibrated("qwen2_moe", 8)
    router = next(n for n in graph.constants() if n.endswith("layers.0.mlp.gate.weight"))
    weight = graph.tensor(router).detach().clone()
    weight[2] = 0.01 * weight[2]
    weight[[0, 1, 3]] *= 5
    graph.add_tensor(router, weight)
    ctx = Context(Calibration([{"input_ids": tokens(1, 24, seed=5)}], "test"))
    result = Pipeline([SplitExperts(parts=2, shared=0, active=0.6)]).run(graph, ctx)[0].result
    named = [entry for entry in result.facts["rarely_used"] if "layers.0" in entry]
    assert any("expert 2" in entry for entry in named)
    assert not graph.tensor("model.model.layers.0.mlp.experts.parts.weight")[[2, 6]].any()


@pytest.mark.parametrize("name", MIXTURES)
def test_equal_experts_merge_without_loss(name: str) -> None:
    """The two experts in least use are the others with their neurons in another order."""
    graph, ctx = calibrated(name)
    generator = torch.Generator().manual_seed(0)
    for region in (r for r in find_regions(graph).routed if r.trained):
        up, down = graph.tensor(region.w_up).detach().clone(), graph.tensor(region.w_down).detach().clone()
        first, second, *copies = by_use(graph, region.name, ctx)
        for copy_, source in zip(copies, (first, second), strict=True):
            order = torch.randperm(down.shape[2], generator=generator)
            up[copy_], down[copy_] = up[source].unflatten(0, (2, -1))[:, order].flatten(0, 1), down[source][:, order]
        graph.add_tensor(region.w_up, up)
        graph.add_tensor(region.w_down, down)
    dense, fresh = graph.copy(), tokens(3, 11, seed=9)
    result = Pipeline([MergeExperts(experts=2)]).run(graph, ctx)[0].result
    assert len(result.changed) == 2
    assert all(r.experts == 2 for r in find_regions(graph).routed if r.trained)
    assert_close(graph(fresh), dense(fresh), rel=1e-5)
    for merged, whole in zip(gates_of(graph, 7), gates_of(dense, 7), strict=True):
        assert_close(merged.sum(-1), whole.sum(-1), rel=1e-6)
    with pytest.raises(RequestError, match="no trained mixture"):
        MergeExperts().precheck(trace_tiny("llama"))


def test_alike_experts_are_merged_and_random_groups_lose_more() -> None:
    """The two experts in least use are the others with a little noise."""
    graph, ctx = calibrated("mixtral")
    generator, wanted = torch.Generator().manual_seed(0), []
    for region in find_regions(graph).routed:
        order = by_use(graph, region.name, ctx)
        for name in (region.w_up, region.w_down):
            weight = graph.tensor(name).detach().clone()
            weight[order[2:]] = weight[order[:2]] + 0.01 * torch.randn(weight[:2].shape, generator=generator)
            graph.add_tensor(name, weight)
        wanted.append(sorted(sorted(pair) for pair in zip(order[:2], order[2:], strict=True)))
    fresh, errors = tokens(3, 11, seed=9), {}
    for groups in ("outputs", "random"):
        merged = graph.copy()
        result = Pipeline([MergeExperts(experts=2, groups=groups)]).run(merged, Context(ctx.calibration, seed=3))[0].result
        errors[groups] = float((merged(fresh) - graph(fresh)).norm() / graph(fresh).norm())
        assert groups == "random" or [sorted(g) for g in result.facts["groups"].values()] == wanted
    assert errors["outputs"] < 0.1 < 0.4 < errors["random"], errors


def test_what_was_split_or_merged_is_not_taken_for_whole_experts() -> None:
    graph, ctx = calibrated("mixtral", 8)
    passes = [MergeExperts(experts=3), MergeExperts(experts=2), DropExperts(), SplitExperts(parts=2), MergeExperts(experts=1)]
    records = Pipeline(passes).run(graph, ctx)
    assert [bool(r.result.changed) for r in records] == [True, True, False, True, False]
    assert "put drop-experts before merge-experts" in str(records[2].result.refused[0])
    assert "put merge-experts before split-experts" in str(records[4].result.refused[0])


def test_experts_that_few_tokens_ran_are_rounded_and_named() -> None:
    graph, ctx = calibrated("mixtral", 8)  # 256 tokens, two of four experts each: fewer than four a neuron
    dense = graph.copy()
    result = Pipeline([Quantize(bits=4, method="gptq")]).run(graph, ctx)[0].result
    assert len(result.facts["rarely_used"]) >= 4
    for region in find_regions(graph).routed:
        for e in [e for e in range(4) if any(f"{region.name} expert {e}:" in entry for entry in result.facts["rarely_used"])]:
            plain = round_to_nearest(dense.tensor(region.w_down)[e].detach(), 4, 32, symmetric=True).decode()
            assert torch.equal(graph.tensor(region.w_down)[e], plain)


@pytest.mark.parametrize(
    "passes", ["", "drop-experts{keep=75%}, merge-experts{experts=2}, split-experts{parts=2}, quantize{bits=4 method=gptq}"]
)
def test_a_mixture_on_onnx_runtime(tmp_path: Path, passes: str) -> None:
    """Prompts and steps with a KV cache, in the native kernels: as trained, and after all that can be done to it."""
    graph, ctx = calibrated("mixtral")
    graph.info |= {"task": "causal-lm", "context_length": 64}
    records = Pipeline(parse_passes(passes)).run(graph, ctx)
    assert all(r.result.changed for r in records)
    ort = backend_of("ort")
    lowered, refused = lower_artifact(graph, tmp_path, backend="ort")
    assert not refused
    entry = parity(lowered, ort.open(tmp_path, threads=1), ort.session, backend="ort", steps=4, attempts=1)
    assert entry["relative_error"] < (1e-2 if passes else 1e-4)


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
