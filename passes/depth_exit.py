"""Early exit: at some layers a token may leave, and skips all that come after."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from dyncomp.passes.depth_budget import quantile
from dyncomp.passes.depth_gates import GatedUnit, Unit
from dyncomp.passes.least_squares import LeastSquares
from torch import Tensor, fx

from dyncomp.errors import RequestError
from dyncomp.graph import Graph
from dyncomp.sweep import Sweep

TARGETS = ("kl", "entropy")
_POSITIONS = 64
"""Whose logits are compared at once."""


@dataclass(frozen=True)
class Segment:
    """What lies between one exit and the next.

    Attributes:
        unit: all parts of it, which share one gate: open for the tokens that have not left by then.
        units: how many units it holds.
        share: of the tokens that have left.
    """

    unit: Unit
    units: int
    share: float


def segments(units: Sequence[Unit], exits: Sequence[int], skippable: Sequence[int], skipped: float) -> list[Segment]:
    """Units from each exit to the next.

    Args:
        exits: positions of the units before which tokens may leave.
        skippable: positions of the units that tokens may skip.
        skipped: visits of (token, unit) that are to be skipped, over tokens. As many tokens leave at each exit.

    Raises:
        RequestError: even if all tokens left by the last exit, fewer visits would be skipped.
    """
    ends = [*exits[1:], len(units)]
    inside = [[i for i in skippable if begin <= i < end] for begin, end in zip(exits, ends, strict=True)]
    inside = [positions for positions in inside if positions]
    weights = [(k + 1) / len(inside) for k in range(len(inside))]
    most = sum(w * len(positions) for w, positions in zip(weights, inside, strict=True))
    if skipped > most:
        raise RequestError(
            f"skip-depth{{gates=exit}}: {skipped:.1f} of {len(units)} are to be skipped, and with these exits at most {most:.1f} are",
            hint="raise active, or put the exits earlier (blocks)",
        )
    found = []
    for weight, positions in zip(weights, inside, strict=True):
        parts = tuple(part for i in positions for part in units[i].parts)
        found.append(Segment(Unit(parts), len(positions), weight * skipped / most if most else 0.0))
    return found


class Exits:
    """Fits the predictors of where tokens leave, one after the other.

    Args:
        graph: all its gates open; the residual stream ends at ``last``.
        batches: calibration inputs.
        target: see ``skip-depth``.
    """

    def __init__(self, graph: Graph, batches: Sequence[dict[str, Tensor]], last: fx.Node, target: str) -> None:
        self._graph, self._last, self._target = graph, last, target
        self._whole = Sweep(graph, batches)
        self._whole.advance(last)  # what follows, the head, is run again for each exit: logits of all tokens are too many to keep
        self._stay: list[Tensor] = []

    def fit(self, unit: GatedUnit, share: float, at_source: Sweep, streams: list[Tensor]) -> list[Tensor]:
        """Let a share of all tokens have left; the gates [B, S, 1], a batch each.

        Args:
            at_source: has run up to what the predictor reads; ``streams``: the residual stream there, [B, S, d] a batch.
        """
        source = at_source.values(unit.source)
        problem = LeastSquares(source[0].shape[-1], 1)
        for x, nats in zip(source, self._needed(at_source, streams), strict=True):
            problem.add(x[:, 1:].flatten(0, 1), (nats[:, 1:].flatten()[:, None] + 1e-6).log())
        weight, bias = problem.solve(1e-2)
        scores = torch.cat([(x[:, 1:] @ weight + bias).flatten() for x in source])
        here = torch.cat([g[:, 1:].flatten() for g in self._stay]) != 0 if self._stay else torch.ones_like(scores, dtype=torch.bool)
        gone = 1 - float(here.float().mean())
        threshold = quantile(scores[here], max(share - gone, 0.0) / max(1 - gone, 1e-9))
        self._graph.add_tensor(unit.weight, weight.T.contiguous())
        self._graph.add_tensor(unit.bias, bias - threshold)
        self._stay = at_source.advance(unit.gates)
        return self._stay

    def _needed(self, at_source: Sweep, streams: list[Tensor]) -> Iterator[Tensor]:
        """How much each token [B, S] gains by the layers that are left, in nats, a batch each."""
        output = self._graph.output_nodes[0]
        finals = self._whole.branch().each(output)
        if self._target == "entropy":
            yield from (_pieces(final, None) for final in finals)
            return
        early = at_source.branch()
        early.provide(self._last, streams)
        yield from (_pieces(final, other) for final, other in zip(finals, early.each(output), strict=True))


def _pieces(final: Tensor, early: Tensor | None) -> Tensor:
    """:func:`_nats` of logits [B, S, V], of a few positions at once."""
    others = [None] * final.shape[1] if early is None else early.split(_POSITIONS, 1)
    return torch.cat([_nats(f, o) for f, o in zip(final.split(_POSITIONS, 1), others, strict=False)], 1)


def _nats(final: Tensor, early: Tensor | None) -> Tensor:
    """[B, n, V] -> [B, n]."""
    known = final.float().log_softmax(-1)
    if early is None:
        return -(known.exp() * known).sum(-1)
    return (known.exp() * (known - early.float().log_softmax(-1))).sum(-1).clamp_min(0)
