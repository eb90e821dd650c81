"""Decode and prefill of SmolLM2-135M dense: our backends beside the engines people would use otherwise, in one run, taking turns.

    python -m bench.peers [--threads 2] [--prefill 512] [--engines dyncomp-tvm …] [--precisions fp32 …] [--bundles BUNDLE …]
        [--torch-compile] [--keep FOLDER] [--json FILE]

Engines: ONNX Runtime with its own kernels (MatMulNBits for int8 and int4); dyncomp's on the same weights, in ONNX Runtime and in TVM;
PyTorch in fp32 as Hugging Face runs it, on request compiled; onnxruntime-genai on the models its builder makes; llama.cpp on the packaged
GGUF (Q4_1) and on what it makes of that (F32, Q8_0, Q4_0). ``--bundles`` measures what ``dyncomp convert smollm2-135m`` made beside them,
in each backend that it has an artifact for. All read and decode the same text, for a screened head costs what the text asks for. Figures
are medians; the machine may be busy, so the last columns are what holds: speed as a multiple of the first row's, and of the best peer's
with weights in as many bits.
An engine that is not installed is named, not left out silently: ``pip install -e '.[peers]'``.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import functools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dyncomp.backends.ort.lower import lower as lower_to_onnx
from dyncomp.passes import Quantize

from dyncomp.bundle import open_bundle
from dyncomp.deploy import backend_of, open_session, with_cache
from dyncomp.examples import packaged_text
from dyncomp.graph import Graph
from dyncomp.hardware import detect
from dyncomp.models import LoadedModel, load_model
from dyncomp.models.packaged import packaged_path
from dyncomp.pipeline import Context
from dyncomp.report.markdown import GAINS, gain_cells, peer_cells, peer_columns
from dyncomp.report.tables import show, table
from dyncomp.runtime.bench import rest, timed
from dyncomp.runtime.session import Array, DecoderSession
from dyncomp.search import SCREEN
from dyncomp.trace import trace_model

PRECISIONS: dict[str, Quantize | None] = {
    "fp32": None,
    "int8": Quantize(bits=8), "int8, screened head": Quantize(bits=8, screen=SCREEN),
    "int4": Quantize(bits=4, symmetric=False), "int4, screened head": Quantize(bits=4, symmetric=False, screen=SCREEN),
}  # fmt: skip
CONTEXT, PREFILL, STEPS, ROUNDS = 64, 512, 16, 6
BITS = {"fp32": 32, "F32": 32, "int8": 8, "Q8_0": 8, "int4": 4, "Q4_1": 4, "Q4_0": 4}
"""Of the weights, by what a row's precision begins with."""
OURS = {"ort": "dyncomp, ONNX Runtime", "tvm": "dyncomp, TVM"}
NAMES = ("onnxruntime", "dyncomp-ort", "dyncomp-tvm", "torch", "genai", "llama.cpp")


@dataclass
class Engine:
    """``prefill(ids)`` empties the cache and computes them; ``step(id)`` one more. ids: int64 [n]."""

    name: str
    precision: str
    prefill: Callable[[Array], Any]
    step: Callable[[int], Any]
    bundle: str = ""

    @property
    def bits(self) -> int:
        return BITS[self.precision.partition(",")[0]]


@dataclass(frozen=True)
class Request:
    """What to measure: ``engines`` of :data:`NAMES`, ``precisions`` as rows are named (both empty for all), and on how long a prompt."""

    threads: int
    prefill: int = PREFILL
    engines: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    compiled: bool = False
    bundles: tuple[Path, ...] = ()

    def wants(self, engine: str, precision: str = "fp32") -> bool:
        return (not self.engines or engine in self.engines) and (not self.precisions or precision in self.precisions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefill", type=int, default=PREFILL, help=f"tokens of the prompt that is timed, at most {PREFILL}")
    parser.add_argument("--engines", nargs="+", default=(), choices=NAMES, help="only these")
    parser.add_argument("--precisions", nargs="+", default=(), help="only these, as the rows are named")
    parser.add_argument("--bundles", nargs="+", default=(), type=Path, help="converted models of SmolLM2-135M to measure beside them")
    parser.add_argument("--torch-compile", action="store_true", help="measure torch.compile too; it compiles for minutes")
    parser.add_argument("--keep", type=Path, help="folder to keep (or find) the lowered models in")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    if not 1 <= arguments.prefill <= PREFILL:
        parser.error(f"--prefill {arguments.prefill}: the text comes in windows of {PREFILL} tokens")
    request = Request(
        arguments.threads, arguments.prefill, tuple(arguments.engines), tuple(arguments.precisions), arguments.torch_compile,
        tuple(arguments.bundles),
    )  # fmt: skip
    torch.set_num_threads(request.threads)
    with tempfile.TemporaryDirectory() as scratch:
        loaded = load_model("smollm2-135m")
        graph = trace_model(loaded)
        text = packaged_text(loaded, graph)
        assert text is not None
        engines = prepare(loaded, graph, arguments.keep or Path(scratch), request)
        if not engines:
            parser.error("no such engine measures such a precision")
        rows = measure(engines, request, text.numpy())
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    result = table(f"SmolLM2-135M, {request.threads} threads, batch 1", *peer_columns(request.prefill))
    for row in rows:
        result.add_row(*peer_cells(row, rows[0]))
    show(result)
    if split := gains(rows):
        result = table("what each part gives when decoding, x", *GAINS)
        for gain in split:
            result.add_row(*gain_cells(gain))
        show(result)


def prepare(loaded: LoadedModel, graph: Graph, folder: Path, request: Request) -> list[Engine]:
    """Every engine that is asked for and here."""
    engines = []
    for name, precision, quantize, backend in _own():
        key = f"dyncomp-{backend}" if backend else "onnxruntime"
        if not request.wants(key, precision):
            continue
        place = folder / f"{precision.replace(', ', '-').replace(' ', '-')}-{key}"
        if not (place / "done").is_file():
            _lower(graph, quantize, backend, place)
        used = backend_of(backend or "ort")
        engines.append(_session_engine(name, precision, used.session(used.open(place, threads=request.threads))))
    for bundle in request.bundles:
        engines += _converted(bundle, request.threads)
    if request.wants("torch"):
        engines += [_hugging_face(loaded.module, compiled=compiled) for compiled in (False, True)[: 1 + request.compiled]]
    others = [*_genai(loaded, folder, request), *_llama_cpp(folder, request)]
    return [*engines, *others]


def _own() -> list[tuple[str, str, Quantize | None, str | None]]:
    """Name, precision, quantization, and the backend whose kernels are ours: None for ONNX Runtime's."""
    found: list[tuple[str, str, Quantize | None, str | None]] = []
    for precision, quantize in PRECISIONS.items():
        if quantize is None or not quantize.screen:
            found.append(("ONNX Runtime" if quantize is None else "ONNX Runtime MatMulNBits", precision, quantize, None))
        found += [(name, precision, quantize, backend) for backend, name in OURS.items()]
    return found


def _converted(bundle: Path, threads: int) -> list[Engine]:
    """A bundle in each backend that it has an artifact for; its rows bear its folder's name."""
    opened, engines = open_bundle(bundle), []
    for backend, name in OURS.items():
        if (bundle / "artifacts" / backend).is_dir():
            session: Any = open_session(opened, backend, threads=threads)
            engine = _session_engine(name, f"{session.model.precision}, {bundle.name}", session)
            engines.append(dataclasses.replace(engine, bundle=bundle.name))
    return engines


def measure(engines: list[Engine], request: Request, text: Array) -> list[dict[str, Any]]:
    """Medians, on text [windows, 512]; engines take turns, prefill by prefill and block by block of decode steps, the first of which do not
    count."""
    prefills: list[list[float]] = [[] for _ in engines]
    steps: list[list[float]] = [[] for _ in engines]
    for turn in range(ROUNDS + 1):
        window = text[turn % len(text)]
        start, read = window[:CONTEXT], window[CONTEXT : CONTEXT + STEPS].tolist()
        for index, engine in enumerate(engines):
            rest()
            seconds = timed(functools.partial(engine.prefill, window[: request.prefill]))
            engine.prefill(start)
            times = [timed(functools.partial(engine.step, token)) for token in read]
            if turn:
                prefills[index].append(seconds)
                steps[index] += times[3:]
    return beside_peers([
        {
            "engine": e.name, "precision": e.precision, "bundle": e.bundle, "bits": e.bits, "threads": request.threads, "batch": 1,
            "prefill_tokens": request.prefill, "decode_tokens_per_s": 1 / statistics.median(steps[i]),
            "prefill_tokens_per_s": request.prefill / statistics.median(prefills[i]),
        }
        for i, e in enumerate(engines)
    ])  # fmt: skip


def beside_peers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row with ``decode_x_peer`` and ``prefill_x_peer``: its rate over the best of the other engines with weights in as many bits,
    None where none was measured. What is converted keeps to the bits of its weights, too."""
    for what in ("decode", "prefill"):
        best = _best_peers(rows, what)
        for row in rows:
            row[f"{what}_x_peer"] = row[f"{what}_tokens_per_s"] / best[row["bits"]] if row["bits"] in best else None
    return rows


def _best_peers(rows: list[dict[str, Any]], what: str) -> dict[int, float]:
    """Bits of the weights -> the best rate of the other engines."""
    best: dict[int, float] = {}
    for row in rows:
        if row["engine"] not in OURS.values():
            best[row["bits"]] = max(best.get(row["bits"], 0.0), row[f"{what}_tokens_per_s"])
    return best


def gains(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What decoding with a bundle gains over the best peer in fp32, in factors: fewer bits alone (the best peers, one over the other),
    kernels alone (our dense model over the best peer in those bits), what is skipped alone (the bundle over our dense model in those)."""
    best = _best_peers(rows, "decode")
    dense: dict[tuple[str, int], float] = {}
    for row in rows:
        if row["engine"] in OURS.values() and row["precision"] in PRECISIONS and not row["bundle"]:
            dense.setdefault((row["engine"], row["bits"]), row["decode_tokens_per_s"])  # the first: without a screened head
    found = []
    for row in rows:
        rate, bits, ours = row["decode_tokens_per_s"], row["bits"], (row["engine"], row["bits"])
        if row["bundle"] and ours in dense and {32, bits} <= best.keys():
            factors = {"bits": best[bits] / best[32], "kernels": dense[ours] / best[bits], "skipping": rate / dense[ours]}
            whole = {"all": rate / best[32]} | ({"of_int8": rate / best[8]} if 8 in best else {})
            found.append({k: row[k] for k in ("bundle", "engine", "threads", "precision")} | factors | whole)
    return found


def _lower(graph: Graph, quantize: Quantize | None, backend: str | None, place: Path) -> None:
    copy = graph.copy()
    if quantize is not None and backend is None:  # MatMulNBits is fast on symmetric weights only
        quantize = dataclasses.replace(quantize, symmetric=True)
    if quantize is not None:
        quantize.run(copy, Context())
    cached, _ = with_cache(copy)
    if backend is None:
        lower_to_onnx(cached, place, native=False)
    else:
        backend_of(backend).lower(cached, place)
    (place / "done").touch()


def _session_engine(name: str, precision: str, session: DecoderSession) -> Engine:
    return Engine(
        name,
        precision,
        lambda ids: session.prefill(ids[None], np.array([len(ids)]), STEPS + 1),
        lambda token: session.step(np.array([token])),
    )


def _hugging_face(module: torch.nn.Module, *, compiled: bool) -> Engine:
    """The Hugging Face model with its usual KV cache; or compiled with a static one, as its documentation recommends."""
    from transformers import DynamicCache, StaticCache

    model: Any = next(m for m in module.modules() if hasattr(m, "generate"))
    forward = torch.compile(model.forward, dynamic=False) if compiled else model.forward
    static = StaticCache(config=model.config, max_cache_len=PREFILL + STEPS + 8) if compiled else None
    state: dict[str, Any] = {"past": 0, "cache": static}

    def run(ids: torch.Tensor, function: Callable[..., Any]) -> None:
        positions = torch.arange(state["past"], state["past"] + ids.shape[1])
        with torch.no_grad():
            function(
                input_ids=ids, past_key_values=state["cache"], cache_position=positions, position_ids=positions[None], logits_to_keep=1
            )
        state["past"] += ids.shape[1]

    def prefill(ids: Array) -> None:
        if static is not None:
            static.reset()
        else:
            state["cache"] = DynamicCache(config=model.config)
        state["past"] = 0
        run(torch.from_numpy(ids)[None], model.forward)

    name = "torch.compile" if compiled else "PyTorch, eager"
    return Engine(name, "fp32", prefill, lambda token: run(torch.tensor([[token]]), forward))


def _genai(loaded: LoadedModel, folder: Path, request: Request) -> list[Engine]:
    """The models that onnxruntime-genai's own builder makes of the dense one."""
    wanted = [p for p in ("fp32", "int8", "int4") if request.wants("genai", p)]
    if not wanted:
        return []
    try:
        import onnxruntime_genai as genai
    except ImportError as error:
        return _not_measured("onnxruntime-genai", error)
    source, builder = folder / "huggingface", Path(genai.__file__).parent / "models" / "builder.py"
    if not (source / "config.json").is_file():
        next(m for m in loaded.module.modules() if hasattr(m, "generate")).save_pretrained(source)  # type: ignore[operator]
        loaded.tokenizer.save_pretrained(source)  # type: ignore[union-attr]
    engines = []
    for precision in wanted:
        place = folder / f"genai-{precision}"
        config = place / "genai_config.json"
        if not config.is_file():
            options = ["-i", str(source), "-o", str(place), "-p", precision, "-e", "cpu", "-c", str(folder / "genai-cache")]
            subprocess.run([sys.executable, str(builder), *options], check=True, capture_output=True)
        text = json.loads(config.read_text())
        text["model"]["decoder"]["session_options"]["intra_op_num_threads"] = request.threads
        config.write_text(json.dumps(text))
        engines.append(_genai_engine(genai, genai.Model(str(place)), precision))
    return engines


def _genai_engine(genai: Any, model: Any, precision: str) -> Engine:
    state: dict[str, Any] = {}

    def prefill(ids: Array) -> None:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=PREFILL + STEPS + 8, do_sample=False)
        state["generator"] = genai.Generator(model, parameters)
        state["generator"].append_tokens(ids[None].astype(np.int32))

    return Engine("onnxruntime-genai", precision, prefill, lambda token: state["generator"].append_tokens(np.array([[token]], np.int32)))


def _llama_cpp(folder: Path, request: Request) -> list[Engine]:
    """The packaged GGUF, and what llama.cpp itself makes of it in its own formats.

    On CPUs with AMX without weights repacked for that: with them the library crashes on the first prompt (llama-cpp-python 0.3).
    """
    wanted = [name for name in ("Q4_1", "F32", "Q8_0", "Q4_0") if request.wants("llama.cpp", name)]
    if not wanted:
        return []
    try:
        import llama_cpp.llama_cpp as library
        from llama_cpp import Llama
    except ImportError as error:
        return _not_measured("llama.cpp", error)
    defaults = library.llama_model_default_params

    def without_repacking() -> Any:
        parameters = defaults()
        parameters.use_extra_bufts = False
        return parameters

    if any("amx" in extension for extension in detect().vector):
        library.llama_model_default_params = without_repacking
    packaged = packaged_path("smollm2-135m")
    files = {"Q4_1": packaged}
    kinds = {"F32": library.LLAMA_FTYPE_ALL_F32, "Q8_0": library.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_0": library.LLAMA_FTYPE_MOSTLY_Q4_0}
    for name in [n for n in wanted if n in kinds]:
        files[name] = folder / f"{name}.gguf"
        if not files[name].is_file():
            parameters = library.llama_model_quantize_default_params()
            parameters.ftype, parameters.allow_requantize = kinds[name], True
            if library.llama_model_quantize(str(packaged).encode(), str(files[name]).encode(), ctypes.byref(parameters)):
                raise RuntimeError(f"llama.cpp cannot write {packaged} as {name}")
    return [_llama_cpp_engine(Llama, name, files[name], request.threads) for name in wanted]


def _llama_cpp_engine(kind: Any, precision: str, file: Path, threads: int) -> Engine:
    model = kind(str(file), n_ctx=1024, n_batch=PREFILL, n_threads=threads, n_threads_batch=threads, verbose=False)

    def prefill(ids: Array) -> None:
        model.reset()
        model.eval(ids.tolist())

    return Engine("llama.cpp", precision, prefill, lambda token: model.eval([token]))


def _not_measured(engine: str, error: ImportError) -> list[Engine]:
    print(f"{engine} is not measured: {error.name} is not installed", file=sys.stderr)
    return []


if __name__ == "__main__":
    main()
