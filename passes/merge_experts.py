"""Pass ``merge-experts``: experts of trained mixtures that give alike become one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from dyncomp.passes.layerwise import routing_facts
from dyncomp.passes.mixtures import ENOUGH, find_whole, replace_experts, require_mixtures, runs, use
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import linear, normalize

from dyncomp.errors import RequestError
from dyncomp.graph import Graph
from dyncomp.ops import expert_hidden
from dyncomp.pipeline import Context, Pass, PassResult
from dyncomp.regions import RoutedFFN
from dyncomp.sweep import Sweep, fast_matmul, release_memory

aten = torch.ops.aten
GROUPS = ("outputs", "random")
_SAMPLE = 256  # tokens on which the outputs of all experts are compared


@dataclass(frozen=True)
class MergeExperts(Pass):
    """Merge each mixture's experts into fewer by averages of their weights (M-SMoE, 2310.01334).

    before:  dyncomp.routed_ffn(x, gates[E], w_up[E], w_down[E])
    after:   dyncomp.routed_ffn(x, gates @ groups[E, K], w_up[K], w_down[K])

    The K experts that calibration tokens use most each start a group; every other one joins the group whose first gives most like it for
    the same tokens. Its neurons are put in the order of the first's by matching weights, then all are averaged by the square of their use
    (by use itself, experts that were trained apart blur each other). The router stays as it is, and a group's gate is the sum of its
    experts' (for a softmax: the log-sum-exp of their logits): a token's gates sum to what they did, whatever the kind of router, and equal
    experts merge without loss. A token whose experts fall into one group runs one.
    """

    name: ClassVar[str] = "merge-experts"

    experts: int = 4
    """K, experts that are left in each mixture."""
    groups: str = "outputs"
    """``outputs``: by the cosine of what experts give; ``random``."""

    def __post_init__(self) -> None:
        if self.experts < 1:
            raise RequestError(f"merge-experts: {self.experts} experts", hint="at least 1")
        if self.groups not in GROUPS:
            raise RequestError(f"merge-experts: unknown groups {self.groups!r}", hint=f"use {' or '.join(GROUPS)}")

    def precheck(self, graph: Graph) -> None:
        require_mixtures(graph, self.name, "carve-experts makes experts of dense FFNs")

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        regions, refused = find_whole(graph, self.name)
        result = PassResult(refused=refused, facts={"experts": self.experts, "groups": {}})
        generator = torch.Generator().manual_seed(ctx.seed)
        sweep = Sweep(graph, ctx.need_calibration(self.name).batches)
        with fast_matmul(), torch.no_grad():
            for done, region in enumerate(regions):
                ctx.progress(self.name, done + 1, len(regions))
                if region.experts <= self.experts:
                    continue
                gates = sweep.advance(region.gates)
                used = use(gates)
                groups = self._groups(graph, region, used, sweep.values(region.input), generator)
                _merge(graph, region, groups, used)
                table = torch.zeros(region.experts, self.experts)
                table[torch.arange(region.experts), groups] = 1.0
                _sum_gates(graph, region, table)
                noted = routing_facts(graph, region.name)
                noted["merged"] = region.experts
                noted["active"] = float(torch.cat([(g.flatten(0, -2) @ table != 0).float().mean(1) for g in gates]).mean())
                result.facts["groups"][region.name] = [(groups == k).nonzero().flatten().tolist() for k in range(self.experts)]
                seldom = (runs(gates) < ENOUGH).nonzero().flatten().tolist()
                result.facts.setdefault("rarely_used", []).extend(f"{region.name} expert {e}" for e in seldom)
                result.changed.append(region.name)
                release_memory(collect=False)
        graph.clean()
        return result

    def _groups(self, graph: Graph, region: RoutedFFN, used: Tensor, inputs: list[Tensor], generator: torch.Generator) -> Tensor:
        """[E] group of each expert, 0 … K - 1."""
        if self.groups == "random":
            order = torch.randperm(region.experts, generator=generator)
            groups = torch.empty(region.experts, dtype=torch.long)
            groups[order] = torch.arange(region.experts) % self.experts
            return groups
        x = torch.cat([i.flatten(0, -2) for i in inputs])
        given = _outputs(graph, region, x[:: max(1, len(x) // _SAMPLE)])
        first = used.topk(self.experts).indices.sort().values
        groups = (given @ given[first].T).argmax(1)
        groups[first] = torch.arange(self.experts)
        return groups


def _outputs(graph: Graph, region: RoutedFFN, x: Tensor) -> Tensor:
    """What every expert gives for tokens x [n, d]: [E, n * d_out], of unit length."""
    up, down = graph.tensor(region.w_up).detach(), graph.tensor(region.w_down).detach()
    bias = None if region.b_up is None else graph.tensor(region.b_up).detach()
    found = []
    for e in range(region.experts):
        hidden = expert_hidden(x, up[e : e + 1], None if bias is None else bias[e : e + 1], down.shape[2], region.activation)[:, 0]
        found.append(normalize(linear(hidden, down[e]).flatten(), dim=0))
    return torch.stack(found)


def _merge(graph: Graph, region: RoutedFFN, groups: Tensor, used: Tensor) -> None:
    """Average the weights of each group's experts."""
    up, down = graph.tensor(region.w_up).detach(), graph.tensor(region.w_down).detach()
    bias = None if region.b_up is None else graph.tensor(region.b_up).detach()
    merged: list[tuple[Tensor, ...]] = []
    for k in range(int(groups.max()) + 1):
        members = (groups == k).nonzero().flatten()
        share = (used[members] / used[members].max().clamp_min(1e-30)).square()
        share = share / share.sum() if bool(share.any()) else torch.full_like(share, 1 / len(members))
        first = int(members[share.argmax()])
        parts = []
        for e, weight in zip(members.tolist(), share.tolist(), strict=True):
            order = match_neurons((up[e], down[e]), (up[first], down[first])) if e != first else torch.arange(down.shape[2])
            rows = torch.cat([order + start for start in range(0, up.shape[1], down.shape[2])])
            tensors = (up[e][rows], down[e][:, order], *(() if bias is None else (bias[e][rows],)))
            parts.append([weight * t for t in tensors])
        merged.append(tuple(torch.stack(t).sum(0) for t in zip(*parts, strict=True)))
    w_up, w_down, *b_up = (torch.stack(t) for t in zip(*merged, strict=True))
    replace_experts(graph, region, "merged", w_up, b_up[0] if b_up else None, w_down)


def match_neurons(expert: tuple[Tensor, Tensor], to: tuple[Tensor, Tensor]) -> Tensor:
    """The order of an expert's neurons in which its weights are most like another's: [F] of (w_up [F or 2F, d], w_down [d_out, F]).

    The assignment with the largest sum of inner products (weight matching, Git Re-Basin, 2209.04836, section 3.2).
    """
    (up, down), (other_up, other_down) = expert, to
    neurons = down.shape[1]
    alike = other_down.T @ down
    for start in range(0, up.shape[0], neurons):
        alike = alike + other_up[start : start + neurons] @ up[start : start + neurons].T
    return torch.from_numpy(linear_sum_assignment(alike.double().numpy(), maximize=True)[1])


def _sum_gates(graph: Graph, region: RoutedFFN, table: Tensor) -> None:
    name = f"{region.name}.groups_{region.experts}"  # a merged mixture may be merged again, and has fewer
    graph.add_tensor(name, table.to(region.gates.meta["val"].dtype), trainable=False)
    with graph.inserting(before=region.node) as builder:
        summed = builder.call(aten.matmul.default, region.gates, graph.read(name))
    region.node.update_arg(1, summed)
