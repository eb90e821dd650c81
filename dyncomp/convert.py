"""The main job: a dense model in, a bundle with a converted model and its evidence out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import resource
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyncomp import __version__, bundle
from dyncomp.calibrate import Calibration, calibrate, fingerprint
from dyncomp.cost import count
from dyncomp.errors import RequestError
from dyncomp.evaluate import Quality, batches, evaluate, load_summary
from dyncomp.graph import Graph
from dyncomp.models import LoadedModel, load_model
from dyncomp.passes import PruneStatic
from dyncomp.pipeline import Context, Pass, PassRecord, PassResult, Pipeline, Progress, no_progress
from dyncomp.recipe import load_recipe
from dyncomp.regions import find_regions, find_routed, require_ffns
from dyncomp.regions.refusal import Refusal
from dyncomp.serialize import load_graph, save_graph
from dyncomp.text import load_text, split, windows
from dyncomp.trace import trace

BACKENDS = ("ort", "torch")


@dataclass(frozen=True)
class ConvertRequest:
    """What to convert and how.

    Args:
        model: anything :func:`dyncomp.models.load_model` takes.
        out: folder of the bundle.
        recipe: name or file; None is the default recipe.
        active: mean fraction of active FFN neurons, in (0, 1]; None leaves it to the recipe.
        experts: experts per FFN; None leaves it to the recipe.
        calibrate: text to calibrate on, a packaged name or a file; a part of it is held out for evaluation.
        other: text of another source to evaluate on as well; None for none.
        tokens: calibration tokens.
        windows: evaluation windows of each text.
        backend: ``ort`` or ``torch`` (no artifact: the graph itself is run).
        threads: of the latency figures; None is every core.
        seed: of everything random.
        dump: folder for the graph's text after each pass.
    """

    model: str
    out: Path
    recipe: str | None = None
    active: float | None = None
    experts: int | None = None
    calibrate: str | None = None
    other: str | None = "news"
    tokens: int = 40_960
    windows: int = 16
    backend: str = "ort"
    threads: int | None = None
    seed: int = 0
    dump: Path | None = None

    def validate(self) -> None:
        """Raises:
        RequestError: an option is out of range, or the destination is taken.
        """
        if self.active is not None and not 0 < self.active <= 1:
            raise RequestError(
                f"--active {self.active:.0%} is not a fraction of the FFN neurons", hint="give more than 0% and at most 100%"
            )
        if self.experts is not None and self.experts < 2:
            raise RequestError(f"--experts {self.experts}: a routed FFN needs at least 2 experts")
        if self.backend not in BACKENDS:
            raise RequestError(f"unknown backend {self.backend!r}", hint=f"backends: {', '.join(BACKENDS)}")
        if self.tokens < 512 or self.windows < 1:
            raise RequestError("too little text: --tokens must be at least 512 and --windows at least 1")
        bundle.check_destination(self.out)


@dataclass
class Texts:
    """Token windows: to calibrate on, and to evaluate on by name of the text."""

    calibration: Tensor
    evaluation: dict[str, Tensor] = field(default_factory=dict)


def window_length(loaded: LoadedModel) -> int:
    """512 tokens for decoders, 128 for encoders (sentences), less when the model's context is shorter."""
    return min(512 if loaded.task == "causal-lm" else 128, loaded.context_length or 1 << 30)


def prepare_texts(request: ConvertRequest, loaded: LoadedModel) -> Texts:
    """Load, split and tokenize the texts."""
    if loaded.tokenizer is None:
        raise RequestError(
            f"{loaded.name} came without a tokenizer, so no text can calibrate it", hint="convert from a directory or file that has one"
        )
    length = window_length(loaded)
    calibration, held_out = split(load_text(request.calibrate), seed=request.seed)
    texts = Texts(windows(calibration, loaded.tokenizer, length=length, tokens=request.tokens, seed=request.seed))
    texts.evaluation["held out"] = windows(held_out, loaded.tokenizer, length=length, tokens=request.windows * length, seed=request.seed)
    if request.other and request.other != request.calibrate:
        other = load_text(request.other)
        texts.evaluation["other source"] = windows(
            other, loaded.tokenizer, length=length, tokens=request.windows * length, seed=request.seed
        )
    return texts


def trace_model(loaded: LoadedModel) -> Graph:
    """The graph of a loaded model."""
    info = {"name": loaded.name, "task": loaded.task, "context_length": loaded.context_length}
    return trace(loaded.module, loaded.example_inputs, loaded.dynamic_dims, output_name=loaded.output_name, info=info)


def convert(request: ConvertRequest, *, progress: Progress = no_progress, say: Any = None) -> dict[str, Any]:
    """Convert a model and write the bundle; returns the report.

    An interrupted run leaves ``OUT.part`` with what was finished; the same request run again continues from there.

    Raises:
        DyncompError: of the kind that fits; nothing is written at ``request.out`` unless everything succeeded.
    """
    request.validate()
    say = say or (lambda text: None)
    started, cpu_started = time.perf_counter(), time.process_time()
    recipe = load_recipe(request.recipe)
    passes = recipe.resolve(active=request.active, experts=request.experts)
    loaded = load_model(request.model)
    dense = trace_model(loaded)
    regions = find_regions(dense)
    require_ffns(regions)
    say(f"{loaded.name}: {dense.parameter_count() / 1e6:.1f} M parameters, {len(regions.ffns)} FFNs, {len(regions.attentions)} attentions")
    texts = prepare_texts(request, loaded)
    with bundle.disk_errors(request.out):
        work = Workspace(request, loaded, texts, passes)
        calibration = Calibration(batches(dense, texts.calibration), fingerprint(loaded.fingerprint, batches(dense, texts.calibration)))
        calibrate(dense, regions.ffns, calibration, cache=work.folder / "calibration.safetensors", progress=progress)
        ctx = Context(calibration, batches(dense, texts.calibration[:1, :64])[0], progress, request.seed, dense)
        converted, records = work.resume(dense)
        if records:
            say(f"continuing after {records[-1].spec}")
        Pipeline(passes[len(records) :], request.dump).run(converted, ctx, on_done=lambda done: work.keep(converted, done))
        records = work.records
        report = _report(request, recipe.name, loaded, dense, converted, records)
        _evaluate(report, work, ctx, {"dense": dense, "converted": converted}, loaded.task, texts)
        folder = work.bundle_folder()
        bundle.save_bundle_files(folder, converted, loaded.tokenizer, report)
        if request.backend == "ort":
            _lower(report, request, folder, {"dense": dense, "converted": converted}, loaded, progress)
        report["seconds"] = time.perf_counter() - started
        report["cpu_seconds"] = time.process_time() - cpu_started
        report["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        bundle.seal(folder, request.out, _manifest(recipe.name, loaded, records, regions.refusals))
        work.remove()
    return report


class Workspace:
    """``OUT.part``: what an interrupted conversion has finished."""

    def __init__(self, request: ConvertRequest, loaded: LoadedModel, texts: Texts, passes: list[Pass]) -> None:
        self.folder = request.out.absolute().with_name(request.out.absolute().name + ".part")
        self.records: list[PassRecord] = []
        digest = hashlib.sha256(loaded.fingerprint.encode())
        for ids in (texts.calibration, *texts.evaluation.values()):
            digest.update(ids.numpy().tobytes())
        digest.update(json.dumps([__version__, request.seed, [p.spec for p in passes]]).encode())
        key, file = digest.hexdigest(), self.folder / "request"
        if self.folder.exists() and (not file.is_file() or file.read_text() != key):
            shutil.rmtree(self.folder)
        self.folder.mkdir(exist_ok=True)
        file.write_text(key)

    def keep(self, graph: Graph, done: list[PassRecord]) -> None:
        """Note finished passes and the graph after them."""
        part = self.folder / "graph.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        save_graph(graph, part / "graph.json", part / "weights.safetensors")
        (part / "records.json").write_text(json.dumps([dataclasses.asdict(r) for r in [*self.records, *done]]))
        kept = self.folder / "graph"
        shutil.rmtree(kept, ignore_errors=True)
        os.replace(part, kept)
        self.records += done

    def resume(self, dense: Graph) -> tuple[Graph, list[PassRecord]]:
        """The graph after the last finished pass and the records so far; a copy of the dense graph when there is none."""
        done = self.folder / "graph"
        if not (done / "records.json").is_file():
            return dense.copy(), []
        for item in json.loads((done / "records.json").read_text()):
            result = item.pop("result")
            refused = [Refusal(**r) for r in result["refused"]]
            self.records.append(PassRecord(**item, result=PassResult(result["changed"], refused, result["facts"])))
        return load_graph(done / "graph.json", done / "weights.safetensors"), list(self.records)

    def stage(self, name: str, compute: Any) -> Any:
        """A JSON value, computed once."""
        file = self.folder / f"{name}.json"
        if file.is_file():
            return json.loads(file.read_text())
        value = compute()
        part = file.with_suffix(".part")
        part.write_text(json.dumps(value))
        os.replace(part, file)
        return value

    def bundle_folder(self) -> Path:
        folder = self.folder / "bundle"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _report(
    request: ConvertRequest, recipe: str, loaded: LoadedModel, dense: Graph, converted: Graph, records: list[PassRecord]
) -> dict[str, Any]:
    return {
        "schema": 1,
        "model": loaded.name,
        "task": loaded.task,
        "recipe": recipe,
        "passes": [r.spec for r in records],
        "machine": {"cpus": os.cpu_count(), "threads": request.threads or torch.get_num_threads()},
        "versions": {"dyncomp": __version__} | bundle.versions(),
    }


def _evaluate(report: dict[str, Any], work: Workspace, ctx: Context, models: dict[str, Graph], task: str, texts: Texts) -> None:
    """Quality of the converted model and of static pruning at the same cost, beside the dense one, on every text."""
    converted, dense = models["converted"], models["dense"]
    routed = find_routed(converted)
    if routed:
        keep = float(_calibrated_share(converted))
        dense_positions = tuple(i for i, f in enumerate(find_regions(dense).ffns) if f.name not in {r.name for r in routed})
        static = dense.copy()
        Pipeline([PruneStatic(active=keep, keep_dense=dense_positions)]).run(static, ctx)
        models = models | {"static_pruned": static}

    def measure() -> dict[str, Any]:
        return {
            name: quality_figures(
                evaluate(models, ids, task=task, progress=lambda _, d, t, n=name: ctx.progress(f"evaluate {n}", d, t)), converted
            )
            for name, ids in texts.evaluation.items()
        }

    report["quality"] = work.stage("quality", measure)
    first = next(iter(report["quality"].values()))
    report |= {k: first[k] for k in ("perplexity", "cosine", "active_ffn") if k in first}
    active = first.get("active_by_region", {})
    cost = count(converted, active=active or None)
    before = count(dense)
    report |= {
        "parameters": cost.parameters,
        "active_parameters": cost.active_parameters,
        "flops_per_token": cost.flops_per_token,
        "dense": {
            "parameters": before.parameters,
            "active_parameters": before.active_parameters,
            "flops_per_token": before.flops_per_token,
        },
    }


def _calibrated_share(graph: Graph) -> float:
    """Active fraction over all FFN neurons that the routers were calibrated to."""
    routed, dense = find_routed(graph), sum(f.d_ff for f in find_regions(graph).ffns)
    facts = graph.info.get("routing", {})
    active = sum(r.d_ff * facts.get(r.name, {}).get("active", 1.0) for r in routed)
    return (active + dense) / (sum(r.d_ff for r in routed) + dense)


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
    loads = quality.load.get("converted", {})
    if loads:
        widths = {r.name: r.d_ff for r in find_routed(converted)}
        dense_width = sum(f.d_ff for f in find_regions(converted).ffns)
        figures["active_ffn"] = quality.active_ffn("converted", widths, dense_width)
        figures["active_by_region"] = {name: use.active for name, use in loads.items()}
        figures["load"] = load_summary(list(loads.values()))
        figures["load_by_region"] = {name: [round(v, 4) for v in use.load.tolist()] for name, use in loads.items()}
    return figures


def _manifest(recipe: str, loaded: LoadedModel, records: list[PassRecord], refusals: list[Refusal]) -> bundle.Manifest:
    source = bundle.Source(
        name=loaded.name, kind=loaded.kind, task=loaded.task, fingerprint=loaded.fingerprint, context_length=loaded.context_length,
        output_name=loaded.output_name, config=loaded.config,
    )  # fmt: skip
    entries = [
        bundle.PassEntry(
            spec=r.spec, seconds=r.seconds, relative_error=r.relative_error, changed=r.result.changed,
            refused=[dataclasses.asdict(x) for x in r.result.refused], facts=r.result.facts,
        )
        for r in records
    ]  # fmt: skip
    return bundle.Manifest(
        source=source, recipe=recipe, passes=entries, refusals=[dataclasses.asdict(x) for x in refusals], versions=bundle.versions()
    )


def _lower(
    report: dict[str, Any], request: ConvertRequest, folder: Path, models: dict[str, Graph], loaded: LoadedModel, progress: Progress
) -> None:
    """Lower the converted model, hold it against its graph, and time it beside the dense one."""
    from dyncomp.deploy import check_parity, dense_ort, lower_ort, measure

    artifact = folder / "artifacts" / "ort"
    lowered, refused = lower_ort(models["converted"], artifact, progress)
    report["lowering_refused"] = [dataclasses.asdict(r) for r in refused]
    report["parity"] = [check_parity(lowered, artifact, threads=request.threads)]
    dense = dense_ort(models["dense"], loaded.fingerprint, progress)
    report["bench"] = measure(dense, artifact, task=loaded.task, threads=request.threads)
