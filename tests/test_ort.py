"""The ONNX Runtime backend, held to the PyTorch graph."""

from __future__ import annotations

import functools
import gc
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from dyncomp.backends.native import available
from dyncomp.backends.ort.decoder import OrtDecoder, decoder_for
from dyncomp.backends.ort.exporter import made_once
from dyncomp.backends.ort.lower import Lowered, lower
from dyncomp.backends.ort.parity import parity
from dyncomp.backends.ort.run import OrtModel
from dyncomp.passes import AddKVCache, CarveExperts
from dyncomp.passes.layerwise import ExpertView, Layer, routing_facts, set_threshold
from dyncomp.passes.routers import FAMILIES, RouterOptions, install
from helpers import assert_close, relative_error
from test_attention import eager
from torch import Tensor, nn
from torch.onnx._internal.exporter._core import TorchTensor

from bench.tiny import FFN, enliven, tokens, trace_tiny
from dyncomp import cost
from dyncomp.calibrate import Calibration
from dyncomp.errors import BackendError, ModelError, ProviderError, RequestError
from dyncomp.graph import Graph
from dyncomp.models import LoadedModel, load_model
from dyncomp.ops import routed_ffn, threshold_gates, topk_gates
from dyncomp.pipeline import Context, Pipeline
from dyncomp.regions import find_regions, find_routed, replace_ffn
from dyncomp.regions.tokens import random_inputs
from dyncomp.runtime.generate import Generator
from dyncomp.runtime.sampling import Sampling
from dyncomp.sweep import Sweep
from dyncomp.trace import trace, trace_model

aten = torch.ops.aten


def with_cache(graph: Graph, context: int = 64, logits: str = "chosen") -> Graph:
    graph = graph.copy()
    graph.info["task"] = "causal-lm"
    result = AddKVCache(context_length=context, logits=logits).run(graph, Context())
    assert not result.refused, result.refused
    return graph


def carve(graph: Graph, experts: int, *, k: int = 0, threshold: float = 0.0, keep: int = 0) -> int:
    """Route every FFN from the ``keep``-th on: contiguous blocks of neurons as experts, a random router; returns how many."""
    generator = torch.Generator().manual_seed(0)
    ffns = find_regions(graph).ffns[keep:]
    for ffn in ffns:
        w, size = ffn.weights(graph), ffn.d_ff // experts
        tensors = {
            "w_up": w.w_up.unflatten(0, (-1, experts, size)).transpose(0, 1).flatten(1, 2),
            "w_down": w.w_down.unflatten(1, (experts, size)).transpose(0, 1),
            "router": torch.randn(experts, ffn.d_model, generator=generator) / ffn.d_model**0.5,
            "bias": torch.full((experts,), -threshold),
        }
        if w.b_up is not None:
            tensors["b_up"] = w.b_up.unflatten(0, (-1, experts, size)).transpose(0, 1).flatten(1)
        if w.b_down is not None:
            tensors["b_down"] = w.b_down
        read = {}
        for name, value in tensors.items():
            graph.add_tensor(f"{ffn.name}.{name}", value.contiguous().clone())
            read[name] = graph.read(f"{ffn.name}.{name}")

        def build(b, x, read=read, activation=ffn.activation):
            scores = b.call(aten.linear.default, x, read["router"], read["bias"])
            gates = b.call(topk_gates._opoverload, scores, k) if k else b.call(threshold_gates._opoverload, scores)
            y = b.call(routed_ffn._opoverload, x, gates, read["w_up"], read.get("b_up"), read["w_down"], activation)
            return b.call(aten.add.Tensor, y, read["b_down"]) if "b_down" in read else y

        replace_ffn(graph, ffn, build)
    graph.clean()
    return len(ffns)


@pytest.mark.parametrize("routers", [("mlp", "neuron"), ("spectral", "representative")])
def test_routers_are_ordinary_nodes(routers, tmp_path: Path) -> None:
    """Each FFN with a router of another family, lowered with a KV cache, against the graph."""
    graph = trace_tiny("llama")
    ctx = Context(Calibration([{"input_ids": tokens(2, 16)} for _ in range(4)], "test"))
    Pipeline([CarveExperts(experts=8, shared=2, cluster="random", keep_dense=())]).run(graph, ctx)
    for region, router in zip(find_routed(graph), routers, strict=True):
        layer = Layer(ExpertView(graph, region), Sweep(graph, ctx.calibration.batches).advance(region.input))
        gates = "relative" if router == "neuron" else "threshold"
        install(graph, layer.view, FAMILIES[router](layer, RouterOptions(rank=16)), gates=gates)
        layer.view = ExpertView(graph, next(r for r in find_routed(graph) if r.node is region.node))
        routing_facts(graph, region.name)["active"] = 0.6
        set_threshold(graph, layer)
    graph.clean()
    assert cost.count(graph).flops_per_token > cost.count(trace_tiny("llama")).flops_per_token, "a router is counted"
    lowered = with_cache(graph)
    lower(lowered, tmp_path)
    entry = parity(lowered, OrtModel(tmp_path, threads=1))
    assert entry["relative_error"] < 1e-4


# ---- whole models --------------------------------------------------------------------------------------------------
DECODERS = ("llama", "qwen3", "mistral", "gemma2", "phi", "phi3", "falcon", "gptj", "gpt2", "opt")


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_with_a_cache(name: str, tmp_path: Path) -> None:
    graph = with_cache(trace_tiny(name))
    lowered = lower(graph, tmp_path)
    assert lowered.operators["com.microsoft.GroupQueryAttention"] == 2
    entry = parity(graph, OrtModel(tmp_path, threads=1))
    assert entry["relative_error"] <= 1e-5
    assert entry["greedy_tokens_equal"] == 1


@pytest.mark.parametrize("name", ["bert", "distilbert", "modernbert", "t5_gated", "vit", "dinov2_swiglu", "whisper_encoder", "convnet"])
def test_encoders(name: str, tmp_path: Path) -> None:
    graph = trace_tiny(name)
    lower(graph, tmp_path)
    model = OrtModel(tmp_path, threads=1)
    for batch, sequence in ((2, 24), (1, 1), (3, 5)):
        inputs = random_inputs(graph, {"batch": batch, "sequence": sequence})
        with torch.no_grad():
            assert_close(torch.as_tensor(next(iter(model.run(**inputs).values()))), graph(**inputs), rel=1e-5)


def test_a_decoder_whose_cache_was_refused_runs_without(tmp_path: Path) -> None:
    graph = eager(bias=0.1, bent=True)
    graph.info |= {"task": "causal-lm", "context_length": 32}
    lower(graph, tmp_path)
    session = decoder_for(model := OrtModel(tmp_path, threads=1))
    assert not session.cached
    entry = parity(graph, model, steps=8)
    assert entry["relative_error"] <= 1e-5
    assert entry["greedy_tokens_equal"] == 1


class Llama16(nn.Module):
    """Llama with heads of 16 features: the size from which the rotary embedding goes inside the attention operator."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96}
        self.model = enliven(LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **sizes | options)))  # type: ignore[arg-type]

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


@functools.cache
def _llama16(tied: bool) -> Graph:
    ids = torch.zeros(2, 7, dtype=torch.int64)
    module = Llama16(tie_word_embeddings=tied)
    info = {"name": "llama16", "context_length": 2048, "task": "causal-lm"}
    return trace(module, {"input_ids": ids}, {"input_ids": {0: "batch", 1: "sequence"}}, output_name="logits", info=info)


@pytest.mark.parametrize("tied", [False, True])
def test_the_graph_is_as_one_written_by_hand(tied: bool, tmp_path: Path) -> None:
    graph = with_cache(_llama16(tied), context=128)
    lowered = lower(graph, tmp_path)
    per_layer = {
        "com.microsoft.GroupQueryAttention": 1, "com.microsoft.SkipSimplifiedLayerNormalization": 2, "MatMul": 5, "Sigmoid": 1, "Mul": 2,
    }  # fmt: skip
    expected = {op: 3 * n for op, n in per_layer.items()} | {"SimplifiedLayerNormalization": 1}
    expected["com.microsoft.FusedMatMul" if tied else "MatMul"] = 1 if tied else 16
    for op, count in expected.items():
        assert lowered.operators[op] == count, op
    assert not {"Transpose", "Cos", "Sin", "Softmax", "Concat", "Slice"} & lowered.operators.keys()
    assert sum(lowered.operators.values()) - sum(expected.values()) <= 12, "little else than the lengths and the last token"
    assert parity(graph, OrtModel(tmp_path, threads=1))["relative_error"] <= 1e-5


def test_logits_of_all_tokens(tmp_path: Path) -> None:
    graph = with_cache(_llama16(True), logits="all")
    lower(graph, tmp_path)
    assert parity(graph, OrtModel(tmp_path, threads=1))["relative_error"] <= 1e-5


# ---- routed FFNs ---------------------------------------------------------------------------------------------------
GATES = {
    "threshold": threshold_gates, "top1": lambda s: topk_gates(s, 1), "top3": lambda s: topk_gates(s, 3), "positive": torch.relu,
    "signed": lambda s: s * (s > 0.2) - 0.5 * (s < -1.5),
}  # fmt: skip


class Routed(nn.Module):
    """A routed FFN under each kind of gates, with residuals, so that the operator's input and output both live on."""

    def __init__(self, activation: str, gated: bool, bias: bool, experts: int = 4, size: int = 8, width: int = 16) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.activation = activation
        self.up = nn.Parameter(torch.randn(experts, size * (1 + gated), width, generator=generator))
        self.bias = nn.Parameter(torch.randn(experts, size * (1 + gated), generator=generator)) if bias else None
        self.down = nn.Parameter(torch.randn(experts, width, size, generator=generator))
        self.router = nn.Parameter(torch.randn(experts, width, generator=generator) / 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        scores = nn.functional.linear(x, self.router) - 0.7  # some tokens have no expert
        return tuple(routed_ffn(x, gates(scores), self.up, self.bias, self.down, self.activation) + x for gates in GATES.values())


BACKENDS = [False, pytest.param(True, marks=pytest.mark.skipif(not available(), reason="no C++ compiler here"))]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("activation", "gated", "operator"),
    [("silu", True, True), ("silu", False, True), ("relu", False, True), ("gelu_tanh", False, True), ("quick_gelu", True, True),
     ("gelu", False, False), ("gelu", True, False), ("relu2", False, False), ("mish", True, False)],
)  # fmt: skip
def test_routed_ffn(activation: str, gated: bool, operator: bool, bias: bool, tmp_path: Path) -> None:
    operators = check_routed(Routed(activation, gated, bias), False, tmp_path)
    assert operators.get("com.microsoft.MoE", 0) == (4 if operator else 0), "not for gates that may be negative"


@pytest.mark.skipif(not available(), reason="no C++ compiler here")
@pytest.mark.parametrize(("activation", "gated", "bias"), [("silu", True, True), ("gelu", False, False), ("mish", True, False)])
def test_routed_ffn_in_the_native_kernel(activation: str, gated: bool, bias: bool, tmp_path: Path) -> None:
    operators = check_routed(Routed(activation, gated, bias), True, tmp_path)
    assert operators["dyncomp.FloatFFN"] == len(GATES)
    assert not {"com.microsoft.MoE", "If"} & operators.keys()


def check_routed(module: Routed, native: bool, tmp_path: Path) -> dict[str, int]:
    """Lower, and hold every output against the graph; returns the operators."""
    x = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(1))
    graph = trace(module, {"x": x}, {"x": {0: "batch", 1: "sequence"}})
    lowered = lower(graph, tmp_path, native=native)
    model = OrtModel(tmp_path, threads=1)
    assert model.config["kernels"] == ("dyncomp" if native else "onnxruntime")
    with torch.no_grad():
        expected = dict(zip(graph.outputs, graph(x), strict=True))
    for gates, y in zip(GATES, expected.values(), strict=True):
        assert bool((y == x).all(-1).any()) != gates.startswith("top"), "a token without experts passes unchanged"
    for part in (x, x[:1, :1], x[:, :3]):
        for name, actual in model.run(x=part).items():
            assert_close(torch.as_tensor(actual), expected[name][: part.shape[0], : part.shape[1]], rel=1e-6)
    return lowered.operators


@pytest.mark.parametrize("native", BACKENDS)
@pytest.mark.parametrize(("k", "threshold"), [(2, 0.0), (0, 0.3)])
def test_routed_decoder(k: int, threshold: float, native: bool, tmp_path: Path) -> None:
    """Inside a whole model: alone, the MoE operator hides that it is wrong when it runs in place."""
    graph = _llama16(False).copy()
    assert carve(graph, 8, k=k, threshold=threshold) == 3
    graph = with_cache(graph)
    operators = lower(graph, tmp_path, native=native).operators
    if native:
        assert (operators["dyncomp.FloatFFN"], operators["dyncomp.CachedAttention"]) == (3, 3)
        assert not {"TopK", "OneHot", "Greater", "com.microsoft.MoE", "com.microsoft.GroupQueryAttention"} & operators.keys()
    else:
        assert (operators["com.microsoft.MoE"], operators["com.microsoft.GroupQueryAttention"]) == (3, 3)
    entry = parity(graph, OrtModel(tmp_path, threads=1))
    assert entry["relative_error"] <= 1e-5
    assert entry["greedy_tokens_equal"] == 1


@pytest.mark.parametrize("native", BACKENDS)
def test_routed_encoder(native: bool, tmp_path: Path) -> None:
    graph = trace_tiny("bert")
    assert carve(graph, 8, threshold=0.3) == 2
    operators = lower(graph, tmp_path, native=native).operators
    assert (operators.get("If", 0), operators.get("dyncomp.FloatFFN", 0)) == ((0, 2) if native else (16, 0))
    model = OrtModel(tmp_path, threads=1)
    for batch, sequence in ((2, 24), (1, 1)):
        inputs = random_inputs(graph, {"batch": batch, "sequence": sequence})
        with torch.no_grad():
            assert_close(torch.as_tensor(model.run(**inputs)["output"]), graph(**inputs), rel=1e-5)


@pytest.mark.parametrize("native", BACKENDS)
def test_all_experts_active_equals_dense(native: bool, tmp_path: Path) -> None:
    dense = _llama16(False)
    routed = dense.copy()
    carve(routed, FFN // 8, threshold=-1e9)
    for name, graph in (("dense", dense), ("routed", routed)):
        lower(graph, tmp_path / name, native=native)
    kernels = [OrtModel(tmp_path / n, threads=1).config["kernels"] for n in ("dense", "routed")]
    assert kernels == ["onnxruntime", "dyncomp" if native else "onnxruntime"]
    ids = np.random.default_rng(0).integers(0, 96, (2, 30))
    a, b = (torch.as_tensor(OrtModel(tmp_path / n, threads=1).run(input_ids=ids)["logits"]) for n in ("dense", "routed"))
    assert relative_error(b, a) <= 1e-5


# ---- decoding ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Graph, OrtModel, Lowered]:
    graph, folder = with_cache(_llama16(True), context=2048), tmp_path_factory.mktemp("llama16")
    lowered = lower(graph, folder)
    return graph, OrtModel(folder, threads=1), lowered


@pytest.mark.parametrize("lengths", [(1200,), (700, 30, 520)])
def test_long_prompts_are_prefilled_in_pieces(llama: tuple[Graph, OrtModel, Lowered], lengths: tuple[int, ...]) -> None:
    _, model, _ = llama
    ids = np.random.default_rng(0).integers(0, 96, (len(lengths), max(lengths) + 3))
    with torch.no_grad():
        expected = _llama16(True)(torch.as_tensor(ids))
    rows, at = np.arange(len(lengths)), np.array(lengths)
    session = OrtDecoder(model)
    logits = session.prefill(ids[:, : max(lengths)], at, 3)
    assert_close(torch.as_tensor(logits), expected[rows, at - 1], rel=1e-5)
    for step in range(3):
        logits = session.step(ids[rows, at + step])
        assert_close(torch.as_tensor(logits), expected[rows, at + step], rel=1e-5)


def test_the_cache_is_one_piece_of_memory(llama: tuple[Graph, OrtModel, Lowered]) -> None:
    session = OrtDecoder(llama[1])
    ids = np.random.default_rng(0).integers(0, 96, (1, 9))
    session.prefill(ids, np.array([9]), 50)
    caches = session._caches
    assert np.abs(caches[0][:, :, :9]).max() > 0
    assert np.abs(caches[0][:, :, 9:]).max() == 0
    first = session.step(np.array([5])).copy()
    assert np.abs(caches[0][:, :, 9]).max() > 0, "written in place"
    session.prefill(ids, np.array([9]), 20)
    assert session._caches[0] is caches[0], "used again when it fits"
    assert_close(torch.as_tensor(session.step(np.array([5]))), torch.as_tensor(first), rel=1e-6)


def test_more_tokens_than_the_context(llama: tuple[Graph, OrtModel, Lowered]) -> None:
    with pytest.raises(RequestError, match="context of 2048"):
        OrtDecoder(llama[1]).prefill(np.zeros((1, 2040), np.int64), np.array([2040]), 9)


# ---- what it says --------------------------------------------------------------------------------------------------
def test_placement(llama: tuple[Graph, OrtModel, Lowered]) -> None:
    placement = llama[1].placement()
    assert list(placement) == ["CPUExecutionProvider"]
    assert placement["CPUExecutionProvider"]["com.microsoft.GroupQueryAttention"] == 3


def test_files_and_config(llama: tuple[Graph, OrtModel, Lowered]) -> None:
    _, model, lowered = llama
    assert [f.name for f in lowered.files] == ["model.onnx", "model.onnx.data", "config.json"]
    config = json.loads((lowered.directory / "config.json").read_text())
    assert config["inputs"][3] == {"name": "key_cache_0", "dtype": "float32", "shape": ["batch", 2, "capacity", 16]}
    assert config["kv_cache"]["context_length"] == 2048
    assert model.inputs == lowered.inputs
    assert lowered.files[0].stat().st_size < 200_000, "the weights are beside the model"


def test_absent_provider_names_the_package(llama: tuple[Graph, OrtModel, Lowered]) -> None:
    with pytest.raises(ProviderError, match="CUDAExecutionProvider") as caught:
        OrtModel(llama[2].directory, providers=["cuda"])
    assert "pip install onnxruntime-gpu" in str(caught.value)
    with pytest.raises(ProviderError, match="no execution provider 'abacus'"):
        OrtModel(llama[2].directory, providers=["abacus"])


def test_wrong_inputs(llama: tuple[Graph, OrtModel, Lowered], tmp_path: Path) -> None:
    lower(trace_tiny("bert"), tmp_path)
    model = OrtModel(tmp_path, threads=1)
    ids = np.zeros((2, 5), np.int64)
    with pytest.raises(RequestError, match="takes the inputs"):
        model.run(input_ids=ids)
    with pytest.raises(RequestError, match=r"has shape \[5\]"):
        model.run(input_ids=ids[0], attention_mask=ids)
    with pytest.raises(RequestError, match="is float64"):
        model.run(input_ids=ids.astype(float), attention_mask=ids)
    with pytest.raises(BackendError, match="ONNX Runtime failed"):
        model.run(input_ids=ids + 10**6, attention_mask=ids)


def test_damaged_artifacts(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no lowered model"):
        OrtModel(tmp_path)
    lower(trace_tiny("torch_encoder"), tmp_path)
    (tmp_path / "model.onnx").write_bytes((tmp_path / "model.onnx").read_bytes()[:100])
    with pytest.raises(BackendError, match="cannot load"):
        OrtModel(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="damaged"):
        OrtModel(tmp_path)


def test_what_has_no_onnx_form_is_named(tmp_path: Path) -> None:
    class Strange(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvals(x).real

    graph = trace(Strange(), {"x": torch.randn(4, 4)}, {})
    with pytest.raises(BackendError, match="linalg_eig"):
        lower(graph, tmp_path)
    assert not list(tmp_path.iterdir())


class Mixed(nn.Module):
    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        return x * n + n / 2 + (x > 0)  # operands are cast


def test_the_exporter_writes_the_same_without_what_it_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {"x": torch.randn(3, 4), "n": torch.arange(4)}
    graph = trace(Mixed(), inputs, {"x": {0: "batch"}})
    assert made_once(), "this version of PyTorch has none of the functions replaced"
    lower(graph, tmp_path / "fast")
    monkeypatch.setattr("dyncomp.backends.ort.lower.made_once", tuple)
    lower(graph, tmp_path / "slow")
    assert (tmp_path / "fast" / "model.onnx").read_bytes() == (tmp_path / "slow" / "model.onnx").read_bytes()
    found = OrtModel(tmp_path / "fast", threads=1).run(**{name: value.numpy() for name, value in inputs.items()})
    assert_close(torch.as_tensor(found["output"]), graph(**inputs), rel=1e-6)


def test_nothing_keeps_the_weights_that_were_lowered(tmp_path: Path) -> None:
    x = torch.randn(3, 4)
    graph = trace(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4)), {"input": x}, {"input": {0: "batch"}})

    def held() -> int:
        gc.collect()
        return sum(isinstance(o, TorchTensor) for o in gc.get_objects())

    lower(graph, tmp_path / "first")  # constants of the library are made
    before = held()
    lower(graph, tmp_path / "second")
    assert held() == before == 0


# ---- a real model --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def smollm() -> LoadedModel:
    return load_model("smollm2-135m")


@pytest.mark.slow
@pytest.mark.parametrize("routed", [False, True])
def test_smollm2(smollm: LoadedModel, routed: bool, tmp_path: Path) -> None:
    graph = trace_model(smollm)
    if routed:
        assert carve(graph, 16, threshold=-0.5, keep=1) == 29
    graph = with_cache(graph, context=512)
    lowered = lower(graph, tmp_path)
    ours = routed and available()
    assert lowered.operators["dyncomp.CachedAttention" if ours else "com.microsoft.GroupQueryAttention"] == 30
    assert lowered.operators.get("dyncomp.FloatFFN" if ours else "com.microsoft.MoE", 0) == (29 if routed else 0)
    model = OrtModel(tmp_path)
    entry = parity(graph, model, steps=16 if routed else 256)
    assert entry["relative_error"] <= 1e-4
    assert entry["greedy_tokens_equal"] >= (1 if routed else 0.99)
    if not routed:
        talk(Generator(decoder_for(model), smollm.tokenizer))


def talk(generator: Generator) -> None:
    (done,) = generator.generate(["The capital of France is"], Sampling(max_tokens=8))
    assert " Paris" in done.text
    conversation = [{"role": "user", "content": "Name a fox emoji and one city."}]
    text = "".join(generator.stream(conversation, Sampling(max_tokens=24)))
    assert text == generator.generate([conversation], Sampling(max_tokens=24))[0].text
    prompts = ["Once upon a time", "1 + 1 =", "The sea"]
    assert generator.generate(prompts, Sampling(max_tokens=12)) == [generator.generate([p], Sampling(max_tokens=12))[0] for p in prompts]
