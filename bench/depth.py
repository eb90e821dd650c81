"""Time, memory and quality of tokens that skip layers, beside dense: docs/depth.md. Never edit that file by hand.

    python -m bench.depth [--model smollm2-135m] [--precision fp32 int8] [--kv compute] [--batch 1 4 16] [--prompt 512]
                          [--threads 1] [--rank R]
    python -m bench.depth --bundle OUT      the routers of a converted model, on packaged text
    python -m bench.depth --list            the rows there are

Without a bundle every layer has a random router, its threshold set on random tokens, and a stand-in of the usual rank: only speed is
looked at. Tokens of a batch choose by themselves; those that compute a layer are gathered across the batch. In each round all sessions
take their turn, and a round's ratio is that of its own times: what else the machine does slows neighbours alike.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dyncomp.backends.ort.decoder import decoder_for
from dyncomp.backends.ort.run import OrtModel
from dyncomp.passes import Quantize
from dyncomp.passes.depth_gates import insert_gates
from dyncomp.passes.depth_kv import POLICIES, keys_and_values
from dyncomp.passes.skip_depth import find_units, usual_rank

from bench import rowwise
from bench.branches import branch_times, packing_times
from dyncomp.bundle import open_bundle
from dyncomp.deploy import lower_artifact
from dyncomp.evidence import quantization_of
from dyncomp.examples import reader_of
from dyncomp.graph import Graph
from dyncomp.hardware import detect
from dyncomp.models import load_model
from dyncomp.pipeline import Context, parse_passes
from dyncomp.regions import find_regions
from dyncomp.regions.depth import find_skips, kv_bytes, skipped_share
from dyncomp.regions.tokens import vocabulary_size
from dyncomp.rows import read_of
from dyncomp.sweep import Sweep
from dyncomp.trace import trace_model

SHARES = (0.0, 0.25, 0.5)
_CONTEXT, _STEPS = 64, 16
Results = dict[str, Any]


def skipping(dense: Graph, share: float, kv: str, rank: int) -> tuple[Graph, float]:
    """The graph with a random router for each layer, which lets a ``share`` of all tokens skip it; and the share of other tokens that do.

    With ``kv=share`` the first layer is not skipped: it has no keys and values to share.
    """
    graph, generator = dense.copy(), torch.Generator().manual_seed(0)
    units, attentions = find_units(graph, "block")[0], find_regions(graph).attentions
    policies = [keys_and_values(graph, attentions, u.parts[0].attention, kv) for u in units if u.parts[0].attention is not None]
    gated = [insert_gates(graph, u, rank, p) for u, p in zip(units, policies, strict=True) if not isinstance(p, str)]
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


def graphs(dense: Graph, precision: str, kv: str, rank: int) -> tuple[dict[str, Graph], dict[str, float]]:
    """The dense model and each of :data:`SHARES`, in that precision; and the share of the layer visits that each skips."""
    variants = {"dense": (dense.copy(), 0.0)} | {f"{share:.0%} skipped": skipping(dense, share, kv, rank) for share in SHARES}
    for graph, _ in variants.values():
        if precision != "fp32":
            Quantize(bits=int(precision.removeprefix("int"))).run(graph, Context())
    return {name: graph for name, (graph, _) in variants.items()}, {name: share for name, (_, share) in variants.items()}


def speed(models: dict[str, OrtModel], tokens: np.ndarray, *, batches: Sequence[int], prompt: int, rounds: int = 9) -> Iterator[Results]:
    """Decode steps at each batch size, after a context of :data:`_CONTEXT`, and a prompt in one go; see :func:`_compared`.

    Args:
        tokens: [n] of the text that is read and, a step after the other, written.
        prompt: tokens of the prompt; 0 for none.
    """
    rows = lambda count, length: np.resize(tokens, (count, length))  # noqa: E731
    if prompt:
        ids, lengths = rows(1, prompt), np.array([prompt])
        runs = {name: partial(_prefill, decoder_for(model), ids, lengths) for name, model in models.items()}
        yield {"what": "prefill", "tokens": prompt, "batch": 1, "models": _compared(runs, rounds)}
    for batch in batches:
        decoders = {name: decoder_for(model) for name, model in models.items()}
        for decoder in decoders.values():
            decoder.prefill(rows(batch, _CONTEXT), np.full(batch, _CONTEXT), (rounds + 1) * _STEPS)
        parts = iter(np.split(rows(batch, (rounds + 1) * _STEPS), rounds + 1, axis=1))
        runs = {name: partial(_write, decoder) for name, decoder in decoders.items()}
        yield {"what": "decode", "tokens": 1, "batch": batch, "models": _compared(runs, rounds, parts, _STEPS)}


def _prefill(decoder: Any, ids: np.ndarray, lengths: np.ndarray) -> None:
    decoder.prefill(ids, lengths, 0)


def _write(decoder: Any, part: np.ndarray) -> None:
    for ids in part.T:
        decoder.step(ids)


def _compared(
    runs: Mapping[str, Callable[..., None]], rounds: int, given: Iterator[Any] | None = None, steps: int = 1
) -> dict[str, Results]:
    """Median milliseconds of a step, of the clock and of the processor, and how many times as fast as dense: the median and the quartiles
    of the rounds' ratios."""
    clock: dict[str, list[float]] = {name: [] for name in runs}
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        arguments = () if given is None else (next(given),)
        for name, run in runs.items():
            before, start = time.process_time(), time.perf_counter()
            run(*arguments)
            if turn:
                clock[name].append((time.perf_counter() - start) / steps * 1000)
                spent[name].append((time.process_time() - before) / steps * 1000)
    found = {}
    for name in runs:
        ratios = {
            kind: [d / t for d, t in zip(times["dense"], times[name], strict=True)] for kind, times in (("clock", clock), ("cpu", spent))
        }
        low, x, high = statistics.quantiles(ratios["clock"], n=4)
        found[name] = {
            "ms": statistics.median(clock[name]), "cpu_ms": statistics.median(spent[name]), "x_dense": x, "x_dense_quartiles": [low, high],
            "x_dense_cpu": statistics.median(ratios["cpu"]),
        }  # fmt: skip
    return found


def measure(
    dense: Graph, *, precision: str = "fp32", kv: str = "compute", batches: Sequence[int] = (1, 4, 16), prompt: int = 512, threads: int = 1,
    rounds: int = 9, rank: int = 0,
) -> Results:  # fmt: skip
    """Random routers: what a step takes, and what an ``If`` with all that belongs to it costs when every gate is open."""
    rank = rank or usual_rank(find_units(dense, "block")[0])
    variants, skipped = graphs(dense, precision, kv, rank)
    tokens = np.random.default_rng(0).integers(0, vocabulary_size(dense), 4096)
    found = _measured(variants, tokens, threads=threads, batches=batches, prompt=prompt, rounds=rounds)
    return found | {"skipped": skipped, "rank": rank}


def _measured(variants: dict[str, Graph], tokens: np.ndarray, *, threads: int, **settings: Any) -> Results:
    with tempfile.TemporaryDirectory() as folder:
        models, branches = {}, {}
        for index, (name, graph) in enumerate(variants.items()):
            lower_artifact(graph, Path(folder) / str(index))
            models[name] = OrtModel(Path(folder) / str(index), threads=threads)
            branches[name] = models[name].config["operators"].get("If", 0)
        steps = list(speed(models, tokens, **settings))
        held = {name: memory(model, tokens) for name, model in models.items()}
    return {"machine": vars(detect()), "steps": steps, "ifs": branches, "open_us_per_if": _open_cost(steps, branches), "cache_bytes": held}


def memory(model: OrtModel, tokens: np.ndarray) -> float:
    """Bytes of memory that the caches take for a token, after as many as the model's context holds: pages that are there."""
    decoder: Any = decoder_for(model)
    length = min(int(decoder.context_length), len(tokens))
    decoder.prefill(tokens[None, :length], np.array([length]), 0)
    return sum(resident_bytes(cache) for cache in decoder._caches) / length


def resident_bytes(array: np.ndarray) -> int:
    """Of the pages that an array lies in, those that are in memory, by ``mincore``.

    Raises:
        OSError: the system does not tell.
    """
    first = array.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
    length = array.ctypes.data + array.nbytes - first
    pages = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mincore(ctypes.c_void_p(first), ctypes.c_size_t(length), pages):
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


def _open_cost(steps: list[Results], branches: dict[str, int]) -> dict[str, float]:
    """CPU microseconds of a decode step above the dense one's, over the number of ``If``: batch -> that."""
    name = "0% skipped"
    if not branches.get(name):
        return {}
    return {
        str(step["batch"]): (step["models"][name]["cpu_ms"] - step["models"]["dense"]["cpu_ms"]) * 1000 / branches[name]
        for step in steps if step["what"] == "decode"
    }  # fmt: skip


# ---- routers that were fitted ----------------------------------------------------------------------------------------
def measure_bundle(path: str, *, batches: Sequence[int], prompt: int, threads: int, rounds: int = 9) -> Results:
    """The routers of a converted model on packaged text: how much they skip there, the time, and the bytes of keys and values."""
    opened = open_bundle(path)
    loaded, converted = opened.dense(), opened.graph()
    dense = trace_model(loaded)
    for item in quantization_of(parse_passes(", ".join(entry.spec for entry in opened.manifest.passes))):
        item.run(dense, Context())
    reader = reader_of(loaded, dense)
    ids = read_of(reader.draw(reader.load(reader.other), count=8, seed=0).rows)
    computed = computed_shares(converted, ids)
    found = _measured({"dense": dense, "fitted": converted}, ids.flatten().numpy(), threads=threads, batches=batches, prompt=prompt,
                      rounds=rounds)  # fmt: skip
    return found | {
        "passes": [entry.spec for entry in opened.manifest.passes], "skipped": {"fitted": skipped_share(converted, computed)},
        "kv_bytes_per_token": bytes_by_policy(converted, computed),
    }  # fmt: skip


def computed_shares(graph: Graph, ids: torch.Tensor) -> dict[str, float]:
    """Fraction of the tokens ids [n, S] whose gate is open, by name of the gates."""
    seen: dict[str, list[torch.Tensor]] = {skip.name: [] for skip in find_skips(graph)}
    watch = {s.gates: (lambda _, value, name=s.name: seen[name].append(value != 0)) for s in find_skips(graph)}
    Sweep(graph, [{graph.inputs[0].name: part} for part in ids.split(4)]).advance(graph.output_nodes[0], watch=watch)
    return {name: float(torch.cat(values).float().mean()) for name, values in seen.items()}


def bytes_by_policy(graph: Graph, computed: dict[str, float]) -> Results:
    """Bytes of a token's keys and values under each policy, these gates taken for all; the first attention of the model has none to share
    with and stays as it is."""
    first = find_regions(graph).attentions[0].path
    found: Results = {}
    for policy in POLICIES:
        work = graph.copy()
        work.info["depth"] = {
            name: {**facts, **({"kv": "compute" if policy == "share" and name == first else policy} if "kv" in facts else {})}
            for name, facts in graph.info["depth"].items()
        }
        size = kv_bytes(work, computed)
        if size is not None:
            found |= {"dense": size.dense, policy: size.held}
    return found


# ---- the document ----------------------------------------------------------------------------------------------------
def markdown(results: Results) -> str:
    """docs/depth.md."""
    rows = results["rows"]
    lines = [
        "# Tokens that skip layers: time and memory", "",
        "Written by `python -m bench.depth`; do not edit. ONNX Runtime, on a machine that others used as well: trust the ratios, which",
        "are of neighbouring runs (median over rounds, quartiles in brackets), not the milliseconds. *CPU* is the same ratio in time of",
        "the processor. With random routers each layer's gate is open for all, 75 % or 50 % of the tokens, whatever they are; *skipped*",
        "is what was skipped of all visits to layers.",
    ]  # fmt: skip
    for key, row in rows.items():
        if "steps" in row:
            lines += ["", f"## {key}", "", *_speed_lines(row)]
    if (row := rows.get("branches")) is not None:
        lines += ["", "## What a branch costs", "", *_branch_lines(row)]
    if (row := rows.get("training from scratch")) is not None:
        lines += ["", "## Trained from scratch", "", f"`{row['command']}`:", "", "```", *row["printed"], "```"]
    return "\n".join(lines) + "\n"


def _speed_lines(row: Results) -> list[str]:
    lines = ["| | batch | layers | skipped | ms | x dense, clock | x dense, CPU |", "|---|---|---|---|---|---|---|"]
    for step in row["steps"]:
        what = f"prefill of {step['tokens']}" if step["what"] == "prefill" else "decode, a step"
        for name, times in step["models"].items():
            low, high = times["x_dense_quartiles"]
            ratios = ["", ""] if name == "dense" else [f"{times['x_dense']:.2f} [{low:.2f}, {high:.2f}]", f"{times['x_dense_cpu']:.2f}"]
            share = f"{row['skipped'].get(name, 0.0):.0%}"
            lines.append(f"| {what} | {step['batch']} | {name} | {share} | {times['ms']:.2f} | {ratios[0]} | {ratios[1]} |")
    if row["open_us_per_if"]:
        costs = ", ".join(f"{us:.1f} us at batch {batch}" for batch, us in row["open_us_per_if"].items())
        count = row["ifs"]["0% skipped"]
        lines += ["", f"`If` in the graph: {count}. With every gate open a step takes, for each, {costs} of CPU time more than dense:",
                  "the branch, its gathering and scattering, and its part of router and stand-in."]  # fmt: skip
    if "rank" in row:
        lines += ["", f"Stand-ins of rank {row['rank']}."]
    if "passes" in row:
        lines += ["", f"Passes: `{', '.join(row['passes'])}`."]
    if held := row.get("cache_bytes"):
        shown = ", ".join(f"{name} {count:.0f}" for name, count in held.items())
        lines += ["", f"Memory of the caches when the context is full, bytes a token (pages that are there): {shown}."]
    if sizes := row.get("kv_bytes_per_token"):
        shown = ", ".join(f"`kv={policy}` {sizes[policy]:.0f}" for policy in POLICIES if policy in sizes)
        lines += ["", f"Bytes of keys and values that are kept for a token, were these gates under each policy: {shown}."]
    return lines


def _branch_lines(row: Results) -> list[str]:
    times, products = row["times"], row["products"]
    return [
        f"An `If` that is taken adds {times['taken_us']:.1f} us, one that is not takes {times['not_taken_us']:.1f} us (64 in a row around",
        f"an operator of {times['operator_us']:.1f} us; {row['threads']} thread).", "",
        "Weights in a branch are packed when the session is made, like those outside: a product [16, 576] @ [576, 1536] takes",
        f"{products['inside, packed']:.0f} us inside and {products['outside, packed']:.0f} us outside, and with prepacking turned off",
        f"{products['inside, not packed']:.0f} and {products['outside, not packed']:.0f} us.",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--precision", nargs="+", default=["fp32", "int8"], choices=("fp32", "int8", "int4"))
    parser.add_argument("--kv", nargs="+", default=["compute"], choices=POLICIES)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt; 0 leaves prefill out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rank", type=int, default=0, help="of the stand-ins, in place of the usual one")
    parser.add_argument("--bundle", help="a converted model, instead of random routers")
    parser.add_argument("--training", type=Path, help="keep what examples/train_mod.py printed into this file")
    given, _ = parser.parse_known_args()
    torch.set_num_threads(given.threads)
    settings: Results = {"batches": given.batch, "prompt": given.prompt, "threads": given.threads}
    rows: dict[str, Callable[[], Results]] = {}
    ranked = f", stand-ins of rank {given.rank}" if given.rank else ""
    threads = f"{given.threads} thread{'s' if given.threads > 1 else ''}"
    if given.bundle:
        rows[f"{Path(given.bundle).name}, fitted routers, {threads}"] = lambda: measure_bundle(given.bundle, **settings)
    elif given.training:
        rows["training from scratch"] = lambda: printed(given.training)
    else:
        for precision in given.precision:
            for kv in given.kv:
                rows[f"{given.model}, {precision}, kv={kv}, random routers, {threads}{ranked}"] = partial(
                    _random, given.model, precision=precision, kv=kv, rank=given.rank, **settings
                )
        rows["branches"] = lambda: {
            "times": branch_times(given.threads), "products": packing_times(given.threads), "threads": given.threads,
        }  # fmt: skip
    rowwise.main(f"{__doc__}", "depth.json", rows, lambda row: row(), markdown, parents=[parser])


def _random(model: str, **settings: Any) -> Results:
    return measure(trace_model(load_model(model)), **settings)


def printed(file: Path) -> Results:
    """What ``examples/train_mod.py`` printed, without its progress."""
    lines = [line for line in file.read_text().splitlines() if line.strip() and not line.startswith("  step")]
    return {"command": "python examples/train_mod.py", "printed": lines}


if __name__ == "__main__":
    main()
