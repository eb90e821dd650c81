"""From a graph to code for a GPU, which need not be there."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dyncomp.backends.artifact import CONFIG, describe
from dyncomp.backends.program import exported_program
from dyncomp.backends.tvm.cuda.gpu import Gpu
from dyncomp.backends.tvm.cuda.nvcc import Resources, compile_cuda, find_nvcc, threads_of
from dyncomp.backends.tvm.layout import PARAMETERS, SCHEMA
from dyncomp.backends.tvm.lower import keep_weights_outside, tensors_of, write_parameters
from dyncomp.backends.tvm.require import require_compiler

from dyncomp.errors import BackendError
from dyncomp.graph import Graph

SOURCE = "kernels.cu"


@dataclass(frozen=True)
class LoweredCuda:
    """What lowering wrote.

    Args:
        files: ``kernels.cu``, ``parameters.bin`` and ``config.json``; ``kernels.ptx`` and ``kernels.cubin`` where there is nvcc.
        calls: how many calls of each function there are.
        kernels: what those launch, by name, with the threads of a block.
        resources: what each kernel takes; empty without nvcc.
    """

    files: tuple[Path, ...]
    calls: dict[str, int]
    kernels: dict[str, int]
    resources: dict[str, Resources] = field(default_factory=dict)


def lower_cuda(graph: Graph, directory: str | Path, gpu: Gpu) -> LoweredCuda:
    """Write ``graph`` as CUDA kernels, its weights beside them; compiled where there is nvcc.

    Args:
        graph: not changed. directory: made if absent.

    Raises:
        BackendError: something in the graph has no form for a GPU; names it.
        MissingExtraError: TVM is not installed.
    """
    require_compiler()
    from dyncomp.backends.tvm.compile import compile_module
    from dyncomp.backends.tvm.cuda.importer import GpuConverters, select
    from dyncomp.backends.tvm.importer import import_graph
    from tvm import relax
    from tvm.s_tir import dlight

    selected = select(graph)
    program = exported_program(selected)
    keep_weights_outside(program)
    module = import_graph(selected, program, GpuConverters())
    rules = dlight.gpu
    schedules = dlight.ApplyDefaultSchedule(rules.Matmul(), rules.GEMV(), rules.Reduction(), rules.GeneralReduction(), rules.Fallback())
    compiled, calls, order = compile_module(module, gpu.target(), fusions=[relax.transform.FuseTransposeMatmul()], schedules=[schedules])
    source = _device_source(compiled.mod)
    kernels = threads_of(source)
    if not kernels:
        raise BackendError("TVM made no kernels for the GPU", hint="this is a defect: please report the model")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / SOURCE).write_text(source)
    tensors = tensors_of(program)
    entries = write_parameters(directory / PARAMETERS, {name: tensors[name] for name in order[len(graph.inputs) :]})
    nvcc = find_nvcc()
    resources = {} if nvcc is None else compile_cuda(nvcc, directory / SOURCE, gpu.architecture)
    config: dict[str, Any] = {
        **describe(graph, SCHEMA),
        "machine": {"architecture": f"cuda-{gpu.architecture}", "vector": []},
        "gpu": asdict(gpu),
        "kernels": calls,
        "launched": {name: {"threads": n, **(resources[name].describe() if resources else {})} for name, n in kernels.items()},
        "parameters": entries,
    }
    (directory / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    names = (SOURCE, "kernels.ptx", "kernels.cubin", PARAMETERS, CONFIG)
    return LoweredCuda(tuple(directory / n for n in names if (directory / n).is_file()), calls, kernels, resources)


def _device_source(module: Any) -> str:
    """The CUDA source in a module or in those it imports."""
    own = str(module.inspect_source()) if module.kind == "cuda" else ""
    return own + "".join(_device_source(m) for m in module.imports)
