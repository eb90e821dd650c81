"""FFNs that are routed already, found by their operation."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

import dyncomp.ops  # noqa: F401  (registers dyncomp::routed_ffn)
from dyncomp.graph import Graph
from dyncomp.regions.linear import Names, aten, constant


@dataclass(frozen=True)
class LinearPath:
    """A low-rank linear map of an FFN's input that every token takes beside the experts: ``experts(x) + up (down x)``.

    Attributes:
        node: the addition.
        down: [rank, d_model], up: [d_out, rank]; names of the constants.
    """

    node: fx.Node
    down: str
    up: str


@dataclass(frozen=True)
class RoutedFFN:
    """An FFN rewritten to ``dyncomp::routed_ffn`` (see :mod:`dyncomp.ops`).

    Attributes:
        name: that of the FFN it was; unique in its graph.
        node: the operation; ``output``: the node after the bias of the down-projection is added, or ``node``.
        input: [..., d_model]. gates: [..., experts].
        w_up, b_up, w_down, b_down: names of the constants.
        experts: E. d_ff: hidden neurons of all experts together.
        router: the nodes that only serve to compute the gates, in graph order.
        path: what is added to ``output``, from the same input.
        trained: the model came with these experts, and their router; the others are made of dense FFNs.
    """

    name: str
    node: fx.Node
    input: fx.Node
    gates: fx.Node
    w_up: str
    b_up: str | None
    w_down: str
    b_down: str | None
    activation: str
    experts: int
    d_ff: int
    d_model: int
    d_out: int
    gated: bool
    output: fx.Node
    router: tuple[fx.Node, ...]
    path: LinearPath | None = None
    trained: bool = False

    @property
    def result(self) -> fx.Node:
        """What the whole FFN gives: ``output``, with the path's."""
        return self.output if self.path is None else self.path.node

    @property
    def parameters(self) -> int:
        """Weights and biases of all experts, without the router."""
        return self.expert_parameters + (self.d_out if self.b_down is not None else 0)

    @property
    def expert_parameters(self) -> int:
        rows = self.d_ff * (2 if self.gated else 1)
        return rows * self.d_model + self.d_out * self.d_ff + (rows if self.b_up is not None else 0)

    @property
    def flops_per_token(self) -> int:
        """With every expert active, without the router: two per multiply-accumulate."""
        return 2 * self.d_ff * (self.d_model * (2 if self.gated else 1) + self.d_out)


def find_routed(graph: Graph) -> list[RoutedFFN]:
    """All routed FFNs in graph order."""
    names = Names()
    facts = graph.info.get("routing", {})
    found = [_read(graph, node, names) for node in graph.module.graph.nodes if node.target is torch.ops.dyncomp.routed_ffn.default]
    return [replace(r, trained=bool(facts.get(r.name, {}).get("trained"))) for r in found]


def find_carved(graph: Graph) -> list[RoutedFFN]:
    """Those that were dense FFNs: what passes that fit routers work on."""
    return [r for r in find_routed(graph) if not r.trained]


def _read(graph: Graph, node: fx.Node, names: Names) -> RoutedFFN:
    x, gates, w_up, b_up, w_down, activation = node.args
    assert isinstance(x, fx.Node)
    assert isinstance(gates, fx.Node)
    up, down = _weight_name(graph, w_up), _weight_name(graph, w_down)
    experts, rows, d_model = graph.tensor(up).shape
    _, d_out, neurons = graph.tensor(down).shape
    b_down, output = _bias_after(graph, node, d_out)
    return RoutedFFN(
        name=names.take(str(node.meta.get("path", "")), node),
        node=node, input=x, gates=gates, output=output, path=_path_beside(graph, output, x), router=_router(x, gates, node),
        w_up=up, b_up=None if b_up is None else _weight_name(graph, b_up), w_down=down, b_down=b_down,
        activation=str(activation), gated=rows == 2 * neurons, experts=experts, d_ff=experts * neurons, d_model=d_model, d_out=d_out,
    )  # fmt: skip


def _weight_name(graph: Graph, argument: object) -> str:
    found = constant(graph, argument)
    return found[0] if found is not None else str(argument)


def _bias_after(graph: Graph, node: fx.Node, d_out: int) -> tuple[str | None, fx.Node]:
    if len(node.users) == 1:
        (user,) = node.users
        if user.target is aten.add.Tensor and not user.kwargs:
            found = constant(graph, user.args[1] if user.args[0] is node else user.args[0])
            if found is not None and tuple(graph.tensor(found[0]).shape) == (d_out,):
                return found[0], user
    return None, node


def _path_beside(graph: Graph, output: fx.Node, x: fx.Node) -> LinearPath | None:
    if len(output.users) != 1:
        return None
    (user,) = output.users
    if user.target is not aten.add.Tensor or user.kwargs:
        return None
    up = user.args[1] if user.args[0] is output else user.args[0]
    down = _without_bias(up)
    if down is None or _without_bias(down) is not x:
        return None
    assert isinstance(up, fx.Node)
    return LinearPath(user, _weight_name(graph, down.args[1]), _weight_name(graph, up.args[1]))


def _without_bias(node: object) -> fx.Node | None:
    """What a linear layer without bias reads, or None."""
    if not isinstance(node, fx.Node) or node.target is not aten.linear.default or len(node.args) != 2:
        return None
    return node.args[0]  # type: ignore[return-value]


def _router(x: fx.Node, gates: fx.Node, node: fx.Node) -> tuple[fx.Node, ...]:
    """The call nodes before the gates whose results go to the gates only: grown backwards, latest node first."""
    found: list[fx.Node] = []
    inside = {node}
    waiting = {gates}
    while waiting:
        latest = max(waiting)
        waiting.remove(latest)
        if latest is x or latest.op != "call_function" or not all(user in inside for user in latest.users):
            continue
        inside.add(latest)
        found.append(latest)
        waiting.update(n for n in latest.all_input_nodes if n not in inside)
    return tuple(reversed(found))
