"""Measure what docs/quality.md shows, and write it. Never edit that file by hand.

    python -m bench.quality [--only TEXT …] [--minutes N] [--again] [--list]

Each row is one list of passes on one model; it is stored in docs/quality.json as soon as it is measured, and rows that are there
already are not measured again. Rows that are not there were not measured.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from dyncomp.passes.sparsify import active_share

from bench import rowwise
from bench.depth import computed_shares
from dyncomp.bundle import versions
from dyncomp.cache import cache_folder
from dyncomp.calibrate import calibrate
from dyncomp.evaluate import glimpse
from dyncomp.evidence import calibration_of, measure_quality
from dyncomp.examples import Prepared, prepare_examples, reader_of
from dyncomp.graph import Graph
from dyncomp.interpret import sparse_nodes
from dyncomp.models import LoadedModel, load_model
from dyncomp.pipeline import Context, Pipeline, parse_passes
from dyncomp.regions import find_regions
from dyncomp.regions.depth import kv_bytes
from dyncomp.report.tables import between
from dyncomp.rows import Rows, read_of
from dyncomp.sweep import release_memory
from dyncomp.trace import trace_model

TOKENS, WINDOWS = 40_960, 16
HEAL = "heal{steps=64 evaluations=4}"
"""Of SmolLM2: what two cores with bfloat16 do in about 30 CPU minutes (without, in an hour)."""
HEAL_EXPERTS = "heal{steps=72 evaluations=3 hidden=2}"
"""The same for experts."""


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    table: str
    model: str
    label: str
    passes: str

    @property
    def key(self) -> str:
        return f"{self.model}: {self.passes}"


def rows() -> list[Row]:
    """Every row there should be, the most telling first."""
    found = []
    for model, path, heal in (
        ("minilm", "rank=48 ridge=0.05", "heal{steps=100 batch=16 lr=0.0001}"), ("smollm2-135m", "rank=64", HEAL),
    ):  # fmt: skip
        for active in (0.75, 0.5, 0.25):
            where = f"{model}, {active:.0%} of the FFN neurons active"
            static = f"prune-static{{active={active:g}}}"
            found.append(Row(where, model, "static pruning", static))
            for experts in (16, 48, 96):
                routed = (
                    f"carve-experts{{experts={experts} shared={int(experts * active / 3)}}}, fit-router{{active={active:g}}}, refit-down"
                )
                found.append(Row(where, model, f"{experts} experts", routed))
                if experts == 48 and model == "smollm2-135m":
                    found.append(Row(where, model, "the same, healed", f"{routed}, {heal}"))
            if model == "smollm2-135m":
                by_kl = routed.replace("}, refit", " budgets=kl}, refit")
                found.append(Row(where, model, "96 experts, budgets by KL", by_kl))
                held = f"{routed}{{ridge=1}}"
                found.append(Row(where, model, "96 experts, held to the weights", held))
                found.append(Row(where, model, "the same, healed", f"{held}, {HEAL_EXPERTS}"))
            routed += f"{{{path}}}"
            found.append(Row(where, model, "96 experts, linear path", routed))
            found.append(Row(where, model, "the same, healed", f"{routed}, {heal}"))
            found.append(Row(where, model, "static pruning, healed", f"{static}, {heal}"))
    model = "smollm2-135m"
    for active in (0.75, 0.5):
        for where in ("ffn", "all"):
            table = f"{model}, {active:.0%} of the inputs of {'FFN layers' if where == 'ffn' else 'all linear layers'}"
            kinds = (
                ("TEAL", " budgets=uniform"), ("WINA", " score=wina budgets=uniform"), ("TEAL, greedy by block", " budgets=block"),
                ("WINA, greedy by block", " score=wina budgets=block"), ("Fisher, one limit", " score=fisher budgets=global"),
            )  # fmt: skip
            for label, options in kinds:
                found.append(Row(table, model, label, f"sparsify{{active={active:g} where={where}{options}}}"))
    for share, of, skipping, dropping, heal in (
        ("12.5%", "block", "active=0.875", "count=4", "heal{steps=32 evaluations=2}"),
        ("25%", "attention", "what=attention active=0.75", "what=attention count=8", HEAL),
    ):
        table = f"{model}, {share} of the {of} visits skipped"
        found.append(Row(table, model, "skip-depth", f"skip-depth{{{skipping}}}"))
        found.append(Row(table, model, "the same, healed", f"skip-depth{{{skipping}}}, {heal}"))
        if of == "attention":
            for policy, label in (("share", "keys and values shared"), ("absent", "absent for other tokens")):
                found.append(Row(table, model, label, f"skip-depth{{{skipping} kv={policy}}}"))
        found.append(Row(table, model, f"{of}s dropped", f"drop-depth{{{dropping}}}"))
        found.append(Row(table, model, f"{of}s dropped, with stand-ins", f"drop-depth{{{dropping} standin=linear}}"))
        found.append(Row(table, model, "the same, healed", f"drop-depth{{{dropping} standin=linear}}, {heal}"))
    for block in (32, 64):
        table, tail = f"{model}, symmetric 4-bit weights in blocks of {block}", f"bits=4 block={block}"
        for label, first, method in (
            ("rounded", "", ""), ("GPTQ", "", " method=gptq"),
            ("AWQ, rounded", f"awq{{{tail}}}, ", ""), ("AWQ, GPTQ", f"awq{{{tail}}}, ", " method=gptq"),
        ):  # fmt: skip
            found.append(Row(table, model, label, f"{first}quantize{{{tail}{method}}}"))
    for bits, body in (("8", "bits=8"), ("4", "bits=4 symmetric=false")):
        table = f"{model}, weights in {bits} bits, the vocabulary head"
        found.append(Row(table, model, "in 8 bits", f"quantize{{{body}}}"))
        found += [Row(table, model, f"screened, {nats} nats", f"quantize{{{body} screen={nats}}}") for nats in (12, 10)]
        if bits == "4":
            found.append(Row(table, model, "in 4 bits", f"quantize{{{body} head-bits=4}}"))
    for active in (0.75, 0.5):
        where = f"{model}, 48 experts, {active:.0%} active, by router"
        carve = "carve-experts{experts=48 shared=12}"
        for router in ("ridge", "neuron", "mlp", "spectral", "mean-gate", "representative"):
            option = "" if router == "ridge" else f" router={router}"
            found.append(Row(where, model, router, f"{carve}, fit-router{{active={active:g}{option}}}, refit-down"))
        for gates in ("relative", "topk"):
            found.append(Row(where, model, f"ridge, {gates}", f"{carve}, fit-router{{active={active:g} gates={gates}}}, refit-down"))
        for router in ("ridge", "neuron"):
            option = "" if router == "ridge" else " router=neuron"
            spec = f"{carve}, fit-router{{active={active:g}{option} budgets=kl}}, refit-down"
            found.append(Row(where, model, f"{router}, budgets by KL", spec))
        for cluster in ("weights", "random"):
            other = f"carve-experts{{experts=48 shared=12 cluster={cluster}}}"
            found.append(Row(f"{model}, {active:.0%} active, by construction", model, f"experts by {cluster}",
                             f"{other}, fit-router{{active={active:g}}}, refit-down"))  # fmt: skip
    return found


def main() -> None:
    rowwise.main(__doc__, "quality.json", {r.key: r for r in rows()}, _Bench().measure, markdown)


class _Bench:
    """Measures rows; keeps the model of the last."""

    def __init__(self) -> None:
        self.model: tuple[LoadedModel, Graph, Prepared, Context] | None = None
        self.fitted: tuple[str, Graph, dict[str, float]] | None = None

    def measure(self, row: Row) -> dict[str, Any]:
        loaded, dense, texts, ctx = self._open(row.model)
        graph, spent = self._converted(row, dense, ctx)
        quality = measure_quality({"dense": dense, "converted": graph}, texts.evaluation, loaded.task)
        for figures in quality.values():
            for name in ("load_by_region", "active_by_region", "spread_by_region"):
                figures.pop(name, None)
        release_memory()
        more: dict[str, Any] = {"active_inputs": active_share(graph)} if sparse_nodes(graph) else {}
        if row.table.endswith(_SKIPPED):
            more["kv_bytes"] = _kv_bytes(graph, texts.evaluation["held out"].rows)
        return {"task": loaded.task, "tokens": TOKENS, "quality": quality, "versions": versions()} | more | spent

    def _converted(self, row: Row, dense: Graph, ctx: Context) -> tuple[Graph, dict[str, float]]:
        """The converted graph and what its passes took; what is healed next is kept, for it is the row before and takes as long to make."""
        before, healing, tail = row.passes.partition(", heal{")
        key = f"{row.model}: {before}"
        if self.fitted is None or self.fitted[0] != key:
            graph = dense.copy()
            self.fitted = (key, graph, _timed(before, graph, ctx))
        _, graph, spent = self.fitted
        graph = graph.copy()
        if healing:
            healed = _timed(f"heal{{{tail}", graph, ctx)
            spent = {name: spent[name] + healed[name] for name in spent}
        return graph, spent

    def _open(self, name: str) -> tuple[LoadedModel, Graph, Prepared, Context]:
        if self.model is None or self.model[0].name != name:
            self.model = self.fitted = None
            release_memory()
            loaded = load_model(name)
            dense = trace_model(loaded)
            texts = prepare_examples(reader_of(loaded, dense), None, "news", tokens=TOKENS, count=WINDOWS, seed=0, training=True)
            calibration = calibration_of(loaded, dense, texts.calibration)
            calibrate(dense, find_regions(dense).ffns, calibration, cache=cache_folder() / f"bench-quality-{name}.safetensors")
            self.model = loaded, dense, texts, Context(calibration, glimpse(dense, texts.calibration), dense=dense, text=texts.training)
        return self.model


def _timed(passes: str, graph: Graph, ctx: Context) -> dict[str, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    Pipeline(parse_passes(passes)).run(graph, ctx)
    return {"cpu_seconds": time.process_time() - cpu, "seconds": time.perf_counter() - wall}


_SKIPPED = "visits skipped"


def _kv_bytes(graph: Graph, rows: Rows) -> float:
    """Of keys and values a token of this text: those that are kept."""
    size = kv_bytes(graph, computed_shares(graph, read_of(rows)))
    return size.held if size is not None else sum(a.cache_bytes for a in find_regions(graph).attentions)


def markdown(results: dict[str, Any]) -> str:
    """The tables, of the rows that were measured."""
    lines = [
        "# Quality",
        "",
        f"Written by `python -m bench.quality`; do not edit. Training-free but for what is called healed. Calibrated on {TOKENS} tokens,",
        f"measured on {WINDOWS} windows of held-out documents of the same source and of another source, beside the dense fp32 model on the",
        "same windows; in brackets 95 % intervals, by bootstrap over windows, paired with the dense model. *Active* is the share of FFN",
        "neurons that ran on the held-out text, or of inputs of linear layers that counted in calibration; *skipped* is of visits there,",
        "beside the bytes of keys and values kept for a token. CPU minutes are those of the passes, without the statistics of the",
        "dense model, which all rows share.",
        "",
        "A row that the command knows and that is not here was not measured yet (`python -m bench.quality --list`).",
    ]
    known = rows()
    for title in dict.fromkeys(r.table for r in known):
        measured = [(r, results["rows"][r.key]) for r in known if r.table == title and r.key in results["rows"]]
        if not measured:
            continue
        causal = measured[0][1]["task"] == "causal-lm"
        what = "perplexity" if causal else "cosine to dense"
        depth = title.endswith(_SKIPPED)
        more = "KL, nats" if causal else "same neighbours"
        lines += [
            "",
            f"## {title}",
            "",
            f"| | passes | {'skipped; KV bytes' if depth else 'active'} | {what}, held out | {what}, other source | {more} | CPU minutes |",
            "|---|---|---|---|---|---|---|",
        ]
        for row, entry in measured:
            texts = entry["quality"]
            first = texts["held out"]
            share = first.get("active_ffn", entry.get("active_inputs"))
            active = ("all that remain" if "prune" in row.passes else "all") if share is None else f"{share:.1%}"
            if depth:
                facts = ((first.get("skipped"), "{:.1%}"), (entry.get("kv_bytes"), "{:.0f}"))
                active = "; ".join(form.format(value) for value, form in facts if value is not None)
            extra = f"{first['kl']['converted']:.3f}" if causal else f"{first['retrieval']['converted']:.1%}"
            cells = [row.label, f"`{row.passes}`", active, *(_cell(texts[t], causal) for t in ("held out", "other source"))]
            lines.append("| " + " | ".join([*cells, extra, f"{entry['cpu_seconds'] / 60:.1f}"]) + " |")
    return "\n".join(lines) + "\n"


def _cell(figures: dict[str, Any], causal: bool) -> str:
    name = "increase" if causal else "cosine"
    ends = figures["intervals"].get(name, {}).get("converted")
    if causal:
        return f"{figures['increase']['converted']:+.1%}{between(ends, '+.1%')}"
    return f"{figures['cosine']['converted']:.4f}{between(ends, '.4f')}"


if __name__ == "__main__":
    main()
