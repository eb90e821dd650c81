"""What a conversion must show: quality beside the dense model and beside static pruning, on text it was not fitted to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from dyncomp.bundle import Bundle
from dyncomp.calibrate import Calibration, fingerprint
from dyncomp.cost import count, flops_unit
from dyncomp.errors import RequestError
from dyncomp.evaluate import Quality, batches, evaluate, load_summary
from dyncomp.examples import Examples, example_tokens, prepare_examples, reader_of
from dyncomp.graph import Graph
from dyncomp.interpret import sparse_nodes
from dyncomp.models import LoadedModel
from dyncomp.passes import DropDepth, Heal, PruneStatic
from dyncomp.passes.quantize import quantization_of
from dyncomp.pipeline import Context, Pass, Pipeline, Progress, no_progress, parse_passes
from dyncomp.regions import RoutedFFN, find_regions, find_routed
from dyncomp.regions.depth import skipped_share
from dyncomp.rows import Rows
from dyncomp.tasks import load_task, run_task
from dyncomp.trace import trace_model
from dyncomp.transcribe import compare_transcripts

BASELINE_TOKENS = 16_384
"""Calibration tokens of the baselines that ``evaluate`` makes."""


def baselines(dense: Graph, converted: Graph, quantize: Sequence[Pass], ctx: Context, *, heal: Heal | None = None) -> dict[str, Graph]:
    """What needs no choice for each token, in the converted model's precision: the dense model quantized, and pruned statically at equal
    cost of its FFNs.

    Args:
        quantize: the passes that quantized it; none when it is in float.
        heal: as the converted model was healed; the pruned one is too, with as many steps on the same text.
    """
    found = {}
    regions, skips = find_regions(converted), bool(converted.info.get("depth"))
    if quantize and (any(not r.trained for r in regions.routed) or skips or sparse_nodes(converted)):
        found["quantized"] = dense.copy()
        Pipeline(quantize).run(found["quantized"], ctx)
    if find_parts(converted) or regions.sparse_ffns:
        found["static_pruned"] = static_baseline(dense, converted, quantize, ctx, heal=heal)
    if skips:
        found["layers_dropped"] = depth_baseline(dense, converted, quantize, ctx, heal=heal)
    return found


def find_experts(graph: Graph) -> list[RoutedFFN]:
    """The routed FFNs, without those that stand in for what tokens skip."""
    return [r for r in find_routed(graph) if not graph.info.get("routing", {}).get(r.name, {}).get("standin")]


def find_parts(graph: Graph) -> list[RoutedFFN]:
    """Of these, the ones whose experts are parts of a dense FFN, not copies of it, nor trained: static pruning can cost the same."""
    return [r for r in find_experts(graph) if not r.trained and not graph.info.get("routing", {}).get(r.name, {}).get("copies")]


def depth_baseline(dense: Graph, converted: Graph, quantize: Sequence[Pass], ctx: Context, *, heal: Heal | None = None) -> Graph:
    """The dense model without as many attentions, FFNs or layers, for every token alike, as tokens of the converted one skip on average;
    with stand-ins if that has them."""
    skips = list(converted.info["depth"].values())
    drop = DropDepth(what=skips[0]["what"], count=round(sum(s["skipped"] * s.get("units", 1) for s in skips)))
    if rank := skips[0].get("rank"):
        drop = dataclasses.replace(drop, standin="linear", rank=rank)
    dropped = dense.copy()
    Pipeline([drop, *([] if heal is None else [heal]), *quantize]).run(dropped, ctx)
    return dropped


def static_baseline(dense: Graph, converted: Graph, quantize: Sequence[Pass], ctx: Context, *, heal: Heal | None = None) -> Graph:
    """The dense model with as many FFN neurons removed, for every token alike, as the converted one leaves out, or as correspond to the
    weights it does not read, on average."""
    changed = {r.name for r in find_parts(converted)} | {f.name for f in find_regions(converted).sparse_ffns}
    ffns, active = find_regions(dense).ffns, calibrated_share(converted)
    kept_dense = tuple(i for i, f in enumerate(ffns) if f.name not in changed)
    if active * sum(f.d_ff for f in ffns) <= sum(ffns[i].d_ff for i in kept_dense):  # all that changed is skipped by all tokens
        kept_dense = ()
    static = dense.copy()
    prune = PruneStatic(active=active, keep_dense=kept_dense)
    Pipeline([prune, *([] if heal is None else [heal]), *quantize]).run(static, ctx)
    return static


def calibrated_share(graph: Graph) -> float:
    """Active fraction over all FFN neurons (of a sparsified FFN: of its weights) that routers and thresholds were calibrated to."""
    regions, experts = find_regions(graph), find_parts(graph)
    facts, inputs = graph.info.get("routing", {}), graph.info.get("active_inputs", {})
    active = float(sum(f.d_ff for f in regions.ffns))
    active += sum(r.d_ff * (facts.get(r.name, {}).get("active", 1.0) + path_share(graph, r)) for r in experts)
    for ffn in regions.sparse_ffns:
        sizes = {linear.weight: linear.in_features * linear.out_features for linear in (*ffn.ups, ffn.down)}
        active += ffn.d_ff * sum(inputs.get(name, 1.0) * size for name, size in sizes.items()) / sum(sizes.values())
    return active / sum([f.d_ff for f in (*regions.ffns, *regions.sparse_ffns)] + [r.d_ff for r in experts])


def path_share(graph: Graph, routed: RoutedFFN) -> float:
    """Weights of the linear path beside the experts, over those of all experts."""
    if routed.path is None:
        return 0.0
    return sum(graph.tensor(name).numel() for name in (routed.path.down, routed.path.up)) / routed.expert_parameters


def measure_quality(
    models: dict[str, Graph], collections: Mapping[str, Examples], task: str, progress: Progress = no_progress, *,
    loaded: LoadedModel | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Every model on the examples of every collection: its name -> figures, under the report's keys.

    ``intervals`` holds figure -> model -> [low, high] at 95 %, by bootstrap over windows, images or recordings (``retrieval``: over
    passages).
    """
    figures = {}
    for name, examples in collections.items():

        def tick(_: str, done: int, total: int, name: str = name) -> None:
            progress(f"evaluate {name}", done, total)

        quality = evaluate(models, examples, task=task, progress=tick)
        if examples.said and loaded is not None:
            compare_transcripts(quality, models, examples, loaded, progress=tick)
        figures[name] = quality_figures(quality, models["converted"])
    return figures


def evaluate_bundle(
    opened: Bundle,
    sources: Sequence[str] = (),
    *,
    count: int | None = None,
    tasks: Sequence[str] = (),
    items: int = 200,
    plain: bool = False,
    seed: int = 0,
    progress: Progress = no_progress,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Quality of a bundle and of its dense model on the same examples of each source, and on the same questions of each task.

    Args:
        sources: packaged or the user's; without any, the packaged one that calibration does not use.
        count: examples of each.
        tasks: as :func:`dyncomp.tasks.load_task` takes them, at most ``items`` questions of each.
        plain: also of the dense model quantized alike and of static pruning at equal cost, both made here on what is packaged.

    Returns:
        (source -> figures, task -> figures).
    """
    loaded = opened.dense()
    dense = trace_model(loaded)
    reader = reader_of(loaded, dense)
    if tasks and loaded.task != "causal-lm":
        raise RequestError(f"{loaded.name} does not predict text: --task needs a model that does")
    questions = [load_task(name, count=items, seed=seed) for name in tasks]
    count = reader.count if count is None else count
    examples = {source: reader.draw(reader.load(source), count=count, seed=seed) for source in sources or (reader.other,)}
    models = {"dense": dense, "converted": opened.graph()}
    if plain:
        fitted = calibration_of(loaded, dense, prepare_examples(reader, None, None, tokens=BASELINE_TOKENS, count=1, seed=seed).calibration)
        ctx = Context(fitted, progress=progress, seed=seed, dense=dense)
        passes = parse_passes(", ".join(entry.spec for entry in opened.manifest.passes))
        models |= baselines(models["dense"], models["converted"], quantization_of(passes), ctx)
    answers = {t.name: run_task(models, t, loaded.tokenizer, length=reader.tokens, progress=progress) for t in questions}
    return measure_quality(models, examples, loaded.task, progress, loaded=loaded), answers


def calibration_of(loaded: LoadedModel, dense: Graph, rows: Rows) -> Calibration:
    """Rows of the main input as what passes are fitted to."""
    data = batches(dense, rows)
    return Calibration(data, fingerprint(loaded.fingerprint, data), example_tokens=example_tokens(dense))


def quality_figures(quality: Quality, converted: Graph) -> dict[str, Any]:
    """The figures of one evaluation under the report's keys."""
    figures: dict[str, Any] = {"windows": quality.windows, "window_tokens": quality.window_tokens}
    if quality.nll:
        figures["perplexity"] = {name: quality.perplexity(name) for name in quality.nll} | {
            "windows": quality.windows, "window_tokens": quality.window_tokens}  # fmt: skip
        figures["increase"] = {name: quality.increase(name) for name in quality.nll if name != "dense"}
        figures["kl"], figures["agreement"] = quality.kl, quality.agreement
    if quality.cosine:
        figures["cosine"] = quality.cosine
        figures["retrieval"] = quality.retrieval
    if quality.probe:
        figures["probe"], figures["probe_dense"] = quality.probe, quality.probe_dense
    if quality.wer:
        figures["wer"] = quality.wer
    figures["intervals"] = quality.intervals()
    loads = quality.load.get("converted", {})
    computed = quality.computed.get("converted", {})
    active = {name: use.active for name, use in loads.items()} | computed
    if computed:
        figures["skipped"] = skipped_share(converted, computed)
        figures["skipped_by_gate"] = {name: round(1 - share, 4) for name, share in computed.items()}
    if active:
        figures["active_by_region"] = active
    experts = {r.name: r for r in find_experts(converted)}
    loads = {name: use for name, use in loads.items() if name in experts}
    if loads:
        widths = {name: r.d_ff for name, r in experts.items()}
        dense_width = sum(f.d_ff for f in find_regions(converted).ffns)
        figures["active_ffn"] = quality.active_ffn("converted", widths, dense_width)
        if among := [use for use in loads.values() if len(use.load) > 1]:  # a layer that tokens skip has one expert: "skipped" says it all
            figures["load"] = load_summary(among)
        figures["load_by_region"] = {name: [round(v, 4) for v in use.load.tolist()] for name, use in loads.items()}
        figures["spread_by_region"] = {name: round(use.spread, 4) for name, use in loads.items()}
    return figures


def cost_figures(dense: Graph, converted: Graph, quality: dict[str, Any]) -> dict[str, Any]:
    """Parameters and FLOPs per token of both, the experts counted as they were active on the first text, inputs as in calibration."""
    sparse = {str(n.args[1].target) for n in sparse_nodes(converted)}  # type: ignore[union-attr]
    active = {name: share for name, share in converted.info.get("active_inputs", {}).items() if name in sparse}
    active |= next(iter(quality.values())).get("active_by_region") or {}
    cost, before = count(converted, active=active), count(dense)
    keys = ("parameters", "active_parameters", "flops_per_token")
    counts = {k: getattr(cost, k) for k in keys} | {"dense": {k: getattr(before, k) for k in keys}}
    return counts | {"flops_unit": flops_unit(dense)}
