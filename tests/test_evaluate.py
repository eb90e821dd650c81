"""Quality figures against their definitions, and the real models for truth."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from dyncomp.passes import CarveExperts
from dyncomp.passes.layerwise import ExpertView
from helpers import assert_close

from bench.tiny import VOCAB, tokens, trace_tiny
from dyncomp.bootstrap import interval
from dyncomp.evaluate import evaluate, load_summary, model_inputs
from dyncomp.pipeline import Context, Pipeline
from dyncomp.regions import find_routed


def with_closed_experts(name: str, closed: int):
    """A tiny model whose routers leave the first ``closed`` of 4 experts off for every token."""
    graph = trace_tiny(name)
    Pipeline([CarveExperts(experts=4, cluster="random", keep_dense=())]).run(graph, Context())
    for region in find_routed(graph):
        view = ExpertView(graph, region)
        bias = view.bias.clone()
        bias[:closed] = -1
        graph.add_tensor(view.router_bias, bias)
    return graph


def test_perplexity_kl_and_agreement_are_what_they_are_called() -> None:
    dense, other = trace_tiny("llama"), with_closed_experts("llama", 2)
    windows = tokens(5, 12)
    quality = evaluate({"converted": other, "dense": dense}, windows, task="causal-lm")
    logits = {"dense": dense(windows), "converted": other(windows)}
    for name, value in logits.items():
        loss = F.cross_entropy(value[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
        assert quality.perplexity(name) == pytest.approx(math.exp(loss), rel=1e-5)
    p, q = (F.log_softmax(logits[n][:, :-1], -1) for n in ("dense", "converted"))
    assert quality.kl["converted"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert quality.agreement["converted"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
    assert quality.increase("dense") == 0


def test_expert_load_counts_closed_experts() -> None:
    graph = with_closed_experts("llama", 1)
    quality = evaluate({"dense": trace_tiny("llama"), "converted": graph}, tokens(4, 12), task="causal-lm")
    for use in quality.load["converted"].values():
        assert use.load.tolist() == [0, 1, 1, 1]
        assert use.unused == [0]
        assert use.active == 0.75
        assert use.none == 0
    widths = {r.name: r.d_ff for r in find_routed(graph)}
    assert quality.active_ffn("converted", widths, dense_width=0) == pytest.approx(0.75)
    assert quality.active_ffn("converted", widths, dense_width=sum(widths.values())) == pytest.approx(0.875)
    summary = load_summary(list(quality.load["converted"].values()))
    assert summary["unused_experts"] == 2
    assert summary["least_used"] == 0


def test_tokens_that_no_expert_serves_are_counted() -> None:
    graph = with_closed_experts("llama", 4)
    quality = evaluate({"dense": trace_tiny("llama"), "converted": graph}, tokens(2, 12), task="causal-lm")
    assert all(use.none == 1 for use in quality.load["converted"].values())


def test_encoders_are_compared_by_the_cosine_of_their_mean() -> None:
    dense, other = trace_tiny("bert"), with_closed_experts("bert", 2)
    windows = tokens(6, 10, VOCAB)
    quality = evaluate({"dense": dense, "converted": other}, windows, task="encoder", batch=4)
    pooled = [F.normalize(g(**model_inputs(g, windows)).mean(1), dim=-1) for g in (dense, other)]
    assert_close(torch.tensor(quality.cosine["converted"]), (pooled[0] * pooled[1]).sum(-1).mean(), rel=1e-5)


def test_intervals_cover_the_mean_and_pairing_narrows_them() -> None:
    generator = torch.Generator().manual_seed(0)
    hard = torch.randn(64, generator=generator)  # how hard each window is, for both models alike
    covered = 0
    for _ in range(60):
        values = torch.randn(40, generator=generator) + 1
        low, high = interval(values)
        covered += low <= 1 <= high
    assert 49 <= covered <= 60  # 95 % of 60 is 57; an interval of half the width would cover 40
    difference = 0.1 + 0.01 * torch.randn(64, generator=generator)
    low, high = interval(difference, exponential=True)
    assert low < math.expm1(0.1) < high
    assert high - low < 0.1 * (interval(hard + difference)[1] - interval(hard + difference)[0])
    assert interval(difference) == interval(difference)
    assert interval(torch.ones(1)) is None


def test_quality_figures_carry_intervals() -> None:
    quality = evaluate({"dense": trace_tiny("llama"), "converted": with_closed_experts("llama", 2)}, tokens(6, 12), task="causal-lm")
    ranges = quality.intervals()
    for figure in ("increase", "kl", "agreement"):
        value = quality.increase("converted") if figure == "increase" else getattr(quality, figure)["converted"]
        low, high = ranges[figure]["converted"]
        assert low <= value <= high
        assert low < high
    assert "dense" not in ranges["increase"]


def test_retrieval_agreement_counts_common_neighbours() -> None:
    dense, other = trace_tiny("bert"), with_closed_experts("bert", 3)
    windows = tokens(40, 32, VOCAB)
    quality = evaluate({"dense": dense, "converted": other, "same": dense}, windows, task="encoder", batch=8)
    assert quality.retrieval["same"] == 1
    nearest = []
    for graph in (dense, other):
        pooled = F.normalize(graph(**model_inputs(graph, windows)).mean(1), dim=-1)
        likeness = pooled @ pooled.T - 9 * torch.eye(40)
        nearest.append([set(row.topk(10).indices.tolist()) for row in likeness])
    expected = sum(len(a & b) for a, b in zip(*nearest, strict=True)) / 400
    assert quality.retrieval["converted"] == pytest.approx(expected)
    assert expected < 1
