"""From a graph to a shared library of TVM code, beside a file with its parameters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from dyncomp.backends.artifact import CONFIG, ENCODER, describe
from dyncomp.backends.native.build import HINT as COMPILER_HINT
from dyncomp.backends.native.build import unavailable_reason
from dyncomp.backends.native.cross import shared_library, this_architecture
from dyncomp.backends.native.sparse import sparse_kernels
from dyncomp.backends.program import exported_program
from dyncomp.backends.tvm.layout import ALIGNMENT, LIBRARY, NATIVE, PARAMETERS, SCHEMA
from dyncomp.backends.tvm.machine import Machine, this_machine
from dyncomp.backends.tvm.native import PREFIX, instruction_set
from dyncomp.backends.tvm.native import library as native_library
from dyncomp.backends.tvm.require import require_compiler
from dyncomp.backends.tvm.tuned import Database, tiles_for
from torch.export.graph_signature import InputKind

from dyncomp.errors import BackendError
from dyncomp.graph import Graph
from dyncomp.interpret import sparse_nodes

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Lowered:
    """What lowering wrote.

    Args:
        directory: holds ``model.so``, ``parameters.bin``, ``config.json``, and ``dyncomp_tvm.so`` where weights, or keys and values, are
            in few bits.
        files: their paths.
        kernels: how many calls of each compiled function there are.
        inputs, outputs: names in order.
    """

    directory: Path
    files: tuple[Path, ...]
    kernels: dict[str, int] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


def lower(
    graph: Graph,
    directory: str | Path,
    *,
    machine: Machine | None = None,
    tuning: Database | None = None,
    progress: Progress | None = None,
) -> Lowered:
    """Compile ``graph`` into a library, its weights beside it.

    Args:
        graph: not changed. With a KV cache (``add-kv-cache``) or without.
        directory: made if absent; files of an earlier lowering are replaced.
        machine: what to make code for; by default this machine. Another architecture takes a cross compiler.
        tuning: the parameters that ``dyncomp tune`` found; by default those in the cache folder.
        progress: ``progress(stage, done, total)``.

    Raises:
        ModelError: the tuning database is damaged.
        BackendError: something in the graph has no TVM form; names it.
        MissingExtraError: TVM is not installed.
    """
    require_compiler()
    from dyncomp.backends.tvm.compile import compile_module
    from dyncomp.backends.tvm.importer import Converters, import_graph
    from dyncomp.backends.tvm.schedule import schedule_rest
    from dyncomp.backends.tvm.select import select, takes_native

    report = progress or (lambda stage, done, total: None)
    directory, machine = Path(directory), machine or this_machine()
    foreign = machine.architecture != this_architecture()
    link = shared_library(machine.architecture) if foreign else None
    native = _native_library(machine) if takes_native(graph) else None
    tiles = tiles_for(machine, tuning)
    report("select", 0, 4)
    selected = select(graph, tiles)
    report("export", 1, 4)
    program = exported_program(selected)
    keep_weights_outside(program)
    report("compile", 2, 4)
    module = import_graph(selected, program, Converters(tiles))
    compiled, kernels, order = compile_module(module, machine.target(), schedules=[schedule_rest(machine.lanes, machine.threads)])
    report("write", 3, 4)
    directory.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(directory / ENCODER, ignore_errors=True)
    if graph.encoder is not None:
        lower(graph.encoder, directory / ENCODER, machine=machine, tuning=tuning)
    for name in (LIBRARY, PARAMETERS, CONFIG, NATIVE):
        (directory / name).unlink(missing_ok=True)
    if native is not None:
        shutil.copyfile(native, directory / NATIVE)
    compiled.export_library(str(directory / LIBRARY), fcompile=link)
    tensors = tensors_of(program)
    entries = write_parameters(directory / PARAMETERS, {name: tensors[name] for name in order[len(graph.inputs) :]})
    chosen = None if native is None else "portable" if foreign else instruction_set(native)
    config = _config(graph, machine, kernels, tiles.used(selected), entries, chosen)
    (directory / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    report("write", 4, 4)
    files = tuple(directory / name for name in (LIBRARY, PARAMETERS, CONFIG, NATIVE, ENCODER) if (directory / name).exists())
    return Lowered(directory, files, kernels, tuple(s.name for s in graph.inputs), graph.outputs)


def keep_weights_outside(program: torch.export.ExportedProgram) -> None:
    """Let weights be parameters of the program: TVM writes other constants into the library. Integers stay there, indices and shapes that
    it may compute with."""
    for spec in program.graph_signature.input_specs:
        if spec.target is not None and (
            program.state_dict[spec.target].is_floating_point() or program.state_dict[spec.target].dtype == torch.uint8
        ):
            spec.kind, spec.persistent = InputKind.PARAMETER, None


def tensors_of(program: torch.export.ExportedProgram) -> dict[str, torch.Tensor]:
    """The parameters by the name the program's inputs have."""
    specs = program.graph_signature.input_specs
    return {s.arg.name: program.state_dict[s.target] for s in specs if s.target is not None}


def write_parameters(path: Path, tensors: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    entries, at = [], 0
    with path.open("wb") as file:
        for name, tensor in tensors.items():
            array = tensor.detach().contiguous().numpy()
            file.write(b"\0" * (-at % ALIGNMENT))
            at += -at % ALIGNMENT
            entries.append({"name": name, "dtype": str(array.dtype), "shape": list(array.shape), "offset": at})
            array.tofile(file)
            at += array.nbytes
    return entries


def _native_library(machine: Machine) -> Path:
    """The native kernels, which compute with quantized weights and attend: for this architecture all, of which the processor chooses, for
    another the portable ones.

    Raises:
        BackendError: they cannot be compiled.
    """
    if machine.architecture != this_architecture():
        return native_library(architecture=machine.architecture)
    if (reason := unavailable_reason()) is not None:
        raise BackendError(
            f"the TVM backend computes with quantized weights, keys and values in native kernels, and {reason}",
            hint=f"{COMPILER_HINT}, or use --backend ort",
        )
    return native_library()


def _config(
    graph: Graph,
    machine: Machine,
    kernels: dict[str, int],
    tuned: list[dict[str, Any]],
    parameters: list[dict[str, Any]],
    instruction_set: str | None,
) -> dict[str, Any]:
    return {
        **describe(graph, SCHEMA),
        "machine": machine.describe(),
        "kernels": kernels,
        "tuned": tuned,
        **({"native": {"library": NATIVE, "instruction_set": instruction_set}} if instruction_set is not None else {}),
        **({"sparse_linear": sparse_kernels(graph, kernels.get(f"{PREFIX}sparse_linear", 0))} if sparse_nodes(graph) else {}),
        "parameters": parameters,
    }
