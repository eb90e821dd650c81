"""Thresholds: gates that are open where a score is positive, so that one bias sets how many are open."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from dyncomp.graph import Graph
from dyncomp.regions.depth import find_skips
from dyncomp.regions.linear import aten
from dyncomp.regions.routed import RoutedFFN, find_carved

_GATES = torch.ops.dyncomp.threshold_gates.default


@dataclass(frozen=True)
class Threshold:
    """Gates of the experts of one routed FFN, or of the tokens that skip a layer.

    Attributes:
        name: of the region, for people.
        gates: [..., E]. scores: [..., E], what they are the sign of (for tokens: before the first position is kept open).
        bias: name of the constant [E] that is added last to the scores.
        open: mean fraction of the gates that should be open, the ``shared`` ones included, the ``first`` positions not.
        shared: experts, the first ones, that every token runs.
        first: positions of each sequence whose gates are open whatever they score.
    """

    name: str
    gates: fx.Node
    scores: fx.Node
    bias: str
    open: float
    shared: int = 0
    first: int = 0

    def level(self, *scores: Tensor) -> Tensor:
        """The score above which as many lie as should be open: of tensors [B, S, E] or [n, E] together -> []."""
        experts = scores[0].shape[-1]
        chosen = torch.cat([s.detach()[..., self.first :, self.shared :].flatten() for s in scores]).float()
        wanted = max(self.open * experts - self.shared, 0.0) / (experts - self.shared)
        rank = round((1 - wanted) * len(chosen))
        return chosen.kthvalue(rank).values if rank > 0 else chosen.min() - 1.0

    def lower(self, graph: Graph, level: Tensor) -> None:
        """Make the bias ``level`` lower."""
        bias = graph.tensor(self.bias).detach().clone()
        bias[self.shared :] -= level
        graph.add_tensor(self.bias, bias)

    def moved(self, scores: Tensor, level: Tensor) -> Tensor:
        """The scores as they are with a bias that is ``level`` lower."""
        if not self.shared:
            return scores - level.to(scores.dtype)
        return torch.cat([scores[..., : self.shared], scores[..., self.shared :] - level.to(scores.dtype)], -1)


def find_thresholds(graph: Graph) -> list[Threshold]:
    """All thresholds that have something to decide, in graph order; fixed masks and layers that every token skips have nothing."""
    skips = [s for s in find_skips(graph) if s.gates.target is _GATES]
    facts = graph.info.get("depth", {})
    found, computed = [], {}
    for skip in skips:
        noted = facts.get(skip.name.removesuffix(".depth"), {})
        share = computed[skip.gates] = 1 - float(noted.get("skipped", 0.0))
        scores, bias = skip.scores, _bias(skip.scores)
        if noted.get("gates") == "threshold" and bias is not None and share > 0:
            found.append(Threshold(skip.name, skip.gates, scores, bias, share, first=int(skip.gates.args[0] is not scores)))
    routing = graph.info.get("routing", {})
    for region in find_carved(graph):
        noted = routing.get(region.name, {})
        gates, tokens = _own_gates(region, computed)
        if gates is None or gates in computed or noted.get("standin"):
            continue
        (scored,) = gates.all_input_nodes
        if (bias := _bias(scored)) is not None:
            share = min(noted.get("active", 1.0) / tokens, 1.0)  # passes note what runs of the tokens that do not skip as well
            found.append(Threshold(region.name, gates, scored, bias, share, noted.get("shared", 0)))
    return sorted(found, key=lambda t: t.gates)


def _own_gates(region: RoutedFFN, computed: dict[fx.Node, float]) -> tuple[fx.Node | None, float]:
    """(the region's threshold gates, the fraction of the tokens that do not skip it)"""
    gates, tokens = region.gates, 1.0
    if gates.target is aten.mul.Tensor:
        depth = [n for n in gates.all_input_nodes if n in computed]
        own = [n for n in gates.all_input_nodes if n not in computed]
        if len(depth) == 1 and len(own) == 1:
            gates, tokens = own[0], computed[depth[0]]
    return (gates if gates.target is _GATES else None), tokens


def _bias(scores: fx.Node) -> str | None:
    last = scores.args[-1]
    if (scores.target is aten.linear.default and len(scores.args) == 3) or scores.target is aten.add.Tensor:
        return str(last.target) if isinstance(last, fx.Node) and last.op == "get_attr" else None
    return None
