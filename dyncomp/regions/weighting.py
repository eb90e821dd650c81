"""How the gates of a token's experts follow from their scores: recognised by trying, as activations are.

Random scores go in, and the gates that come out must be those of a :class:`Weighting`; no spelling of a softmax or of a choice has to be
known, and the gates that a model was trained with are found like those that passes make.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from dyncomp.errors import GraphError
from dyncomp.graph import Graph
from dyncomp.regions.partial import evaluate, symbolic_shape
from dyncomp.routing.groups import limit_to_groups

COLDEST = 14
"""Gates of scores times 2^-14 can be told from equal ones in float32; colder ones count as equal."""
_SIZES = {"batch": 4, "sequence": 32}


@dataclass(frozen=True)
class Weighting:
    """``total`` times the softmax or the sigmoid of ``slope`` times the scores, for the experts that run.

    Attributes:
        function: ``softmax`` or ``sigmoid``.
        normalised: over the experts that run: gates sum to ``total``.
        slope: 0 where all that run have the same gate; ``function`` then says what of the scores is compared, with a bias or by groups.
        groups, kept: those that run are in the ``kept`` best of so many groups (:func:`~dyncomp.routing.groups.limit_to_groups`).
    """

    function: str = "softmax"
    normalised: bool = True
    slope: float = 0.0
    total: float = 1.0
    groups: int = 1
    kept: int = 1

    @property
    def equal(self) -> bool:
        return self.slope == 0

    def gates(self, scores: Tensor, k: int, bias: Tensor | None = None) -> Tensor:
        """[..., E] -> [..., E].

        Args:
            bias: [E], added where experts are chosen and not to their weights: to sigmoids, or to scores.
        """
        cooled = self.slope * scores
        affinity = cooled.sigmoid() if self.function == "sigmoid" else cooled.softmax(-1)
        order = scores if self.function == "softmax" else scores.sigmoid() if self.equal else affinity
        if bias is not None:
            order = order + bias
        if self.groups > 1:
            order = limit_to_groups(order, self.groups, self.kept)
        weights = affinity * torch.zeros_like(scores).scatter(-1, order.topk(k, -1).indices, 1.0)
        return self.total * (weights / weights.sum(-1, keepdim=True) if self.normalised else weights)

    def __str__(self) -> str:
        if self.equal:
            return "equal for all that run"
        over = "over the experts that run" if self.normalised else "over all experts" if self.function == "softmax" else "of each expert"
        return f"a {self.function} {over}"


def find_weighting(graph: Graph, gates: fx.Node, scores: fx.Node, always: int, bias: Tensor | None) -> tuple[Weighting, int] | str:
    """What makes ``gates`` of ``scores`` [..., E], and how many of the experts behind the ``always`` first ones run; or why it is none.

    Args:
        always: experts that every token runs with a gate of 1, the first ones.
        bias: [E - always] that the graph adds where experts are chosen, or None.
    """

    @functools.cache
    def tried(scale: float) -> tuple[Tensor, Tensor]:
        """Scores of that size and the gates that come out, [n, all experts] each."""
        values = scale * torch.randn(symbolic_shape(graph, scores, _SIZES), generator=torch.Generator().manual_seed(0))
        values[..., :always] = 1e4
        (found,) = evaluate(graph, [gates], _SIZES, {scores: values.clone()})
        return values.flatten(0, -2), found.flatten(0, -2).float()

    try:
        values, found = tried(1.0)
    except GraphError:
        return "its gates depend on more than its scores"
    if always and not bool((found[:, :always] == 1).all()):
        return "its shared experts have gates that are not 1"
    values, found = values[:, always:], found[:, always:]
    counts = (found > 0).sum(-1)
    k = int(counts[0])
    if not bool((counts == k).all()):
        return "how many experts run depends on the token"
    if k == 0:
        return f"every token runs {always} experts, all of them shared: there is nothing to route"
    for candidate in _candidates(values.shape[-1], k):
        if _total(candidate, values[:4], found[:4], k, bias) is None:  # most are refused by few tokens
            continue
        total = _total(candidate, values, found, k, bias)
        if total is None:
            continue
        # Where scores are made small, a bias alone chooses: they must be large for groups to show.
        large = tried(1 / candidate.slope) if candidate.slope and bias is not None else None
        if large is None or _total(candidate, large[0][:, always:], large[1][:, always:], k, bias) is not None:
            return replace(candidate, total=float(f"{total:.6g}")), k
    return "its gates are neither a softmax nor a sigmoid of its k highest scores"


def _total(candidate: Weighting, scores: Tensor, gates: Tensor, k: int, bias: Tensor | None) -> float | None:
    """What the candidate's gates are to be multiplied with, or None where they are not those found."""
    made = candidate.gates(scores, k, bias)
    total = float(gates.sum() / made.sum())
    return total if torch.allclose(made * total, gates, rtol=1e-5, atol=0) else None


def _candidates(experts: int, k: int) -> Iterator[Weighting]:
    """Those that a name is known for, without groups first."""
    sizes = [g for g in range(2, experts // 2 + 1) if experts % g == 0]
    grouped = [(1, 1), *((g, kept) for g in sizes for kept in range(1, g) if kept * (experts // g) >= k)]
    slopes = [2.0**-p for p in range(COLDEST + 1)]
    kinds = [("softmax", True, 0.0), ("sigmoid", True, 0.0), *itertools.product(("softmax", "sigmoid"), (True, False), slopes)]
    for groups, (function, normalised, slope) in itertools.product(grouped, kinds):
        yield Weighting(function, normalised, slope, 1.0, *groups)
