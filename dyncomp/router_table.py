"""Routers and gates compared on one model: what they choose, how evenly, what that costs in the layer, and what it costs in the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dyncomp.calibrate import calibrate
from dyncomp.evaluate import evaluate, load_summary
from dyncomp.evidence import calibration_of
from dyncomp.examples import Examples, prepare_examples, reader_of
from dyncomp.graph import Graph
from dyncomp.models import LoadedModel
from dyncomp.models.loaded import WRITES
from dyncomp.passes import CarveExperts, FitRouter, PruneStatic, RefitDown
from dyncomp.passes.fit_router import ACROSS_TOKENS, GATES
from dyncomp.passes.layerwise import Layer, LayerwisePass, active_share
from dyncomp.passes.routers import FAMILIES
from dyncomp.passes.routers.scores import energies
from dyncomp.pipeline import Context, Pass, Pipeline, Progress, no_progress
from dyncomp.regions import find_regions, find_routed
from dyncomp.trace import trace_model

ORACLE, STATIC, RIDGE = "oracle", "static", "ridge"
Measured = tuple[float, list[float] | None, float, dict[str, float] | None]
"""(loss, its interval, active fraction, load)"""
LOAD = ("least_used", "most_used", "unused_experts", "spread", "collapsed")
"""Of :func:`~dyncomp.evaluate.load_summary`, what a row shows."""


@dataclass(frozen=True)
class RouterRow:
    """One router with one kind of gates.

    Args:
        router: that gives scores; ``gates``: made of them, a name that ``fit-router`` knows. None for static pruning.
        agreement: mean share of the experts that it opens which are those of the largest energy in its layer, as many of them over
            the calibration tokens; shared experts not counted. None for static pruning.
        layer_error: mean over the layers of ||y - dense||² / ||dense||², y the FFN's output with the experts it opens, before any
            refit. None for static pruning.
        loss: after ``refit-down``, on held-out text: relative rise of the perplexity, or 1 - cosine to the dense embeddings.
        interval: [low, high] of the loss at 95 %, or None for a single window.
        active: mean fraction of FFN neurons that ran on that text.
        load: how experts were used there, over all layers: share of the tokens that the least and the most used one ran for, experts that
            no token used, the lowest spread of a layer, and the layers that collapsed (see :func:`~dyncomp.evaluate.load_summary`);
            shared experts count as used by all. None for static pruning.
        seconds: to fit it and to refit.
    """

    router: str
    gates: str | None
    agreement: float | None
    layer_error: float | None
    loss: float
    interval: list[float] | None
    active: float
    load: dict[str, float] | None
    seconds: float


class _Probe(LayerwisePass):
    """Looks at each layer between ``fit-router`` and ``refit-down``."""

    def __init__(self) -> None:
        object.__setattr__(self, "agreement", [])
        object.__setattr__(self, "error", [])

    def visit(self, graph: Graph, layer: Layer) -> None:
        agreement, error = layer_figures(layer)
        self.agreement.append(agreement)
        self.error.append(error)


def layer_figures(layer: Layer) -> tuple[float, float]:
    """(agreement with the oracle, relative error) of one layer, see :class:`RouterRow`."""
    view = layer.view
    gates = torch.cat([view.gate_values(x) for x in layer.inputs])
    opened = gates[:, ~view.shared].bool()
    energy = torch.cat(energies(layer))[:, ~view.shared]
    count = int(opened.sum())
    best = torch.zeros(energy.numel(), dtype=torch.bool)
    best[energy.flatten().topk(count).indices] = True
    common = float((opened & best.view_as(opened)).sum()) / max(count, 1)
    down = view.w_down.permute(0, 2, 1).flatten(0, 1)
    lost, whole, start = 0.0, 0.0, 0
    for h in layer.hidden():
        part = gates[start : start + len(h)]
        start += len(h)
        h = h.float()
        y = h.flatten(1) @ down
        lost += float((y - (h * part[..., None]).flatten(1) @ down).square().sum())
        whole += float(y.square().sum())
    return common, lost / max(whole, 1e-30)


def compare_routers(
    loaded: LoadedModel,
    *,
    active: float = 0.75,
    experts: int = 16,
    tokens: int = 8_192,
    count: int = 4,
    rank: int = 32,
    routers: tuple[str, ...] = (ORACLE, *FAMILIES, STATIC),
    text: str | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
    done: Callable[[RouterRow], None] | None = None,
) -> list[RouterRow]:
    """Every router on the same experts at the same active fraction with threshold gates, the ``ridge`` one with every other kind of gates,
    then static pruning at that fraction.

    The oracle knows every neuron (``neuron`` in full rank: it costs as much as the FFN and is here for comparison only). Gates that look
    at tokens yet to come are left out for models that write.

    Args:
        experts: per FFN; a third of those that a token has are shared, as recipes have it.
        tokens: calibration tokens. count: windows or images held out. text: what to calibrate on, a part of it held out.
        done: called with each row as it is measured.
    """
    dense = trace_model(loaded)
    examples = prepare_examples(reader_of(loaded, dense), text, None, tokens=tokens, count=count, seed=seed)
    calibration, held_out = calibration_of(loaded, dense, examples.calibration), examples.evaluation["held out"]
    ctx = Context(calibration, None, progress, seed, dense)
    calibrate(dense, find_regions(dense).ffns, calibration, progress=progress)
    carved = dense.copy()
    shared = int(experts * active / 3)
    Pipeline([CarveExperts(experts=experts, shared=shared)]).run(carved, ctx)
    chosen = max(1, round(active_share(carved, active, who="inspect --routers") * experts)) - shared
    choices = [(name, None if name == STATIC else GATES[0]) for name in routers]
    if RIDGE in routers:
        across = () if loaded.task in WRITES else ACROSS_TOKENS
        others = [g for g in GATES[1:] if g not in ACROSS_TOKENS or g in across]
        position = len(choices) - (choices[-1][0] == STATIC)
        choices[position:position] = [(RIDGE, gates) for gates in others]
    rows = []
    for name, gates in choices:
        graph = (dense if gates is None else carved).copy()
        probe, start = _Probe(), time.perf_counter()
        passes: list[Pass] = [PruneStatic(active=active)]
        if gates is not None:
            width = max(r.d_model for r in find_routed(graph))
            router = ("neuron", width) if name == ORACLE else (name, rank)
            groups, kept = _groups(experts - shared, chosen)
            fit = FitRouter(active=active, gates=gates, router=router[0], rank=router[1], groups=groups, kept=kept)
            passes = [fit, probe, RefitDown()]
        Pipeline(passes).run(graph, ctx)
        seconds = time.perf_counter() - start
        loss, interval, used, load = _loss(dense, graph, held_out, loaded.task, active)
        rows.append(RouterRow(name, gates, _mean(probe.agreement), _mean(probe.error), loss, interval, used, load, seconds))
        if done is not None:
            done(rows[-1])
    return rows


def _groups(experts: int, chosen: int) -> tuple[int, int]:
    """(groups, those a token may use) for gates that have them: about four, and half of them, or as many as hold the chosen experts."""
    groups = next(g for g in (4, 3, 2, *range(5, experts + 1)) if experts % g == 0)
    return groups, max(-(-groups // 2), -(-chosen * groups // experts))


def _loss(dense: Graph, graph: Graph, held_out: Examples, task: str, active: float) -> Measured:
    quality = evaluate({"dense": dense, "converted": graph}, held_out, task=task)
    ranges: dict[str, Any] = quality.intervals()
    loads = quality.load["converted"]
    routed = {r.name: r.d_ff for r in find_routed(graph)}
    used = quality.active_ffn("converted", routed, sum(f.d_ff for f in find_regions(graph).ffns)) if loads else active
    summary = load_summary(list(loads.values())) if loads else {}
    load = {name: summary[name] for name in LOAD} if loads else None
    if task in WRITES:
        return quality.increase("converted"), ranges.get("increase", {}).get("converted"), used, load
    ends = ranges.get("cosine", {}).get("converted")
    return 1 - quality.cosine["converted"], None if ends is None else [1 - ends[1], 1 - ends[0]], used, load


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
