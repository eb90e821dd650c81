"""Early exit: tokens that leave at some layer skip all that comes after, and the model goes on with the others."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from dyncomp.backends.ort.lower import lower
from dyncomp.backends.ort.parity import parity
from dyncomp.backends.ort.run import OrtModel
from dyncomp.passes import AddKVCache, SkipDepth
from dyncomp.passes.depth_exit import _nats, segments
from dyncomp.passes.depth_gates import Unit
from dyncomp.passes.skip_depth import find_units
from helpers import assert_close
from test_depth import values

import bench.tiny
from bench.tiny import sample
from dyncomp.calibrate import Calibration
from dyncomp.cost import count
from dyncomp.errors import RequestError
from dyncomp.evaluate import evaluate
from dyncomp.evidence import baselines, quality_figures
from dyncomp.graph import Graph
from dyncomp.pipeline import Context, Pipeline
from dyncomp.regions import find_regions
from dyncomp.regions.depth import find_skips
from dyncomp.trace import trace


def deep() -> tuple[Graph, Context]:
    """Four layers, and something to fit to."""
    module, inputs, dims = bench.tiny._decoder("deep", "Llama", bench.tiny.SILU, num_hidden_layers=4).build()
    graph = trace(module, inputs, dims, info={"name": "deep", "task": "causal-lm", "context_length": 64})
    data = [sample(inputs, dims, {"batch": 2, "sequence": 16}, seed=s) for s in range(12)]
    return graph, Context(Calibration(data, "test"), data[0], dense=graph.copy())


def test_as_many_tokens_leave_at_each_exit() -> None:
    graph, _ = deep()
    units = find_units(graph, "block")[0]
    found = segments(units, [1, 3], range(4), 1.0)
    assert [s.units for s in found] == [2, 1]
    assert found[0].share * 2 + found[1].share == pytest.approx(1.0)
    assert found[1].share == pytest.approx(2 * found[0].share)
    assert found[0].unit == Unit((*units[1].parts, *units[2].parts))
    with pytest.raises(RequestError, match=r"at most 1\.5"):
        segments(units, [2, 3], range(4), 2.0)


@pytest.mark.parametrize("target", ["kl", "entropy"])
def test_who_has_left_does_not_come_back(target: str) -> None:
    graph, ctx = deep()
    (run,) = Pipeline([SkipDepth(gates="exit", active=0.6, blocks="1+2+3", rank=4, target=target)]).run(graph, ctx)
    skips = find_skips(graph)
    assert [len(s.members) for s in skips] == [3, 3, 3]
    assert [len(s.standins) for s in skips] == [2, 2, 2]
    assert len({s.scores for s in skips}) == 3
    ids = torch.cat([b["input_ids"] for b in ctx.calibration.batches])  # type: ignore[union-attr]
    gates = values(graph, [s.gates for s in skips], input_ids=ids)
    for before, after in itertools.pairwise(gates):
        assert bool((after <= before).all())
    assert all(bool((g[:, 0] == 1).all()) for g in gates)
    shares = run.result.facts["skipped"].values()
    assert sum(shares) == pytest.approx(1.6, abs=0.01)
    for g, share in zip(gates, shares, strict=True):
        assert float((1 - g[:, 1:]).mean()) == pytest.approx(share, abs=0.02)
    changed = values(graph, [s.gates for s in skips], input_ids=torch.cat([ids[:, :9], ids[:, 9:].flip(0)], 1))
    assert all(torch.equal(a[:, :9], b[:, :9]) for a, b in zip(gates, changed, strict=True))  # no token looks ahead


def test_they_are_the_tokens_that_gain_least() -> None:
    """By the KL divergence between the prediction at the exit and the final one, which the predictor has learned from the hidden state."""
    graph, ctx = deep()
    batches = ctx.calibration.batches  # type: ignore[union-attr]
    ids = torch.cat([b["input_ids"] for b in batches])
    final = graph(input_ids=ids)
    cut = graph.copy()
    blocks = find_regions(cut).blocks
    blocks[-1].output.replace_all_uses_with(blocks[3].output)  # the end of the second layer
    cut.clean()
    gain = _nats(final, cut(input_ids=ids))[:, 1:]
    SkipDepth(gates="exit", active=0.75, blocks="2", rank=4).run(graph, ctx)
    (gates,) = values(graph, [s.gates for s in find_skips(graph)], input_ids=ids)
    left = gates[:, 1:, 0] == 0
    assert 0.4 < float(left.float().mean()) < 0.6
    assert float(gain[left].log().mean()) < float(gain[~left].log().mean()) - 0.1


@pytest.mark.parametrize("kv", ["compute", "share"])
def test_exits_in_onnx_runtime(kv: str, tmp_path: Path) -> None:
    graph, ctx = deep()
    options = {"blocks": "1+2", "kv": kv, "rank": 4}
    (run,) = Pipeline([SkipDepth(gates="exit", active=0.6, **options)]).run(graph, ctx)  # type: ignore[arg-type]
    assert run.result.facts["kv"]["bytes_per_token"] == run.result.facts["kv"]["dense_bytes_per_token"]  # neither leaves an entry out
    graph.info["task"] = "causal-lm"
    assert AddKVCache(logits="chosen").run(graph, Context()).changed
    assert len(find_skips(graph)) == 2
    lowered = lower(graph, tmp_path)
    assert lowered.operators["If"] == 3 * 3  # in each of three layers: queries; the rest of the layer; the stand-ins
    assert parity(graph, OrtModel(tmp_path, threads=1), prompt_tokens=12, steps=12)["relative_error"] <= 1e-4


def test_open_exits_are_the_dense_model_and_closed_ones_cost_less() -> None:
    graph, ctx = deep()
    assert ctx.dense is not None
    SkipDepth(gates="exit", active=0.75, blocks="2", rank=4, follow_dense=0).run(graph, ctx)
    (skip,) = find_skips(graph)
    ids = ctx.calibration.batches[0]["input_ids"]  # type: ignore[union-attr]
    rows = torch.cat([b["input_ids"] for b in ctx.calibration.batches])  # type: ignore[union-attr]
    quality = evaluate({"dense": ctx.dense, "converted": graph}, rows, task="causal-lm", batch=4)
    figures = quality_figures(quality, graph)
    assert figures["skipped"] == pytest.approx(0.25, abs=0.03), "of all layers, two of which half the tokens skip"
    assert count(graph, active=figures["active_by_region"], sequence=4).flops_per_token < 0.9 * count(graph, sequence=4).flops_per_token
    assert len(find_regions(baselines(ctx.dense, graph, (), ctx)["layers_dropped"]).attentions) == 3  # of four, as half skips two
    graph.add_tensor(str(skip.scores.args[2].target), torch.ones(1) * 1e6)  # type: ignore[union-attr]
    assert_close(graph(input_ids=ids), ctx.dense(input_ids=ids), rel=1e-5)


def test_what_predicts_no_token_has_no_exit() -> None:
    graph, ctx = deep()
    graph.info["task"] = "encoder"
    with pytest.raises(RequestError, match="does not predict the next token"):
        SkipDepth(gates="exit").run(graph, ctx)
    with pytest.raises(RequestError, match="target=loss"):
        SkipDepth(gates="exit", target="loss")
