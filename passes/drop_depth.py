"""Pass ``drop-depth``: the baseline of ``skip-depth``, whole parts left out for every token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from dyncomp.passes.depth_budget import fit_stand_in
from dyncomp.passes.depth_gates import Unit
from dyncomp.passes.layerwise import residual_add
from dyncomp.passes.skip_depth import WHAT, find_units, require_stand_in, usual_rank
from torch import fx

from dyncomp.errors import RequestError
from dyncomp.graph import Graph
from dyncomp.pipeline import Context, Pass, PassResult
from dyncomp.regions.depth import Part
from dyncomp.regions.refusal import Refusal
from dyncomp.sweep import Sweep, fast_matmul

TOKENS = 16_384
"""Calibration tokens that stand-ins are fitted to."""


@dataclass(frozen=True)
class DropDepth(Pass):
    """Leave out the attentions, FFNs or layers that change the residual stream least.

    before:  x + attention(norm(x))
    after:   x, or with ``standin=linear`` x + linear(linear(norm(x), down), up, bias)

    The measure is block influence, one minus the mean cosine of the stream before and after (ShortGPT, 2403.03853). Stand-ins are fitted
    in order, each to what the part would give after those before it.
    """

    name: ClassVar[str] = "drop-depth"

    what: str = "block"
    """``ffn``, ``attention``, or ``block``: an attention and the FFN after it."""
    count: int = 4
    """How many are left out."""
    standin: str = "none"
    """What every token gets in their place: ``none``, or ``linear``, a low-rank map as in ``skip-depth``."""
    rank: int = 0
    """Of the stand-in, its constant counted; 0 for that of ``skip-depth``."""

    def __post_init__(self) -> None:
        if self.what not in WHAT:
            raise RequestError(f"drop-depth: what={self.what} is not known", hint=f"use {', '.join(WHAT)}")
        if self.count < 0:
            raise RequestError(f"drop-depth: count={self.count}")
        require_stand_in(self.name, self.standin, self.rank)

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
        least = set(sorted(droppable, key=lambda u: influence[u.name])[: self.count])
        dropped = [unit for unit in droppable if unit in least]
        sweep = Sweep(graph, ctx.need_calibration(self.name).first(TOKENS)) if self.standin == "linear" else None
        for unit in dropped:
            for part in unit.parts:
                added, stream = residual_add(part.result)
                assert added is not None
                assert stream is not None
                if sweep is None:
                    added.replace_all_uses_with(stream)
                else:
                    self._stand_in(graph, part, added, sweep, self.rank or usual_rank(units))
            result.changed.append(unit.name)
        result.facts = {"influence": {name: round(value, 5) for name, value in influence.items()}}
        return result

    def _stand_in(self, graph: Graph, part: Part, added: fx.Node, sweep: Sweep, rank: int) -> None:
        """Let ``added`` add what the part's stand-in gives in place of what the part gives."""
        with fast_matmul(), torch.no_grad():
            x, y = sweep.advance(part.source), sweep.advance(part.result)
            down, up, bias = fit_stand_in(x, y, rank)
            given = [a @ down @ up + bias for a in x]
        weights = {f"{part.name}.standin.{n}": v.contiguous() for n, v in (("down", down.T), ("up", up.T), ("bias", bias))}
        for name, value in weights.items():
            graph.add_tensor(name, value)
        lower, upper, constant = map(graph.read, weights)
        with graph.inserting(before=added, path=f"{part.name}.standin") as builder:
            narrow = builder.call(torch.ops.aten.linear.default, part.source, lower)
            z = builder.call(torch.ops.aten.linear.default, narrow, upper, constant)
        added.replace_input_with(part.result, z)
        sweep.provide(z, given)

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
