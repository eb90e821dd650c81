"""How much each layer may skip: by what the loss is when that layer alone is replaced by its stand-in."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from dyncomp.passes.budgets import Reference
from dyncomp.passes.depth_gates import Unit, shared_experts
from dyncomp.passes.least_squares import LeastSquares
from torch import Tensor

from dyncomp.errors import RequestError
from dyncomp.graph import Graph
from dyncomp.models.loaded import WRITES
from dyncomp.pipeline import Context
from dyncomp.regions import RoutedFFN
from dyncomp.regions.depth import Part
from dyncomp.sweep import Sweep, fast_matmul

STAND_IN_RIDGE = 0.1


@dataclass(frozen=True)
class Curve:
    """What is lost by how many tokens skip a unit, those first of which its router says that they lose least.

    Args:
        loss: in nats a token, when all skip.
        order: [tokens] the squared errors that skipping leaves, in that order of the tokens.
    """

    loss: float
    order: Tensor

    def steps(self) -> list[tuple[float, float]]:
        """(share of the tokens, loss a share) of the pieces of its lower convex envelope on :data:`PIECES` equal shares, left to right."""
        known = torch.cat([self.order.new_zeros(1), self.order.cumsum(0)])
        points = [(i / PIECES, float(known[round(i * len(self.order) / PIECES)] / known[-1].clamp_min(1e-12))) for i in range(PIECES + 1)]
        hull: list[tuple[float, float]] = []
        for x, y in points:
            while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (y - hull[-2][1]) * (hull[-1][0] - hull[-2][0]):
                hull.pop()
            hull.append((x, y))
        return [(x - u, max(self.loss, FLOOR) * (y - v) / (x - u)) for (u, v), (x, y) in itertools.pairwise(hull)]


PIECES = 64
FLOOR = 1e-5
"""Nats: what a few windows can tell from nothing."""


def curves(graph: Graph, units: Sequence[Unit], ctx: Context, *, windows: int, rank: int, experts: bool = False) -> list[Curve]:
    """What each unit alone costs when tokens (but for the first) skip it and get its stand-in.

    The loss when all skip is measured to the end of the model, as the divergence from its own predictions: on as few tokens, differences
    of cross entropies are mostly noise. What part of it the first tokens in a router's order cost, is their part of the squared error.

    Args:
        windows: calibration windows at the end that are measured on; stand-ins and routers are fitted to the others.
        rank: of the stand-ins, their constant counted; 0 for none.
        experts: that the shared experts of an FFN stand in for it.
    """
    batches = ctx.need_calibration("skip-depth{blocks=auto}").batches
    fitted, measured = _apart(batches, windows)
    found: list[Curve] = []
    with fast_matmul(), torch.no_grad():
        first, second = Sweep(graph, fitted), Sweep(graph, measured)
        difference = _difference(graph, second.branch().advance(graph.output_nodes[0]))
        for position, unit in enumerate(units):
            fork = None
            left: dict[Sweep, list[Tensor]] = {}
            for part in unit.parts:
                x = first.advance(part.source)
                fork = second.branch() if fork is None else fork
                ahead = fork.advance(part.source)
                if part is unit.parts[0]:
                    streams = {s: s.values(part.stream) if s.has(part.stream) else s.values(part.source) for s in (first, fork)}
                    energy = {s: [v.square().sum(-1) for v in values] for s, values in streams.items()}
                    sources = {first: x, fork: ahead}
                if experts:
                    given = {s: _of_experts(graph, part, s) for s in (first, fork)}
                true = {first: first.advance(part.result), fork: fork.branch().advance(part.result)}
                if not experts:
                    given = dict(zip((first, fork), _stand_ins(x, true[first], (x, ahead), rank), strict=True))
                for s in (first, fork):
                    missing = [t - g for t, g in zip(true[s], given[s], strict=True)]
                    left[s] = [a + b for a, b in zip(left[s], missing, strict=True)] if s in left else missing
                fork.provide(part.result, [torch.cat([t[:, :1], g[:, 1:]], 1) for t, g in zip(true[fork], given[fork], strict=True)])
            assert fork is not None
            errors = {s: [v.square().sum(-1) / e.clamp_min(1e-12) for v, e in zip(left[s], energy[s], strict=True)] for s in left}
            weight, bias = fit_scores(sources[first], errors[first])
            scores = torch.cat([(v @ weight + bias)[:, 1:].flatten() for v in sources[fork]])
            lost = torch.cat([e[:, 1:].flatten() for e in errors[fork]])
            found.append(Curve(difference(fork.advance(graph.output_nodes[0])), lost[scores.argsort()]))
            ctx.progress("skip-depth: sensitivity", position + 1, len(units))
    return found


def fit_scores(source: list[Tensor], errors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Ridge regression of the logarithm of each token's error [B, S] on what a router reads [B, S, d], the first token left out:
    (weight [d, 1], bias [1])."""
    problem = LeastSquares(source[0].shape[-1], 1)
    for x, error in zip(source, errors, strict=True):
        problem.add(x[:, 1:].flatten(0, 1), (error[:, 1:].flatten()[:, None] + 1e-8).log())
    return problem.solve(1e-2)


def _of_experts(graph: Graph, part: Part, sweep: Sweep) -> list[Tensor]:
    """What the shared experts of a routed FFN give, [B, S, d_out] a batch, where the sweep is."""
    shared = shared_experts(graph, part)
    assert isinstance(part.ffn, RoutedFFN)
    assert shared is not None
    fork = sweep.branch()
    fork.provide(part.ffn.gates, [shared.expand(*x.shape[:-1], -1) for x in sweep.values(part.source)])
    return fork.advance(part.result)


def stand_in(x: list[Tensor], y: list[Tensor], ahead: list[Tensor], rank: int) -> list[Tensor]:
    """What a low-rank map fitted from ``x`` to ``y`` gives on ``ahead``; zeros at rank 0. All [B, S, features] a batch.

    Args:
        rank: of the map, its constant counted.
    """
    return _stand_ins(x, y, (ahead,), rank)[0]


def _stand_ins(x: list[Tensor], y: list[Tensor], places: Sequence[list[Tensor]], rank: int) -> list[list[Tensor]]:
    if not rank:
        return [[a.new_zeros(*a.shape[:-1], y[0].shape[-1]) for a in ahead] for ahead in places]
    down, up, bias = fit_stand_in(x, y, rank)
    return [[a @ down @ up + bias for a in ahead] for ahead in places]


def fit_stand_in(x: list[Tensor], y: list[Tensor], rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(down [features, rank - 1], up [rank - 1, d_out], bias [d_out]) of the low-rank map from ``x`` to ``y``, [B, S, …] a batch."""
    problem = LeastSquares(x[0].shape[-1], y[0].shape[-1])
    for a, b in zip(x, y, strict=True):
        problem.add(a.flatten(0, 1), b.flatten(0, 1))
    return problem.solve_low_rank(STAND_IN_RIDGE, rank - 1)


def _apart(batches: Sequence[dict[str, Tensor]], windows: int) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """(to fit on, to measure on): the last windows are measured on."""
    single = [{name: v[i : i + 1] for name, v in batch.items()} for batch in batches for i in range(len(next(iter(batch.values()))))]
    if len(single) < 2 * windows:
        raise RequestError(f"skip-depth measures on {windows} calibration windows, and there are {len(single)}", hint="raise --tokens")

    def pieces(part: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        alike = (list(group) for _, group in itertools.groupby(part, lambda row: [v.shape for v in row.values()]))
        fours = (group[i : i + 4] for group in alike for i in range(0, len(group), 4))
        return [{name: torch.cat([row[name] for row in four]) for name in four[0]} for four in fours]

    return pieces(single[:-windows]), pieces(single[-windows:])


def _difference(graph: Graph, whole: list[Any]) -> Callable[[list[Any]], float]:
    """A measure of other outputs than these: the divergence of next-token distributions, for language models; half the squared relative
    change of the output for others."""
    if graph.info.get("task") in WRITES:
        known = [Reference(logits) for logits in whole]
        return lambda outputs: sum(r.divergence(y) for r, y in zip(known, outputs, strict=True)) / len(known)

    def change(outputs: list[Any]) -> float:
        return sum(float((a - b).square().sum() / b.square().sum()) for a, b in zip(outputs, whole, strict=True)) / (2 * len(whole))

    return change


def allocate(found: Sequence[Curve], total: float, *, most: float = 1.0) -> list[float]:
    """Shares from 0 to ``most`` that add up to ``total``, at the least sum of losses: another token costs the same in every unit
    (Everett, 1963)."""
    steps = [(price, unit, share) for unit, curve in enumerate(found) for share, price in curve.steps()]
    shares = [0.0] * len(found)
    for _, unit, share in sorted(steps):
        taken = max(min(share, total, most - shares[unit]), 0.0)
        shares[unit] += taken
        total -= taken
    return shares


def quantile(scores: Tensor, share: float) -> float:
    """The threshold that a fraction ``share`` of the scores [n] does not exceed."""
    ordered = scores.sort().values
    rank = min(round(share * len(ordered)), len(ordered)) - 1
    if rank < 0:
        return float(ordered[0]) - 1.0
    return float(ordered[rank]) + (ALL_SKIP if rank == len(ordered) - 1 else 0.0)  # on other text too


ALL_SKIP = 1e3
"""Above every score: a part that no token is to run."""
