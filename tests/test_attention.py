"""Attention regions: masks, rotary embeddings, heads, scale; found on every tiny architecture and on hand-written spellings."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from dyncomp.passes import AddKVCache
from helpers import assert_close
from torch import Tensor, nn

from bench.tiny import ARCHITECTURES, HEADS, trace_tiny
from dyncomp.graph import Graph
from dyncomp.pipeline import Context, Pipeline
from dyncomp.regions.attention import find_attentions
from dyncomp.regions.mask import Mask, classify_mask, relative_bias
from dyncomp.regions.rotary import rotary_tables
from dyncomp.trace import trace

CAUSAL, NONE, GIVEN, WINDOW = Mask("causal"), Mask("none"), Mask("given"), Mask("causal", 4)
HALF = (8, False)  # all eight features, pairs (i, i + 4)

# architecture -> (key heads, masks of the two layers, soft cap, (rotated features, interleaved) or None)
EXPECTED: dict[str, tuple[int, tuple[Mask, Mask], float, tuple[int, bool] | None]] = {
    "llama": (2, (CAUSAL, CAUSAL), 0, HALF),
    "qwen2": (2, (CAUSAL, CAUSAL), 0, HALF),
    "qwen3": (2, (CAUSAL, CAUSAL), 0, HALF),
    "mistral": (2, (WINDOW, WINDOW), 0, HALF),
    "olmo2": (2, (CAUSAL, CAUSAL), 0, HALF),
    "stablelm": (2, (CAUSAL, CAUSAL), 0, (2, False)),
    "gemma2": (2, (WINDOW, CAUSAL), 50, HALF),
    "gemma3": (2, (WINDOW, WINDOW), 0, HALF),
    "phi3": (2, (CAUSAL, CAUSAL), 0, HALF),
    "phi": (4, (CAUSAL, CAUSAL), 0, (4, False)),
    "falcon": (1, (CAUSAL, CAUSAL), 0, HALF),
    "gptj": (4, (CAUSAL, CAUSAL), 0, None),  # rotated before the heads are split off: its tables are enough
    "gpt_neox": (4, (CAUSAL, CAUSAL), 0, (2, False)),
    "gpt2": (4, (CAUSAL, CAUSAL), 0, None),
    "opt": (4, (CAUSAL, CAUSAL), 0, None),
    "bloom": (4, (Mask("relative"), Mask("relative")), 0, None),
    "nemotron": (2, (CAUSAL, CAUSAL), 0, (4, False)),
    "nanogpt": (4, (CAUSAL, CAUSAL), 0, None),
    "bert": (4, (GIVEN, GIVEN), 0, None),
    "modernbert": (4, (GIVEN, GIVEN), 0, HALF),
    "t5": (4, (GIVEN, GIVEN), 0, None),
    "vit": (4, (NONE, NONE), 0, None),
    "whisper_encoder": (4, (NONE, NONE), 0, None),
    "torch_encoder": (4, (NONE, NONE), 0, None),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_count(name: str) -> None:
    found, _ = find_attentions(trace_tiny(name))
    assert len(found) == ARCHITECTURES[name].attentions


@pytest.mark.parametrize("name", EXPECTED)
def test_what_each_architecture_has(name: str) -> None:
    kv_heads, masks, softcap, rotary = EXPECTED[name]
    found, refused = find_attentions(trace_tiny(name))
    assert not refused
    assert tuple(a.mask for a in found) == masks
    for a in found:
        assert (a.heads, a.kv_heads, a.head_dim, a.value_dim, a.softcap) == (HEADS, kv_heads, 8, 8, softcap)
        assert a.self_attention
        assert [(r.rotated, r.interleaved) if r else None for r in a.rotary] == [rotary, rotary]
        assert all(p is not None for p in a.projections)


def test_refusal_names_what_was_found() -> None:
    found, refused = find_attentions(merged(heads_first=True))
    assert not found
    assert [r.where for r in refused] == ["attention"]
    assert "not [batch, heads, sequence, features]" in refused[0].reason


def test_works_without_weights() -> None:
    with torch.device("meta"):
        module = Eager(window=3)
    graph = trace(module, {"input_ids": torch.zeros(2, 7, dtype=torch.int64)}, {"input_ids": {0: "batch", 1: "sequence"}})
    found, _ = find_attentions(graph)
    assert found[0].mask == Mask("causal", 3)


# ---- spellings -----------------------------------------------------------------------------------------------------
class Eager(nn.Module):
    """Attention in primitives, [B, S] ids -> [B, S, d]."""

    def __init__(
        self, *, window: int = 0, cap: float = 0.0, scale: float = 0.35, fill: float = -1e9, bias: float = 0.0, where: bool = False,
        bent: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embed, self.qkv, self.out = nn.Embedding(32, 16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.window, self.cap, self.scale, self.fill, self.bias, self.where = window, cap, scale, fill, bias, where
        self.bent = bent

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) * self.scale
        if self.cap:
            scores = self.cap * torch.tanh(scores / self.cap)
        i = torch.arange(x.shape[1], device=x.device)
        distance = i[:, None] - i[None, :]
        seen = (distance >= 0) & ((distance < self.window) if self.window else True)
        if self.bias:
            scores = scores - self.bias * (i.square() if self.bent else distance)
        scores = torch.where(seen, scores, self.fill) if self.where else scores + torch.where(seen, 0.0, self.fill)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def eager(**options: float | bool) -> Graph:
    torch.manual_seed(0)
    return trace(Eager(**options), {"input_ids": torch.zeros(2, 7, dtype=torch.int64)}, {"input_ids": {0: "batch", 1: "sequence"}})  # type: ignore[arg-type]


@pytest.mark.parametrize("where", [False, True])
@pytest.mark.parametrize("cap", [0.0, 30.0])
@pytest.mark.parametrize("window", [0, 5, 100])
def test_eager_attention_is_read_by_evaluation(where: bool, cap: float, window: int) -> None:
    (found,), refused = find_attentions(eager(where=where, cap=cap, window=window))
    assert not refused
    assert found.mask == Mask("causal", window)
    assert found.scale == pytest.approx(0.35, rel=1e-6)
    assert found.softcap == pytest.approx(cap, rel=1e-6)
    assert not found.key_transposed


class Merged(nn.Module):
    """Attention over [batch * heads, …], softmax included; its mask or bias is added by ``baddbmm`` or after ``bmm``."""

    def __init__(self, *, slope: float = 0.0, at_once: bool = False, heads_first: bool = False) -> None:
        super().__init__()
        self.embed, self.qkv, self.out = nn.Embedding(32, 16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.slope, self.at_once, self.heads_first = slope, at_once, heads_first

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        split = [t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)]
        q, k, v = (t.transpose(0, 1).flatten(0, 1) if self.heads_first else t.flatten(0, 1) for t in split)
        i = torch.arange(x.shape[1])
        added = torch.where(i[:, None] >= i, self.slope * (i - i[:, None]), -1e9) * torch.ones(2, 1, 1)  # [H, S, S]
        added = added.repeat(x.shape[0], 1, 1)
        scores = torch.baddbmm(added, q, k.transpose(1, 2), beta=1, alpha=0.25) if self.at_once else 0.25 * (q @ k.mT) + added
        y = scores.softmax(-1) @ v
        y = y.unflatten(0, (2, -1)).transpose(0, 1) if self.heads_first else y.unflatten(0, (-1, 2))
        return self.out(y.transpose(1, 2).flatten(2))


def merged(**options: float | bool) -> Graph:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Merged(**options)  # type: ignore[arg-type]

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.attention(input_ids)

    torch.manual_seed(0)
    return trace(Holder(), {"input_ids": torch.zeros(2, 7, dtype=torch.int64)}, {"input_ids": {0: "batch", 1: "sequence"}})


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("slope", [0.0, 0.1])
def test_heads_and_batch_in_one_dimension(slope: float, at_once: bool) -> None:
    graph = merged(slope=slope, at_once=at_once)
    (found,), refused = find_attentions(graph)
    assert not refused
    assert (found.mask.kind, found.scale, found.heads, found.head_dim) == ("relative" if slope else "causal", 0.25, 2, 8)
    graph.info["context_length"] = 16
    cached = graph.copy()
    assert Pipeline([AddKVCache()]).run(cached, Context())[0].result.changed, "held against the graph by the pass"
    if slope:
        assert_close(cached.tensor("tables.bias_0"), -slope * torch.arange(16.0).expand(2, -1), rel=1e-5)


def test_positional_bias_is_not_taken_for_a_mask() -> None:
    (found,), _ = find_attentions(eager(bias=0.1))
    assert found.mask == Mask("relative")
    assert found.additive is not None
    bias = relative_bias(found.additive(20))
    assert bias is not None
    assert_close(bias, -0.1 * torch.arange(20.0).expand(2, -1), rel=1e-5)
    assert find_attentions(eager(bias=0.1, bent=True))[0][0].mask == Mask("bias"), "not by the distance alone"


# ---- masks ---------------------------------------------------------------------------------------------------------
def additive(seen: Tensor) -> Tensor:
    return torch.where(seen, 0.0, float("-inf"))


def distance(size: int) -> Tensor:
    i = torch.arange(size)
    return i[:, None] - i[None, :]


@pytest.mark.parametrize(
    ("mask", "literals", "expected"),
    [
        (lambda s: additive(distance(s) >= 0), [], Mask("causal")),
        (lambda s: additive(distance(s) >= 0), [4096], Mask("causal")),
        (lambda s: additive((distance(s) >= 0) & (distance(s) < 2)), [2], Mask("causal", 2)),
        (lambda s: additive((distance(s) >= 0) & (distance(s) < 300)), [300], Mask("causal", 300)),
        (lambda s: additive(distance(s).abs() < 4), [4], Mask("other")),
        (lambda s: additive(distance(s) >= -1), [1], Mask("other")),
        (lambda s: torch.zeros(s, s), [], Mask("none")),
        (lambda s: additive(distance(s) >= 0) - 0.1 * distance(s), [], Mask("relative")),
        (lambda s: additive(distance(s) >= 0) + 0.1 * torch.arange(s), [], Mask("relative")),  # the same, but for a number a query
        (lambda s: additive(distance(s) >= 0) - 0.1 * distance(s).square() / s, [], Mask("bias")),
        (lambda s: additive(distance(s) >= 0) + 0.1 * torch.arange(s).square(), [], Mask("bias")),
        (lambda s: -0.1 * distance(s).abs(), [], Mask("bias")),
        (lambda s: additive(distance(s) % 2 == 0), [2], Mask("other")),
    ],
)
def test_masks(mask, literals: list[int], expected: Mask) -> None:
    assert classify_mask(mask, literals, 1 << 20) == expected


def test_a_window_too_long_to_look_at_is_not_called_causal() -> None:
    def mask(size: int) -> Tensor:
        return additive(distance(size) >= 0)

    assert classify_mask(mask, [100_000], 1 << 20) == Mask("other")
    assert classify_mask(mask, [100_000], 65_536) == Mask("causal"), "beyond the context it hides nothing"


# ---- rotary --------------------------------------------------------------------------------------------------------
class Rotated(nn.Module):
    """Causal attention whose queries and keys are rotated in one of the common ways."""

    def __init__(self, kind: str, rotated: int) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Embedding(32, 32), nn.Linear(32, 96)
        self.kind, self.rotated = kind, rotated
        self.register_buffer("inv", 100.0 ** -(torch.arange(0, rotated, 2) / rotated))

    def turn(self, x: Tensor) -> Tensor:
        t = torch.arange(x.shape[2])[:, None] * self.inv[None]
        a, kept = x[..., : self.rotated], x[..., self.rotated :]
        if self.kind == "complex":
            pairs = torch.view_as_complex(a.unflatten(-1, (-1, 2)).contiguous())
            turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(t), t)).flatten(-2)
        elif self.kind == "interleaved":
            even, odd, c, s = a[..., 0::2], a[..., 1::2], t.cos(), t.sin()
            turned = torch.stack([even * c - odd * s, odd * c + even * s], -1).flatten(-2)
        else:
            first, second = a.chunk(2, -1)
            c, s = t.cos(), t.sin()
            turned = torch.cat([first * c - second * s, second * c + first * s], -1)
        return torch.cat([turned, kept], -1)

    def forward(self, input_ids: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in self.qkv(self.embed(input_ids)).chunk(3, -1))
        return F.scaled_dot_product_attention(self.turn(q), self.turn(k), v, is_causal=True).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("rotated", [4, 16])
@pytest.mark.parametrize("kind", ["half", "interleaved", "complex"])
def test_rotary_spellings(kind: str, rotated: int) -> None:
    module = Rotated(kind, rotated)
    graph = trace(module, {"input_ids": torch.zeros(2, 7, dtype=torch.int64)}, {"input_ids": {0: "batch", 1: "sequence"}})
    (found,), _ = find_attentions(graph)
    for region in found.rotary:
        assert region is not None
        assert (region.rotated, region.interleaved) == (rotated, kind != "half")
        cos, sin = rotary_tables(graph, region, 50, chunk=16)
        angle = torch.arange(50)[:, None] * module.inv[None]
        torch.testing.assert_close(cos, angle.cos(), rtol=0, atol=1e-6)
        torch.testing.assert_close(sin, angle.sin(), rtol=0, atol=1e-6)
