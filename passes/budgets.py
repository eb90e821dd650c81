"""How many neurons each layer may run, by what fewer of them cost at the end of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from dyncomp.passes.layerwise import ExpertView, Layer, routing_facts, same_region
from dyncomp.passes.refit_down import refit
from torch import Tensor

from dyncomp.errors import RequestError
from dyncomp.graph import Graph
from dyncomp.models.loaded import WRITES
from dyncomp.pipeline import Context
from dyncomp.regions import find_carved
from dyncomp.sweep import Sweep, fast_matmul

TOKENS, MEASURED = 8_192, 1_024
"""Calibration tokens that a layer is fitted to, and others that the divergence is measured on."""
CUT = 1.5
"""Where a layer is measured: times the mean fraction of neurons that is left out."""


def kl_budgets(graph: Graph, ctx: Context, share: float, fit: Callable[[Graph, Layer], None]) -> dict[str, float]:
    """Active share of each routed FFN, ``share`` on average over their neurons, at the least sum of divergences.

    Errors of a layer's output say next to nothing about what they do to the model's predictions; so each layer is measured to the
    end, see :func:`sensitivities`.

    Args:
        graph: of a model that writes tokens, experts carved, every gate 1; not changed.
        fit: gives a layer its router, with the threshold at the share noted for it.
    """
    if graph.info.get("task") not in WRITES:
        raise RequestError("fit-router{budgets=kl} needs next-token predictions, and this model makes none", hint="use budgets=uniform")
    regions = find_carved(graph)
    losses = sensitivities(graph, ctx, share, fit)
    floors = {r.name: (routing_facts(graph, r.name).get("shared", 0) + 1) / r.experts for r in regions}
    return allocate(losses, {r.name: r.d_ff for r in regions}, share, floors)


def sensitivities(graph: Graph, ctx: Context, share: float, fit: Callable[[Graph, Layer], None]) -> dict[str, float]:
    """Mean KL(dense || converted) in nats with each layer alone converted: its router fitted, its down-projection refitted.

    Takes a forward pass over :data:`MEASURED` tokens from that layer on, for each layer.
    """
    batches = ctx.need_calibration("fit-router{budgets=kl}").batches
    size = next(iter(batches[0].values())).numel()
    held = max(1, min(MEASURED // size, len(batches) // 4))
    if len(batches) < 2:
        raise RequestError("fit-router{budgets=kl} fits to one part of the calibration text and measures on another", hint="raise --tokens")
    fitted = min(len(batches) - held, max(1, TOKENS // size))
    chosen = [*batches[:fitted], *batches[-held:]]
    cut = min(max(1 - CUT * (1 - share), 0.1), 0.99)
    work = graph.copy()
    sweep, regions = Sweep(graph, chosen), find_carved(graph)
    losses: dict[str, float] = {}
    with fast_matmul(), torch.no_grad():
        reference = [Reference(logits) for logits in Sweep(graph, batches[-held:]).advance(graph.output_nodes[0])]
        for position, (region, copied) in enumerate(zip(regions, find_carved(work), strict=True)):
            inputs = sweep.advance(region.input)
            layer = Layer(ExpertView(work, copied), inputs[:fitted], fresh=inputs[fitted:])
            routing_facts(work, region.name)["active"] = cut
            fit(work, layer)
            branch = sweep.branch(range(fitted, len(chosen)))
            branch.provide(region.node, _converted(work, layer, inputs[fitted:]))
            found = [r.divergence(y) for r, y in zip(reference, branch.advance(graph.output_nodes[0]), strict=True)]
            losses[region.name] = sum(found) / len(found)
            ctx.progress("layer budgets", position + 1, len(regions))
    return losses


def _converted(work: Graph, layer: Layer, inputs: list[Tensor]) -> list[Tensor]:
    """What a layer with a fitted router gives on ``inputs`` when refitted, before the bias that the dense model adds after it."""
    before = layer.view.b_down
    refit(work, layer, ridge=0.2, follow=0.0)
    layer.view = ExpertView(work, same_region(work, layer.view.region))
    added = layer.view.b_down
    outputs = Layer(layer.view, inputs).outputs()
    return outputs if added is None else [y + (added if before is None else added - before) for y in outputs]


class Reference:
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


def allocate(losses: Mapping[str, float], neurons: Mapping[str, int], share: float, floors: Mapping[str, float]) -> dict[str, float]:
    """The active shares with the least sum of losses at a mean share of the neurons.

    A layer's loss is taken to grow with the square of what is left out of it. At the optimum another neuron costs the same in every
    layer (Everett, 1963), or a layer is at its floor.

    Args:
        losses: of each layer, with the same share left out of each.
        neurons: of each layer.
        share: mean share of all neurons that may be active.
        floors: smallest share of each layer.
    """
    total = sum(neurons.values())

    def left_out(price: float) -> dict[str, float]:
        return {name: min(price * neurons[name] / loss, 1 - min(floors[name], share)) for name, loss in losses.items()}

    low, high = -60.0, 60.0
    for _ in range(200):
        middle = (low + high) / 2
        if sum(neurons[n] * t for n, t in left_out(math.exp(middle)).items()) > (1 - share) * total:
            high = middle
        else:
            low = middle
    return {name: 1 - t for name, t in left_out(math.exp(low)).items()}
