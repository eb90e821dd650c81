"""The regions of a graph that passes rewrite: FFNs, attentions, residual blocks, the vocabulary head.

All of them are found by dataflow, so a model nobody has seen before works, or is refused with a reason.

=================  ================================================================================
``linear``         linear layers, whatever they were spelled as
``hidden``         from a down-projection back to its up-projections
``probe``          which activation it is, by running it on random numbers
``ffn``            FFNs described; ``replace`` them; ``routed``: those that are routed already
``attention``      attentions, with their masks (``mask``) and rotary embeddings (``rotary``)
``mixture``        mixtures of experts that a model was trained with, made routed FFNs as it is traced; ``experts`` names the others
``blocks``         residual blocks
``head``           the vocabulary head
=================  ================================================================================
"""

from __future__ import annotations

import functools

from dyncomp.errors import RequestError
from dyncomp.graph import Graph
from dyncomp.regions.attention import Attention, find_attentions
from dyncomp.regions.blocks import Block, find_blocks
from dyncomp.regions.experts import find_trained_experts
from dyncomp.regions.ffn import FFN, FFNWeights, find_ffns, find_sparse_ffns
from dyncomp.regions.head import Head, find_head
from dyncomp.regions.linear import Linear, find_linears
from dyncomp.regions.refusal import Refusal
from dyncomp.regions.replace import replace_ffn
from dyncomp.regions.routed import RoutedFFN, find_carved, find_routed

__all__ = [
    "FFN", "Attention", "Block", "FFNWeights", "Head", "Linear", "Refusal", "Regions", "RoutedFFN",
    "find_attentions", "find_blocks", "find_carved", "find_ffns", "find_head", "find_linears", "find_regions", "find_routed",
    "find_sparse_ffns",
    "replace_ffn", "require_ffns",
]  # fmt: skip


class Regions:
    """Everything found in a graph, each list in graph order. It describes the graph as it was: find again after a rewrite.

    Attentions are looked for when they, or blocks, are first asked for: recognising their masks and rotary embeddings by running them
    takes longer than all the rest, and most passes need FFNs alone.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph, self.linears = graph, find_linears(graph)
        self.ffns, refused = find_ffns(graph, self.linears)
        self._refused_ffns = [*refused, *find_trained_experts(graph)]
        self.routed: list[RoutedFFN] = find_routed(graph)
        self.sparse_ffns: list[FFN] = find_sparse_ffns(graph, self.linears) if any(i.thresholds for i in self.linears.values()) else []
        self.head: Head | None = find_head(graph, self.linears)

    @functools.cached_property
    def _attentions(self) -> tuple[list[Attention], list[Refusal]]:
        return find_attentions(self._graph)

    @property
    def attentions(self) -> list[Attention]:
        return self._attentions[0]

    @functools.cached_property
    def blocks(self) -> list[Block]:
        return find_blocks([*self.ffns, *self.sparse_ffns, *self.routed, *self.attentions], self.linears)

    @property
    def refusals(self) -> list[Refusal]:
        return [*self._refused_ffns, *self._attentions[1]]

    def require_ffns(self) -> list[FFN]:
        """The FFNs.

        Raises:
            RequestError: there are none; says what looked like one, and why it was refused.
        """
        if self.ffns:
            return self.ffns
        if self.routed:
            what = f"the model has no dense FFN: its {len(self.routed)} FFNs are routed already"
        elif refused := self._refused_ffns:
            reasons: dict[str, list[str]] = {}
            for refusal in refused:
                reasons.setdefault(refusal.reason, []).append(refusal.where)
            listed = "".join(
                f"\n  {places[0]}{f' and {len(places) - 1} more' if places[1:] else ''}: {why}" for why, places in reasons.items()
            )
            what = f"the model has no FFN that can be routed; {len(refused)} look like one and were refused:{listed}"
        else:
            what = "the model has no FFN: no linear layer, activation and linear layer in a row"
        raise RequestError(what, hint="dyncomp converts dense transformers; `dyncomp inspect MODEL --graph` shows what was traced")


def find_regions(graph: Graph) -> Regions:
    """All regions of a graph; on the meta device too. Never raises for what a model contains: what is not understood is refused."""
    return Regions(graph)


def require_ffns(regions: Regions) -> list[FFN]:
    """See :meth:`Regions.require_ffns`."""
    return regions.require_ffns()
