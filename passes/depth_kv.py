"""Keys and values of tokens that skip an attention: those of the attention before it, or none."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import fx

from dyncomp.graph import Graph
from dyncomp.ops import key_mask
from dyncomp.regions.attention import SOFTMAX, Attention
from dyncomp.regions.rotary import rotary_tables
from dyncomp.regions.walk import ancestors

aten = torch.ops.aten
POLICIES = ("compute", "share", "absent")


@dataclass(frozen=True)
class KeysAndValues:
    """What becomes of one attention's keys and values.

    Args:
        before: the attention whose keys and values a token that skips has (``kv=share``); None when it has none (``kv=absent``).
    """

    attention: Attention
    before: Attention | None

    def apply(self, graph: Graph, gates: fx.Node) -> None:
        """Rewrite the attention; with every gate open it computes what it did.

        share:   k = where(gates, k, k of the attention before)    # where the rotary embedding turns both: the positions are the same
                 v = where(gates, v, v of the attention before)
        absent:  attention(q, k, v, mask)  ->  attention(q, k, v, key_mask(gates, mask))
        """
        if self.before is None:
            _hide(graph, self.attention, gates)
            return
        for own, other in zip(_written(self.attention), _written(self.before), strict=True):
            with graph.inserting(before=own.next, path=self.attention.path) as b:
                open_ = b.call(aten.ne.Scalar, b.call(aten.unsqueeze.default, gates, 1), 0)  # [B, 1, S, 1]
                shared = b.call(aten.where.self, open_, own, _as_attended(other))
            own.replace_all_uses_with(shared, delete_user_cb=partial(operator.is_not, shared))


def keys_and_values(graph: Graph, attentions: Sequence[Attention], attention: Attention, policy: str) -> KeysAndValues | str | None:
    """How ``policy`` is applied to one of ``attentions``, in graph order; None for ``compute``; or why it cannot be."""
    if policy == "compute":
        return None
    if attention.present is not None:
        return "tokens are absent from it already"
    if policy == "absent":
        softmax = _softmax(attention)
        if softmax is not None and softmax.meta["val"].dim() == 3:
            return "its scores are of [batch * heads, query, key], and a mark is one for all heads"
        return KeysAndValues(attention, None)
    earlier = [a for a in attentions if a.output < attention.output and a.self_attention and _length(a) == _length(attention)]
    if not earlier:
        return "no attention comes before it whose keys and values could be shared"
    before = earlier[-1]
    if before.key_transposed or attention.key_transposed:
        return "keys are made transposed"
    if before.present is not None:
        return f"tokens are absent from {before.path}, the attention before it"
    shapes = [(a.kv_heads, a.head_dim, a.value_dim) for a in (before, attention)]
    if shapes[0] != shapes[1]:
        (heads, size, width), (own_heads, own_size, own_width) = shapes
        return (
            f"its keys and values are {own_heads} heads of {own_size} and {own_width} features, "
            f"and those of {before.path}, the attention before it, {heads} of {size} and {width}"
        )
    if not _turned_alike(graph, before, attention):
        return f"its keys are rotated by other angles than those of {before.path}, the attention before it"
    return KeysAndValues(attention, before)


def _length(attention: Attention) -> str:
    return str(attention.query.meta["val"].shape[2])


def _turned_alike(graph: Graph, a: Attention, b: Attention) -> bool:
    one, other = a.rotary[1], b.rotary[1]
    if one is None or other is None:
        return one is other
    if (one.rotated, one.interleaved) != (other.rotated, other.interleaved):
        return False
    return all(torch.equal(x, y) for x, y in zip(rotary_tables(graph, one, 8), rotary_tables(graph, other, 8), strict=True))


def _written(attention: Attention) -> tuple[fx.Node, fx.Node]:
    """Keys, before their rotary embedding, and values: [B, Hkv, S, D]."""
    turned = attention.rotary[1]
    return (turned.source if turned is not None else attention.key), attention.value


def _as_attended(node: fx.Node) -> fx.Node:
    """``node``, or what became of it where its layer shares too."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target is aten.where.self and users[0].args[1] is node else node


def _softmax(attention: Attention) -> fx.Node | None:
    """Where an attention is written out: its softmax."""
    if attention.output.target is aten.scaled_dot_product_attention.default:
        return None
    return next((n for n in ancestors(attention.output, 12) if n.target in SOFTMAX), None)


def _hide(graph: Graph, attention: Attention, gates: fx.Node) -> None:
    node = attention.output
    if node.target is aten.scaled_dot_product_attention.default:
        arguments = dict(zip(("attn_mask", "dropout_p", "is_causal"), node.args[3:], strict=False)) | node.kwargs
        with graph.inserting(before=node) as b:
            mask = b.call(key_mask._opoverload, gates, arguments.get("attn_mask"), bool(arguments.get("is_causal")))
        node.args = (*node.args[:3], mask)
        node.kwargs = {k: v for k, v in node.kwargs.items() if k in ("scale", "enable_gqa")}
        return
    softmax = _softmax(attention)
    assert softmax is not None
    scores = softmax.args[0]
    with graph.inserting(before=softmax) as b:
        softmax.update_arg(0, b.call(aten.add.Tensor, scores, b.call(key_mask._opoverload, gates, None, False)))
