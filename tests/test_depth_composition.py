"""Tokens that skip, experts, sparse inputs and quantized weights in one model: each pass leaves what the ones before it made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dyncomp.backends.native import available
from dyncomp.backends.ort.lower import lower
from dyncomp.backends.ort.parity import parity
from dyncomp.backends.ort.run import OrtModel
from dyncomp.passes import AddKVCache, SkipDepth, Sparsify
from dyncomp.passes.skip_depth import find_units
from helpers import assert_close
from test_depth import context, values

from bench.tiny import built, sample, trace_tiny
from dyncomp.cost import count
from dyncomp.errors import RequestError
from dyncomp.graph import Graph
from dyncomp.interpret import sparse_nodes
from dyncomp.pipeline import Context, Pipeline, parse_passes
from dyncomp.regions import find_regions
from dyncomp.regions.depth import find_skips

EXPERTS = "carve-experts{experts=2 cluster=random}, fit-router{active=75%}"
SKIP = "skip-depth{active=75% blocks=all rank=32 follow-dense=0}"  # without a refit: with open gates nothing has changed
ATTENTION = "skip-depth{what=attention active=75% blocks=all rank=32 follow-dense=0}"
SPARSE = "sparsify{active=60%}"
INT8 = "quantize{bits=8}"
ORDERS = {
    "experts skip": (EXPERTS, SKIP),
    "experts sparse": (EXPERTS, SPARSE),
    "skip sparse": (SKIP, SPARSE),
    "skip attentions sparse": (ATTENTION, SPARSE),
    "sparse skip": (SPARSE, SKIP),
    "experts skip sparse": (EXPERTS, SKIP, SPARSE),
    "experts sparse skip": (EXPERTS, SPARSE, SKIP),
    "sparse skip without keys": (SPARSE, SKIP.replace("active", "kv=absent active")),
}


def composed(name: str, order: tuple[str, ...]) -> tuple[Graph, Context]:
    graph = trace_tiny(name)
    graph.info |= {"task": "causal-lm", "context_length": 64}
    ctx = context(name, graph, batches=12)
    Pipeline(parse_passes(", ".join(order))).run(graph, ctx)
    return graph, ctx


def opened(graph: Graph) -> Graph:
    """Every gate open, every input large enough."""
    graph = graph.copy()
    for node in [n for n in graph.nodes if n.target is torch.ops.dyncomp.threshold_gates.default]:
        with graph.inserting(before=node) as b:
            ones = b.call(torch.ops.aten.ones_like.default, node.args[0])
        node.replace_all_uses_with(ones)
    for node in sparse_nodes(graph):
        graph.add_tensor(str(node.args[3].target), torch.full_like(graph.tensor(node.args[3]), -1.0), trainable=False)  # type: ignore[union-attr, arg-type]
    graph.clean()
    return graph


@pytest.mark.parametrize("order", ORDERS)
def test_passes_compose(order: str, tmp_path: Path) -> None:
    """Each graph is checked by the pipeline after every pass. With all gates open and all inputs counting it is the dense model; lowered,
    it computes the same in prefill and with a cache."""
    graph, ctx = composed("llama", ORDERS[order])
    assert bool(find_skips(graph)) == ("skip" in order)
    assert bool(sparse_nodes(graph)) == ("sparse" in order)
    _, inputs, dims = built("llama")
    fresh = sample(inputs, dims, {"batch": 3, "sequence": 11}, seed=5)
    assert ctx.dense is not None
    assert_close(opened(graph)(**fresh), ctx.dense(**fresh), rel=1e-5)
    assert float((graph(**fresh) - ctx.dense(**fresh)).square().mean()) > 0
    assert AddKVCache(logits="chosen").run(graph, Context()).changed
    lowered = lower(graph, tmp_path)
    assert (lowered.operators.get("If", 0) > 0) == ("skip" in order)
    assert parity(graph, OrtModel(tmp_path, threads=1), prompt_tokens=12, steps=8)["relative_error"] <= 1e-4


@pytest.mark.skipif(not available(), reason="needs a C++ compiler")
@pytest.mark.parametrize("order", ORDERS)
def test_and_are_quantized(order: str, tmp_path: Path) -> None:
    graph, _ = composed("llama", (*ORDERS[order], INT8))
    assert not {s.scores.args[1].target for s in find_skips(graph)} & set(graph.quantized)  # type: ignore[union-attr]
    assert AddKVCache(logits="chosen").run(graph, Context()).changed
    lower(graph, tmp_path)
    found = parity(graph, OrtModel(tmp_path, threads=1), prompt_tokens=12, steps=8, good=2e-2)
    assert found["relative_error"] <= 0.1


def test_what_two_branches_compute_from_the_same_rows_is_in_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries, keys and values that are not joined compare the same rows with the same thresholds, which the export writes once."""
    monkeypatch.setattr("dyncomp.backends.ort.gated._fuse_projections", lambda graph: None)
    graph, _ = composed("llama", ORDERS["sparse skip without keys"])
    assert AddKVCache(logits="chosen").run(graph, Context()).changed
    lower(graph, tmp_path)
    assert parity(graph, OrtModel(tmp_path, threads=1), prompt_tokens=12, steps=8)["relative_error"] <= 1e-4


def test_what_is_left_out_twice_is_counted_so() -> None:
    """Weights of an input that counts as zero, or of a token that skips, are not read; gates have been put on sparse layers, not in their
    place."""
    sparse, ctx = composed("llama", (SPARSE,))
    graph = sparse.copy()
    Pipeline(parse_passes(SKIP)).run(graph, ctx)
    weights = {str(n.args[1].target) for n in sparse_nodes(sparse)}  # type: ignore[union-attr]
    assert {str(n.args[1].target) for n in sparse_nodes(graph)} == weights  # type: ignore[union-attr]
    (first, *_) = find_skips(graph)
    assert len(first.members) == 2 + 3  # queries and output; the FFN
    inputs = dict.fromkeys(weights, 0.5)
    whole, none = (count(graph, active={**inputs, first.name: share}) for share in (1.0, 0.0))
    half = count(graph, active={**inputs, first.name: 0.5})
    ffn = next(name for name, region in whole.by_region.items() if region.kind == "ffn")
    assert none.by_region[ffn].flops_per_token == 0
    assert half.by_region[ffn].flops_per_token == 0.5 * whole.by_region[ffn].flops_per_token
    assert half.by_region[ffn].active_parameters == 0.5 * whole.by_region[ffn].active_parameters == 0.25 * whole.by_region[ffn].parameters


SHARED = "carve-experts{experts=4 shared=1 cluster=random}, fit-router{active=75%}"


@pytest.mark.parametrize("blocks", ["all", "auto"])
def test_shared_experts_stand_in_for_an_ffn(blocks: str, tmp_path: Path) -> None:
    graph, ctx = composed("llama", (SHARED, f"skip-depth{{what=ffn standin=experts active=60% blocks={blocks}}}"))
    ids = torch.cat([b["input_ids"] for b in ctx.calibration.batches])  # type: ignore[union-attr]
    skips, routed = find_skips(graph), {r.node: r.gates for r in find_regions(graph).routed}
    assert len(skips) == 2 or blocks == "auto"  # the least share that is worth a router
    assert not any(s.standins for s in skips)
    watched = values(graph, [n for s in skips for member in s.members for n in (s.gates, routed[member])], input_ids=ids)
    assert len(watched) == 2 * len(skips) > 0
    for kept, gates in zip(watched[::2], watched[1::2], strict=True):
        closed = kept[..., 0] == 0
        assert 0.01 < float(closed.float().mean()) < 0.99
        assert torch.equal(gates[closed], torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(int(closed.sum()), 4))
        assert float(gates[~closed].sum(-1).mean()) > 2
    _, inputs, dims = built("llama")
    fresh = sample(inputs, dims, {"batch": 3, "sequence": 11}, seed=5)
    assert ctx.dense is not None
    assert_close(opened(graph)(**fresh), ctx.dense(**fresh), rel=1e-5)
    assert AddKVCache(logits="chosen").run(graph, Context()).changed
    lower(graph, tmp_path)
    assert parity(graph, OrtModel(tmp_path, threads=1), prompt_tokens=12, steps=8)["relative_error"] <= 1e-4


def test_what_cannot_compose_is_refused_by_name() -> None:
    graph, ctx = composed("llama", (SKIP,))
    result = Sparsify(active=0.6).run(graph, ctx)
    assert {r.remedy for r in result.refused} == {"sparsify before skip-depth"}
    assert all("q_proj" in r.where or "o_proj" in r.where or "output" in r.where for r in result.refused)
    with pytest.raises(RequestError, match="no block that tokens can skip") as raised:
        SkipDepth(active=0.75, blocks="all", rank=4).run(graph, ctx)
    assert "tokens skip it already" in str(raised.value.hint)
    partly, ctx = composed("llama", ())
    Pipeline(parse_passes("sparsify{active=60% where=ffn}")).run(partly, ctx)
    down = next(n for n in sparse_nodes(partly) if "down_proj" in str(n.args[1].target))  # type: ignore[union-attr]
    with partly.inserting(before=down) as b:
        plain = b.call(torch.ops.aten.linear.default, *down.args[:2])
    down.replace_all_uses_with(plain)
    partly.clean()
    refused = find_units(partly, "ffn")[1]
    assert any("only some of its linear layers" in r.reason for r in refused)
    with pytest.raises(RequestError, match="no ffn that tokens can skip") as raised:
        SkipDepth(what="ffn", standin="experts").run(composed("llama", (EXPERTS,))[0], ctx)
    assert "no shared experts" in str(raised.value.hint)
    with pytest.raises(RequestError, match="experts are an FFN's"):
        SkipDepth(standin="experts")
