"""Gates that let tokens skip attentions and FFNs, and the paths that stand in for what is skipped: put into a graph, all open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from dyncomp.passes.carve_experts import carve
from dyncomp.passes.depth_kv import KeysAndValues
from dyncomp.passes.layerwise import routing_facts
from torch import Tensor, fx

from dyncomp.graph import Graph
from dyncomp.ops import expert_hidden, gated_linear, keep_large
from dyncomp.regions import FFN, RoutedFFN, find_routed
from dyncomp.regions.depth import Part
from dyncomp.regions.linear import Linear

aten = torch.ops.aten
_ROUTED = torch.ops.dyncomp.routed_ffn.default
ALWAYS = 1e4
"""Added to the score of the first position: attention of every later token leans on it (attention sinks, 2309.17453)."""


@dataclass(frozen=True)
class Unit:
    """Parts that a token skips together."""

    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        return self.parts[0].name

    @property
    def source(self) -> fx.Node:
        """What the router reads."""
        return self.parts[0].source

    @property
    def width(self) -> int:
        """The most features that a projection back to the residual stream reads."""
        return max(p.ffn.d_ff if p.ffn is not None else p.output.in_features for p in self.parts)  # type: ignore[union-attr]


class Gated:
    """One part behind its gates. Its tensors are read from the graph each time, so that fitting it is replacing them.

    Attributes:
        result: what is added to the residual stream.
        inputs: what the projection to the residual stream reads ([B, S, H * D]) for an attention; the FFN's input otherwise.
        routed: what an FFN has become; None for an attention, and for an FFN of linear layers that count small inputs as zero, which
            stays as it is, its result times the gates.
        refittable: whether its last projection may be replaced.
        shared: [E], 1 for the experts of a routed FFN that stand in for it; None where none do.
    """

    def __init__(
        self,
        graph: Graph,
        part: Part,
        gates: fx.Node,
        closed: fx.Node | None,
        rank: int,
        kv: KeysAndValues | None,
        *,
        experts: bool = False,
    ) -> None:
        self.graph, self.part, self.name = graph, part, part.name
        self.source, self.stream, self.gates = part.source, part.stream, gates
        self.routed: RoutedFFN | None = None
        self.bias: str | None = None
        self.refittable = True
        self.shared = shared_experts(graph, part) if experts else None
        computed = self._attention(part, kv) if part.output is not None else self._ffn(part)
        self.d_out = int(computed.meta["val"].shape[-1])
        self.result = computed if closed is None else self._stand_in(computed, closed, rank)
        self.rank = rank

    # ---- rewriting -------------------------------------------------------------------------------------------------
    def _attention(self, part: Part, kv: KeysAndValues | None) -> fx.Node:
        graph, output = self.graph, part.output
        assert output is not None
        if kv is not None:
            kv.apply(graph, self.gates)
        for linear in part.projections if kv is not None else (part.query,) if part.query is not None else ():
            node = linear.nodes[0]
            if linear.thresholds is not None:
                self._gate_sparse(node)
                continue
            with graph.inserting(before=node, path=part.name) as b:
                x, weight, *biases = node.args
                gated = b.call(gated_linear._opoverload, x, self.gates, weight, *biases)
            node.replace_all_uses_with(gated)
            graph.module.graph.erase_node(node)
        self.inputs, self.weight = output.input, _by_rows(graph, output)
        if output.thresholds is not None:
            return self._sparse_output(output)
        bias, self.bias = output.bias_vector(graph), f"{part.name}.output_bias"
        graph.add_tensor(self.bias, torch.zeros(output.out_features) if bias is None else bias.clone())
        with graph.inserting(before=output.node, path=part.name) as b:
            y = b.call(gated_linear._opoverload, output.input, self.gates, graph.read(self.weight), graph.read(self.bias))
        output.node.replace_all_uses_with(y)
        return y

    def _sparse_output(self, output: Linear) -> fx.Node:
        """A last projection that counts small inputs as zero goes on doing so: its result times the gates."""
        graph, node = self.graph, output.nodes[0]
        if self.weight != output.weight:
            with graph.inserting(before=node, path=self.name):
                node.update_arg(1, graph.read(self.weight))
            noted = graph.info.get("active_inputs", {})
            if output.weight in noted:
                graph.info["active_inputs"] = {**noted, self.weight: noted[output.weight]}
        self.bias = output.bias
        return self._gate_sparse(node)

    def _gate_sparse(self, node: fx.Node) -> fx.Node:
        with self.graph.inserting(before=node.next, path=self.name) as b:
            y = b.call(aten.mul.Tensor, node, self.gates)
        node.replace_all_uses_with(y, delete_user_cb=lambda user: user is not y)
        return y

    def _ffn(self, part: Part) -> fx.Node:
        graph, ffn = self.graph, part.ffn
        assert ffn is not None
        self.inputs = part.source
        if isinstance(ffn, FFN) and ffn.sparse:
            self.weight = _by_rows(graph, ffn.down)
            return self._sparse_output(ffn.down)
        if isinstance(ffn, FFN):
            y = carve(graph, ffn, ffn.weights(graph), torch.arange(ffn.d_ff)[None], self.gates)
        else:
            y = ffn.output
            with graph.inserting(before=ffn.node, path=part.name) as b:
                kept = b.call(aten.mul.Tensor, ffn.gates, self.gates)
                if self.shared is not None:
                    graph.add_tensor(f"{self.name}.standin.experts", self.shared, trainable=False)
                    kept = b.call(aten.maximum.default, kept, graph.read(f"{self.name}.standin.experts"))
                ffn.node.update_arg(1, kept)
        self.refittable = isinstance(ffn, FFN)
        self.routed = next(r for r in find_routed(graph) if y in (r.node, r.output))
        return y

    def _stand_in(self, computed: fx.Node, closed: fx.Node, rank: int) -> fx.Node:
        """computed + routed_ffn(source, 1 - gates, …): an expert without activation, its last neuron a constant 1."""
        graph, features = self.graph, int(self.source.meta["val"].shape[-1])
        self.set_stand_in(torch.zeros(features, rank - 1), torch.zeros(rank - 1, self.d_out), torch.zeros(self.d_out))
        routing_facts(graph, f"{self.name}.standin")["standin"] = True
        with graph.inserting(before=computed.next, path=f"{self.name}.standin") as b:
            names = (f"{self.name}.standin.{n}" for n in ("w_up", "b_up", "w_down"))
            z = b.call(_ROUTED, self.source, closed, *(graph.read(n) for n in names), "identity")
            y = b.call(aten.add.Tensor, computed, z)
        computed.replace_all_uses_with(y, delete_user_cb=lambda user: user is not y)
        return y

    # ---- what it computes, and what may be fitted ------------------------------------------------------------------
    def features(self, inputs: Tensor) -> Tensor:
        """What the last projection reads, for every token: ``inputs`` [n, …] -> [n, features]."""
        graph, ffn = self.graph, self.part.ffn
        if self.routed is not None:
            up, down = graph.tensor(self.routed.w_up).detach(), graph.tensor(self.routed.w_down).detach()
            b_up = graph.tensor(self.routed.b_up).detach() if self.routed.b_up else None
            return expert_hidden(inputs, up, b_up, down.shape[2], self.routed.activation).flatten(1)
        if isinstance(ffn, FFN):
            weights = ffn.weights(graph)
            x, b_up = self._large(inputs, ffn.ups[0]), None if weights.b_up is None else weights.b_up[None]
            return self._large(expert_hidden(x, weights.w_up[None], b_up, ffn.d_ff, ffn.activation).flatten(1), ffn.down)
        assert self.part.output is not None
        return self._large(inputs, self.part.output)

    def of_experts(self, inputs: Tensor) -> Tensor:
        """[n, d] -> [n, d_out]: what a token that skips gets from the experts that stand in, the bias counted."""
        assert self.shared is not None
        weight, bias = self.projection()
        features = self.features(inputs).unflatten(1, (len(self.shared), -1)) * self.shared[:, None]
        return torch.nn.functional.linear(features.flatten(1), weight, bias)

    def _large(self, x: Tensor, linear: Linear) -> Tensor:
        """The inputs [n, K] of a linear layer as they count."""
        return x if linear.thresholds is None else keep_large(x, self.graph.tensor(linear.thresholds))

    def projection(self) -> tuple[Tensor, Tensor]:
        """The last projection: (weight [d_out, features], bias [d_out])."""
        if self.routed is None:
            matrix, bias = self.graph.tensor(self.weight).detach(), self.bias
        else:
            matrix, bias = self.graph.tensor(self.routed.w_down).detach().transpose(0, 1).flatten(1), self.routed.b_down
        return matrix, torch.zeros(self.d_out) if bias is None else self.graph.tensor(bias).detach()

    def set_projection(self, weight: Tensor) -> None:
        """Replace the weight of the last projection, [d_out, features]."""
        if self.routed is None:
            self.graph.add_tensor(self.weight, weight)
        else:
            experts = self.graph.tensor(self.routed.w_down).shape[0]
            self.graph.add_tensor(self.routed.w_down, weight.unflatten(1, (experts, -1)).transpose(0, 1).contiguous())

    def set_stand_in(self, down: Tensor, up: Tensor, bias: Tensor) -> None:
        """z = source @ down @ up + bias: down [features, rank - 1], up [rank - 1, d_out], bias [d_out]."""
        w_up = torch.cat([down.T, torch.zeros(1, len(down))])[None]
        b_up = torch.cat([torch.zeros(down.shape[1]), torch.ones(1)])[None]
        w_down = torch.cat([up.T, bias[:, None]], 1)[None]
        for name, value in (("w_up", w_up), ("b_up", b_up), ("w_down", w_down)):
            self.graph.add_tensor(f"{self.name}.standin.{name}", value.contiguous())

    def stand_in(self, x: Tensor) -> Tensor:
        """[n, d] -> [n, d_out]: what a token that skips gets, the bias that every token gets not counted."""
        if not self.rank:
            return x.new_zeros(len(x), self.d_out)
        up, b_up, down = (self.graph.tensor(f"{self.name}.standin.{n}").detach()[0] for n in ("w_up", "b_up", "w_down"))
        return (x @ up.T + b_up) @ down.T

    @property
    def constant(self) -> Tensor:
        """[d_out]: the bias that skipping does not spare, a routed FFN's."""
        bias = None if self.routed is None else self.routed.b_down
        return torch.zeros(self.d_out) if bias is None else self.graph.tensor(bias).detach()


@dataclass(frozen=True)
class GatedUnit:
    """A unit behind its gates: the sign of ``scores = linear(source, weight, bias)``, which starts as 0 * x + 1."""

    name: str
    gates: fx.Node
    closed: fx.Node | None
    source: fx.Node
    scores: fx.Node
    weight: str
    bias: str
    parts: tuple[Gated, ...]

    def choose(self, graph: Graph, rule: Callable[[Tensor], Tensor], *, keep_first: bool) -> None:
        """Let the gates be the sign of ``rule(scores)``, [B, S, 1] -> [B, S, 1].

        Args:
            keep_first: whether the scores are those that keep the first token.
        """
        scores = self.gates.args[0] if keep_first else self.scores
        assert isinstance(scores, fx.Node)
        with graph.inserting(before=self.gates) as b:
            self.gates.update_arg(0, b.inline(rule, scores))


def insert_gates(
    graph: Graph, unit: Unit, rank: int, kv: KeysAndValues | Sequence[KeysAndValues] | None = None, *, after: GatedUnit | None = None,
    experts: bool = False,
) -> GatedUnit:  # fmt: skip
    """Put a unit behind gates that are open; the graph computes what it did.

    before:  x + attention(linear(n, Wq), k, v) @ Wo
    after:   gates = threshold_gates(linear(n, router) + first position)
             x + gated_linear(attention(gated_linear(n, gates, Wq), k, v), gates, Wo) + routed_ffn(n, 1 - gates, stand-in)
    An FFN becomes ``routed_ffn`` with one expert, or its gates are multiplied. Linear layers that count small inputs as zero keep their
    thresholds: what they give is multiplied by the gates, ``sparse_linear(…) * gates``; of a sparse FFN, what the FFN gives.

    Args:
        rank: of the stand-in, its constant counted; 0 for none.
        kv: what becomes of the keys and values of tokens that skip the unit's attentions; None computes them.
        after: a token that skips that unit, skips this one too: ``gates = threshold_gates(minimum(its score, that unit's))``.
        experts: a token that skips an FFN still runs its shared experts: ``maximum(router's gates * gates, shared)``.
    """
    name, source = unit.name, unit.source
    weight, bias = f"{name}.depth.weight", f"{name}.depth.bias"
    graph.add_tensor(weight, torch.zeros(1, int(source.meta["val"].shape[-1])))
    graph.add_tensor(bias, torch.ones(1))
    first = _first_position(graph)
    with graph.inserting(before=source.next, path=f"{name}.depth") as b:
        scores = b.call(aten.linear.default, source, graph.read(weight), graph.read(bias))
        kept = scores if first is None else b.call(aten.add.Tensor, scores, first)
        if after is not None:
            kept = b.call(aten.minimum.default, kept, after.gates.args[0])
        gates = b.call(torch.ops.dyncomp.threshold_gates.default, kept)
        closed = b.call(aten.rsub.Scalar, gates, 1) if rank else None
    every = kv if isinstance(kv, Sequence) else () if kv is None else (kv,)
    known = {policy.attention.output: policy for policy in every}
    parts = tuple(
        Gated(graph, part, gates, closed, rank, known.get(part.attention.output) if part.attention is not None else None, experts=experts)
        for part in unit.parts
    )
    return GatedUnit(name, gates, closed, source, scores, weight, bias, parts)


def shared_experts(graph: Graph, part: Part) -> Tensor | None:
    """[E], 1 for the experts of a routed FFN that every token runs; None where there are none, or nothing else."""
    if not isinstance(part.ffn, RoutedFFN):
        return None
    count, experts = int(routing_facts(graph, part.ffn.name).get("shared", 0)), part.ffn.experts
    return (torch.arange(experts) < count).float() if 0 < count < experts else None


def _first_position(graph: Graph) -> fx.Node | None:
    """[S, 1]: :data:`ALWAYS` at position 0, 0 elsewhere; made once. None for a model that does not read a sequence of tokens."""
    shape = graph.inputs[0].shape
    if len(shape) != 2 or not isinstance(shape[1], str):
        return None
    for node in graph.nodes:
        if node.meta.get("first_position"):
            return node
    anchor = next(n for n in graph.nodes if n.op == "call_function")
    with graph.inserting(before=anchor, path="depth") as b:
        positions = b.call(aten.arange.default, b.call(aten.sym_size.int, graph.placeholders[0], 1))
        first = b.call(aten.eq.Scalar, positions, 0)
        node = b.call(aten.unsqueeze.default, b.call(aten.mul.Tensor, b.call(aten._to_copy.default, first, dtype=torch.float32), ALWAYS), 1)
    node.meta["first_position"] = True
    return node


def _by_rows(graph: Graph, linear: Linear) -> str:
    """The name of the weight as [out, in], read by no other layer: it may be fitted."""
    readers = sum(len(n.users) for n in graph.nodes if n.op == "get_attr" and n.target == linear.weight)
    if not linear.transposed and readers == 1:
        return linear.weight
    name = f"{linear.node.name}_weight"
    graph.add_tensor(name, linear.weight_matrix(graph).contiguous())
    return name
