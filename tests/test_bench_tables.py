"""What the benchmarks make of the times they measure."""

from __future__ import annotations

from typing import Any

import pytest

from bench import exports
from bench.peers import OURS, beside_peers, gains
from dyncomp.report.markdown import FFN, GAINS, peer_columns, results_markdown


def row(engine: str, precision: str, bits: int, decode: float, prefill: float, bundle: str = "") -> dict[str, Any]:
    rates = {"decode_tokens_per_s": decode, "prefill_tokens_per_s": prefill, "prefill_tokens": 512}
    return {"engine": engine, "precision": precision, "bits": bits, "threads": 2, "bundle": bundle} | rates


ROWS = [
    row("ONNX Runtime", "fp32", 32, 10.0, 100.0),
    row("ONNX Runtime", "int8", 8, 20.0, 100.0),
    row("llama.cpp", "Q8_0", 8, 25.0, 50.0),
    row(OURS["ort"], "int8", 8, 30.0, 300.0),
    row(OURS["ort"], "int8, screened head", 8, 33.0, 300.0),
    row(OURS["ort"], "int8, small", 8, 45.0, 400.0, "small"),
    row(OURS["tvm"], "int4", 4, 60.0, 400.0),
]


def test_engines_stand_beside_the_best_peer_in_as_many_bits() -> None:
    found = beside_peers([dict(r) for r in ROWS])
    assert [r["decode_x_peer"] for r in found] == [1, 0.8, 1, 1.2, 1.32, 1.8, None]
    assert [r["prefill_x_peer"] for r in found] == [1, 1, 0.5, 3, 3, 4, None]


def test_the_gain_of_a_bundle_is_split_into_factors() -> None:
    (gain,) = gains(ROWS)
    assert (gain["bundle"], gain["bits"], gain["kernels"], gain["skipping"], gain["of_int8"]) == ("small", 2.5, 1.2, 1.5, 1.8)
    assert gain["all"] == pytest.approx(gain["bits"] * gain["kernels"] * gain["skipping"])
    assert not gains([r for r in ROWS if r["engine"] != "ONNX Runtime"]), "no peer in fp32: nothing to be compared with"


def test_results_are_shown_in_whole_tables() -> None:
    machine = {"vector": [], "architecture": "none", "cpu": "a cpu", "cores": 1}
    ffn = {"shape": "8x32", "backend": "tvm", "precision": "fp32", "threads": 1, "ffn": "dense", "speedup": 1.0, "prefill_speedup": 1.0}
    results = {"machine": machine, "versions": {}, "conversions": [], "peers": beside_peers([dict(r) for r in ROWS]), "gains": gains(ROWS)}
    text = results_markdown(results | {"ffn": [ffn | {"ms_per_step": 0.5, "ms_per_prefill": 2.0}]})
    tables = {lines[0]: lines[2:] for lines in (part.splitlines() for part in text.split("\n\n")) if lines[0].startswith("|")}
    for columns, count in ((FFN, 1), (GAINS, 1), (peer_columns(512), len(ROWS))):
        rows = tables[f"| {' | '.join(name.lstrip('>') for name in columns)} |"]
        assert len(rows) == count
        assert {line.count("|") for line in rows} == {len(columns) + 1}
    assert "| dyncomp, ONNX Runtime | int8, small | 45.0 | 4.50 | 1.80 | 400 | 4.00 | 4.00 |" in text


def test_exports_are_shown_with_what_refused_them() -> None:
    check = {"class": "GraniteMoeShared", "relative_error": 1e-6, "median_error": 1e-7, "greedy_equal": 63, "greedy_tokens": 64}
    routed = check | {"other_experts": 2, "positions": 71}
    keys = list(exports.rows())
    found = {keys[0]: {"check": check}, keys[1]: {"refused": "llama.cpp is not here"}, keys[2]: {"check": routed}}
    *_, first, refused, experts = exports.markdown({"rows": found}).strip().splitlines()
    assert first.endswith("| granite-moe | GraniteMoeShared | 1.0e-06 | 1.0e-07 |  | 63 of 64 |")
    assert "llama.cpp is not here" in refused
    assert experts.endswith("| 2 of 71 | 63 of 64 |")
    assert {line.count("|") for line in (first, refused, experts)} == {8}
