"""Pass ``drop-experts``: remove the experts of trained mixtures that tokens use least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from dyncomp.passes.layerwise import reads_only, routing_facts
from dyncomp.passes.mixtures import find_whole, replace_experts, require_mixtures, use
from torch import Tensor, fx

from dyncomp.errors import RequestError
from dyncomp.graph import Graph
from dyncomp.pipeline import Context, Pass, PassResult
from dyncomp.regions import RoutedFFN
from dyncomp.regions.partial import evaluate
from dyncomp.regions.refusal import Refusal
from dyncomp.sweep import Sweep, fast_matmul


@dataclass(frozen=True)
class DropExperts(Pass):
    """Keep the experts with the largest gates, summed over the calibration tokens (expert pruning: 2402.14800 compares the ways to choose).

    before:  gates = softmax(linear(x, router[E])) -> top-k …;      dyncomp.routed_ffn(x, gates, w_up[E], w_down[E])
    after:   gates = softmax(linear(x, router[kept])) -> top-k …;   dyncomp.routed_ffn(x, gates, w_up[kept], w_down[kept])

    A token that would have used a dropped expert uses its next best, so each token costs what it did: the model gets smaller.
    """

    name: ClassVar[str] = "drop-experts"

    keep: float = 0.75
    """Share of each mixture's experts to keep; never fewer than a token runs."""
    choose: str = "use"
    """``use`` by calibration tokens, or ``random``."""

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise RequestError(f"drop-experts: keep={self.keep:g} is not in (0, 1]", hint="for example keep=75%")
        if self.choose not in ("use", "random"):
            raise RequestError(f"drop-experts: unknown choose={self.choose}", hint="use or random")

    def precheck(self, graph: Graph) -> None:
        require_mixtures(graph, self.name, "prune-static removes neurons of dense FFNs")

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        regions, refused = find_whole(graph, self.name, merged=False)
        result = PassResult(refused=refused, facts={"keep": self.keep, "kept": {}})
        used = self._worth(graph, regions, ctx)
        for region in regions:
            k = max(1, round(routing_facts(graph, region.name).get("active", 1.0) * region.experts))
            count = max(k, round(self.keep * region.experts))
            kept = used[region.name].topk(count).indices.sort().values
            if count == region.experts:
                continue
            if (reason := _narrow(graph, region, kept)) is not None:
                result.refused.append(Refusal(region.name, self.name, reason, "keep all of its experts"))
                continue
            routing_facts(graph, region.name)["active"] = k / count
            result.facts["kept"][region.name] = kept.tolist()
            result.changed.append(region.name)
        graph.clean()
        graph.infer_shapes()
        return result

    def _worth(self, graph: Graph, regions: list[RoutedFFN], ctx: Context) -> dict[str, Tensor]:
        """What each expert is kept for: name -> [E]."""
        if self.choose == "random":
            generator = torch.Generator().manual_seed(ctx.seed)
            return {region.name: torch.rand(region.experts, generator=generator) for region in regions}
        sweep, used = Sweep(graph, ctx.need_calibration(self.name).batches), dict[str, Tensor]()
        with fast_matmul(), torch.no_grad():
            for done, region in enumerate(regions):
                used[region.name] = use(sweep.advance(region.gates))
                ctx.progress(self.name, done + 1, len(regions))
        return used


def _narrow(graph: Graph, region: RoutedFFN, kept: Tensor) -> str | None:
    """Take the other experts out of the weights and of whatever has one value an expert in the router; or say why that cannot be."""
    if not reads_only(region.router, region.input):
        return "its router reads more than its input"
    replaced = {n: _part(graph.tensor(n).detach(), kept, region.experts) for n in _constants(region)}
    tokens = torch.randn(8, region.d_model, generator=torch.Generator().manual_seed(0))
    given = {region.input: tokens, **{n: value for n, (_, value) in replaced.items()}}
    try:
        (gates,) = evaluate(graph, [region.gates], {"batch": 2, "sequence": 4}, given)
    except Exception as error:  # sizes that the router has written down, such as those of groups
        return f"its router is made for {region.experts} experts ({type(error).__name__})"
    if gates.shape[-1] != len(kept) or not bool(gates.any(-1).all()):
        return f"its router is made for {region.experts} experts"
    for node, (name, value) in replaced.items():
        target = name or f"{node.target}_kept"
        graph.add_tensor(target, value, trainable=isinstance(graph.tensor(node), torch.nn.Parameter))
        for user in region.router:
            user.replace_input_with(node, graph.read(target))
    w_up, b_up, w_down = (None if name is None else graph.tensor(name).detach()[kept] for name in (region.w_up, region.b_up, region.w_down))
    assert w_up is not None
    assert w_down is not None
    replace_experts(graph, region, "kept", w_up, b_up, w_down)
    return None


def _constants(region: RoutedFFN) -> list[fx.Node]:
    return list(dict.fromkeys(i for node in region.router for i in node.all_input_nodes if i.op == "get_attr"))


def _part(value: Tensor, kept: Tensor, experts: int) -> tuple[str | None, Tensor]:
    """What is left of a constant: (the name of a table that all layers share, or None; the values)."""
    if value.dtype == torch.int64 and torch.equal(value, torch.arange(experts)):
        return f"tables.experts_{len(kept)}", torch.arange(len(kept))
    axis = next((i for i, size in enumerate(value.shape) if size == experts), None)
    return None, value if axis is None else value.index_select(axis, kept)
