"""From a graph to an ONNX model that ONNX Runtime runs well."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from dyncomp.backends.artifact import CONFIG, ENCODER, describe
from dyncomp.backends.attention import CACHED, has_bias
from dyncomp.backends.native import available, unavailable_reason
from dyncomp.backends.native.select import join_stand_ins, select_quantized_ffns, select_quantized_linears
from dyncomp.backends.native.sparse import select_sparse_ffns, select_sparse_linears, sparse_kernels
from dyncomp.backends.ort import ops
from dyncomp.backends.ort.attention import select_attention
from dyncomp.backends.ort.cuda import operators_of, require_supported
from dyncomp.backends.ort.exporter import made_once
from dyncomp.backends.ort.gated import select_gated, select_token_gates
from dyncomp.backends.ort.linear import select_linears
from dyncomp.backends.ort.moe import select_moe, select_quantized_moe
from dyncomp.backends.ort.native import DOMAIN, library
from dyncomp.backends.ort.nbits import select_matmul_nbits
from dyncomp.backends.ort.norm import join_token_gates, select_norms
from dyncomp.backends.ort.routed import select_routed_ffns
from dyncomp.backends.ort.simplify import simplify
from dyncomp.backends.program import exported_program

from dyncomp.errors import BackendError, MissingExtraError
from dyncomp.graph import Graph
from dyncomp.interpret import sparse_nodes
from dyncomp.regions import find_routed
from dyncomp.regions.norm import fuse_rms_norms
from dyncomp.replaced import replaced
from dyncomp.trace import undisturbed

MODEL, DATA = "model.onnx", "model.onnx.data"
SCHEMA = 2  # of CONFIG; 2: logits of the `chosen` tokens
LIBRARY = "dyncomp_ort.so"
"""The kernels, beside a model that needs them, for programs that run it without dyncomp. dyncomp itself never loads this copy."""
_OPSET = 20
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Lowered:
    """What lowering wrote.

    Args:
        directory: holds ``model.onnx``, ``model.onnx.data``, ``config.json``, and ``dyncomp_ort.so`` where native kernels are used.
        files: their paths.
        operators: how many nodes of each ONNX operator there are.
        inputs, outputs: names in order.
    """

    directory: Path
    files: tuple[Path, ...]
    operators: dict[str, int] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


def lower(
    graph: Graph, directory: str | Path, *, native: bool | None = None, device: str = "cpu", progress: Progress | None = None
) -> Lowered:
    """Write ``graph`` as an ONNX model with its weights beside it.

    Args:
        graph: not changed. With a KV cache (``add-kv-cache``) or without.
        directory: made if absent; files of an earlier lowering are replaced.
        native: quantized weights, routed FFNs, and attention beside them or with a bias by distance, run in dyncomp's own kernels
            (True), in ONNX Runtime's (False), or in ours where they can be built (None). ``config.json`` says which. Other graphs, dense
            and in float, have no use for ours.
        device: ``cuda`` leaves our kernels out, which are for CPUs, and uses only what the CUDA provider has; ``tensorrt`` is the same
            graph, for that provider leaves to CUDA's what it does not know.
        progress: ``progress(stage, done, total)``.

    Raises:
        BackendError: something in the graph has no ONNX form, or no kernel on the device; names it.
        MissingExtraError: onnx or onnxscript is not installed.
    """
    report = progress or (lambda stage, done, total: None)
    directory = Path(directory)
    try:
        import onnx_ir
        import onnxscript  # noqa: F401  (torch.onnx needs it)
    except ImportError as error:
        raise MissingExtraError(error.name or "onnxscript", needed_for="the ONNX Runtime backend", extra="ort") from error
    report("select", 0, 3)
    coded = any(s.dtype == torch.uint8 for s in graph.inputs)  # a KV cache
    biased = any(n.target is CACHED and has_bias(n) for n in graph.nodes)
    wanted = bool(graph.quantized or find_routed(graph) or coded or biased)
    on_gpu = device != "cpu"
    native = wanted and not on_gpu and (available() if native is None else native)
    selected = select(graph, native=native, on_gpu=on_gpu)
    notes = _notes(selected, wanted=wanted, native=native, on_gpu=on_gpu)
    report("export", 1, 3)
    model = _export(selected)
    from dyncomp.backends.ort.finish import finish

    finish(model, selected)
    operators = operators_of(model)
    if on_gpu:
        require_supported(operators)
    report("write", 2, 3)
    directory.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(directory / ENCODER, ignore_errors=True)
    if graph.encoder is not None:
        lower(graph.encoder, directory / ENCODER, native=native, device=device)
    for name in (MODEL, DATA, CONFIG, LIBRARY):
        (directory / name).unlink(missing_ok=True)
    ours = any(name.startswith(f"{DOMAIN}.") for name in operators)
    if ours:
        shutil.copyfile(library(), directory / LIBRARY)
    onnx_ir.save(model, directory / MODEL, external_data=DATA)
    (directory / CONFIG).write_text(json.dumps(_config(graph, selected, operators, ours, notes, device), indent=1) + "\n")
    report("write", 3, 3)
    files = tuple(directory / name for name in (MODEL, DATA, CONFIG, LIBRARY, ENCODER) if (directory / name).exists())
    return Lowered(directory, files, dict(operators), tuple(s.name for s in graph.inputs), graph.outputs)


def select(graph: Graph, *, native: bool = False, on_gpu: bool = False) -> Graph:
    """A copy of ``graph`` that calls ONNX Runtime's operators where it has better ones than ATen's; for export only.

    ``info["decoded"]`` names the quantized weights that no operator takes.
    """
    graph = graph.copy()
    fuse_rms_norms(graph)
    if any("val" not in n.meta for n in graph.nodes if n.op != "output"):
        graph.infer_shapes()
    if native:
        select_quantized_ffns(graph, ops)
    elif not on_gpu:
        select_quantized_moe(graph)
    decoded = _quantized_weights(graph) & {name for r in find_routed(graph) for name in (r.w_up, r.w_down)}
    select_gated(graph, native=native)
    if native:
        select_token_gates(graph)
    if native:
        select_sparse_ffns(graph, ops)
        select_routed_ffns(graph)
    select_attention(graph, native=native, on_gpu=on_gpu)
    select_moe(graph)
    select_norms(graph, on_gpu=on_gpu)
    join_token_gates(graph)
    select_sparse_linears(graph, ops if native else None)
    if native:
        select_quantized_linears(graph, ops, gated=True)
        join_stand_ins(graph, ops)
    else:
        select_matmul_nbits(graph)
    graph.info["decoded"] = sorted(decoded | _quantized_weights(graph))
    select_linears(graph)
    graph.clean()
    return graph


def _quantized_weights(graph: Graph) -> set[str]:
    """Names of those that nodes read."""
    return {name for name in graph.constants() if name in graph.quantized}


def _export(graph: Graph) -> Any:
    """The graph as an ``onnx_ir.Model``."""
    with _quiet(), torch.no_grad(), undisturbed(), replaced(*made_once()):
        try:
            exported = torch.onnx.export(
                exported_program(graph), dynamo=True, verbose=False, opset_version=_OPSET, optimize=False, external_data=True,
                input_names=[s.name for s in graph.inputs], output_names=list(graph.outputs),
            )  # fmt: skip
        except Exception as error:
            raise BackendError(_explain(error), hint="export it for another backend, or report the operator named above") from error
        assert exported is not None
        simplify(exported.model)
    return exported.model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx warns and logs about what does not concern the user."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _explain(error: BaseException) -> str:
    chain, seen = [], error
    while seen is not None:
        chain.append(seen)
        seen = seen.__cause__  # type: ignore[assignment]
    text = str(chain[-1]).strip().splitlines() or [type(error).__name__]
    return f"the graph cannot be written as ONNX: {text[0]}"


def _notes(selected: Graph, *, wanted: bool, native: bool, on_gpu: bool) -> list[str]:
    """What is computed otherwise than a user would think, in sentences."""
    notes = []
    if any(s.dtype == torch.float16 for s in selected.inputs):
        notes.append("attention and its KV cache are in float16: the CUDA provider has it in no wider type")
    if wanted and not native:
        left_out = "dyncomp's kernels are for CPUs" if on_gpu else "this lowering leaves dyncomp's kernels out"
        reason = left_out if on_gpu else unavailable_reason() or left_out
        notes.append(f"experts, quantized weights and attention run in ONNX Runtime's own operators: {reason}")
        if selected.info.get("screened"):
            notes.append("the vocabulary head is computed whole: screening it is for dyncomp's kernels")
    if decoded := selected.info["decoded"]:
        where = decoded[0] if len(decoded) == 1 else f"{decoded[0]} … {decoded[-1]}"
        notes.append(f"quantized weights that no operator takes are decoded and computed in float32: {len(decoded)} ({where})")
    return notes


def _config(graph: Graph, selected: Graph, operators: dict[str, int], ours: bool, notes: list[str], device: str) -> dict[str, Any]:
    return {
        **describe(graph, SCHEMA),
        "inputs": describe(selected, SCHEMA)["inputs"],
        "device": device,
        "kernels": "dyncomp" if ours else "onnxruntime",
        "notes": notes,
        **({"sparse_linear": sparse_kernels(graph, operators.get(f"{DOMAIN}.SparseLinear", 0))} if sparse_nodes(graph) else {}),
        "operators": dict(sorted(operators.items())),
    }
