"""Pass ``drop-depth``: the baseline of ``skip-depth``, whole parts left out for every token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from dyncomp.passes.depth_gates import Unit
from dyncomp.passes.layerwise import residual_add
from dyncomp.passes.skip_depth import WHAT, find_units

from dyncomp.errors import RequestError
from dyncomp.graph import Graph
from dyncomp.pipeline import Context, Pass, PassResult
from dyncomp.regions.refusal import Refusal
from dyncomp.sweep import Sweep, fast_matmul


@dataclass(frozen=True)
class DropDepth(Pass):
    """Leave out the attentions, FFNs or layers that change the residual stream least.

    before:  x + attention(norm(x))
    after:   x

    The measure is block influence, one minus the mean cosine of the stream before and after (ShortGPT, 2403.03853).
    """

    name: ClassVar[str] = "drop-depth"

    what: str = "block"
    """``ffn``, ``attention``, or ``block``: an attention and the FFN after it."""
    count: int = 4
    """How many are left out."""

    def __post_init__(self) -> None:
        if self.what not in WHAT:
            raise RequestError(f"drop-depth: what={self.what} is not known", hint=f"use {', '.join(WHAT)}")
        if self.count < 0:
            raise RequestError(f"drop-depth: count={self.count}")

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        units, refused = find_units(graph, self.what)
        droppable = [u for u in units if all(residual_add(p.result)[0] is not None for p in u.parts)]
        result = PassResult(refused=refused)
        for unit in units:
            if unit not in droppable:
                result.refused.append(Refusal(unit.name, self.name, "it is not added to the residual stream directly", "it stays"))
        if self.count > len(droppable):
            raise RequestError(f"drop-depth: {self.count} of {len(droppable)} cannot be left out")
        influence = self._influence(graph, droppable, ctx)
        for unit in sorted(droppable, key=lambda u: influence[u.name])[: self.count]:
            for part in unit.parts:
                added, stream = residual_add(part.result)
                assert added is not None
                assert stream is not None
                added.replace_all_uses_with(stream)
            result.changed.append(unit.name)
        result.facts = {"influence": {name: round(value, 5) for name, value in influence.items()}}
        return result

    def _influence(self, graph: Graph, units: list[Unit], ctx: Context) -> dict[str, float]:
        """1 - mean cosine of the residual stream before and after each unit."""
        sweep = Sweep(graph, ctx.need_calibration(self.name).batches)
        found = {}
        with fast_matmul(), torch.no_grad():
            for position, unit in enumerate(units):
                sweep.advance(unit.parts[0].source)
                before = list(sweep.values(unit.parts[0].stream))
                added, _ = residual_add(unit.parts[-1].result)
                assert added is not None
                after = sweep.advance(added)
                similar = [float(F.cosine_similarity(b, a, dim=-1).mean()) for b, a in zip(before, after, strict=True)]
                found[unit.name] = 1 - sum(similar) / len(similar)
                ctx.progress(self.name, position + 1, len(units))
        return found
