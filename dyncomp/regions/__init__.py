"""The regions of a graph that passes rewrite: FFNs, attentions, residual blocks, the vocabulary head.

All of them are found by dataflow, so a model nobody has seen before works, or is refused with a reason.

=================  ================================================================================
``linear``         linear layers, whatever they were spelled as
``hidden``         from a down-projection back to its up-projections
``probe``          which activation it is, by running it on random numbers
``ffn``            FFNs described; ``replace`` them; ``routed``: those that are routed already
``attention``      attentions, with their masks (``mask``) and rotary embeddings (``rotary``)
``experts``        mixtures of experts that were trained as such
``blocks``         residual blocks
``head``           the vocabulary head
=================  ================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass

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
from dyncomp.regions.routed import RoutedFFN, find_routed

__all__ = [
    "FFN", "Attention", "Block", "FFNWeights", "Head", "Linear", "Refusal", "Regions", "RoutedFFN",
    "find_attentions", "find_blocks", "find_ffns", "find_head", "find_linears", "find_regions", "find_routed",
    "find_sparse_ffns",
    "replace_ffn", "require_ffns",
]  # fmt: skip


@dataclass(frozen=True)
class Regions:
    """Everything found in a graph, each list in graph order. It describes the graph as it was: find again after a rewrite."""

    ffns: list[FFN]
    sparse_ffns: list[FFN]
    routed: list[RoutedFFN]
    attentions: list[Attention]
    blocks: list[Block]
    head: Head | None
    refusals: list[Refusal]

    def require_ffns(self) -> list[FFN]:
        """The FFNs.

        Raises:
            RequestError: there are none; says what looked like one, and why it was refused.
        """
        if self.ffns:
            return self.ffns
        refused = [r for r in self.refusals if r.what == "ffn"]
        if self.routed:
            what = f"the model has no dense FFN: its {len(self.routed)} FFNs are routed already"
        elif refused:
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
    linears = find_linears(graph)
    ffns, refused_ffns = find_ffns(graph, linears)
    attentions, refused_attentions = find_attentions(graph)
    routed, sparse = find_routed(graph), find_sparse_ffns(graph, linears) if any(i.thresholds for i in linears.values()) else []
    blocks = find_blocks([*ffns, *sparse, *routed, *attentions], linears)
    return Regions(
        ffns,
        sparse,
        routed,
        attentions,
        blocks,
        find_head(graph, linears),
        [*refused_ffns, *find_trained_experts(graph), *refused_attentions],
    )


def require_ffns(regions: Regions) -> list[FFN]:
    """See :meth:`Regions.require_ffns`."""
    return regions.require_ffns()
