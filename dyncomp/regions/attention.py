"""Attention, found by dataflow: ``scaled_dot_product_attention`` nodes, and matmul -> scale -> + mask -> softmax -> matmul.

The products may be of [batch, heads, …] or of [batch * heads, …] (Bloom); a ``baddbmm`` scales them and adds to them at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, fx

from dyncomp.graph import Graph
from dyncomp.ops import SCALE_BYTES
from dyncomp.regions.linear import PRODUCTS
from dyncomp.regions.mask import Mask, classify_mask, integer_literals
from dyncomp.regions.partial import SHAPE_QUERIES, ShapeOnly, evaluate, symbolic_shape
from dyncomp.regions.refusal import Refusal
from dyncomp.regions.rotary import Rotary, find_rotary
from dyncomp.regions.walk import ancestors, between, descendants

aten = torch.ops.aten
_SDPA = aten.scaled_dot_product_attention.default
ROUNDED = torch.ops.dyncomp.round_entries.default
_KEY_MASK = torch.ops.dyncomp.key_mask.default
SOFTMAX = {aten.softmax.int, aten._softmax.default}
_MATMUL = {aten.matmul.default, aten.bmm.default, aten.baddbmm.default}
_PROJECTION = {*PRODUCTS, aten.convolution.default, aten.conv1d.default, torch.ops.dyncomp.sparse_linear.default}


@dataclass(frozen=True, eq=False)
class Attention:
    """``output = softmax(scale * query @ key^T + mask) @ value``.

    Args:
        path: module path of the node, for people.
        output: [B, H, S, Dv].
        query: [B, H, S, D], as attended: after the rotary embedding.
        key: [B, Hkv, T, D], before it is repeated for the groups; [B, Hkv, D, T] when ``key_transposed``.
        value: [B, Hkv, T, Dv].
        scale: factor on the scores.
        softcap: scores become ``softcap * tanh(scores / softcap)``; 0 means they do not.
        mask: what a query sees.
        rotary: how query and key were rotated, each, if they were.
        projections: the nodes that project the input to query, key and value (the same node when fused), or None.
        present: gates [B, S, 1] of the tokens that are attended to, when others are hidden (``dyncomp::key_mask``).
        additive: sequence length S -> what is added to the scores, [B, H, S, S], when the mask is ``relative``.
        cache_bits: of keys and values that are rounded as an int8 cache gives them back (``dyncomp::round_entries``): 8; else 32. ``key``
            and ``value`` are these before they are rounded.
    """

    path: str
    output: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    scale: float
    mask: Mask
    softcap: float = 0.0
    key_transposed: bool = False
    rotary: tuple[Rotary | None, Rotary | None] = (None, None)
    projections: tuple[fx.Node | None, fx.Node | None, fx.Node | None] = (None, None, None)
    present: fx.Node | None = None
    additive: Callable[[int], Tensor] | None = None
    cache_bits: int = 32

    @property
    def heads(self) -> int:
        return int(self.query.meta["val"].shape[1])

    @property
    def kv_heads(self) -> int:
        return int(self.value.meta["val"].shape[1])

    @property
    def head_dim(self) -> int:
        return int(self.query.meta["val"].shape[3])

    @property
    def value_dim(self) -> int:
        return int(self.value.meta["val"].shape[3])

    @property
    def cache_bytes(self) -> int:
        """Of the keys and values of a token."""
        if self.cache_bits == 8:
            return self.kv_heads * (self.head_dim + self.value_dim + 2 * SCALE_BYTES)
        return self.kv_heads * (self.head_dim + self.value_dim) * int(self.value.meta["val"].element_size())

    @property
    def self_attention(self) -> bool:
        """Whether queries and keys come from the same positions."""
        length = self.key.meta["val"].shape[3 if self.key_transposed else 2]
        return str(length) == str(self.query.meta["val"].shape[2])


def find_attentions(graph: Graph) -> tuple[list[Attention], list[Refusal]]:
    """Every attention of the graph, in order, and what looked like one but could not be understood.

    Works on the meta device too. Masks and rotary embeddings are recognised by evaluating them at a few sizes.
    """
    shapes = ShapeOnly(graph)
    finder = _Finder(graph, shapes)
    found, refused = [], []
    for node in graph.nodes:
        if node.op != "call_function" or node in shapes:
            continue
        try:
            if node.target is _SDPA:
                found.append(finder.fused(node))
            elif node.target in SOFTMAX and finder.attends(node):
                found.append(finder.eager(node))
        except _NotUnderstood as reason:
            refused.append(
                Refusal(
                    node.meta.get("path") or node.name,
                    "attention",
                    str(reason),
                    "it stays as it is; a decoder with it runs without a cache",
                )
            )
    return found, refused


class _NotUnderstood(Exception):
    """Why something that looks like an attention is not one we can name."""


class _Finder:
    def __init__(self, graph: Graph, shapes: ShapeOnly) -> None:
        self.graph, self.shapes = graph, shapes
        self.order = {n: i for i, n in enumerate(graph.nodes)}
        self._masks: dict[object, Mask] = {}

    def fused(self, node: fx.Node) -> Attention:
        """From a ``scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, *, scale, enable_gqa)`` node."""
        arguments = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), node.args, strict=False)) | node.kwargs
        query, mask, causal, present = arguments["query"], arguments.get("attn_mask"), arguments.get("is_causal"), None
        assert isinstance(query, fx.Node)
        if isinstance(mask, fx.Node) and mask.target is _KEY_MASK:
            present, mask, causal = mask.args
        if arguments.get("dropout_p"):
            raise _NotUnderstood("it drops out attention weights")
        scale, additive = arguments.get("scale"), None
        if causal:
            kind = Mask("causal")
        elif mask is None:
            kind = Mask("none")
        else:
            assert isinstance(mask, fx.Node)

            def additive(size: int) -> Tensor:
                return _additive(self._evaluate(mask, size))

            kind = self._mask(mask, additive)
        found = self._region(node, query, arguments["key"], arguments["value"], float(scale) if scale is not None else None, kind)  # type: ignore[arg-type]
        return replace(found, present=present, additive=additive)  # type: ignore[arg-type]

    def attends(self, softmax: fx.Node) -> bool:
        """Whether a softmax looks like that of attention scores: [..., S, T] between two matrix products."""
        value = softmax.meta.get("val")
        if not isinstance(value, Tensor) or value.dim() < 3 or softmax.args[1] not in (-1, value.dim() - 1):
            return False
        return any(n.target in _MATMUL for n in ancestors(softmax, 12)) and any(n.target in _MATMUL for n in descendants(softmax, 6))

    def eager(self, softmax: fx.Node) -> Attention:
        product = self._product_before(softmax)
        output = self._product_after(softmax)
        scores = softmax.args[0]
        query, key = product.args[1:3] if product.target is aten.baddbmm.default else product.args[:2]
        assert isinstance(scores, fx.Node)
        assert isinstance(query, fx.Node)
        assert isinstance(key, fx.Node)
        present = None
        if scores.target is aten.add.Tensor and isinstance(hidden := scores.args[1], fx.Node) and hidden.target is _KEY_MASK:
            scores, present = scores.args[0], hidden.args[0]
            assert isinstance(scores, fx.Node)
        transposed = not _swaps_last(key)
        if not transposed:
            key = key.args[0]
        value = output.args[1]
        assert isinstance(key, fx.Node)
        assert isinstance(value, fx.Node)
        region = between(scores, product)
        others = [n for r in region for n in r.all_input_nodes if n not in region and n not in self.shapes and n is not product]
        others += [n for n in _added(product) if n not in self.shapes]
        if product.meta["val"].dim() == 3:
            query, key = self._by_head(query, "query"), self._by_head(key, "key")
        heads = int(query.meta["val"].shape[1])
        if output.meta["val"].dim() == 3:
            value, output = self._by_head(value, "value"), self._heads_again(output, heads)
        if others:
            scale, softcap, mask = 1.0, 0.0, Mask("given")
        else:
            scale, softcap, mask = self._scoring(product, scores, region, heads)

        def additive(size: int) -> Tensor:
            return self._scored(product, scores, heads, size, 0.0)

        found = self._region(output, query, key, value, scale, mask, softcap, transposed)
        return replace(found, present=present, additive=additive)  # type: ignore[arg-type]

    # -- the parts of an eager attention -----------------------------------------------------------------------------
    def _product_before(self, softmax: fx.Node) -> fx.Node:
        node = softmax.args[0]
        products = [n for n in ancestors(softmax, 12) if n.target in _MATMUL and n not in self.shapes]
        if not products:
            raise _NotUnderstood("no product of queries and keys leads to its softmax")
        product = max(products, key=self.order.__getitem__)
        assert isinstance(node, fx.Node)
        if product.meta["val"].dim() not in (3, 4):
            raise _NotUnderstood(f"its scores have {product.meta['val'].dim()} dimensions, not [batch, heads, query, key]")
        return product

    def _product_after(self, softmax: fx.Node) -> fx.Node:
        node = softmax
        for _ in range(6):
            users = [u for u in node.users if u.target not in SHAPE_QUERIES]
            if len(users) != 1:
                break
            node = users[0]
            if node.target in _MATMUL:
                if node.meta["val"].dim() not in (3, 4) or node.target is aten.baddbmm.default or not isinstance(node.args[1], fx.Node):
                    break
                return node
            if str(node.meta["val"].shape) != str(softmax.meta["val"].shape) and not self._merges(node, softmax):
                break
        raise _NotUnderstood("what its softmax yields is not simply multiplied by the values")

    def _merges(self, node: fx.Node, heads: fx.Node) -> bool:
        """Whether ``node`` [B * H, …] is ``heads`` [B, H, …] with its first two dimensions made one."""
        value, whole = node.meta.get("val"), heads.meta.get("val")
        if not (isinstance(value, Tensor) and isinstance(whole, Tensor) and value.dim() == 3 and whole.dim() == 4):
            return False
        sizes = {"batch": 2, "sequence": 3}
        try:
            x = torch.randn(symbolic_shape(self.graph, heads, sizes))
            (y,) = evaluate(self.graph, [node], sizes, {heads: x})
        except Exception:  # more goes into it
            return False
        return torch.equal(y, x.flatten(0, 1))

    def _by_head(self, node: fx.Node, name: str) -> fx.Node:
        """What a matrix for each of [batch * heads] was before these were one dimension: [B, H, …]."""
        for before in ancestors(node, 3):
            if before not in self.shapes and self._merges(node, before):
                return before
        raise _NotUnderstood(f"its {name} is {list(node.meta['val'].shape)}, and no reshape of [batch, heads, sequence, features]")

    def _heads_again(self, output: fx.Node, heads: int) -> fx.Node:
        """What an output [B * H, S, D] becomes first: [B, H, S, D]."""
        sizes = {"batch": 2, "sequence": 3}
        users = [u for u in output.users if u.target not in SHAPE_QUERIES]
        if len(users) == 1 and isinstance(value := users[0].meta.get("val"), Tensor) and value.dim() == 4:
            x = torch.randn(symbolic_shape(self.graph, output, sizes))
            (y,) = evaluate(self.graph, users, sizes, {output: x})
            if y.shape[1] == heads and torch.equal(y.flatten(0, 1), x):
                return users[0]
        raise _NotUnderstood("its output [batch * heads, query, features] is not taken apart into heads next")

    def _scoring(self, product: fx.Node, scores: fx.Node, region: set[fx.Node], heads: int) -> tuple[float, float, Mask]:
        """Scale, softcap and mask of the region from ``q @ k^T`` to the softmax, by evaluation."""

        run = partial(self._scored, product, scores, heads)

        sources = [n for r in region for n in r.all_input_nodes if n in self.shapes] + _added(product)
        key = (frozenset(sources), tuple(str(r.target) for r in (product, *region)))
        if key not in self._masks:
            self._masks[key] = self._classify(lambda size: run(size, 0.0), sources)
        sample = torch.randn(symbolic_shape(self.graph, product, {"batch": 2, "sequence": 9}), generator=torch.Generator().manual_seed(0))
        sample = _unflatten(sample, heads) * 300  # large enough for a soft cap to show
        seen = run(9, 0.0) > -1e4
        bias = torch.where(seen, run(9, 0.0), 0.0)
        scaled = (run(9, sample) - bias)[seen]
        scale = float(((run(9, 1e-3) - bias)[seen] / 1e-3).median())
        limit = float((run(9, 1e6) - bias)[seen].abs().max())
        if torch.allclose(scaled, scale * sample[seen], rtol=1e-4, atol=1e-4):
            return _round(scale), 0.0, self._masks[key]
        if torch.allclose(scaled, limit * torch.tanh(sample[seen] * scale / limit), rtol=1e-4, atol=1e-4):
            return _round(scale), _round(limit), self._masks[key]
        raise _NotUnderstood("its scores are neither scaled nor softly capped, but something else")

    def _scored(self, product: fx.Node, scores: fx.Node, heads: int, size: int, fill: float | Tensor) -> Tensor:
        """What is made of products of queries and keys that are all ``fill``, or [B, H, S, S]: [B, H, S, S]."""
        sizes = {"batch": 2, "sequence": size}
        shape = symbolic_shape(self.graph, product, sizes)
        given = torch.zeros(shape) + (fill.reshape(shape) if isinstance(fill, Tensor) else fill)
        if product.target is aten.baddbmm.default:
            (added,) = evaluate(self.graph, _added(product), sizes)
            beta, alpha = (float(product.kwargs.get(name, 1)) for name in ("beta", "alpha"))  # type: ignore[arg-type]
            given = beta * added + alpha * given
        return _unflatten(evaluate(self.graph, [scores], sizes, {product: given})[0], heads)

    # -- shared --------------------------------------------------------------------------------------------------------
    def _region(
        self, output: fx.Node, query: fx.Node, key: fx.Node, value: fx.Node, scale: float | None, mask: Mask, softcap: float = 0.0,
        transposed: bool = False,
    ) -> Attention:  # fmt: skip
        for name, node in (("query", query), ("key", key), ("value", value)):
            tensor = node.meta["val"]
            if tensor.dim() != 4 or not isinstance(tensor.shape[1], int):
                raise _NotUnderstood(f"its {name} is {list(tensor.shape)}, not [batch, heads, sequence, features]")
        heads = int(query.meta["val"].shape[1])
        key, value = self._unrepeated(key, heads), self._unrepeated(value, heads)
        rounded = all(n.target is ROUNDED for n in (key, value))
        if rounded:
            key, value = key.args[0], value.args[0]  # type: ignore[assignment]
        if key.meta["val"].shape[1] != value.meta["val"].shape[1]:
            raise _NotUnderstood("keys and values have different numbers of heads")
        if scale is None:
            scale = float(query.meta["val"].shape[3]) ** -0.5
        path = output.meta.get("path") or output.name
        turned = (self._rotary(query), None if transposed else self._rotary(key))
        projections = (self._projection(query), self._projection(key), self._projection(value))
        return Attention(path, output, query, key, value, scale, mask, softcap, transposed, turned, projections,
                         cache_bits=8 if rounded else 32)  # fmt: skip

    def _unrepeated(self, node: fx.Node, heads: int) -> fx.Node:
        """The keys (or values) before they were repeated for the groups of queries."""
        best, current = node, node
        for _ in range(5):
            inputs = [n for n in current.all_input_nodes if n not in self.shapes]
            if len(inputs) != 1 or current.op != "call_function":
                break
            current = inputs[0]
            value = current.meta.get("val")
            if not isinstance(value, Tensor) or value.dim() != 4 or not isinstance(value.shape[1], int):
                continue
            few = int(value.shape[1])
            if few > heads or heads % few or str(value.shape[3]) != str(node.meta["val"].shape[3]):
                continue
            sizes = {"batch": 2, "sequence": 3}
            try:
                x = torch.randn(symbolic_shape(self.graph, current, sizes))
                (y,) = evaluate(self.graph, [node], sizes, {current: x})
            except Exception:  # not a pure rearrangement
                break
            target = node.meta["val"].shape[1]
            if y.shape[1] != target or not torch.equal(y, x.repeat_interleave(target // few, 1)):
                break
            best = current
        return best

    def _rotary(self, node: fx.Node) -> Rotary | None:
        return find_rotary(self.graph, node, self.order, self.shapes)

    def _projection(self, node: fx.Node) -> fx.Node | None:
        for ancestor in ancestors(node, 24):
            if ancestor.target in _PROJECTION:
                return ancestor
        return None

    def _evaluate(self, node: fx.Node, size: int) -> Tensor:
        return evaluate(self.graph, [node], {"batch": 2 if size <= 32 else 1, "sequence": size})[0]

    def _mask(self, node: fx.Node, additive: Callable[[int], Tensor]) -> Mask:
        if node not in self.shapes:
            return Mask("given")
        if node not in self._masks:
            self._masks[node] = self._classify(additive, [node])
        return self._masks[node]

    def _classify(self, additive: Callable[[int], Tensor], sources: list[fx.Node]) -> Mask:
        nodes = {a for s in sources for a in (s, *ancestors(s, 200))}
        limit = int(self.graph.info.get("context_length") or 0)
        return classify_mask(additive, integer_literals(self.graph, nodes), limit)


def _unflatten(scores: Tensor, heads: int) -> Tensor:
    """[B, H, S, T] of that, or of [B * H, S, T]."""
    return scores.unflatten(0, (-1, heads)) if scores.dim() == 3 else scores


def _added(product: fx.Node) -> list[fx.Node]:
    """What a ``baddbmm`` adds to its product."""
    return [product.args[0]] if product.target is aten.baddbmm.default else []  # type: ignore[list-item]


def _swaps_last(node: fx.Node) -> bool:
    """Whether a node is another with its last two dimensions swapped."""
    if node.target is not aten.transpose.int:
        return node.target is aten.mT.default
    rank = node.meta["val"].dim()
    return {d % rank for d in node.args[1:]} == {rank - 2, rank - 1}


def _additive(mask: Tensor) -> Tensor:
    return torch.where(mask, 0.0, float("-inf")) if mask.dtype == torch.bool else mask


def _round(value: float) -> float:
    """The nearest short decimal or reciprocal root, when it is as good as equal: measured factors carry rounding noise."""
    inverse = 1 / (value * value)
    if abs(inverse - round(inverse)) < 1e-3 * inverse and abs(round(inverse) ** -0.5 - value) < 1e-5 * value:
        return round(inverse) ** -0.5
    return float(f"{value:.5g}")
