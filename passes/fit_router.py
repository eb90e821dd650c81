"""Pass ``fit-router``: give each routed FFN a router that predicts which experts matter for a token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from dyncomp.passes.across_tokens import refuse_decoders, require_sequences
from dyncomp.passes.layerwise import ExpertView, Layer, LayerwisePass, active_share, routing_facts, same_region, set_threshold
from dyncomp.passes.routers import FAMILIES, Biased, RouterOptions, install
from torch import Tensor

from dyncomp.errors import RequestError
from dyncomp.graph import Graph
from dyncomp.pipeline import Context, Pass
from dyncomp.regions import find_carved
from dyncomp.regions.weighting import COLDEST
from dyncomp.routing import deepseek_v3_parts, expert_choice, group_top_k, sinkhorn_top_k, tempered_top_k

THRESHOLDS = ("threshold", "relative")
GATES = (*THRESHOLDS, "topk", "group-topk", "deepseek-v3", "expert-choice", "sinkhorn")
ACROSS_TOKENS = ("expert-choice", "sinkhorn")
BUDGETS = ("uniform", "kl")


@dataclass(frozen=True)
class FitRouter(LayerwisePass):
    """Fit a router ``x -> scores`` so that the experts a token needs score high, and set the gates.

    The router is one of :data:`dyncomp.passes.routers.FAMILIES`; then comes the score threshold of each layer at which the mean
    active fraction is the one asked for, or a fixed top-k. Layers are fitted in order, each on the inputs that the routed layers
    before it give.

    before:  scores = linear(x, 0, 1);  gates = dyncomp.threshold_gates(scores)      # every expert on
    after:   scores = linear(x, W, b - threshold);  gates = dyncomp.threshold_gates(scores)   # or topk_gates(scores, k)
    """

    name: ClassVar[str] = "fit-router"

    active: float = 0.75
    """Mean fraction of active neurons over all FFNs, those kept dense included."""
    gates: str = "threshold"
    """``threshold`` (of the layer: as many experts as a token needs), ``relative`` to the best expert of the token (D2DMoE), ``topk``
    (the same number for each token), ``group-topk`` (top-k in a token's best groups of experts), ``deepseek-v3`` (the same, chosen by
    sigmoid scores and a bias that ``heal{balance-rate}`` moves); for encoders also ``expert-choice`` (the same number of tokens for each
    expert) and ``sinkhorn`` (top-k of a balanced assignment). See :mod:`dyncomp.routing`."""
    target: str = "energy"
    """What is regressed: ``energy`` (its logarithm) or ``norm`` of an expert's output."""
    ridge: float = 1e-2
    """Regularisation, as a fraction of the mean diagonal of XᵀX."""
    temper: int = 0
    """With ``topk``: p of gates that are k times the softmax of ``2^-p`` times the scores of the k experts that run, which checkpoints of
    stock mixtures compute as they are (:func:`~dyncomp.routing.tempered_top_k`); 0 for gates of 1."""
    k: int = 0
    """Without a threshold: how many experts each token runs (``expert-choice``: on average), shared ones included, whatever ``active``
    says; 0 is what ``active`` gives."""
    groups: int = 4
    """With ``group-topk`` and ``deepseek-v3``: groups of the experts that are not shared."""
    kept: int = 2
    """With them: groups that a token may use."""
    bias: bool = True
    """With ``topk`` and ``ridge``: false fits scores without a bias, by each expert's energy beside the token's mean over experts: most
    servers' routers have none. ``deepseek-v3`` fits them so in any case; its bias begins at 0."""
    router: str = "ridge"
    """``ridge``, ``mlp``, ``neuron``, ``spectral``, ``mean-gate`` or ``representative``."""
    rank: int = 32
    """Hidden neurons of ``mlp``; directions of x that ``neuron`` keeps, or ``spectral`` over all experts."""
    budgets: str = "uniform"
    """``uniform``: every layer has the same active fraction; ``kl``: more where fewer neurons cost more, by the KL divergence from the
    dense model's predictions (see :mod:`dyncomp.passes.budgets`)."""

    def __post_init__(self) -> None:
        if not 0 < self.active <= 1:
            raise RequestError(f"fit-router: the active fraction {self.active:g} is not in (0, 1]", hint="for example active=75%")
        for option, known in (("gates", GATES), ("target", ("energy", "norm")), ("router", tuple(FAMILIES)), ("budgets", BUDGETS)):
            if (value := getattr(self, option)) not in known:
                raise RequestError(f"fit-router: unknown {option} {value!r}", hint=f"use {', '.join(known[:-1])} or {known[-1]}")
        if self.rank < 1:
            raise RequestError(f"fit-router: rank={self.rank} must be at least 1")
        if self.gates in THRESHOLDS and (self.k or not self.bias):
            raise RequestError("fit-router: k and bias=false are for gates=topk; a threshold is a bias", hint="add gates=topk")
        if self.gates not in (*THRESHOLDS, "topk") and self.budgets != "uniform":
            raise RequestError(f"fit-router: budgets={self.budgets} cannot weigh gates={self.gates}", hint="use threshold or topk gates")
        if self.temper and (self.gates != "topk" or not 0 < self.temper <= COLDEST):
            raise RequestError(f"fit-router: temper={self.temper} with gates={self.gates}", hint=f"1 to {COLDEST}, and gates=topk")
        if not 0 < self.kept <= self.groups:
            raise RequestError(f"fit-router: {self.kept} of {self.groups} groups kept", hint="0 < kept <= groups")
        if self.gates == "deepseek-v3" and self.router != "ridge":
            raise RequestError(f"fit-router: gates=deepseek-v3 needs router=ridge, not {self.router}", hint="leave one of them out")
        if not self.bias and self.router != "ridge":
            raise RequestError(f"fit-router: bias=false needs router=ridge, not {self.router}", hint="leave one of them out")

    def sketch(self, kind: str) -> Pass | None:
        return dataclasses.replace(self, budgets="uniform") if kind == "ffn" else None

    def begin(self, graph: Graph, ctx: Context) -> dict[str, Any]:
        if self.gates in ACROSS_TOKENS:
            refuse_decoders(graph, f"fit-router{{gates={self.gates}}}")
            for region in find_carved(graph):
                require_sequences(region, f"fit-router{{gates={self.gates}}}")
        if self.k:
            for region in find_carved(graph):
                shared = routing_facts(graph, region.name).get("shared", 0)
                if not shared < self.k <= region.experts:
                    raise RequestError(
                        f"fit-router: k={self.k} of {region.experts} experts, {shared} of them shared", hint="shared < k <= experts"
                    )
                routing_facts(graph, region.name)["active"] = self.k / region.experts
            return {"k": self.k}
        share = active_share(graph, self.active, who=self.name)
        if self.budgets == "kl":
            from dyncomp.passes.budgets import kl_budgets

            budgets = kl_budgets(graph, ctx, share, lambda work, layer: self._install(work, layer, ctx.seed))
        else:
            budgets = {region.name: share for region in find_carved(graph)}
        for name, value in budgets.items():
            routing_facts(graph, name)["active"] = value
        facts: dict[str, Any] = {"active": self.active, "active_routed": share}
        return facts | ({"budgets": {n: round(v, 4) for n, v in budgets.items()}} if self.budgets != "uniform" else {})

    def visit(self, graph: Graph, layer: Layer) -> None:
        self._install(graph, layer, 0)

    def _install(self, graph: Graph, layer: Layer, seed: int) -> None:
        """Fit the router of one layer and set its threshold; ``layer.view`` shows it."""
        view = layer.view
        bias = self.bias and self.gates != "deepseek-v3"
        scores = FAMILIES[self.router](layer, RouterOptions(self.target, self.ridge, self.rank, seed, bias))
        k = max(1, round(routing_facts(graph, view.name).get("active", 1.0) * view.experts))
        install(graph, view, scores, gates=self._gates(view, routing_facts(graph, view.name).get("active", 1.0)), k=k)
        layer.view = ExpertView(graph, same_region(graph, view.region))
        if self.gates in THRESHOLDS:
            set_threshold(graph, layer)
            layer.view = ExpertView(graph, layer.view.region)

    def _gates(self, view: ExpertView, share: float) -> str | Callable[[Tensor], Tensor] | Biased:
        """What ``install`` takes: a name, a function of the scores of the experts that are not shared, or one of all of them and a bias."""
        shared = int(view.shared.sum())
        experts, routed = view.experts - shared, max(1, round(share * view.experts)) - shared
        if self.gates in THRESHOLDS or (self.gates == "topk" and not self.temper):
            return self.gates
        if routed < 1:
            raise RequestError(
                f"fit-router: {shared + routed} experts a token, {shared} of them shared: none to choose", hint="raise active or k"
            )
        if self.temper:
            return partial(tempered_top_k, k=routed, temper=self.temper)
        if self.gates == "expert-choice":
            return partial(expert_choice, share=(share * view.experts - shared) / experts)
        if self.gates == "sinkhorn":
            return partial(sinkhorn_top_k, k=routed)
        if experts % self.groups or self.kept * (experts // self.groups) < routed:
            raise RequestError(
                f"fit-router: {routed} of {experts} experts in {self.kept} of {self.groups} groups",
                hint="groups must divide the experts that are not shared, and the groups kept must hold as many as run",
            )
        if self.gates == "deepseek-v3":
            return Biased(partial(deepseek_v3_parts, k=routed, groups=self.groups, kept=self.kept, shared=shared))
        return partial(group_top_k, k=routed, groups=self.groups, kept=self.kept)
