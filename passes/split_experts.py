"""Pass ``split-experts``: the experts of trained mixtures become finer ones, of which a token runs those it needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from dyncomp.passes.clustering import expert_size, partition_neurons, random_partition
from dyncomp.passes.layerwise import routing_facts
from dyncomp.passes.least_squares import LeastSquares
from dyncomp.passes.mixtures import ENOUGH, find_whole, replace_experts, require_mixtures
from torch import Tensor

from dyncomp.calibrate import Accumulator
from dyncomp.errors import RequestError
from dyncomp.graph import Graph
from dyncomp.ops import expert_hidden
from dyncomp.pipeline import Context, Pass, PassResult
from dyncomp.regions import RoutedFFN, find_regions
from dyncomp.routing import parts_of
from dyncomp.sweep import Sweep, fast_matmul, release_memory

aten = torch.ops.aten
CLUSTERS = ("coactivation", "weights", "random")
_FLOOR = 1e-3  # of the mean energy, added before the logarithm


@dataclass(frozen=True)
class SplitExperts(Pass):
    """Split every expert into parts; the trained router chooses the experts as before, a second one which of their parts run.

    before:  dyncomp.routed_ffn(x, gates[E], w_up[E], w_down[E])
    after:   scores = linear(x, W[m E], b)                                  # fitted, the threshold is part of b
             finer  = cat([gates] * m) * dyncomp.threshold_gates(scores)    # part p of expert e is at p E + e
             dyncomp.routed_ffn(x, finer[m E], w_up[m E], w_down[m E])

    With every part open it is the mixture it was. Neurons are clustered, and scores fitted, on the calibration tokens that run the expert;
    a score is the logarithm of the energy that a part's output has (ridge regression, as in ``fit-router``). Each layer is fitted on the
    inputs that the split layers before it give.
    """

    name: ClassVar[str] = "split-experts"

    parts: int = 4
    """m, parts of each expert; must divide its neurons."""
    active: float = 0.75
    """Mean share of the neurons, of those in experts that the trained router runs. 1 leaves every part open."""
    shared: int = 1
    """Parts that all tokens of their expert run: the neurons that are most often among the largest."""
    cluster: str = "coactivation"
    """``coactivation`` (neurons that the expert's tokens mark together), ``weights`` (k-means on the input rows), ``random``."""
    ridge: float = 1e-2
    """Regularisation, as a fraction of the mean diagonal of XᵀX."""

    def __post_init__(self) -> None:
        if self.cluster not in CLUSTERS:
            raise RequestError(f"split-experts: unknown clustering {self.cluster!r}", hint="use coactivation, weights or random")
        if self.parts < 2 or not 0 <= self.shared < self.parts:
            raise RequestError(f"split-experts: {self.parts} parts of which {self.shared} shared", hint="0 <= shared < parts, parts >= 2")
        if not self.shared / self.parts < self.active <= 1:
            raise RequestError(
                f"split-experts: {self.active:.0%} active while {self.shared} of {self.parts} parts always run",
                hint="shared/parts < active <= 1",
            )

    def precheck(self, graph: Graph) -> None:
        require_mixtures(graph, self.name, "carve-experts splits dense FFNs")
        for region in find_regions(graph).routed:
            if region.trained:
                expert_size(region.d_ff // region.experts, self.parts)

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        regions, refused = find_whole(graph, self.name)
        result = PassResult(refused=refused, facts={"parts": self.parts, "active": self.active, "rarely_used": []})
        sweep = Sweep(graph, ctx.need_calibration(self.name).batches)
        with fast_matmul(), torch.no_grad():
            for done, region in enumerate(regions):
                gates = [g.flatten(0, -2) for g in sweep.advance(region.gates)]
                inputs = [x.flatten(0, -2) for x in sweep.values(region.input)]
                split = _Split(self, graph, region, inputs, gates, ctx.seed)
                split.install()
                result.facts["rarely_used"] += [f"{region.name} expert {e}: {n} tokens" for e, n in split.seldom.items()]
                result.changed.append(region.name)
                release_memory(collect=False)
                ctx.progress(self.name, done + 1, len(regions))
        return result


class _Split:
    """One mixture, split.

    Args:
        inputs, gates: [n, d] and [n, E] a batch.

    Attributes:
        seldom: expert -> how many tokens ran it, of those that too few did: all of their parts stay open.
    """

    def __init__(
        self, options: SplitExperts, graph: Graph, region: RoutedFFN, inputs: list[Tensor], gates: list[Tensor], seed: int
    ) -> None:
        self.options, self.graph, self.region, self.seed = options, graph, region, seed
        self._data = list(zip(inputs, gates, strict=True))
        self.w_up, self.w_down = graph.tensor(region.w_up).detach(), graph.tensor(region.w_down).detach()
        self.b_up = None if region.b_up is None else graph.tensor(region.b_up).detach()
        self.neurons = self.w_down.shape[2]
        self.seldom: dict[int, int] = {}
        partitions = torch.stack([self._partition(e) for e in range(region.experts)])  # [E, m, F / m]
        self._rearrange(partitions)
        self.weight, self.bias = self._router()

    # ---- the experts -------------------------------------------------------------------------------------------------
    def _rows(self, expert: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The inputs [n, d] of the tokens that run an expert, and their hidden activations [n, F], a batch."""
        bias = None if self.b_up is None else self.b_up[expert : expert + 1]
        for x, gates in self._data:
            rows = x[gates[:, expert] != 0]
            yield rows, expert_hidden(rows, self.w_up[expert : expert + 1], bias, self.neurons, self.region.activation)[:, 0]

    def _partition(self, expert: int) -> Tensor:
        """[m, F / m] neurons, the shared part's first."""
        options = self.options
        if options.cluster == "random":
            return random_partition(self.neurons, options.parts, seed=self.seed + expert)
        seen = Accumulator(self.neurons)
        for index, (_, hidden) in enumerate(self._rows(expert)):
            seen.add(index, hidden)
        if seen.count == 0:  # nobody knows: its parts stay open
            return torch.arange(self.neurons).view(options.parts, -1)
        statistics = seen.result()
        features = statistics.features if options.cluster == "coactivation" else self.w_up[expert, : self.neurons]
        return partition_neurons(features, options.parts, rate=statistics.rate, shared=options.shared, seed=self.seed)

    def _rearrange(self, partitions: Tensor) -> None:
        """Put the parts' neurons next to each other: [E, n F, …] and so on become [m E, n F / m, …]."""
        experts = torch.arange(self.region.experts)[:, None, None]

        def split(value: Tensor) -> Tensor:
            halves = value.unflatten(1, (-1, self.neurons))  # [E, 1 or 2, F, …]
            return torch.stack([h[experts, partitions] for h in halves.unbind(1)], 2).transpose(0, 1).flatten(2, 3).flatten(0, 1)

        self.down = split(self.w_down.transpose(1, 2)).transpose(1, 2).contiguous()
        self.up, self.biases = split(self.w_up).contiguous(), None if self.b_up is None else split(self.b_up).contiguous()
        self.partitions = partitions

    # ---- the second router -------------------------------------------------------------------------------------------
    def _router(self) -> tuple[Tensor, Tensor]:
        """(W [m E, d], b [m E]) with the threshold in b."""
        options, experts = self.options, self.region.experts
        weight, bias = torch.zeros(options.parts, experts, self.region.d_model), torch.ones(options.parts, experts)
        if options.active == 1:
            return weight.flatten(0, 1), bias.flatten()
        scores, open_ = [], 0  # of the parts of which some are to be closed; those that stay open
        for e in range(experts):
            count = sum(int((g[:, e] != 0).sum()) for _, g in self._data)
            if count < ENOUGH:
                self.seldom[e] = count
                open_ += count * options.parts
                continue
            solution, constant = self._fit(e)
            weight[options.shared :, e], bias[options.shared :, e] = solution.T[options.shared :], constant[options.shared :]
            scores += [(rows @ solution + constant)[:, options.shared :].flatten() for rows, _ in self._rows(e)]
            open_ += count * options.shared
        if scores:
            found = torch.cat(scores)
            total = open_ + len(found)
            wanted = min(max(round(options.active * total) - open_, 0), len(found))
            threshold = found.sort(descending=True).values[wanted] if wanted < len(found) else found.min() - 1
            fitted = torch.tensor([e not in self.seldom for e in range(experts)])
            bias[options.shared :, fitted] -= threshold
        return weight.flatten(0, 1), bias.flatten()

    def _fit(self, expert: int) -> tuple[Tensor, Tensor]:
        """Log energies of an expert's parts from x: (X [d, m], b [m])."""
        order = self.partitions[expert]
        down = self.w_down[expert][:, order].transpose(0, 1)  # [m, d_out, F / m]
        gram = down.transpose(1, 2) @ down
        rows, energies = [], []
        for x, hidden in self._rows(expert):
            h = hidden[:, order].transpose(0, 1)  # [m, n, F / m]
            rows.append(x)
            energies.append(((h @ gram) * h).sum(-1).clamp_min(0).T)
        floor = _FLOOR * torch.cat(energies).mean()
        problem = LeastSquares(self.region.d_model, self.options.parts)
        for x, energy in zip(rows, energies, strict=True):
            problem.add(x, (energy + floor).log())
        return problem.solve(self.options.ridge)

    # ---- the graph ---------------------------------------------------------------------------------------------------
    def install(self) -> None:
        graph, region = self.graph, self.region
        graph.add_tensor(f"{region.name}.parts.weight", self.weight)
        graph.add_tensor(f"{region.name}.parts.bias", self.bias)
        with graph.inserting(before=region.node) as b:
            read = (graph.read(f"{region.name}.parts.{name}") for name in ("weight", "bias"))
            scores = b.call(aten.linear.default, region.input, *read)
            region.node.update_arg(1, b.inline(parts_of, region.gates, scores))
        replace_experts(graph, region, "split", self.up, self.biases, self.down)
        graph.clean()
        noted = routing_facts(graph, region.name)
        noted["parts"], noted["active"] = self.options.parts, noted.get("active", 1.0) * self.options.active
