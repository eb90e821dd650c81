"""Pass ``carve-experts``: split each FFN's neurons into experts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from dyncomp.passes.clustering import expert_size, partition_neurons, random_partition
from dyncomp.passes.layerwise import routing_facts
from torch import Tensor, fx

from dyncomp.calibrate import FFNStatistics
from dyncomp.errors import RequestError
from dyncomp.graph import Builder, Graph
from dyncomp.pipeline import Context, Pass, PassResult
from dyncomp.regions import FFN, FFNWeights, find_regions, replace_ffn
from dyncomp.regions.refusal import Refusal
from dyncomp.sweep import release_memory

aten = torch.ops.aten
_SIMD = 16  # float32 lanes of AVX-512


@dataclass(frozen=True)
class CarveExperts(Pass):
    """Split each FFN's neurons into experts; with every gate 1 the sum over experts equals the dense FFN.

    before:  linear(x, gate) -> silu -\\
             linear(x, up) ------------*-> linear(., down)
    after:   scores = linear(x, router)            # zero weights, bias 1: every expert is on until fit-router
             gates  = dyncomp.threshold_gates(scores)
             dyncomp.routed_ffn(x, gates, w_up[E], w_down[E])

    The first ``shared`` experts hold the neurons that tokens mark most often; the rest are clustered.
    """

    name: ClassVar[str] = "carve-experts"
    reads_statistics: ClassVar[bool] = True
    tolerance: ClassVar[float | None] = 1e-4

    experts: int = 16
    """E, experts per FFN; must divide its width."""
    shared: int = 0
    """How many of them every token runs."""
    cluster: str = "coactivation"
    """``coactivation`` (neurons that tokens mark together), ``weights`` (k-means on the input rows), ``random``."""
    keep_dense: tuple[int, ...] | None = None
    """Positions of FFNs to leave as they are (0 is the first; negative counts from the end). Without any, see :data:`DEEP`."""

    def __post_init__(self) -> None:
        if self.cluster not in ("coactivation", "weights", "random"):
            raise RequestError(f"carve-experts: unknown clustering {self.cluster!r}", hint="use coactivation, weights or random")
        if self.experts < 2 or not 0 <= self.shared < self.experts:
            raise RequestError(
                f"carve-experts: {self.experts} experts of which {self.shared} shared", hint="0 <= shared < experts, experts >= 2"
            )

    def precheck(self, graph: Graph) -> None:
        ffns = find_regions(graph).require_ffns()
        for position, ffn in enumerate(ffns):
            if position not in kept_dense(self.keep_dense, len(ffns)):
                expert_size(ffn.d_ff, self.experts)

    def sketch(self, kind: str) -> Pass | None:
        return dataclasses.replace(self, cluster="random", keep_dense=()) if kind == "ffn" else None

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        ffns = find_regions(graph).ffns
        dense = kept_dense(self.keep_dense, len(ffns))
        result = PassResult(facts={"experts": self.experts, "kept_dense": [ffns[i].name for i in sorted(dense)]})
        for position, ffn in enumerate(ffns):
            ctx.progress("carve-experts", position + 1, len(ffns))
            if position in dense:
                continue
            if ffn.shared_weights:
                result.refused.append(Refusal(ffn.name, self.name, "its weights are read by another layer", "keep it dense"))
                continue
            weights = ffn.weights(graph)
            carve(graph, ffn, weights, self._partition(ffn, weights, ctx))
            routing_facts(graph, ffn.name)["shared"] = self.shared
            if (size := ffn.d_ff // self.experts) < _SIMD:
                result.facts["narrow"] = f"{size} neurons an expert: kernels that compute {_SIMD} at once gain nothing from fewer"
            result.changed.append(ffn.name)
            release_memory(collect=False)
        return result

    def _partition(self, ffn: FFN, weights: FFNWeights, ctx: Context) -> Tensor:
        """[E, F / E] neuron indices, shared experts first."""
        if self.cluster == "random":
            return random_partition(ffn.d_ff, self.experts, seed=ctx.seed)
        statistics = self._statistics(ffn, ctx) if self.cluster == "coactivation" or self.shared else None
        features = statistics.features if self.cluster == "coactivation" and statistics else weights.w_up[: ffn.d_ff]
        rate = statistics.rate if statistics is not None else None
        return partition_neurons(features, self.experts, rate=rate, shared=self.shared, seed=ctx.seed)

    @staticmethod
    def _statistics(ffn: FFN, ctx: Context) -> FFNStatistics:
        statistics = ctx.need_calibration("carve-experts{cluster=coactivation}").statistics
        if ffn.name not in statistics:
            raise RequestError(f"the calibration has no statistics for {ffn.name}", hint="calibrate this model again")
        return statistics[ffn.name]


DEEP = 20
"""FFNs of a model whose first one stays dense unless told otherwise: early errors are carried far, and of so many one costs little. The
other ones make up for its neurons: with the first of MiniLM's six dense, and a quarter of all neurons active, they have a tenth of theirs
(cosine .82; .89 with none dense)."""


def kept_dense(positions: tuple[int, ...] | None, count: int) -> set[int]:
    """The FFNs to leave dense, as positions from the start; a model with a single FFN has none to spare."""
    if positions is None:
        positions = (0,) if count >= DEEP else ()
    return {p % count for p in positions if -count <= p < count} if count > 1 else set()


def carve(graph: Graph, ffn: FFN, weights: FFNWeights, partition: Tensor, gates: fx.Node | None = None) -> fx.Node:
    """Replace one FFN by a routed one whose experts are the rows of ``partition`` ([E, F / E]).

    Args:
        gates: [..., E]; without them a router whose gates are all 1 is made.
    """
    experts = partition.shape[0]
    halves = weights.w_up.view(-1, ffn.d_ff, ffn.d_model)  # [1 or 2, F, d]
    prefix = f"{ffn.name}.experts"
    names = {"w_up": halves[:, partition].transpose(0, 1).flatten(1, 2).contiguous()}  # [E, (2)F/E, d]
    names["w_down"] = weights.w_down[:, partition].transpose(0, 1).contiguous()  # [E, d_out, F/E]
    if weights.b_up is not None:
        names["b_up"] = weights.b_up.view(-1, ffn.d_ff)[:, partition].transpose(0, 1).flatten(1, 2).contiguous()
    for name, value in names.items():
        graph.add_tensor(f"{prefix}.{name}", value)
    if gates is None:
        graph.add_tensor(f"{ffn.name}.router.weight", torch.zeros(experts, ffn.d_model))
        graph.add_tensor(f"{ffn.name}.router.bias", torch.ones(experts))
    if weights.b_down is not None:
        graph.add_tensor(f"{prefix}.b_down", weights.b_down.clone())

    def build(builder: Builder, x: fx.Node) -> fx.Node:
        opened = gates
        if opened is None:
            scores = builder.call(aten.linear.default, x, graph.read(f"{ffn.name}.router.weight"), graph.read(f"{ffn.name}.router.bias"))
            opened = builder.call(torch.ops.dyncomp.threshold_gates.default, scores)
        y = builder.call(
            torch.ops.dyncomp.routed_ffn.default, x, opened, graph.read(f"{prefix}.w_up"),
            graph.read(f"{prefix}.b_up") if weights.b_up is not None else None, graph.read(f"{prefix}.w_down"), ffn.activation,
        )  # fmt: skip
        return y if weights.b_down is None else builder.call(aten.add.Tensor, y, graph.read(f"{prefix}.b_down"))

    return replace_ffn(graph, ffn, build)
