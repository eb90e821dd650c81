"""``add-kv-cache``: prefill and decode steps equal the graph without a cache."""

from __future__ import annotations

import pytest
import torch
from dyncomp.passes import AddKVCache
from dyncomp.passes.verify_cache import verify_cache
from helpers import assert_close
from test_attention import Eager
from test_depth import gated
from torch import Tensor, nn

from bench.tiny import ARCHITECTURES, tokens, trace_tiny
from dyncomp.errors import RequestError
from dyncomp.graph import Graph
from dyncomp.pipeline import Context, parse_passes
from dyncomp.regions.depth import find_skips
from dyncomp.trace import trace

DECODERS = [n for n in ARCHITECTURES if n in {
    "llama", "qwen2", "qwen3", "mistral", "olmo2", "stablelm", "gemma2", "gemma3", "phi3", "phi", "falcon", "gptj", "gpt_neox", "gpt2",
    "opt", "bloom", "nemotron", "mixtral", "qwen2_moe", "nanogpt",
}]  # fmt: skip
CONTEXT = 48


def cached(graph: Graph, **options: str | int) -> Graph:
    graph = graph.copy()
    result = AddKVCache(context_length=CONTEXT, **options).run(graph, Context())  # type: ignore[arg-type]
    assert not result.refused, result.refused
    return graph


def empty_caches(graph: Graph, batch: int, capacity: int) -> list[Tensor]:
    sizes = {"batch": batch, "capacity": capacity}
    specs = [s for s in graph.inputs if "_cache_" in s.name]
    return [torch.zeros([sizes[d] if isinstance(d, str) else d for d in s.shape], dtype=s.dtype) for s in specs]


def run_chunks(graph: Graph, ids: Tensor, chunks: list[int], capacity: int = CONTEXT) -> Tensor:
    """Logits of all tokens [B, S, V], computed chunk by chunk."""
    caches, past, out = empty_caches(graph, len(ids), capacity), 0, []
    for size in chunks:
        logits, *caches = graph(ids[:, past : past + size], torch.full((len(ids),), past), *caches)
        out.append(logits)
        past += size
    return torch.cat(out, 1)


@pytest.mark.parametrize("name", DECODERS)
def test_equals_the_graph_without_a_cache(name: str) -> None:
    before = trace_tiny(name)
    after = cached(before)
    ids = tokens(3, 14)
    with torch.no_grad():
        expected = before(ids)
        assert_close(run_chunks(after, ids, [14]), expected, rel=1e-5)
        assert_close(run_chunks(after, ids, [9, 1, 1, 1, 1, 1]), expected, rel=1e-5)
        assert_close(run_chunks(after, ids, [4, 5, 5], capacity=14), expected, rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "opt", "gptj", "gemma2", "bloom"])
def test_rows_of_different_lengths(name: str) -> None:
    before, lengths = trace_tiny(name), torch.tensor([8, 3, 5])
    after = cached(before, logits="chosen")
    ids = tokens(3, 12)
    padded = torch.where(torch.arange(8) < lengths[:, None], ids[:, :8], 1)
    with torch.no_grad():
        expected = before(ids)
        logits, *caches = after(padded, torch.zeros(3, dtype=torch.int64), lengths[:, None] - 1, *empty_caches(after, 3, 12))
        assert_close(logits[:, 0], expected[torch.arange(3), lengths - 1], rel=1e-5)
        for _ in range(4):
            step = ids[torch.arange(3), lengths][:, None]
            logits, *caches = after(step, lengths, torch.zeros(3, 1, dtype=torch.int64), *caches)
            assert_close(logits[:, 0], expected[torch.arange(3), lengths], rel=1e-5)
            lengths = lengths + 1


def test_inputs_outputs_and_facts() -> None:
    graph = cached(trace_tiny("llama"), logits="chosen")
    names = ["input_ids", "past_length", "chosen", "key_cache_0", "value_cache_0", "key_cache_1", "value_cache_1"]
    assert [s.name for s in graph.inputs] == names
    assert str(graph.inputs[3]) == "key_cache_0: f32[batch, 2, capacity, 8]"
    assert graph.outputs == ("output", *(f"new_{n}" for n in names[3:]))
    assert graph.shape(graph.output_nodes[0]) == ("batch", "chosen", 96)
    assert graph.info["kv_cache"]["layers"] == [{"kv_heads": 2, "key_dim": 8, "value_dim": 8, "window": 0}] * 2
    assert "dyncomp.rotary" in graph.text()
    assert not any("mask" in line or "arange" in line for line in graph.text().splitlines()[12:]), "no mask is left"


def test_tables_are_shared_between_layers_and_reach_to_the_context() -> None:
    graph = cached(trace_tiny("llama"))
    tables = {n: t.shape for n, t in graph.constants().items() if n.startswith("tables.")}
    assert tables == {"tables.rotary_cos_0": (CONTEXT, 4), "tables.rotary_sin_0": (CONTEXT, 4)}


def test_what_layers_read_at_the_same_positions_is_looked_up_once() -> None:
    graph = cached(gated("llama", "block", closed=True))
    assert len(find_skips(graph)) == 2
    tables = [n.args[0].target for n in graph.nodes if n.target is torch.ops.aten.index.Tensor]  # type: ignore[union-attr]
    assert tables.count("tables.position_table_0") == 1


def test_the_original_is_not_touched_by_a_refusal() -> None:
    graph = decoder(Eager(bias=0.1, bent=True))
    before = graph.text()
    result = AddKVCache(context_length=CONTEXT).run(graph, Context())
    assert result.refused
    assert not result.changed
    assert graph.text() == before


def test_spec_and_options() -> None:
    (item,) = parse_passes("add-kv-cache{context-length=64 logits=chosen}")
    assert item == AddKVCache(context_length=64, logits="chosen")
    assert item.spec == "add-kv-cache{context-length=64 logits=chosen}"
    with pytest.raises(RequestError, match="logits is 'all' or 'chosen'"):
        AddKVCache(logits="first", context_length=9).run(trace_tiny("llama"), Context())


# ---- refusals ------------------------------------------------------------------------------------------------------
def refuse(graph: Graph, context: int = CONTEXT) -> str:
    result = AddKVCache(context_length=context).run(graph, Context())
    assert not result.changed
    assert all(r.reason and r.remedy and r.where for r in result.refused)
    return str(result.refused[0])


def decoder(module: nn.Module) -> Graph:
    torch.manual_seed(0)
    return trace(module, {"input_ids": torch.zeros(2, 7, dtype=torch.int64)}, {"input_ids": {0: "batch", 1: "sequence"}})


class Mixing(nn.Module):
    """Tokens reach their neighbours by another way than attention."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.attention, self.kind = Eager(), kind

    def forward(self, input_ids: Tensor) -> Tensor:
        y = self.attention(input_ids)
        if self.kind == "shift":
            return y + torch.cat([y[:, :1], y[:, :-1]], 1)
        if self.kind == "mean":
            return y - y.mean(1, keepdim=True)
        if self.kind == "length":
            return y * (torch.ones(y.shape[1]).sum() / 7)
        return y + torch.flip(torch.arange(y.shape[1]), [0])[:, None] * 0.1  # counts from the end


@pytest.mark.parametrize("kind", ["shift", "mean"])
def test_what_mixes_tokens_is_refused_and_located(kind: str) -> None:
    message = refuse(decoder(Mixing(kind)))
    assert "with a cache the result differs" in message
    assert {"shift": "first at cat", "mean": "first at sub"}[kind] in message


@pytest.mark.parametrize(("kind", "reason"), [("length", "depends on the length of the sequence"), ("reversed", "changes with the length")])
def test_what_depends_on_the_length_is_refused(kind: str, reason: str) -> None:
    assert reason in refuse(decoder(Mixing(kind)))


def test_bidirectional_attention_is_refused() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(32, 16)

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embed(input_ids).unflatten(-1, (2, 8)).transpose(1, 2)
            return nn.functional.scaled_dot_product_attention(x, x, x).transpose(1, 2).flatten(2)

    assert "bidirectional" in refuse(decoder(Encoder()))


def test_a_bias_by_distance_is_a_table_and_others_are_refused() -> None:
    before = decoder(Eager(bias=0.1))
    after = cached(before)
    ids = tokens(2, 14, 32)
    with torch.no_grad():
        assert_close(run_chunks(after, ids, [9, 1, 4]), before(ids), rel=1e-5)
    assert after.tensor("tables.bias_0").shape == (2, CONTEXT)
    assert "not on how far apart" in refuse(decoder(Eager(bias=0.1, bent=True)))
    assert "a matrix of 20000 x 20000 positions" in refuse(decoder(Eager(bias=0.1)), 20_000)


def test_several_inputs_of_the_same_shape_are_refused() -> None:
    assert "2 inputs" in refuse(trace_tiny("bert"))


def test_context_length_is_needed_and_must_have_positions() -> None:
    graph = trace_tiny("gpt2")
    graph.info.pop("context_length", None)
    assert "context length is unknown" in refuse(graph, 0)
    assert "no entry for position 4095" in refuse(graph, 4096)


# ---- the check itself ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("broken", ["window", "table", "scale"])
def test_the_check_sees_a_wrong_rewrite(broken: str) -> None:
    before = trace_tiny("mistral")
    after = cached(before)
    node = next(n for n in after.nodes if "cached_attention" in str(n.target))
    if broken == "window":
        node.args = (*node.args[:7], 5, *node.args[8:])
    elif broken == "scale":
        node.args = (*node.args[:6], 0.3, *node.args[7:])
    else:
        after.add_tensor("tables.rotary_sin_0", after.tensor("tables.rotary_sin_0").roll(1, 0), trainable=False)
    after.module.recompile()
    error, where = verify_cache(before, after)
    assert error is not None
    assert error > 1e-4
    assert where is not None


def test_nothing_is_claimed_without_weights() -> None:
    with torch.device("meta"):
        module = Eager()
    graph = trace(module, {"input_ids": torch.zeros(2, 7, dtype=torch.int64)}, {"input_ids": {0: "batch", 1: "sequence"}})
    result = AddKVCache(context_length=CONTEXT).run(graph, Context())
    assert result.changed
    assert result.facts["relative_error"] is None
