"""Code for GPUs on a machine without one: what was generated is run on the CPU, and held against what CUDA's compiler says of it."""

# ruff: noqa: E402  (what needs TVM is imported after asking for it)

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import assert_close
from test_export import make_bundle
from test_ort import carve

from bench.tiny import trace_tiny
from dyncomp.deploy import require_device
from dyncomp.errors import BackendError, ProviderError, RequestError
from dyncomp.export import ExportRequest, export
from dyncomp.ops import cached_attention, rotary, routed_ffn
from dyncomp.regions.tokens import random_inputs
from dyncomp.trace import trace

tvm = pytest.importorskip("tvm")

import cuda_on_cpu
from dyncomp.backends.program import exported_program
from dyncomp.backends.tvm.compile import compile_module
from dyncomp.backends.tvm.cuda import attention as cuda_attention
from dyncomp.backends.tvm.cuda import nvcc
from dyncomp.backends.tvm.cuda import routed_ffn as routed
from dyncomp.backends.tvm.cuda.gpu import Gpu, gpu_named
from dyncomp.backends.tvm.cuda.importer import GpuConverters, select
from dyncomp.backends.tvm.cuda.lower import lower_cuda
from dyncomp.backends.tvm.importer import import_graph
from dyncomp.backends.tvm.kernels import attention
from dyncomp.backends.tvm.lower import keep_weights_outside, tensors_of
from dyncomp.backends.tvm.machine import this_machine
from dyncomp.backends.tvm.run import TvmModel, aligned_copy

TARGET = Gpu("sm_80").target()
on_cpu = pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="needs a C++ compiler")
NAN = float("nan")


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@on_cpu
@pytest.mark.parametrize(("gated", "depth", "neurons", "rows"), [(True, 132, 40, 72), (False, 37, 70, 50)])
def test_routed_ffn(gated: bool, depth: int, neurons: int, rows: int, tmp_path: Path) -> None:
    """Ten experts; sizes that are no multiple of a tile, with and without loads of four."""
    experts, name = 10, "silu" if gated else "gelu"
    w_up, b_up = numbers(1, experts, (1 + gated) * neurons, depth) / 8, numbers(2, experts, (1 + gated) * neurons)
    w_down = numbers(3, experts, rows, neurons) / 8
    run = cuda_on_cpu.compiled(routed.routed_ffn(experts, neurons, depth, rows, name, gated=gated), TARGET, tmp_path)

    def check(gates: torch.Tensor, unread: int | None = None) -> None:
        x, y = numbers(4, len(gates), depth), torch.full((len(gates), rows), 7.0)
        weights = [w_up.clone(), b_up.clone(), w_down.clone()]
        if unread is not None:
            for w in weights:
                w[unread] = NAN
        run(x, gates, *weights, y)
        assert_close(y, routed_ffn(x, gates, w_up, b_up, w_down, name), rel=1e-5)

    some = (numbers(5, 75, experts) > 0).float()
    some[:, 3] = 0
    for tokens in (0, 1, 8, 9, 75):
        check(some[:tokens] * numbers(6, tokens, experts), unread=3)
    check(torch.zeros(1, experts))
    check(torch.zeros(9, experts))
    check(torch.nn.functional.one_hot(torch.full((66,), 9), experts).float(), unread=0)
    check(torch.ones(20, experts))


FORMS = {
    "grouped": attention.Attention(4, 2, 16, 0.25, half=8, packed=True),
    "window": attention.Attention(2, 2, 36, 0.3, window=5, softcap=30.0, half=2, interleaved=True, biased=True),
}


@on_cpu
@pytest.mark.parametrize("form", sorted(FORMS))
def test_cached_attention(form: str, tmp_path: Path) -> None:
    a = FORMS[form]
    run = cuda_on_cpu.compiled(cuda_attention.cached_attention(a), TARGET, tmp_path)
    for tokens, pasts in ((1, [0, 13, 6]), (7, [5, 0])):
        batch, capacity = len(pasts), 24
        sizes = (a.heads, a.kv_heads, a.kv_heads)
        parts = [numbers(i, batch, tokens, n * a.head_dim) for i, n in enumerate(sizes)]
        cos, sin = numbers(4, capacity, a.half), numbers(5, capacity, a.half)
        caches = [numbers(6 + i, batch, a.kv_heads, capacity, a.head_dim) for i in range(2)]
        bias = numbers(8, a.heads, capacity)
        past, out = torch.tensor(pasts), torch.zeros(batch, tokens, a.heads * a.head_dim)
        q, k, v = (p.unflatten(-1, (-1, a.head_dim)).transpose(1, 2) for p in parts)
        turned = [rotary(t, cos, sin, past[:, None] + torch.arange(tokens), a.interleaved) for t in (q, k)]
        expected = cached_attention(*turned, v, *caches, past, a.scale, a.window, a.softcap, None, bias if a.biased else None)
        run(*([torch.cat(parts, -1)] * 3 if a.packed else parts), past, cos, sin, bias, *caches, out)
        assert_close(out, expected[0].transpose(1, 2).flatten(2), rel=1e-5)
        assert_close(caches[0], expected[1], rel=1e-6)
        assert torch.equal(caches[1], expected[2])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    graph, folder = trace_tiny("llama"), tmp_path_factory.mktemp("cuda")
    graph.info |= {"task": "causal-lm", "context_length": 64}
    carve(graph, 4, threshold=0.2)
    return folder / "out", export(ExportRequest(make_bundle(folder, graph), folder / "out", backend="tvm", target="cuda-sm_80"))


def test_a_whole_decoder_becomes_kernels(exported: tuple[Path, dict]) -> None:
    folder, record = exported
    source = (folder / "kernels.cu").read_text()
    assert set(record["kernels"]) == set(nvcc.threads_of(source))
    assert source.count("__global__ void __launch_bounds__") == 2 * len(record["kernels"])  # declared and defined: all have threads
    for name in ("routed_ffn_4_16_32", "cached_attention_4_2_8"):
        assert record["calls"][name] == 2
        assert any(kernel.startswith(name) for kernel in record["kernels"])
    assert not any("transpose" in name for name in record["calls"]), "weights are not transposed at run time"
    few = source.split("void __launch_bounds__(256) routed_ffn_4_16_32_kernel(")[-1].split("extern")[0]
    assert "*(float4*)(up_" in few
    assert few.index("gates_ptr[") < few.index("up_ptr +"), "an expert's gate is read before its weights"
    assert few.count("__shfl_xor_sync") == 10  # sums over a warp, of the gate and the up half
    config = json.loads((folder / "config.json").read_text())
    assert config["launched"] == record["kernels"]
    assert ("kernels.cubin" in record["files"]) == (nvcc.find_nvcc() is not None)


@pytest.mark.skipif(nvcc.find_nvcc() is None, reason="needs nvcc: pip install 'dyncomp[cuda]'")
def test_what_kernels_take(exported: tuple[Path, dict], tmp_path: Path) -> None:
    folder, record = exported
    (tmp_path / "kernels.cu").write_text((folder / "kernels.cu").read_text())
    newer = nvcc.compile_cuda(str(nvcc.find_nvcc()), tmp_path / "kernels.cu", "sm_90")
    for kernels in (record["kernels"], {name: r.describe() for name, r in newer.items()}):
        assert all(k["spilled_bytes"] == 0 and k["registers"] * k["threads"] <= 65536 for k in kernels.values())
        few_up, few_down, _, many_up, many_down, _ = (kernels[f"routed_ffn_4_16_32_kernel{n}"] for n in ("", "_1", "_2", "_3", "_4", "_5"))
        assert all(k["wide_loads"] >= 2 for k in (few_up, few_down, many_up, many_down))
        assert many_up["shared_bytes"] > many_down["shared_bytes"] > 8000
    assert (folder / "kernels.ptx").read_text().count(".target sm_80") == 1
    assert (folder / "kernels.cubin").read_bytes()[:4] == b"\x7fELF"


def test_without_nvcc_there_is_source_and_it_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("dyncomp.backends.tvm.cuda.lower.find_nvcc", lambda: None)

    class Norm(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.rms_norm(x, [8], torch.ones(8))

    made = lower_cuda(trace(Norm(), {"x": numbers(0, 3, 8)}, {"x": {0: "batch"}}), tmp_path, gpu_named("cuda-sm_90"))
    assert {f.name for f in made.files} == {"kernels.cu", "parameters.bin", "config.json"}
    assert made.kernels
    assert not made.resources


def test_running_on_a_gpu_is_refused_with_what_was_built(exported: tuple[Path, dict], tmp_path: Path) -> None:
    folder, record = exported
    with pytest.raises(ProviderError, match=f"{len(record['kernels'])} kernels for cuda-sm_80 in kernels.cu") as told:
        require_device("cuda", folder, "tvm")
    assert "kernels.cubin" in str(told.value.hint)
    with pytest.raises(ProviderError, match="nothing in it was made for one"):
        require_device("cuda", tmp_path, "tvm")
    require_device("cpu", tmp_path, "tvm")
    with pytest.raises(BackendError, match=r"kernels for a GPU \(cuda-sm_80\)"):
        TvmModel(folder)
    with pytest.raises(RequestError, match=r"targets: .*aarch64.*cuda-sm_90"):
        gpu_named("cuda-sm_20")


def test_what_dlight_schedules_is_the_graph() -> None:
    """The operators that stay Relax's own, before they are scheduled for a GPU: compiled for the CPU as they are."""
    graph = trace_tiny("bert")
    selected = select(graph)
    program = exported_program(selected)
    keep_weights_outside(program)
    made, _, order = compile_module(import_graph(selected, program, GpuConverters()), this_machine().target())
    weights, inputs = tensors_of(program), random_inputs(graph, {"batch": 2, "sequence": 9})
    tensors = [*inputs.values(), *(weights[n] for n in order[len(inputs) :])]
    found = tvm.relax.VirtualMachine(made, tvm.cpu())["main"](*(tvm.runtime.from_dlpack(aligned_copy(t.detach().numpy())) for t in tensors))
    first = found if len(graph.outputs) == 1 and not hasattr(found, "__len__") else found[0]
    with torch.no_grad():
        assert_close(torch.from_numpy(first.numpy()), graph(**inputs), rel=1e-5)
