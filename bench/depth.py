"""Time of a decode step when tokens skip layers: dense, and with 0, 25 and 50 % of the layers skipped, at batch 1, 4 and 16.

    python -m bench.depth [--model smollm2-135m] [--precision fp32] [--kv compute] [--batch 1 4 16] [--threads 1]

Every layer has a random router, its threshold set on random tokens, and a stand-in of rank 32: only speed is looked at. Tokens of a batch
choose by themselves; those that compute a layer are gathered across the batch. The sessions take turns; figures are CPU time of the
process (all threads), so that what else the machine does counts little.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dyncomp.backends.ort.decoder import decoder_for
from dyncomp.backends.ort.run import OrtModel
from dyncomp.passes import Quantize
from dyncomp.passes.depth_gates import insert_gates
from dyncomp.passes.depth_kv import POLICIES, keys_and_values
from dyncomp.passes.skip_depth import find_units

from dyncomp.deploy import lower_artifact
from dyncomp.graph import Graph
from dyncomp.models import load_model
from dyncomp.pipeline import Context
from dyncomp.regions import find_regions
from dyncomp.regions.tokens import vocabulary_size
from dyncomp.sweep import Sweep
from dyncomp.trace import trace_model

SHARES = (0.0, 0.25, 0.5)
_PROMPT, _STEPS, _RANK = 64, 16, 32


def skipping(dense: Graph, share: float, kv: str = "compute") -> tuple[Graph, float]:
    """The graph with a random router for each layer, which lets a ``share`` of all tokens skip it; and the share of other tokens that do.

    With ``kv=share`` the first layer is not skipped: it has no keys and values to share.
    """
    graph, generator = dense.copy(), torch.Generator().manual_seed(0)
    units, attentions = find_units(graph, "block")[0], find_regions(graph).attentions
    policies = [keys_and_values(graph, attentions, u.parts[0].attention, kv) for u in units if u.parts[0].attention is not None]
    gated = [insert_gates(graph, u, _RANK, p) for u, p in zip(units, policies, strict=True) if not isinstance(p, str)]
    ids = torch.randint(vocabulary_size(graph), (8, 96), generator=generator)
    sweep = Sweep(graph, [{"input_ids": ids[:4]}, {"input_ids": ids[4:]}])
    skipped = []
    for unit in gated:
        graph.add_tensor(unit.weight, torch.randn(graph.tensor(unit.weight).shape, generator=generator))
        graph.add_tensor(unit.bias, torch.zeros(1))
        scores, others = sweep.advance(unit.scores)
        threshold = torch.quantile(scores[:, 1:].flatten(), share) if share else scores.min() - 1e3
        graph.add_tensor(unit.bias, -threshold.reshape(1))
        sweep.provide(unit.scores, [scores - threshold, others - threshold])
        skipped.append(float((others[:, 1:] <= threshold).float().mean()))
    graph.clean()
    return graph, sum(skipped) / len(units)


def measure(
    dense: Graph, *, precision: str = "fp32", kv: str = "compute", batches: tuple[int, ...] = (1, 4, 16), threads: int = 1, rounds: int = 6
) -> Iterator[dict[str, Any]]:
    """For each batch size, the dense model and each of :data:`SHARES`: CPU milliseconds of a step, beside those of the dense model."""
    variants = {"dense": (dense.copy(), 0.0)} | {f"{share:.0%} skipped": skipping(dense, share, kv) for share in SHARES}
    with tempfile.TemporaryDirectory() as folder:
        models = {}
        for index, (name, (graph, _)) in enumerate(variants.items()):
            if precision != "fp32":
                Quantize(bits=int(precision.removeprefix("int"))).run(graph, Context())
            lower_artifact(graph, Path(folder) / str(index))
            models[name] = OrtModel(Path(folder) / str(index), threads=threads)
        random = np.random.default_rng(0)
        for batch in batches:
            decoders = {name: decoder_for(model) for name, model in models.items()}
            prompt = random.integers(0, vocabulary_size(dense), (batch, _PROMPT))
            for decoder in decoders.values():
                decoder.prefill(prompt, np.full(batch, _PROMPT), (rounds + 1) * _STEPS)
            spent: dict[str, list[float]] = {name: [] for name in decoders}
            for turn in range(rounds + 1):
                tokens = random.integers(0, vocabulary_size(dense), (_STEPS, batch))
                for name, decoder in decoders.items():
                    start = time.process_time()
                    for ids in tokens:
                        decoder.step(ids)
                    if turn:
                        spent[name].append((time.process_time() - start) / _STEPS * 1000)
            for name, times in spent.items():
                ms, whole = statistics.median(times), statistics.median(spent["dense"])
                yield {"batch": batch, "layers": name, "skipped": variants[name][1], "ms_per_step": ms, "x_dense": whole / ms}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "int8", "int4"))
    parser.add_argument("--kv", default="compute", choices=POLICIES)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    print(f"{given.model}, {given.precision}, kv={given.kv}, {given.threads} thread(s)")
    print("batch  layers        visits skipped  CPU ms a step  x dense")
    found = measure(trace_model(load_model(given.model)), precision=given.precision, kv=given.kv, batches=tuple(given.batch),
                    threads=given.threads)  # fmt: skip
    for row in found:
        print(f"{row['batch']:5}  {row['layers']:<12} {row['skipped']:15.0%} {row['ms_per_step']:14.2f} {row['x_dense']:8.2f}", flush=True)
