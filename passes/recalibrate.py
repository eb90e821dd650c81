"""Pass ``recalibrate``: thresholds for the inputs that routers see now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dyncomp.calibrate import UNFITTED
from dyncomp.errors import PassError
from dyncomp.graph import Graph
from dyncomp.pipeline import Context, Pass, PassResult
from dyncomp.regions import find_carved
from dyncomp.regions.depth import find_skips
from dyncomp.regions.thresholds import find_thresholds
from dyncomp.sweep import Sweep, fast_matmul


@dataclass(frozen=True)
class Recalibrate(Pass):
    """Shift each threshold so that as many gates are open on the calibration text as ``fit-router`` or ``skip-depth`` noted for it.

    In graph order, each on what the layers before it give by then. Gates with a fixed top-k, and those that look across a sequence,
    are left alone: they have no threshold.

    before:  scores = linear(x, W, b);  gates = dyncomp.threshold_gates(scores)
    after:   scores = linear(x, W, b - threshold);  gates = dyncomp.threshold_gates(scores)
    """

    name: ClassVar[str] = "recalibrate"

    tokens: int = UNFITTED
    """Of the calibration text that are looked at."""

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        thresholds, result = find_thresholds(graph), PassResult()
        if not thresholds and not find_carved(graph) and not find_skips(graph):
            raise PassError("the graph has no router", hint="run carve-experts or skip-depth first")
        sweep = Sweep(graph, ctx.need_calibration(self.name).unfitted(tokens=self.tokens))
        with fast_matmul(), torch.no_grad():
            for position, threshold in enumerate(thresholds):
                scores = sweep.advance(threshold.scores)
                level = threshold.level(*scores)
                threshold.lower(graph, level)
                sweep.provide(threshold.scores, [threshold.moved(s, level) for s in scores])
                result.changed.append(threshold.name)
                ctx.progress(self.name, position + 1, len(thresholds))
        return result
