"""The ops against their plain-ATen definition, by property."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from dyncomp.activations import ACTIVATIONS
from dyncomp.ops import cached_attention, rotary, routed_ffn, routed_ffn_reference, sparse_linear, threshold_gates, topk_gates

ops = torch.ops.dyncomp


def experts(e: int, neurons: int, d: int, *, gated: bool, bias: bool, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    rows = neurons * (2 if gated else 1)
    w_up = torch.randn(e, rows, d, generator=g, requires_grad=True)
    b_up = torch.randn(e, rows, generator=g, requires_grad=True) if bias else None
    w_down = torch.randn(e, d, neurons, generator=g, requires_grad=True)
    return w_up, b_up, w_down


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_routed_ffn_passes_opcheck(gated: bool, bias: bool) -> None:
    x = torch.randn(2, 5, 8, requires_grad=True)
    gates = (torch.rand(2, 5, 4) > 0.5).float()
    gates[..., 0] = 1
    opcheck(ops.routed_ffn.default, (x, gates.requires_grad_(), *experts(4, 6, 8, gated=gated, bias=bias), "silu"))


def test_other_ops_pass_opcheck() -> None:
    opcheck(ops.threshold_gates.default, (torch.randn(3, 4, requires_grad=True),))
    opcheck(ops.topk_gates.default, (torch.randn(3, 4, requires_grad=True), 2))
    q, k, cache = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8), torch.randn(2, 2, 10, 8)
    opcheck(ops.cached_attention.default, (q, k, k.clone(), cache, cache.clone(), torch.tensor([1, 4]), 0.3, 0))
    opcheck(ops.rotary.default, (q, torch.randn(20, 3), torch.randn(20, 3), torch.arange(3).expand(2, 3), False))


@pytest.mark.parametrize("bias", [False, True])
def test_sparse_linear_passes_opcheck(bias: bool) -> None:
    x, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    opcheck(ops.sparse_linear.default, (x, weight, torch.randn(6, requires_grad=True) if bias else None, torch.rand(8)))


def test_sparse_linear_counts_small_inputs_as_zero() -> None:
    x = torch.tensor([[0.5, -0.5, 0.2, 9.5], [1.0, -2.0, 0.0, 0.1]], requires_grad=True)
    thresholds, weight, bias = torch.tensor([0.5, 0.4, 0.2, 9.0]), torch.eye(4, requires_grad=True), torch.ones(4, requires_grad=True)
    y = sparse_linear(x, weight, bias, thresholds)
    assert_close(y, torch.tensor([[1.0, 0.5, 1.0, 10.5], [2.0, -1.0, 1.0, 1.0]]), rel=0)
    assert sparse_linear(torch.full((4,), torch.nan), weight, None, thresholds).isnan().all()
    y[1].sum().backward()
    assert_close(x.grad[1], torch.tensor([1.0, 1.0, 0.0, 0.0]), rel=0)
    assert_close(weight.grad[0], torch.tensor([1.0, -2.0, 0.0, 0.0]), rel=0)
    assert_close(bias.grad, torch.ones(4), rel=0)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_routed_ffn_equals_its_definition(data: st.DataObject) -> None:
    """Any gates (zero rows, zero columns, columns of ones, weights other than 1), any shape, zero tokens included."""
    e, neurons, d = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5)), data.draw(st.integers(1, 7))
    lead = data.draw(st.sampled_from([(0,), (1,), (5,), (2, 3), (2, 0, 3)]))
    gated, bias = data.draw(st.booleans()), data.draw(st.booleans())
    activation = data.draw(st.sampled_from(sorted(ACTIVATIONS)))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    x, gates = torch.randn(*lead, d, generator=g), torch.randn(*lead, e, generator=g)
    gates = gates * (torch.rand(*lead, e, generator=g) > 0.4)
    for column, kind in enumerate(data.draw(st.lists(st.sampled_from(["keep", "zero", "one"]), min_size=e, max_size=e))):
        if kind != "keep":
            gates[..., column] = 1.0 if kind == "one" else 0.0
    weights = [None if w is None else w.detach() for w in experts(e, neurons, d, gated=gated, bias=bias)]
    assert_close(routed_ffn(x, gates, *weights, activation), routed_ffn_reference(x, gates, *weights, activation), rel=2e-5)


def test_skipped_tokens_do_not_touch_the_others() -> None:
    """Tokens that are not skipped get bit-equal results whatever the gates of the rest are."""
    x, weights = torch.randn(6, 8), experts(4, 6, 8, gated=True, bias=False)
    gates = torch.zeros(6, 4)
    gates[2, 1] = gates[2, 3] = gates[4, 1] = 1
    y = routed_ffn(x, gates, *weights, "silu")
    assert torch.equal(y[[0, 1, 3, 5]], torch.zeros(4, 8))
    alone = routed_ffn(x[[2, 4]], gates[[2, 4]], *weights, "silu")
    assert torch.equal(y[[2, 4]], alone)


def test_the_gradient_of_a_closed_gate_is_the_output_of_its_expert() -> None:
    x, weights = torch.randn(3, 8), experts(4, 6, 8, gated=True, bias=True)
    gates = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 1]]).requires_grad_()
    routed_ffn(x, gates, *weights, "silu").sum().backward()
    one = torch.eye(4)[2].expand(3, 4)
    assert_close(gates.grad[:, 2], routed_ffn(x, one, *weights, "silu").sum(-1), rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(0, 9), e=st.integers(1, 12), data=st.data())
def test_topk_gates_choose_exactly_k(tokens: int, e: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, e))
    scores = torch.randn(tokens, e)
    gates = topk_gates(scores, k)
    assert gates.sum(-1).eq(k).all()
    if k < e:
        low = scores.masked_fill(gates == 0, float("inf")).amin(-1)
        high = scores.masked_fill(gates == 1, float("-inf")).amax(-1)
        assert (low >= high).all()


def test_gates_are_straight_through() -> None:
    scores = torch.tensor([[2.0, -1.0]], requires_grad=True)
    gates = threshold_gates(scores)
    assert gates.tolist() == [[1.0, 0.0]]
    gates.sum().backward()
    p = torch.sigmoid(scores.detach())
    assert_close(scores.grad, p * (1 - p), rel=1e-6)


@pytest.mark.parametrize("window", [0, 3])
def test_cached_attention_in_pieces_equals_attention_at_once(window: int) -> None:
    """Prefill, a chunk, then single steps, for rows of different lengths."""
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    position = torch.arange(9)
    mask = position[None, :] <= position[:, None]
    if window:
        mask &= position[None, :] > position[:, None] - window
    repeat = lambda t: t.repeat_interleave(2, 1)  # noqa: E731
    expected = torch.nn.functional.scaled_dot_product_attention(q, repeat(k), repeat(v), attn_mask=mask, scale=0.3)
    caches = torch.zeros(2, 2, 12, 8), torch.zeros(2, 2, 12, 8)
    got, start = [], 0
    for size in (4, 3, 1, 1):
        part = slice(start, start + size)
        out, *caches = cached_attention(q[:, :, part], k[:, :, part], v[:, :, part], *caches, torch.full((2,), start), 0.3, window)
        got.append(out)
        start += size
    assert_close(torch.cat(got, 2), expected, rel=1e-5)
    ragged, *_ = cached_attention(q[:, :, :1], k[:, :, :1], v[:, :, :1], *caches, torch.tensor([0, 5]), 0.3, window)
    assert_close(ragged[0], v[0, :, :1].repeat_interleave(2, 0), rel=1e-5)  # nothing before it: attends to itself alone


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_keeps_lengths_and_depends_on_distance_only(interleaved: bool) -> None:
    angle = torch.arange(20)[:, None] * torch.tensor([1.0, 0.1, 0.01])
    x, y = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    turn = lambda t, p: rotary(t, angle.cos(), angle.sin(), torch.tensor([[p]]), interleaved)  # noqa: E731
    assert_close(turn(x, 7).norm(), x.norm(), rel=1e-5)
    assert torch.equal(turn(x, 7)[..., 6:], x[..., 6:])
    assert_close((turn(x, 9) * turn(y, 5)).sum(), (turn(x, 14) * turn(y, 10)).sum(), rel=1e-4)
