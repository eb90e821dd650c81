"""Each pass against the graph before it: on tiny models for breadth, before and after as readable programs."""

from __future__ import annotations

import pytest
import torch
from dyncomp.passes import CarveExperts, FitRouter, PruneStatic, RefitDown
from dyncomp.passes.budgets import allocate
from dyncomp.passes.layerwise import ExpertView
from dyncomp.passes.least_squares import LeastSquares
from dyncomp.passes.routers import FAMILIES
from helpers import assert_close

from bench.tiny import ARCHITECTURES, built, sample, trace_tiny
from dyncomp.calibrate import Calibration, calibrate
from dyncomp.errors import PassError, RequestError
from dyncomp.evidence import calibrated_share, path_share
from dyncomp.graph import Graph
from dyncomp.pipeline import Context, Pipeline
from dyncomp.regions import find_carved, find_regions, find_routed
from dyncomp.sweep import Sweep

WITH_FFN = [name for name, tiny in ARCHITECTURES.items() if tiny.ffns and not tiny.shared]
SOME = [name for name in ("llama", "bert", "gpt2", "phi3") if name in ARCHITECTURES]


def context(name: str, graph: Graph, batches: int = 6) -> Context:
    _, inputs, dims = built(name)
    sizes = {"batch": 2, "sequence": 16}
    data = [sample(inputs, dims, sizes, seed=s) for s in range(batches)]
    calibration = Calibration(data, "test")
    calibrate(graph, find_regions(graph).ffns, calibration)
    return Context(calibration, data[0], dense=graph.copy())


@pytest.mark.parametrize("name", WITH_FFN)
def test_with_all_experts_active_the_model_equals_the_dense_one(name: str) -> None:
    graph = trace_tiny(name)
    _, inputs, dims = built(name)
    fresh = sample(inputs, dims, {"batch": 3, "sequence": 11}, seed=5)
    expected = graph(**fresh)
    result = Pipeline([CarveExperts(experts=4, cluster="random", keep_dense=())]).run(graph, Context())[0].result
    assert len(result.changed) == ARCHITECTURES[name].ffns
    assert len(find_carved(graph)) == ARCHITECTURES[name].ffns
    assert_close(graph(**fresh), expected, rel=1e-5)


def test_layers_that_share_weights_are_refused_by_name() -> None:
    graph = trace_tiny("albert")
    before = graph.text()
    result = Pipeline([CarveExperts(experts=4, cluster="random", keep_dense=())]).run(graph, Context())[0].result
    assert not result.changed
    assert all("read by another layer" in r.reason for r in result.refused)
    assert len(result.refused) == ARCHITECTURES["albert"].ffns
    assert graph.text() == before


@pytest.mark.parametrize("cluster", ["coactivation", "weights", "random"])
@pytest.mark.parametrize("shared", [0, 2])
def test_every_neuron_is_in_exactly_one_expert(cluster: str, shared: int) -> None:
    graph = trace_tiny("llama")
    weights = {f.name: f.weights(graph).w_up for f in find_regions(graph).ffns}
    Pipeline([CarveExperts(experts=8, shared=shared, cluster=cluster, keep_dense=(0,))]).run(graph, context("llama", graph))
    (region,) = find_routed(graph)
    carved = graph.tensor(region.w_up).reshape(8, 2, -1, region.d_model).transpose(0, 1).reshape(-1, region.d_model)
    assert torch.equal(carved.sort(0).values, weights[region.name].sort(0).values)


def test_experts_narrower_than_a_vector_are_carved_and_noted() -> None:
    for experts, narrow in ((4, False), (32, True)):  # of 64 neurons
        result = Pipeline([CarveExperts(experts=experts, cluster="random")]).run(trace_tiny("llama"), Context())[0].result
        assert result.changed
        assert ("narrow" in result.facts) == narrow


def test_the_program_before_and_after_carving(golden) -> None:
    graph = trace_tiny("llama")
    Pipeline([CarveExperts(experts=4, cluster="random", keep_dense=(0,))]).run(graph, Context())
    golden("llama_carved.txt", graph.text())


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("shared", [0, 2])
def test_thresholds_give_the_active_fraction_asked_for(name: str, shared: int) -> None:
    graph = trace_tiny(name)
    ctx = context(name, graph)
    Pipeline([CarveExperts(experts=16, shared=shared, keep_dense=()), FitRouter(active=0.6), RefitDown()]).run(graph, ctx)
    for region in find_routed(graph):
        gates = []
        for batch in ctx.calibration.batches:
            Sweep(graph, [batch]).advance(graph.output_nodes[0], watch={region.gates: lambda _, g, seen=gates: seen.append(g)})
        use = torch.cat([g.flatten(0, -2) for g in gates])
        assert abs(float(use.mean()) - 0.6) < 0.02
        assert use[:, :shared].eq(1).all()


def test_topk_gates_open_the_same_number_for_every_token() -> None:
    graph = trace_tiny("llama")
    ctx = context("llama", graph)
    Pipeline([CarveExperts(experts=8, shared=2, keep_dense=()), FitRouter(active=0.5, gates="topk"), RefitDown()]).run(graph, ctx)
    for region in find_routed(graph):
        inputs = Sweep(graph, ctx.calibration.batches).advance(region.input)
        gates = ExpertView(graph, region).gate_values(inputs[0])
        assert gates.sum(-1).eq(4).all()
        assert gates[..., :2].eq(1).all()


@pytest.mark.parametrize("name", SOME)
def test_refitting_brings_the_output_closer(name: str) -> None:
    graph = trace_tiny(name)
    ctx = context(name, graph, batches=24)
    passes = [CarveExperts(experts=8, keep_dense=()), FitRouter(active=0.7)]
    Pipeline(passes).run(graph, ctx)
    wanted = [ctx.dense(**b) for b in ctx.calibration.batches]
    error = lambda: sum(float((graph(**b) - w).square().mean()) for b, w in zip(ctx.calibration.batches, wanted, strict=True))  # noqa: E731
    before = error()
    Pipeline([RefitDown(ridge=0.02)]).run(graph, ctx)
    assert error() < 0.9 * before


@pytest.mark.parametrize("bias", [True, False])
def test_reduced_rank_regression_beside_free_columns(bias: bool) -> None:
    """Nothing that alternating least squares finds from random starts is better."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(500, 18, generator=generator, dtype=torch.float64) @ torch.randn(18, 18, generator=generator, dtype=torch.float64)
    b = a @ torch.randn(18, 7, generator=generator, dtype=torch.float64) + torch.randn(500, 7, generator=generator, dtype=torch.float64) + 3
    problem = LeastSquares(18, 7)
    problem.add(a.float(), b.float())
    free, down, up, constant = problem.solve_in_part(0.0, 10, 2, bias=bias)
    assert down.shape == (8, 2)
    assert up.shape == (2, 7)
    assert constant.any() == bias
    reached = float((a @ torch.cat([free, down @ up]).double() + constant - b).square().sum())
    covariates = torch.cat([a[:, :10], torch.ones(500, int(bias), dtype=torch.float64)], 1)
    for _ in range(3):
        across = torch.randn(2, 7, generator=generator, dtype=torch.float64)
        for _ in range(200):
            targets = b - covariates @ torch.linalg.lstsq(covariates, b).solution
            basis = a[:, 10:] - covariates @ torch.linalg.lstsq(covariates, a[:, 10:]).solution
            inner = torch.linalg.lstsq(basis, targets @ torch.linalg.pinv(across)).solution
            across = torch.linalg.lstsq(basis @ inner, targets).solution
        found = float((basis @ inner @ across - targets).square().sum())
        assert reached < found * (1 + 1e-4)
    assert reached > found * (1 - 1e-4)


@pytest.mark.parametrize("name", SOME)
def test_a_linear_path_beside_the_experts(name: str) -> None:
    graph = trace_tiny(name)
    ctx = context(name, graph, batches=24)
    blocks = [(b.name, b.kind) for b in find_regions(graph).blocks]
    Pipeline([CarveExperts(experts=8, keep_dense=()), FitRouter(active=0.5)]).run(graph, ctx)
    with_path = graph.copy()
    Pipeline([RefitDown(ridge=0.02)]).run(graph, ctx)
    Pipeline([RefitDown(ridge=0.02, rank=4)]).run(with_path, ctx)
    assert _error(with_path, ctx) < 0.95 * _error(graph, ctx)
    assert [(b.name, b.kind) for b in find_regions(with_path).blocks] == blocks
    assert all(r.path is not None and with_path.tensor(r.path.down).shape == (4, r.d_model) for r in find_routed(with_path))
    share = path_share(with_path, find_routed(with_path)[0])
    assert calibrated_share(with_path) == pytest.approx(calibrated_share(graph) + share)
    before = _error(with_path, ctx)
    Pipeline([RefitDown(ridge=0.02, follow_dense=1.0)]).run(with_path, ctx)  # the path stays, and is reckoned with
    assert _error(with_path, ctx) < 1.1 * before
    with pytest.raises(PassError, match="has a linear path already"):
        Pipeline([RefitDown(rank=4)]).run(with_path, ctx)


def test_a_router_beats_a_random_choice_of_experts() -> None:
    graph = trace_tiny("llama")
    ctx = context("llama", graph, batches=24)
    wanted = [ctx.dense(**b) for b in ctx.calibration.batches]
    error = lambda g: sum(float((g(**b) - w).square().mean()) for b, w in zip(ctx.calibration.batches, wanted, strict=True))  # noqa: E731
    Pipeline([CarveExperts(experts=8, keep_dense=()), FitRouter(active=0.5)]).run(graph, ctx)
    errors = []
    for seed in range(5):
        shuffled = graph.copy()
        for region in find_routed(shuffled):
            view = ExpertView(shuffled, region)
            order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
            shuffled.add_tensor(f"{region.name}.router.weight", shuffled.tensor(f"{region.name}.router.weight").detach()[order])
            shuffled.add_tensor(view.router_bias, view.bias[order])
        errors.append(error(shuffled))
    assert error(graph) < min(errors)


def _error(graph: Graph, ctx: Context) -> float:
    return sum(float((graph(**b) - ctx.dense(**b)).square().mean()) for b in ctx.calibration.batches)


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # gated and not
def test_every_router_gives_the_share_asked_for_and_the_graph_computes_what_was_fitted(name: str) -> None:
    graph = trace_tiny(name)
    ctx = context(name, graph, batches=12)
    Pipeline([CarveExperts(experts=8, shared=2, keep_dense=())]).run(graph, ctx)
    errors = {}
    for router in FAMILIES:
        for gates in ("threshold", "relative"):
            routed = graph.copy()
            Pipeline([FitRouter(active=0.6, router=router, gates=gates)]).run(routed, ctx)
            region = find_routed(routed)[0]
            used = []
            for batch in ctx.calibration.batches:
                Sweep(routed, [batch]).advance(routed.output_nodes[0], watch={region.gates: lambda _, g, seen=used: seen.append(g)})
            used = torch.cat([g.flatten(0, -2) for g in used])
            assert abs(float(used.mean()) - 0.6) < 0.02, (router, gates)
            assert used[:, :2].eq(1).all()
            if gates == "relative":
                assert used[:, 2:].any(1).all(), "the best expert of a token is within any distance of itself"
            errors[router, gates] = _error(routed, ctx)
    assert errors["mlp", "threshold"] < errors["ridge", "threshold"] < errors["representative", "threshold"]
    assert errors["neuron", "threshold"] < errors["ridge", "threshold"]


def test_a_program_with_predicted_neurons(golden) -> None:
    graph = trace_tiny("llama")
    ctx = context("llama", graph)
    Pipeline([CarveExperts(experts=4, keep_dense=(0,)), FitRouter(active=0.8, router="neuron", rank=8, gates="relative")]).run(graph, ctx)
    golden("llama_neuron_router.txt", graph.text())


def test_budgets_go_where_neurons_matter() -> None:
    """The second FFN's output is made ten times weaker: it must get fewer of the neurons, and the model come out better."""
    graph = trace_tiny("llama")
    graph.info["task"] = "causal-lm"
    weak = find_regions(graph).ffns[1].down.weight
    graph.add_tensor(weak, graph.tensor(weak).detach() / 10)
    ctx = context("llama", graph, batches=12)
    Pipeline([CarveExperts(experts=8, keep_dense=())]).run(graph, ctx)
    errors = {}
    for budgets in ("uniform", "kl"):
        routed = graph.copy()
        facts = Pipeline([FitRouter(active=0.6, budgets=budgets)]).run(routed, ctx)[0].result.facts
        errors[budgets] = _error(routed, ctx)
    first, second = facts["budgets"].values()
    assert first > second + 0.2
    assert (first + second) / 2 == pytest.approx(0.6, abs=1e-3)
    assert errors["kl"] < 0.9 * errors["uniform"]


def test_allocation_equalises_the_price_of_a_neuron() -> None:
    losses = {"a": 0.25, "b": 1.0}  # (1 - x)² and 4 (1 - x)² at one half: slopes 2t and 8t
    shares = allocate(losses, {"a": 10, "b": 10}, 0.75, {"a": 0.0, "b": 0.0})
    assert shares == pytest.approx({"a": 0.6, "b": 0.9}, abs=1e-6)
    assert allocate(losses, {"a": 10, "b": 10}, 0.75, {"a": 0.7, "b": 0.0}) == pytest.approx({"a": 0.7, "b": 0.8}, abs=1e-6)


@pytest.mark.parametrize("name", SOME)
def test_static_pruning_of_nothing_changes_nothing(name: str) -> None:
    graph = trace_tiny(name)
    ctx = context(name, graph)
    expected = graph(**ctx.probe)
    Pipeline([PruneStatic(active=1.0, refit=False, keep_dense=())]).run(graph, ctx)
    assert_close(graph(**ctx.probe), expected, rel=1e-5)


def test_static_pruning_keeps_the_neurons_that_vary_and_the_width_asked_for() -> None:
    graph = trace_tiny("llama")
    ctx = context("llama", graph)
    name = find_regions(graph).ffns[1].name
    weights = find_regions(graph).ffns[1].weights(graph)
    quiet = weights.w_down.clone()
    quiet[:, ::2] = 0  # half the neurons do not matter
    graph.add_tensor(find_regions(graph).ffns[1].down.weight, quiet)
    expected = graph(**ctx.probe)
    Pipeline([PruneStatic(active=0.75, refit=False, keep_dense=(0,))]).run(graph, ctx)
    assert {f.name: f.d_ff for f in find_regions(graph).ffns}[name] == weights.w_down.shape[1] // 2
    assert_close(graph(**ctx.probe), expected, rel=1e-5)


@pytest.mark.parametrize("experts", [5, 7])
def test_experts_that_do_not_divide_the_width_are_refused_with_those_that_do(experts: int) -> None:
    with pytest.raises(RequestError, match=f"{experts} experts do not divide the FFN width 64.*\n.*4, 8"):
        Pipeline([CarveExperts(experts=experts, cluster="random")]).run(trace_tiny("llama"), Context())


def test_passes_that_need_something_say_so() -> None:
    with pytest.raises(RequestError, match="calibration"):
        Pipeline([CarveExperts(experts=4)]).run(trace_tiny("llama"), Context())
    with pytest.raises(PassError, match="no routed FFN"):
        Pipeline([FitRouter()]).run(trace_tiny("llama"), context("llama", trace_tiny("llama")))
    graph = trace_tiny("llama")
    with pytest.raises(RequestError, match="kept dense"):
        Pipeline([CarveExperts(experts=4, keep_dense=(0,)), FitRouter(active=0.3)]).run(graph, context("llama", graph))
