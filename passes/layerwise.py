"""What passes that fit one routed FFN after the other have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from dyncomp.passes.least_squares import enough_tokens
from torch import Tensor, fx

from dyncomp.errors import PassError, RequestError
from dyncomp.graph import Graph
from dyncomp.ops import expert_hidden
from dyncomp.pipeline import Context, Pass, PassResult
from dyncomp.regions import RoutedFFN, find_carved, find_regions, find_routed
from dyncomp.regions.thresholds import Threshold
from dyncomp.sweep import Sweep, fast_matmul, reduced_products, release_memory

aten = torch.ops.aten
_GATES = (torch.ops.dyncomp.threshold_gates.default, torch.ops.dyncomp.topk_gates.default)


class ExpertView:
    """The tensors of one routed FFN and of its router, as they are in the graph now.

    A router is any sub-graph of ``x`` alone. One with a threshold has threshold gates, and before them a node that adds a bias:
    ``linear(f, W, b)`` or ``add(f, b)``. (``carve-experts`` makes ``linear(x, W, b)``, see :mod:`dyncomp.passes.routers` for others.)
    """

    def __init__(self, graph: Graph, region: RoutedFFN) -> None:
        if not reads_only(region.router, region.input):
            raise PassError(f"{region.name} has no router of its input alone", hint="run carve-experts first")
        self.region, self.name, self.gates = region, region.name, region.gates
        self._graph = graph
        self.w_up, self.w_down = graph.tensor(region.w_up).detach(), graph.tensor(region.w_down).detach()
        self.b_up = graph.tensor(region.b_up).detach() if region.b_up else None
        self.b_down = graph.tensor(region.b_down).detach() if region.b_down else None
        self.experts, self.d_out, self.neurons = self.w_down.shape
        self.d_model = self.w_up.shape[2]
        self.activation, self.gated = region.activation, region.gated
        self._shared = routing_facts(graph, region.name).get("shared", 0)

    @property
    def router_bias(self) -> str:
        """Name of the bias that the threshold is a part of."""
        scores = self.gates.args[0] if self.gates.target in _GATES else None
        if not isinstance(scores, fx.Node) or not ((scores.target is aten.linear.default and len(scores.args) == 3) or _adds_bias(scores)):
            raise PassError(f"{self.name} has no router whose threshold can be set", hint="run carve-experts first")
        return str(scores.args[-1].target)  # type: ignore[union-attr]

    @property
    def bias(self) -> Tensor:
        return self._graph.tensor(self.router_bias).detach()

    @property
    def shared(self) -> Tensor:
        """[E] experts that every token runs."""
        marked = torch.zeros(self.experts, dtype=torch.bool)
        marked[: self._shared] = True
        return marked

    def hidden(self, x: Tensor) -> Tensor:
        """[n, d] -> [n, E, F]."""
        return expert_hidden(x, self.w_up, self.b_up, self.neurons, self.activation)

    def beside(self, x: Tensor) -> Tensor:
        """What every token gets beside the experts, by the bias and by the linear path: [n, d] -> [n, d_out], or [d_out]."""
        found = self.b_down if self.b_down is not None else torch.zeros(self.d_out)
        if (path := self.region.path) is not None:
            found = found + x @ self._graph.tensor(path.down).detach().T @ self._graph.tensor(path.up).detach().T
        return found

    def scores(self, x: Tensor) -> Tensor:
        """[n, d] -> [n, E], with the router as it is in the graph now: what threshold or top-k gates are made of."""
        return self._run(x)[self.gates.args[0]]  # type: ignore[index]

    def gate_values(self, x: Tensor) -> Tensor:
        """[..., d] as the graph has it (a router may look across a sequence) -> [n, E]."""
        return self._run(x)[self.gates].flatten(0, -2)

    def _run(self, x: Tensor) -> dict[fx.Node, Any]:
        values: dict[fx.Node, Any] = {self.region.input: x}
        for node in self.region.router:
            read = lambda n: self._graph.tensor(n).detach() if n.op == "get_attr" else values[n]  # noqa: E731
            args, kwargs = fx.map_arg((node.args, node.kwargs), read)
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return values


def reads_only(router: tuple[fx.Node, ...], x: fx.Node) -> bool:
    """Whether a router is computed from ``x`` and constants alone."""
    known = {x, *router}
    return bool(router) and all(i in known or i.op == "get_attr" for node in router for i in node.all_input_nodes)


def _adds_bias(node: fx.Node) -> bool:
    return node.target is aten.add.Tensor and isinstance(node.args[1], fx.Node) and node.args[1].op == "get_attr"


def routing_facts(graph: Graph, name: str) -> dict[str, Any]:
    """What passes noted about one routed FFN (``shared`` experts, the ``active`` share of its neurons); may be added to."""
    return graph.info.setdefault("routing", {}).setdefault(name, {})


@dataclass
class Layer:
    """One routed FFN with its inputs on the calibration text, computed through the layers as they are by then.

    Args:
        inputs: [B, S, d] a batch.
        wanted: [B, S, d_out] a batch, or None: the output at which the residual stream after the FFN equals the dense
            model's, whatever error the layers before it have left in the stream.
        fresh: the same of text that nothing is fitted to, for thresholds; empty where there is no more text.
    """

    view: ExpertView
    inputs: list[Tensor]
    wanted: list[Tensor] | None = None
    fresh: list[Tensor] = field(default_factory=list)
    _hidden: list[Tensor] = field(default_factory=list)
    _hidden_of: Tensor | None = None

    def hidden(self) -> Iterator[Tensor]:
        """Hidden activations of every expert, [n, E, F] a batch; computed once for all passes that look at this layer.

        Kept as :func:`~dyncomp.sweep.reduced_products` gives them: in bfloat16 where the CPU has it, ``tokens * d_ff * 2`` bytes.
        """
        if self._hidden_of is None or not self._hidden_of.is_set_to(self.view.w_up):
            self._hidden, self._hidden_of = [], self.view.w_up
            with reduced_products():
                for x in self.inputs:
                    self._hidden.append(self.view.hidden(x.reshape(-1, self.view.d_model)))
        yield from self._hidden

    def outputs(self) -> list[Tensor]:
        """What the routed FFN gives as it is now, [B, S, d_out] a batch (see :func:`dyncomp.ops.routed_ffn`)."""
        down = self.view.w_down.transpose(0, 1).flatten(1)
        found = []
        for x, h in zip(self.inputs, self.hidden(), strict=True):
            gates = self.view.gate_values(x)
            with reduced_products():
                y = torch.nn.functional.linear((h * gates[..., None].to(h.dtype)).flatten(1), down)
            found.append(y.to(x.dtype).view(*x.shape[:-1], -1))
        return found


@dataclass(frozen=True)
class LayerwisePass(Pass):
    """A pass that fits one routed FFN after the other.

    Neighbours of this kind run in one sweep, layer by layer: each sees the layer as the one before it in the list left it,
    and its inputs as all of them left the layers below.
    """

    @property
    def follows_dense(self) -> bool:
        """Whether :attr:`Layer.wanted` is needed."""
        return False

    def begin(self, graph: Graph, ctx: Context) -> dict[str, Any]:
        """Check the request; returns figures worth keeping."""
        return {}

    def visit(self, graph: Graph, layer: Layer) -> None:
        """Fit one layer; ``layer.view`` shows the tensors as they are now."""
        raise NotImplementedError

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        return run_layerwise([self], graph, ctx)[0]


def run_layerwise(passes: Sequence[LayerwisePass], graph: Graph, ctx: Context) -> list[PassResult]:
    """Run layerwise passes over every routed FFN in order, all of them in one sweep over the calibration inputs."""
    regions = find_carved(graph)
    if not regions:
        raise PassError("the graph has no routed FFN", hint="run carve-experts first")
    stage = "+".join(p.name for p in passes)
    calibration, tokens = ctx.need_calibration(stage), enough_tokens(max(r.d_ff for r in regions))
    batches = calibration.first(tokens)
    results = []
    for item in passes:
        ctx.running = item
        results.append(PassResult(facts=item.begin(graph, ctx)))
    sweep, fresh = Sweep(graph, batches), Sweep(graph, calibration.unfitted(tokens))
    follow = ctx.dense if any(p.follows_dense for p in passes) else None
    dense = {f.name: f for f in find_regions(follow).ffns} if follow is not None else {}
    dense_sweep = Sweep(follow, batches) if follow is not None else None
    with fast_matmul(), torch.no_grad():
        for position, region in enumerate(regions):
            layer = Layer(ExpertView(graph, region), sweep.advance(region.input), fresh=fresh.advance(region.input))
            _, stream = residual_add(region.result)
            dense_added, _ = residual_add(dense[region.name].output) if region.name in dense else (None, None)
            if dense_sweep is not None and dense_added is not None and stream is not None and sweep.has(stream):
                target = dense_sweep.advance(dense_added)
                layer.wanted = [t - r for t, r in zip(target, sweep.values(stream), strict=True)]
            for item, result in zip(passes, results, strict=True):
                ctx.running = item
                layer.view = ExpertView(graph, same_region(graph, region))
                item.visit(graph, layer)
                result.changed.append(region.name)
            layer.view = ExpertView(graph, same_region(graph, region))
            sweep.provide(region.node, layer.outputs())
            del layer
            release_memory(collect=False)
            ctx.progress(stage, position + 1, len(regions))
    return results


def same_region(graph: Graph, region: RoutedFFN) -> RoutedFFN:
    """The region as it is now: a pass may have given it a bias or other gates."""
    return next(r for r in find_routed(graph) if r.node is region.node)


def residual_add(output: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """(the node that adds ``output`` to a residual stream, the stream), or Nones."""
    for user in output.users:
        if user.target is aten.add.Tensor and not user.kwargs and len(user.args) == 2:
            other = user.args[1] if user.args[0] is output else user.args[0]
            if isinstance(other, fx.Node) and other.op == "call_function":
                return user, other
    return None, None


LayerwisePass.together = run_layerwise


def active_share(graph: Graph, active: float, *, who: str) -> float:
    """The mean active fraction that routed FFNs must have for ``active`` over all FFNs, those left dense included."""
    dense = sum(f.d_ff for f in find_regions(graph).ffns)
    routed = sum(r.d_ff for r in find_carved(graph))
    share = (active * (dense + routed) - dense) / max(routed, 1)
    if share <= 0:
        raise RequestError(
            f"{who}: {active:.0%} active is not possible while {dense / (dense + routed):.0%} of all neurons are in FFNs kept dense",
            hint="ask for more, or keep fewer FFNs dense",
        )
    return share


def set_threshold(graph: Graph, layer: Layer) -> None:
    """Shift the router's bias so that the region's active share on fresh text (``layer.fresh``, or ``layer.inputs`` where there is none)
    is the one noted for it.

    The share counts the shared experts; the routed ones make up the rest.
    """
    view = ExpertView(graph, layer.view.region)
    facts, scores = routing_facts(graph, view.name), view.gates.args[0]
    assert isinstance(scores, fx.Node)
    threshold = Threshold(view.name, view.gates, scores, view.router_bias, facts.get("active", 1.0), facts.get("shared", 0))
    threshold.lower(graph, threshold.level(*(view.scores(x.reshape(-1, view.d_model)) for x in layer.fresh or layer.inputs)))


def set_gates(graph: Graph, view: ExpertView, *, k: int) -> None:
    """Make the region's gates a top-k of its scores."""
    scores = view.gates.args[0]
    with graph.inserting(before=view.gates) as builder:
        gates = builder.call(torch.ops.dyncomp.topk_gates.default, scores, k)
    view.gates.replace_all_uses_with(gates)
    graph.module.graph.erase_node(view.gates)
