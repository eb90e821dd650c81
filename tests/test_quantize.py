"""Weights in few bits: the number formats, the pass, and what ONNX Runtime makes of them."""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dyncomp.backends.native import available
from dyncomp.backends.ort.decoder import decoder_for
from dyncomp.backends.ort.lower import lower
from dyncomp.backends.ort.parity import parity
from dyncomp.backends.ort.run import OrtModel
from dyncomp.passes import AddKVCache, CarveExperts, FitRouter, Quantize, RefitDown
from dyncomp.passes.gptq import gptq
from dyncomp.passes.precisions import Trials, Unit, allocate
from helpers import assert_close, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ort import Routed, carve
from torch import Tensor

from bench.tiny import ARCHITECTURES, built, enliven, sample, trace_tiny
from dyncomp.calibrate import Calibration, calibrate
from dyncomp.deploy import check_parity
from dyncomp.errors import RequestError
from dyncomp.graph import Graph
from dyncomp.interpret import float_activations, round_activations
from dyncomp.pipeline import Context, Pass, Pipeline, parse_passes
from dyncomp.quantized import Quantized, join, pack_nibbles, round_to_nearest, unpack_nibbles
from dyncomp.regions import find_linears, find_regions, find_routed
from dyncomp.serialize import load_graph, save_graph
from dyncomp.trace import trace


def context(name: str, graph: Graph) -> Context:
    _, inputs, dims = built(name)
    data = [sample(inputs, dims, {"batch": 2, "sequence": 16}, seed=s) for s in range(6)]
    calibration = Calibration(data, "test")
    calibrate(graph, find_regions(graph).ffns, calibration)
    return Context(calibration, data[0], dense=graph.copy())


# ---- number formats ------------------------------------------------------------------------------------------------
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([4, 8]), st.sampled_from([32, 64, 128]), st.booleans())
def test_rounding_is_to_the_nearest_value(seed: int, bits: int, block: int, symmetric: bool) -> None:
    weight = torch.randn(5, 256, generator=torch.Generator().manual_seed(seed))
    value = round_to_nearest(weight, bits, block, symmetric=symmetric)
    assert value.format == (bits, block, symmetric)
    steps = value.scales.float().abs().repeat_interleave(block, 1)
    slack = 1e-3 * weight.abs().max()  # scales and offsets are rounded to float16
    inside = (value.decode() - weight).abs() <= steps / 2 + slack
    assert bool(inside.all()) if not (symmetric and bits == 4) else float(inside.float().mean()) > 0.9  # +8 steps is cut to +7


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_that_were_4_bit_with_an_offset_come_back_exactly(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (48, 8, 32), generator=generator)
    codes[..., 0], codes[..., 1] = 0, 15
    scale, offset = (
        torch.rand(48, 8, 1, generator=generator).half().float() * 0.0625,
        torch.randn(48, 8, 1, generator=generator).half().float(),
    )
    weight = (codes * scale + offset).flatten(1)
    found = round_to_nearest(weight, bits, 32, symmetric=False)
    assert relative_error(found.decode(), weight) <= (1e-6 if bits == 4 else 1e-3)


def test_constant_and_empty_blocks() -> None:
    weight = torch.zeros(3, 64)
    weight[1], weight[2] = 0.5, -0.25
    for symmetric in (True, False):
        for bits in (4, 8):
            assert_close(round_to_nearest(weight, bits, 32, symmetric=symmetric).decode(), weight, rel=1e-3)


def test_nibbles_and_joined_rows() -> None:
    codes = torch.randint(0, 16, (7, 64), dtype=torch.uint8)
    assert torch.equal(unpack_nibbles(pack_nibbles(codes)), codes)
    a, b = (round_to_nearest(torch.randn(n, 64), 8, 32) for n in (3, 5))
    together = join([a, b])
    assert together is not None
    assert torch.equal(together.decode(), torch.cat([a.decode(), b.decode()]))
    assert join([a, round_to_nearest(torch.randn(3, 64), 4, 32)]) is None


def test_activations_round_by_blocks() -> None:
    x = torch.randn(3, 64)
    x[:, 32:] *= 1e-3
    assert_close(round_activations(x)[:, 32:], x[:, 32:], rel=1 / 250)
    assert torch.equal(round_activations(torch.zeros(2, 32)), torch.zeros(2, 32))


def test_gptq_keeps_outputs_better_than_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 128, generator=generator) @ torch.randn(128, 128, generator=generator)  # correlated inputs
    weight = torch.randn(64, 128, generator=generator)

    def loss(q: Quantized) -> float:
        return float((x @ (q.decode() - weight).T).square().mean())

    for symmetric in (True, False):
        assert loss(gptq(weight, x.T @ x, 4, 32, symmetric=symmetric)) < 0.6 * loss(round_to_nearest(weight, 4, 32, symmetric=symmetric))


# ---- the pass ------------------------------------------------------------------------------------------------------
WITH_LINEARS = [name for name, tiny in ARCHITECTURES.items() if tiny.ffns]


@pytest.mark.parametrize("name", WITH_LINEARS)
def test_int8_is_close_to_the_graph_before(name: str) -> None:
    graph, before = trace_tiny(name), trace_tiny(name)
    _, inputs, dims = built(name)
    fresh = sample(inputs, dims, {"batch": 2, "sequence": 9}, seed=3)
    record = Pipeline([Quantize(activations="float")]).run(graph, Context(probe=fresh))[0]
    assert record.result.changed
    assert record.relative_error is not None
    assert record.relative_error <= 0.1
    assert graph.precision == "int8"
    for weight, q in graph.quantized.items():
        assert torch.equal(graph.tensor(weight), q.decode())
    assert graph.weight_bytes() < before.weight_bytes()
    assert len(find_linears(graph)) == len(find_linears(before))


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "phi3"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_runs_on_whole_models(name: str, symmetric: bool) -> None:
    errors = []
    for method in ("rtn", "gptq"):
        graph = trace_tiny(name)
        ctx = context(name, graph)
        spec = Quantize(bits=4, method=method, symmetric=symmetric, activations="float")
        errors.append(Pipeline([spec]).run(graph, ctx)[0].relative_error)
        assert graph.precision == "int4"
    assert errors[1] is not None
    assert errors[1] < 1.5 * errors[0]  # type: ignore[operator]


def test_experts_are_quantized_and_routers_are_not() -> None:
    graph = trace_tiny("llama")
    ctx = context("llama", graph)
    passes: list[Pass] = [CarveExperts(experts=2, keep_dense=()), FitRouter(active=0.75), RefitDown(), Quantize(bits=4, method="gptq")]
    Pipeline(passes).run(graph, ctx)
    regions = find_regions(graph)
    assert len(regions.routed) == 2
    for routed in regions.routed:
        assert {routed.w_up, routed.w_down} <= set(graph.quantized)
        router = [str(n.target) for node in routed.router for n in node.all_input_nodes if n.op == "get_attr"]
        assert router
        assert not set(router) & set(graph.quantized)


def test_a_saved_graph_keeps_its_codes(tmp_path: Path) -> None:
    graph = trace_tiny("llama")
    Pipeline([Quantize(bits=4, symmetric=False)]).run(graph, Context())
    save_graph(graph, tmp_path / "graph.json", tmp_path / "weights.safetensors")
    again = load_graph(tmp_path / "graph.json", tmp_path / "weights.safetensors")
    assert set(again.quantized) == set(graph.quantized)
    for name, q in graph.quantized.items():
        assert torch.equal(again.quantized[name].codes, q.codes)
        assert again.quantized[name].format == q.format
    _, inputs, dims = built("llama")
    fresh = sample(inputs, dims, {"batch": 2, "sequence": 9}, seed=3)
    assert torch.equal(again(**fresh), graph(**fresh))


def test_a_replaced_weight_is_float_again_and_copies_are_independent() -> None:
    graph = trace_tiny("llama")
    Pipeline([Quantize()]).run(graph, Context())
    copy = graph.copy()
    name = next(iter(graph.quantized))
    copy.add_tensor(name, torch.zeros_like(graph.tensor(name)))
    assert name not in copy.quantized
    assert name in graph.quantized


def test_activations_are_rounded_when_the_graph_runs() -> None:
    graph = trace_tiny("llama")
    Pipeline([Quantize()]).run(graph, Context())
    _, inputs, dims = built("llama")
    fresh = sample(inputs, dims, {"batch": 2, "sequence": 9}, seed=3)
    rounded = graph(**fresh)
    with float_activations(graph):
        exact = graph(**fresh)
    assert graph.info["activations"] == "int8"
    assert 0 < relative_error(rounded, exact) < 0.05


@pytest.mark.parametrize(
    "spec",
    [
        {"bits": 3},
        {"block": 48},
        {"method": "magic"},
        {"activations": "int2"},
        {"head_bits": 2},
        {"screen": -1.0},
        {"screen": 9.0, "head_bits": 4},
        {"screen": 9.0, "activations": "float"},
    ],
)
def test_bad_options(spec: dict[str, object]) -> None:
    with pytest.raises(RequestError, match="quantize"):
        Quantize(**spec)  # type: ignore[arg-type]


def test_a_screened_head_is_exact_where_it_is_likely() -> None:
    _, inputs, dims = built("llama")
    graph = trace_tiny("llama")
    graphs = {}
    for margin in (0.0, 1.5, 1e9):
        graphs[margin] = graph.copy()
        (record,) = Pipeline([Quantize(screen=margin)]).run(graphs[margin], Context())
        assert not record.result.refused
    fresh = sample(inputs, dims, {"batch": 2, "sequence": 9}, seed=3)
    whole, some, every = (graphs[margin](**fresh) for margin in graphs)
    assert relative_error(every, whole) < 1e-2, "one term in place of two"
    wrong = (some - every).abs()
    top = every >= every.amax(-1, keepdim=True) - 1e-3
    assert 0 < wrong.max() < 0.2 * every.abs().max()
    assert wrong[top].max() <= 1e-6
    assert (wrong > 1e-6).float().mean() > 0.3
    with float_activations(graphs[1.5]):
        assert relative_error(graphs[1.5](**fresh), whole) < 0.05
    assert "screened" not in Quantize().run(graphs[1.5], Context()).facts
    assert not graphs[1.5].info.get("screened")


def test_what_has_no_head_of_8_bits_is_not_screened() -> None:
    graph = trace_tiny("gpt2")
    result = Quantize(mixed=(4, 32), mean=5.0, screen=12.0).run(graph, mixed("gpt2", mixed=(4, 8), mean=6.0)[2])
    assert "screened" not in graph.info
    assert any("a head of 8 bits" in r.reason for r in result.refused)
    assert any("none to screen" in r.reason for r in Quantize(screen=12.0).run(trace_tiny("bert"), Context()).refused)


# ---- a precision for each region -----------------------------------------------------------------------------------
def mixed(name: str, **options: object) -> tuple[Graph, dict[str, Any], Context]:
    _, inputs, dims = built(name)
    data = [sample(inputs, dims, {"batch": 2, "sequence": 16}, seed=s) for s in range(3)]
    graph = trace_tiny(name)
    if name != "bert":
        graph.info["task"] = "causal-lm"
    ctx = Context(Calibration(data, "test"), dense=graph.copy())
    return graph, Pipeline([Quantize(**options)]).run(graph, ctx)[0].result.facts, ctx  # type: ignore[arg-type]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=6), st.floats(0, 1))
def test_the_best_of_all_mixes_is_found(regions: list[tuple[int, float, float]], part: float) -> None:
    sizes = {str(i): {4: 4.0 * n, 8: 8.0 * n} for i, (n, _, _) in enumerate(regions)}
    losses = {str(i): {4: low, 8: low * share} for i, (_, low, share) in enumerate(regions)}
    every = [dict(zip(sizes, bits, strict=True)) for bits in itertools.product((4, 8), repeat=len(sizes))]

    def total(values: dict[str, dict[int, float]], mix: dict[str, int]) -> float:
        return sum(values[name][b] for name, b in mix.items())

    room = (4 + 4 * part) * sum(n for n, _, _ in regions)
    step = 1e-3 * room  # sizes are counted in steps
    found = allocate(sizes, losses, size=room)
    assert total(sizes, found) <= room * (1 + 1e-9)
    assert total(losses, found) <= min((total(losses, m) for m in every if total(sizes, m) <= room - step), default=math.inf) + 1e-9
    limit = part * total(losses, dict.fromkeys(sizes, 4))
    allowed = [m for m in every if total(losses, m) <= limit]
    found = allocate(sizes, losses, loss=limit)
    if allowed:
        assert total(losses, found) <= limit + 1e-9
        assert total(sizes, found) <= min(total(sizes, m) for m in allowed) + step


def test_regions_that_bear_it_get_fewer_bits() -> None:
    graph, facts, ctx = mixed("gpt2", mixed=(4, 8, 32), mean=8.0)
    regions = facts["precisions"]
    assert graph.info["precisions"]["regions"] == regions
    assert graph.precision == "mixed"
    kept = sum(r["weights"] for r in regions.values() if r["bits"] == 32)
    weights = sum(r["weights"] for r in regions.values())
    assert sum(q.codes.numel() for q in graph.quantized.values()) + kept == weights
    assert sum(8 * q.bytes for q in graph.quantized.values()) + 32 * kept == pytest.approx(facts["mean_bits"] * weights)
    assert facts["mean_bits"] <= 8
    assert all(0 <= r["loss"]["8"] < r["loss"]["4"] for r in regions.values())
    assert ctx.dense is not None
    plain = ctx.dense.copy()
    Pipeline([Quantize(bits=4, head_bits=4)]).run(plain, ctx)
    (fresh,) = ctx.need_calibration("a test").first(1)
    expected = ctx.dense(**fresh)
    assert relative_error(graph(**fresh), expected) < 0.7 * relative_error(plain(**fresh), expected)


def test_measuring_leaves_the_graph_as_it_was() -> None:
    graph = trace_tiny("gpt2")
    _, inputs, dims = built("gpt2")
    batch = sample(inputs, dims, {"batch": 1, "sequence": 8}, seed=0)
    before = graph(**batch)
    trials = Trials(graph, lambda name, bits: round_to_nearest(graph.tensor(name).detach(), bits, 32), [batch])
    head = Unit("head", ("model.lm_head.weight",), 1)
    losses = trials.each([head], (4, 8), lambda *_: None)
    assert losses["head"][4] == pytest.approx(trials.together([head], {"head": 4}))
    assert losses["head"][8] == pytest.approx(trials.together([head], {"head": 8}), rel=0.5), "not measured: the square of the steps"
    assert torch.equal(graph(**batch), before)
    assert not graph.quantized


def test_a_loss_limit_is_kept_and_measured_on_the_mix() -> None:
    graph, facts, _ = mixed("llama", mixed=(4, 8), max_loss=0.005, method="gptq")
    assert 0 < facts["loss"] <= 0.005
    assert {q.bits for q in graph.quantized.values()} == {4, 8}
    with pytest.raises(RequestError, match="8 bits everywhere lose"):
        mixed("bert", mixed=(4, 8), max_loss=1e-6)  # makes no predictions: its outputs are compared


def test_what_one_kernel_reads_gets_one_precision() -> None:
    graph, _, _ = mixed("llama", mixed=(4, 8), mean=6.0)
    for ffn in find_regions(graph).ffns:
        assert len({graph.quantized[i.weight].format for i in (*ffn.ups, ffn.down)}) == 1
    by_input: dict[object, set[int]] = {}
    for linear in find_linears(graph).values():
        by_input.setdefault(linear.input, set()).add(graph.quantized[linear.weight].bits)
    assert {len(bits) for bits in by_input.values()} == {1}
    again = Pass.registry["quantize"](**{"mixed": (4, 8), "mean": 6.0})
    assert parse_passes(again.spec) == [again]


@pytest.mark.parametrize("spec", ["mixed=4", "mixed=4+16", "mean=5", "mixed=4+8 mean=4.2", "mixed=4+8 max-loss=0", "mixed=4+4"])
def test_bad_mixes(spec: str) -> None:
    with pytest.raises(RequestError, match="quantize"):
        parse_passes(f"quantize{{{spec}}}")


def test_blocks_that_do_not_fit_are_refused_by_name() -> None:
    graph = trace_tiny("llama")
    result = Pipeline([Quantize(block=64)]).run(graph, Context())[0].result
    assert result.changed  # the down-projections, of 64 neurons
    assert any("do not divide its 32 input features" in r.reason for r in result.refused)


# ---- ONNX Runtime --------------------------------------------------------------------------------------------------
def cached(graph: Graph) -> Graph:
    graph = graph.copy()
    graph.info["task"] = "causal-lm"
    result = AddKVCache(context_length=64, logits="chosen").run(graph, Context())
    assert not result.refused, result.refused
    return graph


needs_compiler = pytest.mark.skipif(not available(), reason="no C++ compiler here")


@needs_compiler
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("llama", {"bits": 4, "symmetric": False}),
        ("llama", {"screen": 0.1}),
        ("gpt2", {"bits": 4}),
        ("phi", {"symmetric": False, "screen": 0.1}),
        ("gemma2", {"screen": 0.1}),
    ],
)
def test_decoders_in_native_kernels(name: str, options: dict[str, object], tmp_path: Path) -> None:
    graph = trace_tiny(name)
    Pipeline([Quantize(**options)]).run(graph, Context())  # type: ignore[arg-type]
    graph = cached(graph)
    lowered = lower(graph, tmp_path)
    assert lowered.operators["dyncomp.QuantizedFFN"] == 2
    assert lowered.operators["dyncomp.QuantizedLinear"] == (5 if name == "gpt2" else 9)  # the projections of two attentions, the head
    assert lowered.operators["dyncomp.QuantizedEmbedding"] == 1
    entry = parity(graph, OrtModel(tmp_path, threads=1), good=2e-2)
    assert entry["relative_error"] <= 2e-2
    assert entry["greedy_tokens_equal"] >= 0.98


class Decoder(torch.nn.Module):
    """A tiny decoder with heads of 16 features."""

    def __init__(self, family: str, **options: object) -> None:
        super().__init__()
        import transformers

        sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 1}
        config = getattr(transformers, f"{family}Config")(**sizes, tie_word_embeddings=False, **options)
        self.model = enliven(getattr(transformers, f"{family}ForCausalLM")(config))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


@needs_compiler
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Gemma2", {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 4, "attn_logit_softcapping": 5.0}),
        ("Phi", {"partial_rotary_factor": 0.25}),
    ],
)
def test_attention_in_native_kernels(family: str, options: dict[str, object], tmp_path: Path) -> None:
    ids = torch.zeros(2, 7, dtype=torch.int64)
    graph = trace(Decoder(family, **options), {"input_ids": ids}, {"input_ids": {0: "batch", 1: "sequence"}}, output_name="logits")
    (table,) = {str(n.args[0].target) for n in graph.nodes if n.target is torch.ops.aten.embedding.default}  # type: ignore[union-attr]
    graph.add_quantized(table, round_to_nearest(graph.tensor(table).detach(), 8, 32))  # read exactly: attention alone may differ
    graph = cached(graph)
    operators = lower(graph, tmp_path).operators
    assert operators["dyncomp.CachedAttention"] == 1
    assert "com.microsoft.GroupQueryAttention" not in operators
    assert not {"Cos", "Sin", "Concat", "Softmax"} & operators.keys()
    entry = parity(graph, OrtModel(tmp_path, threads=2))  # a padded batch prefilled, then decoded
    assert entry["relative_error"] <= 1e-5
    assert entry["greedy_tokens_equal"] == 1


@needs_compiler
@pytest.mark.parametrize("bits", [4, 8])
def test_routed_experts_in_native_kernels(bits: int, tmp_path: Path) -> None:
    graph = trace_tiny("llama")
    ctx = context("llama", graph)
    Pipeline([CarveExperts(experts=2, keep_dense=(0,)), FitRouter(active=0.8), Quantize(bits=bits, symmetric=False)]).run(graph, ctx)
    graph = cached(graph)
    assert lower(graph, tmp_path).operators["dyncomp.QuantizedFFN"] == 2
    entry = parity(graph, OrtModel(tmp_path, threads=1), good=2e-2)
    assert entry["relative_error"] <= 2e-2


@needs_compiler
@pytest.mark.parametrize("k", [0, 1])
def test_routers_in_native_kernels(k: int, tmp_path: Path) -> None:
    graph = trace_tiny("llama")
    carve(graph, 2, k=k)
    for routed in find_routed(graph):
        for name in (routed.w_up, routed.w_down):
            graph.add_quantized(name, round_to_nearest(graph.tensor(name).detach(), 8, 32))
    graph.info["activations"] = "int8"  # the graph rounds them as the kernels do
    graph = cached(graph)
    operators = lower(graph, tmp_path).operators
    assert operators["dyncomp.QuantizedFFN"] == 2
    assert not {"TopK", "OneHot", "Greater"} & operators.keys(), "the router is inside"
    assert parity(graph, OrtModel(tmp_path, threads=1), good=2e-2)["relative_error"] <= 2e-2


@needs_compiler
def test_the_artifact_runs_with_onnxruntime_alone(tmp_path: Path) -> None:
    graph = trace_tiny("llama")
    Pipeline([Quantize()]).run(graph, Context())
    lower(cached(graph), tmp_path)
    ids = [5, 17, 40, 3]
    command = [sys.executable, "examples/onnxruntime_only.py", str(tmp_path), *map(str, ids)]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True)
    session = decoder_for(OrtModel(tmp_path, threads=1))
    logits = session.prefill(np.array([ids]), np.array([4]), 16)
    expected = []
    for _ in range(16):
        expected.append(int(logits[0].argmax()))
        logits = session.step(np.array([expected[-1]]))
    assert [int(t) for t in re.findall(r"\d+", done.stdout)][-16:] == expected


@pytest.mark.parametrize("native", [True, False])
def test_mixed_precisions_in_onnx_runtime(native: bool, tmp_path: Path) -> None:
    if native and not available():
        pytest.skip("no C++ compiler here")
    graph, _, _ = mixed("llama", mixed=(4, 8, 32), mean=12.0)
    assert {r["bits"] for r in graph.info["precisions"]["regions"].values()} >= {8, 32}
    save_graph(graph, tmp_path / "graph.json", tmp_path / "weights.safetensors")
    graph = cached(load_graph(tmp_path / "graph.json", tmp_path / "weights.safetensors"))
    lowered = lower(graph, tmp_path, native=native)
    ours = sum(n for op, n in lowered.operators.items() if op.startswith("dyncomp.Quantized") or op == "com.microsoft.MatMulNBits")
    assert ours > 0
    assert lowered.operators.get("MatMul", 0) > 0  # what stays in float
    model = OrtModel(tmp_path, threads=1)
    assert model.precision == "mixed"
    assert parity(graph, model, good=5e-2)["relative_error"] <= 5e-2


@needs_compiler
def test_encoders_in_native_kernels(tmp_path: Path) -> None:
    graph = trace_tiny("bert")
    Pipeline([Quantize()]).run(graph, Context())
    assert lower(graph, tmp_path).operators["dyncomp.QuantizedFFN"] == 2
    entry = parity(graph, OrtModel(tmp_path, threads=1), good=2e-2)
    assert entry["relative_error"] <= 2e-2


@pytest.mark.parametrize("options", [{}, {"bits": 4}, {"bits": 4, "symmetric": False}])
def test_without_a_compiler_onnx_runtimes_kernels_are_used(options: dict[str, object], tmp_path: Path) -> None:
    graph = trace_tiny("llama")
    Pipeline([Quantize(**options)]).run(graph, Context())  # type: ignore[arg-type]
    graph = cached(graph)
    lowered = lower(graph, tmp_path, native=False)
    offsets = options.get("symmetric") is False  # weights with offsets are then computed decoded
    assert lowered.operators.get("com.microsoft.MatMulNBits", 0) == (0 if offsets else 15)
    assert not any(op.startswith("dyncomp.") for op in lowered.operators)
    model = OrtModel(tmp_path, threads=1)
    assert model.config["kernels"] == "onnxruntime"
    own, *decoded = model.config["notes"]
    assert own.startswith("experts, quantized weights and attention run in ONNX Runtime's own operators: ")
    assert [re.search(r"float32: (\d+) ", d).group(1) for d in decoded] == ["16" if offsets else "1"]  # type: ignore[union-attr]
    assert parity(graph, model, good=5e-2)["relative_error"] <= 5e-2


def test_without_a_compiler_a_screened_head_is_computed_whole(tmp_path: Path) -> None:
    graph = trace_tiny("llama")
    Pipeline([Quantize(screen=0.5)]).run(graph, Context())
    graph = cached(graph)
    lower(graph, tmp_path, native=False)
    assert parity(graph, OrtModel(tmp_path, threads=1), good=5e-2)["relative_error"] > 5e-2
    entry = check_parity(graph, tmp_path, threads=1)
    assert entry["relative_error"] <= 5e-2
    assert any("the vocabulary head is computed whole" in note for note in entry["notes"])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("k", [0, 1])
def test_without_a_compiler_quantized_experts_run_in_onnx_runtimes_operator(bits: int, k: int, tmp_path: Path) -> None:
    graph = trace_tiny("llama")
    carve(graph, 2, k=k)
    for routed in find_routed(graph):
        for name in (routed.w_up, routed.w_down):
            graph.add_quantized(name, round_to_nearest(graph.tensor(name).detach(), bits, 32))
    graph.info["activations"] = "int8"
    graph = cached(graph)
    lowered = lower(graph, tmp_path, native=False)
    assert lowered.operators["com.microsoft.QMoE"] == 2
    model = OrtModel(tmp_path, threads=1)
    assert model.placement()["CPUExecutionProvider"]["com.microsoft.QMoE"] == 2
    assert len(model.config["notes"]) == 1
    assert parity(graph, model, good=2e-2)["relative_error"] <= 2e-2


@pytest.mark.parametrize(("activation", "gated", "bias"), [("silu", True, True), ("gelu_tanh", False, True), ("relu", False, False)])
def test_quantized_experts_in_onnx_runtimes_operator(activation: str, gated: bool, bias: bool, tmp_path: Path) -> None:
    """Every kind of gates, tokens without experts; gates that may be negative go another way, on decoded weights."""
    module = Routed(activation, gated, bias, size=32, width=64)
    x = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(1))
    graph = trace(module, {"x": x}, {"x": {0: "batch", 1: "sequence"}})
    for name in ("up", "down"):
        graph.add_quantized(name, round_to_nearest(graph.tensor(name).detach(), 4, 32))
    lowered = lower(graph, tmp_path, native=False)
    assert lowered.operators["com.microsoft.QMoE"] == 4
    model = OrtModel(tmp_path, threads=1)
    with torch.no_grad():
        expected = dict(zip(graph.outputs, graph(x), strict=True))
    for part in (x, x[:1, :1]):
        for name, actual in model.run(x=part).items():
            assert_close(torch.as_tensor(actual), expected[name][: part.shape[0], : part.shape[1]], rel=2e-2)
