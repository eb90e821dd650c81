"""Time in the FFNs of one decode step and of a prefill, dense and routed, from ONNX Runtime's own profile.

    python -m bench.ffn_profile [--precision fp32 int8 int4] [--threads 1]

The routed models have the dense model's weights, carved into experts at random, and top-k gates of a random router: only speed is
looked at. The sessions take turns; the figure is the sum over FFN nodes of each node's median.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
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
from dyncomp.regions import find_routed
from dyncomp.runtime.bench import random_steps
from dyncomp.trace import trace_model

FFN = re.compile(r"\.mlp|router|experts")
_PROMPT, _STEPS = 128, 16  # of a session's turn: a prefill, then steps


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


def profile_ffn(
    model: str = "smollm2-135m",
    choices: tuple[tuple[int, int], ...] = ((16, 4), (8, 2), (16, 8), (16, 12)),
    threads: int = 1,
    precision: str = "fp32",
    rounds: int = 5,
) -> list[dict[str, Any]]:
    """Milliseconds in FFN nodes of one decode step and of a prompt of 128 tokens: the dense model first, then each (experts, k), all
    in one precision."""
    dense = trace_model(load_model(model))
    graphs = {"dense": dense.copy()} | {f"{k} of {e} experts": routed(dense, e, k) for e, k in choices}
    with tempfile.TemporaryDirectory() as folder:
        runtimes: dict[str, OrtModel] = {}
        for name in list(graphs):
            graph, place = graphs.pop(name), Path(folder) / name.replace(" ", "-")
            if precision != "fp32":
                Quantize(bits=int(precision.removeprefix("int"))).run(graph, Context())
            lower_artifact(graph, place)
            runtimes[name] = OrtModel(place, threads=threads, profile=place / "profile")
        decoders = [decoder_for(runtime) for runtime in runtimes.values()]
        for _ in range(rounds + 1):
            for decoder in decoders:
                random_steps(decoder, context=_PROMPT, steps=_STEPS)
        rows: list[dict[str, Any]] = []
        for name, runtime in runtimes.items():
            prefill, step = _ffn_times(runtime.end_profiling())
            rows.append({"ffn": name, "precision": precision, "threads": threads, "ms_per_step": step, "ms_per_prefill": prefill})
    for row in rows:
        row["speedup"] = rows[0]["ms_per_step"] / row["ms_per_step"]
        row["prefill_speedup"] = rows[0]["ms_per_prefill"] / row["ms_per_prefill"]
    return rows


def _ffn_times(profile: Path) -> tuple[float, float]:
    """(of a prefill, of a decode step), the first round left out."""
    times: dict[str, list[float]] = {}
    for event in json.loads(profile.read_text()):
        name = event.get("name", "")
        if event.get("cat") == "Node" and name.endswith("_kernel_time") and FFN.search(name):
            times.setdefault(name, []).append(event["dur"] / 1000)
    prefill = step = 0.0
    for found in times.values():
        rounds = [found[i : i + 1 + _STEPS] for i in range(1 + _STEPS, len(found), 1 + _STEPS)]
        prefill += statistics.median(r[0] for r in rounds)
        step += statistics.median(t for r in rounds for t in r[1:])
    return prefill, step


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", default=["int8", "int4"], choices=("fp32", "int8", "int4"))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    print(f"{'':<20} {'':<5}   decode step          prefill of {_PROMPT}, {arguments.threads} thread(s)")
    for precision in arguments.precision:
        for row in profile_ffn(precision=precision, threads=arguments.threads):
            step = f"{row['ms_per_step']:8.2f} ms {row['speedup']:5.2f} x"
            print(f"{row['ffn']:<20} {precision:<5} {step}   {row['ms_per_prefill']:8.2f} ms {row['prefill_speedup']:5.2f} x", flush=True)
