"""Where a graph's inputs of linear layers can be scaled: what makes them, and all that reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from dyncomp.passes.precisions import aliases
from torch import Tensor, fx

from dyncomp.graph import Graph, op_name
from dyncomp.regions import FFN, Linear, RoutedFFN, find_linears, find_regions
from dyncomp.regions.depth import find_skips
from dyncomp.regions.linear import LAYERS, NO_OPS, RESHAPES, keeps_last_axis
from dyncomp.regions.probe import LAYOUTS
from dyncomp.regions.refusal import Refusal

aten = torch.ops.aten
_NORMS = (aten.rms_norm.default, aten.layer_norm.default)
_HOMOGENEOUS = ("relu", "leaky_relu", "identity")
"""Activations whose result is scaled by what their input is scaled by."""


@dataclass(frozen=True)
class Reader:
    """A weight that multiplies scaled inputs, [..., N, K], or [K, N] where it is ``transposed``.

    Attributes:
        thresholds: name of what these inputs must exceed, or None.
        gates: of the experts whose up-projections it is, or None.
        rounded: ``quantize`` rounds it; the weights of routers stay as they are.
    """

    weight: str
    transposed: bool = False
    thresholds: str | None = None
    gates: fx.Node | None = None
    rounded: bool = True

    def rows(self, graph: Graph) -> Tensor:
        """[N, K], of all experts one after the other."""
        weight = graph.tensor(self.weight).detach()
        return weight.t() if self.transposed else weight.flatten(0, -2)


@dataclass(frozen=True)
class Norm:
    """A norm's node, which makes inputs."""

    node: fx.Node

    def divide(self, graph: Graph, scales: Tensor) -> None:
        """Let it give its outputs divided by ``scales`` [K]."""
        source, shape, *rest = self.node.args
        parts: list[Any] = rest + [None] * (2 - len(rest))
        for position, what in enumerate(("weight", "bias")[: 1 + (self.node.target is aten.layer_norm.default)]):
            node = parts[position]
            if node is None and what == "bias":
                continue
            value = torch.ones_like(scales) if node is None else graph.tensor(node).detach()
            name = f"awq.{self.node.name}.{what}"
            graph.add_tensor(name, value / scales)
            with graph.inserting(before=self.node):
                parts[position] = graph.read(name)
        self.node.args = (source, shape, *parts[: max(len(rest), 1)])


@dataclass(frozen=True)
class Rows:
    """Rows of up-projections, whose outputs are factors of the hidden neurons.

    Attributes:
        weight: name; [E, R, d], [R, d], or [d, R] where it is ``transposed``. bias: name, [E, R] or [R]; or None.
        rows: [K] which of the R.
    """

    weight: str
    bias: str | None
    rows: Tensor
    transposed: bool = False

    def divide(self, graph: Graph, scales: Tensor) -> None:
        """Let these outputs be divided by ``scales`` [K] or [E, K]."""
        weight = graph.tensor(self.weight).detach()
        factors = torch.ones(*scales.shape[:-1], weight.shape[-1 if self.transposed else -2])
        factors[..., self.rows] = scales
        graph.add_tensor(self.weight, weight / (factors if self.transposed else factors[..., None]))
        if self.bias is not None:
            graph.add_tensor(self.bias, graph.tensor(self.bias).detach() / factors)


@dataclass(frozen=True)
class Site:
    """Inputs that can be scaled.

    Attributes:
        at: the node up to which a graph must run before the inputs, and the gates of experts that read them, are known.
        input: the inputs; of ``experts``, what these read.
        routed: where experts' up-projections read the inputs.
        experts: the inputs are those of these experts' down-projections, inside the operation.
    """

    at: fx.Node
    input: fx.Node
    readers: tuple[Reader, ...]
    maker: Norm | Rows
    routed: tuple[RoutedFFN, ...] = ()
    experts: RoutedFFN | None = None

    @property
    def rounded(self) -> list[Reader]:
        return [r for r in self.readers if r.rounded]

    @property
    def name(self) -> str:
        return self.rounded[0].weight

    @property
    def weights(self) -> list[str]:
        return [r.weight for r in self.readers]

    def scale(self, graph: Graph, scales: Tensor) -> None:
        """Divide the inputs by ``scales`` ([K]; [E, K] for experts), and let all that reads them make good for it."""
        for reader in self.readers:
            weight = graph.tensor(reader.weight).detach()
            graph.add_tensor(reader.weight, weight * (scales[:, None] if reader.transposed else scales[..., None, :]))
        for name in {r.thresholds for r in self.readers} - {None}:
            graph.add_tensor(name, graph.tensor(name).detach() / scales, trainable=False)  # type: ignore[arg-type]
        self.maker.divide(graph, scales)


def find_sites(graph: Graph, block: int) -> tuple[list[Site], list[Refusal]]:
    """In the order of ``at``, and what makes inputs of layers and cannot be scaled.

    Args:
        block: weights of a row that share a scale; layers whose inputs it does not divide are not rounded.
    """
    search = _Search(graph, block)
    found = [
        *map(search.norm, (n for n in graph.nodes if n.target in _NORMS)),
        *map(search.ffn, search.ffns),
        *map(search.experts, search.routed),
    ]
    return sorted((s for s in found if isinstance(s, Site)), key=lambda s: s.at), [s for s in found if isinstance(s, Refusal)]


class _Search:
    def __init__(self, graph: Graph, block: int) -> None:
        regions = find_regions(graph)
        self.graph, self.block = graph, block
        self.ffns, self.routed = [*regions.ffns, *regions.sparse_ffns], regions.routed
        self._routers = {n for r in self.routed for n in r.router} | {s.scores for s in find_skips(graph)}
        linears = find_linears(graph).values()
        self._linears = {linear.nodes[0]: linear for linear in linears if linear.axis == -1 and linear.nodes[0].target in LAYERS}
        self._experts = {r.node: r for r in self.routed}
        self._reads = Counter(str(n.target) for n in graph.nodes if n.op == "get_attr" for _ in n.users)

    def norm(self, node: fx.Node) -> Site | Refusal | None:
        """None where nothing that is rounded reads it."""
        readers, routed, other = self._readers(node)
        if not any(r.rounded for r in readers):
            return None
        constant = len(node.args[1]) == 1 and all(a.op == "get_attr" for a in node.args[2:4] if isinstance(a, fx.Node))  # type: ignore[arg-type]
        if not constant:
            return self._refuse(node, "its weight is no constant vector")
        if other is not None:
            return self._refuse(node, f"{op_name(other) if other.op == 'call_function' else 'the result of the model'} reads it too")
        if (name := self._shared(r.weight for r in readers) or self._shared_thresholds(readers)) is not None:
            return self._refuse(node, f"{name}, which reads it, is in few bits already, or others read it too")
        last = max(routed, key=self._known, default=None)
        at, x = (node, node) if last is None else (self._known(last), last.input)
        return Site(at, x, readers, Norm(node), routed)

    def ffn(self, ffn: FFN) -> Site | Refusal | None:
        """The inputs of a down-projection."""
        up, down = ffn.ups[-1], ffn.down
        if not {up.nodes[0], down.nodes[0]} <= self._linears.keys() or down.in_features % self.block:
            return None
        reader = self._reader(down)
        if (refusal := self._refuse_factors(ffn, (up.weight, up.bias, down.weight), (reader,))) is not None:
            return refusal
        rows = torch.arange(up.out_features)
        if ffn.gated and len(ffn.ups) == 1:
            rows = LAYOUTS[ffn.layout](rows)[1]
        return Site(down.input, down.input, (reader,), Rows(up.weight, up.bias, rows, up.transposed))

    def experts(self, routed: RoutedFFN) -> Site | Refusal | None:
        """The same of all experts."""
        neurons = routed.d_ff // routed.experts
        if not self._rounds(routed):
            return None
        if (refusal := self._refuse_factors(routed, (routed.w_up, routed.b_up, routed.w_down))) is not None:
            return refusal
        maker = Rows(routed.w_up, routed.b_up, torch.arange(neurons) + (neurons if routed.gated else 0))
        return Site(self._known(routed), routed.input, (Reader(routed.w_down),), maker, experts=routed)

    def _readers(self, node: fx.Node) -> tuple[tuple[Reader, ...], tuple[RoutedFFN, ...], fx.Node | None]:
        """(the weights that multiply what a node gives, the experts whose they are, what else reads it)."""
        readers, routed = list[Reader](), list[RoutedFFN]()
        other = None
        for user in node.users:
            if user in self._linears and self._linears[user].input is node:
                readers.append(self._reader(self._linears[user]))
            elif user in self._experts and self._experts[user].input is node:
                routed.append(experts := self._experts[user])
                readers.append(Reader(experts.w_up, gates=experts.gates, rounded=self._rounds(experts)))
            elif user.target in NO_OPS or (user.target in RESHAPES and keeps_last_axis(user)):
                more, theirs, found = self._readers(user)
                readers += more
                routed += theirs
                other = other or found
            elif user.target is not aten.sym_size.int:
                other = other or user
        return tuple(readers), tuple(routed), other

    def _reader(self, linear: Linear) -> Reader:
        rounded = linear.nodes[0] not in self._routers and linear.in_features % self.block == 0
        return Reader(linear.weight, linear.transposed, linear.thresholds, rounded=rounded)

    def _known(self, routed: RoutedFFN) -> fx.Node:
        """Where its input and its gates are known, and it has not run."""
        return max(routed.input, routed.gates)

    def _rounds(self, routed: RoutedFFN) -> bool:
        return routed.d_model % self.block == 0 and (routed.d_ff // routed.experts) % self.block == 0

    def _refuse_factors(self, ffn: FFN | RoutedFFN, names: Iterable[str | None], readers: tuple[Reader, ...] = ()) -> Refusal | None:
        if not ffn.gated and ffn.activation not in _HOMOGENEOUS:
            return Refusal(ffn.name, "awq", f"what {ffn.activation} gives is not scaled by scaling what it is given")
        if (name := self._shared(n for n in names if n is not None) or self._shared_thresholds(readers)) is not None:
            return Refusal(ffn.name, "awq", f"{name} is in few bits already, or others read it too")
        return None

    def _shared(self, names: Iterable[str]) -> str | None:
        """The first that may not be changed: another node reads it, or another name stands for it, or it has codes."""
        taken = lambda n: n in self.graph.quantized or self._reads[n] > 1 or len(aliases(self.graph, n)) > 1  # noqa: E731
        return next((n for n in names if taken(n)), None)

    def _shared_thresholds(self, readers: Iterable[Reader]) -> str | None:
        """The first that layers with other inputs read too."""
        own = Counter(r.thresholds for r in readers if r.thresholds is not None)
        return next((name for name, count in own.items() if self._reads[name] > count), None)

    def _refuse(self, node: fx.Node, reason: str) -> Refusal:
        return Refusal(str(node.meta.get("path") or node.name), "awq", reason)
