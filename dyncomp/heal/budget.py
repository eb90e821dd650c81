"""A budget of operations for the tokens that skip layers: routers spend it where it helps most, in place of a fixed share a layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dyncomp.cost import count
from dyncomp.errors import RequestError
from dyncomp.graph import Graph
from dyncomp.regions import find_routed
from dyncomp.regions.depth import find_skips
from dyncomp.regions.thresholds import Threshold, find_thresholds
from dyncomp.sweep import Sweep, fast_matmul

_HALVINGS = 12
_WIDEST = 8.0
"""How far thresholds are moved at most, in scores: logarithms of what a layer contributes."""


class DepthBudget:
    """What the layers that tokens can skip cost, by how many tokens do not.

    Operations are those of :func:`dyncomp.cost.count`; routers, and the paths that stand in for what is skipped, are counted.

    Args:
        graph: one that ``skip-depth`` has rewritten.

    Attributes:
        thresholds: of the gates that can move.

    Raises:
        RequestError: no token of this graph can skip a layer by a threshold.
    """

    def __init__(self, graph: Graph) -> None:
        skips, names = {s.gates: s for s in find_skips(graph)}, {r.node: r.name for r in find_routed(graph)}
        self.thresholds = [t for t in find_thresholds(graph) if t.gates in skips]
        if not self.thresholds:
            raise RequestError("there is no budget to spend: no token skips a layer by a threshold", hint="run skip-depth first")
        self._open: list[float] = []
        self._closed: list[float] = []
        self._routers = 0.0
        for threshold in self.thresholds:
            skip = skips[threshold.gates]
            computed = [skip.name, *(names[m] for m in skip.members if m in names)]
            instead = [names[s] for s in skip.standins]
            none = count(graph, active=dict.fromkeys([*computed, *instead], 0.0)).flops_per_token
            self._open.append(count(graph, active=dict.fromkeys(instead, 0.0)).flops_per_token - none)
            self._closed.append(count(graph, active=dict.fromkeys(computed, 0.0)).flops_per_token - none)
            self._routers += 2 * graph.tensor(skip.scores.args[1]).numel()  # type: ignore[arg-type]

    def cost(self, computed: Sequence[Tensor | float]) -> Tensor | float:
        """Operations over those of the same layers without routers, where tokens skip nothing.

        Args:
            computed: the fraction of the tokens that do not skip, for each threshold; a gradient goes through.
        """
        parts = [share * full + (1 - share) * closed for share, full, closed in zip(computed, self._open, self._closed, strict=True)]
        return (sum(parts) + self._routers) / sum(self._open)


def settle(graph: Graph, batches: Sequence[dict[str, Tensor]], budget: float) -> float:
    """Move all thresholds of tokens by one number, so that the batches cost ``budget``; note what each layer then computes.

    Returns:
        The cost reached.
    """
    spent = DepthBudget(graph)
    before = [graph.tensor(t.bias).detach().clone() for t in spent.thresholds]

    def measured(shift: float) -> list[float]:
        for threshold, bias in zip(spent.thresholds, before, strict=True):
            graph.add_tensor(threshold.bias, bias + shift)
        sweep = Sweep(graph, batches)
        return [_computed(t, sweep.advance(t.scores)) for t in spent.thresholds]

    low, high = -_WIDEST, _WIDEST
    with fast_matmul(), torch.no_grad():
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            if spent.cost(measured(middle)) > budget:
                high = middle
            else:
                low = middle
        found = measured(low)
    for threshold, share in zip(spent.thresholds, found, strict=True):
        note_computed(graph, threshold, share)
    return float(spent.cost(found))


def _computed(threshold: Threshold, scores: Sequence[Tensor]) -> float:
    return float(torch.cat([s[:, threshold.first :].flatten() for s in scores]).gt(0).float().mean())


def note_computed(graph: Graph, threshold: Threshold, share: float) -> None:
    """What passes noted of a layer that tokens skip, with another fraction of the tokens that do not."""
    facts = graph.info["depth"][threshold.name.removesuffix(".depth")]
    before, facts["skipped"] = 1 - facts["skipped"], 1 - share
    for part in facts["parts"]:
        noted = graph.info.get("routing", {}).get(part)
        if noted is not None and "active" in noted and before > 0:
            noted["active"] *= share / before
