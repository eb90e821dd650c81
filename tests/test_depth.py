"""Tokens that skip: open gates change nothing, closed ones spare the work, and what is fitted skips what was asked for."""

from __future__ import annotations

import re

import pytest
import torch
from dyncomp.passes import DropDepth, SkipDepth
from dyncomp.passes.depth_budget import allocate
from dyncomp.passes.depth_gates import insert_gates
from dyncomp.passes.least_squares import LeastSquares
from dyncomp.passes.skip_depth import find_units
from helpers import assert_close
from torch.library import opcheck

from bench.tiny import ARCHITECTURES, built, sample, trace_tiny
from dyncomp.calibrate import Calibration, calibrate
from dyncomp.cost import count
from dyncomp.errors import RequestError
from dyncomp.evaluate import evaluate
from dyncomp.evidence import baselines, cost_figures, measure_quality
from dyncomp.graph import Graph
from dyncomp.ops import gated_linear, routed_ffn
from dyncomp.pipeline import Context, Pipeline
from dyncomp.recipe import load_recipe
from dyncomp.regions import find_regions
from dyncomp.regions.depth import find_skips
from dyncomp.report.depth import depth_html, depth_items, depth_of
from dyncomp.sweep import Sweep

DECODERS = ("llama", "qwen3", "gptj", "phi3", "olmo2", "falcon")


def context(name: str, graph: Graph, batches: int = 6, length: int = 16) -> Context:
    _, inputs, dims = built(name)
    data = [sample(inputs, dims, {"batch": 2, "sequence": length}, seed=s) for s in range(batches)]
    calibration = Calibration(data, "test")
    calibrate(graph, find_regions(graph).ffns, calibration)
    return Context(calibration, data[0], dense=graph.copy())


def gated(name: str, what: str, *, closed: bool, rank: int = 4) -> Graph:
    """With random routers that close about half of the gates, and random stand-ins; or as they are made, open."""
    graph, generator = trace_tiny(name), torch.Generator().manual_seed(1)
    units, _ = find_units(graph, what)
    for unit in [insert_gates(graph, u, rank) for u in units]:
        if closed:
            graph.add_tensor(unit.weight, torch.randn(graph.tensor(unit.weight).shape, generator=generator))
            graph.add_tensor(unit.bias, torch.zeros(1))
        for part in unit.parts if rank else ():
            shapes = ((part.source.meta["val"].shape[-1], rank - 1), (rank - 1, part.d_out), (part.d_out,))
            part.set_stand_in(*(0.2 * torch.randn(s, generator=generator) for s in shapes))
    graph.clean()
    graph.info |= {"task": "causal-lm" if ARCHITECTURES[name].vocab else "encoder", "context_length": 64}
    return graph


# ---- the operation -------------------------------------------------------------------------------------------------
def test_gated_linear() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=generator, requires_grad=True) for s in ((2, 5, 8), (6, 8), (6,)))
    for gates in (torch.zeros(2, 5, 1), torch.ones(2, 5, 1), (torch.rand(2, 5, 1, generator=generator) > 0.5) * 1.5):
        opcheck(torch.ops.dyncomp.gated_linear.default, (x, gates.requires_grad_(), weight, bias))
        expected = torch.nn.functional.linear(x, weight, bias) * gates
        assert_close(gated_linear(x, gates, weight, bias), expected, rel=1e-6)
        actual_grads, grads = (torch.autograd.grad(y.square().sum(), (x, gates, weight, bias), allow_unused=True)
                               for y in (gated_linear(x, gates, weight, bias), expected))  # fmt: skip
        for a, b in zip(actual_grads, grads, strict=True):
            assert_close(a, b, rel=1e-5)
    (slope,) = torch.autograd.grad(gated_linear(x, torch.zeros(2, 5, 1).requires_grad_() * 1, weight, bias).sum(), bias)
    assert float(slope.abs().max()) == 0


def test_tokens_that_stay_are_computed_as_if_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    x, gates = torch.randn(1, 40, 16, generator=generator), (torch.rand(1, 40, 1, generator=generator) > 0.3).float()
    up, down = torch.randn(1, 64, 16, generator=generator), torch.randn(1, 16, 32, generator=generator)
    kept = gates[0, :, 0] != 0
    alone = x[:, kept]
    together = routed_ffn(x, gates, up, None, down, "silu")
    assert torch.equal(together[:, kept], routed_ffn(alone, torch.ones(1, alone.shape[1], 1), up, None, down, "silu"))
    assert float(together[:, ~kept].abs().max()) == 0


# ---- rewriting -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [*DECODERS, "bert", "gpt2"])
@pytest.mark.parametrize("what", ["ffn", "attention", "block"])
def test_with_every_gate_open_the_model_equals_the_dense_one(name: str, what: str) -> None:
    graph = gated(name, what, closed=False)
    if name == "gpt2" and what != "ffn":  # its projections see all tokens of a batch in one row of tokens
        assert not find_skips(graph)
        return
    assert len(find_skips(graph)) == ARCHITECTURES[name].ffns
    _, inputs, dims = built(name)
    fresh = sample(inputs, dims, {"batch": 3, "sequence": 11}, seed=5)
    assert_close(graph(**fresh), trace_tiny(name)(**fresh), rel=1e-5)


def test_a_token_that_skips_an_attention_is_still_seen_by_others() -> None:
    """Closing the gate of one token changes that token and what attends to its changed stream, not its keys and values there."""
    graph = trace_tiny("llama")
    (first, *_), _ = find_units(graph, "attention")
    unit = insert_gates(graph, first, 0)
    graph.clean()
    ids = torch.randint(2, 90, (1, 8), generator=torch.Generator().manual_seed(0))
    seen: dict[str, torch.Tensor] = {}

    def run() -> torch.Tensor:
        def keep(key: str):
            return lambda _, value: seen.__setitem__(key, value.clone())

        result = unit.parts[0].result
        return Sweep(graph, [{"input_ids": ids}]).advance(result, watch={result: keep("out"), unit.gates: keep("gates")})[0]

    open_ = run()
    source = seen["gates"]
    assert bool((source == 1).all())
    x = Sweep(graph, [{"input_ids": ids}]).advance(unit.source)[0]
    weight = x[0, 5]
    scores = x[0] @ weight
    threshold = float(scores.sort().values[-2] + scores.max()) / 2
    graph.add_tensor(unit.weight, -weight[None])
    graph.add_tensor(unit.bias, torch.tensor([threshold]))
    closed = run()
    changed = (open_ != closed).any(-1)[0]
    skipped = int(scores.argmax())
    assert skipped != 0
    assert changed.nonzero().flatten().tolist() == [skipped]
    assert float(closed[0, skipped].abs().max()) == 0


@pytest.mark.parametrize("what", ["ffn", "attention", "block"])
@pytest.mark.parametrize("blocks", ["auto", "all", "1"])
def test_the_fitted_model_skips_what_was_asked_for(what: str, blocks: str) -> None:
    graph = trace_tiny("llama")
    graph.info["task"] = "causal-lm"
    ctx = context("llama", graph, batches=12)
    active = 0.75 if blocks != "1" else 0.9
    result = Pipeline([SkipDepth(what=what, active=active, blocks=blocks, rank=4)]).run(graph, ctx)[0].result
    assert sum(result.facts["skipped"].values()) == pytest.approx((1 - active) * 2, abs=0.02)
    ids = torch.cat([b["input_ids"] for b in ctx.calibration.batches])  # type: ignore[union-attr]
    quality = evaluate({"dense": ctx.dense, "converted": graph}, ids, task="causal-lm", batch=4)  # type: ignore[dict-item]
    computed = quality.computed["converted"]
    assert sum(1 - share for share in computed.values()) == pytest.approx((1 - active) * 2, abs=0.08)
    assert not quality.computed["dense"]
    gates: list[torch.Tensor] = []
    watch = {s.gates: lambda _, value: gates.append(value) for s in find_skips(graph)}
    Sweep(graph, [{"input_ids": ids}]).advance(graph.output_nodes[0], watch=watch)
    assert all(bool((g[:, 0] == 1).all()) for g in gates)
    before, after = (
        count(ctx.dense),
        count(graph, active=quality.computed["converted"] | {k: v.active for k, v in quality.load["converted"].items()}),
    )  # type: ignore[arg-type]
    assert after.flops_per_token < before.flops_per_token


def test_a_fitted_stand_in_is_better_than_none() -> None:
    errors = {}
    for standin in ("linear", "none"):
        graph = trace_tiny("llama")
        ctx = context("llama", graph, batches=40)
        Pipeline([SkipDepth(what="ffn", active=0.5, blocks="all", standin=standin, rank=24, follow_dense=0)]).run(graph, ctx)
        batch = ctx.calibration.batches[0]  # type: ignore[union-attr]
        errors[standin] = float((graph(**batch) - ctx.dense(**batch)).square().mean())  # type: ignore[misc]
    assert errors["linear"] < 0.9 * errors["none"]


def test_dropping_leaves_out_whole_layers() -> None:
    graph = trace_tiny("llama")
    ctx = context("llama", graph)
    result = Pipeline([DropDepth(what="block", count=1)]).run(graph, ctx)[0].result
    assert len(result.changed) == 1
    assert len(find_regions(graph).ffns) == 1
    assert len(find_regions(graph).attentions) == 1


def test_the_evidence_has_baselines_of_the_same_cost() -> None:
    graph = trace_tiny("llama")
    graph.info["task"] = "causal-lm"
    ctx = context("llama", graph, batches=12)
    Pipeline(load_recipe("depth").resolve(active=0.5)).run(graph, ctx)
    assert ctx.dense is not None
    plain = baselines(ctx.dense, graph, None, ctx)
    assert len(find_regions(plain["layers_dropped"]).attentions) == 1
    ids = torch.cat([b["input_ids"] for b in ctx.calibration.batches])  # type: ignore[union-attr]
    quality = measure_quality({"dense": ctx.dense, "converted": graph} | plain, {"held out": ids}, "causal-lm")
    figures = quality["held out"]
    assert set(figures["increase"]) == {"converted", "layers_dropped", "static_pruned"}
    routers = len(figures["skipped_by_gate"])
    assert figures["skipped"] * routers == pytest.approx(1, abs=0.1)  # of two layers, half the visits
    assert 0.3 < figures["active_ffn"] < 0.7
    cost = cost_figures(ctx.dense, graph, quality)
    assert cost["flops_per_token"] < cost["dense"]["flops_per_token"]
    assert cost["active_parameters"] < cost["dense"]["active_parameters"]


def test_impossible_requests_say_why() -> None:
    for options, said in (({"what": "heads"}, "what=heads"), ({"kv": "share"}, "kv=share"), ({"blocks": "most"}, "blocks=most"),
                          ({"active": 0.0}, "fraction")):  # fmt: skip
        with pytest.raises(RequestError, match=said):
            SkipDepth(**options)  # type: ignore[arg-type]
    graph = trace_tiny("llama")
    with pytest.raises(RequestError, match="may be skipped"):
        SkipDepth(active=0.4, keep_first=1).run(graph, context("llama", graph))
    with pytest.raises(RequestError, match="there are 2"):
        SkipDepth(blocks="7").run(graph, context("llama", graph))


def test_the_budget_goes_to_the_layers_that_lose_least() -> None:
    shares = allocate([0.1, 0.01, 0.02, 5.0], 1.0)
    assert sum(shares) == pytest.approx(1.0, abs=1e-6)
    assert shares[1] > shares[2] > shares[0] > shares[3]
    assert max(allocate([1e-9, 1.0, 1.0], 2.0)) <= 1
    assert sum(allocate([1e-9, 1.0, 1.0], 2.0)) == pytest.approx(2.0, abs=1e-6)


def test_reduced_rank_regression_finds_a_low_rank_map() -> None:
    generator = torch.Generator().manual_seed(0)
    x, a, b = (torch.randn(s, generator=generator) for s in ((400, 12), (12, 3), (3, 7)))
    problem = LeastSquares(12, 7)
    problem.add(x, x @ a @ b + 2)
    down, up, bias = problem.solve_low_rank(1e-6, 3)
    assert_close(x @ down @ up + bias, x @ a @ b + 2, rel=1e-3)


class Words:
    """A tokenizer of whole words."""

    def __init__(self, text: str) -> None:
        self.words = re.findall(r"\s*\S+", text)

    def __call__(self, text: str, **_: object) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.arange(2, 2 + len(self.words))[None]}

    def decode(self, ids: list[int]) -> str:
        return self.words[ids[0] - 2]


def test_the_picture_of_a_text() -> None:
    text = " The 3 quick < foxes & 14 dogs , slept"
    graph = gated("llama", "block", closed=True)
    depth = depth_of(graph, Words(text), text)
    assert "".join(depth.pieces) == text
    assert depth.computed.shape == (2, 10)
    assert bool(depth.computed[:, 0].all())
    assert not bool(depth.computed.all())
    kinds = depth.by_class()
    assert {kind: n for kind, (n, _) in kinds.items()} == {"word": 5, "number": 2, "punctuation": 3}
    total = sum(n * share for n, share in kinds.values())
    assert total == pytest.approx(float(depth.share.sum()), rel=1e-5)
    assert depth.as_dict()["gates"] == {n: round(float(s), 4) for n, s in zip(depth.gates, depth.computed.float().mean(1), strict=True)}
    assert "&lt;" in depth_html(depth)
    assert str(depth_items(depth)[0]) == text
    with pytest.raises(RequestError, match="every token computes"):
        depth_of(trace_tiny("llama"), Words(text), text)
