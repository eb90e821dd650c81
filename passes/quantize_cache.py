"""Pass ``quantize-cache``: keys and values in int8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from dyncomp.errors import RequestError
from dyncomp.graph import Graph
from dyncomp.pipeline import Context, Pass, PassResult
from dyncomp.regions.attention import ROUNDED, Attention, find_attentions
from dyncomp.regions.refusal import Refusal
from dyncomp.regions.walk import between

aten = torch.ops.aten
BITS = 8


@dataclass(frozen=True)
class QuantizeCache(Pass):
    """Keep the keys and values of past tokens as int8 codes with one scale for each token and head.

    The graph rounds them wherever it attends, so that it computes what an artifact with such a cache does; ``add-kv-cache`` then makes
    the caches int8. Keys are rounded after their rotary embedding, as they are kept.

    before:  attention(q, k, v)
    after:   attention(q, dyncomp.round_entries(k, 8), dyncomp.round_entries(v, 8))
    """

    name: ClassVar[str] = "quantize-cache"

    def precheck(self, graph: Graph) -> None:
        if not any(_cached(a) for a in find_attentions(graph)[0]):
            raise RequestError(
                "quantize-cache: no attention of the model keeps keys and values of past tokens",
                hint="leave it out (--kv-cache); encoders, and attentions that are not recognised, have no cache",
            )

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        self.precheck(graph)
        found, _ = find_attentions(graph)
        result = PassResult(facts={"bits": BITS, "bytes_per_token_before": sum(a.cache_bytes for a in found if _cached(a))})
        rounded: dict[fx.Node, fx.Node] = {}
        for attention in found:
            if not _cached(attention):
                reason = f"it does not see past tokens in order (mask: {attention.mask.kind})"
                result.refused.append(Refusal(attention.path, self.name, reason, "it stays as it is"))
            elif attention.cache_bits != BITS:
                _round(graph, attention, attention.key, rounded, features_first=attention.key_transposed)
                _round(graph, attention, attention.value, rounded)
                result.changed.append(attention.path)
        graph.clean()
        result.facts["bytes_per_token"] = sum(a.cache_bytes for a in find_attentions(graph)[0] if _cached(a))
        return result


def keep_floats(graph: Graph) -> bool:
    """Undo the pass, for passes that train and for programs that keep no such cache; whether there was anything to undo."""
    rounded = [node for node in graph.nodes if node.target is ROUNDED]
    for node in rounded:
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    graph.clean()
    return bool(rounded)


def _cached(attention: Attention) -> bool:
    return attention.self_attention and attention.mask.kind in ("causal", "relative")


def _round(graph: Graph, attention: Attention, node: fx.Node, rounded: dict[fx.Node, fx.Node], *, features_first: bool = False) -> None:
    """Let an attention read ``node`` [B, Hkv, T, D] (or [B, Hkv, D, T]) rounded; what several read is rounded once."""
    readers = between(attention.output, node) & set(node.users)
    if node not in rounded:
        with graph.inserting(before=node.next, path=attention.path) as b:
            x = b.call(aten.transpose.int, node, 2, 3) if features_first else node
            made = b.call(ROUNDED, x, BITS)
            rounded[node] = b.call(aten.transpose.int, made, 2, 3) if features_first else made
    for reader in readers:
        reader.replace_input_with(node, rounded[node])
