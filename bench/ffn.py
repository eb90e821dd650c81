"""Time of the FFNs of one decode step and of a prefill, dense and routed.

    python -m bench.ffn [--backend ort tvm] [--shape smollm2-135m 2048x8192] [--precision fp32 int8 int4] [--threads 1] [--json FILE]

It is the time of the whole model less that of the model without its FFNs (their norms and residual additions stay); all take turns in one
process. ONNX Runtime's profile would add about 10 microseconds to each node, a fifth of a routed FFN in int4. The routed models have the
dense model's weights, carved into experts at random, and top-k gates of a random router: only speed is looked at. A shape such as
2048x8192 is that of the FFNs of a random Llama with two layers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from dyncomp.passes import Quantize
from dyncomp.passes.carve_experts import CarveExperts
from dyncomp.passes.layerwise import ExpertView, set_gates

from bench.tiny import TokenModel
from dyncomp.deploy import backend_of, lower_artifact
from dyncomp.graph import Graph
from dyncomp.models import load_model
from dyncomp.pipeline import Context
from dyncomp.regions import find_regions, find_routed
from dyncomp.report.markdown import FFN, ffn_cells
from dyncomp.report.tables import show, table
from dyncomp.runtime.bench import Variant, bench
from dyncomp.trace import trace, trace_model

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


def model_of(shape: str) -> Graph:
    """A packaged model by name, or a random Llama whose FFNs have a shape, as ``2048x8192``."""
    if "x" not in shape:
        return trace_model(load_model(shape))
    from transformers import LlamaConfig, LlamaForCausalLM

    width, neurons = map(int, shape.split("x"))
    heads = width // 64
    config = LlamaConfig(
        hidden_size=width, intermediate_size=neurons, num_hidden_layers=2, num_attention_heads=heads, num_key_value_heads=heads // 4,
        vocab_size=1024, max_position_embeddings=1024,
    )  # fmt: skip
    torch.manual_seed(0)
    module, ids = TokenModel(LlamaForCausalLM(config).eval(), "logits"), torch.zeros(2, 8, dtype=torch.int64)
    return trace(module, {"input_ids": ids}, {"input_ids": {0: "batch", 1: "sequence"}}, output_name="logits")


def ffn_times(
    shape: str = "smollm2-135m",
    choices: tuple[tuple[int, int], ...] = ((16, 4), (8, 2), (16, 8), (16, 12)),
    threads: int = 1,
    precision: str = "fp32",
    backend: str = "ort",
) -> list[dict[str, Any]]:
    """Milliseconds in the FFNs of one decode step and of a prompt of 128 tokens: the dense model first, then each (experts, k), all in one
    precision."""
    dense, used = model_of(shape), backend_of(backend)
    graphs = {"none": without_ffns(dense), "dense": dense} | {f"{k} of {e} experts": routed(dense, e, k) for e, k in choices}
    with tempfile.TemporaryDirectory() as folder:
        variants = []
        for name in list(graphs):
            graph, place = graphs.pop(name), Path(folder) / name.replace(" ", "-")
            if precision != "fp32":
                Quantize(bits=int(precision.removeprefix("int"))).run(graph, Context())
            lower_artifact(graph, place, backend=backend)
            variants.append(Variant(used.session(used.open(place, threads=threads)), name, precision))
        none, *found = bench(variants, prompt_tokens=_PROMPT, decode_tokens=_STEPS, rounds=_ROUNDS)
    rows: list[dict[str, Any]] = []
    for figures in found:
        step, prefill = (
            1000 * (n / figures[rate] - n / none[rate]) for rate, n in (("decode_tokens_per_s", 1), ("prefill_tokens_per_s", _PROMPT))
        )
        row = {"shape": shape, "backend": backend, "precision": precision, "threads": threads, "ffn": figures["variant"]}
        rows.append(row | {"ms_per_step": step, "ms_per_prefill": prefill})
    for row in rows:
        row["speedup"] = rows[0]["ms_per_step"] / row["ms_per_step"]
        row["prefill_speedup"] = rows[0]["ms_per_prefill"] / row["ms_per_prefill"]
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", nargs="+", default=["ort", "tvm"], choices=("ort", "tvm"))
    parser.add_argument("--shape", nargs="+", default=["smollm2-135m"], help="a packaged model, or WIDTHxNEURONS")
    parser.add_argument("--precision", nargs="+", default=["int8", "int4"], choices=("fp32", "int8", "int4"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    shown, measured = table(f"FFNs, {arguments.threads} thread(s)", *FFN), []
    for case in itertools.product(arguments.shape, arguments.precision, arguments.backend):
        shape, precision, backend = case
        print(*case, file=sys.stderr, flush=True)
        measured += ffn_times(shape, precision=precision, threads=arguments.threads, backend=backend)
        if arguments.json:
            arguments.json.write_text(json.dumps(measured, indent=1) + "\n")
    for row in measured:
        shown.add_row(*ffn_cells(row))
    show(shown)
