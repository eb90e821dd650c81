"""Name the root-mean-square norms of a graph."""

from __future__ import annotations

from dataclasses import dataclass

from dyncomp.graph import Graph
from dyncomp.pipeline import Context, Pass, PassResult
from dyncomp.regions.norm import fuse_rms_norms


@dataclass(frozen=True)
class FuseNorm(Pass):
    """Every RMSNorm spelled in primitives becomes one ``rms_norm`` node.

    before:  mul(weight, mul(x, rsqrt(add(mean(pow(x, 2), -1), eps))))
    after:   rms_norm(x, [d], weight, eps)

    The region is recognised by evaluating it, so ``(1 + weight)`` (Gemma), norms without a weight, and any spelling of the
    square and the root are the same to it. A backend that lowers the graph does this by itself.
    """

    name = "fuse-norm"
    tolerance = 1e-5

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        return PassResult(changed=fuse_rms_norms(graph))
