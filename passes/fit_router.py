"""Pass ``fit-router``: give each routed FFN a router that predicts which experts matter for a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from dyncomp.passes.layerwise import Layer, LayerwisePass, active_share, routing_facts, set_gates, set_threshold
from dyncomp.passes.least_squares import LeastSquares
from torch import Tensor

from dyncomp.errors import RequestError
from dyncomp.graph import Graph
from dyncomp.pipeline import Context
from dyncomp.regions import find_routed


@dataclass(frozen=True)
class FitRouter(LayerwisePass):
    """Fit ``scores = linear(x, router)`` so that the experts a token needs score high.

    Ridge regression of the logarithm of each expert's output energy ||W_down[e] h_e||² on x (D2DMoE, 2310.04361, regresses the
    norm with an MLP; in logarithms a few loud tokens do not decide the fit); then either the score threshold of each layer at
    which the mean active fraction is the one asked for, or a fixed top-k. Layers are fitted in order, each on the inputs that
    the routed layers before it give.

    before:  scores = linear(x, 0, 1);  gates = dyncomp.threshold_gates(scores)      # every expert on
    after:   scores = linear(x, W, b - threshold);  gates = dyncomp.threshold_gates(scores)   # or topk_gates(scores, k)
    """

    name: ClassVar[str] = "fit-router"

    active: float = 0.75
    """Mean fraction of active neurons over all FFNs, those kept dense included."""
    gates: str = "threshold"
    """``threshold`` (as many experts as a token needs) or ``topk`` (the same number for each token)."""
    target: str = "energy"
    """What is regressed: ``energy`` (its logarithm) or ``norm`` of an expert's output."""
    ridge: float = 1e-2
    """Regularisation, as a fraction of the mean diagonal of XᵀX."""
    k: int = 0
    """With ``topk``: how many experts each token runs, shared ones included, whatever ``active`` says; 0 is what ``active`` gives."""
    bias: bool = True
    """With ``topk``: false fits scores without a bias, by each expert's energy beside the token's mean over experts: most servers'
    routers have none."""

    def __post_init__(self) -> None:
        if not 0 < self.active <= 1:
            raise RequestError(f"fit-router: the active fraction {self.active:g} is not in (0, 1]", hint="for example active=75%")
        if self.gates not in ("threshold", "topk"):
            raise RequestError(f"fit-router: unknown gates {self.gates!r}", hint="use threshold or topk")
        if self.target not in ("energy", "norm"):
            raise RequestError(f"fit-router: unknown target {self.target!r}", hint="use energy or norm")
        if self.gates == "threshold" and (self.k or not self.bias):
            raise RequestError("fit-router: k and bias=false are for gates=topk; a threshold is a bias", hint="add gates=topk")

    def begin(self, graph: Graph, ctx: Context) -> dict[str, Any]:
        if self.k:
            for region in find_routed(graph):
                shared = routing_facts(graph, region.name).get("shared", 0)
                if not shared < self.k <= region.experts:
                    raise RequestError(
                        f"fit-router: k={self.k} of {region.experts} experts, {shared} of them shared", hint="shared < k <= experts"
                    )
                routing_facts(graph, region.name)["active"] = self.k / region.experts
            return {"k": self.k}
        share = active_share(graph, self.active, who=self.name)
        for region in find_routed(graph):
            routing_facts(graph, region.name)["active"] = share
        return {"active": self.active, "active_routed": share}

    def visit(self, graph: Graph, layer: Layer) -> None:
        view = layer.view
        weight, bias = _fit(layer, self.target, self.ridge, bias=self.bias)
        weight[view.shared], bias[view.shared] = 0, 1
        if self.gates == "topk":
            bias[view.shared] = 1e4  # above every score, so that top-k takes them first
            set_gates(graph, view, k=max(1, round(routing_facts(graph, view.name)["active"] * view.experts)))
        graph.add_tensor(view.router_weight, weight)
        graph.add_tensor(view.router_bias, bias)
        if self.gates == "threshold":
            set_threshold(graph, layer)


def _fit(layer: Layer, target: str, ridge: float, *, bias: bool) -> tuple[Tensor, Tensor]:
    """Ridge regression of what each expert gives on x: (weight [E, d], bias [E])."""
    view = layer.view
    gram = view.w_down.transpose(1, 2) @ view.w_down  # [E, F, F]: ||W h||² = hᵀ (WᵀW) h, cheaper than W h when F < d
    energies = []
    for hidden in layer.hidden():
        h = hidden.transpose(0, 1)  # [E, n, F]
        energies.append(((h @ gram) * h).sum(-1).clamp_min(0).T)  # [n, E]
    floor = 1e-3 * torch.stack([e.mean() for e in energies]).mean()
    problem = LeastSquares(view.d_model, view.experts)
    for x, energy in zip(layer.inputs, energies, strict=True):
        wanted = (energy + floor).log() if target == "energy" else energy.sqrt()
        if not bias:  # the order of a token's experts is all that counts: what they have in common need not be explained
            wanted = wanted - wanted[:, ~view.shared].mean(1, keepdim=True)
        problem.add(x.reshape(-1, view.d_model), wanted)
    weight, constant = problem.solve(ridge, bias=bias)
    return weight.T.contiguous(), constant
