"""The table of latencies: which layers a model has, what is timed, and what is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from dyncomp.backends.native import available
from helpers import own_cache
from tiny_checkpoint import write_checkpoint

from dyncomp.deploy import latency_table
from dyncomp.errors import PassError, RequestError
from dyncomp.interpret import sparse_nodes
from dyncomp.latency import COPIES, Layer, layers_of, sample
from dyncomp.models import load_model
from dyncomp.pipeline import parse_passes
from dyncomp.regions import find_regions
from dyncomp.trace import trace_model

FFN = Layer(32, 32, False, 128, True, "silu")
ROUTED = "carve-experts{experts=4 shared=1}, fit-router{active=0.5}, refit-down, awq, quantize{bits=4 method=gptq}"


def test_layers_are_counted_by_their_sizes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    graph = trace_model(load_model(str(tmp_path)))
    regions, found = find_regions(graph), layers_of(graph)
    ffns = {layer: count for layer, count in found.items() if layer.neurons}
    assert sum(ffns.values()) == len(regions.ffns)
    (ffn,) = ffns
    assert (ffn.columns, ffn.neurons, ffn.rows) == (regions.ffns[0].d_model, regions.ffns[0].d_ff, regions.ffns[0].d_out)
    assert (ffn.gated, ffn.activation) == (True, "silu")
    assert found.total() - sum(ffns.values()) == 4 * len(regions.attentions)  # query, key, value, output; the head is not among them


@pytest.mark.parametrize(
    ("layer", "kind"), [(FFN, "ffn"), (Layer(32, 32, True, 128, False, "gelu"), "ffn"), (Layer(32, 48, True), "linear")]
)
def test_what_is_timed_is_what_the_passes_make(layer: Layer, kind: str) -> None:
    x = torch.randn(1, 7, 32)
    graph = sample(layer, [])
    (ours,) = layers_of(graph).items()
    assert ours == (layer, COPIES)
    sketched = [s for p in parse_passes(ROUTED) if (s := p.sketch(kind)) is not None]
    changed = sample(layer, sketched)
    assert changed.precision == "int4"
    assert changed(x=x).shape == (1, 7, layer.rows)
    if kind == "ffn":
        assert len(find_regions(changed).routed) == COPIES
        active = [changed.info["routing"][r.name]["active"] for r in find_regions(changed).routed]
        assert active == pytest.approx([0.5] * COPIES, abs=0.1)
    (sparse,) = (p.sketch(kind) for p in parse_passes("sparsify{active=0.6}"))
    assert len(list(sparse_nodes(sample(layer, [sparse])))) == COPIES * (1 if kind == "linear" else 3 if layer.gated else 2)


def test_rows_are_measured_once_and_kept(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("DYNCOMP_CACHE", own_cache(tmp_path / "cache"))
    table = latency_table(threads=1)
    monkeypatch.setattr("dyncomp.hardware.cache_bytes", lambda: 1 << 20)
    one, prompt = table.seconds(FFN, [])
    assert 0 < one < prompt
    assert list(json.loads(table.file.read_bytes())["rows"]) == [f"{FFN}; dense"]
    assert table.per_token({FFN: 3}, [], decoding=True) == pytest.approx(3 * one)
    monkeypatch.setattr(type(table), "_measure", lambda *arguments: pytest.fail("measured again"))
    again = latency_table(threads=1)
    assert again.seconds(FFN, []) == (one, prompt)
    assert latency_table(threads=2).file != table.file
    table.file.write_text('{"damaged')
    assert latency_table(threads=1).rows == {}


@pytest.mark.skipif(not available(), reason="no C++ compiler here")
def test_each_backend_has_a_table_of_its_own(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("tvm")
    monkeypatch.setenv("DYNCOMP_CACHE", own_cache(tmp_path / "cache"))
    monkeypatch.setattr("dyncomp.hardware.cache_bytes", lambda: 1 << 20)
    table = latency_table(1, "tvm")
    assert table.file != latency_table(1).file
    one, prompt = table.seconds(FFN, parse_passes("quantize{bits=8}"))
    assert 0 < one < prompt


def test_what_cannot_be_looked_up_says_so(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("DYNCOMP_CACHE", own_cache(tmp_path / "cache"))
    with pytest.raises(PassError, match="skip-depth cannot be looked up"):
        latency_table(threads=1).seconds(FFN, parse_passes("skip-depth"))
    with pytest.raises(RequestError, match="experts"):
        latency_table(threads=1).seconds(FFN, parse_passes("carve-experts{experts=7}"))
