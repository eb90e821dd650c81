"""Tokens that skip: open gates change nothing, closed ones spare the work, and what is fitted skips what was asked for."""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import dyncomp.passes.skip_depth
import pytest
import torch
from dyncomp.backends.native import available
from dyncomp.passes import AddKVCache, DropDepth, Quantize, SkipDepth
from dyncomp.passes.depth_budget import Curve, allocate
from dyncomp.passes.depth_gates import insert_gates
from dyncomp.passes.depth_kv import keys_and_values
from dyncomp.passes.least_squares import LeastSquares
from dyncomp.passes.skip_depth import find_units
from helpers import assert_close
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from bench.tiny import ARCHITECTURES, built, sample, trace_tiny
from dyncomp.calibrate import Calibration, calibrate
from dyncomp.cost import count
from dyncomp.errors import RequestError
from dyncomp.evaluate import evaluate
from dyncomp.evidence import baselines, cost_figures, measure_quality
from dyncomp.examples import Examples
from dyncomp.graph import Graph
from dyncomp.ops import append_cache, cached_attention, gated_linear, key_mask, routed_ffn, sequence_scores
from dyncomp.pipeline import Context, Pipeline
from dyncomp.recipe import load_recipe
from dyncomp.regions import find_regions
from dyncomp.regions.depth import find_skips, kv_bytes
from dyncomp.report.depth import depth_html, depth_items, depth_of
from dyncomp.sweep import Sweep

DECODERS = ("llama", "qwen3", "gptj", "phi3", "olmo2", "falcon")


def context(name: str, graph: Graph, batches: int = 6, length: int = 16) -> Context:
    _, inputs, dims = built(name)
    data = [sample(inputs, dims, {"batch": 2, "sequence": length}, seed=s) for s in range(batches)]
    calibration = Calibration(data, "test")
    calibrate(graph, find_regions(graph).ffns, calibration)
    return Context(calibration, data[0], dense=graph.copy())


def gated(name: str | Graph, what: str, *, closed: bool, rank: int = 4, kv: str = "compute", first: int = 0) -> Graph:
    """With random routers that close about half of the gates, and random stand-ins; or as they are made, open. ``first``: the last unit is
    decided by a sequence's first tokens, so many."""
    graph, generator = trace_tiny(name) if isinstance(name, str) else name, torch.Generator().manual_seed(1)
    units, attentions = find_units(graph, what)[0], find_regions(graph).attentions
    policies = [keys_and_values(graph, attentions, u.parts[0].attention, kv) if what != "ffn" else None for u in units]
    made = [insert_gates(graph, u, rank, p) for u, p in zip(units, policies, strict=True) if not isinstance(p, str)]
    if first:
        made[-1].choose(graph, functools.partial(sequence_scores._opoverload, first=first), keep_first=False)
    for unit in made:
        if closed:
            graph.add_tensor(unit.weight, torch.randn(graph.tensor(unit.weight).shape, generator=generator))
            graph.add_tensor(unit.bias, torch.zeros(1))
        for part in unit.parts if rank else ():
            shapes = ((part.source.meta["val"].shape[-1], rank - 1), (rank - 1, part.d_out), (part.d_out,))
            part.set_stand_in(*(0.2 * torch.randn(s, generator=generator) for s in shapes))
    graph.clean()
    decoder = not isinstance(name, str) or ARCHITECTURES[name].vocab
    graph.info |= {"task": "causal-lm" if decoder else "encoder", "context_length": 64}
    return graph


def values(graph: Graph, nodes: list[Any], **inputs: torch.Tensor) -> list[torch.Tensor]:
    seen: dict[Any, torch.Tensor] = {}
    Sweep(graph, [inputs]).advance(graph.output_nodes[0], watch={n: lambda _, v, n=n: seen.__setitem__(n, v.clone()) for n in nodes})
    return [seen[n] for n in nodes]


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
        without = (gated_linear(x, gates, weight), torch.nn.functional.linear(x, weight) * gates)
        for a, b in zip(*(torch.autograd.grad(y.square().sum(), (x, gates, weight)) for y in without), strict=True):
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


# ---- keys and values of tokens that skip -----------------------------------------------------------------------------
def test_the_operations_of_sequences() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, gates = torch.randn(2, 5, 1, generator=generator), (torch.rand(2, 5, 1, generator=generator) > 0.5).float()
    for mask in (None, torch.randn(1, 4, 5, 5, generator=generator).requires_grad_(), torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()):
        opcheck(torch.ops.dyncomp.key_mask.default, (gates, mask, mask is None))
    seen = key_mask(gates, None, True)[:, 0] == 0
    for row, query, key in [(r, q, k) for r in range(2) for q in range(5) for k in range(5)]:
        assert bool(seen[row, query, key]) == (key == query or (key < query and gates[row, key, 0] != 0))
    opcheck(torch.ops.dyncomp.sequence_scores.default, (scores.requires_grad_(), 2, None))
    assert_close(sequence_scores(scores, 2)[:, :, 0], torch.cat([torch.ones(2, 2), scores[:, :2, 0].mean(1, keepdim=True).repeat(1, 3)], 1),
                 rel=1e-6)  # fmt: skip
    cache, new, past = torch.zeros(2, 3, 6, 4), torch.randn(2, 3, 2, 4, generator=generator), torch.tensor([1, 4])
    opcheck(torch.ops.dyncomp.append_cache.default, (cache, new, past))
    after = append_cache(cache, new, past)
    assert torch.equal(after[1, :, 4:], new[1])
    assert torch.equal(after[0, :, 1:3], new[0])
    assert int((after != 0).sum()) == new.numel()


def test_cached_attention_of_absent_tokens_is_that_of_the_others_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 9, 8, generator=generator) for _ in range(3))
    kept = torch.tensor([0, 2, 3, 6, 8])
    present = torch.zeros(1, 1, 12, 1)
    present[:, :, kept] = 1
    empty, nothing = torch.zeros(1, 2, 12, 8), torch.tensor([0])
    opcheck(torch.ops.dyncomp.cached_attention.default, (q, k, v, empty, empty.clone(), nothing, 0.3, 0, 0.0, present))
    out, *_ = cached_attention(q, k, v, empty, empty, nothing, 0.3, 0, 0.0, present)
    alone, *_ = cached_attention(q[:, :, kept], k[:, :, kept], v[:, :, kept], empty, empty, nothing, 0.3, 0)
    assert_close(out[:, :, kept], alone, rel=1e-5)
    assert float(out.square().sum()) == pytest.approx(float(alone.square().sum()), rel=1e-5)  # the others get zeros


@pytest.mark.parametrize("kv", ["share", "absent"])
def test_what_later_tokens_see_of_a_token_that_skipped(kv: str) -> None:
    dense, graph = trace_tiny("llama"), gated("llama", "attention", closed=True, kv=kv)
    ids = torch.randint(2, 90, (2, 12), generator=torch.Generator().manual_seed(3))
    skips, attentions = find_skips(graph), find_regions(graph).attentions
    assert len(skips) == (1 if kv == "share" else 2)
    first, last = find_regions(dense).attentions
    if kv == "share":  # the first layer is as it was: what the second takes from it is what it attends to there
        assert "no attention comes before" in str(keys_and_values(dense, [first, last], first, kv))
        gates, key, value = values(graph, [skips[0].gates, attentions[1].key, attentions[1].value], input_ids=ids)
        keys = values(dense, [first.key, last.key, first.value, last.value], input_ids=ids)
        open_ = gates[:, None] != 0
        assert 0 < float(open_.float().mean()) < 1
        assert_close(key, torch.where(open_, keys[1], keys[0]), rel=1e-5)
        assert_close(value, torch.where(open_, keys[3], keys[2]), rel=1e-5)
        other = dataclasses.replace(last, rotary=(None, None))
        assert "other angles" in str(keys_and_values(dense, [first, other], other, kv))
        return
    assert all(a.present is s.gates for a, s in zip(attentions, skips, strict=True))
    gates, out = values(graph, [skips[0].gates, attentions[0].output], input_ids=ids)
    query, key, value = values(dense, [first.query, first.key, first.value], input_ids=ids)
    for row in range(2):
        kept = gates[row, :, 0].nonzero()[:, 0]
        assert 0 < len(kept) < 12
        q, k, v = (t[row, :, kept] for t in (query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)))
        alone = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=first.scale)
        assert_close(out[row][:, kept], alone, rel=1e-5)


CACHED = [
    ("llama", "share", 0), ("llama", "absent", 5), ("llama", "compute", 5), ("phi3", "absent", 0), ("gptj", "share", 0),
    ("mistral", "absent", 0), ("gemma2", "absent", 0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kv", "first"), CACHED)
def test_with_a_cache_they_see_the_same(name: str, kv: str, first: int) -> None:
    """``add-kv-cache`` holds the graph with a cache against the one without, in chunks and with rows of different lengths."""
    graph = gated(name, "block" if name == "llama" else "attention", closed=True, kv=kv, first=first)
    skips = len(find_skips(graph))
    result = AddKVCache().run(graph, Context())
    assert result.changed, result.refused
    assert len(find_skips(graph)) == skips > 0
    names = [s.name for s in graph.inputs]
    assert sum(n.startswith("present_cache_") for n in names) == (skips if kv == "absent" else 0)
    assert sum(n.startswith("score_cache_") for n in names) == (1 if first else 0)


@pytest.mark.parametrize("kv", ["share", "absent"])
def test_the_fitted_model_says_what_its_keys_and_values_need(kv: str) -> None:
    graph = trace_tiny("llama")
    graph.info["task"] = "causal-lm"
    ctx = context("llama", graph, batches=12)
    result = Pipeline([SkipDepth(what="block", active=0.75, blocks="all", rank=4, kv=kv)]).run(graph, ctx)[0].result
    shares = result.facts["skipped"]
    assert sum(shares.values()) == pytest.approx(0.5, abs=0.02)
    dense = 2 * 2 * 8 * 4 * 2.0  # keys and values, heads, features, bytes, layers
    saved = sum(shares.values()) * dense / 2 - 8 if kv == "absent" else 0
    facts = result.facts["kv"]
    assert facts["dense_bytes_per_token"] == dense
    assert facts["bytes_per_token"] == pytest.approx(dense - saved, abs=0.1 * dense)
    size = kv_bytes(graph, {s.name: 0.5 for s in find_skips(graph)})
    assert size is not None
    assert size.held == pytest.approx(dense - (0.5 * dense / 2 * len(shares) - 8 if kv == "absent" else 0))
    if kv == "share":
        assert len(shares) == 1  # the first has nobody to share with
        assert any("no attention comes before" in r.reason for r in result.refused)
        with pytest.raises(RequestError, match="no attention comes before"):
            SkipDepth(blocks="0", kv=kv, active=0.9).run(trace_tiny("llama"), ctx)


# ---- gates that look at more than their token ------------------------------------------------------------------------
def test_a_choice_among_all_tokens_takes_as_many_of_each_sequence() -> None:
    graph = trace_tiny("bert")
    ctx = context("bert", graph, batches=12)
    SkipDepth(what="block", active=0.75, blocks="all", rank=4, gates="expert-choice").run(graph, ctx)
    assert ctx.calibration is not None
    for batch in ctx.calibration.batches[:3]:
        for gates in values(graph, [s.gates for s in find_skips(graph)], **batch):
            assert gates.sum(1).tolist() == [[12.0]] * len(gates)  # of 16
    decoder = trace_tiny("llama")
    decoder.info |= {"task": "causal-lm", "context_length": 64}
    ctx = context("llama", decoder, batches=12)
    with pytest.raises(RequestError, match="not seen yet"):
        SkipDepth(gates="expert-choice").run(decoder, ctx)
    blind = decoder.copy()
    del blind.info["task"]
    SkipDepth(what="attention", active=0.75, blocks="1", keep_first=1, gates="expert-choice", rank=4).run(blind, ctx)
    assert "tokens after it" in AddKVCache().run(blind, Context()).refused[0].reason
    predicted = SkipDepth(what="block", active=0.75, blocks="all", rank=4, gates="expert-choice", predictor=True)
    result = Pipeline([predicted]).run(decoder, ctx)[0].result
    assert all(right > 0.7 for right in result.facts["predicted"].values())
    assert AddKVCache().run(decoder, Context()).changed


def test_a_sequence_is_decided_by_its_first_tokens() -> None:
    graph = trace_tiny("llama")
    graph.info["task"] = "causal-lm"
    ctx = context("llama", graph, batches=12)
    result = SkipDepth(what="block", active=0.75, blocks="all", rank=4, gates="sequence", first=4).run(graph, ctx)
    assert ctx.calibration is not None
    ids = torch.cat([b["input_ids"] for b in ctx.calibration.batches])
    every = values(graph, [s.gates for s in find_skips(graph)], input_ids=ids)
    changed = values(graph, [s.gates for s in find_skips(graph)], input_ids=torch.cat([ids[:, :4], ids[:, 4:].flip(0)], 1))
    for gates, share in zip(every, result.facts["skipped"].values(), strict=True):
        assert bool((gates[:, :4] == 1).all())
        assert bool((gates[:, 4:] == gates[:, 4:5]).all())
        assert float((1 - gates).mean()) == pytest.approx(share, abs=0.05)
    assert torch.equal(every[0], changed[0])  # of the first layer: the first tokens alone decide
    with pytest.raises(RequestError, match="may be skipped"):
        SkipDepth(gates="sequence", first=12, active=0.5).run(trace_tiny("llama"), ctx)


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


def test_thresholds_are_set_on_text_that_nothing_was_fitted_to(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = trace_tiny("llama")
    graph.info["task"] = "causal-lm"
    ctx = context("llama", graph, batches=24)
    monkeypatch.setattr(dyncomp.passes.skip_depth, "enough_tokens", lambda _: 12 * 32)
    SkipDepth(active=0.7, blocks="all", rank=4).run(graph, ctx)
    gates: list[torch.Tensor] = []
    watch = {s.gates: lambda _, value: gates.append(value[:, 1:]) for s in find_skips(graph)}
    for batches, exact in ((ctx.calibration.batches[12:], True), (ctx.calibration.batches[:12], False)):  # type: ignore[union-attr]
        gates.clear()
        Sweep(graph, batches).advance(graph.output_nodes[0], watch=watch)
        computed = [float(torch.cat(gates[layer::2]).mean()) for layer in range(2)]
        assert (computed == pytest.approx([0.7, 0.7], abs=0.02)) == exact


def test_a_fitted_stand_in_is_better_than_none() -> None:
    errors = {}
    for standin in ("linear", "none"):
        graph = trace_tiny("llama")
        ctx = context("llama", graph, batches=40)
        Pipeline([SkipDepth(what="ffn", active=0.5, blocks="all", standin=standin, rank=24, follow_dense=0)]).run(graph, ctx)
        batch = ctx.calibration.batches[0]  # type: ignore[union-attr]
        errors[standin] = float((graph(**batch) - ctx.dense(**batch)).square().mean())  # type: ignore[misc]
    assert errors["linear"] < 0.9 * errors["none"]


@pytest.mark.parametrize("gates", ["threshold", "sequence"])
def test_a_stand_in_is_fitted_to_tokens_beyond_the_threshold(gates: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that come next in the router's order, half as many again; none where a sequence is decided at once."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def record(self: SkipDepth, part: Any, x: Any, inputs: Any, wanted: Any, kept: list[torch.Tensor], near: list[torch.Tensor]) -> None:
        seen.append((torch.cat(kept) == 0, torch.cat(near)))

    monkeypatch.setattr(SkipDepth, "_fit_part", record)
    graph = trace_tiny("llama")
    SkipDepth(what="ffn", active=0.8, blocks="all", rank=4, gates=gates, first=4).run(graph, context("llama", graph, batches=12))
    assert len(seen) == 2
    for closed, near in seen:
        assert closed.any()
        assert bool((near >= closed).all())
        assert not near[:, 0].any()
        share, wider = (float(m[:, 1:].float().mean()) for m in (closed, near))
        assert wider == pytest.approx(1.5 * share if gates == "threshold" else share, abs=0.01)


def test_dropping_leaves_out_whole_layers() -> None:
    graph = trace_tiny("llama")
    ctx = context("llama", graph)
    result = Pipeline([DropDepth(what="block", count=1)]).run(graph, ctx)[0].result
    assert len(result.changed) == 1
    assert len(find_regions(graph).ffns) == 1
    assert len(find_regions(graph).attentions) == 1


def test_a_layer_dropped_with_stand_ins_is_missed_less() -> None:
    errors = {}
    for standin in ("none", "linear"):
        graph = trace_tiny("llama")
        ctx = context("llama", graph, batches=40)
        Pipeline([DropDepth(what="block", count=1, standin=standin, rank=24)]).run(graph, ctx)
        assert len(find_regions(graph).attentions) == 1
        fresh = context("llama", graph, batches=42).calibration.batches[-1]  # type: ignore[union-attr]
        errors[standin] = float((graph(**fresh) - ctx.dense(**fresh)).square().mean())  # type: ignore[misc]
    assert errors["linear"] < 0.9 * errors["none"]
    with pytest.raises(RequestError, match="rank"):
        DropDepth(standin="linear", rank=1)


def test_the_evidence_has_baselines_of_the_same_cost() -> None:
    graph = trace_tiny("llama")
    graph.info["task"] = "causal-lm"
    ctx = context("llama", graph, batches=12)
    Pipeline(load_recipe("depth").resolve(active=0.5)).run(graph, ctx)
    assert ctx.dense is not None
    plain = baselines(ctx.dense, graph, (), ctx)
    assert len(find_regions(plain["layers_dropped"]).attentions) == 1
    ids = torch.cat([b["input_ids"] for b in ctx.calibration.batches])  # type: ignore[union-attr]
    quality = measure_quality({"dense": ctx.dense, "converted": graph} | plain, {"held out": Examples(ids)}, "causal-lm")
    figures = quality["held out"]
    assert set(figures["increase"]) == {"converted", "layers_dropped", "static_pruned"}
    assert figures["skipped"] == pytest.approx(0.5, abs=0.05), "of all visits to layers, also to those without a router"
    assert 0.3 < figures["active_ffn"] < 0.7
    assert "load" not in figures, "there are no experts to choose among"
    cost = cost_figures(ctx.dense, graph, quality)
    assert cost["flops_per_token"] < cost["dense"]["flops_per_token"]
    assert cost["active_parameters"] < cost["dense"]["active_parameters"]


@pytest.mark.skipif(not available(), reason="needs a C++ compiler")
@pytest.mark.parametrize("what", ["block", "attention", "ffn"])
def test_quantized_weights_of_tokens_that_skip_in_tvm(what: str, tmp_path: Path) -> None:
    """Prefill of rows of different lengths and decoding: attentions under gates are the native operator that gathers open tokens."""
    pytest.importorskip("tvm")
    from dyncomp.backends.parity import parity
    from dyncomp.backends.tvm.decoder import decoder_for
    from dyncomp.backends.tvm.lower import lower
    from dyncomp.backends.tvm.run import TvmModel

    graph = gated("llama", what, closed=True)
    Pipeline([Quantize()]).run(graph, Context())
    under_gates = [n for n in graph.nodes if n.target is gated_linear._opoverload and str(n.args[2].target) in graph.quantized]
    assert len(under_gates) == (0 if what == "ffn" else 2 * 2)  # the queries' and the output's projection
    assert AddKVCache(logits="chosen").run(graph, Context()).changed
    kernels = lower(graph, tmp_path).kernels
    assert not any(name.startswith("gated_linear") for name in kernels) or what == "ffn"
    entry = parity(graph, TvmModel(tmp_path, threads=1), decoder_for, backend="tvm", prompt_tokens=12, steps=16, good=1e-3)
    assert entry["precision"] == "int8"
    assert entry["relative_error"] <= 2e-2


def test_impossible_requests_say_why() -> None:
    for options, said in (({"what": "heads"}, "what=heads"), ({"kv": "lend"}, "kv=lend"), ({"kv": "share", "what": "ffn"}, "no keys"),
                          ({"gates": "best"}, "gates=best"), ({"predictor": True}, "no later token"), ({"blocks": "most"}, "blocks=most"),
                          ({"active": 0.0}, "fraction")):  # fmt: skip
        with pytest.raises(RequestError, match=said):
            SkipDepth(**options)  # type: ignore[arg-type]
    graph = trace_tiny("llama")
    with pytest.raises(RequestError, match="may be skipped"):
        SkipDepth(active=0.4, keep_first=1).run(graph, context("llama", graph))
    with pytest.raises(RequestError, match="there are 2"):
        SkipDepth(blocks="7").run(graph, context("llama", graph))


def test_the_budget_goes_to_the_layers_that_lose_least() -> None:
    alike = torch.ones(1000)
    shares = allocate([Curve(0.1, alike), Curve(0.01, alike), Curve(0.02, alike), Curve(5.0, alike)], 1.5)
    assert shares == pytest.approx([0, 1, 0.5, 0])
    assert allocate([Curve(0.0, alike), Curve(1.0, alike)], 1.5) == pytest.approx([1, 0.5])
    assert allocate([Curve(0.0, alike), Curve(1.0, alike)], 1.0, most=0.75) == pytest.approx([0.75, 0.25])
    # A router that tells tokens apart: the loss of the first ones to skip is what counts, and both layers give some.
    growing = torch.arange(1.0, 1001)
    shares = allocate([Curve(0.1, growing), Curve(0.2, growing)], 0.9)
    assert shares == pytest.approx([0.6, 0.3], abs=0.02)
    assert allocate([Curve(0.1, growing), Curve(0.09, alike)], 0.4) == pytest.approx([0.4, 0], abs=0.02)


@given(st.lists(st.tuples(st.floats(1e-4, 1), st.floats(0, 3)), min_size=1, max_size=6), st.floats(0, 1))
def test_no_other_shares_lose_less(units: list[tuple[float, float]], share: float) -> None:
    found = [Curve(loss, torch.arange(1.0, 129) ** power) for loss, power in units]
    total = share * len(found)
    shares = allocate(found, total)
    assert sum(shares) == pytest.approx(total, abs=1e-6)
    assert all(0 <= s <= 1 + 1e-9 for s in shares)

    def price(curve: Curve, at: float) -> float:
        """Of a little more."""
        passed = 0.0
        for width, cost in curve.steps():
            passed += width
            if at < passed - 1e-9:
                return cost
        return float("inf")

    def spared(curve: Curve, at: float) -> float:
        """By a little less."""
        passed, last = 0.0, 0.0
        for width, cost in curve.steps():
            if at <= passed + 1e-9:
                break
            passed, last = passed + width, cost
        return last

    prices = [price(c, s) for c, s in zip(found, shares, strict=True)]
    savings = [spared(c, s) for c, s in zip(found, shares, strict=True)]
    assert max(savings) <= min(prices) * (1 + 1e-6), "moving a token from one layer to another spares nothing"


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
    assert depth.kv is None
    graph.info |= {"kv_bytes": 256.0, "depth": {depth.gates[0]: {"kv": "absent", "kv_bytes": 128}}}
    depth = depth_of(graph, Words(text), text)
    skipped = 1 - float(depth.computed[0].float().mean())
    assert skipped > 0
    assert depth.as_dict()["kv_bytes_per_token"] == {"dense": 256.0, "held": round(256 - 128 * skipped + 4, 1)}
    assert all("of 256 bytes a token" in shown for shown in (str(depth_items(depth)[-1]), depth_html(depth)))
    with pytest.raises(RequestError, match="every token computes"):
        depth_of(trace_tiny("llama"), Words(text), text)
