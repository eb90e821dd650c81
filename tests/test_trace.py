"""Tracing: the graph is the model, at other shapes than it was traced with."""

from __future__ import annotations

import pytest
import torch
from dyncomp.passes import AddKVCache
from helpers import assert_close
from tiny_checkpoint import write_checkpoint
from torch import nn

from bench.tiny import ARCHITECTURES, TOKENS, TokenModel, built, sample, tokens, trace_tiny
from dyncomp.errors import RequestError, TraceError
from dyncomp.graph import op_name
from dyncomp.models import load_for_inspection, load_model
from dyncomp.pipeline import Context
from dyncomp.trace import trace, trace_model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_graph_equals_model_at_another_shape(name: str):
    module, inputs, dims = built(name)
    graph = trace_tiny(name)
    other = sample(inputs, dims, {"batch": 3, "sequence": 11})
    with torch.no_grad():
        assert_close(graph(**other), module(**other), rel=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_one_token(name: str):
    module, inputs, dims = built(name)
    other = {key: torch.ones_like(value) for key, value in sample(inputs, dims, {"batch": 1, "sequence": 1}).items()}
    with torch.no_grad():
        assert_close(trace_tiny(name)(**other), module(**other), rel=1e-6)


def test_graphs_are_canonical():
    forbidden = {"view", "_unsafe_view", "contiguous", "dropout", "detach", "alias", "_assert_tensor_metadata", "add_.Tensor"}
    for name in ("llama", "gptj", "bert", "torch_encoder", "falcon"):
        assert not forbidden & {op_name(n) for n in trace_tiny(name).nodes if n.op == "call_function"}


def test_an_empty_cache_that_is_appended_to_is_none():
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
    module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, use_cache=True)).eval()
    dims = {"input_ids": {0: "batch", 1: "sequence"}}
    graph = trace(TokenModel(module, "logits"), {"input_ids": tokens(2, 5)}, dims)
    assert not [n for n in graph.nodes if op_name(n) == "cat" and any(p.meta["val"].numel() == 0 for p in n.args[0])]
    AddKVCache(context_length=64).run(graph, Context())
    assert len([n for n in graph.nodes if op_name(n) == "dyncomp.cached_attention"]) == 2


def test_in_place_stays_where_it_shows():
    class InPlace(nn.Module):
        def forward(self, x):
            y = x * 2
            z = y[:, :2]
            y.add_(1)  # z sees it
            return z + (x * 3).add_(1)[:, :2]  # nobody sees it

    graph = trace(InPlace(), {"x": torch.randn(3, 4)}, {"x": {0: "batch"}})
    x = torch.randn(5, 4)
    assert_close(graph(x), InPlace()(x), rel=1e-6)
    assert [op_name(n) for n in graph.nodes if op_name(n).startswith("add_")] == ["add_.Tensor"]


def test_dropout_is_off_even_when_traced_in_training_mode():
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    graph = trace(module, {"input": torch.randn(3, 4)}, {"input": {0: "batch"}})
    x = torch.randn(5, 4)
    assert_close(graph(x), module[0](x), rel=1e-6)


def test_paths_and_inputs_are_kept():
    graph = trace_tiny("llama")
    assert "model.model.layers.1.mlp.down_proj" in {n.meta["path"] for n in graph.nodes}
    assert [str(spec) for spec in graph.inputs] == ["input_ids: i64[batch, sequence]"]


def test_tied_weights_are_one_constant():
    graph = trace_tiny("gpt2")
    embedding = next(n for n in graph.nodes if op_name(n) == "embedding")
    head = graph.output_nodes[0]
    assert embedding.args[0].target == head.args[1].target


def test_a_dimension_the_model_fixes_is_named():
    """As in Mamba's scan, a Python loop over the sequence: the length it was traced with is in the graph."""

    class Scan(nn.Module):
        def forward(self, x):
            state = torch.zeros_like(x[:, 0])
            for step in range(x.shape[1]):
                state = torch.tanh(state + x[:, step])
            return state

    fixed = r"dimension 1 \(sequence\) of the input 'x' is declared dynamic, but the model fixes it to 7"
    with pytest.raises(TraceError, match=fixed):
        trace(Scan(), {"x": torch.randn(2, 7, 4)}, {"x": {0: "batch", 1: "sequence"}})


def test_control_flow_on_data_is_reported():
    class Branches(nn.Module):
        def forward(self, input_ids):
            return input_ids + 1 if input_ids.sum() > 3 else input_ids

    with pytest.raises(TraceError, match="Branches cannot be traced") as error:
        trace(Branches(), {"input_ids": tokens(2, 3)}, TOKENS)
    assert error.value.hint
    assert error.value.__cause__ is not None


def test_wrong_inputs_are_named():
    graph = trace_tiny("bert")
    with pytest.raises(RequestError, match="the graph takes the inputs"):
        graph(tokens(2, 7))
    with pytest.raises(RequestError, match="the graph takes the inputs"):
        graph(tokens(2, 7), token_type_ids=tokens(2, 7))


def test_meta_device_allocates_nothing():
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(1 << 14, 1 << 16), nn.GELU(), nn.Linear(1 << 16, 1 << 14))  # 8 GiB, if it were there
    graph = trace(module, {"input": torch.empty(2, 1 << 14, device="meta")}, {"input": {0: "batch"}})
    assert all(t.is_meta for t in graph.constants().values())
    assert graph.parameter_count() == 2 * (1 << 30) + (1 << 16) + (1 << 14)


def test_structure_is_traced_once(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNCOMP_CACHE", str(tmp_path / "cache"))
    loaded = load_model(str(write_checkpoint(tmp_path / "model")))
    first = trace_model(loaded)
    (file,) = (tmp_path / "cache" / "traces").iterdir()
    monkeypatch.setattr(torch.export, "export", None)
    second = trace_model(loaded)
    assert second.text() == first.text()
    assert [s.shape for s in second.inputs] == [s.shape for s in first.inputs]
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    assert torch.equal(second(input_ids=ids), first(input_ids=ids))
    assert trace_model(load_for_inspection(str(tmp_path / "model"))).text() == first.text()  # without weights: the same structure
    file.write_text(file.read_text()[:-100])
    with pytest.raises(TraceError):  # a damaged file is not used: export, which is gone, is asked for
        trace_model(loaded)
