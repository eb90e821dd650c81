"""What a KV cache in int8 costs in quality, and saves in bytes and time, beside the same weights with a float one.

    python -m bench.kv_cache [--model smollm2-135m] [--windows 4] [--threads 1] [--contexts 64,1024,4096]

Quality is that of the PyTorch graph on held-out windows; decoding is timed in ONNX Runtime with int8 weights, the two taking turns.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from dyncomp.backends.ort.decoder import decoder_for
from dyncomp.backends.ort.run import OrtModel
from dyncomp.passes import Quantize, QuantizeCache
from rich.table import Table

from dyncomp.deploy import lower_artifact
from dyncomp.evidence import measure_quality
from dyncomp.examples import prepare_examples, reader_of
from dyncomp.graph import Graph
from dyncomp.models import load_model
from dyncomp.pipeline import Context
from dyncomp.report.tables import between, show, table
from dyncomp.runtime.bench import Variant, bench
from dyncomp.trace import trace_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--windows", type=int, default=4, help="of 512 tokens, of each source; 0 leaves quality out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--contexts", default="64,1024,4096", help="tokens in the cache; empty leaves speed out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    loaded = load_model(options.model)
    dense = trace_model(loaded)
    weights: dict[str, Graph] = {"fp32": dense, "int8": dense.copy()}
    Quantize().run(weights["int8"], Context())
    coded = {name: graph.copy() for name, graph in weights.items()}
    facts = [QuantizeCache().run(graph, Context()).facts for graph in coded.values()]
    before, after = facts[0]["bytes_per_token_before"], facts[0]["bytes_per_token"]
    print(f"{loaded.name}: {before} bytes a token in float, {after} in int8 ({after / before:.3f} x)")
    if options.windows:
        examples = prepare_examples(reader_of(loaded, dense), None, "news", tokens=2048, count=options.windows, seed=0).evaluation
        title = f"quality, {options.windows} windows of each text"
        result = table(title, "weights", "text", ">perplexity, float cache", ">int8 cache", ">change", ">KL, nats")
        for name in weights:
            for source, found in measure_quality({"dense": weights[name], "converted": coded[name]}, examples, loaded.task).items():
                perplexity, rise = found["perplexity"], found["increase"]["converted"]
                ends = found["intervals"]["increase"]["converted"]
                change = f"{rise:+.2%}{between(ends, '+.2%')}"
                cells = (f"{perplexity['dense']:.3f}", f"{perplexity['converted']:.3f}", change, f"{found['kl']['converted']:.5f}")
                result.add_row(name, source, *cells)
        show(result)
    if options.contexts:
        show(_speeds(weights["int8"], coded["int8"], [int(c) for c in options.contexts.split(",")], options.threads))


def _speeds(floats: Graph, coded: Graph, contexts: list[int], threads: int) -> Table:
    """Decoding and prefill with both caches, int8 weights."""
    title = f"int8 weights, batch 1, {threads} thread{'s' if threads > 1 else ''}"
    heads = (">decode tokens/s, float cache", ">int8 cache", ">x", ">prefill tokens/s, float cache", ">int8 cache")
    result = table(title, ">context", *heads)
    with tempfile.TemporaryDirectory() as folder:
        sessions = []
        for name, graph in (("float", floats), ("int8", coded)):
            lower_artifact(graph, Path(folder) / name)
            sessions.append(decoder_for(OrtModel(Path(folder) / name, threads=threads)))
        for context in contexts:
            found = bench([Variant(s, "dense") for s in sessions], prompt_tokens=context, context=context, decode_tokens=65, rounds=2)
            decode, prefill = ([f[f"{kind}_tokens_per_s"] for f in found] for kind in ("decode", "prefill"))
            result.add_row(f"{context}", *(f"{d:.1f}" for d in decode), f"{decode[1] / decode[0]:.2f}", *(f"{p:.0f}" for p in prefill))
    return result


if __name__ == "__main__":
    main()
