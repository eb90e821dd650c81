"""A pass of one's own: clamp the hidden activations of every FFN, on a packaged model.

python examples/clamp_pass.py [MODEL]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar

import torch

from dyncomp.graph import Graph
from dyncomp.models import load_model
from dyncomp.pipeline import Context, Pass, PassResult, Pipeline, parse_passes
from dyncomp.regions import find_regions
from dyncomp.trace import trace_model


@dataclass(frozen=True)
class ClampHidden(Pass):
    """Clamp what goes into each down-projection.

    before:  linear(h, down)
    after:   linear(clamp(h, -limit, limit), down)
    """

    name: ClassVar[str] = "clamp-hidden"
    limit: float = 100.0

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        result = PassResult(facts={"limit": self.limit})
        for ffn in find_regions(graph).ffns:
            hidden = ffn.down.input
            with graph.inserting(after=hidden, path=ffn.name) as builder:
                clamped = builder.call(torch.ops.aten.clamp.default, hidden, -self.limit, self.limit)
            hidden.replace_all_uses_with(clamped, delete_user_cb=lambda user, new=clamped: user is not new)
            result.changed.append(ffn.name)
        return result


def main(model: str = "minilm", spec: str = "clamp-hidden{limit=6}") -> None:
    loaded = load_model(model)
    graph = trace_model(loaded)
    (record,) = Pipeline(parse_passes(spec)).run(graph, Context(probe=loaded.example_inputs))
    print(f"{record.spec}: {len(record.result.changed)} FFNs, outputs moved by {record.relative_error:.1e} (relative)")


if __name__ == "__main__":
    main(*sys.argv[1:])
