"""What a KV cache in int8 costs in quality, and saves in bytes and time, beside the same weights with a float one.

    python -m bench.kv_cache [--model smollm2-135m] [--windows 4] [--contexts 64,1024,4096]

Quality is that of the PyTorch graph on held-out windows; decoding is timed in ONNX Runtime with int8 weights on
one thread, in CPU time, the two taking turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
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
from dyncomp.trace import trace_model

BLOCKS, STEPS, SETTLE = 8, 12, 3  # turns of each; steps of a turn, the first of which are not counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--windows", type=int, default=4, help="of 512 tokens, of each source; 0 leaves quality out")
    parser.add_argument("--contexts", default="64,1024,4096", help="tokens in the cache; empty leaves speed out")
    options = parser.parse_args()
    torch.set_num_threads(1)
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
        show(_speeds(weights["int8"], coded["int8"], [int(c) for c in options.contexts.split(",")]))


def _speeds(floats: Graph, coded: Graph, contexts: list[int]) -> Table:
    """Tokens a second of CPU time with both caches."""
    heads = (">decode, float cache", ">int8 cache", ">x", ">prefill, float cache", ">int8 cache", ">x")
    result = table("tokens a second of one thread's CPU time, int8 weights, batch 1", ">context", *heads)
    with tempfile.TemporaryDirectory() as folder:
        sessions = []
        for name, graph in (("float", floats), ("int8", coded)):
            lower_artifact(graph, Path(folder) / name)
            sessions.append(decoder_for(OrtModel(Path(folder) / name, threads=1)))
        for context in contexts:
            prompt = np.random.default_rng(0).integers(0, 1000, (1, context))
            prefill = [_seconds(s.prefill, prompt, np.array([context]), BLOCKS * STEPS) for s in sessions]
            steps: list[list[float]] = [[], []]
            for _ in range(BLOCKS):
                for times, session in zip(steps, sessions, strict=True):
                    times += [_seconds(session.step, np.array([7])) for _ in range(STEPS)][SETTLE:]
            decode = [statistics.median(times) for times in steps]
            cells = [f"{1 / decode[0]:.1f}", f"{1 / decode[1]:.1f}", f"{decode[0] / decode[1]:.2f}"]
            cells += [f"{context / prefill[0]:.0f}", f"{context / prefill[1]:.0f}", f"{prefill[0] / prefill[1]:.2f}"]
            result.add_row(f"{context}", *cells)
    return result


def _seconds(call: Callable[..., object], *arguments: object) -> float:
    start = time.process_time()
    call(*arguments)
    return time.process_time() - start


if __name__ == "__main__":
    main()
