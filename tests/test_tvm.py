"""The TVM backend: kernels against PyTorch, models against their graphs. Skipped as a whole only where TVM is not installed."""

# ruff: noqa: E402  (what needs TVM is imported after asking for it)

from __future__ import annotations

import functools
import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from test_depth import gated
from test_depth_ort import trace_wider
from test_ort import carve, with_cache
from torch import Tensor

from bench.tiny import trace_tiny
from dyncomp.errors import BackendError, ModelError, RequestError
from dyncomp.graph import Graph, op_name
from dyncomp.ops import cached_attention, rotary, routed_ffn
from dyncomp.pipeline import Context
from dyncomp.regions.tokens import random_inputs
from dyncomp.trace import trace

tvm = pytest.importorskip("tvm")

from dyncomp.backends.artifact import CONFIG
from dyncomp.backends.parity import parity
from dyncomp.backends.tvm import machine, require, run
from dyncomp.backends.tvm.decoder import TvmDecoder, decoder_for
from dyncomp.backends.tvm.kernels import attention, functions, gated_linear, linear, norm, sdpa
from dyncomp.backends.tvm.kernels import routed_ffn as routed
from dyncomp.backends.tvm.kernels.tile import Tile, pack, pack_experts, pad_rows
from dyncomp.backends.tvm.layout import PARAMETERS
from dyncomp.backends.tvm.lower import lower
from dyncomp.backends.tvm.run import TvmModel, aligned_copy, aligned_zeros
from dyncomp.backends.tvm.script import stack
from dyncomp.backends.tvm.slots import TvmSlots
from dyncomp.passes import Quantize

HERE = machine.this_machine()
TILE = Tile(HERE.lanes, HERE.vectors, HERE.rows)
EXAMPLES = settings(max_examples=12, deadline=None, derandomize=True)


def compiled(kernel: Any) -> Callable[..., None]:
    """The kernel as a function of tensors that it changes; one build each."""
    built = tvm.compile(tvm.IRModule({"main": kernel.with_attr("global_symbol", "main")}), target=HERE.target())["main"]

    def run(*tensors: Tensor) -> None:
        arrays = [aligned_copy(t.detach().numpy()) for t in tensors]
        built(*[tvm.runtime.from_dlpack(a) for a in arrays])
        for tensor, array in zip(tensors, arrays, strict=True):
            if tensor.numel():
                tensor.copy_(torch.from_numpy(array))

    return run


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- kernels -------------------------------------------------------------------------------------------------------
@functools.cache
def linear_kernel(rows: int, depth: int) -> Callable[..., None]:
    return compiled(linear.linear(rows, depth, TILE))


@EXAMPLES
@given(st.sampled_from([(100, 37), (128, 64)]), st.integers(0, 20), st.integers(0, 9))
def test_linear(sizes: tuple[int, int], tokens: int, seed: int) -> None:
    rows, depth = sizes
    x, w, b, y = numbers(seed, tokens, depth), numbers(1, rows, depth), numbers(2, rows), torch.full((tokens, rows), 7.0)
    linear_kernel(rows, depth)(x, pack(w, TILE), pad_rows(b, TILE), y)
    assert_close(y, F.linear(x, w, b), rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_linear_keeps_what_is_not_finite_to_its_row(bad: float) -> None:
    x, w = numbers(0, 9, 37), numbers(1, 100, 37)
    x[4, 5] = bad
    y = torch.zeros(9, 100)
    linear_kernel(100, 37)(x, pack(w, TILE), torch.zeros(TILE.panels(100) * TILE.width), y)
    assert not torch.isfinite(y[4]).any()
    assert torch.isfinite(y[[0, 1, 2, 3, 5, 6, 7, 8]]).all()


@functools.cache
def ffn_kernel(gated: bool) -> tuple[Callable[..., None], Tensor, Tensor, Tensor]:
    """Odd sizes: 3 experts of 40 neurons, 33 features to 52."""
    w_up, b_up, w_down = numbers(1, 3, 80 if gated else 40, 33) / 4, numbers(2, 3, 80 if gated else 40), numbers(3, 3, 52, 40) / 4
    name = "silu" if gated else "gelu"
    return compiled(routed.routed_ffn(3, 40, 33, 52, name, gated=gated, tile=TILE)), w_up, b_up, w_down


@EXAMPLES
@given(st.booleans(), st.integers(0, 20), st.sampled_from(["none", "some", "all", "one expert", "scaled"]), st.integers(0, 9))
def test_routed_ffn(gated: bool, tokens: int, routing: str, seed: int) -> None:
    run, w_up, b_up, w_down = ffn_kernel(gated)
    x, y = numbers(seed, tokens, 33), torch.full((tokens, 52), 7.0)
    gates = {
        "none": torch.zeros(tokens, 3), "all": torch.ones(tokens, 3), "one expert": torch.tensor([0.0, 1.0, 0.0]).repeat(tokens, 1),
        "some": (numbers(seed + 1, tokens, 3) > 0).float(), "scaled": numbers(seed + 2, tokens, 3),
    }[routing]  # fmt: skip
    run(x, gates, *pack_experts(w_up, b_up, w_down, TILE), y)
    assert_close(y, routed_ffn(x, gates, w_up, b_up, w_down, "silu" if gated else "gelu"), rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_routed_ffn_keeps_what_is_not_finite_to_its_tokens_and_experts(bad: float) -> None:
    run, w_up, b_up, w_down = ffn_kernel(True)
    x, gates, y = numbers(0, 8, 33), torch.tensor([1.0, 0.0, 1.0]).repeat(8, 1), torch.zeros(8, 52)
    x[2, 0] = bad
    w_up = w_up.clone()
    w_up[1] = bad  # an expert that nobody uses
    run(x, gates, *pack_experts(w_up, b_up, w_down, TILE), y)
    assert not torch.isfinite(y[2]).any()
    assert torch.isfinite(y[[0, 1, 3, 4, 5, 6, 7]]).all()


@functools.cache
def gated_kernel() -> Callable[..., None]:
    return compiled(gated_linear.gated_linear(100, 37, TILE))


@EXAMPLES
@given(st.integers(0, 20), st.sampled_from(["none", "some", "all"]), st.integers(0, 9))
def test_gated_linear_reads_nothing_for_tokens_that_skip(tokens: int, routing: str, seed: int) -> None:
    x, w, b, y = numbers(seed, tokens, 37), numbers(1, 100, 37), numbers(2, 100), torch.full((tokens, 100), 7.0)
    gates = numbers(seed + 1, tokens, 1) * (numbers(seed + 2, tokens, 1) > {"none": 9, "some": 0, "all": -9}[routing])
    expected = F.linear(x, w, b) * gates
    x[gates[:, 0] == 0] = float("nan")
    given = torch.full_like(w, float("nan")) if routing == "none" else w
    gated_kernel()(x, gates, pack(given, TILE), pad_rows(b, TILE), y)
    assert_close(y, expected, rel=1e-5)


FORMS = {
    "grouped": attention.Attention(4, 2, 16, 0.25, half=8, packed=True),
    "window": attention.Attention(2, 2, 12, 0.3, window=5, softcap=30.0, half=2, interleaved=True, biased=True),
}


@functools.cache
def attention_kernel(form: str) -> Callable[..., None]:
    return compiled(attention.cached_attention(FORMS[form], TILE))


@EXAMPLES
@given(st.sampled_from(sorted(FORMS)), st.sampled_from([1, 1, 2, 7, 70]), st.lists(st.integers(0, 80), min_size=1, max_size=3))
def test_cached_attention(form: str, tokens: int, pasts: list[int]) -> None:
    a, batch, capacity = FORMS[form], len(pasts), 160
    sizes = (a.heads, a.kv_heads, a.kv_heads)
    parts = [numbers(i, batch, tokens, n * a.head_dim) for i, n in enumerate(sizes)]
    cos, sin = numbers(4, capacity, a.half), numbers(5, capacity, a.half)
    caches = [numbers(6 + i, batch, a.kv_heads, capacity, a.head_dim) for i in range(2)]
    bias = numbers(8, a.heads, capacity)
    past, out = torch.tensor(pasts), torch.zeros(batch, tokens, a.heads * a.head_dim)
    q, k, v = (p.unflatten(-1, (-1, a.head_dim)).transpose(1, 2) for p in parts)
    positions = past[:, None] + torch.arange(tokens)
    turned = [rotary(t, cos, sin, positions, a.interleaved) for t in (q, k)]
    expected = cached_attention(*turned, v, *caches, past, a.scale, a.window, a.softcap, None, bias if a.biased else None)
    given = [torch.cat(parts, -1)] * 3 if a.packed else parts
    attention_kernel(form)(*given, past, cos, sin, bias, *caches, out)
    assert_close(out, expected[0].transpose(1, 2).flatten(2), rel=1e-5)
    assert_close(caches[0], expected[1], rel=1e-6)
    assert torch.equal(caches[1], expected[2])


@functools.cache
def sdpa_kernel(mask: str) -> Callable[..., None]:
    return compiled(sdpa.attention(16, 0.25, mask, TILE))


@EXAMPLES
@given(st.sampled_from(["bool", "float32", "none"]), st.integers(1, 70), st.integers(1, 70), st.integers(0, 9))
def test_attention_without_a_cache(mask: str, tokens: int, length: int, seed: int) -> None:
    q, k, v, out = (
        numbers(seed, 2, 4, tokens, 16),
        numbers(1, 2, 2, length, 16),
        numbers(2, 2, 2, length, 16),
        torch.zeros(2, 4, tokens, 16),
    )
    seen = numbers(seed + 1, 2, 1, tokens, length) > -0.5
    seen[..., 0] = True
    given = {"bool": seen, "float32": torch.where(seen, 0.5, float("-inf")), "none": torch.zeros(1, 1, 1, 1)}[mask]
    expected = F.scaled_dot_product_attention(q, k, v, None if mask == "none" else given, scale=0.25, enable_gqa=True)
    sdpa_kernel(mask)(q, k, v, given, out)
    assert_close(out, expected, rel=1e-5)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("features", [37, 64])
def test_norms(centered: bool, features: int) -> None:
    run = compiled(norm.norm(features, 1e-5, centered=centered, lanes=TILE.lanes))
    scale, shift = numbers(1, features), numbers(2, features) * centered
    for tokens in (0, 1, 40):
        x, y = numbers(tokens, tokens, features) + 1, torch.zeros(tokens, features)
        run(x, scale, shift, y)
        expected = F.layer_norm(x, [features], scale, shift, 1e-5) if centered else F.rms_norm(x, [features], scale, 1e-5)
        assert_close(y, expected, rel=1e-5)


def test_functions() -> None:
    from tvm.script import tirx as T

    from dyncomp.activations import ACTIVATIONS

    x = torch.cat([torch.linspace(-30, 30, 4001), torch.tensor([float("nan"), 0.0, -0.0, 1e30, -1e30])])
    for name, function in functions.FUNCTIONS.items():

        @T.prim_func(s_tir=True, private=True)
        def kernel(x_: T.handle, y_: T.handle):
            given = T.match_buffer(x_, (4006,), "float32")
            result = T.match_buffer(y_, (4006,), "float32")
            for i in range(4006):
                result[i] = function(given[i])  # noqa: B023

        y = torch.zeros_like(x)
        compiled(kernel)(x, y)
        expected = ACTIVATIONS[name](x)
        assert torch.isnan(y[4001]), name
        assert (y - expected)[:4001].abs().max() <= 2e-6 * expected[:4001].abs().max(), name
        assert torch.equal(y[4002:4004].abs(), expected[4002:4004].abs()), name


def test_the_parser_sees_the_frames_that_inspect_sees() -> None:
    from tvm.script import ir as I
    from tvm.script import tirx as T

    ours, theirs = stack(), inspect.stack()
    assert [f.frame for f in ours] == [f.frame for f in theirs]
    assert [f.code_context for f in ours[:3]] == [f.code_context for f in theirs[:3]]

    @I.ir_module(s_tir=True)
    class Module:  # whose functions are parsed with it, not by themselves
        @T.prim_func(s_tir=True)
        def main(x: T.Buffer((4,), "float32")):
            for i in range(4):
                x[i] = T.float32(1)

    assert [v.name_hint for v in Module.functions] == ["main"]


# ---- models --------------------------------------------------------------------------------------------------------
def assert_equal_to_the_graph(graph: Graph, model: TvmModel, *sizes: dict[str, int]) -> None:
    for size in sizes:
        inputs = random_inputs(graph, size)
        with torch.no_grad():
            assert_close(torch.as_tensor(next(iter(model.run(**inputs).values()))), graph(**inputs), rel=1e-5)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Graph, Path]:
    """A tiny decoder, its FFNs routed over experts by a router of random weights."""
    graph = trace_tiny("llama")
    carve(graph, 4, threshold=0.2)
    graph, folder = with_cache(graph), tmp_path_factory.mktemp("tvm") / "llama"
    kernels = lower(graph, folder).kernels
    assert sum(n for name, n in kernels.items() if name.startswith("cached_attention")) == 2
    assert sum(n for name, n in kernels.items() if name.startswith("routed_ffn")) == 2
    weights = sum(value.numel() for value in graph.constants().values() if value.is_floating_point())
    assert (folder / PARAMETERS).stat().st_size >= 4 * weights, "weights are in the parameter file, not in the library"
    return graph, folder


def test_a_routed_decoder(llama: tuple[Graph, Path]) -> None:
    graph, folder = llama
    model = TvmModel(folder, threads=1)
    entry = parity(graph, model, decoder_for, backend="tvm", prompt_tokens=20, steps=16)
    assert entry["relative_error"] <= 1e-5
    assert entry["greedy_tokens_equal"] == 1


def test_a_decoder_extends_and_rewinds(llama: tuple[Graph, Path]) -> None:
    session = decoder_for(TvmModel(llama[1], threads=1))
    assert isinstance(session, TvmDecoder)
    ids = np.array([[5, 9, 2, 7, 3, 8]])
    expected = session.prefill(ids, np.array([6]), 2).copy()
    session.prefill(ids[:, :2], np.array([2]), 8)
    session.extend(np.array([1, 1, 1]))
    session.rewind(3)
    logits = session.extend(ids[0, 2:])
    assert_close(torch.from_numpy(logits[-1:].copy()), torch.from_numpy(expected), rel=1e-5)


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_encoders(name: str, tmp_path: Path) -> None:
    graph = trace_tiny(name)
    lower(graph, tmp_path)
    model = TvmModel(tmp_path, threads=1)
    assert_equal_to_the_graph(graph, model, {"batch": 2, "sequence": 24}, {"batch": 1, "sequence": 1}, {"batch": 3, "sequence": 5})


def test_positions_from_the_end(tmp_path: Path) -> None:
    """Falcon's keys and values are the last two heads of a projection."""
    graph = with_cache(trace_tiny("falcon"))
    lower(graph, tmp_path)
    entry = parity(graph, TvmModel(tmp_path, threads=1), decoder_for, backend="tvm", prompt_tokens=12, steps=6)
    assert entry["relative_error"] <= 1e-5
    assert entry["greedy_tokens_equal"] == 1


def test_tokens_that_skip_layers(tmp_path: Path) -> None:
    graph = with_cache(gated("llama", "block", closed=True))
    kernels = lower(graph, tmp_path).kernels
    for op in ("gated_linear", "routed_ffn"):  # queries and outputs of attentions; FFNs and stand-ins: all compute open gates only
        count = sum(n.target is getattr(torch.ops.dyncomp, op).default for n in graph.nodes)
        assert sum(n for name, n in kernels.items() if name.startswith(op)) == count >= 4, op
    entry = parity(graph, TvmModel(tmp_path, threads=1), decoder_for, backend="tvm", prompt_tokens=12, steps=8)
    assert entry["relative_error"] <= 1e-5
    assert entry["greedy_tokens_equal"] == 1


def test_tokens_that_skip_quantized_layers(tmp_path: Path) -> None:
    """What stands in for a layer is in the layer's operator."""
    graph = with_cache(gated(trace_wider(), "block", closed=True, rank=32))
    Quantize(bits=8).run(graph, Context())
    kernels = lower(graph, tmp_path).kernels
    assert sum(n for name, n in kernels.items() if "quantized_ffn" in name) == 2
    entry = parity(graph, TvmModel(tmp_path, threads=1), decoder_for, backend="tvm", prompt_tokens=12, steps=8, good=1e-2)
    assert entry["relative_error"] <= 2e-2


def test_what_tvm_lacks_is_spelled_otherwise(tmp_path: Path) -> None:
    class Steps(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.where(x > 0, x, -2.0) + torch.diff(x, dim=-1, prepend=x[..., :1])
            return y + x[:, [-2]] + x[:, -1, None] + x.cumsum(-1) + x[:1].repeat(x.shape[0], 1)

    graph = trace(Steps(), {"x": numbers(0, 3, 8)}, {"x": {0: "batch"}})
    assert {"where.ScalarOther", "diff"} <= {op_name(n) for n in graph.nodes}
    lower(graph, tmp_path)
    assert_equal_to_the_graph(graph, TvmModel(tmp_path, threads=1), {"batch": 2}, {"batch": 5})


# ---- artifacts -----------------------------------------------------------------------------------------------------
def test_opens_and_runs_without_pytorch_and_the_compiler(llama: tuple[Graph, Path]) -> None:
    code = (
        "import sys, numpy as np\nfrom dyncomp.backends.tvm.run import TvmModel\nfrom dyncomp.backends.tvm.decoder import decoder_for\n"
        "session = decoder_for(TvmModel(sys.argv[1], threads=1))\n"
        "print(session.prefill(np.array([[5, 9]]), np.array([2]), 2).shape, session.step(np.array([3])).shape)\n"
        "print({'torch', 'tvm', 'transformers', 'onnxruntime'} & sys.modules.keys())"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code, str(llama[1])], capture_output=True, text=True, cwd=root, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["(1, 96) (1, 96)", "set()"]


def test_arrays_that_begin_anywhere_are_taken(llama: tuple[Graph, Path]) -> None:
    graph, folder = llama
    model = TvmModel(folder, threads=1)
    inputs = {n: v.numpy() for n, v in random_inputs(graph, {"batch": 1, "sequence": 3, "capacity": 8, "chosen": 1}).items()}
    expected = next(iter(model.run(**inputs).values()))
    for offset in (4, 8, 20):
        moved = {}
        for name, value in inputs.items():
            memory = aligned_zeros([value.nbytes + offset], np.uint8)
            moved[name] = memory[offset:].view(value.dtype).reshape(value.shape) if offset % value.itemsize == 0 else value
            moved[name][...] = value
        assert np.array_equal(next(iter(model.run(**moved).values())), expected)
    with pytest.raises(RequestError, match="multiple of 64"):
        model.bind(aligned_zeros([20], np.float32)[1:])


@pytest.mark.parametrize("capacity", [3, 17, 64])
def test_every_slot_begins_where_tvm_can_read(capacity: int) -> None:
    cache = {"name": "key_cache_0", "dtype": "float32", "shape": ["batch", 1, "capacity", 4]}
    model = SimpleNamespace(kv_cache={"context_length": 64}, encoder=None, threads=1, inputs=(cache["name"],), config={"inputs": [cache]})
    slots = TvmSlots(model, slots=5, capacity=capacity)
    assert slots.bytes_per_token == 16
    assert all(part[slot:].ctypes.data % 64 == 0 for part in slots._caches for slot in range(5))


def test_large_parameters_are_mapped(llama: tuple[Graph, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    graph, folder = llama
    inputs = random_inputs(graph, {"batch": 1, "sequence": 3, "capacity": 8, "chosen": 1})
    expected, before = TvmModel(folder, threads=1).run(**inputs), (folder / PARAMETERS).read_bytes()
    monkeypatch.setattr(run, "_MAPPED", 0)
    mapped = TvmModel(folder, threads=1)
    assert str(folder / PARAMETERS) in Path("/proc/self/maps").read_text()
    assert all(np.array_equal(value, expected[name]) for name, value in mapped.run(**inputs).items())
    mapped._memory[:] = 0
    assert (folder / PARAMETERS).read_bytes() == before


def test_a_library_for_another_processor_is_refused(llama: tuple[Graph, Path], tmp_path: Path) -> None:
    for name in llama[1].iterdir():
        (tmp_path / name.name).symlink_to(name)
    config = json.loads((llama[1] / CONFIG).read_text())
    for change, named in (({"vector": ["avx9"]}, "avx9"), ({"architecture": "riscv"}, "riscv")):
        (tmp_path / CONFIG).unlink()
        (tmp_path / CONFIG).write_text(json.dumps(config | {"machine": config["machine"] | change}))
        with pytest.raises(BackendError, match=named):
            TvmModel(tmp_path)


def test_what_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no lowered model"):
        TvmModel(tmp_path)
    (tmp_path / CONFIG).write_text("{}")
    with pytest.raises(ModelError, match="damaged"):
        TvmModel(tmp_path)


def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(require, "FFI", "0.0.1")
    with pytest.raises(BackendError, match="apache-tvm-ffi"):
        require.require_runtime()


def test_what_has_no_kernel_is_refused_by_name(tmp_path: Path) -> None:
    graph = trace_tiny("llama")
    carve(graph, 4)
    node = next(n for n in graph.nodes if n.target is torch.ops.dyncomp.routed_ffn.default)
    node.args = (*node.args[:5], "mish")
    with pytest.raises(BackendError, match="mish"):
        lower(graph, tmp_path)
