"""How much each layer may skip: by what the loss is when that layer alone is replaced by its stand-in."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from dyncomp.passes.depth_gates import Unit, shared_experts
from dyncomp.passes.least_squares import LeastSquares
from torch import Tensor

from dyncomp.errors import RequestError
from dyncomp.graph import Graph
from dyncomp.models.loaded import WRITES
from dyncomp.pipeline import Context
from dyncomp.regions import RoutedFFN
from dyncomp.regions.depth import Part
from dyncomp.regions.tokens import written_tokens
from dyncomp.sweep import Sweep, fast_matmul

STAND_IN_RIDGE = 0.1


def sensitivities(graph: Graph, units: Sequence[Unit], ctx: Context, *, windows: int, rank: int, experts: bool = False) -> list[float]:
    """Rise of the loss, in nats a token, when all tokens but the first skip one unit and get its stand-in; a unit each.

    Args:
        windows: calibration windows at the end that the loss is measured on; the stand-ins are fitted to the others.
        rank: of the stand-ins, their constant counted; 0 for none.
        experts: that the shared experts of an FFN stand in for it.
    """
    batches = ctx.need_calibration("skip-depth{blocks=auto}").batches
    fitted, measured = _apart(batches, windows)
    losses: list[float] = []
    with fast_matmul(), torch.no_grad():
        first, second = Sweep(graph, fitted), Sweep(graph, measured)
        whole = second.branch().advance(graph.output_nodes[0])
        for position, unit in enumerate(units):
            fork = None
            for part in unit.parts:
                x, y = first.advance(part.source), first.advance(part.result)
                ahead = second.advance(part.source) if fork is None else fork.advance(part.source)
                fork = second.branch() if fork is None else fork
                given = _of_experts(graph, part, fork) if experts else stand_in(x, y, ahead, rank)
                true = fork.branch().advance(part.result)
                fork.provide(part.result, [torch.cat([t[:, :1], g[:, 1:]], 1) for t, g in zip(true, given, strict=True)])
            assert fork is not None
            losses.append(_rise(graph, fork.advance(graph.output_nodes[0]), whole, measured))
            ctx.progress("skip-depth: sensitivity", position + 1, len(units))
    return losses


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
    if not rank:
        return [a.new_zeros(*a.shape[:-1], y[0].shape[-1]) for a in ahead]
    down, up, bias = fit_stand_in(x, y, rank)
    return [a @ down @ up + bias for a in ahead]


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


def _rise(graph: Graph, outputs: list[Any], whole: list[Any], batches: list[dict[str, Tensor]]) -> float:
    """Next-token loss for language models; half the squared relative change of the output for others."""
    if graph.info.get("task") not in WRITES:
        return sum(float((a - b).square().sum() / b.square().sum()) for a, b in zip(outputs, whole, strict=True)) / (2 * len(whole))
    rise = 0.0
    for a, b, batch in zip(outputs, whole, batches, strict=True):
        ids = written_tokens(graph, batch)[:, 1:].flatten()
        rise += float(F.cross_entropy(a[:, :-1].flatten(0, 1), ids) - F.cross_entropy(b[:, :-1].flatten(0, 1), ids))
    return rise / len(batches)


def allocate(losses: Sequence[float], total: float, power: float = 1.6, *, most: float = 1.0) -> list[float]:
    """Shares from 0 to ``most`` that add up to ``total``, minimising ``sum of losses * share ** power``.

    A layer that loses s when every token skips it loses about s * share ** power when the easiest tokens do: above 1, since its router
    chooses, so that the first tokens to skip cost less than the last. Equal marginal loss then means shares in proportion to
    s ** (1 / (1 - power)). SmolLM2-135M, 12.5 % of the visits to layers skipped, fitted to 16384 tokens, KL on held-out text and on
    another source: .218 and .222 at 1.2 (two layers are dropped), .186 and .167 at 1.6, .188 and .177 at 2.2.
    """
    floor = 1e-4  # nats: what a few windows can tell from nothing
    weights = torch.tensor([max(loss, floor) for loss in losses], dtype=torch.float64) ** (1 / (1 - power))
    low, high = 0.0, float(1 / weights.min()) if len(losses) else 0.0
    for _ in range(100):  # the shares grow with the factor
        middle = (low + high) / 2
        if float((middle * weights).clamp(max=most).sum()) < total:
            low = middle
        else:
            high = middle
    return (high * weights).clamp(max=most).tolist()


def quantile(scores: Tensor, share: float) -> float:
    """The threshold that a fraction ``share`` of the scores [n] does not exceed."""
    ordered = scores.sort().values
    rank = min(round(share * len(ordered)), len(ordered)) - 1
    if rank < 0:
        return float(ordered[0]) - 1.0
    return float(ordered[rank]) + (ALL_SKIP if rank == len(ordered) - 1 else 0.0)  # on other text too


ALL_SKIP = 1e3
"""Above every score: a part that no token is to run."""
