"""Time of the FFNs of one decode step and of a prefill, dense and routed.

    python -m bench.ffn [--precision fp32 int8 int4] [--threads 1]

It is the time of the whole model less that of the model without its FFNs (their norms and residual additions stay); all take turns in one
process. ONNX Runtime's profile would add about 10 microseconds to each node, a fifth of a routed FFN in int4. The routed models have the
dense model's weights, carved into experts at random, and top-k gates of a random router: only speed is looked at.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from dyncomp.backends.ort.decoder import decoder_for
from dyncomp.backends.ort.run import OrtModel
from dyncomp.passes import Quantize
from dyncomp.passes.carve_experts import CarveExperts
from dyncomp.passes.layerwise import ExpertView, set_gates

from dyncomp.deploy import lower_artifact
from dyncomp.graph import Graph
from dyncomp.models import load_model
from dyncomp.pipeline import Context
from dyncomp.regions import find_regions, find_routed
from dyncomp.runtime.bench import Variant, bench
from dyncomp.trace import trace_model

_PROMPT, _STEPS, _ROUNDS = 128, 240, 12


def routed(dense: Graph, experts: int, k: int) -> Graph:
    """Every FFN with ``experts`` experts, of which a random router opens ``k`` for each token."""
    graph = dense.copy()
    CarveExperts(experts=experts, cluster="random", keep_dense=()).run(graph, Context())
    generator = torch.Generator().manual_seed(0)
    for region in find_routed(graph):
        view = ExpertView(graph, region)
        graph.add_tensor(f"{region.name}.router.weight", torch.randn(experts, view.d_model, generator=generator))
        graph.add_tensor(view.router_bias, torch.zeros(experts))
        set_gates(graph, view, k=k)
    graph.clean()
    return graph


def without_ffns(dense: Graph) -> Graph:
    """Every FFN gives what it is given."""
    graph = dense.copy()
    for ffn in find_regions(graph).ffns:
        ffn.output.replace_all_uses_with(ffn.input)
    graph.clean()
    return graph


def ffn_times(
    model: str = "smollm2-135m",
    choices: tuple[tuple[int, int], ...] = ((16, 4), (8, 2), (16, 8), (16, 12)),
    threads: int = 1,
    precision: str = "fp32",
) -> list[dict[str, Any]]:
    """Milliseconds in the FFNs of one decode step and of a prompt of 128 tokens: the dense model first, then each (experts, k), all in one
    precision."""
    dense = trace_model(load_model(model))
    graphs = {"none": without_ffns(dense), "dense": dense} | {f"{k} of {e} experts": routed(dense, e, k) for e, k in choices}
    with tempfile.TemporaryDirectory() as folder:
        variants = []
        for name in list(graphs):
            graph, place = graphs.pop(name), Path(folder) / name.replace(" ", "-")
            if precision != "fp32":
                Quantize(bits=int(precision.removeprefix("int"))).run(graph, Context())
            lower_artifact(graph, place)
            variants.append(Variant(decoder_for(OrtModel(place, threads=threads)), name, precision))
        none, *found = bench(variants, prompt_tokens=_PROMPT, decode_tokens=_STEPS, rounds=_ROUNDS)
    rows: list[dict[str, Any]] = []
    for figures in found:
        step, prefill = (
            1000 * (n / figures[rate] - n / none[rate]) for rate, n in (("decode_tokens_per_s", 1), ("prefill_tokens_per_s", _PROMPT))
        )
        rows.append({"ffn": figures["variant"], "precision": precision, "threads": threads, "ms_per_step": step, "ms_per_prefill": prefill})
    for row in rows:
        row["speedup"] = rows[0]["ms_per_step"] / row["ms_per_step"]
        row["prefill_speedup"] = rows[0]["ms_per_prefill"] / row["ms_per_prefill"]
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", default=["int8", "int4"], choices=("fp32", "int8", "int4"))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    print(f"{'':<20} {'':<5}   decode step          prefill of {_PROMPT}, {arguments.threads} thread(s)")
    for precision in arguments.precision:
        for row in ffn_times(precision=precision, threads=arguments.threads):
            step = f"{row['ms_per_step']:8.2f} ms {row['speedup']:5.2f} x"
            print(f"{row['ffn']:<20} {precision:<5} {step}   {row['ms_per_prefill']:8.2f} ms {row['prefill_speedup']:5.2f} x", flush=True)
