"""The steps of a conversion, from Python: trace, look, rewrite, check.

python examples/api.py [MODEL]
"""

from __future__ import annotations

import sys

import dyncomp.passes  # noqa: F401  registers the passes
import torch

from dyncomp.models import load_model
from dyncomp.pipeline import Context, Pipeline, parse_passes, relative_error
from dyncomp.regions import find_regions, find_routed
from dyncomp.trace import trace_model


def main(model: str = "minilm") -> None:
    loaded = load_model(model)
    dense = trace_model(loaded)
    for ffn in find_regions(dense).ffns:
        print(f"{ffn.name}: {ffn.d_model} -> {ffn.d_ff} {ffn.activation}, {ffn.parameters / 1e6:.2f} M parameters")
    routed = dense.copy()
    Pipeline(parse_passes("carve-experts{experts=8 cluster=weights}")).run(routed, Context(probe=loaded.example_inputs))
    with torch.no_grad():
        error = relative_error(routed(**loaded.example_inputs), dense(**loaded.example_inputs))
    print(f"{len(find_routed(routed))} routed FFNs; with every expert on the outputs differ by {error:.1e} (relative)")


if __name__ == "__main__":
    main(*sys.argv[1:])
