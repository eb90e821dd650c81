"""TVM's float kernels over shapes that nobody chose, and on what is not finite: held to PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dyncomp.errors import BackendError
from dyncomp.ops import cached_attention, rotary, routed_ffn
from dyncomp.ops import gated_linear as gated

pytest.importorskip("tvm")

from dyncomp.backends.tvm.importer import Converters, import_graph
from dyncomp.backends.tvm.kernels import attention, linear, norm, sdpa
from dyncomp.backends.tvm.kernels import routed_ffn as routed
from dyncomp.backends.tvm.kernels.tile import pack, pack_experts, pad_rows
from dyncomp.backends.tvm.shapes import Tiles
from test_tvm import FORMS, TILE, attention_kernel, compiled, ffn_kernel, gated_kernel, numbers, sdpa_kernel

SHAPES = settings(max_examples=5, deadline=None, derandomize=True)  # each is compiled


@SHAPES
@given(st.integers(1, 300), st.integers(1, 200), st.lists(st.integers(0, 40), min_size=1, max_size=3))
def test_linear(rows: int, depth: int, batches: list[int]) -> None:
    run, w, b = compiled(linear.linear(rows, depth, TILE)), numbers(1, rows, depth), numbers(2, rows)
    for tokens in batches:
        x, y = numbers(tokens, tokens, depth), torch.full((tokens, rows), 7.0)
        run(x, pack(w, TILE), pad_rows(b, TILE), y)
        assert_close(y, F.linear(x, w, b), rel=1e-5)


@SHAPES
@given(st.integers(1, 9), st.integers(1, 70), st.integers(1, 90), st.integers(1, 90), st.booleans(), st.integers(0, 30))
def test_routed_ffn(experts: int, neurons: int, depth: int, rows: int, gated: bool, tokens: int) -> None:
    width = neurons * (2 if gated else 1)
    w_up, b_up, w_down = numbers(1, experts, width, depth) / 4, numbers(2, experts, width), numbers(3, experts, rows, neurons) / 4
    run = compiled(routed.routed_ffn(experts, neurons, depth, rows, "silu", gated=gated, tile=TILE))
    for count in (1, tokens):
        x, y = numbers(4, count, depth), torch.full((count, rows), 7.0)
        gates = numbers(5, count, experts).relu()
        run(x, gates, *pack_experts(w_up, b_up, w_down, TILE), y)
        assert_close(y, routed_ffn(x, gates, w_up, b_up, w_down, "silu"), rel=1e-5)


@SHAPES
@given(st.integers(1, 150), st.booleans(), st.integers(0, 40))
def test_norms(features: int, centered: bool, tokens: int) -> None:
    scale, shift = numbers(1, features), numbers(2, features) * centered
    x, y = numbers(3, tokens, features) + 1, torch.zeros(tokens, features)
    compiled(norm.norm(features, 1e-5, centered=centered, lanes=TILE.lanes))(x, scale, shift, y)
    expected = F.layer_norm(x, [features], scale, shift, 1e-5) if centered else F.rms_norm(x, [features], scale, 1e-5)
    assert_close(y, expected, rel=1e-4)


def attend(a: attention.Attention, parts: list[Tensor], past: Tensor, caches: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """What the kernel gets for its tables, and what PyTorch makes of it: cos, [B, S, H * D], the caches."""
    capacity, tokens = caches[0].shape[2], parts[0].shape[1]
    tables = [numbers(4, capacity, max(a.half, 1)), numbers(5, capacity, max(a.half, 1))]
    turned = [p.unflatten(-1, (-1, a.head_dim)).transpose(1, 2) for p in parts]
    if a.half:
        positions = past[:, None] + torch.arange(tokens)
        turned[:2] = [rotary(t, *tables, positions, a.interleaved) for t in turned[:2]]
    out, *after = cached_attention(*turned, *caches, past, a.scale, a.window, a.softcap, None, None)
    return torch.stack(tables), out.transpose(1, 2).flatten(2), after


@SHAPES
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.sampled_from([0, 3, 9]), st.booleans(), st.integers(1, 20),
    st.integers(0, 70),
)  # fmt: skip
def test_cached_attention(groups: int, shared: int, head_dim: int, window: int, packed: bool, tokens: int, past: int) -> None:
    a = attention.Attention(groups * shared, groups, head_dim, head_dim**-0.5, window=window, half=head_dim // 4, packed=packed)
    parts = [numbers(i, 2, tokens, n * head_dim) for i, n in enumerate((a.heads, groups, groups))]
    caches = [numbers(6 + i, 2, groups, past + tokens + 3, head_dim) for i in range(2)]
    begun, out = torch.tensor([past, past // 2]), torch.zeros(2, tokens, a.heads * head_dim)
    (cos, sin), expected, after = attend(a, parts, begun, caches)
    run = compiled(attention.cached_attention(a, TILE))
    run(*([torch.cat(parts, -1)] * 3 if packed else parts), begun, cos, sin, torch.zeros(a.heads, 1), *caches, out)
    assert_close(out, expected, rel=1e-5)
    assert_close(caches[0], after[0], rel=1e-6)
    assert torch.equal(caches[1], after[1])


@SHAPES
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.integers(1, 80), st.integers(1, 80))
def test_attention_without_a_cache(groups: int, shared: int, features: int, tokens: int, length: int) -> None:
    q, k, v = (
        numbers(0, 2, groups * shared, tokens, features),
        numbers(1, 2, groups, length, features),
        numbers(2, 2, groups, length, features),
    )
    out = torch.zeros_like(q)
    compiled(sdpa.attention(features, 0.3, "none", TILE))(q, k, v, torch.zeros(1, 1, 1, 1), out)
    assert_close(out, F.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True), rel=1e-5)


# ---- what is not finite --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["query", "key"])
def test_cached_attention_passes_on_what_is_not_finite_to_those_who_see_it(bad: float, what: str) -> None:
    """A query to itself, a key to the queries from its token on: PyTorch's pattern."""
    a, tokens = FORMS["grouped"], 70
    parts = [numbers(i, 1, tokens, n * a.head_dim) for i, n in enumerate((a.heads, a.kv_heads, a.kv_heads))]
    parts[0 if what == "query" else 1][0, 40] = bad
    caches = [numbers(6 + i, 1, a.kv_heads, 80, a.head_dim) for i in range(2)]
    past, out = torch.tensor([5]), torch.zeros(1, tokens, a.heads * a.head_dim)
    (cos, sin), _, _ = attend(a, parts, past, [c.clone() for c in caches])
    attention_kernel("grouped")(*[torch.cat(parts, -1)] * 3, past, cos, sin, torch.zeros(a.heads, 80), *caches, out)
    finite = torch.isfinite(out[0]).all(-1)
    assert finite[:40].all()
    assert not torch.isfinite(out[0, 40]).any()
    assert finite[41:].all() if what == "query" else bad != bad or not finite[41:].all()
    if what == "key" and bad != bad:
        assert not finite[40:].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_attention_without_a_cache_passes_on_what_is_not_finite(bad: float) -> None:
    q, k, v = numbers(0, 2, 4, 9, 16), numbers(1, 2, 2, 30, 16), numbers(2, 2, 2, 30, 16)
    k[0, 1, 7, 0], q[..., 0] = bad, 1.0  # an infinite score of one key, for two heads of the first row
    out, mask = torch.zeros(2, 4, 9, 16), torch.ones(2, 1, 9, 30, dtype=torch.bool)
    mask[0, :, :4, 7] = False  # the first four queries do not see it
    sdpa_kernel("bool")(q, k, v, mask, out)
    assert not torch.isfinite(out[0, 2:, 4:]).any()
    assert torch.isfinite(out[0, :2]).all()
    assert torch.isfinite(out[0, 2:, :4]).all()
    assert torch.isfinite(out[1]).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("centered", [False, True])
def test_norms_pass_on_what_is_not_finite_within_its_row(bad: float, centered: bool) -> None:
    x, scale, y = numbers(0, 5, 64), numbers(1, 64), torch.zeros(5, 64)
    x[2, 9] = bad
    compiled(norm.norm(64, 1e-5, centered=centered, lanes=TILE.lanes))(x, scale, torch.zeros(64), y)
    expected = F.layer_norm(x, [64], scale, None, 1e-5) if centered else F.rms_norm(x, [64], scale, 1e-5)
    assert torch.equal(torch.isfinite(y), torch.isfinite(expected))
    assert not torch.isfinite(y[2, 9])
    assert torch.isfinite(y[[0, 1, 3, 4]]).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gated_linear_passes_on_what_is_not_finite_of_open_tokens(bad: float) -> None:
    x, w, b, y = numbers(0, 8, 37), numbers(1, 100, 37), numbers(2, 100), torch.full((8, 100), 7.0)
    gates = torch.tensor([1.0, 0.0] * 4)[:, None]
    x[2, 5] = x[3, 5] = bad  # the one open, the other closed
    gated_kernel()(x, gates, pack(w, TILE), pad_rows(b, TILE), y)
    assert torch.equal(torch.isfinite(y), torch.isfinite(gated(x, gates, w, b)))
    assert not torch.isfinite(y[2]).any()
    assert not y[3].any()
    gates[4] = bad
    gated_kernel()(x, gates, pack(w, TILE), pad_rows(b, TILE), y)
    assert not torch.isfinite(y[4]).any()


def test_a_gate_that_is_not_a_number_is_open() -> None:
    """TVM compares such that it would count as 0: what is wrong would become a silent 0."""
    run, w_up, b_up, w_down = ffn_kernel(True)
    x, y, gates = numbers(0, 8, 33), torch.zeros(8, 52), torch.tensor([1.0, 0.0, -0.0]).repeat(8, 1)
    gates[2, 1] = float("nan")
    run(x, gates, *pack_experts(w_up, b_up, w_down, TILE), y)
    assert not torch.isfinite(y[2]).any()
    assert torch.isfinite(y[[0, 1, 3, 4, 5, 6, 7]]).all()


# ---- graphs --------------------------------------------------------------------------------------------------------
class Counting(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1.0)
        return x + self.count


def test_a_graph_that_changes_a_buffer_is_refused() -> None:
    """TVM's importer would drop the change silently."""
    program = torch.export.export(Counting(), (torch.zeros(3),)).run_decompositions({})
    with pytest.raises(BackendError, match="changes 'count' in place, which TVM drops silently"):
        import_graph(None, program, Converters(Tiles(TILE)))
