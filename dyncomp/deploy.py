"""From a converted graph to something that runs: lowering, parity, speed beside the dense model."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dyncomp import cost
from dyncomp.backends.native import unavailable_reason
from dyncomp.backends.ort.providers import DEVICES, require_providers
from dyncomp.backends.parity import error_of, parity
from dyncomp.bundle import Bundle
from dyncomp.cache import cache_folder
from dyncomp.errors import BackendError, PassError, ProviderError, RequestError
from dyncomp.evaluate import embedding, model_inputs
from dyncomp.graph import Graph
from dyncomp.hardware import default_threads, probe, thread_counts
from dyncomp.images import prepare, read_image
from dyncomp.latency import LatencyTable, ffn_layer, row_name
from dyncomp.models import LoadedModel
from dyncomp.models.loaded import WRITES
from dyncomp.passes import AddKVCache, Quantize
from dyncomp.passes.quantize import quantization_of, quantize_of
from dyncomp.pipeline import Context, Pass, Progress, no_progress
from dyncomp.regions import find_regions
from dyncomp.regions.refusal import Refusal
from dyncomp.rows import Rows
from dyncomp.runtime.batching import Batcher
from dyncomp.runtime.bench import Reading, Variant, bench
from dyncomp.runtime.generate import Generator, Seq2SeqGenerator
from dyncomp.runtime.session import Array, DecoderSession, Slots
from dyncomp.runtime.unprompted import write_documents
from dyncomp.schedule import Work, choose_threads
from dyncomp.sound import features
from dyncomp.sweep import release_memory
from dyncomp.text import GENERATED, Corpus, load_text
from dyncomp.wav import Samples, read_wav
from dyncomp.whole import replacing


class Artifact(Protocol):
    """A backend's artifact, opened: ``OrtModel`` or ``TvmModel``."""

    threads: int
    inputs: tuple[str, ...]

    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def precision(self) -> str: ...
    def run(self, **inputs: Any) -> dict[str, Any]: ...
    def placement(self) -> dict[str, dict[str, int]]: ...


@dataclass(frozen=True)
class Backend:
    """What makes and runs a backend's artifacts.

    Args:
        label: for people.
        schema: of its ``config.json``; artifacts in the cache folder are kept apart by it.
        lower: (graph, folder, progress=…) writes an artifact.
        open: (folder, threads=…) opens it.
        session: generates tokens with it.
        slots: (artifact, slots=…, capacity=…) many sequences that share its KV cache, for a :class:`Batcher`.
        settings: what else an artifact made now depends on; empty for nothing. It keeps artifacts in the cache folder apart, too.
    """

    name: str
    label: str
    schema: int
    lower: Callable[..., Any]
    open: Callable[..., Any]
    session: Callable[[Any], Any]
    slots: Callable[..., Slots]
    settings: Callable[[], str] = str


def backend_of(name: str, device: str = "cpu") -> Backend:
    """The backend ``ort`` or ``tvm``; what it needs is imported only now. ``device``: what it lowers for and opens on, of ``ort`` a key of
    :data:`dyncomp.backends.ort.providers.DEVICES`."""
    if name == "tvm":
        from dyncomp.backends.tvm import decoder as tvm_decoder
        from dyncomp.backends.tvm import layout as tvm_layout
        from dyncomp.backends.tvm import lower as tvm_lower
        from dyncomp.backends.tvm import machine as tvm_machine
        from dyncomp.backends.tvm import run as tvm_run
        from dyncomp.backends.tvm import slots as tvm_slots
        from dyncomp.backends.tvm import tuned as tvm_tuned

        def tuning() -> str:
            return tvm_tuned.Database().digest(tvm_machine.this_machine())

        opening = tvm_run.TvmModel, tvm_decoder.decoder_for, tvm_slots.TvmSlots
        return Backend("tvm", "TVM", tvm_layout.SCHEMA, tvm_lower.lower, *opening, tuning)
    from dyncomp.backends.ort import decoder, lower, run, slots

    open_slots = slots.OrtSlots
    if device == "cpu":
        return Backend("ort", "ONNX Runtime", lower.SCHEMA, lower.lower, run.OrtModel, decoder.decoder_for, open_slots)
    lower_for = functools.partial(lower.lower, device=device)
    open_on = functools.partial(run.OrtModel, providers=DEVICES[device])
    return Backend("ort", "ONNX Runtime", lower.SCHEMA, lower_for, open_on, decoder.decoder_for, open_slots, lambda: device)


def require_device(device: str, path: Path, backend: str) -> None:
    """Raises:
    ProviderError: ``device`` is a GPU, and what the backend needs to run on one is not there; says what is, and what brings the rest.
    """
    if device == "cpu":
        return
    if backend == "ort":
        require_providers(DEVICES[device])
        return
    if backend == "torch":
        raise ProviderError("--backend torch evaluates graphs on the CPU", hint=f"--backend ort --device {device}")
    what = "dyncomp does not start kernels on GPUs yet" if torch.cuda.is_available() else "this machine has no GPU that CUDA can use"
    try:
        made = json.loads((path / "dyncomp-export.json").read_bytes())
        target, kernels = made["target"], [f for f in made["files"] if f.startswith("kernels.")]
    except (OSError, ValueError, KeyError):
        raise ProviderError(
            f"{path} cannot run on a GPU: {what}; nothing in it was made for one",
            hint="dyncomp export BUNDLE --backend tvm --target cuda-sm_80 -o OUT makes the kernels, without a GPU; --device cpu runs here",
        ) from None
    raise ProviderError(
        f"{path} cannot run on a GPU: {what}. What was built is there: {len(made['kernels'])} kernels for {target} in {', '.join(kernels)}",
        hint="a machine with such a GPU would load kernels.cubin with its driver, copy parameters.bin to the GPU and make the calls that "
        "config.json lists; --device cpu on the bundle runs here",
    )


def with_cache(graph: Graph) -> tuple[Graph, list[Refusal]]:
    """A copy of a graph that writes tokens, with a KV cache and the last token's logits only; other graphs as they are.

    What ``add-kv-cache`` refuses is returned: such a model runs without a cache.

    Raises:
        BackendError: an encoder–decoder is refused, which cannot run without one.
    """
    if graph.info.get("task") not in WRITES:
        return graph, []
    cached = graph.copy()
    result = AddKVCache(logits="chosen").run(cached, Context())
    if result.refused and graph.info["task"] == "seq2seq":
        refusal = result.refused[0]
        raise BackendError(
            f"{refusal.where}: an encoder–decoder needs a KV cache, and {refusal.reason}", hint="--backend torch still evaluates it"
        )
    return cached, result.refused


def lower_artifact(
    graph: Graph, folder: Path, progress: Progress = no_progress, *, backend: str = "ort", device: str = "cpu"
) -> tuple[Graph, list[Refusal]]:
    """Lower a graph; returns the graph that was lowered and what was refused on the way."""
    lowered, refused = with_cache(graph)
    folder.mkdir(parents=True, exist_ok=True)
    backend_of(backend, device).lower(lowered, folder, progress=progress)
    (folder / WORK).write_text(json.dumps([dataclasses.asdict(w) for w in work_of(graph)], indent=1) + "\n")
    return lowered, refused


WORK = "work.json"
"""Beside an artifact: what a step asks of each region (:class:`~dyncomp.schedule.Work`), for :func:`session_threads`."""


def work_of(graph: Graph) -> list[Work]:
    """What a step of decoding asks of each region; weights count with the mean bytes of one, experts as far as a token uses them."""
    regions, facts = find_regions(graph), graph.info.get("routing", {})
    active = {r.name: share for r in regions.routed if (share := facts.get(r.name, {}).get("active")) is not None}
    counted, ffns = cost.count(graph, active=active, regions=regions), {} if graph.quantized else {f.name: f for f in regions.ffns}
    each = graph.weight_bytes() / max(1, counted.parameters)
    return [
        Work(name, part.active_parameters * each, part.flops_per_token, row_name(ffn_layer(ffns[name])) if name in ffns else None)
        for name, part in counted.by_region.items()
    ]


def session_threads(folder: Path) -> int:
    """Threads for an artifact in ONNX Runtime whose user gave none: every core, or fewer where those are faster by the measured latencies
    of its layers, or the bandwidth and peak of this machine, if those can be measured undisturbed."""
    counts = thread_counts()
    try:
        work = [Work(**part) for part in json.loads((folder / WORK).read_bytes())]
    except FileNotFoundError:  # made by an earlier dyncomp
        return counts[-1]
    if len(counts) == 1:
        return counts[0]
    if (measured := probe()).disturbed:
        return counts[-1]
    tables = {n: table for n in counts if (table := latency_table(n)).file.is_file()}
    return choose_threads(work, measured, {n: {key: one for key, (one, _) in table.rows.items()} for n, table in tables.items()})


def artifact_for(opened: Bundle, backend: str, device: str) -> Path:
    """A bundle's artifact; what runs on a GPU is made when it is first asked for, and kept in the cache folder."""
    if device == "cpu":
        return opened.artifact(backend)
    from dyncomp import __version__

    used = backend_of(backend, device)
    contents = "".join(opened.manifest.files[name].sha256 for name in ("graph.json", "weights.safetensors"))
    name = f"{hashlib.sha256(contents.encode()).hexdigest()[:24]}-{__version__}-{used.schema}-{device}"
    return _made_once(
        cache_folder() / f"bundle-{backend}" / name, lambda part: lower_artifact(opened.graph(), part, backend=backend, device=device)
    )


def _made_once(folder: Path, make: Callable[[Path], Any]) -> Path:
    """``folder``, whole: ``make`` fills another one that then takes its place."""
    if not (folder / "done").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
        shutil.rmtree(part, ignore_errors=True)
        make(part)
        (part / "done").touch()
        try:
            os.replace(part, folder)
        except OSError:  # another process was first
            if not (folder / "done").is_file():
                raise
            shutil.rmtree(part)
    return folder


def dense_artifact(
    graph: Graph, fingerprint: str, progress: Progress = no_progress, *, quantize: Quantize | None = None, backend: str = "ort",
    device: str = "cpu",
) -> Path:  # fmt: skip
    """The dense model's artifact for comparisons, made once per model and precision and kept in the cache folder.

    Args:
        quantize: the precision; rounded to nearest whatever its method is, for speed does not depend on that. Of several the smallest,
            which is the fastest.
    """
    from dyncomp import __version__

    quantize = None if quantize is None else quantize.uniform()
    precision = "" if quantize is None else f"-int{quantize.bits}-{quantize.block}-{quantize.symmetric}-{quantize.head_bits}"
    used = backend_of(backend, device)
    settings = "".join(f"-{s}" for s in (used.schema, used.settings()) if s)

    def make(part: Path) -> None:
        dense = graph
        if quantize is not None:
            dense = graph.copy()
            quantize.run(dense, Context())
        lower_artifact(dense, part, progress, backend=backend, device=device)
        release_memory()

    return _made_once(cache_folder() / f"dense-{backend}" / f"{fingerprint[:24]}-{__version__}{settings}{precision}", make)


TOLERANCE = {"fp32": 1e-4, "int8": 0.1, "int4": 0.1, "mixed": 0.1}
"""Largest relative error of an artifact against its graph. Where activations are rounded to int8, a difference in the last bit of a
float becomes a step of 1/127 here and there, and thirty layers magnify it: two right programs differ by a few percent of the largest
logit. A wrong one differs by about 1; each kernel alone is held to 1e-5 in the tests."""
CACHE_TOLERANCE = 2e-2
"""The same where only keys and values are rounded, to int8 or, for GPUs, to float16."""
SCREENED_TOLERANCE = 0.2
"""The same with a screened head: a logit next to the floor, whose lower half counts in part, moves up to four times as far."""


def check_parity(lowered: Graph, folder: Path, *, threads: int | None = None, backend: str = "ort") -> dict[str, Any]:
    """Hold the artifact against its graph; the result belongs into the report, with ``placement``: what runs where, and ``notes`` on
    what runs otherwise than a user would think.

    Raises:
        PassError: they differ by more than :data:`TOLERANCE`: the artifact must not be used.
    """
    allowed, used = TOLERANCE[lowered.precision], backend_of(backend)
    model = used.open(folder, threads=threads)
    if "bits" in (lowered.info.get("kv_cache") or {}) or model.config.get("device", "cpu") != "cpu":
        allowed = max(allowed, CACHE_TOLERANCE)
    if model.config.get("kernels") == "onnxruntime":
        lowered.info.pop("screened", None)  # what only dyncomp's kernels leave out
    if lowered.info.get("screened"):
        allowed = max(allowed, SCREENED_TOLERANCE)
    entry = parity(lowered, model, used.session, backend=backend, good=allowed)
    if not error_of(entry) <= allowed:
        raise PassError(
            f"the {used.label} artifact differs from the PyTorch graph by {error_of(entry):.1e} (relative); allowed {allowed:g}",
            hint="this is a defect: please report the model and the recipe",
        )
    return entry | {"placement": model.placement(), "notes": model.config.get("notes", [])}


def measure(
    artifacts: Sequence[tuple[str, Path]],
    *,
    task: str,
    threads: int | None = None,
    prefill_tokens: int = 512,
    batch: int = 1,
    backend: str = "ort",
    device: str = "cpu",
    text: Rows | None = None,
) -> list[dict[str, Any]]:
    """Speed of artifacts, interleaved in this process; entries as in a report's ``bench``.

    Args:
        artifacts: (``dense`` or ``converted``, folder) of each.
        prefill_tokens: of the prompt that is timed; an encoder–decoder's encoder reads it, or hears a recording instead:
            ``recordings_per_s``.
        text: what decoders and encoders of text read, for what a token costs may depend on it; random tokens without it.
    """
    used = backend_of(backend, device)
    tokens_of_text = text.numpy() if isinstance(text, Tensor) and text.dim() == 2 and not text.is_floating_point() else None
    models = [(variant, used.open(folder, threads=threads)) for variant, folder in artifacts]
    if task not in WRITES:
        return _measure_encoders(models, tokens=min(prefill_tokens, 128), batch=batch, engine=f"dyncomp-{backend}", text=tokens_of_text)

    def whole(model: Any) -> Any:
        session = used.session(model)
        return Reading(session, model.encoder.config["inputs"][0]) if task == "seq2seq" else session

    variants = [Variant(whole(model), variant, model.precision) for variant, model in models]
    context = min(v.session.context_length or 1 << 30 for v in variants)
    hears = any(isinstance(v.session, Reading) and v.session.hears for v in variants)
    tokens = 1 if hears else max(1, min(prefill_tokens, context - 1))
    decode = max(8, min(96, (context - 64) // 2))
    vocabulary = int(variants[0].session.prefill(np.zeros((1, 1), np.int64), np.ones(1, np.int64), 1).shape[-1])
    start = min(64, tokens, context // 4)
    found = bench(
        variants, prompt_tokens=tokens, context=start, decode_tokens=decode, batch=batch, vocabulary=min(vocabulary, 1000),
        text=tokens_of_text,
    )  # fmt: skip
    for entry in found if hears else ():
        entry |= {"recordings_per_s": entry["prefill_tokens_per_s"], "prefill_tokens_per_s": None, "prefill_tokens": None}
    return found


def dense_artifacts(
    graph: Graph, fingerprint: str, progress: Progress = no_progress, *, passes: Sequence[Pass], backend: str = "ort", device: str = "cpu"
) -> list[tuple[str, Path]]:
    """What the model that ``passes`` made is timed beside: the dense model in fp32, and in the same precision, unless that is what
    the passes made."""
    found = [("dense", dense_artifact(graph, fingerprint, progress, backend=backend, device=device))]
    quantize = quantize_of(passes)
    if quantize is not None and len(quantization_of(passes)) < len(passes):
        found.append(("dense", dense_artifact(graph, fingerprint, progress, quantize=quantize, backend=backend, device=device)))
    return found


_WRITTEN_TOGETHER = 16
"""Documents at a time that a model writes of itself."""


def generated_text(dense: Graph, loaded: LoadedModel, *, tokens: int, length: int, seed: int, progress: Progress = no_progress) -> Corpus:
    """Documents that the dense model writes of itself (:mod:`dyncomp.runtime.unprompted`), made once and kept in the cache folder.

    Args:
        tokens: how many at least. length: of the longest document, in tokens, at most the model's context.

    Raises:
        RequestError: the model does not write text one token after the other over a KV cache.
        TextError: it ends its texts at once.
    """
    file = cache_folder() / "generated" / f"{loaded.fingerprint[:24]}-{tokens}-{length}-{seed}.jsonl"
    if not file.is_file():
        used = backend_of("ort")
        model = used.open(dense_artifact(dense, loaded.fingerprint, progress))
        if model.kv_cache is None:
            raise RequestError(f"{loaded.name} writes no text of its own: it was refused a KV cache", hint="give a text file")
        slots = used.slots(model, slots=_WRITTEN_TOGETHER, capacity=length)
        documents = write_documents(Batcher(slots, loaded.tokenizer), tokens=tokens, length=length, seed=seed, progress=progress)
        with replacing(file) as part:
            part.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    return Corpus(GENERATED, load_text(str(file)).documents)


def compare(
    dense: Path, graph: Graph, folder: Path, *, threads: int | None = None, text: Rows | None = None, backend: str = "ort"
) -> dict[str, Any]:
    """Lower ``graph`` into ``folder`` and time it beside the dense artifact, of the same backend.

    Returns:
        ``speed``: of decoding (decoders) or of a forward pass (encoders), times the dense model's; ``prefill``: the same for a prompt
        or a recording, None for encoders; ``token_seconds``: behind ``speed``, of one token of the graph.
    """
    task = str(graph.info["task"])
    lower_artifact(graph, folder, backend=backend)
    release_memory()
    before, after = measure([("dense", dense), ("converted", folder)], task=task, threads=threads, text=text, backend=backend)
    key = "recordings_per_s" if "recordings_per_s" in before else "prefill_tokens_per_s"
    rate = "decode_tokens_per_s" if task in WRITES else "prefill_tokens_per_s"
    prefill = after[key] / before[key] if task in WRITES else None
    return {"speed": after[rate] / before[rate], "prefill": prefill, "token_seconds": 1 / after[rate]}


def latency_table(threads: int | None = None, backend: str = "ort") -> LatencyTable:
    """Of layers in a backend on this machine."""
    used, versions = backend_of(backend), ""
    if backend == "tvm":
        from dyncomp.backends.tvm.native import library
        from dyncomp.backends.tvm.tuned import sources

        versions = f", {sources()} {used.settings()}"
    else:
        from dyncomp.backends.ort.native import library
    kernels = unavailable_reason() or library().stem  # its name changes with its sources
    return LatencyTable(used.lower, used.open, f"{used.label} {used.schema}, {kernels}{versions}", threads or default_threads())


def _measure_encoders(
    models: Sequence[tuple[str, Artifact]], *, tokens: int, batch: int, engine: str, rounds: int = 15, text: Array | None = None
) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    inputs = {s["name"]: _input(s, random, batch, tokens, text) for s in models[0][1].config["inputs"]}
    (output, *_) = models[0][1].run(**inputs).values()
    images = next(iter(inputs.values())).dtype.kind == "f"
    tokens = output.shape[1] if images and output.ndim == 3 else tokens
    seconds: list[list[float]] = [[] for _ in models]
    for turn in range(rounds + 2):
        for index, (_, model) in enumerate(models):
            start = time.perf_counter()
            model.run(**inputs)
            if turn >= 2:
                seconds[index].append(time.perf_counter() - start)
    return [
        {
            "engine": engine, "variant": variant, "precision": model.precision, "threads": model.threads, "batch": batch,
            "decode_tokens_per_s": None, "prefill_tokens_per_s": batch * tokens / statistics.median(times), "prefill_tokens": tokens,
            **({"images_per_s": batch / statistics.median(times)} if images else {}),
        }
        for (variant, model), times in zip(models, seconds, strict=True)
    ]  # fmt: skip


def _input(spec: dict[str, Any], random: np.random.Generator, batch: int, tokens: int, text: Array | None) -> Array:
    """An input as ``config.json`` describes it: tokens of the text or random ones, random pixels, masks of ones, token types of zeros."""
    shape = [{"batch": batch}.get(size, tokens) if isinstance(size, str) else size for size in spec["shape"]]
    if spec["dtype"].startswith("float"):
        return random.standard_normal(shape).astype(spec["dtype"])
    if spec["name"] == "token_type_ids":
        return np.zeros(shape, spec["dtype"])
    if spec["name"].endswith("mask"):
        return np.ones(shape, spec["dtype"])
    return random.integers(100, 1000, shape) if text is None else np.resize(text, shape)


def embed_images(opened: Bundle, files: Sequence[Path], backend: str, *, threads: int | None = None, device: str = "cpu") -> Tensor:
    """Unit embeddings [n, d] of image files, by a bundle's artifact (``torch``: its graph).

    Raises:
        RequestError: the bundle's model takes no images, or a file is none.
        BundleError: it has no artifact for the backend.
    """
    processor = opened.processor()
    if processor is None or hasattr(processor, "sampling_rate"):
        raise RequestError(f"{opened.path} holds a model that takes no images ({opened.manifest.source.task})", hint="give --prompt TEXT")
    rows, graph = torch.stack([prepare(processor, read_image(file)) for file in files]), opened.graph()
    if threads is not None:
        torch.set_num_threads(threads)
    with torch.no_grad():
        if backend == "torch":
            return embedding(graph, graph(**model_inputs(graph, rows)))
        model = backend_of(backend, device).open(artifact_for(opened, backend, device), threads=threads)
        return embedding(graph, torch.from_numpy(model.run(**model_inputs(graph, rows))[graph.outputs[0]]))


def hear(opened: Bundle, sounds: Sequence[str | Path | tuple[Samples, int]]) -> list[dict[str, Samples]]:
    """What a bundle's model takes of sounds, .wav files or (samples, samples a second): sources for its generator.

    Raises:
        RequestError: the bundle's model takes no sound.
        SoundError: a file is damaged, or longer than the model hears at a time.
    """
    processor = opened.processor()
    if not hasattr(processor, "sampling_rate"):
        what = f"{opened.path} holds a model that takes no sound ({opened.manifest.source.task})"
        raise RequestError(what, hint="give --prompt TEXT, or --image FILE to models of images")
    name = opened.graph().inputs[0].name
    found = []
    for index, sound in enumerate(sounds):
        samples, rate = sound if isinstance(sound, tuple) else read_wav(Path(sound))
        where = f"the sound number {index + 1}" if isinstance(sound, tuple) else str(sound)
        found.append({name: features(processor, samples, rate, name=where).numpy()})
    return found


def open_generator(opened: Bundle, backend: str, *, threads: int | None = None, device: str = "cpu") -> Generator | Seq2SeqGenerator:
    """What completes texts with a bundle, or of an encoder–decoder what writes for each text that it reads.

    Raises:
        RequestError: the bundle's model does not generate text, or came without a tokenizer.
        BundleError: it has no artifact for the backend.
    """
    if (tokenizer := opened.tokenizer()) is None:
        hint = "give --image FILE" if hasattr(opened.processor(), "size") else None
        raise RequestError(f"{opened.path} has no tokenizer: it cannot take text", hint=hint)
    session: Any = open_session(opened, backend, threads=threads, device=device)
    if (rules := opened.manifest.source.decoding) is None:
        return Generator(session, tokenizer)
    return Seq2SeqGenerator(session, tokenizer, rules.begin, never=rules.never, never_first=rules.never_first)


def open_session(opened: Bundle, backend: str, *, threads: int | None = None, device: str = "cpu") -> DecoderSession:
    """What generates text from a bundle.

    Raises:
        RequestError: the bundle's model does not generate text.
        BundleError: it has no artifact for the backend.
    """
    if opened.manifest.source.task not in WRITES:
        raise RequestError(
            f"{opened.path} holds a model that does not generate text ({opened.manifest.source.task})", hint="evaluate and bench work on it"
        )
    if backend != "torch":
        used, folder = backend_of(backend, device), artifact_for(opened, backend, device)
        if threads is None and backend == "ort" and device == "cpu":
            threads = session_threads(folder)
        session: DecoderSession = used.session(used.open(folder, threads=threads))
        return session
    from dyncomp.backends.torch.decoder import decoder_for as torch_decoder_for

    if threads is not None:
        torch.set_num_threads(threads)
    return torch_decoder_for(with_cache(opened.graph())[0])
