"""The graph: text, copies, shapes, edits."""

from __future__ import annotations

import pytest
import torch
from dyncomp.backends import program
from dyncomp.backends.program import expand_functions
from helpers import assert_close
from torch import fx, nn

from bench.tiny import tokens, trace_tiny
from dyncomp.errors import GraphError
from dyncomp.graph import Graph, op_name
from dyncomp.trace import trace

aten = torch.ops.aten


def linear_graph() -> Graph:
    torch.manual_seed(0)
    return trace(nn.Linear(4, 3), {"input": torch.randn(2, 4)}, {"input": {0: "batch"}})


def test_text_of_llama(golden):
    golden("llama.txt", trace_tiny("llama").text())


def test_text_of_a_linear():
    assert linear_graph().text().splitlines() == [
        "graph model(input: f32[batch, 4]) -> (output):",
        "  # (top level)",
        "  linear: f32[batch, 3] = linear(input_1, weight, bias)",
        "  return linear",
    ]


def test_copies_are_independent():
    original = trace_tiny("llama")
    original.info["routing"] = {"ffn": {"active": 1.0}}
    text, names, ids = original.text(), list(original.constants()), tokens(2, 5)
    before = original(ids)
    copy = original.copy()
    for name in names:
        assert copy.tensor(name) is original.tensor(name), "tensors are shared, not copied"
    name = "model.model.layers.0.mlp.down_proj.weight"
    copy.add_tensor(name, torch.zeros_like(copy.tensor(name)))
    copy.info["name"], copy.info["routing"]["ffn"]["active"] = "changed", 0.5
    for node in copy.nodes:
        if op_name(node) == "silu":
            node.target = aten.relu.default
    copy.clean()
    assert original.text() == text
    assert list(original.constants()) == names
    assert (original.info["name"], original.info["routing"]["ffn"]["active"]) == ("llama", 1.0)
    assert_close(original(ids), before, rel=0)
    assert not torch.allclose(copy(ids), before)


def test_shapes_that_repeat_are_inferred_once(monkeypatch):
    graph, computed = trace_tiny("llama"), []
    call = fx.Interpreter.call_function
    monkeypatch.setattr(fx.Interpreter, "call_function", lambda self, target, *a: computed.append(target) or call(self, target, *a))
    graph.infer_shapes()
    layers = [n for n in graph.nodes if n.op == "call_function" and n.target is aten.silu.default]
    assert len(layers) > 1
    assert computed.count(aten.silu.default) == 1
    assert len({id(n.meta["val"]) for n in layers}) == 1


def test_functions_of_tensors_of_one_shape_are_expanded_in_the_right_order():
    def difference(a, b):
        return a - 2.0 * b

    class Pair(nn.Module):
        def forward(self, x):
            return (x + 1.0).relu() * (x + 2.0).relu()

    graph, x = trace(Pair(), {"x": torch.randn(3, 4)}, {"x": {0: "batch"}}), torch.randn(2, 4)
    next(n for n in graph.nodes if n.target is aten.mul.Tensor).target = difference
    graph.infer_shapes()
    expand_functions(graph)
    graph.module.recompile()
    assert_close(graph(x), difference((x + 1).relu(), (x + 2).relu()), rel=1e-6)


def test_functions_that_repeat_are_traced_once(monkeypatch):
    def scaled(a, factor):
        return (a * factor).sum(-1, keepdim=True) * a

    class Thrice(nn.Module):
        def forward(self, x):
            return (x.relu() * 2.0).relu() * 2.0, x.relu() * 3.0

    graph, x = trace(Thrice(), {"x": torch.randn(3, 4)}, {"x": {0: "batch"}}), torch.randn(2, 4)
    traced, original = [], program.make_fx
    monkeypatch.setattr(program, "make_fx", lambda call, **options: original(lambda *given: traced.append(1) or call(*given), **options))
    products = [n for n in graph.nodes if n.target is aten.mul.Tensor]
    for node in products:
        node.target = scaled
    graph.infer_shapes()
    traced.clear()
    expand_functions(graph)
    assert (len(products), len(traced)) == (3, 2), "once for each factor"
    graph.module.recompile()
    first = scaled(scaled(x.relu(), 2.0).relu(), 2.0)
    for actual, expected in zip(graph.module(x), (first, scaled(x.relu(), 3.0)), strict=True):
        assert_close(actual, expected, rel=1e-6)


def test_what_turns_a_tensor_over_in_place_does_not_turn_others_over():
    class Twice(nn.Module):
        def forward(self, x):
            return x.relu().t_() + 1.0, x.relu() + 1.0

    graph = trace(Twice(), {"x": torch.randn(2, 4)}, {"x": {0: "batch"}})
    graph.infer_shapes()
    assert [graph.shape(n) for n in graph.output_nodes] == [(4, "batch"), ("batch", 4)]


def test_sizes_that_depend_on_data_are_each_their_own():
    class Found(nn.Module):
        def forward(self, x):
            return x.nonzero(), (x + 0.5).nonzero()

    graph = trace(Found(), {"x": torch.randn(2, 4)}, {"x": {0: "batch"}})
    graph.infer_shapes()
    first, second = (n.meta["val"].shape[0] for n in graph.output_nodes)
    assert str(first) != str(second)


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit", "bert"])
def test_infer_shapes_gives_the_traced_shapes(name: str):
    graph = trace_tiny(name)
    before = {n.name: graph.shape(n) for n in graph.nodes}
    for node in graph.nodes:
        if node.op == "call_function":
            del node.meta["val"]
    graph.infer_shapes()
    after = {n.name: graph.shape(n) for n in graph.nodes}
    assert {k: _factors(v) for k, v in after.items()} == {k: _factors(v) for k, v in before.items()}


def _factors(shape: tuple[int | str, ...] | None) -> list[list[str]] | None:
    """Sizes as sorted factors: ``batch*sequence`` and ``sequence*batch`` are the same."""
    return None if shape is None else [sorted(str(size).split("*")) for size in shape]


def test_inserting_fills_in_shape_and_path():
    graph = linear_graph()
    (output,) = graph.output_nodes
    with graph.inserting(after=output, path="made.here") as builder:
        doubled = builder.call(aten.mul.Tensor, output, 2.0)
    output.replace_all_uses_with(doubled, delete_user_cb=lambda user: user is not doubled)
    graph.clean()
    assert graph.shape(doubled) == ("batch", 3)
    assert doubled.meta["path"] == "made.here"
    x = torch.randn(5, 4)
    assert_close(graph(x), 2 * nn.functional.linear(x, graph.tensor("weight"), graph.tensor("bias")), rel=1e-6)


def test_clean_drops_what_nothing_uses():
    graph = linear_graph()
    graph.add_tensor("extra.weight", torch.ones(3))
    graph.read("extra.weight")
    graph.clean()
    assert sorted(graph.constants()) == ["bias", "weight"]
    with pytest.raises(GraphError, match=r"extra\.weight"):
        graph.tensor("extra.weight")


def test_add_tensor_replaces():
    graph = linear_graph()
    graph.add_tensor("bias", torch.full((3,), 7.0))
    x = torch.zeros(2, 4)
    assert_close(graph(x), torch.full((2, 3), 7.0), rel=0)
    assert isinstance(graph.tensor("bias"), nn.Parameter)
    graph.add_tensor("table", torch.ones(3), trainable=False)
    assert not isinstance(graph.tensor("table"), nn.Parameter)


def test_parameter_count_is_of_distinct_weights():
    assert linear_graph().parameter_count() == 15
    llama = trace_tiny("llama")
    assert llama.parameter_count() == sum(t.numel() for t in llama.constants().values() if isinstance(t, nn.Parameter))


def test_networkx_view():
    graph = linear_graph()
    view = graph.to_networkx()
    assert view.nodes["linear"]["op"] == "linear"
    assert view.nodes["linear"]["shape"] == ("batch", 3)
    assert view.in_degree("linear") == 3
    assert sum(data["bytes"] for _, data in view.nodes(data=True)) == 15 * 4
