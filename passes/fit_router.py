"""Pass ``fit-router``: give each routed FFN a router that predicts which experts matter for a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dyncomp.errors import RequestError
from dyncomp.graph import Graph
from dyncomp.passes.layerwise import ExpertView, active_share, layerwise, routing_facts, set_gates, threshold
from dyncomp.pipeline import Context, Pass, PassResult


@dataclass(frozen=True)
class FitRouter(Pass):
    """Fit ``scores = linear(x, router)`` so that the experts a token needs score high.

    Ridge regression of each expert's output norm ||W_down[e] h_e|| on x (D2DMoE, 2310.04361, regresses the same target with
    an MLP); then either the score threshold of each layer at which the mean active fraction is the one asked for, or a fixed
    top-k. Layers are fitted in order, each on the inputs that the routed layers before it give.

    before:  scores = linear(x, 0, 1);  gates = dyncomp.threshold_gates(scores)      # every expert on
    after:   scores = linear(x, W, b - threshold);  gates = dyncomp.threshold_gates(scores)   # or topk_gates(scores, k)
    """

    name: ClassVar[str] = "fit-router"

    active: float = 0.75
    """Mean fraction of active neurons over all FFNs, those kept dense included."""
    gates: str = "threshold"
    """``threshold`` (as many experts as a token needs) or ``topk`` (the same number for each token)."""
    ridge: float = 1e-2
    """Regularisation, as a fraction of the mean diagonal of XᵀX."""

    def __post_init__(self) -> None:
        if not 0 < self.active <= 1:
            raise RequestError(f"fit-router: the active fraction {self.active:g} is not in (0, 1]", hint="for example active=75%")
        if self.gates not in ("threshold", "topk"):
            raise RequestError(f"fit-router: unknown gates {self.gates!r}", hint="use threshold or topk")

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        share = active_share(graph, self.active, who=self.name)
        result = PassResult(facts={"active": self.active, "active_routed": share})
        for layer in layerwise(graph, ctx, self.name):
            view, inputs = layer.view, layer.inputs
            shared = view.shared
            weight, bias = _fit(view, inputs, self.ridge)
            weight[shared], bias[shared] = 0, 1
            routed = ~shared
            # The share asked for counts the shared experts: the routed ones make up the rest.
            count = int(routed.sum())
            wanted = max(share * view.experts - int(shared.sum()), 0) / count
            if self.gates == "topk":
                k = max(1, round(wanted * count)) + int(shared.sum())
                bias[shared] = 1e4  # above every score, so that top-k takes them first
                set_gates(graph, view, k=k)
            else:
                bias[routed] -= threshold(inputs, weight[routed], bias[routed], wanted)
            graph.add_tensor(view.router_weight, weight)
            graph.add_tensor(view.router_bias, bias)
            routing_facts(graph, view.name)["active"] = share
            result.changed.append(view.name)
        return result


def _fit(view: ExpertView, inputs: list[Tensor], ridge: float) -> tuple[Tensor, Tensor]:
    """Ridge regression of expert output norms: (weight [E, d], bias [E])."""
    d = view.d_model
    gram = torch.zeros(d + 1, d + 1, dtype=torch.float64)
    cross = torch.zeros(d + 1, view.experts, dtype=torch.float64)
    inner = view.w_down.transpose(1, 2) @ view.w_down  # [E, F, F]: ||W h||² = hᵀ (WᵀW) h, cheaper than W h when F < d
    for x in inputs:
        x = x.reshape(-1, d)
        h = view.hidden(x).transpose(0, 1)  # [E, n, F]
        norms = ((h @ inner) * h).sum(-1).clamp_min(0).sqrt().T  # [n, E]
        a = torch.cat([x, x.new_ones(len(x), 1)], 1)
        gram += a.T @ a
        cross += a.T @ norms
    gram.diagonal()[:-1] += ridge * gram.diagonal()[:-1].mean()
    solution = torch.linalg.solve(gram, cross).float()
    return solution[:-1].T.contiguous(), solution[-1].clone()
