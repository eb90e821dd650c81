"""Calibration statistics and the layer-by-layer sweep."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close

from bench.tiny import ARCHITECTURES, built, sample, trace_tiny
from dyncomp.calibrate import MARKED, Calibration, calibrate, fingerprint
from dyncomp.regions import find_regions
from dyncomp.sweep import Sweep, fast_matmul

NAMES = [n for n in ("llama", "bert", "gpt2", "falcon") if n in ARCHITECTURES]


def batches(name: str, count: int = 3) -> list[dict[str, torch.Tensor]]:
    _, inputs, dims = built(name)
    return [sample(inputs, dims, {"batch": 2, "sequence": 5 + s}, seed=s) for s in range(count)]


@pytest.mark.parametrize("name", NAMES)
def test_a_sweep_gives_what_running_the_graph_gives(name: str) -> None:
    graph = trace_tiny(name)
    data = batches(name)
    sweep = Sweep(graph, data)
    for region in find_regions(graph).ffns:
        assert [tuple(v.shape[:2]) for v in sweep.advance(region.input)] == [(2, 5), (2, 6), (2, 7)]
    for out, batch in zip(sweep.advance(graph.output_nodes[0]), data, strict=True):
        assert torch.equal(out, graph(**batch))


def test_a_sweep_keeps_only_what_is_needed() -> None:
    graph = trace_tiny("llama")
    sweep = Sweep(graph, batches("llama"))
    for region in find_regions(graph).ffns:
        sweep.advance(region.input)
        assert len(sweep._values[0]) == 2, "between two layers only the residual stream and the FFN's input live"


@pytest.mark.parametrize("name", NAMES)
def test_a_fast_sweep_gives_float32_but_for_what_products_give_to_products(name: str) -> None:
    graph, data, dtypes = trace_tiny(name), batches(name)[:1], {}
    watch = {n: (lambda _, v, n=n: dtypes.setdefault(n, v.dtype)) for n in graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)}
    with fast_matmul():
        (out,) = Sweep(graph, data).advance(graph.output_nodes[0], watch=watch)
        hidden = [f.down.input for f in find_regions(graph).ffns]
        sweep = Sweep(graph, data)
        kept = sweep._between(sweep._segment(graph.output_nodes[0]), graph.output_nodes[0])
    assert_close(out, graph(**data[0]), rel=5e-2)
    assert {d for d in dtypes.values() if d.is_floating_point} == {torch.float32}
    if torch.ops.mkldnn._is_mkldnn_bf16_supported() and name in ("llama", "bert"):  # others spell their activation out
        assert kept.issuperset(hidden)
        assert not kept & {n for b in find_regions(graph).blocks for n in (b.output,)}


@pytest.mark.parametrize("name", NAMES)
def test_statistics_are_those_of_the_hidden_activations(name: str) -> None:
    graph = trace_tiny(name)
    data = batches(name)
    calibration = Calibration(data, "x")
    ffns = find_regions(graph).ffns
    calibrate(graph, ffns, calibration)
    for ffn in ffns:
        hidden = torch.cat([h.flatten(0, -2) for h in Sweep(graph, data).advance(ffn.down.input)])
        statistics = calibration.statistics[ffn.name]
        # products and attention may run in bfloat16 (a rounding is up to 4e-3), one after the other
        assert_close(statistics.mean, hidden.mean(0), rel=2e-2)
        assert_close(statistics.square, hidden.square().mean(0), rel=2e-2)
        assert_close(statistics.rate.sum(), torch.tensor(float(round(MARKED * ffn.d_ff))), rel=1e-5)


def test_statistics_are_saved_reused_and_continued(tmp_path, monkeypatch) -> None:
    graph, file = trace_tiny("llama"), tmp_path / "calibration.safetensors"
    data = batches("llama")
    first = Calibration(data, fingerprint("model", data))
    calibrate(graph, find_regions(graph).ffns, first, cache=file)
    again = Calibration(data, fingerprint("model", data))
    monkeypatch.setattr(Sweep, "advance", None)  # nothing may be computed
    calibrate(graph, find_regions(graph).ffns, again, cache=file)
    for name, statistics in first.statistics.items():
        assert torch.equal(statistics.features, again.statistics[name].features)
    monkeypatch.undo()
    partial = Calibration(data, fingerprint("model", data))
    partial.statistics = dict(list(first.statistics.items())[:1])
    partial.save(file)
    continued = Calibration(data, fingerprint("model", data))
    calibrate(graph, find_regions(graph).ffns, continued, cache=file)
    for name, statistics in first.statistics.items():
        assert torch.equal(statistics.features, continued.statistics[name].features)


def test_statistics_of_another_model_or_text_are_not_reused(tmp_path) -> None:
    graph, file = trace_tiny("llama"), tmp_path / "calibration.safetensors"
    data = batches("llama")
    calibrate(graph, find_regions(graph).ffns, Calibration(data, fingerprint("model", data)), cache=file)
    assert not Calibration(data, fingerprint("another", data)).load(file)
    assert not Calibration(data[:2], fingerprint("model", data[:2])).load(file)
    file.write_bytes(file.read_bytes()[:100])
    assert not Calibration(data, fingerprint("model", data)).load(file), "a damaged cache counts as absent"
