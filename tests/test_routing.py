"""Routing families: what gates must be, their gradients, a toy task that each learns, and each inside whole models."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from dyncomp.backends.native import available
from dyncomp.backends.ort.lower import lower
from dyncomp.backends.ort.parity import parity
from dyncomp.backends.ort.run import OrtModel
from dyncomp.passes import AddKVCache, FitRouter, Heal, SoftMoE, Upcycle
from helpers import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from test_heal import QUICK, assert_same, trained
from test_passes import context
from torch import Tensor
from torch.autograd import gradcheck

from bench.tiny import ARCHITECTURES, built, sample, tokens, trace_tiny
from dyncomp import routing
from dyncomp.errors import RequestError
from dyncomp.evaluate import evaluate, load_summary
from dyncomp.graph import Graph
from dyncomp.heal import Settings, Trainer, state
from dyncomp.ops import routed_ffn_reference, threshold_gates, topk_gates
from dyncomp.pipeline import Context, Pipeline, parse_passes
from dyncomp.regions import find_regions, find_routed
from dyncomp.regions.router import find_scores
from dyncomp.regions.tokens import random_inputs
from dyncomp.regions.weighting import Weighting, find_weighting
from dyncomp.report.tables import notes
from dyncomp.serialize import load_graph, save_graph
from dyncomp.sweep import Sweep
from dyncomp.trace import trace

EXPERTS = 8


def bias() -> Tensor:
    return torch.linspace(-0.2, 0.2, EXPERTS, dtype=torch.float64)


def deepseek_v3(scores: Tensor, k: int = 2) -> Tensor:
    return routing.deepseek_v3(scores, bias().to(scores), k, groups=4, kept=2)


def tree(scores: Tensor, k: int = 2) -> Tensor:
    """Groups of two, scored by the sum of what their experts score."""
    return routing.tree(scores.unflatten(-1, (-1, 2)).sum(-1), scores, k, kept=2)


WEIGHTED: dict[str, Callable[..., Tensor]] = {"top_k": routing.top_k, "deepseek_v3": deepseek_v3, "tree": tree}
COUNTED: dict[str, Callable[..., Tensor]] = {
    **WEIGHTED, "group_top_k": partial(routing.group_top_k, groups=4, kept=2), "sinkhorn": routing.sinkhorn_top_k,
    "tempered": partial(routing.tempered_top_k, temper=2),
}  # fmt: skip
CAUSAL = [*WEIGHTED, "group_top_k", "tempered"]
ACROSS = {"expert_choice": partial(routing.expert_choice, share=0.25), "sinkhorn": partial(routing.sinkhorn_top_k, k=2)}


def scores_of(seed: int, *shape: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, EXPERTS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- what gates must be --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", COUNTED)
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 4), length=st.integers(1, 9))
def test_every_token_runs_k_experts(family: str, seed: int, k: int, length: int) -> None:
    gates = COUNTED[family](scores_of(seed, 2, length), k=k)
    assert (gates != 0).sum(-1).eq(k).all()
    assert (gates >= 0).all()
    total = torch.ones(2, length, dtype=torch.float64)
    assert_close(gates.sum(-1), total if family in WEIGHTED else k * total, rel=1e-12)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 4))
def test_experts_are_the_best_of_the_best_groups(seed: int, k: int) -> None:
    scores = scores_of(seed, 5)
    for row, gates in zip(scores.tolist(), routing.group_top_k(scores, k, 4, 2).tolist(), strict=True):
        best = sorted(range(4), key=lambda g: -(row[2 * g] + row[2 * g + 1]))[:2]
        allowed = sorted((e for g in best for e in (2 * g, 2 * g + 1)), key=lambda e: -row[e])
        assert {e for e in range(EXPERTS) if gates[e]} == set(allowed[:k])


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 4), shift=st.floats(-3, 3))
def test_groups_are_told_apart_by_their_scores_alone(seed: int, k: int, shift: float) -> None:
    """Few groups a token; what all experts have in common changes nothing; groups in another order are chosen in that order."""
    scores, order = scores_of(seed, 5), torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    gates = routing.group_top_k(scores, k, 4, 2).unflatten(-1, (4, 2))
    assert (gates.sum(-1) > 0).sum(-1).le(2).all()
    assert torch.equal(routing.group_top_k(scores + shift, k, 4, 2).unflatten(-1, (4, 2)), gates)
    moved = routing.group_top_k(scores.unflatten(-1, (4, 2))[:, order].flatten(-2), k, 4, 2)
    assert torch.equal(moved.unflatten(-1, (4, 2)), gates[:, order])


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 3), skew=st.floats(0, 3))
def test_token_choice_is_evened_by_its_bias(seed: int, k: int, skew: float) -> None:
    """Whatever experts are favoured, and as far as tokens differ at all: the load moves towards an even one."""
    scores, bias = scores_of(seed, 256, scale=1.0) + skew * torch.linspace(0, 1, EXPERTS), torch.zeros(EXPERTS)
    loads = []
    for _ in range(200):
        loads.append(topk_gates(scores + bias, k).mean(0))
        bias = bias + routing.bias_step(loads[-1], 0.02)
    assert all(float(load.sum()) == pytest.approx(k) for load in (loads[0], loads[-1])), "every token runs k experts before and after"
    uneven = [float(load.max() - load.min()) for load in (loads[0], loads[-1])]
    assert uneven[1] < max(0.08, 0.5 * uneven[0]), uneven


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), collapsed=st.integers(0, EXPERTS - 1))
def test_the_balance_loss_is_one_for_an_even_load_and_what_one_expert_costs_for_a_collapsed_one(seed: int, collapsed: int) -> None:
    scores = scores_of(seed, 64)
    even = torch.eye(EXPERTS).repeat(8, 1)
    assert float(routing.balance_loss(scores, even)) == pytest.approx(1, rel=1e-5)
    chance = scores.float().sigmoid().mean(0)
    alone = torch.zeros(64, EXPERTS).index_fill(1, torch.tensor([collapsed]), 1.0)
    assert float(routing.balance_loss(scores, alone)) == pytest.approx(float(EXPERTS * chance[collapsed] / chance.sum()), rel=1e-5)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 3), skew=st.floats(1, 6))
def test_balanced_assignment_loads_no_expert_more_than_plain_choice(seed: int, k: int, skew: float) -> None:
    scores = scores_of(seed, 128, scale=1.0) + skew * torch.linspace(0, 1, EXPERTS)
    plain, even = (gates.sum(0).max() for gates in (topk_gates(scores, k), routing.sinkhorn_top_k(scores, k)))
    assert even <= plain
    assert even <= 2 * k * 128 / EXPERTS, "about an even share"


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), shared=st.integers(0, 2), k=st.integers(1, 3), factor=st.floats(0.5, 8))
def test_shared_experts_stand_outside_of_groups_weights_and_bias(seed: int, shared: int, k: int, factor: float) -> None:
    others = EXPERTS
    scores = torch.cat([torch.full((5, shared), -50.0, dtype=torch.float64), scores_of(seed, 5)], -1)
    shift = torch.cat([torch.full((shared,), -9.0, dtype=torch.float64), bias()])
    gates = routing.deepseek_v3(scores, shift, k, 4, 2, shared=shared, factor=factor)
    assert gates.shape == (5, shared + others)
    assert gates[:, :shared].eq(1).all()
    assert_close(gates[:, shared:], factor * routing.deepseek_v3(scores[:, shared:], bias(), k, 4, 2), rel=1e-12)
    parts = routing.deepseek_v3_parts(scores, shift, k, 4, 2, shared=shared)
    assert torch.equal(parts, (gates != 0).double())


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 4), temper=st.integers(1, 14))
def test_cold_gates_are_near_one_and_of_the_best(seed: int, k: int, temper: int) -> None:
    scores = scores_of(seed, 5)
    gates = routing.tempered_top_k(scores, k, temper)
    assert torch.equal(gates > 0, topk_gates(scores, k) > 0)
    assert (gates[gates > 0] - 1).abs().max() <= math.expm1(float(scores.max() - scores.min()) * 2.0**-temper)


@settings(deadline=None, max_examples=10)
@given(
    seed=st.integers(0, 10**6), k=st.integers(2, 4), temper=st.integers(0, 10), groups=st.sampled_from([1, 2, 4]),
    function=st.sampled_from(["softmax", "sigmoid"]), normalised=st.booleans(), always=st.integers(0, 2),
)  # fmt: skip
def test_what_gates_follow_from_is_found_by_trying(
    seed: int, k: int, temper: int, groups: int, function: str, normalised: bool, always: int
) -> None:
    wanted = Weighting(function, normalised, 2.0**-temper, 1.5, groups, max(1, groups // 2))
    moved = torch.randn(EXPERTS, generator=torch.Generator().manual_seed(seed)) / 8 if function == "sigmoid" else None

    class Gates(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            gates = wanted.gates(torch.nn.functional.linear(x, torch.eye(EXPERTS + always))[..., always:], k, moved)
            return torch.cat([torch.ones_like(x[..., :always]), gates], -1)

    x = torch.randn(2, 16, EXPERTS + always)
    graph = trace(Gates(), {"x": x}, {"x": {0: "batch", 1: "sequence"}}, info={})
    scores = next(n for n in graph.nodes if n.target is torch.ops.aten.linear.default)
    assert find_weighting(graph, graph.output_nodes[0], scores, always, moved) == (wanted, k)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6))
def test_a_tree_multiplies_probabilities(seed: int) -> None:
    coarse, scores = scores_of(seed, 5)[:, :4], scores_of(seed + 1, 5)
    likely = (coarse.softmax(-1)[..., None] * scores.unflatten(-1, (4, 2)).softmax(-1)).flatten(-2)
    gates = routing.tree(coarse, scores, k=3, kept=4)
    kept = torch.where(gates > 0, likely, 0.0)
    assert_close(gates, kept / kept.sum(-1, keepdim=True), rel=1e-9)
    assert torch.equal(gates > 0, topk_gates(likely, 3) > 0)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), parts=st.integers(1, 4))
def test_parts_have_their_experts_gate_or_none(seed: int, parts: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gates = routing.top_k(torch.randn(7, 6, generator=generator), 2).requires_grad_()
    scores = torch.randn(7, parts * 6, generator=generator).requires_grad_()
    found = routing.parts_of(gates, scores)
    assert torch.equal(found.unflatten(-1, (parts, 6)), gates[:, None] * (scores.unflatten(-1, (parts, 6)) > 0))
    found.sum().backward()
    assert gates.grad is not None
    assert scores.grad is not None
    assert torch.equal(gates.grad, (scores > 0).float().unflatten(-1, (parts, 6)).sum(1))
    assert bool(((scores.grad != 0) == (gates.repeat(1, parts) != 0)).all()), "closed parts learn too, of the experts that ran"


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), length=st.integers(1, 20), share=st.floats(0.05, 1))
def test_experts_that_choose_have_equal_loads_and_take_the_best(seed: int, length: int, share: float) -> None:
    scores = scores_of(seed, 2, length)
    gates = routing.expert_choice(scores, share)
    room = max(1, round(length * share))
    assert abs(gates.sum(-2) - room).max() <= 1  # a half may be rounded either way
    assert len(gates.sum(-2).unique()) == 1
    assert (torch.where(gates == 1, scores, math.inf).amin(-2) >= torch.where(gates == 0, scores, -math.inf).amax(-2)).all()


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 10**6))
def test_sinkhorn_evens_what_plain_scores_do_not(seed: int) -> None:
    scores = scores_of(seed, 64, scale=1.0) + torch.linspace(0, 4, EXPERTS)  # everyone wants the last
    plan = routing.sinkhorn(scores, 200).exp()
    assert_close(plan.sum(-1), torch.ones(64, dtype=torch.float64), rel=1e-9)
    assert_close(plan.sum(-2), torch.full((EXPERTS,), 8.0, dtype=torch.float64), rel=1e-3)
    most = {k: f(scores).sum(-2).max() for k, f in (("plain", partial(topk_gates, k=1)), ("even", partial(routing.sinkhorn_top_k, k=1)))}
    assert most["even"] < 0.6 * most["plain"]


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), length=st.integers(1, 30), factor=st.floats(0.2, 3))
def test_no_expert_takes_more_than_its_capacity(seed: int, length: int, factor: float) -> None:
    gates = routing.top_k(scores_of(seed, length), 2)
    kept = routing.within_capacity(gates, factor)
    room = math.ceil(round(2 * length / EXPERTS * factor, 9))
    assert (kept != 0).sum(0).max() <= room
    dropped = (gates != 0) & (kept == 0)
    assert (torch.where(dropped, (gates != 0).cumsum(0), room + 1) > room).all(), "dropped before it was full"
    assert torch.equal(kept[~dropped], gates[~dropped])
    assert torch.equal(routing.within_capacity(gates, EXPERTS), gates), "room for everyone"


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), vocabulary=st.integers(1, 100), k=st.integers(1, EXPERTS))
def test_hashing_serves_as_many_ids_with_each_expert(seed: int, vocabulary: int, k: int) -> None:
    table = routing.hash_table(vocabulary, EXPERTS, k, seed=seed)
    assert (table != 0).sum(1).eq(k).all()
    assert_close(table.sum(1), torch.ones(vocabulary), rel=1e-6)
    served = (table != 0).sum(0)
    assert served.max() - served.min() <= k
    assert torch.equal(table, routing.hash_table(vocabulary, EXPERTS, k, seed=seed))


def test_soft_weights_are_distributions_over_tokens_and_over_slots() -> None:
    dispatch, combine = routing.soft(scores_of(0, 2, 5))
    assert_close(dispatch.sum(-2), torch.ones(2, EXPERTS, dtype=torch.float64), rel=1e-12)
    assert_close(combine.sum(-1), torch.ones(2, 5, dtype=torch.float64), rel=1e-12)
    assert (dispatch > 0).all()


def test_what_is_causal_and_what_is_not() -> None:
    """Gates of the first tokens, with two different continuations; and sequences of a batch do not see each other."""
    a, b = scores_of(1, 12), torch.cat([scores_of(1, 12)[:6], scores_of(2, 6) + 3])
    for name in CAUSAL:
        assert torch.equal(COUNTED[name](a, k=2)[:6], COUNTED[name](b, k=2)[:6]), name
    for name, family in ACROSS.items():
        assert not torch.equal(family(a)[:6], family(b)[:6]), name
        assert torch.equal(family(torch.stack([a, b]))[0], family(a)), name


def test_noise_has_the_deviation_asked_for() -> None:
    torch.manual_seed(0)
    scores = scores_of(0, 1).expand(20_000, -1)
    changed = routing.noisy(scores, 0.5) - scores
    assert_close(changed.std(0), 0.5 * scores.std(-1)[0].expand(EXPERTS), rel=0.05)
    assert changed.mean(0).abs().max() < 0.05


# ---- gradients -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", [*WEIGHTED, "sinkhorn plan", "soft", "z_loss", "balance_loss"])
def test_gradients_are_exact(family: str) -> None:
    smooth = {**{name: partial(f, k=2) for name, f in WEIGHTED.items()}, "sinkhorn plan": routing.sinkhorn, "soft": routing.soft}
    function = smooth.get(family)
    scores = scores_of(3, 5).requires_grad_()
    if function is not None:
        assert gradcheck(function, (scores,))
        return
    # the losses compute in float32
    loss = {"z_loss": routing.z_loss, "balance_loss": lambda s: routing.balance_loss(s, topk_gates(s.detach(), 2))}[family]
    direction = scores_of(4, 5)
    (grad,) = torch.autograd.grad(loss(scores), scores)
    with torch.no_grad():
        slope = (loss(scores + 0.01 * direction) - loss(scores - 0.01 * direction)) / 0.02
    assert float(slope) == pytest.approx(float((grad * direction).sum()), rel=1e-2)


def test_gradients_within_a_capacity_are_exact() -> None:
    scores = scores_of(5, 12).requires_grad_()
    limited = lambda s: routing.within_capacity(routing.top_k(s, 2), 1.0)  # noqa: E731
    dropped = (limited(scores) == 0) & (routing.top_k(scores, 2) != 0)
    assert 0 < int(dropped.sum()) < 24
    assert gradcheck(limited, (scores,))
    weight = torch.rand(12, EXPERTS, dtype=torch.float64) * dropped
    (grad,) = torch.autograd.grad((limited(scores) * weight).sum(), scores)
    assert not grad.any(), "what is dropped teaches nothing"


def test_gradients_of_noisy_gates_are_those_at_the_scores_that_the_noise_made() -> None:
    """The noise is a constant: its size follows the scores, and no gradient goes through that."""
    scores, weight = scores_of(6, 5).requires_grad_(), torch.rand(5, EXPERTS, dtype=torch.float64)
    torch.manual_seed(7)
    noise = (routing.noisy(scores, 0.5) - scores).detach()
    assert gradcheck(lambda s: routing.top_k(s + noise, 2), (scores,))
    (wanted,) = torch.autograd.grad((routing.top_k(scores + noise, 2) * weight).sum(), scores)
    torch.manual_seed(7)
    (grad,) = torch.autograd.grad((routing.top_k(routing.noisy(scores, 0.5), 2) * weight).sum(), scores)
    assert_close(grad, wanted, rel=1e-12)
    assert noise.abs().max() > 0.1


def test_gates_of_parts_have_the_gradient_of_normalised_weights() -> None:
    scores, weight = scores_of(0, 6).requires_grad_(), torch.rand(6, EXPERTS, dtype=torch.float64)
    parts = routing.deepseek_v3_parts(scores, bias(), 2, 3, 2, shared=2)
    weighted = routing.deepseek_v3(scores, bias(), 2, 3, 2, shared=2, factor=2.0)
    (grad,), (wanted,) = (torch.autograd.grad((gates * weight).sum(), scores) for gates in (parts, weighted))
    assert_close(grad, wanted, rel=1e-12)
    assert not grad[:, :2].any()
    assert gradcheck(lambda s: routing.deepseek_v3(s, bias(), 2, 3, 2, shared=2, factor=2.0), (scores,))


def test_gates_of_one_teach_all_the_same() -> None:
    """Top-1 has weight 1 and the gradient of its log-probability; experts that choose pass on what their open gates get."""
    scores = scores_of(0, 6).requires_grad_()
    gates = routing.top_k(scores, 1)
    assert torch.equal(gates.detach(), topk_gates(scores.detach(), 1))
    weight = torch.rand(6, EXPERTS, dtype=torch.float64)
    (grad,) = torch.autograd.grad((gates * weight).sum(), scores, retain_graph=True)
    logs = scores.log_softmax(-1)
    (wanted,) = torch.autograd.grad((logs * weight * gates.detach()).sum(), scores)
    assert_close(grad, wanted, rel=1e-12)
    opened = routing.expert_choice(scores, 0.5)
    (grad,) = torch.autograd.grad((opened * weight).sum(), scores)
    assert_close(grad, weight * opened.detach(), rel=1e-12)
    for straight in (routing.group_top_k(scores, 2, 4, 2), routing.sinkhorn_top_k(scores, 2)):
        assert torch.autograd.grad((straight * weight).sum(), scores)[0].abs().sum() > 0


def test_the_bias_that_chooses_is_no_part_of_the_weights_and_evens_the_load() -> None:
    scores = scores_of(0, 256, scale=0.5) + torch.linspace(0, 2, EXPERTS)
    shift = torch.zeros(EXPERTS, dtype=torch.float64, requires_grad=True)
    gates = routing.deepseek_v3(scores, shift, 2, 1, 1)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gates.sum().backward()
    loads = []
    with torch.no_grad():
        for _ in range(150):
            loads.append((routing.deepseek_v3(scores, shift, 2, 1, 1) != 0).double().mean(0))
            shift += routing.bias_step(loads[-1], 0.01)
        affinity = scores.sigmoid()
        gates = routing.deepseek_v3(scores, shift, 2, 1, 1)
        kept = torch.where(gates > 0, affinity, 0.0)
    assert loads[0].max() > 0.5
    assert loads[-1].max() - loads[-1].min() < 0.1
    assert_close(gates, kept / kept.sum(-1, keepdim=True), rel=1e-12)


# ---- a toy task ----------------------------------------------------------------------------------------------------
def toy(seed: int = 0, clusters: int = 4, width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """(x [B, S, d], clusters [B, S], y): around each of a few centres another linear map."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(clusters, (4, 48), generator=generator)
    centres = 1.5 * torch.randn(clusters, width, generator=generator)
    x = centres[which] + 0.7 * torch.randn(4, 48, width, generator=generator)
    maps = torch.randn(clusters, width, width, generator=generator) / width**0.5
    return x, which, torch.einsum("bsd,bsed->bse", x, maps[which])


def learn(gates_of: Callable[[Tensor, Tensor], Tensor], *, shuffled: bool = False, balance: float = 0.0, steps: int = 150) -> float:
    """Relative squared error of linear experts trained under these gates of (scores, clusters); shuffled: gates of other tokens."""
    torch.manual_seed(0)
    x, which, y = toy()
    width = x.shape[-1]
    router = torch.nn.Parameter(torch.randn(EXPERTS, width) / width**0.5)
    up = torch.nn.Parameter(torch.randn(EXPERTS, width, width) / width**0.5)
    down = torch.eye(width).expand(EXPERTS, width, width)
    optimizer = torch.optim.Adam([router, up], lr=0.03)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        scores = x @ router.T
        gates = gates_of(scores, which)
        even = balance * routing.balance_loss(scores, gates)
        if shuffled:
            gates = gates.flatten(0, 1)[torch.randperm(192, generator=generator)].view_as(gates)
        loss = (routed_ffn_reference(x, gates, up, None, down, "identity") - y).square().mean() / y.square().mean()
        optimizer.zero_grad()
        (loss + even).backward()
        optimizer.step()
    return float(loss.detach())


def quarter(scores: Tensor) -> Tensor:
    """Gates of the highest quarter of all scores of a batch, as training holds thresholds to their share."""
    return threshold_gates(scores - scores.detach().flatten().quantile(0.75))


TOY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "threshold": lambda s, _: quarter(s),
    "relative": lambda s, _: quarter(s - s.amax(-1, keepdim=True)),
    "switch": lambda s, _: routing.top_k(s, 1),
    "noisy": lambda s, _: routing.top_k(routing.noisy(s, 0.3), 1),
    "capacity": lambda s, _: routing.within_capacity(routing.top_k(s, 2), 2.0),
    **{name: lambda s, _, f=f: f(s, k=2) for name, f in COUNTED.items()},
    "expert_choice": lambda s, _: routing.expert_choice(s, 0.25),
    "hash": lambda s, which: torch.nn.functional.embedding(which, routing.hash_table(4, EXPERTS, 2)),
}


@pytest.mark.parametrize("family", TOY)
def test_it_learns_what_random_routing_cannot(family: str) -> None:
    balance = 0.3 if family in ("switch", "noisy") else 0.0  # one expert a token: what wins first would win for good
    learned, by_chance = learn(TOY[family], balance=balance), learn(TOY[family], balance=balance, shuffled=True)
    assert learned < 0.4 * by_chance, (learned, by_chance)


def test_soft_experts_learn_what_random_mixtures_cannot() -> None:
    torch.manual_seed(0)
    x, _, y = toy()
    errors = []
    for shuffled in (False, True):
        slots, up = torch.randn(16, 8).requires_grad_(), (torch.randn(16, 8, 8) / 8**0.5).requires_grad_()
        optimizer = torch.optim.Adam([slots, up], lr=0.03)
        for _ in range(200):
            dispatch, combine = routing.soft(x @ slots.T)
            if shuffled:
                combine = combine[:, torch.randperm(48)]
            given = torch.einsum("bsp,bsd,ped->bpe", dispatch, x, up)
            loss = (combine @ given - y).square().mean() / y.square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        errors.append(float(loss.detach()))
    assert errors[0] < 0.5 * errors[1], errors


# ---- collapse ------------------------------------------------------------------------------------------------------
@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=16))
def test_spread_lies_between_collapse_and_even_use(loads: list[float]) -> None:
    assert 0 <= routing.spread(torch.tensor(loads)) <= 1


def test_spread_at_its_ends() -> None:
    assert routing.spread(torch.tensor([1.0, 1, 0, 0])) == pytest.approx(0), "the same two experts for every token"
    assert routing.spread(torch.full((4,), 0.5)) == pytest.approx(1)
    assert routing.spread(torch.ones(4)) == 1, "nothing is chosen"
    assert routing.spread(torch.zeros(4)) == 0
    assert 0.1 < routing.spread(torch.tensor([0.9, 0.9, 0.1, 0.1])) < 0.9


def test_a_collapsed_router_is_reported() -> None:
    graph, _ = converted("llama", "carve-experts{experts=8 shared=2 keep-dense=}, fit-router{gates=topk k=4}")
    quality = evaluate({"dense": graph}, tokens(4, 16), task="causal-lm")
    assert load_summary(list(quality.load["dense"].values()))["collapsed"] == 0
    region = find_routed(graph)[0]
    collapsed = graph.tensor(str(region.gates.args[0].args[2].target)).detach().clone()
    collapsed[2:4] += 100
    graph.add_tensor(str(region.gates.args[0].args[2].target), collapsed)
    loads = evaluate({"dense": graph}, tokens(4, 16), task="causal-lm").load["dense"]
    assert loads[region.name].spread == pytest.approx(0)
    summary = load_summary(list(loads.values()))
    assert (summary["collapsed"], summary["spread"]) == (1, pytest.approx(0))
    assert any("collapse: 1 routers" in line for line in notes({"quality": {"held out": {"load": summary}}}))


# ---- inside models -------------------------------------------------------------------------------------------------
def converted(name: str, spec: str) -> tuple[Graph, Context]:
    graph = trace_tiny(name)
    graph.info |= {"task": "causal-lm" if ARCHITECTURES[name].vocab else "encoder", "context_length": 64}
    ctx = context(name, graph)
    Pipeline(parse_passes(spec)).run(graph, ctx)
    return graph, ctx


def gates_in(graph: Graph, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Of every routed FFN."""
    seen: list[Tensor] = []
    for region in find_routed(graph):
        Sweep(graph, [inputs]).advance(graph.output_nodes[0], watch={region.gates: lambda _, value: seen.append(value)})
    return seen


@pytest.mark.parametrize("shared", [0, 2])
def test_fitted_gates_in_groups(shared: int) -> None:
    spec = f"carve-experts{{experts=8 shared={shared} keep-dense=}}, fit-router{{gates=group-topk groups=2 kept=1 k={2 + shared}}}"
    graph, ctx = converted("llama", spec + ", refit-down")
    for gates in gates_in(graph, ctx.probe):
        assert gates[..., :shared].eq(1).all()
        routed = gates[..., shared:].unflatten(-1, (2, -1))
        assert routed.sum((-2, -1)).eq(2).all()
        assert (routed.sum(-1) > 0).sum(-1).eq(1).all(), "one group a token"


@pytest.mark.parametrize("shared", [0, 2])
def test_experts_choose_in_an_encoder(shared: int) -> None:
    spec = f"carve-experts{{experts=8 shared={shared} keep-dense=}}, fit-router{{gates=expert-choice active=50%}}"
    graph, ctx = converted("bert", spec + ", refit-down")
    for gates in gates_in(graph, ctx.probe):
        assert gates[..., :shared].eq(1).all()
        assert gates[..., shared:].sum(1).eq(round(16 * (4 - shared) / (8 - shared))).all()


def test_what_looks_across_tokens_is_refused_for_decoders() -> None:
    graph = trace_tiny("llama")
    graph.info["task"] = "causal-lm"
    ctx = context("llama", graph)
    Pipeline(parse_passes("carve-experts{experts=8 keep-dense=}")).run(graph, ctx)
    for gates in ("expert-choice", "sinkhorn"):
        with pytest.raises(RequestError, match=f"gates={gates}.*has not seen yet\n.*gates=threshold"):
            Pipeline([FitRouter(gates=gates)]).run(graph, ctx)
    dense = trace_tiny("llama")
    dense.info["task"] = "causal-lm"
    with pytest.raises(RequestError, match=r"soft-moe.*has not seen yet"):
        Pipeline([SoftMoE()]).run(dense, ctx)


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
@pytest.mark.parametrize("options", [
    "k=1", "k=3", "gates=deepseek-v3", "gates=tree", "gates=hash", "parts=4 shared=1 experts=13 k=4", "gates=hash parts=2",
    "gates=deepseek-v3 parts=8 shared=2 experts=26 k=14 groups=2", "gates=tree parts=2 experts=16 k=4",
])  # fmt: skip
def test_copies_without_noise_are_the_dense_model(name: str, options: str) -> None:
    graph, _ = converted(name, f"upcycle{{noise=0 {options}}}")
    assert len(find_routed(graph)) == ARCHITECTURES[name].ffns
    _, inputs, dims = built(name)
    fresh = sample(inputs, dims, {"batch": 3, "sequence": 11}, seed=5)
    assert_close(graph(**fresh), trace_tiny(name)(**fresh), rel=1e-5)
    (upcycle,) = parse_passes(f"upcycle{{{options}}}")
    for gates in gates_in(graph, fresh):
        assert (gates != 0).sum(-1).eq(upcycle.k).all()
        assert gates[..., : upcycle.shared].eq(1).all()
        assert len((gates != 0).flatten(0, -2).unique(dim=0)) > 1, "tokens differ in what they choose"
    noisy, _ = converted(name, f"upcycle{{noise=0.05 {options}}}")
    error = (noisy(**fresh) - graph(**fresh)).abs().max() / graph(**fresh).abs().max()
    assert 1e-4 < error < 0.5


@pytest.mark.parametrize(
    "spec",
    [
        "upcycle{noise=0 experts=57 k=57 parts=8 shared=1 gates=deepseek-v3 groups=8 kept=8}",
        "carve-experts{experts=16 shared=2 keep-dense=}, fit-router{gates=deepseek-v3 k=16 groups=2 kept=2}",
    ],
)
def test_deepseek_v3_with_every_expert_is_the_dense_model(spec: str) -> None:
    graph, _ = converted("llama", spec)
    scores = [find_scores(graph, r) for r in find_routed(graph)]
    assert len(scores) == 2
    assert all(graph.tensor(str(s.args[1].target)).any() for s in scores), "a router that says something"
    fresh = {"input_ids": tokens(3, 11, seed=5)}
    assert_close(graph(**fresh), trace_tiny("llama")(**fresh), rel=1e-5)


def test_carved_experts_are_chosen_as_deepseek_v3_chooses() -> None:
    """Against the paper's equations, and a bias that keeps an expert away from every token."""
    graph, ctx = converted("llama", "carve-experts{experts=8 shared=2 keep-dense=}, fit-router{gates=deepseek-v3 groups=3 kept=2 k=4}")
    for count in (4, 0):
        region, bias = find_routed(graph)[0], f"{find_routed(graph)[0].name}.router.bias"
        x: list[Tensor] = []
        Sweep(graph, [ctx.probe]).advance(graph.output_nodes[0], watch={region.input: lambda _, value, x=x: x.append(value)})
        affinity = (x[0] @ graph.tensor(f"{region.name}.router.weight").T).sigmoid()[..., 2:]
        gates, chosen = gates_in(graph, ctx.probe)[0], (affinity + graph.tensor(bias)[2:]).unflatten(-1, (3, 2))
        best = chosen.sum(-1).topk(2, -1).indices
        allowed = torch.zeros_like(chosen).scatter(2, best[..., None].expand(-1, -1, -1, 2), 1.0).flatten(-2)
        wanted = torch.where(allowed == 1, chosen.flatten(-2), -math.inf)
        assert torch.equal(gates[..., 2:], topk_gates(wanted, 2))
        assert gates[..., :2].eq(1).all()
        assert (gates[..., 4].sum() > 0) == (count > 0)
        shifted = graph.tensor(bias).detach().clone()
        shifted[4] -= 10
        graph.add_tensor(bias, shifted)


def test_copies_refuse_what_they_cannot_be() -> None:
    for spec, message in (
        ("upcycle{gates=magic}", "unknown gates"), ("upcycle{k=9}", "9 of 8 experts"), ("upcycle{gates=tree groups=3}", "3 groups"),
        ("upcycle{parts=4 shared=1 experts=12}", "4 parts, 1 of them shared"), ("upcycle{parts=4 shared=4 k=4}", "4 of them shared"),
        ("upcycle{parts=8 k=8}", "1 of 1 copies"), ("upcycle{parts=2 experts=8 k=4 gates=tree groups=8}", "8 groups"),
        ("fit-router{gates=deepseek-v3 router=mlp}", "router=ridge"),
        ("fit-router{gates=group-topk kept=5}", "5 of 4 groups"), ("fit-router{gates=sinkhorn budgets=kl}", "cannot weigh"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=message):
            parse_passes(spec)
    graph, ctx = trace_tiny("vit"), Context()
    refused = Pipeline([Upcycle(gates="hash")]).run(graph, ctx)[0].result.refused
    assert len(refused) == ARCHITECTURES["vit"].ffns
    assert "does not read token ids" in refused[0].reason


def test_soft_experts_compute_mixtures() -> None:
    """Against the formula, with the constants of the first layer."""
    graph, ctx = converted("bert", "soft-moe{experts=2 slots=3 noise=0 keep-dense=1}")
    (region,) = find_routed(graph)
    dense = trace_tiny("bert")
    ffn = find_regions(dense).ffns[0]
    wanted = []
    Sweep(graph, [ctx.probe]).advance(graph.output_nodes[0], watch={region.input: lambda _, v: wanted.append(v)})
    (x,) = Sweep(dense, [ctx.probe]).advance(ffn.input)
    slots = graph.tensor(f"{ffn.name}.router.slots")
    logits = torch.nn.functional.normalize(x, dim=-1) @ slots.T
    assert_close(wanted[0], logits.softmax(1).transpose(1, 2) @ x, rel=1e-4)
    assert wanted[0].shape == (2, 6, 32)


PROGRAMS = {
    "llama groups, hash": "carve-experts{experts=8 shared=2 keep-dense=1}, fit-router{gates=group-topk groups=3 kept=2 k=5}, refit-down, "
    "upcycle{experts=4 gates=hash}",
    "llama tempered, copies": "carve-experts{experts=8 shared=2 keep-dense=1}, fit-router{gates=topk k=5 bias=false temper=2}, "
    "refit-down{bias=false}, upcycle",
    "llama deepseek, tree": "upcycle{gates=deepseek-v3 keep-dense=1}, upcycle{gates=tree}",
    "bert expert choice, soft": "carve-experts{experts=8 shared=2 keep-dense=1}, fit-router{gates=expert-choice active=80%}, "
    "soft-moe{experts=2}",
    "bert sinkhorn, switch": "carve-experts{experts=8 keep-dense=1}, fit-router{gates=sinkhorn k=3}, upcycle{k=1}",
}
BACKENDS = [False, pytest.param(True, marks=pytest.mark.skipif(not available(), reason="no C++ compiler here"))]


@pytest.mark.parametrize("native", BACKENDS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_routers_run_in_onnx_runtime(program: str, native: bool, tmp_path: Path) -> None:
    """Each two families, one a layer, as read back from a file; decoders with a KV cache."""
    made, _ = converted(program.split()[0], PROGRAMS[program])
    save_graph(made, tmp_path / "graph.json", tmp_path / "graph.safetensors")
    graph = load_graph(tmp_path / "graph.json", tmp_path / "graph.safetensors")
    assert graph.text() == made.text()
    if graph.info["task"] == "causal-lm":
        graph = graph.copy()
        assert not AddKVCache(context_length=64).run(graph, Context()).refused
        lower(graph, tmp_path, native=native)
        entry = parity(graph, OrtModel(tmp_path, threads=1))
        assert entry["relative_error"] <= 1e-5
        assert entry["greedy_tokens_equal"] == 1
        return
    lower(graph, tmp_path, native=native)
    model = OrtModel(tmp_path, threads=1)
    for batch, sequence in ((2, 24), (1, 1)):
        inputs = random_inputs(graph, {"batch": batch, "sequence": sequence})
        assert_close(torch.as_tensor(model.run(**inputs)["output"]), graph(**inputs), rel=1e-5)


# ---- healing -------------------------------------------------------------------------------------------------------
HEALED = {
    "deepseek-v3": ("llama", "upcycle{experts=4 noise=0.2 gates=deepseek-v3 groups=2 kept=1}", {"balance_rate": 0.01}),
    "fine-grained": (
        "llama", "upcycle{experts=13 k=4 parts=4 shared=1 noise=0.6 gates=deepseek-v3 kept=2}", {"balance_rate": 0.01},
    ),
    "switch": ("llama", "upcycle{experts=4 k=1 noise=0.2}", {"noise": 0.3, "capacity": 1.25, "balance": 0.01}),
    "soft": ("bert", "soft-moe{experts=2 slots=8}", {}),
}  # fmt: skip


@pytest.mark.parametrize("family", HEALED)
def test_converted_models_heal(family: str) -> None:
    name, spec, options = HEALED[family]
    graph, ctx = converted(name, spec)
    ctx.text = tokens(240, 16, seed=9)
    curve = Pipeline([Heal(steps=25, **QUICK, **options)]).run(graph, ctx)[0].result.facts["curve"]
    assert min(loss for _, loss in curve) < (0.95 if family == "soft" else 0.9) * curve[0][1], curve
    if "balance_rate" in options:
        moved = [t for n, t in graph.constants().items() if n.endswith("router.bias")]
        assert len(moved) == 2
        assert all(t.abs().max() >= 0.01 - 1e-6 for t in moved)  # up or down at each of an odd number of steps
    if family == "fine-grained":
        rows = [t[1:4] for n, t in graph.constants().items() if n.endswith("router.weight")]
        assert all((t[0] - t[1]).abs().max() > 0 for t in rows), "the parts of a copy go their own ways"


@pytest.mark.parametrize(("gates", "unit", "always"), [("group-topk", 1.0, 1e4), ("deepseek-v3", 0.3, 0.0)])
def test_the_bias_of_top_k_moves_towards_equal_load(gates: str, unit: float, always: float) -> None:
    """Nothing is learned (lr is next to 0): only biases move, and a router that everyone sends to the same experts spreads."""
    graph, ctx = converted("llama", f"carve-experts{{experts=8 shared=2 keep-dense=}}, fit-router{{gates={gates} groups=3 kept=2 k=4}}")
    ctx.text = tokens(64, 16, seed=9)
    for region in find_routed(graph):
        bias = graph.tensor(f"{region.name}.router.bias").detach().clone()
        bias[2:4] += 3.0 * unit
        graph.add_tensor(f"{region.name}.router.bias", bias)
    before = {n: u.spread for n, u in evaluate({"dense": graph}, ctx.text[:16], task="causal-lm").load["dense"].items()}
    settings = Settings(steps=30, balance_rate=0.2 * unit, **QUICK | {"lr": 1e-12, "evaluations": 1})
    trainer = Trainer(graph, ctx.dense, ctx.text[:-8], ctx.text[-8:], settings)
    trainer._at = state.Progressed(30)
    for step in range(30):
        trainer._step(step)
    trainer.weights.merge()
    after = {n: u.spread for n, u in evaluate({"dense": graph}, ctx.text[:16], task="causal-lm").load["dense"].items()}
    assert all(after[n] > before[n] + 0.1 for n in before), (before, after)
    for region in find_routed(graph):
        assert graph.tensor(f"{region.name}.router.bias")[:2].eq(always).all(), "those of shared experts stay"


@pytest.mark.parametrize("checkpoints", [False, True])
def test_noise_in_training_repeats_and_is_none_afterwards(checkpoints: bool) -> None:
    graph, ctx = converted("llama", "upcycle{experts=4 noise=0.2}")
    ctx.text = tokens(40, 16, seed=9)
    settings = Settings(steps=3, noise=0.5, capacity=1.0, checkpoints=checkpoints, **QUICK)
    first = trained(graph.copy(), ctx, settings)
    assert_same(trained(graph.copy(), ctx, settings), first)
    without = trained(graph.copy(), ctx, dataclasses.replace(settings, noise=0.0))
    assert any(not torch.equal(without[n], first[n]) for n in first)
    if checkpoints:
        assert_same(trained(graph.copy(), ctx, dataclasses.replace(settings, checkpoints=False)), first)
