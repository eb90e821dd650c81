"""A stack of equal layers is traced by its first ones, and the graph is the one of a full trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_close
from torch import Tensor, fx, nn

import bench.tiny as tiny
from bench.tiny_handwritten import NanoGPT
from dyncomp import stacks
from dyncomp import trace as tracing
from dyncomp.graph import Graph
from dyncomp.stacks import find_stacks
from dyncomp.trace import trace

LAYERS = 6
SEQUENCE: tiny.Dims = {"x": {0: "batch", 1: "sequence"}}


def deep(wrapper: type, model: str, config: str, options: dict[str, Any], inputs: tiny.Inputs, dims: tiny.Dims, output: str) -> Any:
    return tiny._transformers(wrapper, model, config, options, inputs, dims, output)()


def decoder(family: str, **options: Any) -> Any:
    config = options.pop("config", f"{family}Config")
    many = tiny._DECODER | {"num_hidden_layers": LAYERS} | options
    return deep(tiny.TokenModel, f"{family}ForCausalLM", config, many, tiny._ids(), tiny.TOKENS, "logits")


def t5() -> Any:
    options = tiny._TEXT | tiny._T5 | {"num_layers": LAYERS, "num_hidden_layers": LAYERS, "num_decoder_layers": LAYERS + 1}
    inputs, dims = tiny._ids() | tiny._target(), tiny.TOKENS | tiny.TARGET
    return deep(tiny.Seq2SeqModel, "T5ForConditionalGeneration", "T5Config", options, inputs, dims, "logits")


def bert() -> Any:
    options = tiny._TEXT | {"num_hidden_layers": LAYERS}
    return deep(tiny.MaskedModel, "BertModel", "BertConfig", options, tiny._ids_and_mask(), tiny.MASKED, "last_hidden_state")


def vit() -> Any:
    options = tiny._COMMON | {"num_hidden_layers": LAYERS, "image_size": 16, "patch_size": 8}
    return deep(tiny.PixelModel, "ViTModel", "ViTConfig", options, tiny._pixels(), tiny.PIXELS, "last_hidden_state")


def nanogpt() -> Any:
    module = NanoGPT(tiny.VOCAB, tiny.HIDDEN, tiny.FFN, LAYERS, tiny.HEADS, 64)
    return tiny.enliven(module), tiny._ids(), tiny.TOKENS


MODELS = {
    "llama": (lambda: decoder("Llama"), ["model.model.layers"]),
    "gpt_neox": (lambda: decoder("GPTNeoX"), ["model.gpt_neox.layers"]),
    # the first layer makes the position bias of all
    "t5": (t5, ["model.encoder.block", "model.decoder.block"]),
    "bert": (bert, ["model.encoder.layer"]),
    "vit": (vit, ["model.layers"]),
    "nanogpt": (nanogpt, ["c"]),
}


def structure(graph: Graph) -> list[object]:
    """Operators and their arguments, whatever the nodes are called."""
    numbers: dict[fx.Node, object] = {}
    for node in graph.nodes:
        numbers[node] = node.target if node.op in ("get_attr", "placeholder") else len(numbers) - sum(n.op == "get_attr" for n in numbers)
    return [
        (node.op, str(node.target), str(fx.map_arg((node.args, node.kwargs), lambda n: numbers[n])), node.meta.get("path"))
        for node in graph.nodes
        if node.op != "get_attr"
    ]


@pytest.mark.parametrize("name", MODELS)
def test_the_graph_is_that_of_a_full_trace(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, expected = MODELS[name]
    module, inputs, dims = build()
    assert [s.path for s in find_stacks(module)] == expected
    exports: list[int] = []
    export = tracing._export
    monkeypatch.setattr(tracing, "_export", lambda *args: exports.append(1) or export(*args))
    graph = trace(module, inputs, dims)
    full = export(module, inputs, dims, "output", None)
    assert len(exports) == 1  # it was not traced again
    assert structure(graph) == structure(full)
    assert graph.constants().keys() == full.constants().keys()
    assert all(graph.tensor(n).data_ptr() == full.tensor(n).data_ptr() for n in full.constants())
    other = tiny.sample(inputs, dims, {"batch": 3, "sequence": 11, "target": 6})
    with torch.no_grad():
        assert_close(graph(**other), module(**other), rel=1e-6)


class Layer(nn.Module):
    def __init__(self, index: int = 0, scale: float = 1.0) -> None:
        super().__init__()
        self.index, self.scale, self.linear = index, scale, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x)) * self.scale


class Plain(nn.Module):
    def __init__(self, *scales: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(i, s) for i, s in enumerate(scales or (1.0,) * LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Collected(Plain):
    def forward(self, x: Tensor) -> Tensor:
        seen = []
        for layer in self.layers:
            x = layer(x)
            seen.append(x)
        return torch.cat(seen, -1)


class Numbered(Plain):
    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x * (i + 1))
        return x


class Skipping(Plain):
    """The layer before the last one is left out: nothing in the first ones tells."""

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = x * 2 if i == LAYERS - 2 else layer(x)
        return x


class Twice(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


class Indexed(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.layers[LAYERS - 1](super().forward(x))


class Summed(Plain):
    """Layers side by side, not one after the other; each is used by the next through the sum."""

    def forward(self, x: Tensor) -> Tensor:
        return sum((layer(x) for layer in self.layers), torch.zeros_like(x))


class Shared(Plain):
    def __init__(self) -> None:
        super().__init__()
        for layer in list(self.layers)[1:]:
            layer.linear.weight = self.layers[0].linear.weight  # type: ignore[union-attr]


@pytest.mark.parametrize("model", [Plain, Collected, Numbered, Skipping, Twice, Indexed, Summed, Shared])
def test_what_is_more_than_a_stack_is_traced_in_full(model: type[Plain]) -> None:
    torch.manual_seed(0)
    module = model()
    assert [s.path for s in find_stacks(module)] == ["layers"]
    graph = trace(module, {"x": torch.randn(2, 5, 4)}, SEQUENCE)
    x = torch.randn(3, 7, 4)
    with torch.no_grad():
        assert_close(graph(x), module(x), rel=1e-6)
    assert len(module.layers) == LAYERS


def test_layers_that_take_turns_are_no_stack() -> None:
    module, _, _ = decoder("Gemma3", config="Gemma3TextConfig", head_dim=8, sliding_window=4)
    assert find_stacks(module) == []


def test_layers_that_differ_are_no_stack() -> None:
    assert find_stacks(Plain(*[1.0] * 5, 2.0, 1.0)) == []
    assert find_stacks(Plain(*[1.0] * 5)) == []  # nothing to win
    assert [s.path for s in find_stacks(Plain(3.0, *[1.0] * 7))] == ["layers"]  # the first may be another


def test_a_list_by_layer_is_no_stack() -> None:
    class Config:
        windows = ()

        def __init__(self, windows: list[int]) -> None:
            self.windows = windows

    module = Plain()
    module.config = Config([4] * LAYERS)  # type: ignore[assignment]
    assert find_stacks(module)
    module.config = Config([4, 4, 4, 8, 4, 4])  # type: ignore[assignment]
    assert not find_stacks(module)


def test_few_layers_are_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    forward = Layer.forward
    monkeypatch.setattr(Layer, "forward", lambda self, x: seen.append(self.index) or forward(self, x))
    trace(Plain().to("meta"), {"x": torch.empty(2, 5, 4, device="meta")}, SEQUENCE)
    assert max(seen) == stacks.TRACED - 1


def test_weights_in_files_are_given_back_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = Plain(), torch.randn(2, 5, 4)
    graph = trace(module, {"x": x}, SEQUENCE)
    seen: list[int] = []
    monkeypatch.setattr(stacks, "trim", lambda: seen.append(1))
    assert stacks.computes(graph, module, {"x": x})
    assert len(seen) > 2 * LAYERS
    with torch.no_grad():
        module.layers[4].linear.weight.add_(1.0)  # type: ignore[union-attr, operator]
    assert stacks.computes(graph, module, {"x": x})  # the same weights
    module.layers[4].scale = 2.0  # type: ignore[union-attr]
    assert not stacks.computes(graph, module, {"x": x})
