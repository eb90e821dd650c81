"""The main job: a dense model in, a bundle with a converted model and its evidence out."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import sys
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dyncomp import __version__, bundle
from dyncomp.backends.native.build import begin
from dyncomp.backends.ort.native import library
from dyncomp.backends.ort.providers import require_providers
from dyncomp.calibrate import calibrate
from dyncomp.errors import RequestError
from dyncomp.evaluate import glimpse
from dyncomp.evidence import baselines, calibration_of, cost_figures, measure_quality
from dyncomp.examples import Reader, TextReader, prepare_examples, reader_of
from dyncomp.graph import Graph
from dyncomp.hardware import available_memory
from dyncomp.mapped import TensorStore
from dyncomp.models import LoadedModel, count_weights, load_model
from dyncomp.passes import Heal, Quantize, QuantizeCache
from dyncomp.passes.quantize import PRECISIONS, quantization_of
from dyncomp.passes.quantize_cache import keep_floats
from dyncomp.pipeline import Context, Pass, PassRecord, Pipeline, Progress, make_pass, no_progress, parse_passes
from dyncomp.recipe import Recipe, load_recipe
from dyncomp.regions import find_regions, require_ffns
from dyncomp.regions.refusal import Refusal
from dyncomp.rows import Rows, tensors_of
from dyncomp.search import Found, Goal, Search, artifact_bytes, selection_size
from dyncomp.sweep import release_memory
from dyncomp.text import Corpus
from dyncomp.trace import trace_model
from dyncomp.workspace import Workspace

BACKENDS = ("ort", "tvm", "torch")
DEFAULT_GOAL = Goal(max_loss=0.01)
TRAINING = 65_536
"""Tokens that the dense model writes for itself to be healed with."""
WHOLE, LOWERED = 6, 4
"""Times the bytes of a model's weights in float32: what a conversion may take that has them in memory, and what lowering and timing may
take where they are in files."""


@dataclass(frozen=True)
class ConvertRequest:
    """What to convert and how.

    Args:
        model: anything :func:`dyncomp.models.load_model` takes, or a model that is loaded.
        out: folder of the bundle.
        recipe: name or file. When neither it nor ``active``, ``experts`` or ``quantize`` is given, recipes are searched.
        active: mean fraction of active FFN neurons, in (0, 1]; None leaves it to the recipe.
        experts: experts per FFN; None leaves it to the recipe.
        quantize: ``int8``, ``int4`` or ``mixed``: the weights' precision; None is what the recipe says.
        kv_cache: ``int8`` keeps keys and values of past tokens so; None is what the recipe says.
        goal: what to search for in place of a recipe; None is :data:`DEFAULT_GOAL`.
        calibrate: text (a packaged name or a file), images (a packaged name or a folder) or recordings (a file or a folder) to
            calibrate on; a part is held out for evaluation.
        other: another source to evaluate on as well; None for none, ``"default"`` for the packaged one.
        tokens: calibration tokens; an image, or a recording, is as many as the model makes of it. None is 40 960, or 96 recordings.
        windows: evaluation windows of each text, images or recordings; None is 16 windows, 256 images or 32 recordings.
        backend: ``ort``, ``tvm`` or ``torch`` (no artifact: the graph itself is run).
        threads: of the latency figures; None is every core.
        seed: of everything random.
        low_memory: keep weights in files beside ``out``, mapped into memory, and work on one layer after the other; None does so when
            they would not fit, see :data:`WHOLE`.
        dump: folder for the graph's text after each pass.
        bundle: a bundle of this model to go on from, in place of the dense graph; ``passes`` are what runs on it.
        text: what passes that train learn from; None is what is calibrated on without what is held out.
    """

    model: str | LoadedModel
    out: Path
    recipe: str | None = None
    active: float | None = None
    experts: int | None = None
    quantize: str | None = None
    kv_cache: str | None = None
    goal: Goal | None = None
    calibrate: str | None = None
    other: str | None = "default"
    tokens: int | None = None
    windows: int | None = None
    backend: str = "ort"
    threads: int | None = None
    seed: int = 0
    low_memory: bool | None = None
    dump: Path | None = None
    bundle: Path | None = None
    passes: tuple[Pass, ...] = ()
    text: str | None = None

    @property
    def searched(self) -> Goal | None:
        """What to search for; None when a recipe is named."""
        named = any(v is not None for v in (self.recipe, self.active, self.experts, self.quantize, self.bundle))
        return None if named else self.goal or DEFAULT_GOAL

    def validate(self) -> None:
        """Raises:
        RequestError: an option is out of range, or the destination is taken.
        """
        if self.goal is not None and self.searched is None:
            raise RequestError(
                "--max-loss, --speedup, --max-memory, --minutes and --trials search for a recipe, and one is named",
                hint="leave out --recipe, --active, --experts and --quantize, or the search",
            )
        if self.kv_cache is not None:
            self._validate_cache()
        if self.searched is not None:
            self.searched.validate()
            if self.backend == "torch":
                raise RequestError("--backend torch has no artifact to time, so nothing can be searched", hint="name a recipe: --recipe")
        if self.active is not None and not 0 < self.active <= 1:
            raise RequestError(
                f"--active {self.active:.0%} is not a fraction of the FFN neurons", hint="give more than 0% and at most 100%"
            )
        if self.experts is not None and self.experts < 2:
            raise RequestError(f"--experts {self.experts}: a routed FFN needs at least 2 experts")
        if self.backend not in BACKENDS:
            raise RequestError(f"unknown backend {self.backend!r}", hint=f"backends: {', '.join(BACKENDS)}")
        if (self.tokens is not None and self.tokens < 512) or (self.windows is not None and self.windows < 1):
            raise RequestError("too little to calibrate and evaluate on: --tokens must be at least 512 and --windows at least 1")
        bundle.check_destination(self.out)
        if self.backend == "ort":  # say so now, not after minutes of work
            require_providers(None)
        if self.backend == "tvm":
            from dyncomp.backends.native.build import HINT as COMPILER_HINT
            from dyncomp.backends.native.build import unavailable_reason
            from dyncomp.backends.tvm.require import require_runtime

            require_runtime()
            rounds = self.quantize is not None or self.searched is not None  # a search tries precisions
            if rounds and (reason := unavailable_reason()) is not None:
                raise RequestError(
                    f"--backend tvm computes with quantized weights in native kernels, and {reason}",
                    hint=f"{COMPILER_HINT}, name a --recipe without --quantize, or use --backend ort",
                )

    def _validate_cache(self) -> None:
        from dyncomp.backends.native.build import HINT, unavailable_reason

        if self.searched is not None:
            raise RequestError("--kv-cache: a search does not try caches", hint="name a recipe: --recipe, or --quantize")
        if self.backend in ("ort", "tvm") and (reason := unavailable_reason()) is not None:
            raise RequestError(f"--kv-cache {self.kv_cache} is read by native kernels, and {reason}", hint=f"{HINT}, or leave it out")


def convert(request: ConvertRequest, *, progress: Progress = no_progress, say: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Convert a model and write the bundle; returns the report.

    An interrupted run leaves ``OUT.part`` with what was finished; the same request run again continues from there.

    Raises:
        DyncompError: of the kind that fits; nothing is written at ``request.out`` unless everything succeeded.
    """
    request.validate()
    if request.backend == "ort":
        begin(library)  # tracing keeps one core busy
    started, cpu_started = time.perf_counter(), time.process_time()
    with bundle.disk_errors(request.out):
        done = _rewrite(request, progress, say or (lambda text: None))
        if request.backend != "torch":
            done.report |= _lower(request, done, progress)
        done.report["seconds"] = time.perf_counter() - started
        done.report["cpu_seconds"] = time.process_time() - cpu_started
        done.report["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        (done.folder / "report.json").write_text(json.dumps(done.report, indent=1) + "\n")
        bundle.seal(done.folder, request.out, done.manifest)
        done.work.remove()
    return done.report


def healing_passes(opened: bundle.Bundle, options: str) -> tuple[Pass, ...]:
    """What heals a bundle: ``heal{options}``, and its quantization again when it has one, its KV cache's too.

    Raises:
        RequestError: no such option, or a value out of range.
    """
    earlier = parse_passes(", ".join(p.spec for p in opened.manifest.passes))
    quantize, caches = quantization_of(earlier), [p for p in earlier if isinstance(p, QuantizeCache)][:1]
    return (make_pass(Heal.name, options), *quantize, *caches)


@dataclass
class _Rewritten:
    """A conversion before it is lowered. Only ``models`` holds weights, so that they can be let go one by one."""

    work: Workspace
    folder: Path
    passes: list[Pass]
    artifact: Path | None  # of a search: lowered and timed already
    report: dict[str, Any]
    manifest: bundle.Manifest
    models: dict[str, Graph]
    text: Rows  # held out, to time on


def _rewrite(request: ConvertRequest, progress: Progress, say: Callable[[str], None]) -> _Rewritten:
    """Everything up to the bundle without artifacts."""
    goal = request.searched
    recipe = Recipe(name="search", passes="") if goal is not None else load_recipe(request.recipe)
    store = _store(request)
    origin = bundle.open_bundle(request.bundle) if request.bundle is not None else None
    passes = list(request.passes)

    def resolve(widths: Sequence[int] = ()) -> list[Pass]:
        return recipe.resolve(
            active=request.active, experts=request.experts, quantize=request.quantize, kv_cache=request.kv_cache, widths=widths
        )

    if origin is not None:
        recipe, loaded = Recipe(name=origin.manifest.recipe, passes=""), origin.dense()
    else:
        if goal is None:
            resolve()  # what is wrong is said before the model is loaded
        loaded = request.model if isinstance(request.model, LoadedModel) else load_model(request.model, store=store)
    dense = trace_model(loaded)
    if store is not None:
        dense.keep_in(store)
        _check_lowering(request, dense)
    regions = find_regions(dense)
    ffns = regions.ffns if regions.routed else require_ffns(regions)
    if goal is None and origin is None:
        passes = resolve([f.d_ff for f in ffns])
    for item in passes:
        item.precheck(dense)
    say(f"{loaded.name}: {dense.parameter_count() / 1e6:.1f} M parameters, {len(regions.ffns)} FFNs, {len(regions.attentions)} attentions")
    reader, training = reader_of(loaded, dense), any(p.reads_text for p in passes)
    if isinstance(reader, TextReader) and loaded.task == "causal-lm":
        reader = dataclasses.replace(reader, write=lambda: _generated(request, loaded, dense, reader, progress, training=training))
    examples = prepare_examples(
        reader, request.calibrate, request.other, tokens=request.tokens, count=request.windows, seed=request.seed, training=training,
        source=request.text,
    )  # fmt: skip
    rows = examples.calibration
    selection = 0 if goal is None else selection_size(rows, reader.tokens)
    if goal is not None and len(rows) <= selection:
        raise RequestError(
            f"a search keeps {selection} windows, pairs, images or recordings of those to calibrate on to itself, and there are no more",
            hint="raise --tokens",
        )
    wanted = [p.spec for p in passes] if goal is None else [goal.max_loss, goal.speedup, goal.max_memory, request.threads, request.backend]
    data = [*tensors_of(rows), *examples.evaluation_data(), *([] if examples.training is None else tensors_of(examples.training))]
    start = None if origin is None else origin.manifest.files["weights.safetensors"].sha256
    work = Workspace(request.out, [loaded.fingerprint, request.seed, wanted, start], data)
    calibration = calibration_of(loaded, dense, rows[: len(rows) - selection])
    ctx = Context(calibration, glimpse(dense, rows), progress, request.seed, dense, examples.training, work.folder / "training")
    statistics = work.folder / "calibration.safetensors"
    artifact, searched = None, {}
    if goal is not None:
        found = _search(request, goal, loaded, ctx, rows[-selection:], work, say)
        converted, passes, artifact = found.graph, found.passes, found.artifact
        trials = [dataclasses.asdict(t) for t in found.trials]
        searched = {"search": {"goal": str(goal), "chosen": found.best.name, "trials": trials}}
    else:
        if any(p.reads_statistics for p in passes):
            calibrate(dense, regions.ffns, calibration, cache=statistics, progress=progress)
        first = dense if origin is None else _floating(origin.graph())
        converted, records = work.resume(first)
        if records:
            say(f"continuing after {records[-1].spec}")
        Pipeline(passes[len(records) :], request.dump).run(converted, ctx, on_done=lambda done: work.keep(converted, done))
    models = {"dense": dense, "converted": converted}
    healing = next((r.result.facts["steps"] for p, r in zip(passes, work.records, strict=False) if isinstance(p, Heal)), None)
    healed_as = next((dataclasses.replace(p, steps=healing) for p in passes if isinstance(p, Heal)), None)

    def quality() -> dict[str, Any]:
        beside = dataclasses.replace(ctx, folder=work.folder / "training-static")
        plain = baselines(dense, converted, quantization_of(passes), beside, heal=healed_as)
        if origin is not None:
            plain["before"] = origin.graph()
        release_memory()
        return measure_quality(models | plain, examples.evaluation, loaded.task, progress, loaded=loaded)

    earlier = [] if origin is None else origin.manifest.passes
    specs = [*(p.spec for p in earlier), *(r.spec for r in work.records)]
    report = _report(request, recipe.name, loaded, specs) | searched
    if healing is not None:
        report["healing"] = next(r.result.facts for r in work.records if r.spec.startswith(Heal.name))
    if (mixed := converted.info.get("precisions")) is not None:
        report["precisions"] = mixed
    report["quality"] = work.stage("quality", quality)
    main = next(iter(report["quality"].values()))
    report |= {k: main[k] for k in ("perplexity", "cosine", "active_ffn") if k in main}
    report |= cost_figures(dense, converted, report["quality"])
    folder = work.bundle_folder()
    bundle.save_bundle_files(folder, converted, report, tokenizer=loaded.tokenizer, processor=loaded.processor)
    if statistics.exists():
        os.link(statistics, folder / "calibration.safetensors")
    manifest = _manifest(recipe.name, loaded, earlier, work.records, regions.refusals)
    return _Rewritten(
        work, folder, parse_passes(", ".join(specs)), artifact, report, manifest, models, examples.evaluation["held out"].rows
    )


def _generated(request: ConvertRequest, loaded: LoadedModel, dense: Graph, reader: Reader, progress: Progress, *, training: bool) -> Corpus:
    """What the dense model writes of itself: enough to calibrate on, to hold some out and, with ``training``, to train on."""
    from dyncomp.deploy import generated_text

    tokens = int(1.25 * (request.tokens or reader.calibration)) + (request.windows or reader.count) * reader.tokens
    return generated_text(
        dense, loaded, tokens=max(tokens, TRAINING if training else 0), length=reader.tokens, seed=request.seed, progress=progress
    )


def _store(request: ConvertRequest) -> TensorStore | None:
    """Where to put weights that do not all fit into memory."""
    wanted = request.low_memory
    if wanted is None:
        size = 0 if isinstance(request.model, LoadedModel) else 4 * count_weights(request.model)
        wanted = 0 < available_memory() < WHOLE * size
    return TensorStore(request.out.absolute().parent) if wanted else None


def _check_lowering(request: ConvertRequest, dense: Graph) -> None:
    needed, available = LOWERED * 4 * dense.parameter_count(), available_memory()
    if request.backend != "torch" and 0 < available < needed:
        raise RequestError(
            f"--backend {request.backend}: lowering {request.out.name} and timing it beside the dense model takes about "
            f"{needed / 2**30:.1f} GiB, and {available / 2**30:.1f} GiB are available",
            hint="add --backend torch (with --recipe, --active or --quantize) for a bundle without an artifact, or --no-low-memory to try",
        )


def _search(
    request: ConvertRequest, goal: Goal, loaded: LoadedModel, ctx: Context, selection: Rows, work: Workspace, say: Callable[[str], None]
) -> Found:
    from dyncomp.deploy import compare, dense_artifact, latency_table

    assert ctx.dense is not None
    dense = dense_artifact(ctx.dense, loaded.fingerprint, ctx.progress, backend=request.backend)

    def measure(graph: Graph, folder: Path) -> dict[str, Any]:
        return compare(dense, graph, folder, threads=request.threads, text=selection, backend=request.backend)

    constant = artifact_bytes(dense) - ctx.dense.weight_bytes()
    if request.backend == "tvm" and goal.max_memory is not None:
        constant = _constant_in_int8(ctx.dense, loaded.fingerprint, request.backend)
    table = latency_table(request.threads, request.backend)
    return Search(ctx.dense, ctx, selection, loaded.task, loaded.fingerprint, goal, work, measure, table, say, constant).run()


def _constant_in_int8(dense: Graph, fingerprint: str, backend: str) -> int:
    """Bytes of a quantized artifact besides its weights, where in float the weights that several layers read are kept several times."""
    from dyncomp.deploy import dense_artifact

    (quantize,) = (p for p in PRECISIONS["int8"] if isinstance(p, Quantize))
    graph = dense.copy()
    quantize.run(graph, Context())
    return artifact_bytes(dense_artifact(dense, fingerprint, quantize=quantize, backend=backend)) - graph.weight_bytes()


def _floating(graph: Graph) -> Graph:
    """The graph with the decoded values as plain weights, for passes that train or fit them."""
    graph.quantized.clear()
    keep_floats(graph)
    for key in ("activations", "two_terms", "screened", "precisions"):
        graph.info.pop(key, None)
    return graph


def _report(request: ConvertRequest, recipe: str, loaded: LoadedModel, specs: list[str]) -> dict[str, Any]:
    return {
        "schema": 1,
        "model": loaded.name,
        "task": loaded.task,
        "recipe": recipe,
        "passes": specs,
        "machine": {"cpus": os.cpu_count(), "threads": request.threads or torch.get_num_threads()},
        "versions": {"dyncomp": __version__} | bundle.versions(),
    }


def _manifest(
    recipe: str, loaded: LoadedModel, earlier: list[bundle.PassEntry], records: list[PassRecord], refusals: list[Refusal]
) -> bundle.Manifest:
    source = bundle.Source(
        name=loaded.name, kind=loaded.kind, task=loaded.task, fingerprint=loaded.fingerprint, context_length=loaded.context_length,
        output_name=loaded.output_name, config=loaded.config, decoding=loaded.decoding,
        generation=loaded.generation,
    )  # fmt: skip
    entries = [
        bundle.PassEntry(
            spec=r.spec, seconds=r.seconds, relative_error=r.relative_error, changed=r.result.changed,
            refused=[dataclasses.asdict(x) for x in r.result.refused], facts=r.result.facts,
        )
        for r in records
    ]  # fmt: skip
    return bundle.Manifest(
        source=source,
        recipe=recipe,
        passes=[*earlier, *entries],
        refusals=[dataclasses.asdict(x) for x in refusals],
        versions=bundle.versions(),
    )


def _lower(request: ConvertRequest, done: _Rewritten, progress: Progress) -> dict[str, Any]:
    """Lower the converted model, hold it against its graph, and time it beside the dense one; the graphs are let go on the way."""
    from dyncomp.deploy import check_parity, dense_artifacts, lower_artifact, measure, with_cache

    release_memory()
    backend, source = request.backend, done.manifest.source
    dense = dense_artifacts(done.models.pop("dense"), source.fingerprint, progress, passes=done.passes, backend=backend)
    release_memory()
    artifact = done.folder / "artifacts" / backend
    if done.artifact is None:
        lowered, refused = lower_artifact(done.models.pop("converted"), artifact, progress, backend=backend)
    else:
        lowered, refused = with_cache(done.models.pop("converted"))
        artifact.parent.mkdir(parents=True)
        os.replace(done.artifact, artifact)
    release_memory()
    parity = check_parity(lowered, artifact, threads=request.threads, backend=backend)
    del lowered
    release_memory()
    bench = measure([*dense, ("converted", artifact)], task=source.task, threads=request.threads, backend=backend, text=done.text)
    return {"parity": [parity], "bench": bench, "lowering_refused": [dataclasses.asdict(r) for r in refused]}


class _Callable(types.ModuleType):
    """This module, so that ``dyncomp.convert(model)`` works whether or not ``dyncomp.convert`` was imported: see :mod:`dyncomp.api`."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        from dyncomp.api import convert_model

        return convert_model(*args, **options)


sys.modules[__name__].__class__ = _Callable
