"""Decode and prefill of SmolLM2-135M dense: this backend beside the engines people would use otherwise, in one run, taking turns.

    python -m bench.peers [--threads 2] [--torch-compile] [--keep FOLDER] [--json FILE]

Engines: ONNX Runtime in fp32; ONNX Runtime's own kernels for int8 and int4 (MatMulNBits); dyncomp's kernels on the same weights;
onnxruntime-genai on the models its builder makes; llama.cpp on the packaged GGUF (Q4_1) and on what it makes of that (F32, Q8_0, Q4_0);
on request torch.compile in fp32. All read and decode the same text, for a screened head costs what the text asks for.
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
from dyncomp.backends.ort.decoder import decoder_for
from dyncomp.backends.ort.lower import lower
from dyncomp.backends.ort.run import OrtModel
from dyncomp.passes import Quantize

from dyncomp.deploy import with_cache
from dyncomp.examples import packaged_text
from dyncomp.graph import Graph
from dyncomp.hardware import detect
from dyncomp.models import LoadedModel, load_model
from dyncomp.models.packaged import packaged_path
from dyncomp.pipeline import Context
from dyncomp.report.tables import show, table
from dyncomp.runtime.bench import timed
from dyncomp.runtime.session import Array, DecoderSession
from dyncomp.search import SCREEN
from dyncomp.trace import trace_model

PRECISIONS = {
    "int8": Quantize(bits=8), "int8, screened head": Quantize(bits=8, screen=SCREEN),
    "int4": Quantize(bits=4, symmetric=False), "int4, screened head": Quantize(bits=4, symmetric=False, screen=SCREEN),
}  # fmt: skip
CONTEXT, PREFILL, STEPS, ROUNDS = 64, 512, 16, 6


@dataclass
class Engine:
    """``prefill(ids)`` empties the cache and computes them; ``step(id)`` one more. ids: int64 [n]."""

    name: str
    precision: str
    prefill: Callable[[Array], Any]
    step: Callable[[int], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--torch-compile", action="store_true", help="measure torch.compile too; it compiles for minutes")
    parser.add_argument("--keep", type=Path, help="folder to keep (or find) the lowered models in")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        loaded = load_model("smollm2-135m")
        graph = trace_model(loaded)
        text = packaged_text(loaded, graph)
        assert text is not None
        engines = prepare(loaded, graph, arguments.keep or Path(scratch), arguments.threads, compiled=arguments.torch_compile)
        rows = measure(engines, arguments.threads, text.numpy())
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    result = table(
        f"SmolLM2-135M dense, {arguments.threads} threads, batch 1", "engine", "precision", ">decode tokens/s", f">prefill {PREFILL}"
    )
    for row in rows:
        result.add_row(row["engine"], row["precision"], f"{row['decode_tokens_per_s']:.1f}", f"{row['prefill_tokens_per_s']:.0f}")
    show(result)


def prepare(loaded: LoadedModel, graph: Graph, folder: Path, threads: int, *, compiled: bool = False) -> list[Engine]:
    """Every engine that is here."""
    wanted: list[tuple[str, str, Quantize | None, bool]] = [("ONNX Runtime", "fp32", None, False)]
    for precision, quantize in PRECISIONS.items():
        wanted += [] if quantize.screen else [("ONNX Runtime MatMulNBits", precision, quantize, False)]
        wanted.append(("dyncomp", precision, quantize, True))
    engines = []
    for name, precision, quantize, native in wanted:
        place = folder / f"{precision.replace(', ', '-').replace(' ', '-')}-{'dyncomp' if native else 'onnxruntime'}"
        if not (place / "done").is_file():
            _lower(graph, quantize, native, place)
        engines.append(_session_engine(name, precision, decoder_for(OrtModel(place, threads=threads))))
    if compiled:
        engines.append(_compiled(loaded.module))
    return [*engines, *_genai(loaded, folder, threads), *_llama_cpp(folder, threads)]


def measure(engines: list[Engine], threads: int, text: Array) -> list[dict[str, Any]]:
    """Medians, on text [windows, 512]; engines take turns, prefill by prefill and block by block of decode steps, the first of which do not
    count."""
    prefills: list[list[float]] = [[] for _ in engines]
    steps: list[list[float]] = [[] for _ in engines]
    for turn in range(ROUNDS + 1):
        window = text[turn % len(text)]
        start, read = window[:CONTEXT], window[CONTEXT : CONTEXT + STEPS].tolist()
        for index, engine in enumerate(engines):
            seconds = timed(functools.partial(engine.prefill, window[:PREFILL]))
            engine.prefill(start)
            times = [timed(functools.partial(engine.step, token)) for token in read]
            if turn:
                prefills[index].append(seconds)
                steps[index] += times[3:]
    return [
        {
            "engine": e.name, "precision": e.precision, "threads": threads, "batch": 1, "prefill_tokens": PREFILL,
            "decode_tokens_per_s": 1 / statistics.median(steps[i]), "prefill_tokens_per_s": PREFILL / statistics.median(prefills[i]),
        }
        for i, e in enumerate(engines)
    ]  # fmt: skip


def _lower(graph: Graph, quantize: Quantize | None, native: bool, place: Path) -> None:
    copy = graph.copy()
    if quantize is not None and not native:  # MatMulNBits is fast on symmetric weights only
        quantize = dataclasses.replace(quantize, symmetric=True)
    if quantize is not None:
        quantize.run(copy, Context())
    cached, _ = with_cache(copy)
    lower(cached, place, native=native)
    (place / "done").touch()


def _session_engine(name: str, precision: str, session: DecoderSession) -> Engine:
    return Engine(
        name,
        precision,
        lambda ids: session.prefill(ids[None], np.array([len(ids)]), STEPS + 1),
        lambda token: session.step(np.array([token])),
    )


def _compiled(module: torch.nn.Module) -> Engine:
    """The Hugging Face model with a static KV cache under torch.compile, as its documentation recommends."""
    from transformers import StaticCache

    model: Any = next(m for m in module.modules() if hasattr(m, "generate"))
    cache = StaticCache(config=model.config, max_cache_len=PREFILL + STEPS + 8)
    forward = torch.compile(model.forward, dynamic=False)
    state = {"past": 0}

    def run(ids: torch.Tensor, function: Callable[..., Any]) -> None:
        positions = torch.arange(state["past"], state["past"] + ids.shape[1])
        with torch.no_grad():
            function(input_ids=ids, past_key_values=cache, cache_position=positions, position_ids=positions[None], logits_to_keep=1)
        state["past"] += ids.shape[1]

    def prefill(ids: Array) -> None:
        cache.reset()
        state["past"] = 0
        run(torch.from_numpy(ids)[None], model.forward)

    return Engine("torch.compile", "fp32", prefill, lambda token: run(torch.tensor([[token]]), forward))


def _genai(loaded: LoadedModel, folder: Path, threads: int) -> list[Engine]:
    """The models that onnxruntime-genai's own builder makes of the dense one."""
    try:
        import onnxruntime_genai as genai
    except ImportError as error:
        return _not_measured("onnxruntime-genai", error)
    source, builder = folder / "huggingface", Path(genai.__file__).parent / "models" / "builder.py"
    if not (source / "config.json").is_file():
        next(m for m in loaded.module.modules() if hasattr(m, "generate")).save_pretrained(source)  # type: ignore[operator]
        loaded.tokenizer.save_pretrained(source)  # type: ignore[union-attr]
    engines = []
    for precision in ("fp32", "int8", "int4"):
        place = folder / f"genai-{precision}"
        config = place / "genai_config.json"
        if not config.is_file():
            options = ["-i", str(source), "-o", str(place), "-p", precision, "-e", "cpu", "-c", str(folder / "genai-cache")]
            subprocess.run([sys.executable, str(builder), *options], check=True, capture_output=True)
        text = json.loads(config.read_text())
        text["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
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


def _llama_cpp(folder: Path, threads: int) -> list[Engine]:
    """The packaged GGUF, and what llama.cpp itself makes of it in its own formats.

    On CPUs with AMX without weights repacked for that: with them the library crashes on the first prompt (llama-cpp-python 0.3).
    """
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
    formats = {"F32": library.LLAMA_FTYPE_ALL_F32, "Q8_0": library.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_0": library.LLAMA_FTYPE_MOSTLY_Q4_0}
    for name, kind in formats.items():
        files[name] = folder / f"{name}.gguf"
        if not files[name].is_file():
            parameters = library.llama_model_quantize_default_params()
            parameters.ftype, parameters.allow_requantize = kind, True
            if library.llama_model_quantize(str(packaged).encode(), str(files[name]).encode(), ctypes.byref(parameters)):
                raise RuntimeError(f"llama.cpp cannot write {packaged} as {name}")
    return [_llama_cpp_engine(Llama, name, file, threads) for name, file in files.items()]


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
