"""Time in the FFNs of one decode step, dense and routed, from ONNX Runtime's own profile.

    python -m bench.ffn_profile [--precision fp32|int8|int4]

The routed model has the dense model's weights, carved into experts at random, and top-k gates of a random router: only speed is
looked at. Both sessions take turns; the figure is the sum over FFN nodes of each node's median.
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


def routed(dense: Graph, experts: int, k: int) -> Graph:
    """Every FFN with ``experts`` experts, of which a random router opens ``k`` for each token."""
    graph = dense.copy()
    CarveExperts(experts=experts, cluster="random", keep_dense=()).run(graph, Context())
    generator = torch.Generator().manual_seed(0)
    for region in find_routed(graph):
        view = ExpertView(graph, region)
        graph.add_tensor(view.router_weight, torch.randn(view.weight.shape, generator=generator))
        graph.add_tensor(view.router_bias, torch.zeros(experts))
        set_gates(graph, view, k=k)
    graph.clean()
    return graph


def profile_ffn(
    model: str = "smollm2-135m",
    choices: tuple[tuple[int, int], ...] = ((16, 4), (8, 2), (16, 8)),
    threads: int = 1,
    precision: str = "fp32",
) -> list[dict[str, Any]]:
    """Milliseconds in FFN nodes of one decode step: the dense model first, then each (experts, k), all in one precision."""
    dense = trace_model(load_model(model))
    graphs = {"dense": dense.copy()} | {f"{k} of {e} experts": routed(dense, e, k) for e, k in choices}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, graph in graphs.items():
            if precision != "fp32":
                Quantize(bits=int(precision.removeprefix("int"))).run(graph, Context())
            place = Path(folder) / name.replace(" ", "-")
            lower_artifact(graph, place)
            runtime = OrtModel(place, threads=threads, profile=place / "profile")
            random_steps(decoder_for(runtime), context=64, steps=80)
            rows.append({"ffn": name, "precision": precision, "threads": threads, "ms_per_step": _ffn_time(runtime.end_profiling())})
    for row in rows:
        row["speedup"] = float(rows[0]["ms_per_step"]) / float(row["ms_per_step"])
    return rows


def _ffn_time(profile: Path) -> float:
    times: dict[str, list[float]] = {}
    for event in json.loads(profile.read_text()):
        name = event.get("name", "")
        if event.get("cat") == "Node" and name.endswith("_kernel_time") and FFN.search(name):
            times.setdefault(name, []).append(event["dur"] / 1000)
    return sum(statistics.median(t[len(t) // 4 :]) for t in times.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "int8", "int4"))
    for row in profile_ffn(precision=parser.parse_args().precision):
        speed = f"{row['ms_per_step']:7.2f} ms a step, {row['threads']} thread, {row['speedup']:.2f} x dense"
        print(f"{row['ffn']:<20} {row['precision']} {speed}")
