"""What a token can skip: the attention and the FFN of a residual block; and the gates that let it, once they are there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

import dyncomp.ops  # noqa: F401  (registers the gated operations)
from dyncomp.graph import Graph
from dyncomp.regions.attention import Attention
from dyncomp.regions.blocks import Block
from dyncomp.regions.ffn import FFN, find_sparse_ffns
from dyncomp.regions.linear import RESHAPES, TRANSPOSES, Linear, aten
from dyncomp.regions.refusal import Refusal
from dyncomp.regions.routed import RoutedFFN
from dyncomp.regions.walk import ancestors

_THRESHOLD = torch.ops.dyncomp.threshold_gates.default
_GATED = torch.ops.dyncomp.gated_linear.default
_ROUTED = torch.ops.dyncomp.routed_ffn.default
_SPARSE = torch.ops.dyncomp.sparse_linear.default
_SAME = {aten.reshape.default, aten.view.default, aten.mul.Tensor, aten.maximum.default, aten.rsub.Scalar}


@dataclass(frozen=True)
class Part:
    """Half of a transformer layer: what is added to the residual stream at once.

    Attributes:
        name: of its region, for people; unique in its graph.
        kind: ``"attention"`` or ``"ffn"``.
        source: what it is computed from, normed, [B, S, d].
        stream: the residual stream it is added to.
        ffn: the FFN, dense, routed or sparse; None for an attention.
        attention: None for an FFN.
        query, output: the projections of an attention's queries (None when they are projected together with the keys) and of its output.
        projections: all that make queries, keys and values, each of tokens [B, S, features].
    """

    name: str
    kind: str
    source: fx.Node
    stream: fx.Node
    ffn: FFN | RoutedFFN | None = None
    attention: Attention | None = None
    query: Linear | None = None
    output: Linear | None = None
    projections: tuple[Linear, ...] = ()

    @property
    def result(self) -> fx.Node:
        """What is added, before any norm that follows it."""
        if self.output is not None:
            return self.output.node
        assert self.ffn is not None
        return self.ffn.result if isinstance(self.ffn, RoutedFFN) else self.ffn.output


@dataclass(frozen=True)
class Skip:
    """Gates of tokens in a graph.

    Attributes:
        name: the module path they were made under.
        gates: [B, S, 1], 1 where the token is computed.
        scores: the linear layer that they are the sign of.
        members: the gated operations: ``gated_linear``, ``routed_ffn``, and ``sparse_linear`` whose result, or that of the FFN it is in, is
            multiplied by the gates.
        standins: ``routed_ffn`` nodes that run for the tokens that skip.
    """

    name: str
    gates: fx.Node
    scores: fx.Node
    members: tuple[fx.Node, ...]
    standins: tuple[fx.Node, ...]


def find_parts(blocks: list[Block], linears: Mapping[fx.Node, Linear]) -> tuple[list[Part], list[Refusal]]:
    """What tokens can skip, in graph order, and what they cannot, with reasons."""
    products = {linear.nodes[0]: linear for linear in linears.values()}
    parts: list[Part] = []
    refused: list[Refusal] = []
    for block in blocks:
        for region in block.regions:
            name = region.path if isinstance(region, Attention) else region.name
            found = _attention(name, region, block, products) if isinstance(region, Attention) else _ffn(region, block)
            if isinstance(found, Part) and _is_gated(found):
                found = "tokens skip it already"
            if isinstance(found, Part):
                parts.append(found)
            else:
                refused.append(Refusal(name, "skip", found, "every token computes it"))
    return parts, refused


def _ffn(region: FFN | RoutedFFN, block: Block) -> Part | str:
    source = region.input
    if isinstance(region, FFN) and (region.input_axis not in (-1, 2) or region.output_axis not in (-1, 2)):
        return "its features are not on the last axis"
    if isinstance(region, FFN) and region.shared_weights:
        return "its weights are read by another layer"
    if isinstance(region, FFN) and region.sparse:
        if region.output.target is not _SPARSE or len({up.thresholds for up in region.ups}) > 1:
            return "only some of its linear layers count small inputs as zero"
        if not _is_tokens(region.output):
            return _FLAT
    return Part(region.name, "ffn", source, block.input, ffn=region) if _is_tokens(source) else _FLAT


_FLAT = "its tokens do not have the shape [batch, sequence, features]"


def _attention(name: str, region: Attention, block: Block, products: Mapping[fx.Node, Linear]) -> Part | str:
    if not region.self_attention:
        return "its keys come from another sequence"
    output = _output_projection(region.output, products)
    if output is None or output.axis != -1:
        return "its output projection was not found"
    query, key, value = (products.get(p) if p is not None else None for p in region.projections)
    first = query or key or value
    if first is None or first.axis != -1 or not _is_tokens(first.input) or not _is_tokens(output.input):
        return _FLAT
    every = tuple(dict.fromkeys(p for p in (query, key, value) if p is not None and _is_row_by_row(p)))
    alone = query if query not in (key, value) and query in every else None
    return Part(name, "attention", first.input, block.input, attention=region, query=alone, output=output, projections=every)


def _is_gated(part: Part) -> bool:
    """Whether its result has gates of tokens already."""
    if isinstance(part.ffn, RoutedFFN):
        return _of_tokens(part.ffn.gates)
    node = part.output.nodes[0] if part.output is not None else part.result
    return node.target is _GATED or any(gated_sparse(user) is node for user in node.users)


def _of_tokens(gates: fx.Node) -> bool:
    """Whether gates are those of tokens, or have them as a factor."""
    if gates.target is _THRESHOLD:
        return bool(gates.meta["val"].shape[-1] == 1)
    return gates.target in _SAME and any(_of_tokens(a) for a in gates.args if isinstance(a, fx.Node))


def _is_row_by_row(linear: Linear) -> bool:
    return linear.nodes[0].target in (aten.linear.default, _SPARSE) and linear.axis == -1 and _is_tokens(linear.input)


def _output_projection(node: fx.Node, products: Mapping[fx.Node, Linear]) -> Linear | None:
    """The linear layer that alone reads the attention, through views."""
    for _ in range(8):
        users = [u for u in node.users if u.target is not aten.sym_size.int]
        if len(users) != 1:
            return None
        node = users[0]
        if node in products:
            return products[node]
        if node.target not in RESHAPES | TRANSPOSES | {aten.contiguous.default, aten.clone.default}:
            return None
    return None


def _is_tokens(node: fx.Node) -> bool:
    """[batch, sequence, features], the features fixed."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() == 3 and isinstance(value.shape[2], int)


# ---- gates that are there already ----------------------------------------------------------------------------------
def find_skips(graph: Graph) -> list[Skip]:
    """All gates of tokens, in graph order."""
    found = []
    sparse: dict[fx.Node, FFN] | None = None
    for node in graph.module.graph.nodes:
        if node.target is not _THRESHOLD or node.meta["val"].shape[-1] != 1:
            continue
        members, standins = _gated(node)
        if sparse is None and any(n.target is _SPARSE for n in members):
            sparse = {ffn.output: ffn for ffn in find_sparse_ffns(graph)}
        inside = {linear.node for n in members if (ffn := (sparse or {}).get(n)) is not None for linear in ffn.ups}
        members = sorted({*members, *inside})
        if members:
            found.append(Skip(str(node.meta.get("path", "")), node, _scores(node), tuple(members), tuple(standins)))
    return found


def _gated(gates: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    members: list[fx.Node] = []
    standins: list[fx.Node] = []
    waiting = [(gates, False)]
    while waiting:
        node, closed = waiting.pop()
        for user in node.users:
            if user.target in (_GATED, _ROUTED):
                (standins if closed else members).append(user)
            elif (sparse := gated_sparse(user)) is not None:
                members.append(sparse)
            elif user.target in _SAME:
                waiting.append((user, closed != (user.target is aten.rsub.Scalar)))
    return sorted(members), sorted(standins)


def gated_sparse(node: fx.Node) -> fx.Node | None:
    """The ``sparse_linear`` [B, S, features] whose result ``node`` multiplies by gates [B, S, 1], or None."""
    if node.target is not aten.mul.Tensor or not all(isinstance(a, fx.Node) and _is_tokens(a) for a in node.args):
        return None
    linear, gates = node.args
    return linear if linear.target is _SPARSE and gates.meta["val"].shape[-1] == 1 else None  # type: ignore[union-attr, return-value]


def _scores(gates: fx.Node) -> fx.Node:
    """The linear layer before the gates, and before what keeps the first token or looks at the others."""
    return next(n for n in ancestors(gates, 64) if n.target is aten.linear.default)


def skipped_share(graph: Graph, computed: Mapping[str, float]) -> float:
    """Fraction of the visits that tokens skip, of those to all layers (or attentions, or FFNs) that ``skip-depth`` was to choose from; each
    unit behind an exit counts.

    Args:
        computed: fraction of the tokens that do not skip, by :class:`Skip` name.
    """
    units = {f"{name}.depth": facts.get("units", 1) for name, facts in graph.info.get("depth", {}).items()}
    weights = {name: units.get(name, 1) for name in computed}
    skipped = sum((1 - computed[name]) * weight for name, weight in weights.items())
    return skipped / max(graph.info.get("skippable", 0), sum(weights.values()))


# ---- what the cache needs ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class KVBytes:
    """Keys and values of a token, mean over tokens, in bytes.

    Attributes:
        dense: of the dense model.
        held: in the cache: with ``kv=absent`` of the tokens that do not skip, and the mark of absence. (``kv=share`` writes an entry for
            each token, the same one twice where it is shared.)
    """

    dense: float
    held: float


def kv_bytes(graph: Graph, computed: Mapping[str, float]) -> KVBytes | None:
    """What a graph's keys and values need, by what ``skip-depth`` noted in it; None when no attention is skipped.

    Args:
        computed: fraction of the tokens that do not skip, by :class:`Skip` name; 1 where absent.
    """
    skipped = {name: facts for name, facts in graph.info.get("depth", {}).items() if "kv" in facts}
    if not skipped:
        return None
    held = dense = float(graph.info["kv_bytes"])
    for name, facts in skipped.items():
        if facts["kv"] == "absent":
            held += ABSENCE_BYTES * facts.get("attentions", 1) - (1 - computed.get(f"{name}.depth", 1.0)) * facts["kv_bytes"]
    return KVBytes(dense, held)


ABSENCE_BYTES = 4
"""A token's entry in ``present_cache``, a layer."""
