"""Pass ``recalibrate``: thresholds for the inputs that routers see now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from dyncomp.passes.layerwise import Layer, LayerwisePass, set_threshold

from dyncomp.graph import Graph


@dataclass(frozen=True)
class Recalibrate(LayerwisePass):
    """Shift each router's threshold so that its active fraction on the calibration text is the one ``fit-router`` noted for it.

    Routers with a fixed top-k are left alone: they have no threshold.

    before:  scores = linear(x, W, b);  gates = dyncomp.threshold_gates(scores)
    after:   scores = linear(x, W, b - threshold);  gates = dyncomp.threshold_gates(scores)
    """

    name: ClassVar[str] = "recalibrate"

    def visit(self, graph: Graph, layer: Layer) -> None:
        if layer.view.gates.target is torch.ops.dyncomp.threshold_gates.default:
            set_threshold(graph, layer)
