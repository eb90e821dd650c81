"""Quantized models on the TVM backend: the native operators as packed functions, models against their graphs and ONNX Runtime."""

# ruff: noqa: E402  (what needs TVM is imported after asking for it)

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dyncomp.backends.native import available, pack_input_scales, pack_inputs, pack_lower, unavailable_reason
from dyncomp.passes import Quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from test_native import Array, Experts, Native, Quantized, Router, Tensors, emulate, error, isas, linear, random_gates
from test_ort import carve, with_cache

from bench.tiny import trace_tiny
from dyncomp.errors import BackendError, ModelError, RequestError
from dyncomp.graph import Graph
from dyncomp.pipeline import Context, Pipeline
from dyncomp.quantized import round_to_nearest
from dyncomp.regions import find_linears, find_routed

tvm = pytest.importorskip("tvm")
pytestmark = pytest.mark.skipif(not available(), reason=unavailable_reason() or "")

from dyncomp.backends.artifact import CONFIG
from dyncomp.backends.parity import parity
from dyncomp.backends.tvm import machine
from dyncomp.backends.tvm.decoder import decoder_for
from dyncomp.backends.tvm.kernels.tile import Tile
from dyncomp.backends.tvm.layout import NATIVE, PARAMETERS
from dyncomp.backends.tvm.lower import lower
from dyncomp.backends.tvm.native import instruction_set, library
from dyncomp.backends.tvm.run import TvmModel, aligned_copy, aligned_zeros, load_runtime, use_threads
from dyncomp.backends.tvm.select import select
from dyncomp.backends.tvm.shapes import Tiles


# ---- packed functions ----------------------------------------------------------------------------------------------
class Packed(Native):
    """The operators as TVM calls them, with one kind of kernels; runs what the tests of the operators run."""

    def __init__(self, isa: str, folder: Path) -> None:
        self.path, self.ffi = folder / f"{isa}.so", load_runtime()
        shutil.copy(library(), self.path)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DYNCOMP_NATIVE_ISA", isa)
            self.handle = ctypes.CDLL(str(self.path))
        assert instruction_set(self.path) == isa
        self.module = self.ffi.load_module(str(self.path))

    def run(self, op: str, inputs: Tensors, constants: Tensors, threads: int = 1, **attributes: int) -> Array:
        name = {"QuantizedLinear": "linear", "QuantizedFFN": "ffn", "QuantizedEmbedding": "embedding"}[op]
        first = next(v for v in inputs.values() if v is not None)
        lead = first.shape if name == "embedding" else first.shape[:-1]
        y = aligned_zeros([*lead, attributes["columns" if name == "embedding" else "rows"]], np.float32)
        count = {"linear": 7, "ffn": 13, "embedding": 5}[name]
        given = [*inputs.values(), *constants.values()]
        self.call(f"quantized_{name}", attributes, [*given, *[None] * (count - len(given))], y, threads)
        return y

    def call(self, name: str, attributes: dict[str, Any], inputs: Sequence[Array | None], y: Array, threads: int = 1) -> None:
        use_threads(self.ffi.get_global_func("runtime.config_threadpool"), threads)
        text = "".join(f" {k}={v if isinstance(v, float) else int(v)}" for k, v in attributes.items())
        tensors = [None if a is None else self.ffi.from_dlpack(aligned_copy(a)) for a in inputs]
        self.module[f"dyncomp_{name}"](text, *tensors, self.ffi.from_dlpack(y))


@pytest.fixture(scope="module", params=isas())
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return Packed(request.param, tmp_path_factory.mktemp("packed"))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_linear_of_any_shape(packed: Packed, data: st.DataObject) -> None:
    bits, block = data.draw(st.sampled_from([4, 8])), data.draw(st.sampled_from([32, 64, 128]))
    rows, columns, tokens = data.draw(st.integers(1, 300)), block * data.draw(st.integers(1, 5)), data.draw(st.integers(0, 100))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    w = Quantized(rng, (rows, columns), bits, block, data.draw(st.booleans()))
    x, bias = rng.standard_normal((tokens, columns), np.float32), rng.standard_normal(rows, np.float32)
    y = linear(packed, x, w, bias, threads=data.draw(st.sampled_from([1, 2])))
    assert y.shape == (tokens, rows)
    if tokens:
        assert error(y, emulate(x, w) + bias).max() < 1e-5
        two = linear(packed, x, w, None, terms=2)
        assert error(two, x.astype(np.float64) @ w.values.T).max() < 1e-4


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("experts", [1, 5])
def test_ffn(packed: Packed, bits: int, experts: int) -> None:
    rng = np.random.default_rng(bits + experts)
    for tokens, gated in [(1, True), (3, False), (40, True)]:
        ffn = Experts(rng, experts=experts, gated=gated, bits=bits, asymmetric=bits == 4, biased=True)
        x = rng.standard_normal((tokens, 128), np.float32)
        ffn.check(packed, x, None if experts == 1 else random_gates(rng, tokens, experts))


@pytest.mark.parametrize(("tokens", "experts"), [(1, 16), (7, 9), (100, 64)])
def test_a_router_inside(packed: Packed, tokens: int, experts: int) -> None:
    rng = np.random.default_rng(experts)
    ffn, router = Experts(rng, experts=experts, d=64, neurons=32, rows=16), Router(rng, tokens, experts, 64)
    for k in (0, 1, experts // 4):
        router.check(packed, ffn, k, threads=2)


def test_threads_change_nothing(packed: Packed) -> None:
    rng = np.random.default_rng(0)
    w = Quantized(rng, (1000, 256), 4, 32, True)
    for tokens in (1, 5, 200):
        x = rng.standard_normal((tokens, 256), np.float32)
        assert np.array_equal(linear(packed, x, w, threads=2), linear(packed, x, w))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    packed, rng = Packed(isas()[-1], tmp_path), np.random.default_rng(0)
    w, x = Quantized(rng, (20, 64), 8, 32, False), rng.standard_normal((3, 64), np.float32)
    codes, scales, _ = w.packed().values()
    good, attributes = [x, codes, scales, None, None, None, None], {"rows": 20, "columns": 64, "bits": 8, "block": 32, "terms": 1}
    y = aligned_zeros([3, 20], np.float32)
    packed.call("quantized_linear", attributes, good[:3], y)  # what is absent at the end may be left out
    assert error(y, emulate(x, w)).max() < 1e-5
    for change, inputs, output, message in [
        ({}, [x[:, :32], *good[1:]], y, "the last dimension of x is 32; it should be 64"),
        ({}, [x.astype(np.float64), *good[1:]], y, "the argument x has another type"),
        ({}, [x, None, *good[2:]], y, "the input codes is missing"),
        ({}, good, aligned_zeros([60], np.float32), "the output has 60 elements in 1 dimensions; it should have 60 in 2"),
        ({}, [*good, *[None] * 9], y, "called with a text, its inputs and its output"),
        ({"terms": 2}, [*good[:-1], np.ones((3, 1), np.float32)], y, "gates belong to one term"),
        ({}, [*good[:-1], np.ones((2, 1), np.float32)], y, "the input gates has 2 elements; it should have 3"),
        ({"bits": 5}, good, y, "bits is 5; it should be 4 or 8"),
        ({"terms": None}, good, y, "the attribute terms is missing"),
    ]:
        named = {k: v for k, v in (attributes | change).items() if v is not None}
        with pytest.raises(ValueError, match=message):
            packed.call("quantized_linear", named, inputs, output)
    assert error(y, emulate(x, w)).max() < 1e-5  # the refusals have left it, and the next call is none
    with pytest.raises(ValueError, match="the id 50 is not in"):
        packed.run("QuantizedEmbedding", {"ids": np.array([3, 50])}, w.packed(), rows=20, columns=64, bits=8, block=32)


@pytest.mark.parametrize("bits", [4, 8])
def test_tokens_whose_gate_is_closed_cost_nothing(packed: Packed, bits: int) -> None:
    rng = np.random.default_rng(bits)
    w = Quantized(rng, (300, 128), bits, 32, bits == 4)
    bias, attributes = rng.standard_normal(300, np.float32), {"rows": 300, "columns": 128, "bits": bits, "block": 32, "terms": 1}
    for tokens, share, threads in [(1, 0, 1), (1, 1, 2), (7, 0.5, 1), (100, 0.3, 2), (100, 1, 2), (100, 0, 1)]:
        x, y = rng.standard_normal((tokens, 128), np.float32), aligned_zeros([tokens, 300], np.float32)
        gates = np.where(rng.random((tokens, 1)) < share, rng.standard_normal((tokens, 1)), 0).astype(np.float32)
        expected = (emulate(x, w) + bias) * gates
        x[gates[:, 0] == 0], y[:] = np.nan, 7.0
        codes, scales, offsets = w.packed().values()
        if not gates.any():
            scales = np.full_like(scales, np.nan)
        packed.call("quantized_linear", attributes, [x, codes, scales, offsets, bias, None, gates], y, threads)
        assert error(y, expected).max(initial=0) < 1e-5


@pytest.mark.parametrize("threads", [1, 2])
def test_lower_halves(packed: Packed, threads: int) -> None:
    rng = np.random.default_rng(0)
    w = Quantized(rng, (2000, 128), 8, 32, True)
    x, lower = rng.standard_normal((2, 128), np.float32), pack_lower(w.codes, w.scales)
    attributes = {"rows": 2000, "columns": 128, "bits": 4, "block": 32}
    every = packed.run(
        "QuantizedLinear", {"x": x}, {**w.halves(), "bias": None, "lower": lower}, threads, **attributes, terms=1, margin=1e9
    )
    assert error(every, emulate(x, w)).max() < 2e-3
    ids = np.array([1999, 0])
    y = packed.run("QuantizedEmbedding", {"ids": ids}, {**w.halves(), "lower": lower}, threads, **attributes)
    assert error(y, w.values[ids]).max() < 5e-4


def test_embedding_and_sparse_linear(packed: Packed) -> None:
    rng = np.random.default_rng(0)
    w = Quantized(rng, (50, 128), 4, 64, True)
    for ids in (np.arange(50), np.array([[49, 0, 3], [7, 7, 48]]), np.zeros((2, 0), np.int64)):
        y = packed.run("QuantizedEmbedding", {"ids": ids}, w.packed(), rows=50, columns=128, bits=4, block=64)
        assert np.array_equal(y, w.values[ids].astype(np.float32))
    x, y = rng.standard_normal((1, 128), np.float32), aligned_zeros([1, 50], np.float32)
    assert w.offsets is not None
    inputs = [x, np.full(128, 0.5, np.float32), pack_inputs(w.codes, 4), pack_input_scales(w.scales), pack_input_scales(w.offsets), None]
    packed.call("sparse_linear", {"rows": 50, "columns": 128, "bits": 4, "block": 64, "activation": -1}, inputs, y)
    assert error(y, emulate(np.where(np.abs(x) > 0.5, x, 0), w)).max() < 1e-5


# ---- models --------------------------------------------------------------------------------------------------------
def quantized(name: str, **options: Any) -> Graph:
    graph = trace_tiny(name)
    Pipeline([Quantize(**options)]).run(graph, Context())
    return graph


def greedy(session: Any, prompt: list[int], steps: int) -> list[int]:
    logits, found = session.prefill(np.array([prompt]), np.array([len(prompt)]), steps), []
    for _ in range(steps):
        found.append(int(logits[0].argmax()))
        logits = session.step(np.array([found[-1]]))
    return found


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Graph, Path]:
    graph, folder = with_cache(quantized("llama")), tmp_path_factory.mktemp("tvm") / "llama"
    kernels = lower(graph, folder).kernels
    assert kernels["dyncomp_quantized_linear"] == 5  # query, key and value side by side and the output of two attentions; the head
    assert kernels["dyncomp_quantized_ffn"] == 2
    assert kernels["dyncomp_quantized_embedding"] == 1
    assert not any(name.startswith(("linear", "routed_ffn")) for name in kernels)
    packed = sum(value.bytes for value in graph.quantized.values())
    assert packed <= (folder / PARAMETERS).stat().st_size < 2 * packed, "packed weights are in the parameter file, decoded ones nowhere"
    return graph, folder


def test_a_decoder_and_the_same_tokens_as_onnx_runtime(llama: tuple[Graph, Path], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from dyncomp.backends.ort.decoder import decoder_for as ort_decoder_for
    from dyncomp.backends.ort.lower import lower as ort_lower
    from dyncomp.backends.ort.run import OrtModel

    graph, folder = llama
    model = TvmModel(folder, threads=2)
    entry = parity(graph, model, decoder_for, backend="tvm", prompt_tokens=20, steps=16, attempts=6, good=1e-4)
    assert entry["precision"] == "int8"
    assert entry["relative_error"] <= 2e-3  # a head in one term instead of two is off by 7e-3
    assert entry["greedy_tokens_equal"] == 1
    ort_lower(graph, tmp_path, native=True)
    for prompt in ([5, 17, 40, 3], [1], list(range(30))):
        assert greedy(decoder_for(model), prompt, 24) == greedy(ort_decoder_for(OrtModel(tmp_path, threads=1)), prompt, 24)


@pytest.mark.parametrize(("bits", "symmetric", "k"), [(4, False, 0), (8, True, 2)])
def test_routed_decoders(bits: int, symmetric: bool, k: int, tmp_path: Path) -> None:
    graph = trace_tiny("llama")
    carve(graph, 2, k=min(k, 1), threshold=0.1)
    for routed in find_routed(graph):
        for name in (routed.w_up, routed.w_down):
            graph.add_quantized(name, round_to_nearest(graph.tensor(name).detach(), bits, 32, symmetric=symmetric))
    graph.info["activations"] = "int8"  # the graph rounds them as the kernels do
    graph = with_cache(graph)
    kernels = lower(graph, tmp_path).kernels
    assert kernels["dyncomp_quantized_ffn"] == 2
    assert not {"topk_gates", "rank"} & kernels.keys(), "the router is inside"
    assert sum(n for name, n in kernels.items() if name.startswith("linear")) == 5  # what is not quantized is TVM's
    entry = parity(graph, TvmModel(tmp_path, threads=1), decoder_for, backend="tvm", good=1e-3)
    assert entry["relative_error"] <= 2e-2


@pytest.mark.parametrize(("name", "options"), [("bert", {"bits": 4, "symmetric": False}), ("phi", {"symmetric": False, "screen": 0.1})])
def test_other_architectures(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    graph = quantized(name, **options)
    graph = with_cache(graph) if name == "phi" else graph
    assert lower(graph, tmp_path).kernels["dyncomp_quantized_ffn"] == 2
    entry = parity(graph, TvmModel(tmp_path, threads=1), decoder_for, backend="tvm", good=1e-3)
    assert entry["relative_error"] <= 2e-2


def test_attention_is_native_where_the_library_is(tmp_path: Path) -> None:
    """Windows, a bias by distance, tokens that skip: what ``test_native`` holds against PyTorch, through TVM."""
    from test_depth import gated
    from test_quantized_cache import wide

    skipping = gated(wide("llama"), "attention", closed=True)
    for name, graph in {"llama": wide("llama"), "gemma3": wide("gemma3"), "bloom": wide("bloom"), "skipping": skipping}.items():
        Quantize().run(graph, Context())
        graph = with_cache(graph)
        kernels = lower(graph, tmp_path / name).kernels
        assert kernels["dyncomp_cached_attention"] == 2, name
        assert not any(kernel.startswith("cached_attention") for kernel in kernels), name
        entry = parity(graph, TvmModel(tmp_path / name, threads=2), decoder_for, backend="tvm", good=2e-2)
        assert entry["relative_error"] <= 2e-2, name
        assert entry["greedy_tokens_equal"] == 1, name


def test_regions_in_precisions_of_their_own() -> None:
    graph = trace_tiny("llama")
    for i, layer in enumerate(find_linears(graph).values()):  # as quantize{mixed=4+8+32} leaves a graph
        bits = 4 if "layers.0" in layer.weight else 8
        if "layers.0.mlp" not in layer.weight and i:
            graph.add_quantized(layer.weight, round_to_nearest(graph.tensor(layer.weight).detach(), bits, 32))
    graph.info["activations"] = "int8"
    selected = select(with_cache(graph), Tiles(Tile.of(machine.this_machine())))
    called = [str(n.target) for n in selected.nodes if n.op == "call_function"]
    assert sum("quantized_ffn" in name for name in called) == 1  # the other one stays in float
    assert sum("quantized_linear" in name for name in called) > 1
    assert sum("tvm_linear" in name for name in called) > 1


# ---- artifacts -----------------------------------------------------------------------------------------------------
def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def test_the_artifact_carries_its_operators(llama: tuple[Graph, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((llama[1] / CONFIG).read_text())
    assert config["native"] == {"library": NATIVE, "instruction_set": isas()[-1]}
    tokens = greedy(decoder_for(TvmModel(llama[1], threads=1)), [5, 9, 2], 8)
    for isa in isas():  # each folder has a library of its own, which chooses when it is loaded
        monkeypatch.setenv("DYNCOMP_NATIVE_ISA", isa)
        folder = copied(llama[1], tmp_path / isa)
        assert greedy(decoder_for(TvmModel(folder, threads=1)), [5, 9, 2], 8) == tokens
        assert instruction_set(folder / NATIVE) == isa
    monkeypatch.setenv("DYNCOMP_NATIVE_ISA", "avx9")
    with pytest.raises(BackendError, match="DYNCOMP_NATIVE_ISA asks for 'avx9'"):
        TvmModel(copied(llama[1], tmp_path / "other"))


def test_missing_or_damaged_operators_are_named(llama: tuple[Graph, Path], tmp_path: Path) -> None:
    folder = copied(llama[1], tmp_path / "copy")
    (folder / NATIVE).unlink()
    with pytest.raises(ModelError, match=rf"native operators .* are missing: .*{NATIVE}"):
        TvmModel(folder)
    header = bytearray((llama[1] / NATIVE).read_bytes()[:4096])
    header[18:20] = (0xF3).to_bytes(2, "little")  # an ELF file for RISC-V
    for content in (b"no library", bytes(header)):
        (folder / NATIVE).write_bytes(content)
        with pytest.raises(BackendError, match="native operators cannot be loaded"):
            TvmModel(folder)


def test_opens_and_runs_without_pytorch_and_the_compilers(llama: tuple[Graph, Path]) -> None:
    code = (
        "import sys, numpy as np\nfrom dyncomp.backends.tvm.run import TvmModel\nfrom dyncomp.backends.tvm.decoder import decoder_for\n"
        "session = decoder_for(TvmModel(sys.argv[1], threads=2))\n"
        "print(session.prefill(np.array([[5, 9]]), np.array([2]), 2).shape, session.step(np.array([3])).shape)\n"
        "print({'torch', 'tvm', 'transformers', 'onnxruntime'} & sys.modules.keys())"
    )
    environment = os.environ | {"CXX": "no-such-compiler"}
    command = [sys.executable, "-c", code, str(llama[1])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["(1, 96) (1, 96)", "set()"]


def test_the_artifact_runs_with_the_runtime_alone(llama: tuple[Graph, Path]) -> None:
    ids = [5, 17, 40, 3]
    command = [sys.executable, "examples/tvm_only.py", str(llama[1]), *map(str, ids)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    assert [int(t) for t in done.stdout.split()] == greedy(decoder_for(TvmModel(llama[1], threads=1)), ids, 16)


def test_what_cannot_be_lowered_is_refused_by_name(llama: tuple[Graph, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = llama[0]
    with pytest.raises(BackendError, match="a library for riscv64 needs a cross compiler"):
        lower(graph, tmp_path, machine=machine.Machine("riscv64"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BackendError, match=r"in native kernels, and the C\+\+ compiler that CXX names") as told:
        lower(graph, tmp_path)
    assert "g++" in str(told.value.hint)
    from dyncomp.convert import ConvertRequest

    with pytest.raises(RequestError, match="no-such-compiler"):
        ConvertRequest("model", tmp_path / "out", recipe="dense", quantize="int8", backend="tvm").validate()
    monkeypatch.undo()
    graph = quantized("llama")
    linear = [n for n in graph.nodes if n.target is torch.ops.aten.linear.default][-1]
    with graph.inserting(before=linear) as b:
        y = b.call(torch.ops.aten.matmul.default, linear.args[0], b.call(torch.ops.aten.t.default, linear.args[1]))
    linear.replace_all_uses_with(y)
    with pytest.raises(BackendError, match=r"aten\.t\.default has no kernel for quantized weights"):
        lower(graph, tmp_path)
