"""ONNX graphs for GPUs: what they are made of is checked here, and their numbers on the CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from dyncomp.backends.ort.cuda import OPERATORS
from dyncomp.backends.ort.decoder import DeviceArray, OrtDecoder
from dyncomp.backends.ort.lower import lower
from dyncomp.backends.ort.parity import parity
from dyncomp.backends.ort.providers import DEVICES
from dyncomp.backends.ort.run import OrtModel
from dyncomp.backends.ort.slots import OrtSlots
from dyncomp.passes import Quantize
from test_ort import carve, with_cache
from torch import nn

from bench.tiny import trace_tiny
from dyncomp.deploy import artifact_for, backend_of, require_device
from dyncomp.errors import BackendError, ProviderError, RequestError
from dyncomp.export import ExportRequest, export
from dyncomp.pipeline import Context
from dyncomp.trace import trace


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes_of(attribute.g)


MODELS = [(name, 0) for name in ("llama", "llama routed", "gpt2", "gemma2", "bert", "vit")]
MODELS += [(name, 4) for name in ("mistral routed", "gpt2", "bert")] + [("llama", 8)]


@pytest.mark.parametrize(("name", "bits"), MODELS)
def test_only_operators_that_the_cuda_provider_has(name: str, bits: int, tmp_path: Path) -> None:
    architecture, _, routed = name.partition(" ")
    graph = trace_tiny(architecture)
    if routed:
        carve(graph, 4, threshold=0.2)
    if bits:
        Quantize(bits=bits).run(graph, Context())
    decoder = architecture not in ("bert", "vit")
    if decoder:
        graph = with_cache(graph)
    lower(graph, tmp_path, device="cuda")
    onnx.checker.check_model(str(tmp_path / "model.onnx"))
    model = onnx.load(str(tmp_path / "model.onnx"), load_external_data=False)
    found = {f"{n.domain}.{n.op_type}" if n.domain else n.op_type for n in nodes_of(model.graph)}
    assert found <= OPERATORS
    assert {o.domain for o in model.opset_import} <= {"", "com.microsoft"}
    assert ("com.microsoft.MoE" in found) == bool(routed)
    assert ("com.microsoft.MatMulNBits" in found) == bool(bits)
    assert not (tmp_path / "dyncomp_ort.so").exists()
    if decoder:
        caches = [i for i in model.graph.input if "_cache_" in i.name]
        assert "com.microsoft.GroupQueryAttention" in found
        assert {i.type.tensor_type.elem_type for i in caches} == {onnx.TensorProto.FLOAT16}
    entry = parity(graph, OrtModel(tmp_path, threads=1), steps=12)
    assert entry["relative_error"] <= (0.05 if bits else 2e-3)


def test_what_the_cuda_provider_lacks_is_refused_by_name(tmp_path: Path) -> None:
    class Strange(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sinh(x)

    graph = trace(Strange(), {"x": torch.randn(4, 4)}, {"x": {0: "batch"}})
    lower(graph, tmp_path / "cpu")
    with pytest.raises(BackendError, match="CUDA provider has no kernel for Sinh") as told:
        lower(graph, tmp_path / "cuda", device="cuda")
    assert "--device cpu" in str(told.value.hint)
    assert not (tmp_path / "cuda").exists()


def test_a_cache_that_stays_on_its_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way over a GPU's memory, taken on the CPU: caches are values of the runtime, tokens are bound again for each step."""
    from onnxruntime import OrtValue

    lower(with_cache(trace_tiny("llama")), tmp_path, device="cuda")
    model, place = OrtModel(tmp_path, threads=1), OrtValue.ortvalue_from_numpy
    ids, lengths = np.random.default_rng(0).integers(2, 90, (2, 7)), np.array([7, 4])

    def decode() -> tuple[list[Any], OrtDecoder]:
        decoder = OrtDecoder(model)
        steps = [decoder.prefill(ids, lengths, 5), *(decoder.step(np.array([3 + i, 9])).copy() for i in range(4))]
        return steps, decoder

    expected, _ = decode()
    copies: list[str] = []

    def placed(array: Any, device: str = "cpu", number: int = 0) -> Any:
        copies.append(device)
        return place(array.copy() if device == "elsewhere" else array)

    monkeypatch.setattr(model, "device", "elsewhere")
    monkeypatch.setattr(OrtValue, "ortvalue_from_numpy", staticmethod(placed))
    found, decoder = decode()
    assert copies.count("elsewhere") == len(decoder._caches) == 4
    assert all(isinstance(c, DeviceArray) for c in decoder._caches)
    assert all(len(call._copied) == 3 for call in decoder._calls.values())
    for theirs, ours in zip(expected, found, strict=True):
        np.testing.assert_array_equal(theirs, ours)
    with pytest.raises(BackendError, match="runs on elsewhere"):
        OrtSlots(model, slots=2, capacity=8)


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_device_that_is_not_there_is_asked_for(device: str, tmp_path: Path) -> None:
    with pytest.raises(ProviderError, match=r"has no (CUDA|Tensorrt)ExecutionProvider") as told:
        require_device(device, tmp_path, "ort")
    assert "pip install onnxruntime-gpu" in str(told.value.hint)
    with pytest.raises(ProviderError, match="on the CPU"):
        require_device(device, tmp_path, "torch")
    require_device("cpu", tmp_path, "ort")


def test_a_device_that_is_there_is_given_to_the_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    asked: list[Any] = []
    session = onnxruntime.InferenceSession

    def record(path: str, options: Any, providers: list[str]) -> Any:
        asked.append(providers)
        return session(path, options, providers=["CPUExecutionProvider"])

    every = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: every)
    monkeypatch.setattr(onnxruntime, "InferenceSession", record)
    backend_of("ort", "cuda").lower(with_cache(trace_tiny("llama")), tmp_path)
    for device in ("cuda", "tensorrt", "cpu"):
        require_device(device, tmp_path, "ort")
        model = backend_of("ort", device).open(tmp_path, threads=1)
        assert model.device == ("cpu" if device == "cpu" else "cuda")
    assert asked == [every[1:], every, every[2:]]
    assert set(DEVICES) == {"cpu", "cuda", "tensorrt"}


class _Opened:
    """What :func:`artifact_for` asks of a bundle."""

    def __init__(self) -> None:
        entry = type("Entry", (), {"sha256": "0" * 64})()
        self.manifest = type("Manifest", (), {"files": {"graph.json": entry, "weights.safetensors": entry}})()
        self.made = 0

    def graph(self) -> Any:
        self.made += 1
        graph = trace_tiny("llama")
        graph.info |= {"task": "causal-lm", "context_length": 64}
        return graph


def test_what_runs_on_a_gpu_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNCOMP_CACHE", str(tmp_path))
    opened: Any = _Opened()
    first, again = (artifact_for(opened, "ort", "cuda") for _ in range(2))
    assert first == again
    assert opened.made == 1
    assert json.loads((first / "config.json").read_text())["device"] == "cuda"


def test_only_onnx_graphs_are_exported_for_a_device(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="writes nothing for --device cuda"):
        export(ExportRequest(tmp_path, tmp_path / "out", backend="hf", device="cuda"))
    with pytest.raises(RequestError, match="--target cuda-sm_80"):
        export(ExportRequest(tmp_path, tmp_path / "out", backend="tvm", device="cuda"))
