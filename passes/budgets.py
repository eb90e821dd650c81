"""How many neurons each layer may run, by what fewer of them cost at the end of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from dyncomp.passes.layerwise import ExpertView, Layer, routing_facts, same_region, set_gates, set_threshold
from dyncomp.passes.refit_down import refit
from torch import Tensor

from dyncomp.errors import RequestError
from dyncomp.graph import Graph
from dyncomp.pipeline import Context
from dyncomp.regions import RoutedFFN, find_routed
from dyncomp.sweep import Sweep, fast_matmul

TOKENS, MEASURED = 8_192, 1_024
"""Calibration tokens that a layer is fitted to, and others that the divergence is measured on."""
CUTS = (1.5,)
"""Where a layer is measured: times the mean fraction of neurons that is left out. One place sets the factor of a square law; with
more the power is fitted too, at as many times the cost."""

Curve = Mapping[float, float]
"""Active share of a layer -> mean KL(dense || converted) in nats when no other layer is converted."""


def kl_budgets(graph: Graph, ctx: Context, share: float, fit: Callable[[Graph, Layer], None]) -> dict[str, float]:
    """Active share of each routed FFN, ``share`` on average over their neurons, at the least sum of divergences.

    Errors of a layer's output say next to nothing about what they do to the model's predictions; so each layer is measured to the
    end, see :func:`sensitivities`.

    Args:
        graph: a causal language model, experts carved, every gate 1; not changed.
        fit: gives a layer its router, with the threshold at the share noted for it.
    """
    if graph.info.get("task") != "causal-lm":
        raise RequestError("fit-router{budgets=kl} needs next-token predictions, and this model makes none", hint="use budgets=uniform")
    regions = find_routed(graph)
    curves = sensitivities(graph, ctx, share, fit)
    floors = {r.name: (routing_facts(graph, r.name).get("shared", 0) + 1) / r.experts for r in regions}
    return allocate(curves, {r.name: r.d_ff for r in regions}, share, floors)


def sensitivities(graph: Graph, ctx: Context, share: float, fit: Callable[[Graph, Layer], None]) -> dict[str, Curve]:
    """For each layer alone: its router fitted, its down-projection refitted, and the model run to its end.

    Takes a forward pass over :data:`MEASURED` tokens from that layer on, for each layer and share.
    """
    batches = ctx.need_calibration("fit-router{budgets=kl}").batches
    size = next(iter(batches[0].values())).numel()
    held = max(1, min(MEASURED // size, len(batches) // 4))
    if len(batches) < 2:
        raise RequestError("fit-router{budgets=kl} fits to one part of the calibration text and measures on another", hint="raise --tokens")
    fitted = min(len(batches) - held, max(1, TOKENS // size))
    chosen = [*batches[:fitted], *batches[-held:]]
    shares = sorted({min(max(1 - cut * (1 - share), 0.1), 0.99) for cut in CUTS}, reverse=True)
    work = graph.copy()
    work.info = graph.info | {"routing": {name: dict(facts) for name, facts in graph.info.get("routing", {}).items()}}
    sweep, regions = Sweep(graph, chosen), find_routed(graph)
    curves: dict[str, Curve] = {}
    with fast_matmul(), torch.no_grad():
        reference = [_Reference(logits) for logits in Sweep(graph, batches[-held:]).advance(graph.output_nodes[0])]
        for position, (region, copied) in enumerate(zip(regions, find_routed(work), strict=True)):
            inputs = sweep.advance(region.input)
            layer = Layer(ExpertView(work, copied), inputs[:fitted])
            routing_facts(work, region.name)["active"] = shares[0]
            fit(work, layer)
            curve = {}
            for wanted in shares:
                outputs = _converted(graph, region, work, layer, wanted, inputs[fitted:])
                branch = sweep.branch(range(fitted, len(chosen)))
                branch.provide(region.node, outputs)
                curve[wanted] = _mean([r.divergence(y) for r, y in zip(reference, branch.advance(graph.output_nodes[0]), strict=True)])
            curves[region.name] = curve
            ctx.progress("layer budgets", position + 1, len(regions))
    return curves


def _converted(graph: Graph, region: RoutedFFN, work: Graph, layer: Layer, share: float, inputs: list[Tensor]) -> list[Tensor]:
    """What a layer gives on ``inputs`` when ``share`` of its neurons run, before the bias that ``graph`` adds after it."""
    name = region.name
    down = graph.tensor(region.w_down).detach()
    bias = graph.tensor(region.b_down).detach() if region.b_down is not None else torch.zeros(region.d_out)
    current = same_region(work, layer.view.region)
    work.add_tensor(current.w_down, down)
    if current.b_down is not None:
        work.add_tensor(current.b_down, bias.clone())
    routing_facts(work, name)["active"] = share
    layer.view = ExpertView(work, current)
    if layer.view.gates.target is torch.ops.dyncomp.topk_gates.default:
        set_gates(work, layer.view, k=max(1, round(share * region.experts)))
    else:
        set_threshold(work, layer)
    layer.view = ExpertView(work, same_region(work, current))
    refit(work, layer, ridge=0.2, follow=0.0)
    layer.view = ExpertView(work, same_region(work, current))
    added = layer.view.b_down
    return [y + (added - bias) if added is not None else y for y in Layer(layer.view, inputs).outputs()]


class _Reference:
    """The dense model's predictions on one batch, to compare others with."""

    def __init__(self, logits: Tensor) -> None:
        logp = logits.float().flatten(0, -2).log_softmax(-1)
        self.p = logp.exp()
        self.entropy = float((self.p * logp).sum(-1).mean())

    def divergence(self, logits: Tensor) -> float:
        """Mean KL(dense || logits) a token."""
        q = logits.float().flatten(0, -2)
        cross = torch.stack([q_row.logsumexp(-1) - p_row @ q_row for q_row, p_row in zip(q, self.p, strict=True)])
        return max(self.entropy + float(cross.double().mean()), 1e-9)


def allocate(curves: Mapping[str, Curve], neurons: Mapping[str, int], share: float, floors: Mapping[str, float]) -> dict[str, float]:
    """The active shares with the least sum of divergences at a mean share of the neurons.

    Each curve is taken for c (1 - active)^p, p > 1. At the optimum another neuron costs the same in every layer (Everett, 1963), or a
    layer is at its floor.

    Args:
        neurons: of each layer.
        share: mean share of all neurons that may be active.
        floors: smallest share of each layer.
    """
    laws = {name: _power_law(curve) for name, curve in curves.items()}
    total = sum(neurons.values())

    def left_out(price: float) -> dict[str, float]:
        return {
            name: min((price * neurons[name] / (c * p)) ** (1 / (p - 1)), 1 - min(floors[name], share)) for name, (c, p) in laws.items()
        }

    low, high = -60.0, 60.0
    for _ in range(200):
        middle = (low + high) / 2
        if sum(neurons[n] * t for n, t in left_out(math.exp(middle)).items()) > (1 - share) * total:
            high = middle
        else:
            low = middle
    return {name: 1 - t for name, t in left_out(math.exp(low)).items()}


def _power_law(curve: Curve) -> tuple[float, float]:
    """(c, p) of c (1 - active)^p by least squares of the logarithms, p between 1.2 and 4; p = 2 through a single point."""
    points = torch.tensor([[math.log(1 - a), math.log(max(v, 1e-9))] for a, v in curve.items()], dtype=torch.float64)
    center = points.mean(0)
    x, y = (points - center).T
    power = min(max(float((x @ y) / (x @ x)), 1.2), 4.0) if len(curve) > 1 else 2.0
    return math.exp(float(center[1]) - power * float(center[0])), power


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
