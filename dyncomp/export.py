"""A bundle's model in a form that other programs run, written whole or not at all, and held against the graph before it is kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dyncomp.bundle import Bundle, disk_errors, open_bundle, versions
from dyncomp.errors import BackendError, PassError, RequestError
from dyncomp.graph import Graph
from dyncomp.interpret import float_activations
from dyncomp.models.extras import require
from dyncomp.models.gguf_file import GgufFile, read_gguf
from dyncomp.passes.quantize_cache import keep_floats
from dyncomp.pipeline import relative_error
from dyncomp.regions import find_routed
from dyncomp.regions.tokens import random_inputs
from dyncomp.report.card import model_card

if TYPE_CHECKING:
    from dyncomp.backends.hf.architectures import Architecture
    from dyncomp.backends.hf.shape import Shape

RECORD = "dyncomp-export.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TEMPER = range(6, 25)


@dataclass(frozen=True)
class ExportRequest:
    """What to export.

    Args:
        bundle: a folder that ``dyncomp convert`` wrote.
        out: the folder to write; absent, empty, or an earlier export.
        backend: a key of :data:`BACKENDS`.
        architecture: of the checkpoint; ``auto`` is the first that can hold the model.
        dtype: of the checkpoint's weights, a key of :data:`DTYPES`.
        temper: p of the tempered routers (see :mod:`dyncomp.backends.hf.architectures`); None is what suits the architecture.
        target: what a compiled library is for (see :mod:`dyncomp.backends.tvm.machine`); None is this machine.
        device: what an ONNX graph is for, a key of :data:`dyncomp.backends.ort.providers.DEVICES`.
    """

    bundle: Path
    out: Path
    backend: str = "hf"
    architecture: str = "auto"
    dtype: str = "float32"
    temper: int | None = None
    target: str | None = None
    device: str = "cpu"

    def validate(self) -> None:
        """Raises:
        RequestError: an option is out of range, or the destination is taken.
        """
        if self.backend not in BACKENDS:
            raise RequestError(f"unknown backend {self.backend!r}", hint=f"backends: {', '.join(BACKENDS)}")
        if self.dtype not in DTYPES:
            raise RequestError(
                f"--dtype {self.dtype} is not supported", hint=f"one of {', '.join(DTYPES)}; tempered routers vanish in float16"
            )
        if self.temper is not None and self.temper not in TEMPER:
            raise RequestError(f"--temper {self.temper} is not between {TEMPER[0]} and {TEMPER[-1]}", hint="10 to 14 are good values")
        if self.target is not None and self.backend != "tvm":
            raise RequestError(f"--backend {self.backend} writes what runs anywhere", hint="--target goes with --backend tvm")
        if self.device != "cpu" and self.backend != "ort":
            hint = "--target cuda-sm_80 makes kernels for a GPU" if self.backend == "tvm" else "--device goes with --backend ort"
            raise RequestError(f"--backend {self.backend} writes nothing for --device {self.device}", hint=hint)
        check_destination(self.out)


def check_destination(out: Path) -> None:
    """Raises:
    RequestError: ``out`` holds something that is no earlier export, or its parent does not exist.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / RECORD).is_file()):
        raise RequestError(f"{out} exists and is not an earlier export", hint="give another folder with -o")
    if not out.absolute().parent.is_dir():
        raise RequestError(f"the folder {out.absolute().parent} does not exist", hint="make it first")


def export(request: ExportRequest) -> dict[str, Any]:
    """Export a bundle; returns what was written and how far it is from the graph.

    Raises:
        BackendError: the format cannot hold the model; says why.
        PassError: what was written does not compute what the graph does; nothing is kept.
    """
    request.validate()
    opened = open_bundle(request.bundle)
    with disk_errors(request.out), _beside(request.out) as folder:
        graph = opened.graph()
        floats = request.backend in ("hf", "gguf", "pt2") and keep_floats(graph)
        record = {"backend": request.backend, **BACKENDS[request.backend](request, opened, graph, folder)}
        if floats:
            record.setdefault("notes", []).append("keys and values are not rounded: the cache is that of the program which runs it")
        record |= {"source": opened.manifest.source.name, "passes": [p.spec for p in opened.manifest.passes], "versions": versions()}
        (folder / "README.md").write_text(model_card(opened.report(), record))
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    return record


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that becomes ``out`` when all went well."""
    part, old = out.with_name(out.name + ".part"), out.with_name(out.name + ".old")
    for leftover in (part, old):
        shutil.rmtree(leftover, ignore_errors=True)
    part.mkdir()
    try:
        yield part
        if out.exists():
            out.rename(old)
        part.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


# ---- checkpoints of transformers -----------------------------------------------------------------------------------
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.1}
"""Largest relative error of a checkpoint's logits: in float32 at the worst position; in bfloat16, where every weight and the routers'
scores are rounded to 8 bits and experts that nearly tie change places, the median over positions."""


def _hf(request: ExportRequest, opened: Bundle, graph: Graph, folder: Path) -> dict[str, Any]:
    require("transformers", needed_for="exporting a checkpoint")
    from dyncomp.backends.hf.check import compare
    from dyncomp.backends.hf.write import choose, write

    architecture, decoder, shape = choose(graph, request.architecture)
    temper = _temper(request, architecture, shape)
    source, dtype = opened.manifest.source, DTYPES[request.dtype]
    notes = write(decoder, shape, architecture, folder, source=source.config, temper=temper or 0, dtype=dtype, generation=source.generation)
    found = compare(decoder, architecture, folder, _save_tokenizer(opened, folder))
    _hold_to(found, TOLERANCE[request.dtype], f"the {architecture.name} checkpoint's", temper, worst=request.dtype == "float32")
    routed = {"temper": temper} if temper is not None else {}
    return {"architecture": architecture.name, "dtype": request.dtype, **routed, "notes": notes, "check": found}


def _temper(request: ExportRequest, architecture: Architecture, shape: Shape) -> int | None:
    """p of the routers of a model whose gates are 1; None where gates are already what the architecture computes, or where there are none.

    Raises:
        RequestError: a p was asked for that the model has no use for.
    """
    if shape.routing is not None and shape.routing.weighting.equal:
        return architecture.temper if request.temper is None else request.temper
    if request.temper is not None:
        raise RequestError("--temper is for models whose gates are 1", hint="leave it out: this model's routers are written as they are")
    return None


def _hold_to(found: dict[str, Any], allowed: float, whose: str, temper: int | None, *, worst: bool = True) -> None:
    """Raises:
    PassError: the logits are not those of the graph.
    """
    error, where = (found["relative_error"], "at the worst position") if worst else (found["median_error"], "median over positions")
    if error <= allowed:
        return
    text = f"{whose} logits differ from the graph's by {error:.1e} (relative, {where}); allowed {allowed:g}"
    if found.get("other_experts"):
        text += f"; other experts run at {found['other_experts']} of {found['positions']} positions"
    hint = "this is a defect: please report the model and the recipe"
    if temper is not None:
        hint = (
            "its gates are 1, a stock class's only nearly, and experts that score nearly alike change places: convert with "
            "fit-router{temper=4}, as the recipes granite-moe and qwen-moe do, or give Granite in transformers --temper 22"
        )
    elif found.get("other_experts"):
        hint = "experts that score alike to the last digits change places by rounding: --dtype float32 and another --architecture may not"
    raise PassError(text, hint=hint)


def _gguf(request: ExportRequest, opened: Bundle, graph: Graph, folder: Path) -> dict[str, Any]:
    require("gguf", needed_for="writing a GGUF file")
    from dyncomp.backends.gguf.check import PACKAGES, available, compare
    from dyncomp.backends.gguf.write import NAMES, write
    from dyncomp.backends.hf.write import choose

    if request.dtype != "float32":
        raise RequestError(f"--dtype {request.dtype}: weights go into a GGUF file as the codes they have, or as float32")
    architecture, decoder, shape = choose(graph, request.architecture, among=tuple(NAMES))
    temper = _temper(request, architecture, shape)
    vocabulary = _gguf_source(opened)
    file = folder / "model.gguf"
    formats = write(decoder, shape, architecture, file, temper=temper or 0, tokenizer=vocabulary)
    notes = (
        [] if vocabulary is not None else ["the file has no vocabulary: it takes and gives token ids (the model did not come from GGUF)"]
    )
    record: dict[str, Any] = {"architecture": architecture.name, "formats": formats, "notes": notes}
    if temper is not None:
        record["temper"] = temper
    if available() is None:
        record["notes"].append(f"not run: none of the packages that would ({', '.join(PACKAGES.values())}) is installed")
        return record
    found = compare(graph, file, opened.tokenizer())
    floats = set(formats) == {"F32"}  # llama.cpp rounds what it multiplies quantized weights with
    _hold_to(found, TOLERANCE["float32"] if floats else 0.1, "llama.cpp's", temper, worst=floats)
    return record | {"check": found}


def _ort(request: ExportRequest, opened: Bundle, graph: Graph, folder: Path) -> dict[str, Any]:
    from dyncomp.deploy import check_parity, lower_artifact, with_cache

    made = opened.path / "artifacts" / "ort"
    if request.device != "cpu":
        lowered, _ = lower_artifact(graph, folder, device=request.device)
    elif made.is_dir():
        shutil.copytree(made, folder, dirs_exist_ok=True)
        lowered = with_cache(graph)[0]
    else:
        lowered, _ = lower_artifact(graph, folder)
    parity = check_parity(lowered, folder)
    _save_tokenizer(opened, folder)
    notes = [
        "model.onnx with its data, config.json (inputs, outputs, KV cache) and the tokenizer: onnxruntime alone runs it, as "
        "examples/onnxruntime_only.py of dyncomp shows",
        "for onnxruntime-genai, which feeds an attention mask and other names, use --backend genai",
    ]
    if (folder / "dyncomp_ort.so").is_file():
        notes.append(
            "register dyncomp_ort.so with SessionOptions.register_custom_ops_library: it holds the operators of the domain dyncomp"
        )
    if request.device != "cpu":
        notes += [*parity["notes"], f"checked on the CPU, not run on a GPU: open it with the providers of {request.device}"]
    return {
        **({} if request.device == "cpu" else {"device": request.device}),
        "check": {"class": "ONNX Runtime", "relative_error": parity["relative_error"]},
        "notes": notes,
    }


def _genai(request: ExportRequest, opened: Bundle, graph: Graph, folder: Path) -> dict[str, Any]:
    from dyncomp.backends.genai.check import compare
    from dyncomp.backends.genai.write import CONFIG, write
    from dyncomp.backends.ort.lower import LIBRARY
    from dyncomp.backends.parity import error_of
    from dyncomp.deploy import TOLERANCE, with_cache

    task = opened.manifest.source.task
    if task != "causal-lm":
        what = {"encoder": "an encoder", "seq2seq": "an encoder–decoder"}.get(task, "a model that is no decoder")
        raise RequestError(f"{opened.path} holds {what}: onnxruntime-genai generates text", hint="use --backend ort")
    tokenizer = _save_tokenizer(opened, folder)
    if tokenizer is None:
        raise RequestError(f"{opened.path} has no tokenizer: onnxruntime-genai takes text", hint="use --backend ort")
    lowered, refused = with_cache(graph)
    if refused:
        raise BackendError(f"onnxruntime-genai needs a KV cache: {refused[0].reason}", hint="use --backend ort or pt2")
    write(lowered, folder, tokenizer)
    allowed = TOLERANCE[lowered.precision]
    found = compare(lowered, folder, good=allowed)
    if not error_of(found) <= allowed:
        raise PassError(
            f"what {found['class']} computes differs from the graph by {error_of(found):.1e} (relative); allowed {allowed:g}",
            hint="this is a defect: please report the model and the recipe",
        )
    notes = [
        f"onnxruntime_genai.Model(folder) opens it (0.13 or newer); {CONFIG} says what it feeds. A generator allocates its cache at once: "
        "set max_length to what is needed"
    ]
    if (folder / LIBRARY).is_file():
        notes.append(
            f"{CONFIG} registers {LIBRARY}, dyncomp's kernels for this machine; they update the cache in place, so num_beams stays 1"
        )
    return {"check": found, "notes": notes}


def _tvm(request: ExportRequest, opened: Bundle, graph: Graph, folder: Path) -> dict[str, Any]:
    from dyncomp.backends.native.cross import architecture_of
    from dyncomp.backends.tvm.layout import LIBRARY, NATIVE, PARAMETERS
    from dyncomp.backends.tvm.lower import lower
    from dyncomp.backends.tvm.machine import machine_named, require_machine, this_machine
    from dyncomp.deploy import check_parity, with_cache

    if request.target is not None and request.target.startswith("cuda"):
        return _cuda(request.target, opened, graph, folder)
    machine = this_machine() if request.target is None else machine_named(request.target)
    lowered, refused = with_cache(graph)
    made = lower(lowered, folder, machine=machine)
    _save_tokenizer(opened, folder)
    notes = [
        f"{LIBRARY} runs on {machine.title}, its weights are in {PARAMETERS}: TVM's runtime alone runs a decoder, as "
        "examples/tvm_only.py of dyncomp shows",
        *(f"no KV cache: {r.reason}" for r in refused),
    ]
    record: dict[str, Any] = {"target": request.target, "machine": machine.describe(), "kernels": made.kernels, "notes": notes}
    for name in (LIBRARY, NATIVE):
        if (folder / name).is_file() and (found := architecture_of((folder / name).read_bytes())) != machine.architecture:
            raise PassError(
                f"{name} was made for {found or 'nothing known'}, not for {machine.architecture}", hint="this is a defect: please report it"
            )
    try:
        require_machine(machine.describe())
    except BackendError as error:
        notes.append(f"not run: {error.what}")
        return record
    parity = check_parity(lowered, folder, backend="tvm")
    return record | {"check": {"class": "TVM", "relative_error": parity["relative_error"]}}


def _cuda(target: str, opened: Bundle, graph: Graph, folder: Path) -> dict[str, Any]:
    from dyncomp.backends.tvm.cuda.gpu import gpu_named
    from dyncomp.backends.tvm.cuda.lower import lower_cuda
    from dyncomp.backends.tvm.cuda.nvcc import EXTRA
    from dyncomp.deploy import with_cache

    lowered, refused = with_cache(graph)
    made = lower_cuda(lowered, folder, gpu_named(target))
    _save_tokenizer(opened, folder)
    notes = [
        f"{len(made.kernels)} kernels, {sum(made.calls.values())} calls; not run: dyncomp runs models on CPUs, what runs this launches them"
    ]
    notes += [f"no KV cache: {r.reason}" for r in refused]
    if not made.resources:
        notes.append(f"CUDA source only: there is no nvcc on this machine (pip install 'dyncomp[{EXTRA}]' brings one)")
    if spilled := [name for name, r in made.resources.items() if r.spilled_bytes]:
        notes.append(f"registers do not suffice for {', '.join(spilled)}")
    launched = {name: {"threads": threads} for name, threads in made.kernels.items()}
    launched |= {name: r.describe() for name, r in made.resources.items()}
    return {"target": target, "calls": made.calls, "kernels": launched, "files": [f.name for f in made.files], "notes": notes}


def _pt2(request: ExportRequest, opened: Bundle, graph: Graph, folder: Path) -> dict[str, Any]:
    from dyncomp.models.program import load_program

    names = dict.fromkeys(d for spec in graph.inputs for d in spec.shape if isinstance(d, str))
    auto = torch.export.Dim.AUTO
    dynamic = tuple({i: auto for i, d in enumerate(spec.shape) if isinstance(d, str)} for spec in graph.inputs)
    with torch.no_grad():
        program = torch.export.export(
            graph.module,
            tuple(random_inputs(graph, {name: 3 + 2 * i for i, name in enumerate(names)}).values()),
            dynamic_shapes=dynamic,
            strict=False,
        )
        torch.export.save(program, folder / "model.pt2")
        fresh = list(random_inputs(graph, {name: 4 + 5 * i for i, name in enumerate(names)}).values())
        loaded = load_program(folder / "model.pt2", name="model.pt2")
        theirs = loaded.module(**dict(zip(loaded.example_inputs, fresh, strict=True)))
        with float_activations(graph):
            error = relative_error(theirs, graph(*fresh))
    if not error <= 1e-5:
        raise PassError(f"the exported program differs from the graph by {error:.1e} (relative); allowed 1e-05")
    _save_tokenizer(opened, folder)
    notes = (
        ["load it with torch.export.load after `import dyncomp.ops`, which registers the operators it uses"] if find_routed(graph) else []
    )
    if graph.quantized:
        notes.append("quantized weights are in it decoded")
    return {"check": {"class": "torch.export", "relative_error": error}, "notes": notes}


def _save_tokenizer(opened: Bundle, folder: Path) -> Any:
    """The bundle's tokenizer, put beside the model; None when it has none."""
    tokenizer = opened.tokenizer()
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return tokenizer


def _gguf_source(opened: Bundle) -> GgufFile | None:
    """The header of the GGUF file a bundle's model came from, if it is still there."""
    from gguf import GGML_QUANT_SIZES

    from dyncomp.models import PACKAGED, packaged_path

    name = opened.manifest.source.name
    path = packaged_path(name) if name in PACKAGED else Path(name).expanduser()
    return read_gguf(path, {int(k): v for k, v in GGML_QUANT_SIZES.items()}) if path.suffix == ".gguf" and path.is_file() else None


BACKENDS: dict[str, Callable[[ExportRequest, Bundle, Graph, Path], dict[str, Any]]] = {
    "hf": _hf, "gguf": _gguf, "ort": _ort, "genai": _genai, "tvm": _tvm, "pt2": _pt2,
}  # fmt: skip
"""Name -> writes a bundle's graph into a folder, checks it, and returns facts for the record."""


def explain(bundle: Path) -> dict[str, list[str]]:
    """For each architecture of a checkpoint why it cannot hold a bundle's model; nothing when it can."""
    require("transformers", needed_for="exporting a checkpoint")
    from dyncomp.backends.hf.write import explain as reasons

    return reasons(open_bundle(bundle).graph())[2]
