"""A whole decoder: embedding, pre-norm layers of attention and FFN, norm, head, with nothing else between them.

Formats that name a model's parts (checkpoints of stock architectures, GGUF) can be written for such a graph. It is recognised by
dataflow: each hop from the token ids to the logits must lead through the parts named here and through views, so that a scaled
embedding, a second norm or a soft cap is refused by name, not lost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from dyncomp.graph import Graph, op_name
from dyncomp.regions import Regions, find_regions
from dyncomp.regions.attention import Attention
from dyncomp.regions.blocks import Block
from dyncomp.regions.ffn import FFN, FFNWeights
from dyncomp.regions.linear import NO_OPS, RESHAPES, TRANSPOSES, Linear, aten, find_linears
from dyncomp.regions.norm import RMSNorm, find_rms_norms
from dyncomp.regions.refusal import Refusal
from dyncomp.regions.rotary import Rotary, rotary_tables
from dyncomp.regions.routed import RoutedFFN
from dyncomp.regions.router import TopK, find_topk


@dataclass(frozen=True)
class RoutedWeights:
    """Experts and their router: ``w_up`` [E, 2F, d] (activated rows first), ``w_down`` [E, d, F], biases where there are any.

    ``router`` is a string, the reason, where it is not of the kind that :class:`~dyncomp.regions.router.TopK` describes.
    """

    w_up: Tensor
    w_down: Tensor
    b_up: Tensor | None
    b_down: Tensor | None
    router: TopK | str


@dataclass(frozen=True)
class DecoderLayer:
    """``x += out(attention(norm(x)))``, ``x += ffn(norm(x))``. Norms are scales; weights [out, in]."""

    attention: Attention
    attention_norm: Tensor
    query: Linear
    key: Linear
    value: Linear
    out: Linear
    query_norm: Tensor | None
    key_norm: Tensor | None
    ffn_norm: Tensor
    ffn: FFN | RoutedFFN


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of the first ``rotated`` features of each head, rotate-half; ``frequencies``: [rotated / 2] radians a token.

    ``theta`` is its base when the frequencies are ``theta ** (-2 i / rotated)``, else None.
    """

    rotated: int
    frequencies: Tensor
    theta: float | None


@dataclass(frozen=True)
class Decoder:
    """The parts of a decoder by role. ``epsilon`` is that of every norm."""

    graph: Graph
    embedding: str
    layers: list[DecoderLayer]
    norm: Tensor
    epsilon: float
    rope: Rope
    head: Linear
    tied: bool

    @property
    def d_model(self) -> int:
        return int(self.norm.shape[0])

    @property
    def vocabulary(self) -> int:
        return int(self.graph.tensor(self.embedding).shape[0])

    def dense(self, layer: DecoderLayer) -> FFNWeights:
        """The weights of a layer's FFN that is not routed."""
        assert isinstance(layer.ffn, FFN)
        return layer.ffn.weights(self.graph)

    def routed(self, layer: DecoderLayer) -> RoutedWeights:
        """The weights of a layer's routed FFN."""
        region = layer.ffn
        assert isinstance(region, RoutedFFN)

        def read(name: str | None) -> Tensor | None:
            return None if name is None else self.graph.tensor(name).detach().float()

        up, down = read(region.w_up), read(region.w_down)
        assert up is not None
        assert down is not None
        return RoutedWeights(up, down, read(region.b_up), read(region.b_down), find_topk(self.graph, region))


def find_decoder(graph: Graph) -> Decoder | Refusal:
    """The decoder that ``graph`` is, or why it is none."""
    try:
        return _Reader(graph).decoder()
    except _Differs as difference:
        return Refusal(difference.where, "decoder", difference.reason)


class _Differs(Exception):
    def __init__(self, where: str, reason: str) -> None:
        super().__init__(reason)
        self.where, self.reason = where, reason


class _Reader:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.regions: Regions = find_regions(graph)
        self.linears = find_linears(graph)
        self.products = {linear.nodes[0]: linear for linear in self.linears.values()}
        self.norms = {norm.output: norm for norm in [*find_rms_norms(graph), *_fused_norms(graph)]}
        self.epsilons: set[float] = set()
        self.rotations: dict[tuple[fx.Node, ...], Rotary] = {}

    def decoder(self) -> Decoder:
        if [spec.name for spec in self.graph.inputs] != ["input_ids"] or len(self.graph.outputs) != 1:
            raise _Differs("inputs", f"it takes {', '.join(s.name for s in self.graph.inputs)}, not token ids alone")
        (ids,) = self.graph.placeholders
        tables = [n for n in self.graph.nodes if n.target is aten.embedding.default and n.args[1] is ids]
        if len(tables) != 1 or self.regions.head is None:
            raise _Differs("embedding", "it has no embedding table of its tokens, or no vocabulary head")
        (embedding,) = tables
        stream, layers = embedding, []
        blocks = {block.input: block for block in self.regions.blocks}
        while stream in blocks:
            first = blocks[stream]
            second = blocks.get(first.output)
            if first.kind != "attention" or second is None or second.kind != "ffn" or len(first.regions) + len(second.regions) != 2:
                raise _Differs(first.name, f"its layers are not an attention, then an FFN, each added to the stream ({first.kind} here)")
            layers.append(self._layer(first, second))
            stream = second.output
        if not layers:
            raise _Differs(op_name(next(iter(stream.users))), "what follows the embedding is no layer of attention and FFN")
        head = self.regions.head
        norm = self._norm(head.input, stream, "the vocabulary head")
        if _back(self.graph.output_nodes[0]) is not head.node:
            raise _Differs("head", f"its logits are changed after the head ({op_name(self.graph.output_nodes[0])})")
        if len(self.epsilons) > 1:
            raise _Differs("norms", f"its norms have different epsilons: {sorted(self.epsilons)}")
        name = str(embedding.args[0].target)  # type: ignore[union-attr]
        return Decoder(self.graph, name, layers, norm, self.epsilons.pop(), self._rope(), head.linear, head.tied)

    def _layer(self, first: Block, second: Block) -> DecoderLayer:
        attention, ffn = first.regions[0], second.regions[0]
        assert isinstance(attention, Attention)
        assert isinstance(ffn, FFN | RoutedFFN)
        query, query_norm = self._projection(attention.query, attention.rotary[0], attention.path)
        key, key_norm = self._projection(attention.key, attention.rotary[1], attention.path)
        value = self._linear(_back(attention.value), attention.path)
        if len({linear.node for linear in (query, key, value)}) != 3:
            raise _Differs(attention.path, "queries, keys and values come from one fused projection")
        if len({linear.input for linear in (query, key, value)}) != 1:
            raise _Differs(attention.path, "queries, keys and values are projected from different inputs")
        out = self._linear(_other(first.output, first.input), attention.path)
        if _back(out.input) is not attention.output:
            raise _Differs(attention.path, f"its output passes through {op_name(_back(out.input))} before it is projected")
        if attention.softcap:
            raise _Differs(attention.path, "its scores are softly capped")
        if _back(_other(second.output, second.input)) is not _back(ffn.output):
            raise _Differs(ffn.name, "its output is changed before it is added to the stream")
        return DecoderLayer(
            attention, self._norm(query.input, first.input, attention.path), query, key, value, out, query_norm, key_norm,
            self._norm(ffn.input, second.input, ffn.name), ffn,
        )  # fmt: skip

    def _projection(self, node: fx.Node, rotary: Rotary | None, where: str) -> tuple[Linear, Tensor | None]:
        """The linear layer that queries (or keys) come from, and the scale of the norm of each head, if there is one."""
        if rotary is None or _back(node) is not _back(rotary.result):
            raise _Differs(where, "queries and keys are not rotated by their position")
        if rotary.interleaved:
            raise _Differs(where, "its rotary embedding turns neighbouring features, not halves")
        self.rotations.setdefault(rotary.inputs, rotary)
        source, scale = _back(rotary.source), None
        if source in self.norms:
            norm = self.norms[source]
            self.epsilons.add(norm.epsilon)
            source, scale = _back(norm.input), norm.scale
        return self._linear(source, where), scale

    def _linear(self, node: fx.Node, where: str) -> Linear:
        node = _back(node)
        linear = self.linears.get(node)
        if linear is None or linear.axis != -1:
            raise _Differs(where, f"a linear layer was expected, found {op_name(node)}")
        return linear

    def _norm(self, node: fx.Node, stream: fx.Node, where: str) -> Tensor:
        norm = self.norms.get(_back(node))
        if norm is None or _back(norm.input) is not stream:
            what = "a norm of something else than the stream" if norm is not None else op_name(_back(node))
            raise _Differs(where, f"it reads {what}, not a root-mean-square norm of the stream")
        self.epsilons.add(norm.epsilon)
        return norm.scale

    def _rope(self) -> Rope:
        found: Rope | None = None
        for rotary in self.rotations.values():
            cos, sin = (table[1].double() for table in rotary_tables(self.graph, rotary, 2))
            if not torch.allclose(cos.square() + sin.square(), torch.ones_like(cos), rtol=1e-5):
                raise _Differs("rotary embedding", "it also scales what it turns")
            frequencies = torch.atan2(sin, cos)
            if found is None:
                found = Rope(rotary.rotated, frequencies, _base(frequencies, rotary.rotated))
            elif found.rotated != rotary.rotated or not torch.allclose(found.frequencies, frequencies, rtol=1e-5):
                raise _Differs("rotary embedding", "its layers turn by different angles")
        assert found is not None
        return found


def _base(frequencies: Tensor, rotated: int) -> float | None:
    """theta, when ``frequencies[i] == theta ** (-2 i / rotated)``."""
    if len(frequencies) < 2:
        return None
    exponents = -2 * torch.arange(len(frequencies), dtype=torch.float64) / rotated
    theta = math.exp(float(frequencies[1:].log().mean() / exponents[1:].mean()))
    theta = float(f"{theta:.5g}")
    return theta if torch.allclose(frequencies, theta**exponents, rtol=1e-4) else None


def _back(node: fx.Node) -> fx.Node:
    """Back through views, casts and permutations."""
    while node.op == "call_function" and node.target in NO_OPS | RESHAPES | TRANSPOSES:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _other(add: fx.Node, stream: fx.Node) -> fx.Node:
    """What is added to the stream, or the add itself when it is not a plain sum."""
    if add.target is not aten.add.Tensor or add.kwargs or stream not in add.args:
        return add
    left, right = add.args
    return right if left is stream else left  # type: ignore[return-value]


def _fused_norms(graph: Graph) -> list[RMSNorm]:
    """Norms that are one ``rms_norm`` node."""
    found = []
    for node in graph.nodes:
        if node.target is aten.rms_norm.default and isinstance(x := node.args[0], fx.Node):
            arguments: Mapping[str, object] = dict(zip(("weight", "eps"), node.args[2:], strict=False)) | node.kwargs
            weight, epsilon = arguments.get("weight"), arguments.get("eps")
            features = int(x.meta["val"].shape[-1])
            if isinstance(weight, fx.Node) and weight.op != "get_attr":
                continue
            scale = graph.tensor(weight).detach() if isinstance(weight, fx.Node) else torch.ones(features)
            found.append(RMSNorm(x, node, float(epsilon) if isinstance(epsilon, float) else torch.finfo(torch.float32).eps, scale))
    return found
