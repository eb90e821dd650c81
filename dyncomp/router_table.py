"""Routers compared on one model: what they choose, what that costs in the layer, and what it costs in the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dyncomp.calibrate import calibrate
from dyncomp.evaluate import evaluate
from dyncomp.evidence import calibration_of
from dyncomp.examples import Examples, prepare_examples, reader_of
from dyncomp.graph import Graph
from dyncomp.models import LoadedModel
from dyncomp.models.loaded import WRITES
from dyncomp.passes import CarveExperts, FitRouter, PruneStatic, RefitDown
from dyncomp.passes.layerwise import Layer, LayerwisePass
from dyncomp.passes.routers import FAMILIES
from dyncomp.passes.routers.scores import energies
from dyncomp.pipeline import Context, Pass, Pipeline, Progress, no_progress
from dyncomp.regions import find_regions, find_routed
from dyncomp.trace import trace_model

ORACLE, STATIC = "oracle", "static"


@dataclass(frozen=True)
class RouterRow:
    """One router.

    Args:
        agreement: mean share of the experts that it opens which are those of the largest energy in its layer, as many of them over
            the calibration tokens; shared experts not counted. None for static pruning.
        layer_error: mean over the layers of ||y - dense||² / ||dense||², y the FFN's output with the experts it opens, before any
            refit. None for static pruning.
        loss: after ``refit-down``, on held-out text: relative rise of the perplexity, or 1 - cosine to the dense embeddings.
        interval: [low, high] of the loss at 95 %, or None for a single window.
        active: mean fraction of FFN neurons that ran on that text.
        seconds: to fit it and to refit.
    """

    router: str
    agreement: float | None
    layer_error: float | None
    loss: float
    interval: list[float] | None
    active: float
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
    """Every router on the same experts at the same active fraction, then static pruning at that fraction.

    The oracle knows every neuron (``neuron`` in full rank: it costs as much as the FFN and is here for comparison only).

    Args:
        experts: per FFN, a quarter of them shared.
        tokens: calibration tokens. count: windows or images held out. text: what to calibrate on, a part of it held out.
        done: called with each row as it is measured.
    """
    dense = trace_model(loaded)
    examples = prepare_examples(reader_of(loaded, dense), text, None, tokens=tokens, count=count, seed=seed)
    calibration, held_out = calibration_of(loaded, dense, examples.calibration), examples.evaluation["held out"]
    ctx = Context(calibration, None, progress, seed, dense)
    calibrate(dense, find_regions(dense).ffns, calibration, progress=progress)
    carved = dense.copy()
    Pipeline([CarveExperts(experts=experts, shared=experts // 4)]).run(carved, ctx)
    rows = []
    for name in routers:
        graph = (dense if name == STATIC else carved).copy()
        probe, start = _Probe(), time.perf_counter()
        passes: list[Pass] = [PruneStatic(active=active)]
        if name != STATIC:
            width = max(r.d_model for r in find_routed(graph))
            fit = (
                FitRouter(active=active, router="neuron", rank=width)
                if name == ORACLE
                else FitRouter(active=active, router=name, rank=rank)
            )
            passes = [fit, probe, RefitDown()]
        Pipeline(passes).run(graph, ctx)
        seconds = time.perf_counter() - start
        loss, interval, used = _loss(dense, graph, held_out, loaded.task, active)
        rows.append(RouterRow(name, _mean(probe.agreement), _mean(probe.error), loss, interval, used, seconds))
        if done is not None:
            done(rows[-1])
    return rows


def _loss(dense: Graph, graph: Graph, held_out: Examples, task: str, active: float) -> tuple[float, list[float] | None, float]:
    quality = evaluate({"dense": dense, "converted": graph}, held_out, task=task)
    ranges: dict[str, Any] = quality.intervals()
    loads = quality.load["converted"]
    routed = {r.name: r.d_ff for r in find_routed(graph)}
    used = quality.active_ffn("converted", routed, sum(f.d_ff for f in find_regions(graph).ffns)) if loads else active
    if task in WRITES:
        return quality.increase("converted"), ranges.get("increase", {}).get("converted"), used
    ends = ranges.get("cosine", {}).get("converted")
    return 1 - quality.cosine["converted"], None if ends is None else [1 - ends[1], 1 - ends[0]], used


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
